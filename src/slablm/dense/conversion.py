"""Where a model's tensors lie in files that call them otherwise, or keep several in one.

transformers renames tensors while it loads, and joins those of experts: ``block_sparse_moe.experts.3.w1.weight`` of a
hub's file becomes a part of ``mlp.experts.gate_up_proj``. Here that is followed, by transformers' own list of
conversions, down to the matrix of one expert, so that experts are read one by one wherever they are. What is done to a
tensor beyond that (turned, cut, computed) is not followed, and the model is read as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from slablm.checkpoint.files import WAY_OUT
from slablm.checkpoint.shards import Piece, byte_view
from slablm.errors import SlabError
from slablm.runtime.experts import Experts, Share, all_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SharedPiece(Piece):
    """One projection of an expert whose outputs do not lie in a row.

    Attributes:
        share: which of them it is.
        stored: shape of all that the expert has in that tensor.
    """

    share: Share
    stored: tuple[int, ...]

    def read(self) -> Tensor:
        """As `Piece.read`; reads the expert's other projections in this tensor, too."""
        return self.share.of(Piece(self.dtype, self.stored, self.source).read()).contiguous()

    def chunks(self) -> Iterator[memoryview | bytes]:
        """As `Piece.chunks`."""
        yield byte_view(self.read())


def by_own_names(model: PreTrainedModel, stored: dict[str, Piece]) -> dict[str, Piece]:
    """The tensors of a model's files by the names that they have in the model.

    Args:
        model: with its experts apart (`slablm.runtime.experts.separate_experts`).
        stored: by the names in the files.

    Returns:
        Pieces by the model's names; what cannot be followed, and what the model has not, by names that it has not.

    Raises:
        SlabError: a tensor of all experts has another shape than the model wants.
    """
    conversions = _Conversions(model)
    found: dict[str, Piece] = {}
    for name, piece in stored.items():
        own = conversions.follow(name)
        owner, _, tensor = own.rpartition(".")
        experts = conversions.experts.get(owner)
        if experts is not None and tensor.removesuffix("_bias") in {s.tensor for s in experts.shares.values()}:
            found |= _apart(own, experts, piece, model)
        else:
            found[own] = piece
    return found


class _Conversions:
    """What transformers does to the names of a model's tensors while it loads.

    Args:
        model: the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        self.experts: dict[str, Experts] = dict(all_experts(model))
        self._names = model.state_dict().keys()
        conversions: list[Any] = get_model_conversion_mapping(model)
        self._renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        self._converters = [one for one in conversions if not isinstance(one, WeightRenaming)]

    def follow(self, name: str) -> str:
        """What a tensor of the files, or the part of a tensor that it becomes, is called in the model."""
        own = name
        for renaming in self._renamings:
            own, _ = renaming.rename_source_key(own)
        for converter in self._converters:
            joined, pattern = converter.rename_source_key(own)
            if pattern is None:
                continue
            projections, owner = _joined(converter), joined.rpartition(".")[0]
            found = re.search(pattern.replace("*", r"(\d+)"), own)
            if not projections or found is None or owner not in self.experts:
                return f"{name} before {type(converter.operations[0]).__name__}"  # no tensor of the model
            return f"{owner}.{found[1]}.{projections[converter.source_patterns.index(pattern)]}.weight"
        # As transformers does: what has no place under its new name keeps the old one, if that is the model's.
        return name if name in self._names and own not in self._names else own


def _joined(converter: Any) -> tuple[str, ...]:
    """Which projections a converter joins of all experts, in the order of its patterns; empty if it does more."""
    operations = [(type(one).__name__, getattr(one, "dim", None)) for one in converter.operations]
    target = converter.target_patterns[0].rpartition(".")[2]
    if operations == [("MergeModulelist", 0), ("Concatenate", 1)] and target == "gate_up_proj":
        projections: tuple[str, ...] = ("gate_proj", "up_proj")
    elif operations == [("MergeModulelist", 0)] and target in ("up_proj", "down_proj"):
        projections = (target,)
    else:
        return ()
    return projections if len(converter.source_patterns) == len(projections) else ()


def _apart(name: str, experts: Experts, piece: Piece, model: PreTrainedModel) -> dict[str, Piece]:
    """The parts of a tensor of all experts."""
    owner, _, tensor = name.rpartition(".")
    part = "bias" if tensor.endswith("_bias") else "weight"
    shares = {key: share for key, share in experts.shares.items() if share.tensor == tensor.removesuffix("_bias")}
    wanted = (experts.num_experts, *next(iter(shares.values())).stored(part))
    if piece.shape != wanted:
        raise SlabError(
            f"{model.config.name_or_path}: tensor {name!r} has shape {list(piece.shape)}, "
            f"the config asks for {list(wanted)}: {WAY_OUT}"
        )
    assert isinstance(piece.source, tuple)
    path, start = piece.source
    nbytes = piece.nbytes // experts.num_experts
    return {
        f"{owner}.{number}.{projection}.{part}": _share_of(piece.dtype, share, part, (path, start + number * nbytes))
        for number in range(experts.num_experts)
        for projection, share in shares.items()
    }


def _share_of(dtype: str, share: Share, part: str, source: tuple[Path, int]) -> Piece:
    """One projection's weight or bias out of an expert's slice that begins at `source`."""
    whole, shape = Piece(dtype, share.stored(part), source), share.shape if part == "weight" else share.shape[:1]
    if share.step > 1 or (share.transposed and part == "weight"):
        return SharedPiece(dtype, shape, source, share, whole.shape)
    before = whole.nbytes // share.outputs * share.first
    return Piece(dtype, shape, (source[0], source[1] + before))
