"""Many methods on one model: cells, records, tables, plots and the report.

May import: `evaluation` and what stands above it.
"""
