"""How much longer methods take than Wanda: ``slablm compress`` end to end, calibration included.

The methods take turns within one run, so that a busy machine slows all; the ratio of medians counts.

    python benchmarks/compress_time.py --calibration ../shared/data/c4-sample.txt --methods slab,slab+
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def compress_seconds(method: str, options: argparse.Namespace) -> float:
    """Wall time in seconds of one compression in a process of its own, as the command reports it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "slablm", "compress", options.model, str(Path(folder) / "out")]
        command += ["--method", method, "--calibration", options.calibration, "--json"]
        command += ["--num-samples", str(options.num_samples), "--seq-len", str(options.seq_len)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["seconds"])


def main() -> None:
    """Print one line per repetition and the ratio of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", default="slab,slab+", help="those that are compared, separated by commas")
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in ("wanda", *options.methods.split(","))}
    for repeat in range(options.repeats):
        for method, seconds in times.items():
            seconds.append(compress_seconds(method, options))
        shown = ", ".join(f"{name} {seconds[-1]:.1f} s" for name, seconds in times.items())
        print(f"run {repeat + 1}: {shown}", flush=True)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, median in medians.items():
        print(f"{name}: {median:.1f} s, {median / medians['wanda']:.3f} of Wanda")


if __name__ == "__main__":
    main()
