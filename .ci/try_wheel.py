"""Tries an installed slablm: which kernels it has, and whether it compresses a tiny random model that then runs.

Usage: python .ci/try_wheel.py {compiled,reference}. `.ci/wheel` runs it where there is no compiler.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SETTINGS = ("--calibration", "builtin", "--num-samples", "4", "--seq-len", "32")


def main() -> None:
    """Run it; the exit status is 1 if anything is not as it should be."""
    expected = sys.argv[1]
    assert shutil.which("cc") is None, "there is a compiler on PATH"
    facts = json.loads(slablm("doctor", "--json"))
    print(f"CPU kernels: {facts['cpu_kernels']}, {facts['cpu_kernels_reason']}")
    assert (facts["cpu_kernels"] == "reference") == (expected == "reference"), "not the kernels of this wheel"
    with tempfile.TemporaryDirectory() as folder:
        dense, out = f"{folder}/dense", f"{folder}/out"
        write_model(dense)
        slablm("compress", dense, out, *SETTINGS)
        slablm("inspect", out)
        print(slablm("eval", out, "--text", "builtin", "--max-windows", "2", "--seq-len", "64").strip())
        slablm("generate", out, "The sea", "--max-new-tokens", "4")
    print("the wheel works")


def slablm(*arguments: str) -> str:
    """What a command prints; it ends this program if it fails."""
    command = [str(Path(sys.executable).with_name("slablm")), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def write_model(folder: str) -> None:
    """A random Llama of two blocks whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet), **sizes)).save_pretrained(folder)


if __name__ == "__main__":
    main()
