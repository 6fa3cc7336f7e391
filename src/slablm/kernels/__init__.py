"""Running packed weights: the reference in plain torch, the compiled CPU kernels, and the dispatcher between them.

- `to_native(packed, value_bits)` lays a packed weight out for the kernels; `to_packed` is its inverse.
- `linear(inputs, weight)` applies it, `dense_linear` does so for a dense 16-bit weight.
- `explain()` says what code runs, and why.
"""

from slablm.kernels.dispatch import Backend, backend, dense_linear, explain, linear
from slablm.kernels.layout import NativeWeight, to_native, to_packed

__all__ = ["Backend", "NativeWeight", "backend", "dense_linear", "explain", "linear", "to_native", "to_packed"]
