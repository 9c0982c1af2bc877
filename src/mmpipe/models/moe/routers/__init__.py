"""Routers: one file each, found by looking. A file defines a class ``Router``; its name is the file's
name."""
