"""Mutations of compressed folders: values, keys and bytes of JSON, headers and tensors, sizes and names of files."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path

import torch

VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 4, 5, 16, 1.5, 3.0, 1e308, math.inf, -math.inf, math.nan, 10**12, 2**63, 10**40,
    "", "x", "slab", "4", "0" * 16, "../x", "/dev/null", "a\0b", "\ud800", [], {}, [1], ["x"], {"x": 1}, [[["x"]]],
]  # fmt: skip
NAMES = [
    "x", "", "load_in_8bit", "load_in_4bit", "auto_map", "_name_or_path", "transformers_weights", "torch_dtype",
    "dtype", "transformers_version", "quantization_config", "modules", "architectures", "kept", "group_size", "model",
    "value_bits", "unseen_error", "rope_scaling", "text_config", "num_labels", "__metadata__", "tied", "digests",
    "attn_implementation", "_attn_implementation", "use_cache", "pad_token_id", "base_model_tp_plan", "model_type",
    "symbol_bits", "in_features", "rotation", "seed", "int8_rows",
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
