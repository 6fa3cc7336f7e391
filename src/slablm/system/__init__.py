"""The machine: memory, float32 products, ranks, versions, NaN and Inf.

Nothing here knows what a model is. May import: `slablm.errors`.
"""
