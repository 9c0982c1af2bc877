"""Bringing files onto this machine: downloading, unpacking, and remembering what was seen the first time."""
