"""A second reader of slablm folders, made from FORMAT.md alone: json, struct, hashlib and numpy, nothing of slablm.

reader = Reader(folder)       # checks the versions, names, shapes, the digests of all tensors and of config.json
reader.dense("model.layers.0.mlp.up_proj")      # Ŵ, float32
"""

import hashlib
import json
import struct

import numpy as np

NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "F64": "<f8", "I64": "<i8"}
NAMES = {
    "F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16", "U8": "torch.uint8",
    "F64": "torch.float64", "I64": "torch.int64",
}  # fmt: skip
DECODING = ("kept", "rank", "signs", "value_bits", "group_size", "grid_dtype")


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


def rounded(numbers, value_dtype):
    """To the nearest 16-bit number, ties to even, and back."""
    if value_dtype == "float16":
        return numbers.astype(np.float16).astype(np.float32)
    bits = numbers.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def bits_of(plane, n):
    """[m, ⌈n/8⌉] bytes → [m, n] bool, the lowest bit first."""
    return np.unpackbits(plane, axis=1, bitorder="little")[:, :n].astype(bool)


class Reader:
    def __init__(self, folder):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.entries = config["quantization_config"]
        assert self.entries["quant_method"] == "slab"
        assert self.entries["format_version"] == 5
        self.modules, self.value_dtype = self.entries["modules"], self.entries["value_dtype"]
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
        for name, (dtype, shape, raw) in self.tensors.items():
            assert (
                blake(f"{NAMES[dtype]}[{', '.join(map(str, shape))}]".encode("ascii") + raw) == record["digests"][name]
            )
        stored = set(self.tensors)
        for group in record["tied"]:
            assert len(stored & set(group)) == 1
            stored |= set(group)
        assert stored == record["digests"].keys()
        modules = {name: {key: entry[key] for key in DECODING if key in entry} for name, entry in self.modules.items()}
        assert blake(canonical({"modules": modules, "value_dtype": self.value_dtype})) == record["modules"]
        for key in ("_name_or_path", "transformers_version", "transformers_weights"):
            config.pop(key, None)
        assert blake(canonical(config)) == record["config"]

    def numbers(self, name):
        dtype, shape, raw = self.tensors[name]
        return floats(dtype, raw).reshape(shape)

    def bytes_of(self, name):
        dtype, shape, raw = self.tensors[name]
        assert dtype == "U8"
        return np.frombuffer(raw, np.uint8).reshape(shape)

    def dense(self, layer):
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
        weight[kept] = self.values(layer, kept, negative).reshape(-1)
        return weight

    def planes(self, layer, n):
        """Where entries are kept, and where Ŵ is negative (only elsewhere, if the codes have the signs)."""
        if f"{layer}.states" in self.tensors:
            plane = self.bytes_of(f"{layer}.states")
            assert plane.max() < 243
            states = np.stack([plane // 3**i % 3 for i in range(5)], axis=2).reshape(len(plane), -1)[:, :n]
            return states == 0, states == 2
        kept = bits_of(self.bytes_of(f"{layer}.positions"), n)
        if f"{layer}.signs" in self.tensors:
            return kept, bits_of(self.bytes_of(f"{layer}.signs"), n)
        return kept, np.zeros_like(kept)

    def values(self, layer, kept, negative):
        """Kept entries, [m, k]."""
        entry, (m, n) = self.modules[layer], kept.shape
        k = entry["kept"]
        if "value_bits" not in entry:
            return self.numbers(f"{layer}.values")
        b = entry["value_bits"]
        in_codes = -(-n // 5) + -(-k * (b + 1) // 8) <= 2 * -(-n // 8) + -(-k * b // 8)
        assert in_codes == (f"{layer}.states" in self.tensors)
        width = b + in_codes
        single = bits_of(self.bytes_of(f"{layer}.codes"), k * width).reshape(m, k, width)
        codes = (single * 2 ** np.arange(width)).sum(axis=2)
        minus = codes >= 2**b if in_codes else negative[kept].reshape(m, k)
        columns = np.nonzero(kept)[1].reshape(m, k)
        scales = np.take_along_axis(self.numbers(f"{layer}.scales"), columns // entry["group_size"], axis=1)
        offsets = self.numbers(f"{layer}.offsets")[:, None]
        magnitudes = rounded(scales * (offsets + (codes % 2**b).astype(np.float32)), entry.get("grid_dtype", "float16"))
        return np.where(minus, -magnitudes, magnitudes)
