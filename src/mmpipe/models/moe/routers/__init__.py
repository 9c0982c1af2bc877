"""Routers: one file each; a router's name is the name of its file."""
