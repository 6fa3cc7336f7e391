"""Versions of what the numbers come from: slablm, and what it stands on."""

from __future__ import annotations

import platform

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of slablm, torch, transformers and Python, by name."""
    import torch
    import transformers

    return {
        "slablm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
