"""Evaluation of dense and compressed models alike."""

from slablm.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
