"""Refusing NaN and Inf."""

from __future__ import annotations

import torch
from torch import Tensor

from slablm.errors import SlabError


def check_finite(tensor: Tensor, what: str) -> None:
    """Refuse NaN and Inf.

    Raises:
        SlabError: naming `what`.
    """
    # In parts: the comparison makes several tensors of the size of what it is given, and an embedding is large.
    if not all(torch.isfinite(part).all() for part in torch.split(tensor.detach().reshape(-1), 1 << 24)):
        raise SlabError(
            f"NaN or Inf in {what}: the checkpoint is damaged, or its dtype overflows (try --dtype float32)"
        )
