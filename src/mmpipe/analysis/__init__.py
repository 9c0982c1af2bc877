"""What experts do: metrics of routing, one family a file, each a table and a figure of the report."""
