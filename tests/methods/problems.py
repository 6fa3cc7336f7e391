"""Small decomposition problems, and `slab+` step by step."""

from functools import cache

import torch

import slablm.compression.cpu_sweep  # noqa: F401  # as in a compression: the search in plain torch takes a hundred times as long
from slablm.config import CompressionConfig
from slablm.methods import LayerStats
from slablm.methods.allocation import Demand
from slablm.methods.slab_plus import DAMPINGS, Inputs, Start, Trial, descent, feedback, slab_plus
from slablm.methods.sweep import damped
from slablm.methods.symbols_fit import Problem, fit_alphabet, nearest_symbols, refit


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


@cache
def wide():
    """A weight [48, 160], and Gram matrices of two samples of the same inputs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(160, 160, generator=generator) / 160**0.5 + torch.eye(160)
    sizes = 10 ** torch.linspace(-1, 1, 160)[torch.randperm(160, generator=generator)]
    inputs = torch.randn(2, 600, 160, generator=generator) @ mixing * sizes
    weight = torch.randn(48, 160, generator=generator) * (0.5 + torch.rand(48, 1, generator=generator))
    return weight, *(x.T @ x for x in inputs)


def settings_for(shape, bits, seed=0):
    """Settings with just room for symbols of so many bits."""
    return CompressionConfig(bits_per_weight=Demand.of(shape).sizes[bits - 2], seed=seed)


def decomposed(weight, stats, bits, seed=0):
    return slab_plus(weight, stats, settings_for(weight.shape, bits, seed))


def slow_error(weight, approximation, gram):
    """Tr ΔGΔᵀ in float64."""
    difference = (weight - approximation).double()
    return ((difference @ gram.double()) * difference).sum().item()


def start_of(weight, gram, bits):
    return fit_alphabet(weight, gram.diagonal().sqrt(), bits)


def rounded(weight, alphabet):
    return nearest_symbols(weight, alphabet.scales, alphabet.values())


def fed(weight, gram, alphabet, damping):
    """Step 2 with an alphabet of one's choice: symbols."""
    return feedback(Start(weight, Inputs(stats_of(gram), gram), alphabet), damping)


def trial_of(weight, gram, bits, rotation=None, damping=DAMPINGS[0]):
    return Trial.of(Start.of(weight, Inputs.of(stats_of(gram), gram, rotation), bits), damping)


def descended_once(problem, codes, alphabet):
    """One sweep of step 4: symbols."""
    return descent(problem.gram, codes, alphabet, (problem.weight - alphabet.dense(codes)) @ problem.gram)


def by_hand(weight, gram, bits, rotation=None, damping=0.1, *, sweep=True, fit=True, descents=4):
    """All steps, one after the other: Ŵ. One of them can be left out."""
    if rotation is not None:
        weight, gram = rotation.rotate(weight), rotation.rotate_gram(gram)
    problem, alphabet = Problem(weight, damped(gram, damping)), start_of(weight, gram, bits)

    def fitted():
        return refit(problem, codes, alphabet)[0] if fit else alphabet

    codes = fed(weight, gram, alphabet, damping) if sweep else rounded(weight, alphabet)
    alphabet = fitted()
    for _ in range(descents):
        codes = descended_once(problem, codes, alphabet)
        alphabet = fitted()
    dense = alphabet.dense(codes)
    return dense if rotation is None else rotation.restore(dense)
