"""A dense model of which only one block is in memory.

`StreamedBlocks` hands the blocks of an opened model (`slablm.dense.opening`) to the loop in
`slablm.compression.blocks`, one at a time:

    load    read the block's tensors from the files onto the compute device
    finish  write what it has become into the journal, and put the block back on the meta device

What lies outside the blocks (embeddings, final norm, head) goes into the journal first, tensor by tensor. Of it the
decoder needs only its own part, and only once: for the inputs of the first block.

Values do not depend on this. The same reading, rounding and calibration happen as with a model that is in memory as a
whole, so the resulting files are the same, byte by byte. A model that cannot be streamed passes through here as well:
its blocks are in memory from the beginning and leave it one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from slablm.calibration.activations import Activations
from slablm.checkpoint.entries import ModuleSpec
from slablm.checkpoint.layer_report import LayerReport
from slablm.checkpoint.stored import rounded, stored_form
from slablm.compression.journal import Journal, block_key, outside_key
from slablm.compression.store import BlockStore, FinishedBlock
from slablm.config import CompressionConfig
from slablm.dense.opening import DenseModel, is_parameter, put, tensor_names
from slablm.dense.targets import Targets, find_blocks
from slablm.methods.drift import Drift
from slablm.packing.quantize import quantize_rows
from slablm.runtime.int8 import Int8Rows, int8_names
from slablm.system.finite import check_finite


class StreamedBlocks(BlockStore):
    """The blocks of a model, from its files into the journal.

    Args:
        dense: the model, with embedding and head in int8 rows if they are to be stored so.
        targets: the layers to compress.
        config: the settings, `value_dtype` included.
        journal: where finished blocks go; None on a rank that does not write.
        max_activation_bytes: RAM for hidden states; None for as much as they take.
        folder: where hidden states beyond that go.
        done: blocks that an earlier run has finished.
    """

    def __init__(
        self,
        dense: DenseModel,
        targets: Targets,
        config: CompressionConfig,
        journal: Journal | None,
        *,
        max_activation_bytes: int | None,
        folder: Path | None,
        done: int,
    ) -> None:
        super().__init__()
        self.done = done
        self._dense, self._journal, self._folder = dense, journal, folder
        self._value_dtype: torch.dtype = getattr(torch, config.value_dtype or "")
        self._max_activation_bytes = max_activation_bytes
        self._compressed = {f"{name}.weight" for names in targets.names for name in names}
        self._prefix, self._blocks = find_blocks(dense.model)
        self._dtypes = {name: tensor.dtype for name, tensor in dense.model.state_dict().items()}
        self.names = tensor_names(dense.model)
        self._groups = {names[0]: names for names in self.names if not names[0].startswith(f"{self._prefix}.")}
        # Int8 rows come with their scales.
        self._scales = {f"{name}.weight": f"{name}.scales" for name in int8_names(dense.model)}
        self._outside = [names for first, names in self._groups.items() if first not in self._scales.values()]
        self._loaded: int | None = None
        for index, names in enumerate(self._outside):
            if journal is not None and not journal.has(outside_key(index)):
                journal.put(outside_key(index), self._made(names))

    def activations(self, count: int) -> Activations:
        """In RAM up to the limit, then in a file."""
        return Activations(count, self._max_activation_bytes, self._folder)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Within it, the decoder's embeddings and norms are in memory; nothing outside the blocks is, afterwards."""
        model = self._dense.model
        decoder: nn.Module = getattr(model, "base_model", model)
        needed = {id(tensor) for tensor in decoder.state_dict(keep_vars=True).values()}
        present = model.state_dict(keep_vars=True)
        for index, names in enumerate(self._outside):
            if id(present[names[0]]) in needed:
                for name, tensor in self._outside_tensors(index).items():
                    put(model, self._groups[name], tensor.to(self._dense.device, self._dtypes[name]))
        yield
        for names in self._groups.values():
            put(model, names, model.state_dict()[names[0]].to("meta"))

    def _outside_tensors(self, index: int) -> dict[str, Tensor]:
        """As they will be stored; a rank that does not write reads them from the model's files once more."""
        if self._journal is None:
            return self._made(self._outside[index])
        return {name: piece.read() for name, piece in self._journal.pieces(outside_key(index)).items()}

    def _made(self, names: list[str]) -> dict[str, Tensor]:
        """What is stored of a tensor outside the blocks: itself, or int8 rows and their scales."""
        scales = self._scales.get(names[0])
        if scales is None:
            return {names[0]: self._stored(names[0], self._read(names))}
        if not self._dense.weights:  # they have been made already
            return {name: self._read([name]).cpu() for name in (names[0], scales)}
        owner = names[0].rpartition(".")[0]
        rows = self._dense.model.get_submodule(owner)
        assert isinstance(rows, Int8Rows)
        dense = self._piece(names).to(rows.like.dtype)
        check_finite(dense, names[0])
        return dict(zip((names[0], scales), quantize_rows(dense, owner), strict=True))

    def load(self, index: int) -> None:
        """Read a block's tensors; the block loaded before is dropped."""
        if index == self._loaded or not self._dense.weights:
            return
        if self._loaded is not None:
            self._release(self._loaded)
        self._loaded = index
        for name in self._blocks[index].state_dict(prefix=self._name(index)):
            tensor = self._read([name]).to(self._dense.device)
            put(self._dense.model, [name], tensor)

    def finished(self, index: int) -> FinishedBlock:
        """A block from the journal, its packed weights on the compute device."""
        assert self._journal is not None
        pieces, notes = self._journal.pieces(block_key(index)), self._journal.notes(block_key(index))
        reports = [LayerReport(**{**entry, "shape": tuple(entry["shape"])}) for entry in notes["reports"]]
        modules = {name: ModuleSpec.from_json(name, entry) for name, entry in notes["modules"].items()}
        drift = None if notes["drift"] is None else Drift(**notes["drift"])
        packed = {}
        for report in reports:
            part = {key: piece for key, piece in pieces.items() if key.startswith(f"{report.name}.")}
            read = {
                key.removeprefix(f"{report.name}."): piece.read().to(self._dense.device) for key, piece in part.items()
            }
            spec = modules[report.name].packed(*report.shape, self._value_dtype)
            packed[report.name] = spec.from_parts(read, report.name)
        return FinishedBlock(packed, reports, drift)

    def finish(self, index: int, block: FinishedBlock) -> None:
        """Write a block into the journal, if there is one and the block is not in it, and drop the block."""
        super().finish(index, block)
        if self._journal is not None and index >= self.done:
            state = self._blocks[index].state_dict(prefix=self._name(index))
            tensors = {name: self._stored(name, tensor) for name, tensor in state.items()}
            drift = None if block.drift is None else vars(block.drift)
            modules = {report.name: self._described(report, block).to_dict() for report in block.reports}
            notes = {"reports": [vars(report) for report in block.reports], "drift": drift, "modules": modules}
            self._journal.put(block_key(index), tensors, notes)
        self._release(index)
        self._loaded = None

    def _described(self, report: LayerReport, block: FinishedBlock) -> ModuleSpec:
        spec = block.packed[report.name].spec
        return ModuleSpec.of(spec, self._value_dtype, report.output_error, report.unseen_error)

    def _name(self, index: int) -> str:
        return f"{self._prefix}.{index}."

    def _read(self, names: list[str]) -> Tensor:
        """A tensor of the dense model, rounded as it will be stored if it stays dense; on the CPU if streamed."""
        model, name = self._dense.model, names[0]
        if not self._dense.weights:  # checked and rounded already
            whole: Tensor = model.state_dict()[name]
            return whole
        tensor = self._piece(names).to(self._dtypes[name])
        if is_parameter(model, name):
            check_finite(tensor, name)
            if name not in self._compressed:
                tensor = rounded(tensor, name, self._value_dtype)
        return tensor

    def _piece(self, names: list[str]) -> Tensor:
        return next(self._dense.weights[name] for name in names if name in self._dense.weights).read()

    def _stored(self, name: str, tensor: Tensor) -> Tensor:
        return stored_form(tensor, self._value_dtype).cpu()

    def _release(self, index: int) -> None:
        """Put a block on the meta device."""
        for name, tensor in self._blocks[index].state_dict(prefix=self._name(index)).items():
            put(self._dense.model, [name], tensor.to("meta"))
