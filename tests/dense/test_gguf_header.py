import struct

import gguf
import numpy as np
import pytest

from slablm import SlabError
from slablm.dense.gguf_header import Header, StoredTensor, block_formats, read_header
from slablm.dense.loading import quantized_as
from tests.gguf_files import finish

ZEROS = np.zeros((2, 32), dtype=np.float32)


def test_formats_of_the_blocks(tiny_gguf):
    weights = block_formats(tiny_gguf)
    expected = sum(
        int(tensor.n_elements) for tensor in gguf.GGUFReader(tiny_gguf).tensors if tensor.tensor_type.name == "Q4_1"
    )
    assert weights == {"Q4_1": expected}
    assert quantized_as(str(tiny_gguf)) == "Q4_1"


def test_all_tensors_are_those_of_the_gguf_package(tiny_gguf):
    header = read_header(tiny_gguf)
    assert header.architecture == "llama"
    assert header.tensors == tuple(
        StoredTensor(tensor.name, int(tensor.n_elements), tensor.tensor_type.name, int(tensor.n_bytes))
        for tensor in gguf.GGUFReader(tiny_gguf).tensors
    )


def test_the_architecture_is_a_text_of_one_name(tmp_path):
    """Not an entry with a longer name, nor one of another type; without any, there is none."""
    path, name = tmp_path / "named.gguf", b"general.architecture"
    text = struct.pack("<IQ", 8, 3) + b"abc"
    for key, value, expected in ((name, text, "abc"), (name + b"2", text, ""), (name, struct.pack("<IB", 7, 1), "")):
        path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + value)
        assert read_header(path) == Header(expected, ())
    key = b"k" * 1000  # longer than what is kept of it
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 2, 1000) + key + text + struct.pack("<Q", 20) + name + text)
    assert read_header(path) == Header("abc", ())


def test_several_formats_and_none(tmp_path):
    for name, kinds in (("some", ("Q8_0", "Q4_0", "Q4_0", "F16")), ("none", ("F16", "F32"))):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        writer.add_array("lists.of.numbers", [1.5, 2.5])
        tensors = {f"blk.{index}.ffn_up.weight": kind for index, kind in enumerate(kinds)}
        for tensor, kind in (tensors | {"token_embd.weight": "Q5_0"}).items():
            raw = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(tensor, gguf.quants.quantize(ZEROS, raw), raw_dtype=raw)
        finish(writer)
    assert quantized_as(str(tmp_path / "some.gguf")) == "Q4_0/Q8_0"
    assert quantized_as(str(tmp_path / "none.gguf")) == ""


def test_other_sources_are_not_read(tiny_folder):
    assert quantized_as("owner/name") == quantized_as(str(tiny_folder)) == ""
    with pytest.raises(SlabError, match="does not exist"):
        quantized_as("nowhere.gguf")


def test_every_cut_of_the_header_is_an_error(tiny_gguf, tmp_path):
    content = tiny_gguf.read_bytes()
    first = gguf.GGUFReader(tiny_gguf).data_offset
    path = tmp_path / "cut.gguf"
    # The header is padded to a multiple of 32.
    for length in [*range(0, 64), *range(64, first - 32, 97)]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="no GGUF file|cut off"):
            block_formats(path)
        assert quantized_as(str(path)) == ""  # `load` says what is wrong


def test_absurd_sizes_take_neither_memory_nor_time(tmp_path):
    path, most = tmp_path / "absurd.gguf", 2**64 - 1
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    no_entries = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    for content in (
        b"GGUF" + struct.pack("<IQQ", 3, most, most),
        head + struct.pack("<Q", most),
        head + struct.pack("<QIQ", 0, 8, most),
        head + struct.pack("<QIIQ", 0, 9, 8, most),
        head + struct.pack("<QIIQ", 0, 9, 12, most),
        head + struct.pack("<QIIQ", 0, 9, 9, 1),
        head + struct.pack("<QI", 0, 99),
        no_entries + struct.pack("<Q", most) + bytes(200),
        no_entries + struct.pack("<QI", 0, 2**32 - 1) + bytes(200),
        no_entries + struct.pack("<QIIQ", 0, 0, 12345, 0),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="GGUF|GGML"):
            block_formats(path)
