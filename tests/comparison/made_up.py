"""Made-up records of a comparison."""

import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

from slablm import CompressionConfig
from slablm.comparison.cells import Cell
from slablm.comparison.records import OnText, Record
from slablm.comparison.rivals import Rival
from slablm.evaluation.divergence import Divergence
from slablm.evaluation.perplexity import Perplexity
from slablm.methods.drift import Drift

PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def record(method, loss, bits, *, windows=6, accuracy=None, **settings):
    """A made-up cell; windows and questions have difficulties that all methods share."""
    config = None if method == "dense" else CompressionConfig(method=method, **settings)
    # A string seeds the generator the same way in every process.
    noise = random.Random(f"{method} {settings}")
    losses = tuple(loss + 0.3 * math.sin(i) + 0.01 * noise.gauss(0, 1) for i in range(windows))
    accuracies = None
    if accuracy is not None:
        accuracies = {
            task: task_result([int(noise.random() < accuracy) for _ in range(40)])
            for task in ("arc_easy", "piqa", "winogrande")
        }
    layers = [f"model.layers.{depth}.{projection}" for depth in range(4) for projection in PROJECTIONS]
    return Record(
        key=f"{method} {settings}",
        cell=Cell(config),
        conditions={},
        compression_ratio=1 - bits / 16,
        bits_per_weight=bits,
        texts={"wikitext2": on_text(losses, config), "c4@1-6": on_text([loss + 0.1 for loss in losses], config)},
        layer_errors={name: 0.1 + 0.2 * noise.random() for name in layers} if config else {},
        unseen_errors=dict.fromkeys(layers, 0.4321) if config else {},
        drift=(Drift(0.01, 0.1), Drift(0.02, 0.2345)) if config else (),
        seconds={"load": 0.1, "compress": 12.3, "perplexity": 0.2},
        peak_memory_bytes=None,
        versions={"slablm": "0.1.0", "torch": "2.13"},
        accuracies=accuracies,
        model_bits_per_weight=bits + 0.77,
    )


def on_text(losses, config):
    kl = Divergence(tuple(loss - 2 for loss in losses), 0.0123, 1.23) if config else None
    return OnText(Perplexity(tuple(losses), 31), math.exp(statistics.fmean(losses) - 3), kl)


def drawn(method, losses, bits, **settings):
    """The same cell of several draws."""
    return [record(method, loss, bits, seed=seed, **settings) for seed, loss in enumerate(losses)]


def from_file(name, loss, bits):
    return replace(record("rtn", loss, bits), cell=Cell(rival=Rival(name, Path(f"{name}.gguf"))), layer_errors={})


def task_result(correct):
    mean = statistics.fmean(correct)
    stderr = statistics.stdev(correct) / math.sqrt(len(correct))
    return {"acc": mean, "stderr": stderr, "n": len(correct), "correct": correct}


def small(**options):
    return [
        record("dense", 3.0, 16, **options),
        record("slab", 3.3, 8.6, **options),
        record("wanda", 3.8, 9.0, **options),
        record("sparsegpt", 3.7, 9.0, **options),
    ]
