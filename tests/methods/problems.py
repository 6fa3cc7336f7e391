"""Small decomposition problems."""

import torch

from slablm.methods import LayerStats


def correlated(m=24, n=40, tokens=400, seed=0):
    """A weight, and Gram matrices of two samples of inputs whose features depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator) * torch.rand(n, generator=generator).square() * 3
    inputs = torch.randn(2, tokens, n, generator=generator) @ mixing
    weight = torch.randn(m, n, generator=generator)
    return weight, *(x.T @ x for x in inputs)


def stats_of(gram, held_out=None):
    """What calibration would have kept of inputs with these Gram matrices."""
    return LayerStats(gram.diagonal().sqrt(), 400, torch.zeros(0, len(gram)), gram, held_out)
