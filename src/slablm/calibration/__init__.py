"""Calibration: text → token windows (`text`), block inputs and per-layer statistics (`capture`)."""
