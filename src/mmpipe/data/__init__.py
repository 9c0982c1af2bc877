"""Records and their formats, chat templates and labels, pictures, mixtures and their verification."""
