"""Mutants of compressed folders: each is refused with one line, by `inspect` and by loading, or is the right model.

    python -m tests.fuzz --mutants 10000 --seed 1 --workers 1

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
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

TOKENS = torch.arange(3, 20)[None]
BATCH, LONGEST_MUTANT = 250, 120
KINDS = {
    "slab": {},
    "bitmap": {"method": "wanda"},
    "codes": {"method": "slab+", "magnitude_bits": 3, "ratio": 0.8, "group_size": 10},
    "plane": {"method": "slab+", "magnitude_bits": 3, "ratio": 0.5, "group_size": 10},
    "sharded": {"ratio": 0.6},
    "tied": {"method": "slab+", "magnitude_bits": 4, "ratio": 0.7, "group_size": 10},
}
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 4, 5, 16, 1.5, 3.0, 1e308, math.inf, -math.inf, math.nan, 10**12, 2**63, 10**40,
    "", "x", "slab", "4", "0" * 16, "../x", "/dev/null", "a\0b", "\ud800", [], {}, [1], ["x"], {"x": 1}, [[["x"]]],
]  # fmt: skip
NAMES = [
    "x", "", "load_in_8bit", "load_in_4bit", "auto_map", "_name_or_path", "transformers_weights", "torch_dtype",
    "dtype", "transformers_version", "quantization_config", "modules", "architectures", "kept", "group_size", "model",
    "value_bits", "unseen_error", "rope_scaling", "text_config", "num_labels", "__metadata__", "tied", "digests",
    "attn_implementation", "_attn_implementation", "use_cache", "pad_token_id", "base_model_tp_plan", "model_type",
]  # fmt: skip
FILES = ["../x", "/dev/null", "model.safetensors", "config.json", "sub/x", "..", "", "a\0b", "x" * 300, 3, None, "x"]


@dataclass
class Original:
    """A compressed folder, what it is in memory, and the numbers of its model."""

    folder: Path
    files: dict[str, bytes] = field(default_factory=dict)
    numbers: dict[str, torch.Tensor] = field(default_factory=dict)

    def restore(self):
        """Undo what a mutation has done."""
        for path in self.folder.iterdir():
            if path.name not in self.files:
                path.unlink()
        for name, content in self.files.items():
            path = self.folder / name
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)


# --- originals ------------------------------------------------------------------------------------------------------


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
        source = str(place / f"dense-{kind == 'tied'}")
        compress_folder(source, place / "kinds" / kind, CompressionConfig(**basic | settings), options)
    return place / "kinds"


def read_originals(place: Path, copies: Path):
    """Copies to change, with what they are and give unchanged."""
    originals = []
    for kind in KINDS:
        shutil.copytree(place / kind, copies / kind)
        original = Original(copies / kind, {path.name: path.read_bytes() for path in (place / kind).iterdir()})
        outcome, numbers = load(original.folder)
        assert outcome == "accepted", outcome
        original.numbers = numbers
        originals.append(original)
    return originals


# --- mutations ------------------------------------------------------------------------------------------------------


def paths_in(data, path=()):
    """Where values are in JSON data."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths_in(value, (*path, key))


def at(data, path):
    for key in path:
        data = data[key]
    return data


def mutate_json(rng, data, values=VALUES):
    """Change one thing in JSON data, in place; says what."""
    paths = list(paths_in(data))
    if not paths:
        return "nothing"
    # Layers and digests are many: first choose how deep, so that the few entries at the top have their share.
    depth = rng.choice(sorted({len(path) for path in paths}))
    path = rng.choice([path for path in paths if len(path) == depth])
    parent, key = at(data, path[:-1]), path[-1]
    what = rng.choice(["value", "value", "near", "near", "delete", "add", "rename", "swap", "wrap"])
    old = parent[key]
    if what == "near" and isinstance(old, bool):
        parent[key] = not old
    elif what == "near" and isinstance(old, int | float):
        parent[key] = rng.choice(
            [old + 1, old - 1, old * 2, old // 2, -old, float(old), str(old), old + 0.5, old * 1.01]
        )
    elif what == "near" and isinstance(old, str) and old:
        place = rng.randrange(len(old))
        parent[key] = old[:place] + rng.choice(["", "x", "0", "1", "."]) + old[place + 1 :]
    elif what == "delete":
        del parent[key]
    elif what == "add" and isinstance(parent, dict):
        parent[rng.choice(NAMES)] = rng.choice([*values, old])
    elif what == "rename" and isinstance(parent, dict):
        parent[rng.choice(NAMES)] = parent.pop(key)
    elif what == "swap":
        other = rng.choice(paths)
        if (
            isinstance(at(data, other[:-1]), type(parent))
            and other[: len(path)] != path
            and path[: len(other)] != other
        ):
            parent[key], at(data, other[:-1])[other[-1]] = at(data, other), old
    elif what == "wrap":
        parent[key] = rng.choice([[old], {"x": old}, str(old)])
    else:
        parent[key] = rng.choice(values)
    return f"{what} of {'/'.join(map(str, path))}"


def mutate_text(rng, content):
    """Change bytes as a disk or a transfer would."""
    what = rng.choice(["flip", "flip", "cut", "insert", "extend", "empty", "nest", "zero", "double"])
    content = bytearray(content)
    place = rng.randrange(len(content)) if content else 0
    if what == "flip" and content:
        content[place] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del content[place:]
    elif what == "insert":
        content[place:place] = rng.randbytes(rng.randint(1, 20))
    elif what == "extend":
        content += rng.choice([b"\0", b"x", rng.randbytes(rng.randint(1, 3000)), bytes(4096)])
    elif what == "empty":
        content.clear()
    elif what == "nest":
        content = bytearray(b"[" * 100_000)
    elif what == "zero":
        length = rng.randint(1, 200)
        content[place : place + length] = bytes(len(content[place : place + length]))
    else:
        content += bytes(content)
    return bytes(content), f"{what} at {place}"


def mutate_config(rng, original):
    path = original.folder / "config.json"
    if rng.random() < 0.1:
        content, what = mutate_text(rng, path.read_bytes())
        path.write_bytes(content)
        return f"config.json: {what}"
    config = json.loads(path.read_bytes())
    part = config["quantization_config"] if rng.random() < 0.5 else config
    what = mutate_json(rng, part)
    path.write_text(json.dumps(config))
    return f"config.json: {what}"


def mutate_index(rng, original):
    path = original.folder / "model.safetensors.index.json"
    if not path.exists():
        return mutate_config(rng, original)
    if rng.random() < 0.1:
        content, what = mutate_text(rng, path.read_bytes())
        path.write_bytes(content)
        return f"index: {what}"
    index = json.loads(path.read_bytes())
    shards = [item.name for item in original.folder.glob("model-*.safetensors")]
    what = mutate_json(rng, index, [*VALUES, *FILES, *shards])
    path.write_text(json.dumps(index))
    return f"index: {what}"


def weights(rng, original):
    return rng.choice(sorted(original.folder.glob("*.safetensors")))


def split(content):
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header, data):
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutate_header(rng, original):
    path = weights(rng, original)
    content = path.read_bytes()
    header, data = split(content)
    what = rng.choice(["json", "json", "record", "record", "record", "exchange", "length", "text", "twice"])
    names = sorted(header.keys() - {"__metadata__"})
    if what == "json":
        what = mutate_json(rng, header)
    elif what == "record":
        record = json.loads(header["__metadata__"]["slablm"])
        what = f"record, {mutate_json(rng, record)}"
        header["__metadata__"]["slablm"] = json.dumps(record)
    elif what == "exchange":  # two tensors trade places, types or shapes
        one, other = rng.choice(names), rng.choice(names)
        key = rng.choice(["data_offsets", "dtype", "shape", None])
        if key is None:
            header[one], header[other] = header[other], header[one]
        else:
            header[one][key], header[other][key] = header[other][key], header[one][key]
        what = f"{key} of {one} and {other}"
    elif what == "length":
        length = rng.choice([0, 1, 7, len(content), 2**31, 2**63, 2**64 - 1, rng.randrange(len(content))])
        path.write_bytes(struct.pack("<Q", length) + content[8:])
        return f"{path.name}: header length {length}"
    elif what == "text":
        place = rng.randrange(8 + len(content) - 8 - len(data))
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
        return f"{path.name}: flip at {place} of the header"
    else:
        name = rng.choice(names)
        text = json.dumps(header, separators=(",", ":"))[:-1] + f",{json.dumps(name)}:{json.dumps(header[name])}}}"
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data)
        return f"{path.name}: {name} twice"
    path.write_bytes(joined(header, data))
    return f"{path.name}: {what}"


def mutate_bytes(rng, original):
    path = weights(rng, original)
    content = bytearray(path.read_bytes())
    header, data = split(bytes(content))
    start = len(content) - len(data)
    name = rng.choice(sorted(header.keys() - {"__metadata__"}))
    first, last = (start + place for place in header[name]["data_offsets"])
    what = rng.choice(["flip", "zero", "full", "noise", "shift"])
    if what == "flip":
        content[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    else:
        place = rng.randrange(first, last)
        end = min(last, place + rng.randint(1, 64))
        length = end - place
        new = {"zero": bytes(length), "full": b"\xff" * length, "noise": rng.randbytes(length)}
        content[place:end] = new.get(what, bytes(content[place + 1 : end]) + content[place : place + 1])
    path.write_bytes(bytes(content))
    return f"{path.name}: {what} in {name}"


def mutate_files(rng, original):
    path = weights(rng, original)
    what = rng.choice(["cut", "extend", "delete", "copy", "folder", "text"])
    content = path.read_bytes()
    if what == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif what == "extend":
        path.write_bytes(content + rng.choice([b"\0", bytes(8), rng.randbytes(100)]))
    elif what == "delete":
        path.unlink()
    elif what == "copy":  # a shard under the name of another one, or under a new one
        names = [item.name for item in original.folder.glob("*.safetensors")]
        target = rng.choice([*names, "model.safetensors", "model-00001-of-00001.safetensors"])
        (original.folder / target).write_bytes(content)
        what = f"copy to {target}"
    elif what == "folder":
        other = rng.choice(["adapter_model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
        (original.folder / other).write_bytes(rng.choice([b"", b"{}", content[:100]]))
        what = f"{other} beside it"
    elif what == "text":
        content, how = mutate_text(rng, content)
        path.write_bytes(content)
        what = f"text, {how}"
    return f"{path.name}: {what}"


MUTATIONS = {
    mutate_config: 6, mutate_header: 6, mutate_bytes: 3, mutate_files: 2, mutate_index: 3,
}  # fmt: skip


# What a first mutation can leave: no JSON, no file, no header, no such entry.
_NO_PLACE = (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError, OverflowError, struct.error)


def mutate(rng, original):
    """One or two mutations of a folder; says which."""
    count = 1 if rng.random() < 0.8 else 2
    done = []
    for _ in range(count):
        mutation = rng.choices(list(MUTATIONS), list(MUTATIONS.values()))[0]
        try:
            done.append(mutation(rng, original))
        except _NO_PLACE:
            done.append("a second one that the first one left no place for")
    return " and ".join(done)


# --- verdicts -------------------------------------------------------------------------------------------------------


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


# --- the script -----------------------------------------------------------------------------------------------------


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
