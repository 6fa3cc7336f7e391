"""Checks and times everything that slablm does on a CUDA machine, and prints it as tables.

    python benchmarks/gpu.py                                             # all of it, some minutes
    python benchmarks/gpu.py --shapes 4096x14336 --sparsity 50 --tokens 1
    python benchmarks/gpu.py --sweep                                     # matvec's tile sizes, to choose others

In order: every kernel is compiled and compared with the reference (the command stops at the first that differs, so
there are no times of wrong results); layers of Llama-3-8B against cuBLAS; one block's layers as `SlabLinear`, decoding
inside a CUDA graph; and the decomposition of every layer, with torch told to refuse any wait of the host.

How it is timed: a candidate's calls are recorded in one CUDA graph, each call on its own copy of the weight, with more
copies than the L2 cache could hold, so that every weight comes from memory, as in a model, and launching costs next to
nothing. Every round replays the graph of each candidate once, one after the other; the median counts. Bytes are those
of the weight's tensors, inputs and outputs; the yardstick for bytes per second is a device-to-device copy, counted as
bytes read plus bytes written, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from kernels import random_packed
from torch import Tensor, nn
from torch.nn import functional

from slablm import CompressionConfig
from slablm.methods import LayerStats, get_method
from slablm.packing import PackedWeight
from slablm.runtime import kernels
from slablm.runtime.kernels import GpuWeight, reference, to_gpu
from slablm.runtime.linear import SlabLinear

DEVICE = torch.device("cuda")
# (rows, columns) and how many of them a block has.
LLAMA_3_8B = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
BLOCKS = 32
CHECKED = ((96, 777), (1024, 4096), (4096, 14336))
COLD_BYTES = 512 << 20  # well above the L2 cache of any GPU
COPY_BYTES = 1 << 30
DTYPES = {"BF16": torch.bfloat16, "FP16": torch.float16}

Run = Callable[[], object]


def packed_on_gpu(m: int, n: int, ratio: float, dtype: torch.dtype = torch.bfloat16) -> PackedWeight:
    packed = random_packed(m, n, ratio)
    planes = {name: getattr(packed, name).to(DEVICE, dtype) for name in ("values", "left", "right")}
    return replace(packed, plane=packed.plane.to(DEVICE), **planes)


def copy_of(weight: GpuWeight) -> GpuWeight:
    return replace(weight, **{name: t.clone() for name, t in vars(weight).items() if isinstance(t, Tensor)})


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


def copies_needed(nbytes: int) -> int:
    return max(4, -(-COLD_BYTES // nbytes))


def dense_calls(m: int, n: int, tokens: int, dtype: torch.dtype) -> list[Run]:
    inputs = torch.randn(tokens, n, device=DEVICE, dtype=dtype)
    weight = torch.randn(m, n, device=DEVICE, dtype=dtype)
    weights = [weight.clone() for _ in range(copies_needed(weight.nbytes))]
    return [lambda w=w: functional.linear(inputs, w) for w in weights]


def slab_calls(weight: GpuWeight, tokens: int) -> list[Run]:
    inputs = torch.randn(tokens, weight.in_features, device=DEVICE, dtype=torch.bfloat16)
    weights = [copy_of(weight) for _ in range(copies_needed(weight.nbytes))]
    return [lambda w=w: kernels.linear(inputs, w) for w in weights]


def copy_calls() -> list[Run]:
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return [lambda: target.copy_(source)]


def check() -> None:
    """Compare the kernels with the reference; stop where they differ."""
    worst: dict[str, float] = {}
    for m, n in CHECKED:
        for bits in (16, 8):
            weight = to_gpu(packed_on_gpu(m, n, 0.5), bits)
            dense = reference.unpack(weight).double()
            for tokens in (1, 4, 8, 16, 64, 200):
                for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
                    inputs = torch.randn(tokens, n, device=DEVICE, dtype=dtype)
                    truth = inputs.double() @ dense.T
                    error = ((kernels.linear(inputs, weight).double() - truth).norm() / truth.norm()).item()
                    where = f"{m}x{n}, {bits}-bit values, {tokens} token(s), {dtype}"
                    if not error <= bound:
                        sys.exit(f"wrong result: {where}: relative error {error:.2g} above {bound:g}")
                    worst[str(dtype)] = max(worst.get(str(dtype), 0.0), error)
    layer = SlabLinear.from_packed(packed_on_gpu(1024, 4096, 0.5))
    layer.use_native()
    inputs = torch.randn(1, 4096, device=DEVICE, dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)(inputs)
    if not torch.allclose(compiled, layer(inputs), rtol=1e-2, atol=1e-2):
        sys.exit("wrong result: torch.compile changes what SlabLinear gives")
    print("checked against the reference; worst relative errors: " + str({k: f"{v:.1e}" for k, v in worst.items()}))


def layer_table(shapes: list[tuple[int, int]], options: argparse.Namespace) -> None:
    head = f"{'shape':<13}{'ratio':>6}{'values':>8}{'batch':>6}{'us':>9}{'GB/s':>8}{'of copy':>9}"
    print("\nlayers; x BF16, x FP16: how many times as fast as cuBLAS")
    print(f"{head}{'x BF16':>8}{'x FP16':>8}")
    for m, n in shapes:
        for percent in options.sparsity:
            packed = packed_on_gpu(m, n, percent / 100)
            weights = {"16 bit": to_gpu(packed, 16), "8 bit": to_gpu(packed, 8)}
            for tokens in options.tokens:
                runs = {name: slab_calls(weight, tokens) for name, weight in weights.items()}
                runs |= {name: dense_calls(m, n, tokens, dtype) for name, dtype in DTYPES.items()}
                times = microseconds(runs | {"copy": copy_calls()}, options.rounds)
                sizes = {name: weight.nbytes for name, weight in weights.items()} | dict.fromkeys(DTYPES, 2 * m * n)
                for name, nbytes in sizes.items():
                    speed = (nbytes + 2 * tokens * (m + n)) / times[name] / 1e3
                    copy = 2 * COPY_BYTES / times["copy"] / 1e3
                    print(
                        f"{f'{m}x{n}':<13}{percent:>5}%{name:>8}{tokens:>6}{times[name]:>9.1f}{speed:>8.0f}"
                        f"{speed / copy:>9.2f}{times['BF16'] / times[name]:>8.2f}{times['FP16'] / times[name]:>8.2f}",
                        flush=True,
                    )


def block_table(options: argparse.Namespace) -> None:
    """One token through all linear layers of a block, in one CUDA graph."""
    inputs = {n: torch.randn(1, n, device=DEVICE, dtype=torch.bfloat16) for n in (4096, 14336)}
    shapes = [shape for shape, count in LLAMA_3_8B.items() for _ in range(count)]
    runs: dict[str, list[Run]] = {}
    dense = [nn.Linear(n, m, bias=False, device=DEVICE, dtype=torch.bfloat16) for m, n in shapes]
    runs["dense BF16"] = [lambda: [layer(inputs[layer.in_features]) for layer in dense]]
    for bits in (16, 8):
        layers = [SlabLinear.from_packed(packed_on_gpu(m, n, 0.5)) for m, n in shapes]
        for layer in layers:
            layer.use_native(bits)
        runs[f"slab {bits} bit"] = [lambda layers=layers: [layer(inputs[layer.in_features]) for layer in layers]]
    times = microseconds(runs, options.rounds)
    print("\nSlabLinear, the linear layers of a Llama-3-8B block at 50 %, one token, one CUDA graph")
    for name, time in times.items():
        print(f"{name:<14}{time:>9.1f} us   x dense {times['dense BF16'] / time:.2f}")


def decomposition_table(shapes: list[tuple[int, int]]) -> None:
    print("\ndecomposition, 50 %, 20 iterations; torch refuses any wait of the host meanwhile")
    config, total = CompressionConfig("slab"), 0.0
    for m, n in shapes:
        weight = torch.randn(m, n, device=DEVICE, dtype=torch.bfloat16)
        stats = LayerStats(torch.rand(n, device=DEVICE) + 0.1, 0, torch.empty(0, n, device=DEVICE))
        get_method("slab").function(weight, stats, config)  # once for cuBLAS and the allocator
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        start.record()
        get_method("slab").function(weight, stats, config)
        end.record()
        torch.cuda.set_sync_debug_mode("default")
        end.synchronize()
        seconds = start.elapsed_time(end) / 1e3
        total += BLOCKS * LLAMA_3_8B.get((m, n), 0) * seconds
        print(f"{f'{m}x{n}':<13}{seconds:>9.3f} s", flush=True)
    if set(shapes) == set(LLAMA_3_8B):
        print(f"all layers of Llama-3-8B: {total:.1f} s")


def sweep(shapes: list[tuple[int, int]], rounds: int) -> None:
    from slablm.runtime.kernels import gpu

    print(
        "\nmatvec, one token, 50 %: microseconds by rows per program and warps (now: see _MATVEC_ROWS, _MATVEC_WARPS)"
    )
    for m, n in shapes:
        packed = packed_on_gpu(m, n, 0.5)
        for bits in (16, 8):
            weight = to_gpu(packed, bits)
            for warps in (1, 2, 4, 8):
                times = []
                for rows in (1, 2, 4, 8, 16):
                    gpu._MATVEC_ROWS, gpu._MATVEC_WARPS = ((0, rows),), warps
                    times.append(microseconds({"slab": slab_calls(weight, 1)}, rounds)["slab"])
                row = "".join(f"{time:>9.1f}" for time in times)
                print(f"{m}x{n} {bits:>2} bit, {warps} warp(s), rows 1 2 4 8 16:{row}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="MxN", help="instead of those of Llama-3-8B")
    parser.add_argument("--sparsity", nargs="+", type=int, default=(50, 70), metavar="PERCENT")
    parser.add_argument("--tokens", nargs="+", type=int, default=(1, 4, 16, 64))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sweep", action="store_true", help="only time matvec with other tile sizes")
    options = parser.parse_args()
    chosen = kernels.backend("cuda")
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA machine, and torch sees no GPU here: nothing was measured")
    if chosen.name != "triton":
        sys.exit(f"benchmarks/gpu.py needs the Triton kernels ({chosen.reason}): nothing was measured")
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes] if options.shapes else list(LLAMA_3_8B)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, {chosen.reason}")
    print("command: python " + " ".join(sys.argv))
    torch.manual_seed(0)
    with torch.inference_mode():
        if options.sweep:
            sweep(shapes, options.rounds)
            return
        check()
        layer_table(shapes, options)
        block_table(options)
        decomposition_table(shapes)


if __name__ == "__main__":
    main()
