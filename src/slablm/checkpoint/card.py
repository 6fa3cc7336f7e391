"""The model card (README.md) of a compressed checkpoint: what was done, with which settings, and the measured sizes.

The head, in YAML, is for the hub; licence and languages are those of the dense model, as its own card gives them. Names
may hold anything: what means something to Markdown is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from huggingface_hub import ModelCardData, hf_hub_download, metadata_load

from slablm.checkpoint.layer_report import (
    FEW_TOKENS,
    MOST_SHOWN,
    LayerReport,
    error_summary,
    rarely_chosen,
    size_summary,
)
from slablm.config import CompressionConfig, Excerpt
from slablm.system.memory import human_bytes
from slablm.system.versions import __version__

if TYPE_CHECKING:
    from slablm.methods.drift import Drift

CARD = "README.md"
# What the example in the card loads; uploading puts the model's name there.
FOLDER = "path/to/this/folder"
_RESULTS = """\
## Measured

| what | result | how |
|---|---|---|
"""
_INHERITED = ("license", "license_name", "license_link", "language")
TEMPLATE = """\
---
{{ head }}
---
# {{ title | plain }}, compressed by slablm

{{ base | code }}, compressed without retraining by method **{{ config.method }}** {{ size }}
with [slablm](https://pypi.org/project/slablm/) {{ version }}.

| | |
|---|---|
| compression ratio (paper's accounting) | {{ "%.4f" | format(ratio) }} |
| true bits per weight (packed tensors over target weights) | {{ "%.3f" | format(bits) }} |
{% if model_bits is not none -%}
| the same of the whole model (files over all weights) | {{ "%.3f" | format(model_bits) }} |
{% endif -%}
| compressed layers | {{ layers }} ({{ "%.1f" | format(weights / 1e6) }} M weights, {{ packed }}) |
| mean relative output error on calibration text | {{ "%.4f" | format(errors.output_error) }} |
{% if errors.unseen_error is not none -%}
| the same on text that calibrated nothing | {{ "%.4f" | format(errors.unseen_error) }} |
{% endif -%}
{% if drift is not none -%}
| drift of the hidden states behind the last block, on that text | {{ "%.4f" | format(drift) }} |
{% endif -%}
| head and embedding | {{ config.head_bits }} bits |
{% for key, value in settings.items() -%}
| `{{ key }}` | {{ value | cell }} |
{% endfor %}

Output error: ‖(W − Ŵ)X‖ / ‖WX‖ of a layer, the mean of all; X are its inputs at 512 tokens at most, drawn at random.
{% if drift is not none -%}
Drift: ‖H′ − H‖ / ‖H‖ of the compressed model's hidden states H′ from the dense model's H, on two windows of the
calibration text that calibrated nothing, without their first tokens.
{% endif %}

{% if left_dense -%}
Left dense inside the blocks: {% for name, reason in left_dense.items() %}{{ name | code }} ({{ reason | plain }})
{%- if not loop.last %}, {% endif %}{% endfor %}.

{% endif %}
{% if rarely_chosen -%}
Experts that the router sent fewer than {{ few_tokens }} calibration tokens to: {{ rarely_chosen | length }}
({% for name, tokens in (rarely_chosen.items() | list)[:most_shown] %}{{ name | code }} {{ tokens }}
{%- if not loop.last %}, {% endif %}{% endfor %}
{%- if rarely_chosen | length > most_shown %} and others{% endif %}).

{% endif %}
## Use

Once slablm is installed (`pip install slablm`), transformers and what is built on it load the model:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{{ folder }}")
tokenizer = AutoTokenizer.from_pretrained("{{ folder }}")
```

Method: SLaB, arXiv 2604.04493.
"""


def model_card(
    source: str,
    config: CompressionConfig,
    reports: list[LayerReport],
    left_dense: dict[str, str],
    revision: str | None = None,
    drift: Sequence[Drift] = (),
    *,
    model_bits: float | None = None,
) -> str:
    """Text of the model card.

    Args:
        source: the dense model, as the user named it.
        config: the settings.
        reports: one per compressed layer.
        left_dense: matrices inside the blocks that were left dense, with the reason.
        revision: of the dense model on the hub.
        drift: behind every block; empty if it was not measured.
        model_bits: true bits per weight of the whole model; None where the files are not written yet.
    """
    summary, budget = size_summary(reports), config.bits_per_weight
    ratio = summary["compression_ratio"]
    title = source.rstrip("/").rpartition("/")[2]
    environment = jinja2.Environment(autoescape=False, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"code": _code, "cell": _cell, "plain": _plain}
    return environment.from_string(TEMPLATE).render(
        head=_head(source, revision).to_yaml(),
        # A local path says nothing to a reader and too much about the writer.
        base=source if _is_hub_id(source) else title,
        title=title,
        version=__version__,
        folder=FOLDER,
        config=config,
        size=f"to a ratio of {ratio:.4f}" if budget is None else f"with a budget of {budget:g} true bits per weight",
        settings=_shown_settings(config),
        ratio=ratio,
        bits=summary["bits_per_weight"],
        layers=len(reports),
        weights=summary["weights"],
        packed=human_bytes(summary["packed_bytes"]),
        errors=error_summary(reports),
        drift=drift[-1].rest if drift else None,
        left_dense=left_dense,
        model_bits=model_bits,
        rarely_chosen=rarely_chosen(reports),
        few_tokens=FEW_TOKENS,
        most_shown=MOST_SHOWN,
    )


def add_results(folder: Path, results: Sequence[tuple[str, str]], how: str) -> None:
    """Write measured numbers into a folder's card, with how they were measured; of the same ones the last counts.

    Args:
        folder: holds the card.
        results: what was measured, and the number.
        how: the protocol.
    """
    path = folder / CARD
    text = path.read_text(encoding="utf-8")
    if _RESULTS not in text:
        before, use, after = text.partition("## Use\n")
        text = f"{before.rstrip()}\n\n{_RESULTS}\n{use}{after}"
    top, _, rest = text.partition(_RESULTS)
    rows = list(takewhile(lambda line: line.startswith("|"), rest.splitlines()))
    others = rest.splitlines()[len(rows) :]
    for what, number in results:
        start, end = f"| {_plain(what)} | ", f" | {_plain(how)} |"
        rows = [row for row in rows if not (row.startswith(start) and row.endswith(end))]
        rows.append(f"{start}{_plain(number)}{end}")
    path.write_text(top + _RESULTS + "\n".join([*rows, *others]) + "\n", encoding="utf-8")


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/")) and not Path(source).exists()


def _head(source: str, revision: str | None) -> ModelCardData:
    """What the hub reads."""
    known: dict[str, Any] = _inherited(source, revision)
    if _is_hub_id(source):
        known |= {"base_model": source, "base_model_relation": "quantized"}
    tags = ["slablm", "slab", "compressed"]
    return ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, **known)


def _inherited(source: str, revision: str | None) -> dict[str, Any]:
    """Licence and languages of the dense model; nothing where its card is not at hand or cannot be read."""
    try:
        file = Path(source, CARD)
        if _is_hub_id(source):
            file = Path(hf_hub_download(source, file.name, revision=revision))
        data = metadata_load(file) or {}
    except Exception:  # no card, no network, no YAML: there is nothing to pass on, and no reason to fail
        return {}
    found = {name: data.get(name) for name in _INHERITED}
    return {name: value for name, value in found.items() if isinstance(value, str) or (value and _is_list(value))}


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _plain(text: object) -> str:
    """Text in one line that means nothing to Markdown."""
    return re.sub(r"([\\`*\[<|])", r"\\\1", " ".join(str(text).split()))


def _code(text: object) -> str:
    """Text as code, between more backticks than it has in a row."""
    line = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"


def _cell(value: object) -> str:
    """A setting in a cell of the table; text as code."""
    return _code(value).replace("|", r"\|") if isinstance(value, str) else str(value)


def _shown_settings(config: CompressionConfig) -> dict[str, Any]:
    """Settings worth a row; a calibration file by its name only."""
    settings = config.to_dict()
    for key in ("method", "ratio", "bits_per_weight", "value_bits", "head_bits"):  # shown above, or of the quantizers
        settings.pop(key, None)
    settings["calibration"] = Excerpt.parse(config.calibration).name
    return {
        key: ", ".join(value) if isinstance(value, list) else value for key, value in settings.items() if value != []
    }
