"""What the HTML report shows: figures, tables and samples, each also readable on its own."""
