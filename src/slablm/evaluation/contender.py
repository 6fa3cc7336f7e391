"""What a benchmark compares: a model in one form, loaded here or, to measure its memory, in a process of its own.

The peak of a process never goes down, and freed memory is not always given back. So memory is measured in a fresh
process that loads one contender, reads the prompt, writes a few tokens and tells its resident set and its peak. This
file is also that process: ``python -m slablm.evaluation.contender``.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from slablm.errors import SlabError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens that the process writes: enough for the cache and the buffers of decoding to exist.
FOOTPRINT_NEW_TOKENS = 4


@dataclass(frozen=True)
class Footprint:
    """Memory of a process that holds one contender, in bytes; None where the system does not tell.

    Attributes:
        before: resident set before the model is loaded: Python, torch and transformers.
        resident: resident set after reading a prompt and writing a few tokens, garbage collected.
        peak: largest resident set, loading included.
    """

    before: int | None
    resident: int | None
    peak: int | None


@dataclass(frozen=True)
class Contender:
    """A model in one form.

    Attributes:
        name: how tables call it.
        source: as for `slablm.dense.loading.load`.
        dtype: as for `slablm.dense.loading.load`.
        value_bits: 16 runs a model as it is loaded, 8 a compressed one with 8-bit values.
        options: further arguments of `slablm.dense.loading.load`.
    """

    name: str
    source: str
    dtype: str = "auto"
    value_bits: int = 16
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> PreTrainedModel:
        """The model, in eval mode, on the CPU.

        Raises:
            SlabError: it cannot be loaded, or has no 8-bit form.
        """
        from slablm.dense import loading

        model, _ = loading.load(self.source, dtype=self.dtype, **self.options)
        if self.value_bits != 16:
            _use_value_bits(model, self.value_bits, self.source)
        return model

    def footprint(self, prompt_tokens: int) -> Footprint:
        """Measure the memory in a process of its own.

        Args:
            prompt_tokens: tokens to read before looking.

        Raises:
            SlabError: the model cannot be loaded, has no such form or no room for the prompt, or the process failed.
        """
        request = json.dumps({"contender": asdict(self), "prompt_tokens": prompt_tokens})
        command = [sys.executable, "-m", "slablm.evaluation.contender", request]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise SlabError(f"{self.name}: memory could not be measured: {reason}")
        answer = json.loads(done.stdout.splitlines()[-1])
        if "error" in answer:
            raise SlabError(answer["error"])
        return Footprint(**answer)


def _use_value_bits(model: PreTrainedModel, value_bits: int, source: str) -> None:
    from slablm.checkpoint import hf
    from slablm.runtime import kernels
    from slablm.runtime.linear import SlabLinear

    if not any(isinstance(layer, SlabLinear) for layer in model.modules()):
        raise SlabError(f"{source} is not compressed: {value_bits}-bit values are a form of compressed models")
    if kernels.backend().library is None:
        raise SlabError(f"{value_bits}-bit values need the compiled kernels, and here is {kernels.explain()}")
    hf.use_kernels(model, value_bits)


def _measure_footprint(contender: Contender, prompt_tokens: int) -> Footprint:
    """In a fresh process: load, read, write, look."""
    from transformers import AutoModelForCausalLM  # noqa: F401 (belongs to what is there before the model)

    import slablm.checkpoint.hf  # noqa: F401
    from slablm.dense.loading import quiet_libraries
    from slablm.evaluation.speed import Workload, prompt, write
    from slablm.system.memory import peak_resident_bytes, resident_bytes

    quiet_libraries()
    before = resident_bytes()
    model = contender.load()
    workload = Workload(prompt_tokens, FOOTPRINT_NEW_TOKENS)
    workload.check(contender.name, model)
    write(model, prompt(model, workload.prompt_tokens), workload.new_tokens)
    gc.collect()
    return Footprint(before, resident_bytes(), peak_resident_bytes())


def main() -> None:
    """Answer one request of `Contender.footprint`."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    request = json.loads(sys.argv[1])
    try:
        answer = asdict(_measure_footprint(Contender(**request["contender"]), request["prompt_tokens"]))
    except SlabError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
