"""The compiled kernels, called through ctypes on `data_ptr()`.

One shared library holds a unit per instruction set; it says itself which of them this CPU can run. Python only hands
over pointers: a weight was checked when the `NativeWeight` was made, inputs are checked here. Every tensor is made on
the CPU by name, as the default device may be another.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from slablm.methods.rotation import Rotation
from slablm.packing.symbols import PackedSymbols
from slablm.runtime.kernels.layout import NativeWeight

MAX_TOKENS = 8
ABI_VERSION = 8
# Fastest first; the number is the library's.
INSTRUCTION_SETS = {"avx512": 2, "avx2": 1, "neon": 3, "portable": 0}

_NOT_FINITE = 1  # `kNotFinite`
SCALAR_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
# Beside this file; an editable installation builds the library elsewhere.
_FOLDERS = sys.modules[__name__.rpartition(".")[0]].__path__
_SUFFIX = {"Windows": ".dll"}.get(platform.system(), ".so")


class _Weight(ctypes.Structure):
    """`SlabWeight` of csrc/slablm.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "kept", "rank")),
        *((name, ctypes.c_int32) for name in ("value_type", "plane_count")),
        *((name, ctypes.c_void_p) for name in ("values", "scales", "planes", "left", "right")),
    )


# `SlabSymbols` of csrc/slablm.h: rows, columns and block, seed, bits, and pointers.
_SYMBOLS = struct.Struct("@3qQq3P")
# A weight without rows.
NO_SYMBOLS = _SYMBOLS.pack(0, 1, 0, 0, 2, 0, 0, 0)


@dataclass(frozen=True)
class Library:
    """The loaded library.

    Attributes:
        functions: the ctypes handle.
        path: the file.
        supported: names of the instruction sets that the library has and this CPU can run, fastest first.
        batched: those of them that multiply many tokens with symbols as they are (`symbols_matmul`).
    """

    functions: ctypes.CDLL
    path: Path
    supported: tuple[str, ...]
    batched: tuple[str, ...]


@cache
def load() -> Library | str:
    """The library, or why there is none, as one sentence."""
    found = [path for folder in _FOLDERS if (path := Path(folder) / f"_kernels{_SUFFIX}").is_file()]
    if not found:
        return "slablm was installed without its compiled kernels (the wheel for any machine, or no C++ compiler)"
    try:
        functions = ctypes.CDLL(str(found[0]))
        version = functions.slablm_abi_version()
    except (OSError, AttributeError) as error:
        return f"{found[0]} does not load ({error})"
    if version != ABI_VERSION:
        return f"{found[0]} belongs to another version of slablm: reinstall slablm"
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    functions.slablm_matvec.argtypes = (i32, pointer, pointer, i32, i64, pointer, i32, i32)
    functions.slablm_dense_matvec.argtypes = (
        i32,
        pointer,
        i32,
        pointer,
        i64,
        i64,
        pointer,
        i32,
        i64,
        pointer,
        i32,
        i32,
    )
    functions.slablm_unpack.argtypes = (i32, pointer, i64, i64, pointer, i32, i32)
    functions.slablm_symbols_matvec.argtypes = (i32, pointer, pointer, i32, i64, pointer, i32, i32)
    functions.slablm_symbols_matmul.argtypes = (i32, pointer, pointer, i32, i64, i32, pointer, i32, i32)
    functions.slablm_symbols_unpack.argtypes = (i32, pointer, i64, i64, pointer, i32, i32)
    functions.slablm_trellis_columns.argtypes = (i32, pointer, i32)
    functions.slablm_add_gram.argtypes = (i32, pointer, i64, i64, pointer, i32)
    functions.slablm_blocks.argtypes = (i32, pointer, pointer, i64, pointer, i32)
    for function in (functions.slablm_prompt_heads, functions.slablm_prompt_outputs):
        function.argtypes = (i32, pointer, pointer, pointer, pointer, i32)
    functions.slablm_rotate.argtypes = (i32, pointer, i64, i64, i64, ctypes.c_uint64, i32)
    supported = tuple(name for name, number in INSTRUCTION_SETS.items() if functions.slablm_supports(number))
    none = (NO_SYMBOLS, None, 0, 0, 14, None, 0, 1)
    batched = tuple(name for name in supported if functions.slablm_symbols_matmul(INSTRUCTION_SETS[name], *none) == 0)
    return Library(functions, found[0], supported, batched)


def matvec(library: Library, instruction_set: str, weight: NativeWeight, inputs: Tensor) -> Tensor:
    """Ŵ applied to a few tokens, straight from the planes.

    Args:
        library: from `load`.
        instruction_set: one of `library.supported`.
        weight: [m, n].
        inputs: [..., n], of at most `MAX_TOKENS` tokens, contiguous, float32, float16 or bfloat16.

    Returns:
        [..., m] in the inputs' dtype, accumulated in float32.
    """
    _check_readable(inputs, weight.in_features)
    outputs = torch.empty(*inputs.shape[:-1], weight.out_features, dtype=inputs.dtype, device="cpu")
    scalar_type = SCALAR_TYPES[inputs.dtype]
    described = _struct(weight)
    status = library.functions.slablm_matvec(
        INSTRUCTION_SETS[instruction_set],
        ctypes.byref(described),
        inputs.data_ptr(),
        scalar_type,
        inputs.numel() // weight.in_features,
        outputs.data_ptr(),
        scalar_type,
        torch.get_num_threads(),
    )
    _check(status)
    return outputs


def dense_matvec(
    library: Library, instruction_set: str, weight: Tensor, inputs: Tensor, scales: Tensor | None = None
) -> Tensor:
    """A dense weight in 16 bits or int8 rows applied to a few tokens.

    Args:
        library: from `load`.
        instruction_set: one of `library.supported`.
        weight: [m, n], contiguous, float16, bfloat16 or int8.
        inputs: as for `matvec`.
        scales: of int8 rows, [m] float16, contiguous; else None.

    Returns:
        [..., m] in the inputs' dtype, accumulated in float32.
    """
    _check_readable(inputs, weight.shape[1])
    _check_readable(weight, weight.shape[1])
    if scales is not None:
        _check_readable(scales, weight.shape[0])
        assert scales.dtype == torch.float16
    outputs = torch.empty(*inputs.shape[:-1], weight.shape[0], dtype=inputs.dtype, device="cpu")
    scalar_type = SCALAR_TYPES[inputs.dtype]
    status = library.functions.slablm_dense_matvec(
        INSTRUCTION_SETS[instruction_set],
        weight.data_ptr(),
        SCALAR_TYPES[weight.dtype],
        None if scales is None else scales.data_ptr(),
        *weight.shape,
        inputs.data_ptr(),
        scalar_type,
        inputs.numel() // weight.shape[1],
        outputs.data_ptr(),
        scalar_type,
        torch.get_num_threads(),
    )
    _check(status)
    return outputs


def unpack(library: Library, instruction_set: str, weight: NativeWeight, begin: int, end: int, output: Tensor) -> None:
    """Rows begin … end of Ŵ into `output`, a contiguous float32 or bfloat16 tensor [at least end − begin, n]."""
    _check_readable(output, weight.in_features, rows=end - begin)
    described = _struct(weight)
    status = library.functions.slablm_unpack(
        INSTRUCTION_SETS[instruction_set],
        ctypes.byref(described),
        begin,
        end,
        output.data_ptr(),
        SCALAR_TYPES[output.dtype],
        torch.get_num_threads(),
    )
    _check(status)


def symbols_matvec(library: Library, instruction_set: str, weight: PackedSymbols, inputs: Tensor) -> Tensor | None:
    """A weight in symbols applied to a few tokens, straight from the tiles.

    Args:
        library: from `load`.
        instruction_set: one of `library.supported`.
        weight: [m, n].
        inputs: as for `matvec`; not yet rotated.

    Returns:
        [..., m] in the inputs' dtype, accumulated in float32. None where inputs are rotated and then not all finite:
        an infinity among them would be one in all columns of its block.
    """
    return _symbols_product(library.functions.slablm_symbols_matvec, instruction_set, weight, inputs)


def symbols_matmul(
    library: Library, instruction_set: str, weight: PackedSymbols, inputs: Tensor, input_bits: int
) -> Tensor | None:
    """As `symbols_matvec`, for any number of tokens.

    Args:
        library: from `load`.
        instruction_set: one of `library.batched`.
        weight: [m, n].
        inputs: as for `matvec`, of any number of tokens; not yet rotated.
        input_bits: 14, or 8 to round them to 8 bits where they are rotated.

    Returns:
        [..., m] in the inputs' dtype, accumulated in float32. None where inputs are not all finite.
    """
    return _symbols_product(library.functions.slablm_symbols_matmul, instruction_set, weight, inputs, input_bits)


def _symbols_product(
    function: Any, instruction_set: str, weight: PackedSymbols, inputs: Tensor, *input_bits: int
) -> Tensor | None:
    _check_readable(inputs, weight.in_features)
    outputs = torch.empty(*inputs.shape[:-1], weight.spec.out_features, dtype=inputs.dtype, device="cpu")
    scalar_type = SCALAR_TYPES[inputs.dtype]
    status = function(
        INSTRUCTION_SETS[instruction_set],
        symbols_struct(weight),
        inputs.data_ptr(),
        scalar_type,
        inputs.numel() // weight.in_features,
        *input_bits,
        outputs.data_ptr(),
        scalar_type,
        torch.get_num_threads(),
    )
    return outputs if ran(status) else None


def symbols_unpack(
    library: Library, instruction_set: str, weight: PackedSymbols, begin: int, end: int, output: Tensor
) -> None:
    """As `unpack`, of the matrix for rotated inputs; `begin` is the first row of a tile."""
    _check_readable(output, weight.in_features, rows=end - begin)
    status = library.functions.slablm_symbols_unpack(
        INSTRUCTION_SETS[instruction_set],
        symbols_struct(weight),
        begin,
        end,
        output.data_ptr(),
        SCALAR_TYPES[output.dtype],
        torch.get_num_threads(),
    )
    _check(status)


def rotate(library: Library, instruction_set: str, rotation: Rotation, rows: Tensor, restore: bool = False) -> None:
    """`Rotation.rotate` in place, or with `restore` that one.

    Args:
        library: from `load`.
        instruction_set: one of `library.supported`.
        rotation: of n columns.
        rows: [t, n], contiguous float32.
        restore: whether to rotate back.
    """
    _check_readable(rows, rotation.size, rows=0)
    assert rows.dtype == torch.float32
    status = library.functions.slablm_rotate(
        INSTRUCTION_SETS[instruction_set],
        rows.data_ptr(),
        rows.shape[0],
        rotation.size,
        rotation.block,
        rotation.seed,
        restore,
    )
    _check(status)


def ran(status: int) -> bool:
    """Whether a function computed something: not where its inputs are not finite."""
    if status == _NOT_FINITE:
        return False
    _check(status)
    return True


def symbols_struct(weight: PackedSymbols) -> bytes:
    """The weight's `SlabSymbols`, made per call: that takes 1.5 µs, and nothing can go stale."""
    spec, parts = weight.spec, (weight.symbols, weight.scales, weight.levels)
    if not all(part.is_cpu and part.is_contiguous() for part in parts):
        raise RuntimeError("a kernel needs contiguous symbols, scales and levels on the CPU; this is a bug in slablm")
    m, n, rotation = spec.out_features, spec.in_features, spec.rotation
    block, seed = (0, 0) if rotation is None else (rotation.block, rotation.seed)
    return _SYMBOLS.pack(m, n, block, seed, spec.bits, *[part.data_ptr() for part in parts])


# Made once per weight and set of addresses, which change when memory moves (`Tensor.share_memory_`). Not an attribute
# of the weight, because addresses must not be copied along.
_structs: WeakKeyDictionary[NativeWeight, tuple[tuple[int | None, ...], _Weight]] = WeakKeyDictionary()


def _struct(weight: NativeWeight) -> _Weight:
    """The weight's `SlabWeight`; to be held while C reads it, since another thread may replace the one kept here."""
    scales = None if weight.scales is None else weight.scales.data_ptr()
    pointers = (
        weight.values.data_ptr(),
        scales,
        weight.planes.data_ptr(),
        weight.left.data_ptr(),
        weight.right.data_ptr(),
    )
    found = _structs.get(weight)
    if found is None or found[0] != pointers:
        m, n, value_type = weight.out_features, weight.in_features, SCALAR_TYPES[weight.values.dtype]
        described = _Weight(m, n, weight.kept, weight.rank, value_type, weight.planes.shape[2], *pointers)
        found = _structs[weight] = pointers, described
    return found[1]


def _check_readable(tensor: Tensor, columns: int, rows: int | None = None) -> None:
    """Refuse what C would misread: callers see to it, so this is the last guard and not an explanation for users.

    With `rows`, the tensor must be a matrix of at least so many.
    """
    readable = tensor.is_cpu and tensor.is_contiguous() and tensor.dtype in SCALAR_TYPES
    if rows is not None:
        readable = readable and tensor.dim() == 2 and tensor.shape[0] >= rows
    if not readable or tensor.shape[-1] != columns:
        expected = f"[..., {columns}] tensor" if rows is None else f"matrix of {rows} rows and {columns} columns"
        raise RuntimeError(
            f"a kernel needs a contiguous {expected} on the CPU, got {tensor.dtype} {list(tensor.shape)} "
            f"with strides {tensor.stride()} on {tensor.device}; this is a bug in slablm"
        )


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError("a kernel refused its arguments, or memory is short; this is a bug in slablm")


# `TrellisBlock` of csrc/slablm.h: rows, columns, bits, and pointers.
_BLOCK = struct.Struct("@3q9P")


def trellis_columns(
    library: Library, instruction_set: str, current: Tensor, *others: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A block of columns becomes trellis-coded symbols, one column after the other.

    Args:
        library: from `load`.
        instruction_set: one of `library.supported`.
        current: as the others one of the arguments of `slablm.methods.trellis.plain_trellis_columns`, on the CPU.
        others: all that follow it there.

    Returns:
        What that function returns.
    """
    before, coefficients, divisors, scales, levels = others
    assert coefficients is not None
    assert levels is not None
    (b, m), bits = current.shape, len(levels).bit_length() - 1
    codes = torch.empty(b, m, dtype=torch.uint8, device="cpu")
    columns, errors = (torch.empty(b, m, dtype=torch.float32, device="cpu") for _ in range(2))
    parts = (current, before, coefficients.T, divisors, scales, levels)
    shapes = ((b, m), (b, m), (b, b), (b,), (m,), (2**bits,))
    # They are to be held while C reads them.
    given = [None if part is None else _float_array(part, shape) for part, shape in zip(parts, shapes, strict=True)]
    addresses = (0 if part is None else part.data_ptr() for part in (*given, codes, columns, errors))
    block = _BLOCK.pack(m, b, bits, *addresses)
    _check(library.functions.slablm_trellis_columns(INSTRUCTION_SETS[instruction_set], block, torch.get_num_threads()))
    return codes, columns, errors


def _float_array(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor, contiguous; what C would misread is refused."""
    if not tensor.is_cpu or tensor.dtype != torch.float32 or tensor.shape != shape:
        raise RuntimeError(
            f"a kernel needs float32 numbers {list(shape)} on the CPU, got {tensor.dtype} {list(tensor.shape)} on "
            f"{tensor.device}; this is a bug in slablm"
        )
    return tensor.contiguous()
