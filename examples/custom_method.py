"""Try a method of your own beside those of slablm: one function, and one entry in the table of methods.

    python examples/custom_method.py smollm2 out

The method here keeps the entries with the largest |W| · √d: between magnitude pruning, |W|, and Wanda, |W| · d, with d
the norms of the layer's inputs. What it keeps is stored as Wanda's is, so that its trait (what is stored of a weight of
a given shape) is Wanda's, and saving, loading and kernels work as they are.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from torch import Tensor

import slablm
from slablm import CompressionConfig, Decomposition
from slablm.checkpoint.inspection import inspect_folder
from slablm.checkpoint.layer_report import error_summary
from slablm.methods import METHODS, LayerStats
from slablm.methods.pruning import wanda

NAME = "root-wanda"


def root_wanda(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> Decomposition:
    """Prune by |W| · √d.

    Args:
        weight: [m, n].
        stats: `input_norms`, [n].
        config: `ratio` and `pattern`.
    """
    return wanda(weight, replace(stats, input_norms=stats.input_norms.sqrt()), config)


def main(arguments: list[str] | None = None) -> None:
    """Compress by three methods, print the errors of their layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local folder or smollm2")
    parser.add_argument("out", type=Path, help="folder for the compressed models")
    parser.add_argument("--calibration", default="builtin", help="c4, builtin, self or a text file")
    parser.add_argument("--num-samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per window")
    options = parser.parse_args(arguments)

    METHODS[NAME] = replace(METHODS["wanda"], function=root_wanda)
    for name in ("magnitude", NAME, "wanda"):
        config = CompressionConfig(
            name, calibration=options.calibration, num_samples=options.num_samples, seq_len=options.seq_len
        )
        model = slablm.compress(options.model, config)
        model.save_pretrained(options.out / name)
        errors = error_summary(inspect_folder(options.out / name).layers)
        print(f"{name}: mean relative output error {errors['output_error']:.4f}, unseen {errors['unseen_error']:.4f}")


if __name__ == "__main__":
    main()
