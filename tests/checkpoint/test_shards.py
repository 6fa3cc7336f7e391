"""Reading and writing safetensors by hand gives what safetensors itself gives."""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from slablm import SlabError
from slablm.checkpoint.shards import DTYPES, Piece, TensorFile, open_all, write_tensors

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
names = st.text(st.characters(min_codepoint=32, max_codepoint=600), min_size=1, max_size=8)


def tensor_of(dtype, shape, seed):
    bytes_needed = torch.empty(shape, dtype=dtype).nbytes
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    return torch.randint(256, (bytes_needed,), generator=generator).to(torch.uint8).view(dtype).view(shape)


@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=6), st.integers(0, 99))
def test_the_same_bytes_as_safetensors(tmp_path_factory, kinds, seed):
    tensors = {name: tensor_of(DTYPES[dtype], shape, seed) for name, (dtype, shape) in kinds.items()}
    expected = save(tensors, metadata={"é": "1"})
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    write_tensors(path, {name: Piece.of(tensor) for name, tensor in tensors.items()}, {"é": "1"})
    assert path.read_bytes() == expected
    file = TensorFile.open(path)
    assert file.metadata == {"é": "1"}
    assert file.pieces.keys() == tensors.keys()
    for name, piece in file.pieces.items():
        read = piece.read()
        assert (read.dtype, read.shape) == (tensors[name].dtype, tensors[name].shape)
        assert read.reshape(-1).view(torch.uint8).equal(tensors[name].reshape(-1).view(torch.uint8))
        assert (piece.meta().dtype, piece.meta().shape, piece.meta().is_meta) == (read.dtype, read.shape, True)
    # Copied from the file, they give the file again.
    copy = path.with_name("b.safetensors")
    write_tensors(copy, file.pieces, file.metadata)
    assert copy.read_bytes() == expected


def test_a_tensor_larger_than_a_chunk(tmp_path):
    tensor = torch.arange(3_000_001, dtype=torch.float32)
    write_tensors(tmp_path / "a.safetensors", {"a": Piece.of(tensor)}, {})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], tensor)
    assert torch.equal(open_all([tmp_path / "a.safetensors"])["a"].read(), tensor)


def with_header(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


BROKEN = {
    "empty": b"",
    "no length": b"abc",
    "no header": struct.pack("<Q", 1 << 50) + b"{}",
    "no JSON": struct.pack("<Q", 2) + b"{]",
    "no object": struct.pack("<Q", 2) + b"[]",
}
BROKEN_HEADERS = {
    "no offsets": {"a": {"dtype": "F16", "shape": [2]}},
    "type": {"a": {"dtype": "F17", "shape": [2], "data_offsets": [0, 4]}},
    "range": {"a": {"dtype": "F16", "shape": [3], "data_offsets": [0, 4]}},
    "size": {"a": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}},
    "entry": {"a": 3},
}


@pytest.mark.parametrize("case", [*BROKEN, *BROKEN_HEADERS])
def test_broken_files(case, tmp_path):
    path = tmp_path / "a.safetensors"
    if case in BROKEN:
        path.write_bytes(BROKEN[case])
    else:
        with_header(path, BROKEN_HEADERS[case], b"\0" * 4)
    with pytest.raises(SlabError, match=r"a\.safetensors cannot be read \(.*\): it is truncated or damaged, download"):
        TensorFile.open(path)


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("nothing", "folder"):
        with pytest.raises(SlabError, match=f"{name} cannot be read"):
            TensorFile.open(tmp_path / name)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": Piece.of(torch.arange(9))}, {})
    piece = TensorFile.open(path).pieces["a"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SlabError, match="ends early"):
        piece.read()
    path.unlink()
    with pytest.raises(SlabError, match="No such file"):
        piece.read()
