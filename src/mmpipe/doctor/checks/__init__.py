"""Checks by subject: each ``check_topic(machine)`` yields findings."""
