"""The dense model: where it comes from, how it is opened, its blocks and target layers, what it writes.

May import: `checkpoint` and what stands above it.
"""
