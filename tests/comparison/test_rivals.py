"""Rivals: which files are taken, that they compute what is in them, and that their bits are counted from the file."""

import shutil

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from slablm import CompressionConfig, SlabError
from slablm.api import compress_folder
from slablm.checkpoint.inspection import inspect_folder
from slablm.comparison import rivals
from slablm.comparison.rivals import Rival, Size
from slablm.dense import loading
from slablm.dense.targets import select_targets
from slablm.runtime.linear import SlabLinear
from tests.compression.mixtures import build
from tests.conftest import tiny_config
from tests.gguf_files import finish

KINDS = gguf.GGMLQuantizationType
# Of the tiny model: q and o, k and v, gate, up and down of two blocks; embedding and head.
WEIGHTS = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
ENDS = 2 * 258 * 64


def targets(model, **settings):
    names = select_targets(model, CompressionConfig("slab", calibration="builtin", **settings)).names
    return [name for block in names for name in block]


def logits(model):
    ids = torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def permuted(tensor, heads):
    """Rows of q and k in GGUF's order: the two halves of a head, which rotate together, interleaved."""
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape).contiguous()


def write_gguf(path, like, tensors, kind):
    """Copy a GGUF file's settings and vocabulary, with other tensors: matrices of the blocks in a format, all else F32.

    Args:
        tensors: by their name in transformers.
        kind: a function of the name.
    """
    reader, config = gguf.GGUFReader(like), tiny_config()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            more = {"sub_type": field.types[-1]} if field.types[0] is gguf.GGUFValueType.ARRAY else {}
            writer.add_key_value(field.name, field.contents(), field.types[0], **more)
    for name, tensor in tensors.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        stored = kind(name) if tensor.dim() == 2 and ".layers." in name else KINDS.F32
        rows = (permuted(tensor, heads) if heads else tensor).numpy()
        writer.add_tensor(
            names.get_name(name, try_suffixes=[".weight"]), gguf.quants.quantize(rows, stored), raw_dtype=stored
        )
    finish(writer)


@pytest.fixture
def dense(tiny_folder):
    return loading.load(str(tiny_folder))[0]


@pytest.fixture(scope="module")
def tensors(tiny_folder):
    return load_file(tiny_folder / "model.safetensors")


@pytest.fixture(scope="module")
def exact(tiny_gguf, tensors, tmp_path_factory):
    """The tiny model in F32."""
    path = tmp_path_factory.mktemp("exact") / "f32.gguf"
    write_gguf(path, tiny_gguf, tensors, lambda name: KINDS.F32)
    return path


def test_what_a_user_types(tiny_gguf, tiny_folder):
    assert Rival.parse(f" Q4_1 = {tiny_gguf}") == Rival("Q4_1", tiny_gguf)
    assert Rival.parse(f"other={tiny_folder}") == Rival("other", tiny_folder)
    assert [r.is_gguf for r in rivals.parse_all([f"a={tiny_gguf}", f"b={tiny_folder}"])] == [True, False]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.gguf", "write NAME=PATH, such as"),
        ("=model.gguf", "write NAME=PATH"),
        (" =model.gguf", "write NAME=PATH"),
        ("name=", "write NAME=PATH"),
        ("slab+=model.gguf", "name of a method of the table: choose another one than slab+"),
        ("dense=model.gguf", "choose another one than dense"),
        ("name=a=b.gguf", "rival name: a=b.gguf does not exist"),
        ("name=nowhere.gguf", "rival name: nowhere.gguf does not exist; hub models have to be downloaded"),
        (f"name={__file__}", "is neither a folder nor a .gguf file"),
    ],
)
def test_what_is_refused(argument, message):
    with pytest.raises(SlabError, match=message.replace("+", r"\+")):
        Rival.parse(argument)


def test_two_of_one_name(tiny_gguf, tiny_folder):
    with pytest.raises(SlabError, match="two rivals are called a: give each"):
        rivals.parse_all([f"a={tiny_gguf}", f"a={tiny_folder}"])


def test_a_file_in_float32_is_the_dense_model(exact, dense):
    """Would find rows of q and k left in the file's order, and settings that the file does not hold."""
    dense.config.rope_parameters = {"rope_type": "default", "rope_theta": 77.0}
    like = type(dense)(dense.config).eval()
    like.load_state_dict(dense.state_dict())
    loaded = rivals.load(Rival("f32", exact), like)
    torch.testing.assert_close(logits(loaded), logits(like), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(loaded), logits(loading.load(str(exact))[0]), rtol=0, atol=1e-3)
    assert not loaded.training
    assert loaded.config.rope_parameters == like.config.rope_parameters


def test_it_gets_the_dense_models_type(exact, tiny_folder):
    like, _ = loading.load(str(tiny_folder), dtype="bfloat16")
    loaded = rivals.load(Rival("f32", exact), like)
    assert loaded.dtype == torch.bfloat16
    torch.testing.assert_close(logits(loaded), logits(like), rtol=0, atol=0)


def test_dequantised_weights_and_their_size(tiny_gguf, tensors, dense, tmp_path):
    """Formats that differ from layer to layer, as llama.cpp mixes them."""
    path, kinds = tmp_path / "mixed.gguf", {"down_proj": KINDS.Q8_0, "v_proj": KINDS.Q5_1}
    write_gguf(path, tiny_gguf, tensors, lambda name: kinds.get(name.split(".")[-2], KINDS.Q4_0))
    rival = Rival("mixed", path)
    loaded = rivals.load(rival, dense)
    for name, kind in {"mlp.down_proj": KINDS.Q8_0, "self_attn.v_proj": KINDS.Q5_1, "mlp.up_proj": KINDS.Q4_0}.items():
        weight = tensors[f"model.layers.1.{name}.weight"]
        rounded = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
        assert torch.equal(loaded.get_submodule(f"model.layers.1.{name}").weight, torch.from_numpy(rounded))
    down, v = 2 * 64 * 96, 2 * 32 * 64
    bits = 8.5 * down + 6 * v + 4.5 * (WEIGHTS - down - v)
    size = rivals.true_bits(rival, dense, targets(dense))
    assert size == Size(round(bits / 8), WEIGHTS)
    assert size.bits_per_weight == bits / WEIGHTS
    norms = sum(p.numel() for p in dense.parameters()) - WEIGHTS - ENDS
    assert rivals.whole_size(rival, dense) == Size(round(bits / 8) + 4 * (ENDS + norms), WEIGHTS + ENDS + norms)
    some = targets(dense, targets=("v_proj", "down_proj"), ignore=("re:.*layers\\.0.*",))
    assert rivals.true_bits(rival, dense, some) == Size(round((8.5 * down + 6 * v) / 16), (down + v) // 2)
    assert rivals.embedding_size(rival, dense) == Size(4 * ENDS, ENDS)


def test_a_table_that_embedding_and_head_share(tiny_gguf, tensors, exact, dense):
    """Tied in the dense model, and two tables in the file: then the head is the file's own."""
    from transformers import LlamaForCausalLM

    like = LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).eval()
    rival = Rival("f32", exact)
    loaded = rivals.load(rival, like)
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=0, atol=1e-6)
    assert rivals.embedding_size(rival, like) == Size(4 * ENDS, ENDS // 2)
    assert rivals.whole_size(rival, like).weights == sum(p.numel() for p in dense.parameters()) - ENDS // 2


def test_a_folder_with_dense_weights(tiny_folder, dense, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "half")
    half = {name: tensor.bfloat16() for name, tensor in load_file(tiny_folder / "model.safetensors").items()}
    half["model.layers.0.mlp.up_proj.bias"] = torch.zeros(96)  # no weight, and transformers does not read it
    save_file(half, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    rival = Rival("half", tmp_path / "half")
    loaded = rivals.load(rival, dense)
    assert loaded.dtype == dense.dtype
    assert torch.equal(loaded.lm_head.weight, dense.lm_head.weight.bfloat16().float())
    assert rivals.true_bits(rival, dense, targets(dense)).bits_per_weight == 16
    assert rivals.embedding_size(rival, dense) == Size(2 * ENDS, ENDS)
    weights = sum(p.numel() for p in dense.parameters())
    assert rivals.whole_size(rival, dense) == Size(2 * weights + 4 * 96, weights)  # the bias is in the file


def test_all_parts_of_a_layer_are_counted(dense, tiny_folder, tmp_path):
    """As GPTQ or bitsandbytes store a layer; a name that only begins alike is another layer's."""
    dense_tensors = load_file(tiny_folder / "model.safetensors")
    parts = {name: tensor for name, tensor in dense_tensors.items() if "q_proj" not in name}
    q = "model.layers.{}.self_attn.q_proj"
    for index in (0, 1):
        parts[q.format(index) + ".qweight"] = torch.zeros(64, 8, dtype=torch.int32)
        parts[q.format(index) + ".scales"] = torch.zeros(2, 64, dtype=torch.float16)
        parts[q.format(index) + ".weight.absmax"] = torch.zeros(5, dtype=torch.uint8)
        parts[q.format(index) + ".bias"] = torch.zeros(64)
        parts[q.format(index) + "_extra.weight"] = torch.zeros(1000)
    save_file(parts, tmp_path / "model.safetensors")
    shutil.copy(tiny_folder / "config.json", tmp_path)
    size = rivals.true_bits(Rival("parts", tmp_path), dense, targets(dense, targets=("q_proj",)))
    assert size == Size(2 * (64 * 8 * 4 + 2 * 64 * 2 + 5), 2 * 64 * 64)


def test_a_folder_of_our_own(compressed_folder, dense):
    rival, names = Rival("ours", compressed_folder), targets(dense)
    loaded = rivals.load(rival, dense)
    assert not any(isinstance(module, SlabLinear) for module in loaded.modules())
    same = loading.load(str(compressed_folder), dtype="float32")[0]
    torch.testing.assert_close(logits(loaded), logits(same), rtol=0, atol=1e-5)
    layers = inspect_folder(compressed_folder).layers
    assert rivals.true_bits(rival, dense, names) == Size(sum(layer.true_bits for layer in layers) // 8, WEIGHTS)
    assert rivals.embedding_size(rival, dense) == Size(2 * ENDS, ENDS)  # FORMAT.md: in 16 bits


def test_a_mixture_of_experts(quick, tmp_path):
    """A rival with transformers' own experts, and one with ours."""
    source = build(tmp_path / "dense", "qwen3_moe")
    compress_folder(str(source), tmp_path / "out", quick)
    dense = loading.load(str(source))[0]
    names, before = targets(dense), logits(dense)
    for path, bits in ((source, 32), (tmp_path / "out", None)):
        rival = Rival("rival", path)
        loaded, size = rivals.load(rival, dense), rivals.true_bits(rival, dense, names)
        layers = inspect_folder(tmp_path / "out").layers
        assert size.bits_per_weight == (bits or sum(layer.true_bits for layer in layers) / size.weights)
        assert torch.equal(logits(loaded), before) == (path == source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, "its vocabulary has 258 tokens, the dense model's 300"),
        ({"num_hidden_layers": 3}, r"it has no model\.layers\.2\.self_attn\.q_proj, which the dense model has"),
        ({"num_hidden_layers": 1}, r"it has model\.layers\.1\.self_attn\.q_proj, which the dense model does not"),
        (
            {"num_key_value_heads": 4},
            r"model\.layers\.0\.self_attn\.k_proj has shape \[32, 64\], in the dense model \[64, 64\]",
        ),
        ({"attention_bias": True}, r"transformers reads no model\.layers\.0\.self_attn\.q_proj\.bias from its file"),
    ],
)
def test_another_model_is_refused(changes, message, exact):
    from transformers import LlamaForCausalLM

    with pytest.raises(SlabError, match=f"^rival f32: {message}.*: a rival has to be made from the model"):
        rivals.load(Rival("f32", exact), LlamaForCausalLM(tiny_config(**changes)))


def test_another_architecture_is_refused(exact):
    from transformers import GPT2Config, GPT2LMHeadModel

    like = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_positions=64, n_embd=64, n_layer=2, n_head=4))
    with pytest.raises(SlabError, match=r"it has no transformer\.wte, which the dense model has: a rival"):
        rivals.load(Rival("f32", exact), like)
    with pytest.raises(SlabError, match=r"holds no tensor of layer transformer\.h\.0\.mlp\.unknown: a rival"):
        rivals.true_bits(Rival("f32", exact), like, ["transformer.h.0.mlp.unknown"])


def test_files_that_cannot_be_counted(dense, tmp_path):
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
    with pytest.raises(SlabError, match="rival a: the header of a GGUF file is cut off"):
        rivals.true_bits(Rival("a", tmp_path / "damaged.gguf"), dense, targets(dense))
    writer = gguf.GGUFWriter(tmp_path / "unknown.gguf", "unheard-of")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(SlabError, match="does not know architecture 'unheard-of'"):
        rivals.true_bits(Rival("a", tmp_path / "unknown.gguf"), dense, targets(dense))
    with pytest.raises(SlabError, match="holds no safetensors files"):
        rivals.true_bits(Rival("a", tmp_path), dense, targets(dense))


def test_a_digest_is_of_the_content_alone(exact, tiny_folder, tmp_path):
    shutil.copy(exact, tmp_path / "other.gguf")
    first = rivals.digest(Rival("a", exact))
    assert rivals.digest(Rival("b", tmp_path / "other.gguf")) == first
    content = bytearray(exact.read_bytes())
    content[-40] ^= 1
    (tmp_path / "other.gguf").write_bytes(content)
    assert rivals.digest(Rival("b", tmp_path / "other.gguf")) != first
    folder = rivals.digest(Rival("a", tiny_folder))
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    (copy / "README.md").write_text("words")
    assert rivals.digest(Rival("a", copy)) == folder
    (copy / "config.json").write_text("{}")
    assert rivals.digest(Rival("a", copy)) != folder
    (copy / "config.json").unlink()
    with pytest.raises(SlabError, match=r"rival a: .*config\.json cannot be read"):
        rivals.digest(Rival("a", copy))
