"""Learned sparsification of images and text in the context (Dynamic-LLaVA, Huang et al., arXiv 2412.00876).

Small predictors behind the first decoder layers say which tokens later layers need. In training, tokens that are dropped
stop being keys of others (:mod:`attention`); in generation they leave the computation and the cache (:mod:`cache`). The
language model is a stock one: :mod:`wrap` connects everything with hooks.
"""
