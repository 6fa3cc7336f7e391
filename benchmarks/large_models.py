"""What `slab+` at 4 bits would take for models that are larger than any machine at hand: memory per rank, and hours.

Memory is `slablm plan`'s: it comes from shapes. Hours are counted work over rates that were measured on something
smaller, and assume that rates stay the same:

    H100    decomposition: the layers of a Llama-3-8B, and calibration: four of its blocks with 128 windows of 2,048
            tokens, files included (experiments/gpu/h100.json)
    CPU     decomposition: one matrix of 1,024 × 2,048, and calibration: a bfloat16 product of 1,024³, each on one core
            of this machine, now; 32 cores are taken to be 32 times as fast

Not in it: reading and writing files, exchanges between ranks, the sensitivities of a block. One factorisation per
expert is counted, as it is done.

    python benchmarks/large_models.py            # 10 minutes
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from slablm import CompressionConfig, plan
from slablm.calibration.stream import windows_held
from slablm.calibration.windows import UNSEEN_WINDOWS
from slablm.compression.layer import compress_layer, cost
from slablm.compression.options import RunOptions
from slablm.methods import LayerStats
from slablm.planning.checks import Outlook
from slablm.planning.timing import busiest_share
from slablm.system.distributed import World
from slablm.system.float32 import fast_float32

H100 = Path(__file__).parent.parent / "experiments/gpu/h100.json"
SETTINGS = CompressionConfig("slab+", calibration="builtin")
SMALL, CORES = (1024, 2048), 32


def llama(hidden: int, intermediate: int, blocks: int, heads: int) -> LlamaConfig:
    """A Llama 3 with 8 key/value heads."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
    )


# Published shapes.
MODELS: dict[str, PretrainedConfig] = {
    "Llama-3.1-70B": llama(8192, 28672, 80, 64),
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        hidden_size=4096,
        moe_intermediate_size=1536,
        num_hidden_layers=94,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151936,
        max_position_embeddings=40960,
    ),
    "gpt-oss-120b": GptOssConfig(num_hidden_layers=36, num_local_experts=128, num_experts_per_tok=4),
}


def outlook(config: PretrainedConfig, ranks: int) -> Outlook:
    """What `slablm plan --ranks` says."""
    config.dtype = "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        found = plan(folder, SETTINGS, options=RunOptions(world=World(size=ranks)), measure_speed=False).outlook
    assert found is not None
    return found


def work(model: Outlook) -> tuple[float, float]:
    """Floating-point operations of calibration, and the cost of all decompositions."""
    windows = SETTINGS.num_samples + UNSEEN_WINDOWS
    flops = sum(
        block.count * (windows * block.statistics.flops + (windows + UNSEEN_WINDOWS) * block.propagation.flops)
        for block in model.rehearsal.blocks
    )
    return flops, sum(cost(layer.shape, "slab+") for layer in model.size.layers)


def h100_rates() -> tuple[float, float]:
    """Operations and cost per second on one H100."""
    measured: dict[str, Any] = json.loads(H100.read_text(encoding="utf-8"))
    whole = outlook(llama(4096, 14336, 32, 32), 1)
    flops, total = work(whole)
    blocks, decomposition = measured["model"]["blocks"], measured["decomposition_seconds"]["slab+ Llama-3-8B"]
    calibration = measured["model"]["compression_seconds"] - decomposition * blocks / 32
    return flops * blocks / 32 / calibration, total / decomposition


@torch.no_grad()
@fast_float32()
def core_rates() -> tuple[float, float]:
    """The same on one core here."""
    torch.set_num_threads(1)
    a = torch.randn(1024, 1024).bfloat16()
    weight, inputs = torch.randn(SMALL), torch.randn(2 * SMALL[1], SMALL[1])
    gram = inputs.T @ inputs
    stats = LayerStats(inputs.square().sum(0).sqrt(), len(inputs), inputs[:512], gram, gram.clone(), inputs[:512])
    products, layers = (
        min(_seconds(run) for _ in range(3))
        for run in (lambda: a @ a, lambda: compress_layer("", weight, stats, SETTINGS))
    )
    return 2 * 1024**3 / products, cost(SMALL, "slab+") / layers


def _seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Print the rates and a table."""
    h100, core = h100_rates(), core_rates()
    print(f"H100: {h100[0]:.3g} operations/s, cost {h100[1]:.3g}/s; one core: {core[0]:.3g}, {core[1]:.3g}")
    print("model | machine | memory per rank | while | hours: calibration + decomposition")
    for name, config in MODELS.items():
        for machine, ranks, speed in (
            ("1 H100", 1, h100),
            ("4 H100", 4, h100),
            ("8 H100", 8, h100),
            (f"{CORES} cores, 4 ranks", 4, (core[0] * CORES / 4, core[1] * CORES / 4)),
        ):
            model = outlook(config, ranks)
            flops, total = work(model)
            held = max(windows_held(SETTINGS.num_samples, UNSEEN_WINDOWS, ranks))
            share = held / (SETTINGS.num_samples + 2 * UNSEEN_WINDOWS)
            busiest = busiest_share(model.rehearsal, model.size, "slab+", ranks)
            hours = flops * share / speed[0] / 3600, total * busiest / speed[1] / 3600
            memory = model.memory.peak_bytes - model.memory.base_bytes
            print(
                f"{name} | {machine} | {memory / 1e9:.0f} GB | {model.memory.largest.name} | "
                f"{sum(hours):.1f}: {hours[0]:.1f} + {hours[1]:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
