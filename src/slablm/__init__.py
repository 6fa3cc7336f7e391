"""One-shot compression of large language models by SLaB (arXiv 2604.04493).

    import slablm
    model = slablm.compress("path/or/hub-id", slablm.CompressionConfig(ratio=0.5))
    model.save_pretrained("out")

After ``import slablm``, a plain ``AutoModelForCausalLM.from_pretrained("out")`` loads the result.

Importing is instant: the names below load on first use, and the transformers plug-in registers itself as soon as
transformers' quantizer registry is there, whichever of the two is imported first.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

from slablm.errors import SlabError
from slablm.system.versions import __version__

if TYPE_CHECKING:
    from slablm.api import compress, decompose
    from slablm.config import CompressionConfig
    from slablm.methods import Decomposition
    from slablm.planning.plan import Plan, plan
    from slablm.runtime.linear import SlabLinear

__all__ = [
    "CompressionConfig",
    "Decomposition",
    "Plan",
    "SlabError",
    "SlabLinear",
    "__version__",
    "compress",
    "decompose",
    "plan",
]

_HOMES = {
    "CompressionConfig": "slablm.config",
    "Decomposition": "slablm.methods",
    "Plan": "slablm.planning.plan",
    "SlabLinear": "slablm.runtime.linear",
    "compress": "slablm.api",
    "decompose": "slablm.api",
    "plan": "slablm.planning.plan",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'slablm' has no attribute {name!r}")


@wrapt.when_imported("transformers.quantizers.auto")
def _register(module: Any) -> None:
    """Register the format with transformers."""
    import_module("slablm.checkpoint.hf")
