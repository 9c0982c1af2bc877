"""One check a file: ``check(machine)`` yields findings."""
