"""The command line: `mmpipe ...`."""
