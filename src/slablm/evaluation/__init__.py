"""Evaluation of dense and compressed models alike: perplexity, zero-shot tasks, speed, energy.

May import: `planning` and what stands above it.
"""

from slablm.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
