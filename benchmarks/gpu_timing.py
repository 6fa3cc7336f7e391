"""How `gpu.py` times: whole CUDA graphs, weights from memory, in turns.

A candidate's calls are recorded in one CUDA graph, each call on its own copy of the weight, with more copies than the
L2 cache could hold, so that every weight comes from memory, as in a model, and launching costs next to nothing. Every
round replays the graph of each candidate once, one after the other; the median counts.
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], object]

COLD_BYTES = 512 << 20  # well above the L2 cache of any GPU
COPY_BYTES = 1 << 30


def graph_of(calls: list[Run]) -> torch.cuda.CUDAGraph:
    """All calls in one CUDA graph; they are run once before, so that everything is compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def microseconds(candidates: dict[str, list[Run]], rounds: int) -> dict[str, float]:
    """Median time of one call of every candidate, in turns."""
    graphs = {name: graph_of(calls) for name, calls in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 2):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end) * 1e3 / len(candidates[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def cold_copies(weight: Any) -> list[Any]:
    """As many copies of a weight, a tensor or a dataclass with tensors, as the cache cannot hold."""
    count = max(4, -(-COLD_BYTES // weight.nbytes))
    if isinstance(weight, Tensor):
        return [weight.clone() for _ in range(count)]
    tensors = {name: part for name, part in vars(weight).items() if isinstance(part, Tensor)}
    return [replace(weight, **{name: part.clone() for name, part in tensors.items()}) for _ in range(count)]


def copy_calls() -> list[Run]:
    """A copy from device to device: its bytes read and written per second are the yardstick."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return [lambda: target.copy_(source)]


def device_line() -> dict[str, str]:
    """What was measured on, with its clocks at this moment."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "nvidia-smi": f"{query}: {told}",
    }
