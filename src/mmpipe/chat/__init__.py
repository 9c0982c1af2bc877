"""Chat with a checkpoint: in a terminal, in a browser, and through OpenAI's protocol."""
