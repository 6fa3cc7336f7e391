"""What vLLM calls in each of its processes, whatever model is served (the group ``vllm.general_plugins``)."""

from __future__ import annotations

import warnings
from importlib import import_module


def register() -> None:
    """Tell vLLM of ``quant_method: "slab"``. To be called as often as one likes; never raises.

    vLLM would not start where a plug-in fails. Another version's interface must stop nobody who serves other models,
    so a failure is a warning here, and an unknown quantization method for who serves ours.
    """
    try:
        import_module("slablm.vllm.quantization")  # registers itself
    except Exception as error:
        warnings.warn(f"slablm cannot announce its format to vLLM: {error!r}", RuntimeWarning, stacklevel=2)
