"""Running packed weights inside a model: `SlabLinear`, narrow matrices and the kernels beneath them.

May import: `packing`, `methods`, `system`.
"""
