import struct

import gguf
import numpy as np
import pytest

from slablm import SlabError
from slablm.dense.gguf_header import block_formats
from slablm.dense.loading import quantized_as

ZEROS = np.zeros((2, 32), dtype=np.float32)


def test_formats_of_the_blocks(tiny_gguf):
    weights = block_formats(tiny_gguf)
    expected = sum(
        int(tensor.n_elements) for tensor in gguf.GGUFReader(tiny_gguf).tensors if tensor.tensor_type.name == "Q4_1"
    )
    assert weights == {"Q4_1": expected}
    assert quantized_as(str(tiny_gguf)) == "Q4_1"


def test_several_formats_and_none(tmp_path):
    for name, kinds in (("some", ("Q8_0", "Q4_0", "Q4_0", "F16")), ("none", ("F16", "F32"))):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        writer.add_array("lists.of.numbers", [1.5, 2.5])
        tensors = {f"blk.{index}.ffn_up.weight": kind for index, kind in enumerate(kinds)}
        for tensor, kind in (tensors | {"token_embd.weight": "Q5_0"}).items():
            raw = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(tensor, gguf.quants.quantize(ZEROS, raw), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
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
