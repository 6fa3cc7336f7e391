"""Running packed weights: the reference in plain torch, the kernels for CPU and GPU, and the dispatcher between them.

- `to_runtime(packed, value_bits)` lays a packed weight out for the kernels of its device (`to_native`: CPU, `to_gpu`:
  GPU); `from_runtime` is its inverse.
- `linear(inputs, weight)` applies it, `dense_linear` does so for a dense weight in 16 bits or int8 rows.
- `symbols_linear(inputs, weight)` applies a weight in symbols as it is stored: there is no other layout.
- `gram_kernel(inputs)` is what adds up XᵀX while a model is compressed, if this CPU has something for it.
- `explain(device)` says what code runs, and why; `explain_symbols(device)` that for weights in symbols.
"""

from slablm.runtime.kernels.backends import REFERENCE, Backend, backend, explain, explain_symbols, symbols_backend
from slablm.runtime.kernels.dispatch import check_inputs, dense_linear, linear, to_runtime
from slablm.runtime.kernels.gpu_layout import GpuWeight, to_gpu
from slablm.runtime.kernels.gram import gram_kernel
from slablm.runtime.kernels.layout import NativeWeight, to_native
from slablm.runtime.kernels.native import Library
from slablm.runtime.kernels.runtime_weight import from_runtime
from slablm.runtime.kernels.symbols import linear as symbols_linear

__all__ = [
    "REFERENCE",
    "Backend",
    "GpuWeight",
    "Library",
    "NativeWeight",
    "backend",
    "check_inputs",
    "dense_linear",
    "explain",
    "explain_symbols",
    "from_runtime",
    "gram_kernel",
    "linear",
    "symbols_backend",
    "symbols_linear",
    "to_gpu",
    "to_native",
    "to_runtime",
]
