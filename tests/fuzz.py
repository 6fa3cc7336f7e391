"""Mutants of compressed folders: each is refused with one line, by `inspect` and by loading, or is the right model.

    python -m tests.fuzz --mutants 10000 --seed 1

A mutant is a small compressed folder in which one or two things are changed: a value, a key or a byte of config.json,
of the index or of a safetensors header; bytes of tensors; the size of a file; which file is which. Verdicts:

    refused       `inspect` and loading raise a SlabError of one line
    right         both accept it, and Ŵ of every layer and the logits are those of the original, bit for bit
    wrong         it loads, and something is another number
    crash         another exception, or a message of several lines; or the process dies or hangs
    disagree      one refuses what the other accepts

Everything but the first two is a defect. Mutants are numbered, and number and seed give the same mutant again. They are
tried in batches in processes of their own, so that one that kills its process is found and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from tests.mutants import Original, mutate

TOKENS = torch.arange(3, 20)[None]
BATCH, LONGEST_MUTANT = 250, 120
KINDS = {
    "slab": {},
    "bitmap": {"method": "wanda"},
    "symbols": {"method": "slab+", "bits_per_weight": 7.0},
    "sharded": {"ratio": 0.6},
    "tied": {"method": "slab+", "bits_per_weight": 8.0},
    "int8": {"head_bits": 8},
    "tied int8": {"method": "slab+", "bits_per_weight": 8.0, "head_bits": 8},
}
# Written by earlier versions.
OLD_KINDS = {"codes": "v5-signs-in-codes", "plane": "v5-signs-in-a-plane"}


def build_originals(place: Path, text: Path):
    """Compress a tiny model in all the ways that differ in the files."""
    from transformers import LlamaForCausalLM

    from slablm import CompressionConfig
    from slablm.api import compress_folder
    from slablm.compression.options import RunOptions
    from slablm.dense.loading import quiet_libraries
    from tests.conftest import byte_tokenizer, tiny_config

    quiet_libraries()
    for tied in (False, True):
        torch.manual_seed(0)
        config = tiny_config(hidden_size=32, intermediate_size=48, num_hidden_layers=1, tie_word_embeddings=tied)
        LlamaForCausalLM(config).save_pretrained(place / f"dense-{tied}")
        byte_tokenizer().save_pretrained(place / f"dense-{tied}")
    basic = {"method": "slab", "calibration": str(text), "num_samples": 4, "seq_len": 32, "iterations": 2}
    for kind, settings in KINDS.items():
        options = RunOptions(max_shard_size=20_000) if kind == "sharded" else RunOptions()
        source = str(place / f"dense-{'tied' in kind}")
        compress_folder(source, place / "kinds" / kind, CompressionConfig(**basic | settings), options)
    for kind, folder in OLD_KINDS.items():
        shutil.copytree(Path(__file__).parent / "checkpoint" / "old" / folder, place / "kinds" / kind)
        for file in (place / "dense-False").glob("tokenizer*"):
            shutil.copy(file, place / "kinds" / kind)
    return place / "kinds"


def read_originals(place: Path, copies: Path):
    """Copies to change, with what they are and give unchanged."""
    originals = []
    for kind in (*KINDS, *OLD_KINDS):
        shutil.copytree(place / kind, copies / kind)
        original = Original(copies / kind, {path.name: path.read_bytes() for path in (place / kind).iterdir()})
        outcome, numbers = load(original.folder)
        assert outcome == "accepted", outcome
        original.numbers = numbers
        originals.append(original)
    return originals


def attempt(action):
    """``accepted`` and what it gives, or ``refused`` or a crash, and by whom or what."""
    from slablm import SlabError

    try:
        return "accepted", action()
    except SlabError as error:
        if "\n" in str(error) or not str(error):
            return f"crash: several lines: {error}", None
        return "refused", "transformers" if error.__cause__ is not None and " cannot be loaded: " in str(
            error
        ) else "us"
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}", None


def load(folder):
    """Load a folder as a user would; its numbers."""
    from slablm import SlabLinear
    from slablm.dense.loading import load as load_model

    def numbers():
        torch.set_num_threads(1)  # sums are split over threads, and the same bits are wanted
        model, _ = load_model(str(folder))
        layers = {name: module for name, module in model.named_modules() if isinstance(module, SlabLinear)}
        with torch.no_grad():
            found = {name: layer.packed.dense() for name, layer in layers.items()}
            return found | {"logits": model(TOKENS).logits}

    return attempt(numbers)


def verdict(original):
    """What becomes of the folder as it is now."""
    from slablm.checkpoint.inspection import inspect_folder

    inspected, _ = attempt(lambda: inspect_folder(original.folder))
    loaded, found = load(original.folder)
    for outcome in (inspected, loaded):
        if outcome.startswith("crash"):
            return outcome
    if inspected != loaded:
        return f"disagree: inspect {inspected}, loading {loaded}"
    if loaded == "refused":
        return f"refused by {found}"
    if found.keys() != original.numbers.keys():
        return "wrong: other layers"
    different = [name for name, tensor in found.items() if not torch.equal(tensor, original.numbers[name])]
    return f"wrong: {different[0]}" if different else "right"


def try_mutants(originals, seed, numbers):
    """Yields number, what was changed and the verdict."""
    for number in numbers:
        original = originals[number % len(originals)]
        what = f"{original.folder.name}: {mutate(random.Random(f'{seed} {number}'), original)}"
        yield number, what, verdict(original)
        original.restore()


def work(place, seed, first, last, log):
    """A process of its own: tries mutants and logs each before and after."""
    from slablm.dense.loading import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory(dir=fast_folder()) as copies, log.open("a") as file:
        originals = read_originals(place, Path(copies))
        for number, what, result in try_mutants(originals, seed, range(first, last)):
            file.write(json.dumps([number, what, result]) + "\n")
            file.flush()


def fast_folder():
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def run_batch(place, seed, first, last, log):
    """Try mutants first … last − 1; one that kills the process is logged as a crash, and the rest is tried."""
    while first < last:
        command = [
            sys.executable,
            "-m",
            "tests.fuzz",
            "--worker",
            str(place),
            str(seed),
            str(first),
            str(last),
            str(log),
        ]
        before = len(read_log(log))
        try:
            done = subprocess.run(
                command, check=False, timeout=LONGEST_MUTANT + 10 * (last - first), stderr=subprocess.PIPE, text=True
            )
            reason = f"exit status {done.returncode} {done.stderr[-300:]}"
        except subprocess.TimeoutExpired:
            reason = "no end"
        first += len(read_log(log)) - before
        if first < last:
            with log.open("a") as file:
                file.write(json.dumps([first, "?", f"crash: {reason}"]) + "\n")
            first += 1


def read_log(log):
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=1000)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--log", type=Path, help="where every mutant and its verdict is written, one JSON list a line")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        place, seed, first, last, log = options.worker
        work(Path(place), seed, int(first), int(last), Path(log))
        return
    with tempfile.TemporaryDirectory(dir=fast_folder()) as folder:
        from slablm.calibration.text import load_text

        text = Path(folder) / "text"
        text.write_text(load_text("builtin", split="calibration")[:20_000], encoding="utf-8")
        place = build_originals(Path(folder), text)
        log = options.log or Path(folder) / "log"
        for first in range(0, options.mutants, BATCH):
            run_batch(place, options.seed, first, min(first + BATCH, options.mutants), log)
        results = read_log(log)
    counts = Counter(result.partition(":")[0] for _, _, result in results)
    for name, count in sorted(counts.items()):
        print(f"{count:6d}  {name}")
    bad = [entry for entry in results if entry[2].partition(" ")[0] not in {"right", "refused"}]
    for number, what, result in bad[:50]:
        print(f"{number}: {what}\n    {result}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
