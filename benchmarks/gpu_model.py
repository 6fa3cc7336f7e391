"""A whole model on a GPU, for `gpu.py`: compressed, reloaded, made to write, and timed token by token.

The model is random, of Llama-3-8B's widths with a few blocks and a vocabulary of bytes, so that its time is that of its
blocks. A token's forward pass is recorded in one CUDA graph, with a static cache, for the dense model as for the
compressed one.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_timing import microseconds
from memory import byte_tokenizer

from slablm import CompressionConfig
from slablm.api import compress_folder
from slablm.compression.options import RunOptions

BLOCKS = 4
CONTEXT = 128
REPLAYS = 128  # at most: the cache grows with every one
WINDOWS, SEQ_LEN = 128, 2048


def model_table(rounds: int, text: str) -> dict[str, Any]:
    """Times of one block's compression and of a token, dense and compressed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        dense_folder, out = Path(folder) / "dense", Path(folder) / "out"
        save_random_model(dense_folder)
        config = CompressionConfig(bits_per_weight=4.2, calibration=text, num_samples=WINDOWS, seq_len=SEQ_LEN)
        begin = time.perf_counter()
        compress_folder(str(dense_folder), out, config, RunOptions(device="cuda"))
        seconds = time.perf_counter() - begin
        tokenizer = AutoTokenizer.from_pretrained(out)
        models = {
            name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map="cuda").eval()
            for name, path in (("dense BF16", dense_folder), ("slab+", out))
        }
        prompt = tokenizer("The history of", return_tensors="pt").to("cuda")
        written = models["slab+"].generate(**prompt, max_new_tokens=16, do_sample=False)
    runs = {name: [token_step(model)] for name, model in models.items()}
    times = microseconds(runs, rounds)
    print(f"\na random Llama-3-8B with {BLOCKS} blocks, {WINDOWS} calibration windows of {SEQ_LEN} tokens, slab+")
    print(f"compressed in {seconds:.1f} s; wrote {written.shape[1] - prompt['input_ids'].shape[1]} tokens")
    for name, value in times.items():
        print(f"{name:<12}{value:>9.1f} us per token   x dense {times['dense BF16'] / value:.2f}")
    return {"compression_seconds": seconds, "blocks": BLOCKS, "token_us": times}


def save_random_model(folder: Path) -> None:
    """A random Llama-3-8B of `BLOCKS` blocks and bytes as vocabulary, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=257,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=BLOCKS,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=SEQ_LEN,
        dtype=torch.bfloat16,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def token_step(model: Any) -> Any:
    """The forward pass of one token behind `CONTEXT` others, fit for a CUDA graph."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=CONTEXT + REPLAYS)
    tokens = torch.randint(3, 200, (1, CONTEXT), device="cuda")
    model(tokens, past_key_values=cache, use_cache=True, cache_position=torch.arange(CONTEXT, device="cuda"))
    token, place = torch.tensor([[5]], device="cuda"), torch.tensor([CONTEXT], device="cuda")
    arguments = {"position_ids": place[None], "cache_position": place, "use_cache": True}
    return lambda: model(token, past_key_values=cache, **arguments).logits
