"""Peak memory of ``slablm compress`` on a generated Llama, and again with twice the depth or with more text.

The models have random FP16 weights in several shards. Every measurement is a process of its own. "Above the
interpreter" is the peak of a compression minus the peak of a process that only makes the same imports and runs one
small product.

    python benchmarks/memory.py --layers 26 --hidden-size 1792 --intermediate-size 4864 --vocab-size 32000 \
        --shard-size 500MB --num-samples 8 --seq-len 512       # 2.3 GB, then 4.3 GB
    python benchmarks/memory.py --method slab+ --seq-len 64 --then-samples 128      # the same depth, more text
    python benchmarks/memory.py --ceiling 1.2GB                # the kernel enforces it (RLIMIT_DATA above the imports)
    python benchmarks/memory.py --ranks 4 --method slab+       # of each of several processes, and what was planned

The ceiling is on private writable memory (heap, stacks, anonymous maps), the kind that cannot be taken back.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from slablm.checkpoint.shards import Piece, write_tensors
from slablm.system.memory import human_bytes, parse_bytes

# What every compression imports, and nothing of its work; prints peak resident and private bytes.
BARE = """
import json, re, pathlib
import torch, transformers, slablm.compression.run, slablm.cli, slablm.checkpoint.inspection, accelerate
from transformers.models.llama import modeling_llama
torch.randn(300, 300) @ torch.randn(300, 300)
from slablm.system.memory import peak_resident_bytes
private = re.search(r"VmData:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())
print(json.dumps([peak_resident_bytes(), int(private[1]) * 1024]))
"""
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)
sys.argv = ["slablm", *sys.argv[2:]]
from slablm.cli import main
main()
"""
RANKED = """
import os, pathlib, sys
from slablm.cli import main
from slablm.system.memory import peak_resident_bytes
try:
    main()
finally:
    pathlib.Path(os.environ["PEAKS"], os.environ["RANK"]).write_text(str(peak_resident_bytes()))
"""


def generate(folder: Path, layers: int, options: argparse.Namespace) -> int:
    """Write a random Llama in shards, one shard in memory at a time; returns the bytes of its tensors."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=options.hidden_size // 64,
        num_key_value_heads=options.hidden_size // 64,
        max_position_embeddings=options.seq_len,
        architectures=["LlamaForCausalLM"],
        dtype="float16",
    )
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    limit, shards, filled = parse_bytes(options.shard_size, "--shard-size"), [[]], 0
    for name, shape in shapes.items():
        if shards[-1] and filled + _bytes(shape) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _bytes(shape)
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        pieces = {name: Piece.of(_random(shapes[name], generator)) for name in names}
        write_tensors(folder / file, pieces, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(map(_bytes, shapes.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def byte_tokenizer() -> Any:
    """A tokenizer of the 256 bytes, with ``<s>`` as BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(["<s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * torch.Size(shape).numel()


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.float16)
    return torch.randn(shape, generator=generator).mul_(0.02).half()


def bare_interpreter() -> tuple[int, int]:
    """Peak resident and private bytes of a process with the imports alone."""
    done = subprocess.run([sys.executable, "-c", BARE], check=True, capture_output=True, text=True)
    resident, private = json.loads(done.stdout)
    return resident, private


def arguments(verb: str, folder: Path, out: Path, options: argparse.Namespace) -> list[str]:
    """A command of slablm."""
    command = [verb, str(folder), str(out), "--calibration", "builtin", "--json", "--method", options.method]
    command += ["--num-samples", str(options.num_samples), "--seq-len", str(options.seq_len)]
    command += ["--iterations", str(options.iterations), "--dtype", options.dtype]
    return [*command, "--max-memory", options.max_memory] if options.max_memory else command


def ranks_apart(folder: Path, options: argparse.Namespace, resident: int) -> None:
    """Print the peak of every rank above the interpreter, and the plan's of the busiest one."""
    peaks, script = folder / "peaks", folder / "rank.py"
    peaks.mkdir()
    script.write_text(RANKED, encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
    command = arguments("compress", folder / "dense", folder / "out", options)
    environment = os.environ | {"PEAKS": str(peaks)}
    subprocess.run([*start, str(script), *command], check=True, stdout=subprocess.DEVNULL, env=environment)
    found = [int((peaks / str(rank)).read_text()) - resident for rank in range(options.ranks)]
    command = [*arguments("plan", folder / "dense", folder / "out2", options), "--ranks", str(options.ranks)]
    planned = subprocess.run([sys.executable, "-m", "slablm", *command], check=True, capture_output=True, text=True)
    memory = json.loads(planned.stdout)["memory"]
    print(f"{options.ranks} ranks: " + ", ".join(map(human_bytes, found)) + " above the interpreter")
    print(f"planned for the busiest: {human_bytes(memory['peak_bytes'] - memory['base_bytes'])}")


def compress(folder: Path, out: Path, options: argparse.Namespace, private: int) -> dict[str, float]:
    """One compression; what ``--json`` prints."""
    command = arguments("compress", folder, out, options)
    start = [sys.executable, "-m", "slablm"]
    if options.ceiling:
        start = [sys.executable, "-c", LIMITED, str(private + parse_bytes(options.ceiling, "--ceiling"))]
    done = subprocess.run([*start, *command], check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the compression failed with status {done.returncode}")
    return json.loads(done.stdout)


def above_the_interpreter(layers: int, samples: int, options: argparse.Namespace, resident: int, private: int) -> int:
    """Generate, compress and print one line; returns the bytes of the peak above `resident`."""
    options = argparse.Namespace(**vars(options) | {"num_samples": samples})
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary, "dense")
        folder.mkdir()
        total = generate(folder, layers, options)
        shards = len(list(folder.glob("*.safetensors")))
        result = compress(folder, Path(temporary, "out"), options, private)
    peak = int(result["peak_memory_bytes"]) - resident
    print(
        f"{layers} blocks, {human_bytes(total)} in {shards} shards, {samples} windows: "
        f"{human_bytes(peak)} above the interpreter, {result['seconds']:.0f} s, "
        f"{human_bytes(int(result['bytes_on_disk']))} written",
        flush=True,
    )
    return peak


def main() -> None:
    """Print one line per run, and the growth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--hidden-size", type=int, default=1792, help="a multiple of 64")
    parser.add_argument("--intermediate-size", type=int, default=4864)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--shard-size", default="500MB")
    parser.add_argument("--method", default="slab")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--then-samples", type=int, help="instead of twice the depth, the same with that many windows")
    parser.add_argument("--max-memory", help="as for slablm compress")
    parser.add_argument("--ceiling", help="memory a compression may take above the interpreter; it fails beyond")
    parser.add_argument("--ranks", type=int, default=1, help="processes of torchrun")
    parser.add_argument("--folder", help="where the models are written (by default a temporary folder)")
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    resident, private = bare_interpreter()
    print(f"interpreter with imports: peak {human_bytes(resident)}, private {human_bytes(private)}")
    if options.ranks > 1:
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            Path(temporary, "dense").mkdir()
            generate(Path(temporary, "dense"), options.layers, options)
            ranks_apart(Path(temporary), options, resident)
        return
    first = (options.layers, options.num_samples)
    second = (options.layers, options.then_samples) if options.then_samples else (2 * first[0], first[1])
    peaks = [above_the_interpreter(*run, options, resident, private) for run in (first, second)]
    growth = peaks[1] - peaks[0]
    print(f"growth: {'-' if growth < 0 else ''}{human_bytes(abs(growth))} ({100 * growth / peaks[0]:+.1f} %)")


if __name__ == "__main__":
    main()
