"""Routers: one file each, found by looking; a router's name is the name of its file."""
