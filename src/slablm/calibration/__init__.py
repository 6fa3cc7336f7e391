"""Calibration: text → token windows (`text`), block inputs and per-layer statistics (`capture`).

May import: `dense` and what stands above it.
"""
