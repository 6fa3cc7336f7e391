"""Compress a model on a text of your own, and see on windows of it that calibrated nothing what that is worth.

    python examples/own_calibration_text.py smollm2 my-text.txt out

Calibration says which inputs count. Text of the kind that the model will read is the best there is; what is judged on
must be other windows of it. Half an hour for a model of 135M parameters on two cores with the default sizes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from slablm import CompressionConfig
from slablm.api import compress_folder
from slablm.calibration.windows import EvaluationText
from slablm.dense import loading
from slablm.evaluation import perplexity


def main(arguments: list[str] | None = None) -> None:
    """Compress, evaluate both models, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local folder or smollm2")
    parser.add_argument("text", help="a text file; its first windows calibrate, the last ones judge")
    parser.add_argument("out", type=Path, help="folder for the compressed model")
    parser.add_argument("--num-samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per window")
    parser.add_argument("--windows", type=int, default=8, help="windows to judge on")
    options = parser.parse_args(arguments)

    # Two windows more than those that calibrate: on these the errors in the report are measured.
    used = options.num_samples + 2
    config = CompressionConfig(
        calibration=f"{options.text}@0-{used - 1}", num_samples=options.num_samples, seq_len=options.seq_len
    )
    compress_folder(options.model, options.out, config, say=print)

    text = EvaluationText.read(f"{options.text}@{used}-/{options.windows}", options.seq_len)
    for name, source in (("dense", options.model), ("compressed", str(options.out))):
        model, tokenizer = loading.load(source)
        found = perplexity(model, text.cut(tokenizer, options.seq_len).ids)
        print(f"{name}: perplexity {found.value:.2f} ± {found.stderr:.2f} on unseen windows of {options.text}")


if __name__ == "__main__":
    main()
