"""The one loop, capture → decompose → swap → propagate, and a whole run around it.

May import: `calibration` and what stands above it; not `planning`, whose checks are handed to a run.
"""
