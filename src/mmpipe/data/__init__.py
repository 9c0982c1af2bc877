"""Records and their formats, chat templates and labels, images, mixtures and their verification."""
