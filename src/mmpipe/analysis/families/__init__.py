"""One file a family of metrics: small functions on arrays, and a ``FAMILY`` that reads, tabulates and draws them."""
