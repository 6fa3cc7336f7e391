"""Which code runs, and why: the one place that decides.

`linear` is what layers call. Three cases:

- a few tokens (decode): the compiled kernel reads the planes directly, `native.matvec`;
- more tokens (prefill): rows are unpacked a tile at a time into a small buffer, which torch multiplies; there is never
  a dense weight;
- no library, another device or a gradient is needed: the reference in plain torch.

The environment variable ``SLABLM_KERNEL`` forces an instruction set (``avx512``, ``avx2``, ``neon``, ``portable``) or
the ``reference``. Under `torch.compile` the call is the operator ``torch.ops.slablm.linear``; in eager mode it is made
directly, because at small layers the operator's bookkeeping would take as long as the kernel.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from slablm.errors import SlabError
from slablm.float32 import fast_float32
from slablm.kernels import native, reference
from slablm.kernels.layout import NativeWeight

ENVIRONMENT_VARIABLE = "SLABLM_KERNEL"
REFERENCE = "reference"

# Up to so many tokens the planes are read once per `native.MAX_TOKENS` tokens, beyond it tiles are unpacked.
DECODE_TOKENS = 16
# Bytes of one unpacked tile: large enough for an efficient matrix product, small enough to stay in the cache.
_TILE_BYTES = 4 << 20

_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Backend:
    """What runs the packed layers on this machine.

    Attributes:
        name: an instruction set of `native.INSTRUCTION_SETS`, or ``"reference"``.
        reason: why, as one sentence.
        library: the loaded kernels; None for the reference.
    """

    name: str
    reason: str
    library: native.Library | None = None


def backend() -> Backend:
    """The backend of this process, by ``SLABLM_KERNEL`` or else the fastest that this CPU can run.

    Raises:
        SlabError: ``SLABLM_KERNEL`` names something that this machine cannot run.
    """
    return _backend(os.environ.get(ENVIRONMENT_VARIABLE, ""))


def explain() -> str:
    """One line for people: the backend and the reason."""
    chosen = backend()
    return f"{chosen.name}: {chosen.reason}"


@cache
def _backend(forced: str) -> Backend:
    library = native.load()
    if forced == REFERENCE:
        return Backend(REFERENCE, f"forced by {ENVIRONMENT_VARIABLE}")
    if isinstance(library, str):
        if forced:
            raise SlabError(f"{ENVIRONMENT_VARIABLE}={forced} cannot be used: {library}")
        return Backend(REFERENCE, f"{library}: plain torch, no speed-up")
    if not forced:
        return Backend(library.supported[0], "the fastest instruction set of this CPU", library)
    if forced not in library.supported:
        choices = ", ".join((*library.supported, REFERENCE))
        raise SlabError(f"{ENVIRONMENT_VARIABLE}={forced} cannot be used on this machine: choose one of {choices}")
    return Backend(forced, f"forced by {ENVIRONMENT_VARIABLE}", library)


def linear(inputs: Tensor, weight: NativeWeight) -> Tensor:
    """Ŵ applied to [..., n] → [..., m], in the inputs' dtype, accumulated in float32.

    Exact up to rounding, with one exception: 8-bit values and a few tokens, where the inputs are rounded to 14 bits,
    one scale per 64 columns, and the products are summed in integers (relative error about 1e-4).

    Args:
        inputs: any float type.
        weight: in runtime layout, on the CPU.
    """
    if torch.compiler.is_compiling():
        outputs: Tensor = _operator(
            inputs,
            weight.values,
            weight.scales,
            weight.planes,
            weight.left,
            weight.right,
            weight.in_features,
        )
        return outputs
    return _run(inputs, weight)


def dense_linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """A dense 16-bit weight applied to [..., n] → [..., m], in the inputs' dtype, accumulated in float32.

    Args:
        inputs: any float type.
        weight: [m, n], float16 or bfloat16.
    """
    if inputs.dtype == weight.dtype:
        return functional.linear(inputs, weight)
    if torch.compiler.is_compiling():
        outputs: Tensor = _dense_operator(inputs, weight)
        return outputs
    return _run_dense(inputs, weight)


def _run_dense(inputs: Tensor, weight: Tensor) -> Tensor:
    m, n = weight.shape
    rows = inputs.reshape(-1, n)
    chosen = backend() if weight.device.type == "cpu" else Backend(REFERENCE, "not on the CPU")
    needs_gradient = torch.is_grad_enabled() and inputs.requires_grad
    native_dtype = inputs.dtype in _NATIVE_DTYPES and not needs_gradient
    if chosen.library is not None and native_dtype and rows.shape[0] <= native.MAX_TOKENS:
        outputs = native.dense_matvec(chosen.library, chosen.name, weight, rows.contiguous())
        return outputs.view(*inputs.shape[:-1], m)
    step = max(1, _TILE_BYTES // (n * rows.element_size()))
    with fast_float32():
        tiles = [functional.linear(rows, tile.to(rows.dtype)) for tile in torch.split(weight, step)]
    return torch.cat(tiles, dim=1).view(*inputs.shape[:-1], m)


def _run(inputs: Tensor, weight: NativeWeight) -> Tensor:
    chosen = backend()
    needs_gradient = torch.is_grad_enabled() and inputs.requires_grad
    if chosen.library is None or needs_gradient or inputs.dtype not in _NATIVE_DTYPES:
        return reference.linear(inputs, weight)
    rows = inputs.reshape(-1, weight.in_features).contiguous()
    run = _decode if rows.shape[0] <= DECODE_TOKENS else _prefill
    return run(chosen.name, chosen.library, weight, rows).view(*inputs.shape[:-1], weight.out_features)


def _decode(name: str, library: native.Library, weight: NativeWeight, rows: Tensor) -> Tensor:
    if rows.shape[0] <= native.MAX_TOKENS:
        return native.matvec(library, name, weight, rows)
    parts = torch.split(rows, native.MAX_TOKENS)
    return torch.cat([native.matvec(library, name, weight, part) for part in parts])


def _prefill(name: str, library: native.Library, weight: NativeWeight, rows: Tensor) -> Tensor:
    """[t, n] → [t, m], a tile of rows of Ŵ at a time. float16 is multiplied in float32."""
    dtype = torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32
    m, n = weight.out_features, weight.in_features
    inputs, outputs = rows.to(dtype), torch.empty(rows.shape[0], m, dtype=dtype)
    step = min(m, max(1, _TILE_BYTES // (n * dtype.itemsize)))
    tile = torch.empty(step, n, dtype=dtype)
    with fast_float32():
        for begin in range(0, m, step):
            end = min(begin + step, m)
            native.unpack(library, name, weight, begin, end, tile)
            torch.mm(inputs, tile[: end - begin].T, out=outputs[:, begin:end])
    return outputs.to(rows.dtype)


@torch.library.custom_op("slablm::linear", mutates_args=())
def _operator(
    inputs: Tensor,
    values: Tensor,
    scales: Tensor | None,
    planes: Tensor,
    left: Tensor,
    right: Tensor,
    in_features: int,
) -> Tensor:
    """`linear` with the weight's tensors spelled out, for the compiler."""
    return _run(inputs, NativeWeight(in_features, values, scales, planes, left, right))


@_operator.register_fake
def _(
    inputs: Tensor,
    values: Tensor,
    scales: Tensor | None,
    planes: Tensor,
    left: Tensor,
    right: Tensor,
    in_features: int,
) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], planes.shape[0])


@torch.library.custom_op("slablm::dense_linear", mutates_args=())
def _dense_operator(inputs: Tensor, weight: Tensor) -> Tensor:
    """`dense_linear` for the compiler."""
    return _run_dense(inputs, weight)


@_dense_operator.register_fake
def _(inputs: Tensor, weight: Tensor) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], weight.shape[0])
