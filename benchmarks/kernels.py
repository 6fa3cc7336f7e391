"""Times of the CPU kernels against torch's dense products and against what the memory allows.

    python benchmarks/kernels.py                                   # all shapes, a few minutes
    python benchmarks/kernels.py --shapes 4096x4096 --sparsity 50  # one of them
    SLABLM_KERNEL=avx2 python benchmarks/kernels.py                # another instruction set

Every round times all candidates once, one after the other, so that noise hits them alike; before each, a buffer larger
than the caches is read, because in a model every layer's weights come from memory. Reported: the median, the 10th and
90th percentile, the speed-up over torch float32 and bfloat16 (ratio of medians), and the time over the limit: the bytes
the candidate must read, divided by the read bandwidth that is measured in the same rounds.

A machine that is shared disturbs medians; `--statistic min` compares the best round of each instead.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from slablm.methods import Decomposition
from slablm.methods.budget import overhead
from slablm.methods.rotation import Rotation, largest_block
from slablm.methods.symbols import SymbolWeight
from slablm.packing import PackedWeight, pack
from slablm.packing.symbols import PackedSymbols, pack_symbols
from slablm.runtime import kernels
from slablm.runtime.kernels import to_native

SHAPES = {
    "Llama-7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "Llama-3-8B": ((1024, 4096), (14336, 4096), (4096, 14336)),
    "SmolLM2-135M": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
}
SPARSITIES = (50, 60, 70, 80)
SYMBOL_BITS = (2, 3, 4, 5, 6)  # the same at every sparsity
FLUSH_BYTES = 96 << 20

Candidate = tuple[Callable[[], object], int]  # what to run, and the weight bytes it must read


def random_packed(m: int, n: int, ratio: float) -> PackedWeight:
    """A weight with the paper's row budget at compression ratio `ratio`, rank 1."""
    kept = max(1, int((1 - ratio - overhead((m, n), 1, True)) * n))
    mask = torch.zeros(m, n, dtype=torch.bool)
    for rows in range(0, m, 1024):
        order = torch.rand(min(1024, m - rows), n).topk(kept, dim=1).indices
        mask[rows : rows + 1024].scatter_(1, order, True)
    signs = torch.rand(m, n) < 0.5
    return pack(Decomposition(mask, torch.randn(m, kept), torch.rand(m, 1), torch.rand(1, n), signs), torch.float16)


def random_symbols(m: int, n: int, bits: int) -> PackedSymbols:
    """A weight in symbols, all equally frequent, with rotated inputs."""
    codes = torch.randint(0, 2**bits, (m, n), dtype=torch.uint8)
    levels = torch.linspace(-128, 127, 2**bits).to(torch.int8)
    return pack_symbols(SymbolWeight(codes, torch.rand(m).half(), levels, Rotation(n, largest_block(n), 0)))


def candidates(m: int, n: int, ratio: float, tokens: int) -> dict[str, Candidate]:
    packed = random_packed(m, n, ratio)
    compressed = {"8-bit": to_native(packed, 8), "FP16": to_native(packed, 16)}
    dense, inputs = torch.randn(m, n), torch.randn(tokens, n)
    half, half_inputs = dense.bfloat16(), inputs.bfloat16()
    runs: dict[str, Candidate] = {
        "torch float32": (lambda: functional.linear(inputs, dense), dense.nbytes),
        "torch bfloat16": (lambda: functional.linear(half_inputs, half), half.nbytes),
    }
    for name, weight in compressed.items():
        runs[f"slab {name}"] = (lambda weight=weight: kernels.linear(inputs, weight), weight.nbytes)
    for bits in SYMBOL_BITS:
        symbols = random_symbols(m, n, bits)
        runs[f"symbols {bits}-bit"] = (lambda weight=symbols: kernels.symbols_linear(inputs, weight), symbols.nbytes)
    return runs


def measure(runs: dict[str, Candidate], rounds: int) -> tuple[dict[str, list[float]], list[list[float]]]:
    """Seconds of every run in every round, and the bandwidths in bytes per second of two ways to read memory.

    Both ways are products of torch with one vector. Which of them keeps all threads busy depends on the processor.
    """
    readers = []
    for dtype in (torch.float32, torch.bfloat16):
        buffer = torch.ones(FLUSH_BYTES // (4096 * dtype.itemsize), 4096, dtype=dtype)
        readers.append((buffer, torch.ones(1, 4096, dtype=dtype)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    bandwidths: list[list[float]] = [[], []]
    for turn in range(rounds):
        for place, (name, (run, _bytes)) in enumerate(runs.items()):
            kind = (turn + place) % 2
            buffer, ones = readers[kind]
            start = time.perf_counter()
            functional.linear(ones, buffer)
            middle = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - middle)
            bandwidths[kind].append(buffer.nbytes / (middle - start))
    return seconds, bandwidths


def report(m: int, n: int, ratio: float, tokens: int, arguments: argparse.Namespace) -> None:
    runs = candidates(m, n, ratio, tokens)
    measure(runs, 2)
    seconds, bandwidths = measure(runs, arguments.rounds)
    typical = statistics.median if arguments.statistic == "median" else min
    bandwidth = max(max(values) if arguments.statistic == "min" else statistics.median(values) for values in bandwidths)
    print(f"\n{m}x{n}, {ratio:.0%}, {tokens} token(s); memory {bandwidth / 1e9:.1f} GB/s")
    print(f"  {'':<15} {'ms':>8} {'p10':>8} {'p90':>8} {'x fp32':>7} {'x bf16':>7} {'time/limit':>10}")
    times = {name: typical(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        low, high = (sorted(values)[int(share * (len(values) - 1))] for share in (0.1, 0.9))
        limit = runs[name][1] / bandwidth
        against = [times[f"torch {dtype}"] / times[name] for dtype in ("float32", "bfloat16")]
        print(
            f"  {name:<15} {times[name] * 1e3:8.3f} {low * 1e3:8.3f} {high * 1e3:8.3f} "
            f"{against[0]:7.2f} {against[1]:7.2f} "
            f"{times[name] / limit:10.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="MxN", help="instead of those of the three models")
    parser.add_argument("--sparsity", nargs="+", type=int, default=SPARSITIES, metavar="PERCENT")
    parser.add_argument("--tokens", nargs="+", type=int, default=(1, 512), help="1: matrix-vector")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--statistic", choices=("median", "min"), default="median")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    if arguments.shapes:
        shapes = [tuple(int(size) for size in shape.split("x")) for shape in arguments.shapes]
    else:
        shapes = [shape for group in SHAPES.values() for shape in group]
    print(f"{kernels.explain()}; {torch.get_num_threads()} threads")
    with torch.inference_mode():
        for m, n in shapes:
            for percent in arguments.sparsity:
                for tokens in arguments.tokens:
                    report(m, n, percent / 100, tokens, arguments)


if __name__ == "__main__":
    main()
