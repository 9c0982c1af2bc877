"""How annotations are written, one module a format; its ``read(path, source)`` yields drafts of records."""
