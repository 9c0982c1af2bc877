"""mmpipe: from public data to trained, distilled, sparsified and benchmarked vision-language models."""

__version__ = "0.1.0"
"""Raised by a release alone: manifests contain it, and what was made from an artifact is made again when the manifest of the
artifact changes."""
