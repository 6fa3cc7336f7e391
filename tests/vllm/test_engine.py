"""vLLM itself on compressed models, compared with transformers: `make test-vllm`, in an environment of its own."""

import gc

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slablm import CompressionConfig
from slablm.api import compress_model
from slablm.dense.targets import select_targets
from tests.conftest import byte_tokenizer

vllm = pytest.importorskip("vllm", reason="run with `make test-vllm`")

# Heads as vLLM's attention takes them; a vocabulary that it fills up.
SMALL = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    # One matrix for q, k and v in the checkpoint.
    "phi3": {},
    # Through vLLM's interface to transformers' own models.
    "phi": {},
}
TOKENS = 8
PROMPTS = [[0, 70, 111], [0, 5, 9, 200, 31, 77, 8], [0, *range(30, 54)]]


@pytest.fixture
def engine(monkeypatch):
    """Starts an engine in this process, in seconds; what fails in it fails in the test."""
    from vllm.distributed import cleanup_dist_env_and_memory

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    small = {"max_model_len": 64, "max_num_seqs": 8, "enforce_eager": True, "distributed_executor_backend": "uni"}
    yield lambda folder, **options: vllm.LLM(model=str(folder), dtype="float32", **small | options)
    gc.collect()  # the engine takes with it what the next one would make
    cleanup_dist_env_and_memory()


def tiny(family, folder, method="slab+", head_bits=16, ignore=()):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | FAMILIES.get(family, {}))).eval()
    size = {"bits_per_weight": 4.0} if method == "slab+" else {"ratio": 0.4}
    settings = {"num_samples": 3, "seq_len": 24, "iterations": 4, "head_bits": head_bits, "ignore": ignore}
    config = CompressionConfig(method, **settings, **size)
    windows = torch.randint(3, 200, (3, 24), generator=torch.Generator().manual_seed(0))
    compress_model(model, select_targets(model, config), windows, config)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def likeliest(folder):
    """What transformers writes behind each prompt, and the log-probabilities of it."""
    model, texts = AutoModelForCausalLM.from_pretrained(folder), []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        for _ in range(TOKENS):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
        written = tokens[0, len(prompt) :]
        scores = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        texts.append((written.tolist(), scores.gather(1, written[:, None])[:, 0]))
    return texts


def check(folder, engine, **options):
    """What vLLM writes for all prompts at once is what transformers does for each."""
    expected = likeliest(folder)  # first: vLLM changes some of transformers' classes
    llm = engine(folder, **options)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
    for (written, scores), output in zip(expected, outputs, strict=True):
        (text,) = output.outputs
        assert list(text.token_ids) == written
        own = [step[token].logprob for step, token in zip(text.logprobs, written, strict=True)]
        assert (torch.tensor(own) - scores).abs().max() < 2e-3
    return llm


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path, engine):
    check(tiny(family, tmp_path / family), engine)


@pytest.mark.parametrize("method", ["slab", "slab+"])
def test_compressed_and_dense_layers_in_one(method, tmp_path, engine):
    """k_proj stays dense inside qkv_proj, up_proj inside gate_up_proj, and o_proj is all that vLLM has of it."""
    check(tiny("llama", tmp_path / "model", method, ignore=["k_proj", "up_proj", "o_proj"]), engine)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_int8_rows_tied_and_apart(family, tmp_path, engine):
    check(tiny(family, tmp_path / "model", head_bits=8), engine)


def test_without_kernels_weights_are_dense(tmp_path, engine, monkeypatch):
    monkeypatch.setenv("SLABLM_KERNEL", "reference")
    llm = check(tiny("llama", tmp_path / "model"), engine)
    assert llm.apply_model(lambda model: type(model.model.layers[0].mlp.down_proj.containers[0])) == [torch.nn.Linear]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"enable_lora": True}, "--enable-lora does not go with layers compressed by slablm"),
        ("bloom", {}, "does not say what it joins in 'transformer.h.0.self_attention.query_key_value'"),
        ("mixtral", {}, "vLLM cannot run the experts in 'model.layers.0.mlp.experts' as slablm stores them"),
    ],
)
def test_refused(family, options, message, tmp_path, engine):
    folder = tiny(family, tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        engine(folder, **options)


def test_a_changed_byte_is_refused(tmp_path, engine):
    folder = tiny("llama", tmp_path / "model")
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}: tensor .* is corrupted: download or compress it again"):
        engine(folder)
