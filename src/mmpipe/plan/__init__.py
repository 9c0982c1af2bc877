"""The plan of a run: configuration, recipes and what follows from them."""
