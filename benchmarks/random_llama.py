"""A random Llama beside llama.cpp, of 1B shapes or others: speed does not depend on what weights say.

    python benchmarks/random_llama.py write TEMPLATE.gguf random.gguf
    llama-quantize random.gguf Q4_K_M.gguf Q4_K_M
    OMP_NUM_THREADS=2 python benchmarks/random_llama.py compare Q4_K_M.gguf --llama-bench llama-bench --threads 1,2

Other shapes: `write --hidden 4096 --mlp 11008 --blocks 6`.

`write` makes the file in F16; settings that are not shapes, and the vocabulary, are those of the template, any GGUF
file of a Llama. `compare` makes the model with layers in random symbols and measures both in turns, as `slablm bench`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gguf
import numpy as np
import torch
import typer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from slablm import CompressionConfig
from slablm.compression.preparation import use_head_bits
from slablm.evaluation.llama_bench import LlamaBench
from slablm.evaluation.speed import Workload, measure_speed, weight_bytes
from slablm.methods.rotation import Rotation, largest_block
from slablm.methods.symbols import SymbolWeight
from slablm.packing.symbols import pack_symbols
from slablm.runtime.linear import SlabLinear
from slablm.runtime.narrow import narrow_matrices
from slablm.runtime.replace_module import replace_module
from slablm.runtime.token_path import use_token_path

HEAD_DIM, QUERIES_PER_KEY, BITS = 64, 4, 4


@dataclass(frozen=True)
class Shape:
    """Of a Llama.

    Attributes:
        hidden: width of the residual stream, a multiple of 256.
        mlp: width of the MLP.
        blocks: their number.
    """

    hidden: int
    mlp: int
    blocks: int

    @property
    def heads(self) -> int:
        """Of queries."""
        return self.hidden // HEAD_DIM

    @property
    def kv_heads(self) -> int:
        """Of keys and values."""
        return self.heads // QUERIES_PER_KEY

    @classmethod
    def of(cls, reader: gguf.GGUFReader) -> Shape:
        """That of a file."""
        names = ("embedding_length", "feed_forward_length", "block_count")
        return cls(*(int(reader.fields[f"llama.{name}"].contents()) for name in names))


app = typer.Typer(add_completion=False)


@app.command()
def write(
    template: Path,
    out: Path,
    hidden: Annotated[int, typer.Option(help="Width of the residual stream, a multiple of 256.")] = 2048,
    mlp: Annotated[int, typer.Option(help="Width of the MLP.")] = 8192,
    blocks: Annotated[int, typer.Option(help="How many.")] = 16,
) -> None:
    """Write the GGUF file."""
    shape = Shape(hidden, mlp, blocks)
    reader = gguf.GGUFReader(template)
    vocabulary = len(reader.fields["tokenizer.ggml.tokens"].data)
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if name.startswith("tokenizer.") or name == "llama.attention.layer_norm_rms_epsilon":
            of = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], of)
    writer.add_block_count(shape.blocks)
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    generator = np.random.default_rng(0)
    for name, size in tensors(vocabulary, shape).items():
        random = generator.standard_normal(size, dtype=np.float32)
        writer.add_tensor(name, (0.02 * random).astype(np.float16) if len(size) == 2 else 1 + 0 * random)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(vocabulary: int, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Sizes by GGUF's names; the head is the embedding."""
    n, queries, keys = shape.hidden, shape.heads * HEAD_DIM, shape.kv_heads * HEAD_DIM
    block = {
        "attn_norm": (n,),
        "ffn_norm": (n,),
        "attn_q": (queries, n),
        "attn_k": (keys, n),
        "attn_v": (keys, n),
        "attn_output": (n, queries),
        "ffn_gate": (shape.mlp, n),
        "ffn_up": (shape.mlp, n),
        "ffn_down": (n, shape.mlp),
    }
    blocks = {f"blk.{i}.{name}.weight": size for i in range(shape.blocks) for name, size in block.items()}
    return {"token_embd.weight": (vocabulary, n), "output_norm.weight": (n,), **blocks}


def random_model(vocabulary: int, shape: Shape, head_bits: int) -> LlamaForCausalLM:
    """In float32, its layers in symbols of 4 bits with rotated inputs, embedding and head in 16 bits or 8."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and name != "lm_head":
            rows, columns = linear.weight.shape
            codes = torch.randint(0, 2**BITS, (rows, columns), dtype=torch.uint8)
            levels = torch.linspace(-128, 127, 2**BITS).to(torch.int8)
            scales = torch.full((rows,), 0.02 * 3**0.5).half()  # entries have the deviation of a fresh model's
            rotation = Rotation(columns, largest_block(columns), 0)
            layer = SlabLinear.from_packed(pack_symbols(SymbolWeight(codes, scales, levels, rotation)))
            layer.use_native()
            replace_module(model, name, layer)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # as a checkpoint's, which 16 bits hold without loss
    with torch.no_grad():
        use_head_bits(model, CompressionConfig(head_bits=head_bits))
    narrow_matrices(model, torch.bfloat16)
    assert use_token_path(model) == shape.blocks
    return model


@app.command()
def compare(
    files: list[Path],
    llama_bench: str = "llama-bench",
    threads: str = "1,2",
    rounds: int = 3,
    head_bits: Annotated[int, typer.Option(help="Of embedding and head: 16 or 8.")] = 16,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
) -> None:
    """Print one JSON line per contender and number of threads."""
    programs = {file.stem: LlamaBench(str(file), llama_bench) for file in files}
    reader = gguf.GGUFReader(files[0])
    vocabulary = len(reader.fields["tokenizer.ggml.tokens"].data)
    model = random_model(vocabulary, Shape.of(reader), head_bits)
    counts = [int(count) for count in threads.split(",")]
    speeds = measure_speed({"slab+": model, **programs}, Workload(prompt_tokens, new_tokens), rounds, counts)
    own = {speed.threads: speed for speed in speeds if speed.contender == "slab+"}
    sizes = {"slab+": weight_bytes(model)} | {name: program.weight_bytes() for name, program in programs.items()}
    for speed in speeds:
        line = {"contender": speed.contender, "threads": speed.threads, "bytes": sizes[speed.contender]}
        for quantity in ("decode", "prefill"):
            samples = getattr(speed, quantity)
            line |= {
                quantity: samples.values,
                f"slab+ / it, {quantity}": getattr(own[speed.threads], quantity).ratio_to(samples),
            }
        print(json.dumps(line))


if __name__ == "__main__":
    app()
