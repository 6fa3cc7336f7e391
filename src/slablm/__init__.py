"""One-shot compression of large language models by SLaB (arXiv 2604.04493).

    import slablm
    model = slablm.compress("path/or/hub-id", slablm.CompressionConfig(ratio=0.5))
    model.save_pretrained("out")

A plain ``AutoModelForCausalLM.from_pretrained("out")`` loads the result, and so does all that builds on it: see
`slablm.autoload`. Importing is instant: the names below load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slablm.autoload import register
from slablm.errors import SlabError
from slablm.system.versions import __version__

if TYPE_CHECKING:
    from slablm.api import compress, decompose
    from slablm.config import CompressionConfig
    from slablm.methods import Decomposition
    from slablm.planning.plan import Plan, plan
    from slablm.runtime.linear import SlabLinear
    from slablm.serving.hub import push

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
    "push",
]

_HOMES = {
    "CompressionConfig": "slablm.config",
    "Decomposition": "slablm.methods",
    "Plan": "slablm.planning.plan",
    "SlabLinear": "slablm.runtime.linear",
    "compress": "slablm.api",
    "decompose": "slablm.api",
    "plan": "slablm.planning.plan",
    "push": "slablm.serving.hub",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'slablm' has no attribute {name!r}")


register()
