"""What slablm tells other libraries about itself, without being asked to by the user's code.

transformers has no entry points for formats of others. But ``import torch`` calls all that is installed in the group
``torch.backends``, which is made for devices and open to all; `slablm` is named there (pyproject.toml), so that

    transformers serve OUT        pipeline("text-generation", model="OUT")        lm_eval --model_args pretrained=OUT

know the format as soon as slablm is installed. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` is torch's switch against it; then
``import slablm`` does the same. Nothing but a few hooks is set: what they load is loaded with the libraries they wait
for, and what fails there is a warning, as it must keep nobody from importing torch.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import Any

_Hook = Callable[[Any], None]


@cache
def register() -> None:
    """Wait for the libraries that need to know of slablm. To be called as often as one likes; never raises."""
    try:
        import wrapt
    except ImportError as error:
        _warn(error)
        return
    wrapt.when_imported("transformers.quantizers.auto")(_register_format)
    wrapt.when_imported("peft.tuners.lora.config")(_register_adapters)


def _quietly(hook: _Hook) -> _Hook:
    """A hook whose failure is a warning, as it belongs to the import of somebody else."""

    @wraps(hook)
    def quiet(module: Any) -> None:
        try:
            hook(module)
        except Exception as error:
            _warn(error)

    return quiet


def _warn(error: Exception) -> None:
    warnings.warn(f"slablm cannot announce its format: {error!r}", RuntimeWarning, stacklevel=3)


@_quietly
def _register_format(registry: Any) -> None:
    """Register the format with transformers."""
    if getattr(registry.__spec__, "_initializing", False):
        # The registry itself is what has imported torch, and half there. lm_eval, for one, uses it as soon as it is.
        _when_whole(registry.__spec__, _quietly(_import_format))
    else:
        _import_format(registry)


def _import_format(_: Any) -> None:
    import_module("slablm.checkpoint.hf")


def _when_whole(spec: Any, hook: _Hook) -> None:
    """Call a hook when the import of a module that is under way is done, which Python marks in the module's spec."""
    kind = type(spec)

    class UnderWay(kind):  # type: ignore[misc, valid-type]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_initializing" and not value:
                self.__class__ = kind
                if self.name in sys.modules:  # it has not failed
                    hook(sys.modules[self.name])

    spec.__class__ = UnderWay


@_quietly
def _register_adapters(peft_config: Any) -> None:
    """Let every new `LoraConfig` of PEFT reach compressed layers."""
    kind = peft_config.LoraConfig
    finish = kind.__post_init__

    @wraps(finish)
    def finish_and_register(self: Any) -> None:
        finish(self)
        lora = import_module("slablm.runtime.lora")
        self._register_custom_module(lora.CUSTOM_MODULES)

    kind.__post_init__ = finish_and_register
