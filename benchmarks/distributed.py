"""How much faster ``slablm compress`` is with several ranks: one thread per rank, against one process with one thread.

The numbers of ranks take turns, so that a busy machine slows all of them, and every result is compared with the first
one, byte by byte. "compress" is the time that the command reports (everything but starting Python, imports and the
meeting of the ranks), "command" the time of the whole command, torchrun's own start included. The speed-ups are ratios
of medians. A rank needs a core of its own: on a machine with fewer, or with other work, the figures mean nothing.

    python benchmarks/distributed.py                       # SmolLM2, 8 windows of 1024 tokens, 1 and 2 ranks
    python benchmarks/distributed.py --ranks 1 2 4 --num-samples 32 --seq-len 2048
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def dense_folder(model: str, folder: Path) -> Path:
    """The model as safetensors: out of a GGUF file every rank would have to unpack all of it first."""
    from slablm.dense import loading

    dense, tokenizer = loading.load(model)
    dense.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compress(source: Path, out: Path, ranks: int, options: argparse.Namespace) -> tuple[float, float]:
    """One compression; seconds as the command reports them, and of the whole command."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [*start, "slablm", "compress", str(source), str(out), "--calibration", options.calibration, "--json"]
    command += ["--num-samples", str(options.num_samples), "--seq-len", str(options.seq_len), "--method", "slab"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    begin = time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"]), seconds


def same_files(a: Path, b: Path) -> bool:
    """Whether two folders hold the same files, byte by byte."""
    names = sorted(path.name for path in a.iterdir())
    equal, _, _ = filecmp.cmpfiles(a, b, names, shallow=False)
    return sorted(equal) == names == sorted(path.name for path in b.iterdir())


def main() -> None:
    """Print one line per repetition, then the medians and speed-ups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="the first is what the others are held to")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    times: dict[int, list[tuple[float, float]]] = {ranks: [] for ranks in options.ranks}
    with tempfile.TemporaryDirectory() as temporary:
        source, first, same = dense_folder(options.model, Path(temporary, "dense")), Path(temporary, "first"), True
        for repeat in range(options.repeats):
            for ranks, seconds in times.items():
                out = Path(temporary, f"{ranks}-{repeat}") if first.exists() else first
                seconds.append(compress(source, out, ranks, options))
                same &= same_files(out, first)
            shown = ", ".join(f"{ranks} ranks {seconds[-1][0]:.1f} s" for ranks, seconds in times.items())
            print(f"run {repeat + 1}: {shown}", flush=True)
    medians = {ranks: tuple(map(statistics.median, zip(*seconds, strict=True))) for ranks, seconds in times.items()}
    alone = medians[options.ranks[0]]
    print(f"{'ranks':>5} {'compress':>10} {'speed-up':>9} {'command':>10} {'speed-up':>9}")
    for ranks, (inside, whole) in medians.items():
        print(f"{ranks:>5} {inside:>8.1f} s {alone[0] / inside:>9.2f} {whole:>8.1f} s {alone[1] / whole:>9.2f}")
    print("all results are the same, byte by byte" if same else "the results DIFFER")


if __name__ == "__main__":
    main()
