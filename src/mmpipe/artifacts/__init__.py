"""Publishing artifacts atomically, and resuming interrupted steps."""
