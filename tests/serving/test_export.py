"""Dense weights for other tools: the same model, read back by transformers alone."""

import json
import re

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from slablm import SlabError
from slablm.api import compress_folder
from slablm.dense import loading
from slablm.serving.export import export_dense
from slablm.serving.gguf_export import export_gguf, interleaved
from tests.cli.test_cli import refused, slablm
from tests.compression.mixtures import build
from tests.conftest import tiny_config

load_tokenizer = AutoTokenizer.from_pretrained
TOKENS = torch.arange(2, 50)[None]


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture
def reference_kernels(monkeypatch):
    """Kernels round inputs; what is written are the numbers."""
    monkeypatch.setenv("SLABLM_KERNEL", "reference")


@pytest.fixture(scope="module")
def plus_folder(tmp_path_factory, tiny_folder, text_file):
    """The default method, with rotated inputs where they help, and int8 rows."""
    from slablm import CompressionConfig

    out = tmp_path_factory.mktemp("plus") / "out"
    settings = {"bits_per_weight": 5.0, "num_samples": 4, "seq_len": 32, "head_bits": 8}
    compress_folder(str(tiny_folder), out, CompressionConfig("slab+", calibration=str(text_file), **settings))
    return out


@pytest.fixture(params=["compressed_folder", "plus_folder"])
def source(request):
    return request.getfixturevalue(request.param)


def test_dense_is_the_same_model_for_transformers_alone(source, reference_kernels, tmp_path):
    exported = export_dense(source, tmp_path / "dense", max_shard_size=60_000)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"quantization_config", "transformers_weights"} & config.keys()
    assert not (tmp_path / "dense" / "slablm_run.json").exists()
    assert exported.bytes > 2 * exported.compressed_bytes
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {type(module) for module in model.modules() if "Slab" in type(module).__name__} == set()
    torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(source)), atol=1e-5, rtol=0)
    tokenizers = [load_tokenizer(path) for path in (source, tmp_path / "dense")]
    assert tokenizers[0]("a b") == tokenizers[1]("a b")


def test_weights_have_the_type_of_the_model(tiny_folder, quick, tmp_path):
    """A bfloat16 model's stay so."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).bfloat16().save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "half" / name).write_bytes((tiny_folder / name).read_bytes())
    compress_folder(str(tmp_path / "half"), tmp_path / "out", quick)
    export_dense(tmp_path / "out", tmp_path / "dense")
    assert {tensor.dtype for tensor in load_file(tmp_path / "dense" / "model.safetensors").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    difference = (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")) - logits(model)).float().abs().max()
    assert difference < 0.03


def with_merge(folder, out):
    """A copy whose tokenizer has a merge, as llama.cpp's readers ask for one."""
    export = out / "source"
    export.mkdir()
    for path in folder.iterdir():
        (export / path.name).write_bytes(path.read_bytes())
    content = json.loads((export / "tokenizer.json").read_text())
    content["model"]["merges"] = [["a", "b"]]
    vocabulary = content["model"]["vocab"]
    vocabulary["ab"] = vocabulary.pop("~")  # no token is added: the embedding has 258 rows
    (export / "tokenizer.json").write_text(json.dumps(content))
    return export


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 2e-3), ("q8_0", 3e-2)])
def test_gguf_is_the_same_model(kind, tolerance, compressed_folder, reference_kernels, tmp_path):
    """As transformers reads it, which undoes what llama.cpp wants otherwise."""
    source = with_merge(compressed_folder, tmp_path)
    exported = export_gguf(source, tmp_path, kind)
    assert exported.path == tmp_path / f"source-{kind}.gguf"
    model, tokenizer = loading.load(str(exported.path))
    difference = (logits(model) - logits(AutoModelForCausalLM.from_pretrained(source))).abs().max()
    assert difference < tolerance
    cut = [reader("cab", add_special_tokens=False)["input_ids"] for reader in (tokenizer, load_tokenizer(source))]
    assert cut[0] == cut[1]
    assert len(cut[0]) == 2
    fields = gguf.GGUFReader(exported.path).fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"


def test_rows_that_rotate_together_become_neighbours():
    rows = torch.arange(2 * 4)[:, None] * torch.ones(1, 3)
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleaved(torch.arange(4), 1).tolist() == [0, 2, 1, 3]


def test_what_cannot_be_exported(compressed_folder, tiny_folder, tmp_path):
    refused(slablm("export", tiny_folder, tmp_path / "x"), "is not a slablm checkpoint")
    refused(slablm("export", compressed_folder, tmp_path / "x", "--format", "onnx"), "--format must be dense or gguf")
    refused(slablm("export", compressed_folder, tmp_path / "x", "--format", "gguf", "--gguf-type", "q2"), "gguf_type")
    (tmp_path / "file").touch()
    for kind in ("dense", "gguf"):
        refused(
            slablm("export", compressed_folder, tmp_path / "file", "--format", kind), "is a file, a folder is needed"
        )
    refused(slablm("export", compressed_folder, compressed_folder), "already holds a model")
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / f"{compressed_folder.name}-f16.gguf").touch()
    refused(slablm("export", compressed_folder, tmp_path / "y", "--format", "gguf"), "f16.gguf exists: .*--overwrite")
    source = with_merge(compressed_folder, tmp_path)
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-1000] ^= 1
    (source / "model.safetensors").write_bytes(data)
    for kind in ("dense", "gguf"):
        refused(slablm("export", source, tmp_path / "x", "--format", kind), "is corrupted")
    assert not (tmp_path / "x").exists()


def test_a_mixture_of_experts_is_refused(quick, tmp_path):
    build(tmp_path / "dense", "mixtral")
    compress_folder(str(tmp_path / "dense"), tmp_path / "out", quick)
    for kind in ("dense", "gguf"):
        refused(slablm("export", tmp_path / "out", tmp_path / "x", "--format", kind), "is a mixture of experts")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content["model"].update(type="Unigram"), "no byte-pair encoding"),
        (lambda content: content["pre_tokenizer"].update(add_prefix_space=True), "rule that is not known"),
        (lambda content: content.update(pre_tokenizer={"type": "Whitespace"}), "rule that is not known"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise(edit, message, compressed_folder, tmp_path):
    source = with_merge(compressed_folder, tmp_path)
    content = json.loads((source / "tokenizer.json").read_text())
    edit(content)
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(SlabError, match=f"{message}.*convert_hf_to_gguf"):
        export_gguf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_both_sizes(compressed_folder, tmp_path):
    done = slablm("export", compressed_folder, tmp_path / "dense")
    assert re.search(r"dense: [\d.]+ kB of dense weights \(in slablm's format they take [\d.]+ kB\)", done.stdout)
    done = slablm("export", compressed_folder, tmp_path / "dense", "--overwrite", "--json")
    assert json.loads(done.stdout)["bytes"] > 0
