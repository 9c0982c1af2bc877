"""mmpipe: from public data to trained, distilled, sparsified and benchmarked vision-language models."""

__version__ = "0.1.0"
