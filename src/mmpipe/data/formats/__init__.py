"""The formats of annotations, one module each; its ``read(path, source)`` yields parsed records."""
