"""Peak memory, part by part: what is alive at the same time, phase after phase.

    outside        one matrix outside the blocks is read, checked and rounded
    embedding      the decoder's outside and one block, for the inputs of the first block
    statistics     one block on one window at a time, with its statistics
    decomposition  one block with all its statistics, and the buffers of the largest matrix
    propagation    the compressed block on one window at a time

To each comes what the process holds anyway (measured) and the hidden states of all windows. Bytes come from shapes;
for calibration they are counted by `slablm.planning.rehearsal`.

*The heap.* glibc's heap keeps freed pieces up to 32 MB, and windows leave holes that the next one does not fit. That
part of a window's working space is therefore counted twice. (Measured on SmolLM2; larger tensors are mapped one by
one and are not affected.)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from slablm.calibration.pairwise import leaf_of, most_sums, share
from slablm.calibration.statistics import Use
from slablm.calibration.stream import window_uses, windows_held
from slablm.calibration.text import CHARACTERS_PER_TOKEN, load_text
from slablm.calibration.windows import UNSEEN_WINDOWS, windows_wanted
from slablm.compression.layer import cost
from slablm.config import CompressionConfig, Excerpt
from slablm.methods import get_method
from slablm.packing.quantize import ENTRIES_AT_ONCE
from slablm.planning.rehearsal import BlockRehearsal, Rehearsal, Work
from slablm.planning.size import Size
from slablm.system.distributed import World, assign

FLOAT32_BYTES = 4
# n x n matrices of a column sweep beside the statistics: G rotated and in another order, with damping, its factor, and
# what the factorisation takes.
_SWEEP_MATRICES = 6
# `check_finite` works on pieces of this many entries.
_CHECKED_AT_ONCE = 1 << 24
# Measured with SmolLM2's tokenizer: encodings, offsets and Python's integers.
_TOKENISER_BYTES_PER_CHARACTER = 62
# The whole training split, as `slablm.calibration.text` reads it.
_WIKITEXT2_CHARACTERS = 10_900_000


@dataclass(frozen=True)
class Part:
    """One of the things in memory.

    Attributes:
        name: what it is.
        bytes: its size.
        on_device: in the compute device's memory if that has its own.
    """

    name: str
    bytes: int
    on_device: bool = False


@dataclass(frozen=True)
class Phase:
    """Parts that are in memory together.

    Attributes:
        name: see the module's text.
        parts: without what the process holds anyway.
    """

    name: str
    parts: tuple[Part, ...]

    def total(self, on_device: bool) -> int:
        """Bytes in the compute device's memory, or in the host's."""
        return sum(part.bytes for part in self.parts if part.on_device == on_device)


@dataclass(frozen=True)
class Memory:
    """Peak memory of a compression.

    Attributes:
        base_bytes: interpreter, libraries and tokenizer, measured in this process; 0 where that is impossible.
        phases: in order.
    """

    base_bytes: int
    phases: tuple[Phase, ...]

    @property
    def largest(self) -> Phase:
        """The phase that needs most of the host's memory."""
        return max(self.phases, key=lambda phase: phase.total(on_device=False))

    @property
    def peak_bytes(self) -> int:
        """Peak of the host's memory."""
        return self.base_bytes + self.largest.total(on_device=False)

    @property
    def device_phase(self) -> Phase:
        """The phase that needs most of the device's memory."""
        return max(self.phases, key=lambda phase: phase.total(on_device=True))


@dataclass(frozen=True)
class Situation:
    """What memory depends on besides shapes.

    Attributes:
        itemsize: bytes of a weight while it is calibrated.
        stored_itemsize: bytes of a weight in the model's files.
        float32: whether that type is float32, which is rounded before it is stored.
        largest_outside: entries of the largest matrix outside the blocks.
        whole: the model is in memory as a whole.
        file_bytes: of a model that is read as a whole, bytes of its files.
        accelerator: the compute device has its own memory.
        max_memory: bytes of RAM for the hidden states; None for as much as they take.
        ranks: processes that divide the windows.
    """

    itemsize: int
    stored_itemsize: int
    float32: bool
    largest_outside: int
    whole: bool
    file_bytes: int
    accelerator: bool
    max_memory: int | None
    ranks: int = 1


def plan_memory(
    rehearsal: Rehearsal, size: Size, config: CompressionConfig, situation: Situation, base_bytes: int
) -> Memory:
    """Everything that is in memory at a time.

    Args:
        rehearsal: what calibration takes.
        size: what is stored.
        config: the settings.
        situation: everything else.
        base_bytes: see `Memory`.
    """
    s = situation
    dense = [Part("the whole model", size.dense_bytes, s.accelerator)] if s.whole else []
    needed = rehearsal.window_bytes * max(windows_held(config.num_samples, UNSEEN_WINDOWS, s.ranks))
    states = Part("hidden states of all windows", needed if s.max_memory is None else min(needed, s.max_memory))
    phases = [Phase("text", (*dense, Part("tokenising the text", _text_bytes(config))))]
    if s.whole:
        phases.append(Phase("reading", (*dense, Part("the model's files", s.file_bytes))))
    outside = _outside_bytes(s) if config.head_bits == 16 else _int8_bytes(s)
    phases.append(Phase("outside", (*dense, Part("one matrix outside the blocks", outside))))
    blocks = [] if s.whole else [Part("one block", max(b.weight_bytes for b in rehearsal.blocks), s.accelerator)]
    held = [*dense, *blocks, states]
    copy = Part("the embeddings", rehearsal.outside_bytes, s.accelerator)
    phases.append(Phase("embedding", (*held, copy, _working("one window", rehearsal.embedding, s))))
    largest = max(rehearsal.blocks, key=lambda block: block.statistics.peak_bytes)
    run = _working("one window in a block, with statistics", largest.statistics, s)
    sums = Part("Gram matrices still to be added up", _open_sums(config, s.ranks) * largest.gram_bytes, s.accelerator)
    phases.append(Phase("statistics", (*held, run, sums)))
    owned = max(_owned_bytes(block, size, config, s.ranks) for block in rehearsal.blocks)
    statistics = Part("statistics", owned, s.accelerator)
    packed = Part("the block's packed weights", _packed_bytes(size, rehearsal), s.accelerator)
    shared = {name for block in rehearsal.blocks for names, _ in block.inputs if len(names) > 1 for name in names}
    buffers = Part("buffers of the largest matrix", largest_workspace(size, config, s, shared), s.accelerator)
    phases.append(Phase("decomposition", (*held, statistics, packed, buffers)))
    run = _working("one window in a block", largest.propagation, s)
    phases.append(Phase("propagation", (*held, packed, run)))
    return Memory(base_bytes, tuple(phases))


def largest_workspace(size: Size, config: CompressionConfig, situation: Situation, shared: Collection[str]) -> int:
    """Bytes beside the weight while the most expensive matrix is decomposed.

    Args:
        size: what is stored.
        config: the settings.
        situation: everything else.
        shared: layers that read the same inputs as another one.
    """
    method = get_method(config.method)
    sweep = _SWEEP_MATRICES if method.needs_gram else 0
    return round(
        max(
            layer.weights
            * workspace_per_weight(
                config.method, layer.kept_fraction, float32=situation.float32, accelerator=situation.accelerator
            )
            + (sweep + method.kept_matrices * (layer.name in shared)) * FLOAT32_BYTES * layer.shape[1] ** 2
            for layer in size.layers
        )
    )


def workspace_per_weight(
    method: str, kept_fraction: float | None, *, float32: bool, accelerator: bool = False
) -> float:
    """Bytes per weight at a decomposition's peak (`slablm.methods.Method.workspace`).

    Gathering takes two int64 indices and a float32 per entry on the CPU, a place for every weight on accelerators.

    Args:
        method: name of the method.
        kept_fraction: k / n; None where nothing is gathered.
        float32: whether the model's weights are float32.
        accelerator: not on the CPU.
    """
    gathered = 0.0 if kept_fraction is None else 24 + 4 * kept_fraction if accelerator else 20 * kept_fraction
    return get_method(method).workspace(gathered, float32)


def spilled_bytes(window_bytes: int, windows: int, max_memory: int | None) -> int:
    """Bytes of hidden states that one process puts into a file.

    Args:
        window_bytes: hidden states of one window.
        windows: windows of this process.
        max_memory: bytes of RAM for them; None for as much as they take.
    """
    kept = windows if max_memory is None else min(windows, max_memory // window_bytes)
    return (windows - kept) * window_bytes


def _open_sums(config: CompressionConfig, ranks: int) -> int:
    """Gram matrices of a layer that the busiest rank holds at most, beyond those that are left in the end."""
    if not get_method(config.method).needs_gram:
        return 0
    uses = window_uses(config.method, config.num_samples, UNSEEN_WINDOWS)
    final = 2 if Use.HOLD_BACK in uses else 1
    most = 0
    for rank in range(ranks):
        mine = share(World(rank, ranks), len(uses))
        leaves = {use: sorted({leaf_of(i, len(uses)) for i in mine if uses[i] is use}) for use in Use}
        fitted, left = most_sums(leaves[Use.FIT])
        left = min(left, 1) if ranks == 1 else left  # one process adds them up as soon as it has all
        most = max(most, fitted, left + most_sums(leaves[Use.HOLD_BACK])[0])
    return max(0, most - final)


def _owned_bytes(block: BlockRehearsal, size: Size, config: CompressionConfig, ranks: int) -> int:
    """Statistics of a block on the rank that has most of them while layers are decomposed."""
    if ranks == 1:
        return block.statistics.left_bytes
    shapes = {layer.name: layer.shape for layer in size.layers}
    owners = assign({name: cost(shapes[name], config.method) for names, _ in block.inputs for name in names}, ranks)
    return max(
        sum(bytes_ for names, bytes_ in block.inputs if rank in {owners[name] for name in names})
        for rank in range(ranks)
    )


def _working(name: str, work: Work, situation: Situation) -> Part:
    heap = 0 if situation.accelerator else work.heap_bytes
    return Part(name, work.peak_bytes + heap, situation.accelerator)


def _packed_bytes(size: Size, rehearsal: Rehearsal) -> int:
    return sum(layer.true_bits for layer in size.layers) // 8 // sum(block.count for block in rehearsal.blocks)


def _outside_bytes(situation: Situation) -> int:
    """Reading, checking (a comparison and an absolute value), and in float32 rounding with a check of all at once."""
    s, entries = situation, situation.largest_outside
    if s.float32:
        return entries * (11 if s.whole else 15)  # a whole model has the original already
    checked = min(entries, _CHECKED_AT_ONCE) * (s.itemsize + 3)
    if s.whole:
        return checked
    converted = entries * s.stored_itemsize if s.stored_itemsize != s.itemsize else 0
    return entries * s.itemsize + max(checked, converted)


def _int8_bytes(situation: Situation) -> int:
    """Reading, checking, and rounding to int8 rows: a byte per entry, and three float32 copies of a piece."""
    s, entries = situation, situation.largest_outside
    checked = min(entries, _CHECKED_AT_ONCE) * (s.itemsize + 3)
    rounded = entries + min(entries, ENTRIES_AT_ONCE) * 3 * FLOAT32_BYTES
    read = 0 if s.whole else entries * s.itemsize
    converted = 0 if s.whole or s.stored_itemsize == s.itemsize else entries * s.stored_itemsize
    return read + max(checked, rounded, converted)


def _text_bytes(config: CompressionConfig) -> int:
    excerpt = Excerpt.parse(config.calibration)
    source = excerpt.source
    if source == "self":
        return 0
    if source == "wikitext2":
        characters = _WIKITEXT2_CHARACTERS
    elif source == "c4":
        characters = windows_wanted(config) * config.seq_len * CHARACTERS_PER_TOKEN
    elif source == "builtin":
        characters = len(load_text("builtin", split="calibration"))
    else:
        characters = excerpt.file.stat().st_size if excerpt.file.is_file() else 0
    return characters * _TOKENISER_BYTES_PER_CHARACTER
