"""Which code runs, and why: the one place that decides.

`linear` is what layers call. Four cases:

- CPU, a few tokens (decode): the compiled kernel reads the planes directly, `native.matvec`;
- CPU, more tokens (prefill): rows are unpacked a tile at a time into a small buffer, which torch multiplies; there is
  never a dense weight;
- GPU: the Triton kernels, which make the same distinction themselves (`slablm.runtime.kernels.gpu`);
- no kernels for the device, or a gradient is needed: the reference in plain torch.

The environment variable ``SLABLM_KERNEL`` forces an instruction set (``avx512``, ``avx2``, ``neon``, ``portable``) of
the CPU, or the ``reference`` everywhere. Under `torch.compile` the call is the operator ``torch.ops.slablm.linear``
(on a GPU ``gpu_linear``, in eager mode too); in eager mode it is made directly, because at small layers the operator's
bookkeeping would take as long as the kernel.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from slablm.errors import SlabError
from slablm.packing import PackedWeight
from slablm.runtime.kernels import native, reference
from slablm.runtime.kernels.gpu_layout import GpuWeight, from_gpu, to_gpu
from slablm.runtime.kernels.layout import NativeWeight, to_native, to_packed
from slablm.system.float32 import fast_float32

ENVIRONMENT_VARIABLE = "SLABLM_KERNEL"
REFERENCE = "reference"
TRITON = "triton"

# Up to so many tokens the planes are read once per `native.MAX_TOKENS` tokens, beyond it tiles are unpacked.
DECODE_TOKENS = 16
# Bytes of one unpacked tile: large enough for an efficient matrix product, small enough to stay in the cache.
_TILE_BYTES = 4 << 20

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Backend:
    """What runs the packed layers of a device.

    Attributes:
        name: an instruction set of `native.INSTRUCTION_SETS`, ``"triton"``, or ``"reference"``.
        reason: why, as one sentence.
        library: the loaded CPU kernels; None for the others.
    """

    name: str
    reason: str
    library: native.Library | None = None


def backend(device: torch.device | str = "cpu") -> Backend:
    """The backend of this process, by ``SLABLM_KERNEL`` or else the fastest that the device can run.

    Args:
        device: where the weights are.

    Raises:
        SlabError: ``SLABLM_KERNEL`` names something that this machine cannot run.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE, "")
    kind = torch.device(device).type
    if kind == "cpu":
        return _cpu_backend(forced)
    return _gpu_backend(forced) if kind == "cuda" else Backend(REFERENCE, f"no kernels for {kind}")


def explain(device: torch.device | str = "cpu") -> str:
    """One line for people: the backend and the reason.

    Args:
        device: where the weights are.
    """
    chosen = backend(device)
    return f"{chosen.name}: {chosen.reason}"


@cache
def _cpu_backend(forced: str) -> Backend:
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


@cache
def _gpu_backend(forced: str) -> Backend:
    if forced == REFERENCE:
        return Backend(REFERENCE, f"forced by {ENVIRONMENT_VARIABLE}")
    if find_spec("triton") is None:
        return Backend(REFERENCE, "triton is missing (pip install 'slablm[triton]'): plain torch, no speed-up")
    import triton

    from slablm.runtime.kernels import gpu

    if gpu.INTERPRETED:
        return Backend(TRITON, f"triton {triton.__version__}, interpreted on the CPU: slow, for tests")
    if not torch.cuda.is_available():
        return Backend(REFERENCE, f"triton {triton.__version__} is there, but torch sees no GPU")
    return Backend(TRITON, f"triton {triton.__version__} on {torch.cuda.get_device_name()}")


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


def from_runtime(weight: NativeWeight | GpuWeight, factor_dtype: torch.dtype | None = None) -> PackedWeight:
    """Inverse of `to_runtime` for 16-bit values, bit for bit.

    Args:
        weight: its values must not be quantized.
        factor_dtype: type of the factors, by default that of the values.

    Raises:
        SlabError: the values were quantized to 8 bits.
    """
    return from_gpu(weight, factor_dtype) if isinstance(weight, GpuWeight) else to_packed(weight, factor_dtype)


def linear(inputs: Tensor, weight: NativeWeight | GpuWeight) -> Tensor:
    """Ŵ applied to [..., n] → [..., m], in the inputs' dtype, accumulated in float32.

    Exact up to rounding, with one exception: on the CPU, 8-bit values and a few tokens, where the inputs are rounded to
    14 bits, one scale per 64 columns, and the products are summed in integers (relative error about 1e-4).

    Args:
        inputs: any float type.
        weight: in runtime layout.
    """
    if isinstance(weight, GpuWeight):
        return _run_gpu(inputs, weight)
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
    if chosen.library is not None and _kernels_take(inputs) and rows.shape[0] <= native.MAX_TOKENS:
        outputs = native.dense_matvec(chosen.library, chosen.name, weight, rows.contiguous())
        return outputs.view(*inputs.shape[:-1], m)
    step = max(1, _TILE_BYTES // (n * rows.element_size()))
    with fast_float32():
        tiles = [functional.linear(rows, tile.to(rows.dtype)) for tile in torch.split(weight, step)]
    return torch.cat(tiles, dim=1).view(*inputs.shape[:-1], m)


def _run(inputs: Tensor, weight: NativeWeight) -> Tensor:
    chosen = backend()
    if chosen.library is None or not _kernels_take(inputs):
        return reference.linear(inputs, weight)
    rows = inputs.reshape(-1, weight.in_features).contiguous()
    run = _decode if rows.shape[0] <= DECODE_TOKENS else _prefill
    return run(chosen.name, chosen.library, weight, rows).view(*inputs.shape[:-1], weight.out_features)


def _run_gpu(inputs: Tensor, weight: GpuWeight) -> Tensor:
    if _gpu_name() != TRITON or not _kernels_take(inputs):
        return reference.linear(inputs, weight)
    from slablm.runtime.kernels import gpu  # imports triton

    # Triton launches on the current device; under torch.compile the compiler sees to that.
    eager = weight.device.type == "cuda" and not torch.compiler.is_compiling()
    with torch.cuda.device(weight.device) if eager else nullcontext():
        return gpu.linear(inputs, weight)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _gpu_name() -> str:
    return backend("cuda").name


def _kernels_take(inputs: Tensor) -> bool:
    """Whether type and autograd leave the inputs to a kernel."""
    needs_gradient = torch.is_grad_enabled() and inputs.requires_grad
    return inputs.dtype in _KERNEL_DTYPES and not needs_gradient


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
