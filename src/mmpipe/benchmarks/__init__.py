"""One file a benchmark: its questions, its prompt, its submission file and its score."""
