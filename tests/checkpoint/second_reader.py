"""A second reader of slablm folders, made from FORMAT.md alone: json, struct, hashlib and numpy, nothing of slablm.

reader = Reader(folder)       # checks the versions, names, shapes, the digests of all tensors and of config.json
reader.dense("model.layers.0.mlp.up_proj")      # Ŵ, float32
"""

import hashlib
import json
import struct

import numpy as np

NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I8": "i1", "F64": "<f8", "I64": "<i8"}
NAMES = {
    "F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16", "U8": "torch.uint8",
    "I8": "torch.int8", "F64": "torch.float64", "I64": "torch.int64",
}  # fmt: skip
ERRORS = ("output_error", "unseen_error")


def blake(data):
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def canonical(data):
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def read_file(path):
    """Header's metadata, and name → (type, shape, bytes)."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        tensors[name] = (entry["dtype"], entry["shape"], data[8 + length + first : 8 + length + last])
    return metadata, tensors


def floats(dtype, raw):
    """16-bit or 32-bit numbers as float32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, NUMPY[dtype]).astype(np.float32)


def bits_of(plane, n):
    """[m, ⌈n/8⌉] bytes → [m, n] bool, the lowest bit first."""
    return np.unpackbits(plane, axis=1, bitorder="little")[:, :n].astype(bool)


class Reader:
    def __init__(self, folder):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.entries = config["quantization_config"]
        assert self.entries["quant_method"] == "slab"
        self.int8_rows, self.experts = (self.entries.get(key, []) for key in ("int8_rows", "experts"))
        self.modules, self.value_dtype = self.entries["modules"], self.entries["value_dtype"]
        six_bits = any(entry.get("symbol_bits") == 6 for entry in self.modules.values())
        assert self.entries["format_version"] == (10 if six_bits else 9 if self.experts else 8)
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        weight_map = None if single.exists() else json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = ["model.safetensors"] if weight_map is None else sorted(set(weight_map.values()))
        self.tensors, records = {}, []
        for name in names:
            metadata, tensors = read_file(folder / name)
            records.append(metadata["slablm"])
            assert weight_map is None or {key for key, file in weight_map.items() if file == name} == tensors.keys()
            assert self.tensors.keys().isdisjoint(tensors)
            self.tensors |= tensors
        assert len(set(records)) == 1
        self.record = json.loads(records[0])
        self.verify(config)

    def verify(self, config):
        record = self.record
        assert record.keys() == {"format_version", "digests", "tied", "modules", "config"}
        assert record["format_version"] == self.entries["format_version"]
        for name, (dtype, shape, raw) in self.tensors.items():
            assert (
                blake(f"{NAMES[dtype]}[{', '.join(map(str, shape))}]".encode("ascii") + raw) == record["digests"][name]
            )
        stored = set(self.tensors)
        for group in record["tied"]:
            assert len(stored & set(group)) == 1
            stored |= set(group)
        assert stored == record["digests"].keys()
        modules = {name: {k: v for k, v in entry.items() if k not in ERRORS} for name, entry in self.modules.items()}
        decoding = {"modules": modules, "value_dtype": self.value_dtype}
        decoding |= {"int8_rows": self.int8_rows} if self.int8_rows else {}
        decoding |= {"experts": self.experts} if self.experts else {}
        assert blake(canonical(decoding)) == record["modules"]
        for key in ("_name_or_path", "transformers_version", "transformers_weights"):
            config.pop(key, None)
        assert blake(canonical(config)) == record["config"]

    def stored(self, name):
        """The name under which a tensor is in the files: its own, or that of one it is tied to."""
        names = [name, *(other for group in self.record["tied"] if name in group for other in group)]
        return next(other for other in names if other in self.tensors)

    def projection(self, experts, number, name):
        """W of one layer of an expert, packed or not."""
        assert experts in self.experts
        layer = f"{experts}.{number}.{name}"
        return self.dense(layer) if layer in self.modules else self.numbers(f"{layer}.weight")

    def from_int8(self, name):
        """An embedding or a head in int8 rows."""
        dtype, shape, raw = self.tensors[self.stored(f"{name}.weight")]
        scales = self.numbers(self.stored(f"{name}.scales"))
        assert dtype == "I8"
        return np.frombuffer(raw, "i1").reshape(shape).astype(np.float32) * scales[:, None]

    def numbers(self, name):
        dtype, shape, raw = self.tensors[name]
        return floats(dtype, raw).reshape(shape)

    def bytes_of(self, name):
        dtype, shape, raw = self.tensors[name]
        assert dtype == "U8"
        return np.frombuffer(raw, np.uint8).reshape(shape)

    def dense(self, layer):
        return self.from_symbols(layer) if "symbol_bits" in self.modules[layer] else self.from_kept(layer)

    def from_kept(self, layer):
        entry = self.modules[layer]
        left, right = self.numbers(f"{layer}.left"), self.numbers(f"{layer}.right")
        (m, r), (_, n) = left.shape, right.shape
        assert r == entry["rank"]
        low_rank = np.zeros((m, n), np.float32)
        for q in range(r):
            product = left[:, q, None] * right[None, q]
            low_rank = product if q == 0 else low_rank + product
        kept, negative = self.planes(layer, n)
        assert (kept.sum(axis=1) == entry["kept"]).all()
        weight = np.where(negative, -low_rank, low_rank)
        weight[kept] = self.numbers(f"{layer}.values").reshape(-1)
        return weight

    def planes(self, layer, n):
        """Where entries are kept, and where the low-rank term is subtracted."""
        if f"{layer}.states" in self.tensors:
            plane = self.bytes_of(f"{layer}.states")
            assert plane.max() < 243
            states = np.stack([plane // 3**i % 3 for i in range(5)], axis=2).reshape(len(plane), -1)[:, :n]
            return states == 0, states == 2
        kept = bits_of(self.bytes_of(f"{layer}.positions"), n)
        return kept, np.zeros_like(kept)

    def from_symbols(self, layer):
        entry = self.modules[layer]
        scales, levels = self.numbers(f"{layer}.scales"), self.numbers(f"{layer}.levels")
        m, n, p = len(scales), entry["in_features"], entry["symbol_bits"]
        rows = self.bytes_of(f"{layer}.symbols").tolist()
        weight = np.array([[value(rows, p, n, i, j, levels) for j in range(n)] for i in range(m)], np.float32)
        weight *= scales[:, None]
        if "rotation" not in entry:
            return weight
        return transformed(weight, entry["rotation"]) * rotation_signs(entry["seed"], n)


def value(symbols, p, n, i, j, levels):
    above = i // 4 * 4 + (i - 1) % 4
    odd = symbol(symbols, p, n, above, j) % 2
    return (-1 if odd else 1) * (levels[symbol(symbols, p, n, i, j)] + 0.5) / 128


def symbol(symbols, p, n, i, j):
    w = 64 if j // 128 == n // 128 and -(-n // 64) % 2 else 128
    at, result, low = j // 128 * 64 * p, 0, 0  # 64 p bytes in each tile before this one
    for q in {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2]}[p]:
        width = w * q // 8
        f, k = divmod(j % 128, width)
        result |= (symbols[i // 4][at + i % 4 * width + k] >> q * f) % 2**q << low
        at, low = at + 4 * width, low + q
    return result


def transformed(weight, block):
    """Walsh-Hadamard transform of every `block` columns, one pair at a time."""
    weight, s = weight.copy(), 1
    while s < block:
        for p in range(weight.shape[1]):
            if not p & s:
                a, b = weight[:, p].copy(), weight[:, p + s].copy()
                weight[:, p], weight[:, p + s] = a + b, a - b
        s *= 2
    return weight * np.float32(1 / np.sqrt(block))


def rotation_signs(seed, n):
    result = []
    for j in range(n):
        z = (seed + (j + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        result.append(-1.0 if (z ^ z >> 31) >> 63 else 1.0)
    return np.array(result, np.float32)
