"""One model in slab+ beside its dense form and llama.cpp: decoding, a prompt of 512, a document, in interleaved rounds.

Each round runs every contender once; printed are medians, and every round's figure. Tokens are pseudo-random. The head
in 8 bits is made in memory; `unfused` runs decoder blocks module by module.

    OMP_NUM_THREADS=2 python benchmarks/decode.py OUT DENSE --threads 2 \
        --llama-bench llama-bench --gguf Q4_0.gguf --gguf IQ4_NL.gguf
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from slablm import CompressionConfig
from slablm.compression.preparation import use_head_bits
from slablm.evaluation.llama_bench import LlamaBench
from slablm.evaluation.speed import Workload
from slablm.runtime.block_run import BlockRuns
from slablm.runtime.kernels.backends import ACTIVATION_VARIABLE

PROMPT, NEW, DOCUMENT, SUMMARY = 64, 64, 512, 128


class Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        """Called with the prompt first."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to be done."""


def load(source: str, **options: torch.dtype) -> PreTrainedModel:
    """In eval mode, and never at an end."""
    model = AutoModelForCausalLM.from_pretrained(source, **options).eval()
    model.generation_config.eos_token_id = None
    return model


def with_int8_head(source: str) -> PreTrainedModel:
    """A compressed model with embedding and head in 8 bits."""
    model = load(source)
    embedding = nn.Embedding.from_pretrained(model.lm_head.weight.float())
    head = nn.Linear(*reversed(embedding.weight.shape), bias=False)
    head.weight = embedding.weight
    model.set_input_embeddings(embedding)
    model.lm_head = head
    with torch.no_grad():
        use_head_bits(model, CompressionConfig(head_bits=8))
    return model


def generate(model: PreTrainedModel, tokens: int, new: int, clock: Clock | None = None) -> None:
    """Greedy."""
    prompt = torch.randint(0, 40000, (1, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompt)
    model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, streamer=clock, pad_token_id=0)


def decode(model: PreTrainedModel) -> float:
    """Tokens per second after the first new one."""
    clock = Clock()
    generate(model, PROMPT, NEW, clock)
    return (NEW - 1) / (clock.times[-1] - clock.times[1])


def unfused(model: PreTrainedModel) -> float:
    """As `decode`, module by module."""
    with patch.object(BlockRuns, "step", lambda *args: None):
        return decode(model)


def prefill(model: PreTrainedModel, bits: str = "14") -> float:
    """Tokens per second."""
    prompt = torch.randint(0, 40000, (1, DOCUMENT), generator=torch.Generator().manual_seed(0))
    with patch.dict(os.environ, {ACTIVATION_VARIABLE: bits}), torch.no_grad():
        start = time.perf_counter()
        model(prompt, use_cache=True, logits_to_keep=1)
        return DOCUMENT / (time.perf_counter() - start)


def document(model: PreTrainedModel) -> float:
    """Seconds."""
    start = time.perf_counter()
    generate(model, DOCUMENT, SUMMARY)
    return time.perf_counter() - start


def main(
    compressed: str,
    dense: str,
    threads: Annotated[int, typer.Option()],
    llama_bench: str = "llama-bench",
    gguf: Annotated[list[Path] | None, typer.Option(help="Files for llama-bench; repeat for several.")] = None,
    rounds: int = 3,
) -> None:
    """Print one JSON line per contender."""
    torch.set_num_threads(threads)
    slab, head = load(compressed), with_int8_head(compressed)
    wide, narrow = load(dense, dtype=torch.float32), load(dense, dtype=torch.bfloat16)
    models = {"slab+": slab, "dense float32": wide, "dense bfloat16": narrow}
    runs: dict[str, Callable[[], float]] = {
        **{f"decode, {name}": partial(decode, model) for name, model in models.items()},
        "decode, slab+ with a head of 8 bits": partial(decode, head),
        "decode, slab+ unfused": partial(unfused, slab),
        **{f"prefill, {name}": partial(prefill, model) for name, model in models.items()},
        "prefill, slab+ with 8-bit activations": partial(prefill, slab, "8"),
        **{f"document, {name} (s)": partial(document, model) for name, model in models.items()},
    }
    for file in gguf or []:
        program = LlamaBench(str(file), llama_bench)
        runs[f"decode, {file.stem}"] = lambda program=program: program.run(Workload(PROMPT, NEW), threads).decode
        runs[f"prefill, {file.stem}"] = lambda program=program: program.run(Workload(DOCUMENT, 2), threads).prefill
    results: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            results[name].append(round(run(), 2))
    for name, values in results.items():
        print(json.dumps({"run": name, "threads": threads, "median": statistics.median(values), "rounds": values}))


if __name__ == "__main__":
    typer.run(main)
