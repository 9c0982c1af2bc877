"""Mixture of experts: layers, routers, placement, and up-cycling."""
