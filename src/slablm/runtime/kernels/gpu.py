"""The Triton kernels as one torch operator.

``torch.ops.slablm.gpu_linear`` chooses by the number of tokens alone, so that a CUDA graph or `torch.compile` sees a
fixed sequence of launches; nothing is read back from the device.

- up to `MATVEC_TOKENS`: `matvec`, straight from the planes;
- more: rows of Ŵ are unpacked into a scratch tile, which the vendor's library multiplies.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.nn import functional

from slablm.runtime.kernels import triton_kernels
from slablm.runtime.kernels.gpu_layout import WORD_COLUMNS, GpuWeight

# Triton's interpreter runs the kernels on the CPU, for tests; it is chosen when they are imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

MATVEC_TOKENS = 8

# A warp takes 32 groups of 4 columns. More rows per program share what is loaded of the inputs, fewer fill the device.
_MATVEC_WARPS = 4
_MATVEC_ROWS = ((4096, 8), (2048, 4), (0, 2))
_UNPACK_ROWS, _UNPACK_GROUPS, _UNPACK_WARPS = 8, 64, 4
# Bytes of one unpacked tile, at most. With 32 MiB the products of wide weights had too few rows to fill an H100.
_TILE_BYTES = 256 << 20


def linear(inputs: Tensor, weight: GpuWeight) -> Tensor:
    """Ŵ applied to [..., n] → [..., m], in the inputs' dtype, accumulated in float32.

    Up to `MATVEC_TOKENS` tokens Ŵ enters in float32, beyond it in the inputs' dtype, as in the reference.

    Args:
        inputs: float32, float16 or bfloat16, on the weight's device.
        weight: [m, n].
    """
    n = weight.in_features
    outputs: Tensor = gpu_linear(inputs.reshape(-1, n).contiguous(), *weight.arguments)
    return outputs.view(*inputs.shape[:-1], weight.out_features)


def run(
    inputs: Tensor,
    values: Tensor,
    scales: Tensor | None,
    planes: Tensor,
    offsets: Tensor,
    left: Tensor,
    right: Tensor,
) -> Tensor:
    """`linear` for inputs [t, n], with the weight's tensors spelled out: the operator, which `torch.compile` traces."""
    weight = GpuWeight(inputs.shape[1], values, scales, planes, offsets, left, right)
    tokens = inputs.shape[0]
    if tokens == 0:
        return inputs.new_empty(0, weight.out_features)
    if tokens <= MATVEC_TOKENS:
        return _matvec(inputs, weight)
    step = max(1, _TILE_BYTES // (inputs.shape[1] * inputs.element_size()))
    begins = range(0, weight.out_features, step)
    tiles = (unpack(weight, begin, min(begin + step, weight.out_features), inputs.dtype) for begin in begins)
    return torch.cat([functional.linear(inputs, tile) for tile in tiles], dim=1)


gpu_linear = triton_op("slablm::gpu_linear", run, mutates_args=())


def run_gradient(
    gradient: Tensor,
    values: Tensor,
    scales: Tensor | None,
    planes: Tensor,
    offsets: Tensor,
    left: Tensor,
    right: Tensor,
    in_features: int,
) -> Tensor:
    """Gradient of the outputs [t, m] → of the inputs [t, n]: multiplied by Ŵ, which is unpacked anew in tiles."""
    weight = GpuWeight(in_features, values, scales, planes, offsets, left, right)
    step = max(1, _TILE_BYTES // (in_features * gradient.element_size()))
    result = gradient.new_zeros(gradient.shape[0], in_features, dtype=torch.float32)
    parts: tuple[Tensor, ...] = gradient.split(step, dim=1)  # type: ignore[no-untyped-call]
    for index, part in enumerate(parts):
        begin = index * step
        result += part @ unpack(weight, begin, begin + part.shape[1], gradient.dtype)
    return result.to(gradient.dtype)


gpu_linear_gradient = triton_op("slablm::gpu_linear_gradient", run_gradient, mutates_args=())


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])
    ctx.in_features = inputs[0].shape[1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gpu_linear_gradient(gradient.contiguous(), *ctx.saved_tensors, ctx.in_features), *(None,) * 6


torch.library.register_autograd("slablm::gpu_linear", _backward, setup_context=_keep_weight)
torch.library.register_fake(
    "slablm::gpu_linear", lambda x, values, scales, planes, *_: x.new_empty(x.shape[0], planes.shape[0])
)
torch.library.register_fake(
    "slablm::gpu_linear_gradient", lambda gradient, *weight: gradient.new_empty(gradient.shape[0], weight[-1])
)


def unpack(weight: GpuWeight, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows begin … end of Ŵ, [end − begin, n] in `dtype`.

    Args:
        weight: [m, n].
        begin: first row.
        end: row after the last.
        dtype: float32, float16 or bfloat16.
    """
    n, groups = weight.in_features, weight.planes.shape[1] * WORD_COLUMNS // 4
    output = torch.empty(end - begin, n, dtype=dtype, device=weight.device)
    grid = (_ceil_divide(end - begin, _UNPACK_ROWS), _ceil_divide(groups, _UNPACK_GROUPS))
    wrap_triton(triton_kernels.unpack)[grid](
        output,
        *_tensors(weight),
        begin,
        end,
        *_sizes(weight),
        **_flags(weight),
        ROWS=_UNPACK_ROWS,
        GROUPS=_UNPACK_GROUPS,
        num_warps=_UNPACK_WARPS,
    )
    return output


def _matvec(inputs: Tensor, weight: GpuWeight) -> Tensor:
    tokens, m = inputs.shape[0], weight.out_features
    rows = next(rows for least, rows in _MATVEC_ROWS if m >= least)
    outputs = inputs.new_empty(tokens, m)
    wrap_triton(triton_kernels.matvec)[(_ceil_divide(m, rows),)](
        inputs,
        outputs,
        *_tensors(weight),
        tokens,
        m,
        *_sizes(weight),
        **_flags(weight),
        TOKENS=_power_of_two(tokens),
        ROWS=rows,
        GROUPS=32 * _MATVEC_WARPS,
        num_warps=_MATVEC_WARPS,
    )
    return outputs


def _tensors(weight: GpuWeight) -> tuple[Tensor, ...]:
    """What every kernel takes."""
    return (
        weight.values,
        weight.left if weight.scales is None else weight.scales,  # a tensor that is not read
        weight.planes.view(torch.int64) if weight.signs else weight.planes,
        weight.offsets,
        weight.left,
        weight.right,
    )


def _sizes(weight: GpuWeight) -> tuple[int, int, int]:
    """n, k and words per row."""
    return weight.in_features, weight.kept, weight.planes.shape[1]


def _flags(weight: GpuWeight) -> dict[str, int | bool]:
    """What a kernel is compiled for."""
    return {"RANK": weight.rank, "SIGNS": weight.signs, "SCALED": weight.scales is not None}


def _ceil_divide(size: int, step: int) -> int:
    return -(-size // step)


def _power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()
