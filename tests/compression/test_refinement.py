"""Refinement of a block: lower error where it was not trained, the same form, and never a worse result."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from slablm import CompressionConfig
from slablm.api import decompose
from slablm.calibration.activations import Activations
from slablm.compression.refinement import _Movable, refine
from slablm.methods import LayerStats
from slablm.methods.slab_plus import slab_plus
from slablm.packing import pack

HIDDEN, INNER = 16, 24
FORMS = ["grid", "slab", "without signs", "wanda"]


def dense_weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    return {name: torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in shapes.items()}


def run(weights, states):
    return states + functional.linear(torch.tanh(functional.linear(states, weights["up"])), weights["down"])


def pieces(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 20, HIDDEN, generator=generator) for _ in range(count)]


def buffer(tensors):
    result = Activations(len(tensors))
    for tensor in tensors:
        result.append(tensor)
    return result


def packed_weights(form):
    result = {}
    for name, weight in dense_weights().items():
        if form == "grid":
            config = CompressionConfig(method="slab+", magnitude_bits=2, group_size=8)
            gram = torch.eye(weight.shape[1])
            decomposition = slab_plus(weight, LayerStats(gram.diagonal(), 1, weight[:0], gram), config)
        else:
            decomposition = decompose(weight, method="wanda" if form == "wanda" else "slab")
            if form == "without signs":
                decomposition = replace(decomposition, signs=None)
        result[name] = pack(decomposition, torch.float16, name)
    return result


def loss(weights, inputs):
    """The module's formula, token by token."""
    dense, errors = dense_weights(), []
    for states in inputs:
        wanted, found = run(dense, states)[0], run(weights, states)[0]
        errors += [((f - w).norm() / w.norm()) ** 2 for f, w in zip(found, wanted, strict=True)]
    return torch.stack(errors).mean().item()


def refined(form, count=18, seed=0):
    packed, inputs = packed_weights(form), pieces(count)
    return packed, refine(packed, run, buffer(inputs), buffer([run(dense_weights(), x) for x in inputs]), seed)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_lower_error_on_other_pieces_in_the_same_form(form):
    before, after = refined(form)
    unseen = pieces(10, seed=2)
    errors = [loss({name: weight.dense() for name, weight in which.items()}, unseen) for which in (before, after)]
    assert errors[1] < 0.95 * errors[0]
    for name, weight in after.items():
        assert weight.spec == before[name].spec
        assert torch.equal(weight.plane, before[name].plane)
        assert torch.equal(weight.values.signbit(), before[name].values.signbit())
        assert not torch.equal(weight.values, before[name].values)


@torch.no_grad()
def test_factors_keep_their_type_beside_a_grid():
    """Values on a grid are FP16 in any model; the factors must not follow."""
    packed = {name: pack(weight.unpack(), torch.bfloat16, name) for name, weight in packed_weights("grid").items()}
    inputs = pieces(18)
    after = refine(packed, run, buffer(inputs), buffer([run(dense_weights(), x) for x in inputs]), 0)
    for name, weight in after.items():
        assert not torch.equal(weight.left, packed[name].left)
        assert (weight.left.dtype, weight.right.dtype) == (torch.bfloat16, torch.bfloat16)
        assert weight.spec == packed[name].spec


@torch.no_grad()
def test_a_token_without_an_output_has_no_relative_error():
    """Padding: its embedding is zero, and so is the output of the dense block."""
    packed, inputs = packed_weights("signs"), pieces(18)
    for states in inputs:
        states[0, 0] = 0
    after = refine(packed, run, buffer(inputs), buffer([run(dense_weights(), x) for x in inputs]), 0)
    assert all(torch.isfinite(weight.dense()).all() for weight in after.values())
    assert not any(torch.equal(weight.values, packed[name].values) for name, weight in after.items())


@torch.no_grad()
def test_a_refinement_that_diverges_changes_nothing():
    packed, inputs = packed_weights("signs"), pieces(18)

    def broken(weights, states):
        return run(weights, states) * torch.nan

    assert refine(packed, broken, buffer(inputs), buffer([run(dense_weights(), x) for x in inputs]), 0) is packed


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_what_was_refined_is_the_same_after_a_file(form):
    for weight in refined(form)[1].values():
        assert torch.equal(weight.spec.from_parts(weight.parts()).dense(), weight.dense())


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_without_a_step_nothing_changes(form):
    for weight in packed_weights(form).values():
        again = pack(_Movable(weight.unpack()).rounded(), torch.float16)
        assert torch.equal(again.dense(), weight.dense())
        assert all(torch.equal(part, weight.parts()[name]) for name, part in again.parts().items())


@torch.no_grad()
def test_the_current_weight_is_differentiable_and_the_stored_one():
    movable = _Movable(packed_weights("grid")["up"].unpack())
    with torch.enable_grad():
        weight = movable.current().dense()
        gradients = torch.autograd.grad(weight.square().sum(), [*movable.numbers, movable.codes])
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert torch.equal(weight, movable.rounded().dense())


@torch.no_grad()
def test_kept_only_if_better_on_the_pieces_held_back():
    """The pieces that are trained on want something else than those that are held back."""
    packed, inputs = packed_weights("slab"), pieces(18)
    current = {name: weight.dense() for name, weight in packed.items()}
    wanted = [run(dense_weights(), x) for x in inputs[:16]] + [run(current, x) for x in inputs[16:]]
    assert refine(packed, run, buffer(inputs), buffer(wanted), 0) is packed


@torch.no_grad()
def test_a_single_piece_cannot_be_held_back():
    before, after = refined("slab", count=1)
    assert after is before


@torch.no_grad()
def test_the_seed_decides_and_nothing_is_left_in_the_block():
    layer = nn.Linear(HIDDEN, HIDDEN)

    def with_bias(weights, states):
        return run(weights, states) + layer.bias

    packed, inputs = packed_weights("grid"), buffer(pieces(18))
    outputs = buffer([with_bias(dense_weights(), x) for x in pieces(18)])
    first, second, other = (refine(packed, with_bias, inputs, outputs, seed) for seed in (3, 3, 4))
    for name in packed:
        assert torch.equal(first[name].values, second[name].values)
        assert not torch.equal(first[name].values, other[name].values)
    assert layer.bias.grad is None


def test_a_yardstick_stays_as_it_is(tiny_model, tokenizer, quick):
    """It has no packed form; a comparison may still be given these settings."""
    from slablm.calibration.windows import calibration_windows
    from slablm.compression.blocks import compress_blocks
    from slablm.dense.targets import select_targets

    config = replace(quick, method="rtn", refine=True)
    windows = calibration_windows(tiny_model, tokenizer, config)
    reports = compress_blocks(tiny_model, select_targets(tiny_model, config), windows, config)
    assert len(reports) == 14
    assert all(report.output_error > 0 for report in reports)
