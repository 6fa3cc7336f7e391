"""Checks and times everything that slablm does on a CUDA machine, as tables and one JSON file.

    python benchmarks/gpu.py --all --out DIR                             # all of it, some minutes
    python benchmarks/gpu.py --shapes 4096x14336 --sparsity 50 --tokens 1
    python benchmarks/gpu.py --sweep                                     # shapes of the kernel for symbols

In order: every kernel is compiled and compared with the reference (the command stops at the first that differs, so
there are no times of wrong results), with --all also under compute-sanitizer where it is installed; layers of
Llama-3-8B against cuBLAS; one block's layers, decoding inside a CUDA graph; the decomposition of every layer; and with
--all a whole model (`gpu_model.py`).

How it is timed: see `gpu_timing.py`. Bytes are those of the weight's tensors, inputs and outputs; the yardstick for
bytes per second is a device-to-device copy, counted as bytes read plus bytes written, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_model import model_table
from gpu_timing import COPY_BYTES, Run, cold_copies, copy_calls, device_line, microseconds
from kernels import random_packed, random_symbols
from torch import Tensor, nn
from torch.nn import functional

import slablm.compression.gpu_sweep  # noqa: F401  (registers the kernel of the sweeps)
from slablm import CompressionConfig
from slablm.methods import LayerStats, get_method
from slablm.packing import PackedWeight
from slablm.packing.symbols import PackedSymbols
from slablm.runtime import kernels
from slablm.runtime.kernels import gpu_symbols, reference, to_gpu
from slablm.runtime.linear import SlabLinear

DEVICE = torch.device("cuda")
# (rows, columns) and how many of them a block has.
LLAMA_3_8B = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
BLOCKS = 32
CHECKED = ((96, 777), (1024, 4096), (4096, 14336))
# Kernels are compiled for types and numbers of tokens: of all, those that people use.
CHECKED_TOKENS = {torch.float32: (1, 65), torch.bfloat16: (1, 3, 4, 8, 16, 64, 65, 200), torch.float16: (1, 65)}
DTYPES = {"BF16": torch.bfloat16, "FP16": torch.float16}
# Largest relative errors; of symbols, inputs are rounded to 16 bits.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SYMBOL_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SYMBOL_BITS = (2, 3, 4, 5, 6)
SANITIZER_SECONDS = 60
HEAD = (128256, 4096)  # of Llama-3-8B

Row = dict[str, Any]


def packed_on_gpu(m: int, n: int, ratio: float, dtype: torch.dtype = torch.bfloat16) -> PackedWeight:
    packed = random_packed(m, n, ratio)
    planes = {name: getattr(packed, name).to(DEVICE, dtype) for name in ("values", "left", "right")}
    return replace(packed, plane=packed.plane.to(DEVICE), **planes)


def symbols_on_gpu(m: int, n: int, bits: int) -> PackedSymbols:
    packed = random_symbols(m, n, bits)
    return replace(packed, **{name: part.to(DEVICE) for name, part in packed.parts().items()})


def int8_on_gpu(m: int, n: int) -> tuple[Tensor, Tensor]:
    rows = torch.randint(-127, 128, (m, n), dtype=torch.int8, device=DEVICE)
    return rows, torch.rand(m, device=DEVICE).half()


def dense_calls(m: int, n: int, tokens: int, dtype: torch.dtype) -> list[Run]:
    inputs = torch.randn(tokens, n, device=DEVICE, dtype=dtype)
    weights = cold_copies(torch.randn(m, n, device=DEVICE, dtype=dtype))
    return [lambda w=w: functional.linear(inputs, w) for w in weights]


def slab_calls(weight: Any, tokens: int) -> list[Run]:
    inputs = torch.randn(tokens, weight.in_features, device=DEVICE, dtype=torch.bfloat16)
    if isinstance(weight, PackedSymbols):
        return [lambda w=w: kernels.symbols_linear(inputs, w) for w in cold_copies(weight)]
    return [lambda w=w: kernels.linear(inputs, w) for w in cold_copies(weight)]


def check(shapes: tuple[tuple[int, int], ...]) -> Row:
    """Compare the kernels with the reference; stop where they differ."""
    worst: Row = {}
    for m, n in shapes:
        for bits in (16, 8):
            weight = to_gpu(packed_on_gpu(m, n, 0.5), bits)
            run = lambda inputs, weight=weight: kernels.linear(inputs, weight)  # noqa: E731
            compare(f"{m}x{n}, {bits}-bit values", run, reference.unpack(weight), BOUNDS, worst)
        for bits in SYMBOL_BITS:
            symbols = symbols_on_gpu(m, n, bits)
            if not torch.equal(gpu_symbols.unpack(symbols, 0, m, torch.float32), symbols.unpack().rotated_dense()):
                sys.exit(f"wrong result: unpacking {m}x{n}, {bits}-bit symbols")
            run = lambda inputs, symbols=symbols: kernels.symbols_linear(inputs, symbols)  # noqa: E731
            compare(f"{m}x{n}, {bits}-bit symbols", run, symbols.dense(), SYMBOL_BOUNDS, worst)
        rows, scales = int8_on_gpu(m, n)
        run = lambda inputs, rows=rows, scales=scales: kernels.dense_linear(inputs, rows, scales)  # noqa: E731
        compare(f"{m}x{n}, int8 rows", run, rows.double() * scales.double()[:, None], SYMBOL_BOUNDS, worst)
    layer = SlabLinear.from_packed(packed_on_gpu(1024, 4096, 0.5))
    layer.use_native()
    inputs = torch.randn(1, 4096, device=DEVICE, dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)(inputs)
    if not torch.allclose(compiled, layer(inputs), rtol=1e-2, atol=1e-2):
        sys.exit("wrong result: torch.compile changes what SlabLinear gives")
    print("checked against the reference; worst relative errors: " + str({k: f"{v:.1e}" for k, v in worst.items()}))
    return worst


def compare(what: str, run: Any, dense: Tensor, bounds: dict[torch.dtype, float], worst: Row) -> None:
    """Relative errors of `run` against a dense weight, for numbers of tokens and types; the worst are kept."""
    dense = dense.double()
    for dtype, tokens in ((dtype, tokens) for dtype, counts in CHECKED_TOKENS.items() for tokens in counts):
        bound = bounds[dtype]
        inputs = torch.randn(tokens, dense.shape[1], device=DEVICE, dtype=dtype)
        truth = inputs.double() @ dense.T
        error = ((run(inputs).double() - truth).norm() / truth.norm()).item()
        if not error <= bound:
            sys.exit(f"wrong result: {what}, {tokens} token(s), {dtype}: relative error {error:.2g} above {bound:g}")
        key = f"{what.rsplit(maxsplit=1)[-1]}, {dtype}"
        worst[key] = max(worst.get(key, 0.0), error)


def sanitize() -> str:
    """Memory and races of the kernels on one small shape, by compute-sanitizer."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "not installed"
    told = {}
    for check_name in ("memcheck", "racecheck"):
        command = [tool, "--tool", check_name, "--error-exitcode", "9", sys.executable, __file__, "--small"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SANITIZER_SECONDS)
        except subprocess.TimeoutExpired:
            told[check_name] = f"not done within {SANITIZER_SECONDS} s"
            continue
        told[check_name] = "clean" if done.returncode == 0 else (done.stdout + done.stderr)[-400:]
    print(f"compute-sanitizer: {told}")
    return str(told)


def layer_table(shapes: list[tuple[int, int]], options: argparse.Namespace) -> list[Row]:
    head = f"{'shape':<13}{'weight':<16}{'tokens':>6}{'us':>9}{'GB/s':>8}{'of copy':>9}"
    print("\nlayers; x BF16, x FP16: how many times as fast as cuBLAS")
    print(f"{head}{'x BF16':>8}{'x FP16':>8}")
    rows = []
    for m, n in shapes:
        weights: dict[str, Any] = {f"symbols {bits} bit": symbols_on_gpu(m, n, bits) for bits in SYMBOL_BITS}
        for percent in options.sparsity:
            packed = packed_on_gpu(m, n, percent / 100)
            weights |= {f"slab {percent}% {bits} bit": to_gpu(packed, bits) for bits in (16, 8)}
        for tokens in options.tokens:
            runs = {name: slab_calls(weight, tokens) for name, weight in weights.items()}
            runs |= {name: dense_calls(m, n, tokens, dtype) for name, dtype in DTYPES.items()}
            times = microseconds(runs | {"copy": copy_calls()}, options.rounds)
            sizes = {name: weight.nbytes for name, weight in weights.items()} | dict.fromkeys(DTYPES, 2 * m * n)
            for name, nbytes in sizes.items():
                speed = (nbytes + 2 * tokens * (m + n)) / times[name] / 1e3
                copy = 2 * COPY_BYTES / times["copy"] / 1e3
                row = {
                    "shape": f"{m}x{n}",
                    "weight": name,
                    "tokens": tokens,
                    "us": times[name],
                    "GB/s": speed,
                    "of copy": speed / copy,
                    "x BF16": times["BF16"] / times[name],
                    "x FP16": times["FP16"] / times[name],
                }
                rows.append(row)
                print(
                    f"{row['shape']:<13}{name:<16}{tokens:>6}{times[name]:>9.1f}{speed:>8.0f}{speed / copy:>9.2f}"
                    f"{row['x BF16']:>8.2f}{row['x FP16']:>8.2f}",
                    flush=True,
                )
    return rows


def head_table(options: argparse.Namespace) -> Row:
    """A head in int8 rows beside one in bfloat16."""
    rows, scales = int8_on_gpu(*HEAD)
    found: Row = {}
    for tokens in (1, 4, 8):
        inputs = torch.randn(tokens, HEAD[1], device=DEVICE, dtype=torch.bfloat16)
        runs = {"BF16": dense_calls(*HEAD, tokens, torch.bfloat16)}
        runs["int8 rows"] = [lambda inputs=inputs: kernels.dense_linear(inputs, rows, scales)]
        found[f"{tokens} tokens"] = times = microseconds(runs, options.rounds)
        print(
            f"head {HEAD[0]}x{HEAD[1]}, {tokens} token(s): {times['int8 rows']:.1f} us, x BF16 "
            f"{times['BF16'] / times['int8 rows']:.2f}"
        )
    return found


def block_table(options: argparse.Namespace) -> Row:
    """One token through all linear layers of a block, in one CUDA graph."""
    inputs = {n: torch.randn(1, n, device=DEVICE, dtype=torch.bfloat16) for n in (4096, 14336)}
    shapes = [shape for shape, count in LLAMA_3_8B.items() for _ in range(count)]
    runs: dict[str, list[Run]] = {}
    dense = [nn.Linear(n, m, bias=False, device=DEVICE, dtype=torch.bfloat16) for m, n in shapes]
    runs["dense BF16"] = [lambda: [layer(inputs[layer.in_features]) for layer in dense]]
    makers = {f"symbols {bits} bit": lambda m, n, bits=bits: symbols_on_gpu(m, n, bits) for bits in SYMBOL_BITS}
    for name, maker in {**makers, "slab 50% 16 bit": lambda m, n: packed_on_gpu(m, n, 0.5)}.items():
        layers = [SlabLinear.from_packed(maker(m, n)) for m, n in shapes]
        for layer in layers:
            layer.use_native()
        runs[name] = [lambda layers=layers: [layer(inputs[layer.in_features]) for layer in layers]]
    times = microseconds(runs, options.rounds)
    print("\nSlabLinear, the linear layers of a Llama-3-8B block, one token, one CUDA graph")
    for name, value in times.items():
        print(f"{name:<16}{value:>9.1f} us   x dense {times['dense BF16'] / value:.2f}")
    return times


def decomposition_table(shapes: list[tuple[int, int]]) -> Row:
    print("\ndecomposition; slab: 50 %, 20 iterations; slab+: 4.2 bits")
    seconds: Row = {}
    for method, config in (("slab", CompressionConfig("slab")), ("slab+", CompressionConfig(bits_per_weight=4.2))):
        total = 0.0
        for m, n in shapes:
            weight = torch.randn(m, n, device=DEVICE, dtype=torch.bfloat16)
            stats = layer_stats(n)
            get_method(method).function(weight, stats, config)  # once for cuBLAS, the compiler and the allocator
            torch.cuda.synchronize()
            begin = time.perf_counter()
            if method == "slab":  # whose launches never wait
                torch.cuda.set_sync_debug_mode("error")
            get_method(method).function(weight, stats, config)
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            seconds[f"{method} {m}x{n}"] = time.perf_counter() - begin
            total += BLOCKS * LLAMA_3_8B.get((m, n), 0) * seconds[f"{method} {m}x{n}"]
            print(f"{method:<6}{f'{m}x{n}':<13}{seconds[f'{method} {m}x{n}']:>9.3f} s", flush=True)
        if set(shapes) == set(LLAMA_3_8B):
            seconds[f"{method} Llama-3-8B"] = total
            print(f"{method}: all layers of Llama-3-8B {total:.1f} s")
    return seconds


def layer_stats(n: int) -> LayerStats:
    """Statistics of random inputs."""
    grams = [inputs.T @ inputs for inputs in torch.randn(2, 2 * n, n, device=DEVICE)]
    norms = grams[0].diagonal().sqrt()
    return LayerStats(norms, 2 * n, torch.empty(0, n, device=DEVICE), *grams)


def sweep(shapes: list[tuple[int, int]], rounds: int) -> None:
    """Times of 4-bit symbols with other shapes of the kernel than those of `gpu_symbols`."""
    choices = list(itertools.product((4, 8, 12, 16), (2, 3, 4), (1, 2, 4)))
    chosen = gpu_symbols._shape
    for (m, n), tokens in itertools.product(shapes, (1, 4, 8, 16)):
        weight = symbols_on_gpu(m, n, 4)
        times = {}
        for numbers in choices:
            shape = gpu_symbols.Shape(tokens, *numbers)
            gpu_symbols._shape = lambda *_, shape=shape: shape
            if shape.shared(weight.spec.bits) <= gpu_symbols._shared_room(weight.device):
                times[numbers] = microseconds({"": slab_calls(weight, tokens)}, rounds)[""]
        best = sorted(times.items(), key=lambda item: item[1])[:8]
        print(f"{m}x{n}, {tokens} token(s): " + ", ".join(f"{key} {time:.1f} us" for key, time in best), flush=True)
        gpu_symbols._shape = chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="also compute-sanitizer and a whole model")
    parser.add_argument("--out", type=Path, help="folder for gpu.json")
    parser.add_argument("--shapes", nargs="+", metavar="MxN", help="instead of those of Llama-3-8B")
    parser.add_argument("--sparsity", nargs="+", type=int, default=(50,), metavar="PERCENT")
    parser.add_argument("--tokens", nargs="+", type=int, default=(1, 4, 8, 16, 64, 512))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calibration", default="builtin", help="text of the whole model's compression")
    parser.add_argument("--sweep", action="store_true", help="only time other shapes of the kernel for symbols")
    parser.add_argument("--small", action="store_true", help="only check a small shape")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA machine, and torch sees no GPU here: nothing was measured")
    chosen = {"rows": kernels.explain("cuda"), "symbols": kernels.explain_symbols("cuda")}
    for what, told in chosen.items():
        if told.startswith(kernels.REFERENCE):
            sys.exit(f"benchmarks/gpu.py needs the kernels for {what} ({told}): nothing was measured")
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes] if options.shapes else list(LLAMA_3_8B)
    result: Row = {**device_line(), "command": "python " + " ".join(sys.argv), "kernels": chosen}
    print("\n".join(f"{name}: {value}" for name, value in result.items()))
    torch.manual_seed(0)
    with torch.inference_mode():
        if options.small:
            check(CHECKED[:1])
            return
        if options.sweep:
            sweep(shapes, options.rounds)
            return
        parts = {
            "errors": lambda: check(CHECKED),
            "layers": lambda: layer_table(shapes, options),
            "head_us": lambda: head_table(options),
            "block_us": lambda: block_table(options),
            "decomposition_seconds": lambda: decomposition_table(shapes),
        }
        if options.all:
            parts["model"] = lambda: outside_inference_mode(options)
            parts["compute-sanitizer"] = sanitize
        for name, part in parts.items():
            result[name] = part()
            result["clocks_after"] = device_line()["nvidia-smi"]
            keep(result, options.out)


def outside_inference_mode(options: argparse.Namespace) -> Row:
    """The whole model; compressing it is what the command does, and that knows no inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return model_table(options.rounds, options.calibration)


def keep(result: Row, out: Path | None) -> None:
    """What is known so far: a device may be taken away."""
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
