"""Transfer of files: downloading, unpacking, locking versions."""
