"""The HTML report: figures, tables and samples, each also readable on its own."""
