"""Publishing artifacts so that they are whole or absent, and resuming what was interrupted."""
