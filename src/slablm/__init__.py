"""One-shot compression of large language models by SLaB (arXiv 2604.04493)."""

__version__ = "0.1.0"
