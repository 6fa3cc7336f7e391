"""Which code runs: the one place that decides.

`linear` is what layers call. Four cases:

- CPU, a few tokens (decode): the compiled kernel reads the planes directly, `native.matvec`;
- CPU, more tokens (prefill): rows are unpacked a tile at a time into a small buffer, which torch multiplies; there is
  never a dense weight;
- GPU: the Triton kernels, which make the same distinction themselves (`slablm.runtime.kernels.gpu`), and for int8 rows
  and a few tokens a kernel in CUDA C++ (`gpu_int8`);
- no kernels for the device: the reference in plain torch.

Which kernels there are, `backends` knows. Under `torch.compile`, and where a gradient with respect to the inputs is
needed, the call is the operator ``torch.ops.slablm.linear`` (on a GPU always ``gpu_linear``); else it is made directly,
because at small layers the operator's bookkeeping would take as long as the kernel. The weight itself has no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slablm.errors import SlabError
from slablm.packing import PackedWeight
from slablm.runtime.kernels import gpu_int8, native, reference
from slablm.runtime.kernels.backends import CUDA, TRITON, backend, symbols_backend
from slablm.runtime.kernels.gpu_layout import GpuWeight, to_gpu
from slablm.runtime.kernels.layout import NativeWeight, to_native
from slablm.system.float32 import fast_float32

# Up to so many tokens the planes are read once per `native.MAX_TOKENS` tokens, beyond it tiles are unpacked.
DECODE_TOKENS = 16
# Bytes of one unpacked tile: large enough for an efficient matrix product, small enough to stay in the cache.
_TILE_BYTES = 4 << 20

# What the kernels of the CPU and the GPU take.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def to_runtime(packed: PackedWeight, value_bits: int = 16, name: str = "weight") -> NativeWeight | GpuWeight:
    """Lay a packed weight out for the kernels of its device.

    Args:
        packed: on the CPU or a GPU.
        value_bits: 16 keeps the stored values, 8 quantizes them.
        name: how errors call this weight.

    Raises:
        SlabError: a corrupted plane, or an unknown `value_bits`.
    """
    return (to_native if packed.values.device.type == "cpu" else to_gpu)(packed, value_bits, name)


def linear(inputs: Tensor, weight: NativeWeight | GpuWeight) -> Tensor:
    """Ŵ applied to [..., n] → [..., m], in the inputs' dtype, accumulated in float32.

    Exact up to rounding, with one exception: on the CPU, 8-bit values and a few tokens, where the inputs are rounded to
    14 bits, one scale per 64 columns, and the products are summed in integers (relative error about 1e-4).

    Args:
        inputs: any float type, on the weight's device.
        weight: in runtime layout.

    Raises:
        SlabError: inputs on another device, or of another width.
    """
    check_inputs(inputs, weight.device, weight.in_features)
    if isinstance(weight, GpuWeight):
        return _run_gpu(inputs, weight)
    if needs_operator(inputs):
        outputs: Tensor = _operator(inputs, *weight.arguments, weight.in_features)
        return outputs
    return _run(inputs, weight)


def dense_linear(inputs: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """A dense weight applied to [..., n] → [..., m], in the inputs' dtype, accumulated in float32.

    Args:
        inputs: any float type, on the weight's device.
        weight: [m, n], float16 or bfloat16, or int8 rows; the kernel takes it where it has no gaps.
        scales: what int8 rows are multiplied by, [m] float16; None for a 16-bit weight.

    Raises:
        SlabError: inputs on another device, or of another width.
    """
    check_inputs(inputs, weight.device, weight.shape[1])
    if inputs.dtype == weight.dtype:
        return functional.linear(inputs, weight)
    if weight.requires_grad and torch.is_grad_enabled():
        return functional.linear(inputs, weight.to(inputs.dtype))
    if needs_operator(inputs):
        outputs: Tensor = _dense_operator(inputs, weight, scales)
        return outputs
    return _run_dense(inputs, weight, scales)


def check_inputs(inputs: Tensor, device: torch.device, columns: int) -> None:
    """Refuse inputs that a weight cannot take, before a kernel reads their memory.

    Args:
        inputs: [..., n].
        device: where the weight is.
        columns: its n.

    Raises:
        SlabError: inputs on another device, or of another width.
    """
    if inputs.device != device:
        raise SlabError(
            f"the inputs are on {inputs.device}, the weight is on {device}: move the inputs with .to({str(device)!r}), "
            f"or the model with .to({str(inputs.device)!r})"
        )
    if inputs.shape[-1] != columns:
        raise SlabError(f"inputs of shape {list(inputs.shape)} do not fit a layer with {columns} input features")


def needs_operator(inputs: Tensor) -> bool:
    """Whether more than plain numbers is asked for: a trace, a gradient, or what a subclass makes of it."""
    gradient = inputs.requires_grad and torch.is_grad_enabled()
    return torch.compiler.is_compiling() or gradient or type(inputs) not in (Tensor, nn.Parameter)


def _on_gpu(inputs: Tensor, weight: Tensor, scales: Tensor | None) -> bool:
    """Whether the kernel for NVIDIA GPUs multiplies int8 rows with these inputs."""
    if weight.device.type != "cuda" or scales is None or inputs.dtype not in KERNEL_DTYPES:
        return False
    return gpu_int8.reads(weight, scales) and symbols_backend(weight.device).name == CUDA


def _run_dense(inputs: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
    m, n = weight.shape
    if inputs.numel() <= gpu_int8.FEW_TOKENS * n and _on_gpu(inputs, weight, scales):
        assert scales is not None
        with torch.cuda.device(weight.device):
            return gpu_int8.linear(inputs.reshape(-1, n).contiguous(), weight, scales).view(*inputs.shape[:-1], m)
    chosen = backend(weight.device)
    readable = inputs.dtype in KERNEL_DTYPES and weight.is_contiguous() and (scales is None or scales.is_contiguous())
    if chosen.library is not None and readable and inputs.numel() <= native.MAX_TOKENS * n:
        return native.dense_matvec(chosen.library, chosen.name, weight, inputs.contiguous(), scales)
    # An int8 number times its scale is exact in float32, and in none of the 16-bit types.
    dtype = inputs.dtype if scales is None else torch.promote_types(inputs.dtype, torch.float32)
    rows = inputs.reshape(-1, n).to(dtype)
    with fast_float32():
        tiles = [functional.linear(rows, tile).to(inputs.dtype) for _, tile in _dense_tiles(weight, scales, dtype)]
    return torch.cat(tiles, dim=1).view(*inputs.shape[:-1], m)


def _run(inputs: Tensor, weight: NativeWeight) -> Tensor:
    chosen = backend(weight.device)
    if chosen.library is None or inputs.dtype not in KERNEL_DTYPES:
        return reference.linear(inputs, weight)
    run = _decode if inputs.numel() <= DECODE_TOKENS * weight.in_features else _prefill
    return run(chosen.name, chosen.library, weight, inputs.contiguous())


def _run_gpu(inputs: Tensor, weight: GpuWeight) -> Tensor:
    if _gpu_name() != TRITON or inputs.dtype not in KERNEL_DTYPES:
        return reference.linear(inputs, weight)
    from slablm.runtime.kernels import gpu  # imports triton

    # Triton launches on the current device; under torch.compile the compiler sees to that.
    eager = weight.device.type == "cuda" and not torch.compiler.is_compiling()
    with torch.cuda.device(weight.device) if eager else nullcontext():
        return gpu.linear(inputs, weight)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _gpu_name() -> str:
    return backend("cuda").name


def _decode(name: str, library: native.Library, weight: NativeWeight, inputs: Tensor) -> Tensor:
    if inputs.numel() <= native.MAX_TOKENS * weight.in_features:
        return native.matvec(library, name, weight, inputs)
    parts = torch.split(inputs.view(-1, weight.in_features), native.MAX_TOKENS)
    outputs = torch.cat([native.matvec(library, name, weight, part) for part in parts])
    return outputs.view(*inputs.shape[:-1], weight.out_features)


def _prefill(name: str, library: native.Library, weight: NativeWeight, inputs: Tensor) -> Tensor:
    """[..., n] → [..., m], a tile of rows of Ŵ at a time. float16 is multiplied in float32."""
    dtype = torch.bfloat16 if inputs.dtype == torch.bfloat16 else torch.float32
    rows = inputs.view(-1, weight.in_features).to(dtype)
    outputs = times_tiles(rows, _tiles(name, library, weight, dtype), weight.out_features)
    return outputs.to(inputs.dtype).view(*inputs.shape[:-1], weight.out_features)


def times_tiles(rows: Tensor, tiles: Iterator[tuple[slice, Tensor]], m: int) -> Tensor:
    """Inputs multiplied by a weight that comes a tile of rows at a time.

    Args:
        rows: [t, n], of the tiles' type.
        tiles: which rows of the weight they are, and those rows.
        m: rows of the weight.

    Returns:
        [t, m], of the same type.
    """
    outputs = torch.empty(rows.shape[0], m, dtype=rows.dtype, device="cpu")
    with fast_float32():
        for span, tile in tiles:
            torch.mm(rows, tile.T, out=outputs[:, span])
    return outputs


def _tiles(
    name: str, library: native.Library, weight: NativeWeight, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of Ŵ a few at a time, and which they are; a tile lasts until the next one."""
    m, n = weight.out_features, weight.in_features
    step = min(m, max(1, _TILE_BYTES // (n * dtype.itemsize)))
    buffer = torch.empty(step, n, dtype=dtype, device="cpu")
    for begin in range(0, m, step):
        end = min(begin + step, m)
        native.unpack(library, name, weight, begin, end, buffer)
        yield slice(begin, end), buffer[: end - begin]


def _dense_tiles(weight: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a dense weight in `dtype`, as many as fill a tile, and which they are."""
    # A GPU has no such cache, and needs time for every launch.
    room = _TILE_BYTES if weight.device.type == "cpu" else 16 * _TILE_BYTES
    step = max(1, room // (weight.shape[1] * dtype.itemsize))
    for begin in range(0, weight.shape[0], step):
        span = slice(begin, begin + step)
        tile = weight[span].to(dtype)
        yield span, tile if scales is None else tile.mul_(scales[span, None])


def _run_gradient(gradient: Tensor, weight: NativeWeight) -> Tensor:
    """Gradient of the outputs [..., m] → of the inputs [..., n]: multiplied by Ŵ, which is unpacked anew in tiles."""
    chosen = backend()
    if chosen.library is None or gradient.dtype not in KERNEL_DTYPES:
        return gradient @ reference.unpack(weight).to(gradient.dtype)
    return sum_over_tiles(gradient, _tiles(chosen.name, chosen.library, weight, torch.float32), weight.in_features)


def _run_dense_gradient(gradient: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return sum_over_tiles(gradient, _dense_tiles(weight, scales, dtype), weight.shape[1])


def sum_over_tiles(gradient: Tensor, tiles: Iterator[tuple[slice, Tensor]], n: int) -> Tensor:
    """A gradient [..., m] times the rows that the tiles have, [..., n], in its dtype, summed in float32 or better."""
    rows = gradient.reshape(-1, gradient.shape[-1])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    result = rows.new_zeros(rows.shape[0], n)
    with fast_float32():
        for span, tile in tiles:
            result.addmm_(rows[:, span], tile.to(rows.dtype))
    return result.to(gradient.dtype).view(*gradient.shape[:-1], n)


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
    """`linear` with the weight's tensors spelled out, for the compiler and for autograd."""
    return _run(inputs, NativeWeight(in_features, values, scales, planes, left, right))


@torch.library.custom_op("slablm::linear_gradient", mutates_args=())
def _gradient_operator(
    gradient: Tensor,
    values: Tensor,
    scales: Tensor | None,
    planes: Tensor,
    left: Tensor,
    right: Tensor,
    in_features: int,
) -> Tensor:
    """Gradient of `_operator` with respect to its inputs."""
    return _run_gradient(gradient, NativeWeight(in_features, values, scales, planes, left, right))


@torch.library.custom_op("slablm::dense_linear", mutates_args=())
def _dense_operator(inputs: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """`dense_linear` for the compiler and for autograd."""
    return _run_dense(inputs, weight, scales)


@torch.library.custom_op("slablm::dense_linear_gradient", mutates_args=())
def _dense_gradient_operator(gradient: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """Gradient of `_dense_operator` with respect to its inputs."""
    return _run_dense_gradient(gradient, weight, scales)


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What a backward needs of the forward's arguments: those behind the first, none of them a dense weight."""
    *tensors, ctx.in_features = inputs[1:]
    ctx.save_for_backward(*tensors)


def _keep_dense_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _gradient_operator(gradient, *ctx.saved_tensors, ctx.in_features), *(None,) * 6


def _dense_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _dense_gradient_operator(gradient, *ctx.saved_tensors), None, None


_operator.register_autograd(_backward, setup_context=_keep_weight)
_dense_operator.register_autograd(_dense_backward, setup_context=_keep_dense_weight)
_operator.register_fake(lambda x, values, scales, planes, *_: x.new_empty(*x.shape[:-1], planes.shape[0]))
_gradient_operator.register_fake(lambda gradient, *weight: gradient.new_empty(*gradient.shape[:-1], weight[-1]))
_dense_operator.register_fake(lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]))
_dense_gradient_operator.register_fake(lambda grad, weight, *_: grad.new_empty(*grad.shape[:-1], weight.shape[1]))
