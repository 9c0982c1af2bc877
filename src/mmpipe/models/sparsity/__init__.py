"""Learned sparsification of images and text in the context (Dynamic-LLaVA, Huang et al., arXiv 2412.00876).

Small predictors after the first decoder layers select the tokens of later layers. In training, dropped tokens stop
being keys of others (:mod:`attention`); in generation they leave the computation and the cache (:mod:`cache`). The
language model is a stock one: :mod:`hooks` connects everything.
"""
