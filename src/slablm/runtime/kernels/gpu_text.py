"""Texts of the kernels in CUDA C++: constants, and files one behind the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

# Of inputs and outputs: TYPE of ``numbers.cuh``.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def text_of(constants: Mapping[str, int], files: Iterable[str]) -> str:
    """What is compiled.

    Args:
        constants: defined in front, by name.
        files: names in this folder.
    """
    lines = [f"#define {name} {value}\n" for name, value in constants.items()]
    return "".join((*lines, *(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in files)))
