"""One block's calibration run through without values, to see what it will take.

torch's fake tensors have a shape, a type and a device, and no bytes: running the model's own forward on them costs
milliseconds at any size and needs no knowledge of the architecture. Underneath, every tensor that comes and goes is
counted. What an operator takes for itself inside is not seen, with one exception that matters (`_inner_bytes`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from slablm.calibration.capture import BlockCall, capture_block_calls
from slablm.calibration.statistics import StatsCollector, Use
from slablm.dense.targets import Targets, find_blocks
from slablm.runtime.experts import all_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# glibc maps larger pieces one by one and returns them at once (M_MMAP_THRESHOLD at its largest); smaller ones come
# from a heap that keeps them for later.
HEAP_LIMIT = 32 << 20


@dataclass(frozen=True)
class Work:
    """What one run of a block on one window takes.

    Attributes:
        peak_bytes: most bytes of tensors at a time, the block's weights and the window not counted.
        heap_bytes: the same, counting only what comes from the heap.
        left_bytes: what stays afterwards: statistics.
        flops: floating-point operations of the matrix products.
        touched_bytes: bytes of all results together.
    """

    peak_bytes: int
    heap_bytes: int
    left_bytes: int
    flops: int
    touched_bytes: int


@dataclass(frozen=True)
class BlockRehearsal:
    """One kind of block.

    Attributes:
        count: blocks of this kind.
        weight_bytes: its weights.
        gram_bytes: one matrix XᵀX of every distinct input of its layers; 0 where none are collected.
        inputs: of every distinct input the layers that read it, by full name, and the bytes of its statistics.
        statistics: the run that collects statistics.
        propagation: the run that makes the next block's inputs.
    """

    count: int
    weight_bytes: int
    gram_bytes: int
    inputs: tuple[tuple[frozenset[str], int], ...]
    statistics: Work
    propagation: Work


@dataclass(frozen=True)
class Rehearsal:
    """What calibration takes.

    Attributes:
        outside_bytes: what the decoder has outside its blocks: embeddings, norms.
        embedding: the model's forward without its blocks.
        window_bytes: hidden states of one window.
        blocks: the kinds of blocks.
    """

    outside_bytes: int
    embedding: Work
    window_bytes: int
    blocks: tuple[BlockRehearsal, ...]


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are alive, results of operators and their storages shared by views."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._held = known  # a storage that is gone could come back under the same address
        self.live = self.heap = self.peak = self.heap_peak = self.touched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        inner = _inner_bytes(func, args, kwargs or {})
        self.peak = max(self.peak, self.live + inner)
        self.heap_peak = max(self.heap_peak, self.heap + (inner if inner < HEAP_LIMIT else 0))
        return result

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._change(size, +1)
        self.touched += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._change(size, -1)

    def _change(self, size: int, sign: int) -> None:
        self.live += sign * size
        if size < HEAP_LIMIT:
            self.heap += sign * size


def _inner_bytes(func: Any, args: Any, kwargs: Any) -> int:
    """Bytes inside an operator: on the CPU a sum in another type than its input's converts all of it first."""
    if func is not torch.ops.aten.sum.dim_IntList or args[0].device.type != "cpu":
        return 0
    dtype = kwargs.get("dtype")
    return int(args[0].numel() * dtype.itemsize) if dtype not in (None, args[0].dtype) else 0


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * math.prod(query) * key[-2] + 2 * math.prod(query[:-1]) * key[-2] * value[-1])


def _added_product_flops(self: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * int(a[0]) * int(a[1]) * int(b[1])


_FLOPS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten.addmm_: _added_product_flops,
}


@torch.no_grad()
def rehearse(
    model: PreTrainedModel,
    targets: Targets,
    seq_len: int,
    samples: tuple[int, int],
    device: torch.device,
    *,
    grams: int,
) -> Rehearsal:
    """Run the calibration of one window, without values.

    Args:
        model: on the meta device; left as it was.
        targets: layers whose statistics are collected.
        seq_len: tokens of the window.
        samples: rows kept for measuring the output error, as for `StatsCollector`.
        device: compute device.
        grams: how many matrices XᵀX are collected of every layer, 0 to 2.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    _, blocks = find_blocks(model)
    decoder: nn.Module = getattr(model, "base_model", model)
    inside = {id(module) for block in blocks for module in block.modules()}
    outside = [module for module in decoder.modules() if id(module) not in inside]
    kinds = _kinds(blocks)
    with FakeTensorMode(), _filled([*outside, *(m for i in kinds for m in blocks[i].modules())], device):
        tensors = [t for module in outside for t in _tensors(module)]
        known = [*tensors, *(t for i in kinds for m in blocks[i].modules() for t in _tensors(m))]
        tokens = torch.zeros(1, seq_len, dtype=torch.long, device=device)
        with _Meter(known) as meter:
            hidden, calls = capture_block_calls(model, blocks, tokens, device)
        embedding = Work(meter.peak, meter.heap_peak, 0, 0, meter.touched)
        window = hidden[0].to(device)
        runs = []
        for index, count in kinds.items():
            weights = sum(t.nbytes for module in blocks[index].modules() for t in _tensors(module))
            modules = {name: model.get_submodule(name) for name in targets.names[index]}
            layers = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
            call, collecting = calls[index], _Collecting(layers, samples, 0)
            with all_tokens(blocks[index]):
                plain = _measure(blocks[index], call, window, known, collecting)
            statistics, gram_bytes = plain, 0
            if grams:
                with all_tokens(blocks[index]):
                    held = _measure(blocks[index], call, window, known, _Collecting(layers, samples, grams))
                gram_bytes = (held.left_bytes - plain.left_bytes) // grams
                # There may be several at a time, but a window goes into one.
                statistics = replace(
                    held,
                    flops=plain.flops + (held.flops - plain.flops) // grams,
                    touched_bytes=plain.touched_bytes + (held.touched_bytes - plain.touched_bytes) // grams,
                )
            propagation = _measure(blocks[index], call, window, known, _Collecting({}, samples, 0))
            inputs = tuple(
                (frozenset(names), 4 * (grams * n * n + sum(samples) * n)) for names, n in collecting.readers
            )
            runs.append(BlockRehearsal(count, weights, gram_bytes, inputs, statistics, propagation))
        outside_bytes = sum({id(t): t.nbytes for t in tensors}.values())
        return Rehearsal(outside_bytes, embedding, window.nbytes, tuple(runs))


def _kinds(blocks: nn.ModuleList) -> dict[int, int]:
    """First block of every kind (class and shapes) → number of such blocks."""
    first: dict[Any, int] = {}
    counts: dict[int, int] = {}
    for index, block in enumerate(blocks):
        kind = (type(block), tuple((name, tuple(p.shape)) for name, p in block.named_parameters()))
        start = first.setdefault(kind, index)
        counts[start] = counts.get(start, 0) + 1
    return counts


def _measure(block: nn.Module, call: BlockCall, window: Tensor, known: list[Tensor], collecting: _Collecting) -> Work:
    """Run a block and collect statistics."""
    extra = [t for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
    with _Meter([*known, window, *extra]) as meter, FlopCounterMode(display=False, custom_mapping=_FLOPS) as flops:
        with collecting:
            call(block, window)
        left = meter.live
    return Work(meter.peak, meter.heap_peak, left, flops.get_total_flops(), meter.touched)


class _Collecting:
    """Within it, statistics of layers' inputs are collected, once for layers that read the same tensor.

    Args:
        layers: by name.
        samples: as for `StatsCollector`.
        grams: matrices XᵀX of every input.

    Attributes:
        readers: of every distinct input the names of its layers, and its width n.
    """

    def __init__(self, layers: dict[str, nn.Linear], samples: tuple[int, int], grams: int) -> None:
        self._layers, self._samples, self._grams = layers, samples, grams
        self.readers: list[tuple[list[str], int]] = []
        self._inputs: list[Tensor] = []
        self._collectors: list[StatsCollector] = []

    def __enter__(self) -> None:
        self._handles = [
            layer.register_forward_pre_hook(partial(self._see, name)) for name, layer in self._layers.items()
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._inputs.clear()  # they go with the window, collectors stay

    def _see(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        states: Tensor = args[0]
        for (names, _), seen in zip(self.readers, self._inputs, strict=True):
            if seen is states:
                names.append(name)
                return
        collector = StatsCollector(states.shape[-1], self._grams > 0, states.device, self._samples)
        sampled = torch.zeros(min(self._samples[0], states.shape[-2]), dtype=torch.long)
        collector.add(states, sampled)
        if self._grams > 1:
            collector.add(states, sampled[:0], 1, Use.HOLD_BACK)
        self.readers.append(([name], states.shape[-1]))
        self._inputs.append(states)
        self._collectors.append(collector)


@contextmanager
def _filled(modules: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Within it, these modules' tensors are fake ones on the compute device."""
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in modules]
    made: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        return made[id(tensor)]

    try:
        for module, parameters, buffers in before:
            module._parameters.update({name: fake(p) for name, p in parameters.items() if p is not None})
            module._buffers.update({name: fake(b) for name, b in buffers.items() if b is not None})
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
