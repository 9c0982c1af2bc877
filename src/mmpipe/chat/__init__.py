"""Talking to a checkpoint: in a terminal, in a browser, and through OpenAI's protocol."""
