"""Fixtures: a tiny Llama with a byte tokenizer, made on the spot, and the real SmolLM2 where it is installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Nothing in the tests may wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Without a GPU the Triton kernels run in Triton's interpreter, which it looks up while they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("slablm", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("slablm")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items):
    """The longest tests first, so that of several processes none is left with them in the end."""
    items.sort(key=lambda item: item.get_closest_marker("smollm2") is None)


@pytest.fixture(autouse=True)
def one_thread(request):
    """Threads that find no free core wait for each other, with tiny matrices and beside other tests for minutes."""
    threads = torch.get_num_threads()
    if request.node.get_closest_marker("smollm2") is None or "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def byte_tokenizer():
    """A tokenizer whose tokens are the 256 bytes, with <s> in front of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {symbol: i + 2 for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_config(**changes):
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": 258,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return LlamaConfig(**(sizes | changes))


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def tiny_model():
    """A fresh random Llama with 2 blocks."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config()).eval()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer):
    """The tiny model as a folder; do not write to it."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory, tiny_folder, tokenizer):
    """The tiny model's sizes and tokens as a GGUF file, its blocks in Q4_1; what it computes is of no interest."""
    import gguf
    from safetensors.torch import load_file

    from tests.gguf_files import finish, writer_of

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config, kinds = tiny_config(), gguf.GGMLQuantizationType
    writer = writer_of(path, "llama", config)
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    # Some merge is required, in place of a byte that no English text has.
    writer.add_token_list([*sorted(tokenizer.vocab, key=tokenizer.vocab.get)[:-1], "ab"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 256)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in load_file(tiny_folder / "model.safetensors").items():
        kind = kinds.Q4_1 if tensor.dim() == 2 and ".layers." in name else kinds.F32
        own = names.get_name(name, try_suffixes=[".weight"])
        writer.add_tensor(own, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    finish(writer)
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """English text, about 20 kB."""
    from slablm.calibration.text import load_text

    path = tmp_path_factory.mktemp("text") / "sample.txt"
    path.write_text(load_text("builtin", split="calibration")[:20_000], encoding="utf-8")
    return path


@pytest.fixture
def quick(text_file):
    """Settings that compress the tiny model in a second."""
    from slablm import CompressionConfig

    return CompressionConfig("slab", calibration=str(text_file), num_samples=4, seq_len=32, iterations=4)


@pytest.fixture
def quick_plus(text_file):
    """The same with `slab+`, whose size is given in another way."""
    from slablm import CompressionConfig

    return CompressionConfig("slab+", bits_per_weight=5.0, calibration=str(text_file), num_samples=4, seq_len=32)


@pytest.fixture(scope="session")
def compressed_folder(tmp_path_factory, tiny_folder, text_file):
    """The tiny model compressed by the command line's own path; do not write to it."""
    from slablm.cli.compress import run
    from slablm.compression.options import RunOptions
    from slablm.config import CompressionConfig

    out = tmp_path_factory.mktemp("compressed") / "out"
    config = CompressionConfig("slab", calibration=str(text_file), num_samples=4, seq_len=32, iterations=4)
    run(str(tiny_folder), out, config, RunOptions())
    return out


@pytest.fixture(scope="session")
def shared_data():
    """Calibration and evaluation text that is not part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the text data is not here: expected ../shared/data beside the repository")
    return SHARED_DATA
