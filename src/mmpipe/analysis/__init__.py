"""Metrics of routing, one family per file, each a table and a figure of the report."""
