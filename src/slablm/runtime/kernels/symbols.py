"""Weights in symbols: what a file holds is what the kernels read, so there is nothing to lay out first.

`linear` is what layers call. On the CPU a few tokens are multiplied straight from the tiles (`native.symbols_matvec`),
and with AVX-512 so are many (`native.symbols_matmul`). With the other sets the inputs of many are rotated, and rows of
the matrix for rotated inputs are unpacked a tile at a time into a small buffer, which torch multiplies. Elsewhere the
dense weight is made for the call: on other devices, without the compiled kernels, and for types that they do not know.

An infinity among inputs that are rotated would be one in all columns of its block, with either sign, and make NaN of
every output. Such inputs go to the dense weight as well.

Under `torch.compile`, and where a gradient with respect to the inputs is needed, the call is the operator
``torch.ops.slablm.symbols_linear``; see `dispatch`, where it is also decided which instruction set runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slablm.methods.rotation import Rotation
from slablm.methods.symbols import TILE_ROWS
from slablm.packing.symbols import PackedSymbols, SymbolSpec
from slablm.runtime.kernels import gpu_symbols, native
from slablm.runtime.kernels.backends import CUDA, activation_bits, backend, symbols_backend
from slablm.runtime.kernels.dispatch import (
    DECODE_TOKENS,
    KERNEL_DTYPES,
    check_inputs,
    needs_operator,
    sum_over_tiles,
    times_tiles,
)

# Where there is a kernel for many tokens, it is faster for more than these.
_MATVEC_TOKENS = 4
# As for the other layouts: large enough for an efficient matrix product, small enough to stay in the cache.
_TILE_BYTES = 4 << 20
# Integers of an operator have 64 bits and a sign; a seed has no sign.
_SEEDS = 2**64


def linear(inputs: Tensor, weight: PackedSymbols) -> Tensor:
    """Ŵ applied to [..., n] → [..., m], in the inputs' dtype, accumulated in float32; differentiable in the inputs.

    Exact up to rounding, with one exception: for a few tokens, and for all with AVX-512, the inputs are rounded to 14
    bits on the CPU and to 16 on an NVIDIA GPU, and products are summed in integers (relative error about 1e-4).

    Args:
        inputs: any float type, on the weight's device.
        weight: as it is stored.

    Raises:
        SlabError: inputs on another device, or of another width.
    """
    check_inputs(inputs, weight.device, weight.in_features)
    if needs_operator(inputs):
        outputs: Tensor = _operator(inputs, *_arguments(weight))
        return outputs
    return _run(inputs, weight)


def _run(inputs: Tensor, weight: PackedSymbols) -> Tensor:
    if _on_gpu(weight, inputs.dtype):
        with torch.cuda.device(weight.device):
            rows = gpu_symbols.linear(inputs.reshape(-1, weight.in_features).contiguous(), weight)
        return rows.view(*inputs.shape[:-1], weight.spec.out_features)
    chosen = _kernels(weight, inputs.dtype)
    if chosen is None:
        return _reference(inputs, weight)
    name, library = chosen
    most = _MATVEC_TOKENS if name in library.batched else DECODE_TOKENS
    few = inputs.numel() <= most * weight.in_features
    outputs = (_decode if few else _prefill)(*chosen, weight, inputs.contiguous())
    return _reference(inputs, weight) if outputs is None else outputs


def _kernels(weight: PackedSymbols, dtype: torch.dtype) -> tuple[str, native.Library] | None:
    """The instruction set and the library that multiply a weight with numbers of this type, if there are any."""
    chosen = backend(weight.device)
    if chosen.library is None or dtype not in KERNEL_DTYPES:
        return None
    return chosen.name, chosen.library


def _on_gpu(weight: PackedSymbols, dtype: torch.dtype) -> bool:
    """Whether the kernels for NVIDIA GPUs multiply a weight with numbers of this type."""
    known = weight.device.type == "cuda" and dtype in KERNEL_DTYPES and gpu_symbols.reads(weight)
    return known and symbols_backend(weight.device).name == CUDA


def _reference(inputs: Tensor, weight: PackedSymbols) -> Tensor:
    return functional.linear(inputs, weight.dense().to(inputs.dtype))


def _decode(name: str, library: native.Library, weight: PackedSymbols, inputs: Tensor) -> Tensor | None:
    """[..., n] → [..., m], or None where rotated inputs are not finite."""
    if inputs.numel() <= native.MAX_TOKENS * weight.in_features:
        return native.symbols_matvec(library, name, weight, inputs)
    outputs = []
    for part in torch.split(inputs.view(-1, weight.in_features), native.MAX_TOKENS):
        product = native.symbols_matvec(library, name, weight, part)
        if product is None:
            return None
        outputs.append(product)
    return torch.cat(outputs).view(*inputs.shape[:-1], weight.spec.out_features)


def _prefill(name: str, library: native.Library, weight: PackedSymbols, inputs: Tensor) -> Tensor | None:
    """As `_decode`; where rows have to be unpacked, float16 is multiplied in float32."""
    if name in library.batched:
        return native.symbols_matmul(library, name, weight, inputs, activation_bits())
    dtype = torch.bfloat16 if inputs.dtype == torch.bfloat16 else torch.float32
    rows = inputs.view(-1, weight.in_features)
    if weight.spec.rotation is not None:
        rotated = rows.to(torch.float32, copy=True)
        native.rotate(library, name, weight.spec.rotation, rotated)
        if not rotated.isfinite().all():
            return None
        rows = rotated
    outputs = times_tiles(rows.to(dtype), _tiles(name, library, weight, dtype), weight.spec.out_features)
    return outputs.to(inputs.dtype).view(*inputs.shape[:-1], weight.spec.out_features)


def _tiles(
    name: str, library: native.Library, weight: PackedSymbols, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the matrix for rotated inputs, a few at a time, and which they are; a tile lasts until the next one."""
    m, n = weight.spec.out_features, weight.in_features
    step = max(1, _TILE_BYTES // (n * dtype.itemsize * TILE_ROWS)) * TILE_ROWS
    buffer = torch.empty(min(step, m), n, dtype=dtype, device="cpu")
    for begin in range(0, m, step):
        end = min(begin + step, m)
        native.symbols_unpack(library, name, weight, begin, end, buffer)
        yield slice(begin, end), buffer[: end - begin]


def _run_gradient(gradient: Tensor, weight: PackedSymbols) -> Tensor:
    """Gradient of the outputs [..., m] → of the inputs [..., n]: multiplied by Ŵ R, and rotated back."""
    if _on_gpu(weight, gradient.dtype):
        with torch.cuda.device(weight.device):
            rows = gpu_symbols.times(gradient.reshape(-1, gradient.shape[-1]), weight)
        return rows.to(gradient.dtype).view(*gradient.shape[:-1], weight.in_features)
    chosen, rotation = _kernels(weight, gradient.dtype), weight.spec.rotation
    if chosen is None:
        return gradient @ weight.dense().to(gradient.dtype)
    rows = gradient.reshape(-1, gradient.shape[-1]).float()
    result = sum_over_tiles(rows, _tiles(*chosen, weight, torch.float32), weight.in_features)
    if rotation is not None:
        native.rotate(chosen[1], chosen[0], rotation, result, restore=True)
    return result.to(gradient.dtype).view(*gradient.shape[:-1], weight.in_features)


def _arguments(weight: PackedSymbols) -> tuple[Any, ...]:
    """What the operator takes: all tensors, and the numbers that their shapes do not tell; 0 is none of a thing."""
    spec = weight.spec
    block, seed = (0, 0) if spec.rotation is None else (spec.rotation.block, spec.rotation.seed)
    signed = seed - _SEEDS if seed >= _SEEDS // 2 else seed
    return *weight.parts().values(), [spec.in_features, block, signed]


def _weight(
    symbols: Tensor,
    scales: Tensor,
    levels: Tensor,
    numbers: list[int],
) -> PackedSymbols:
    """Inverse of `_arguments`."""
    in_features, block, seed = numbers
    rotation = Rotation(in_features, block, seed % _SEEDS) if block else None
    spec = SymbolSpec(len(scales), in_features, len(levels).bit_length() - 1, rotation)
    return PackedSymbols(spec, symbols, scales, levels)


@torch.library.custom_op("slablm::symbols_linear", mutates_args=())
def _operator(
    inputs: Tensor,
    symbols: Tensor,
    scales: Tensor,
    levels: Tensor,
    numbers: list[int],
) -> Tensor:
    """`linear` with the weight's tensors spelled out, for the compiler and for autograd."""
    return _run(inputs, _weight(symbols, scales, levels, numbers))


@torch.library.custom_op("slablm::symbols_linear_gradient", mutates_args=())
def _gradient_operator(
    gradient: Tensor,
    symbols: Tensor,
    scales: Tensor,
    levels: Tensor,
    numbers: list[int],
) -> Tensor:
    """Gradient of `_operator` with respect to its inputs."""
    return _run_gradient(gradient, _weight(symbols, scales, levels, numbers))


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What a backward needs of the forward's arguments: those behind the first, none of them a dense weight."""
    ctx.save_for_backward(*inputs[1:4])
    ctx.numbers = inputs[4]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _gradient_operator(gradient, *ctx.saved_tensors, ctx.numbers), *(None,) * 4


_operator.register_autograd(_backward, setup_context=_keep_weight)
_operator.register_fake(lambda x, symbols, scales, *_: x.new_empty(*x.shape[:-1], scales.shape[0]))
_gradient_operator.register_fake(lambda gradient, *weight: gradient.new_empty(*gradient.shape[:-1], weight[-1][0]))
