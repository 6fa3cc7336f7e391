"""The model card (README.md) of a compressed checkpoint: what was done, with which settings, and the measured sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jinja2

from slablm.checkpoint.layer_report import LayerReport, error_summary, size_summary
from slablm.system.memory import human_bytes

if TYPE_CHECKING:
    from slablm.config import CompressionConfig

TEMPLATE = """\
---
library_name: transformers
{% if hub_id %}base_model: {{ base }}
{% endif -%}
pipeline_tag: text-generation
tags: [slablm, slab, compressed, sparse, low-rank]
---
# {{ title }}, compressed by slablm

`{{ base }}`, compressed without retraining by method **{{ config.method }}** {{ size }}
with [slablm](https://pypi.org/project/slablm/) {{ version }}.

| | |
|---|---|
| compression ratio (paper's accounting) | {{ "%.4f" | format(ratio) }} |
| true bits per weight (packed tensors over target weights) | {{ "%.3f" | format(bits) }} |
| compressed layers | {{ layers }} ({{ "%.1f" | format(weights / 1e6) }} M weights, {{ packed }}) |
| mean relative output error on calibration text | {{ "%.4f" | format(errors.output_error) }} |
{% if errors.unseen_error is not none -%}
| the same on text that calibrated nothing | {{ "%.4f" | format(errors.unseen_error) }} |
{% endif -%}
{% for key, value in settings.items() -%}
| `{{ key }}` | {{ value }} |
{% endfor %}
{% if left_dense -%}
Left dense inside the blocks: {% for name, reason in left_dense.items() %}`{{ name }}` ({{ reason }})
{%- if not loop.last %}, {% endif %}{% endfor %}.
{% endif %}
## Use

```python
import slablm  # registers the format
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

Method: SLaB, arXiv 2604.04493. No quality was measured while compressing: run `slablm eval` on your own text.
"""


def model_card(
    source: str, config: CompressionConfig, reports: list[LayerReport], left_dense: dict[str, str], version: str
) -> str:
    """Text of the model card.

    Args:
        source: the dense model, as the user named it.
        config: the settings.
        reports: one per compressed layer.
        left_dense: matrices inside the blocks that were left dense, with the reason.
        version: version of slablm.
    """
    summary, budget = size_summary(reports), config.bits_per_weight
    title = source.rstrip("/").rpartition("/")[2]
    environment = jinja2.Environment(autoescape=False, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(
        hub_id=source.count("/") == 1 and not source.startswith((".", "/")),
        # A local path says nothing to a reader and too much about the writer.
        base=source if source.count("/") <= 1 and not source.startswith((".", "/")) else title,
        title=title,
        version=version,
        config=config,
        size=f"at ratio {config.ratio}" if budget is None else f"with a budget of {budget:g} true bits per weight",
        settings=_shown_settings(config),
        ratio=summary["compression_ratio"],
        bits=summary["bits_per_weight"],
        layers=len(reports),
        weights=summary["weights"],
        packed=human_bytes(summary["packed_bytes"]),
        errors=error_summary(reports),
        left_dense=left_dense,
    )


def _shown_settings(config: CompressionConfig) -> dict[str, Any]:
    """Settings worth a row; a calibration file by its name only."""
    settings = config.to_dict()
    for key in ("method", "ratio", "value_bits", "group_size"):  # shown above, or of the quantizers
        del settings[key]
    settings["calibration"] = config.calibration.rpartition("/")[2]
    return {
        key: ", ".join(value) if isinstance(value, list) else value for key, value in settings.items() if value != []
    }
