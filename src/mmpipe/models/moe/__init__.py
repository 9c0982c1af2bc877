"""Mixture of experts: layers, routers, placement, and up-cycling of dense models to sparse ones."""
