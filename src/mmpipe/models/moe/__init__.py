"""Mixture of experts: layers, routers, where they stand in a model, and how a dense model becomes sparse.

Shapes are part of the names: B batch, L length, D width, F inner width of an expert, T tokens, N experts, K
chosen ones.
"""
