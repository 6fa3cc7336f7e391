"""How much longer SLaB takes than Wanda: ``slablm compress`` end to end, calibration included.

The two methods alternate within one run, so that a busy machine slows both; the ratio of medians counts.

    python benchmarks/compress_time.py --calibration ../shared/data/c4-sample.txt
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
    options = parser.parse_args()
    times: dict[str, list[float]] = {"wanda": [], "slab": []}
    for repeat in range(options.repeats):
        for method, seconds in times.items():
            seconds.append(compress_seconds(method, options))
        print(f"run {repeat + 1}: " + ", ".join(f"{name} {seconds[-1]:.1f} s" for name, seconds in times.items()))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"medians: wanda {medians['wanda']:.1f} s, slab {medians['slab']:.1f} s")
    print(f"slab / wanda = {medians['slab'] / medians['wanda']:.3f}")


if __name__ == "__main__":
    main()
