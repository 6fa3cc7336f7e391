"""What code there is for a device, and why.

The environment variable ``SLABLM_KERNEL`` forces an instruction set (``avx512``, ``avx2``, ``neon``, ``portable``) of
the CPU, or the ``reference`` everywhere; ``SLABLM_ACTIVATION_BITS=8`` has prompts read faster and less exactly
(`activation_bits`). On a GPU layers that keep some entries have kernels in Triton, and layers in
symbols have some in CUDA C++: so two questions, `backend` and `symbols_backend`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from slablm.errors import SlabError
from slablm.runtime.kernels import native
from slablm.system import cuda

ENVIRONMENT_VARIABLE = "SLABLM_KERNEL"
ACTIVATION_VARIABLE = "SLABLM_ACTIVATION_BITS"
REFERENCE = "reference"
TRITON = "triton"
CUDA = "cuda"
# Of GPUs with the instructions that the kernels for symbols use: Ampere and later.
_OLDEST_CAPABILITY = 8


@dataclass(frozen=True)
class Backend:
    """What runs the packed layers of a device.

    Attributes:
        name: an instruction set of `native.INSTRUCTION_SETS`, ``"triton"``, or ``"reference"``.
        reason: why, as one sentence.
        library: the loaded CPU kernels; None for the others.
    """

    name: str
    reason: str
    library: native.Library | None = None

    def __str__(self) -> str:
        """One line for people: the name and the reason."""
        return f"{self.name}: {self.reason}"


def backend(device: torch.device | str = "cpu") -> Backend:
    """The backend of this process, by ``SLABLM_KERNEL`` or else the fastest that the device can run.

    Args:
        device: where the weights are.

    Raises:
        SlabError: ``SLABLM_KERNEL`` names something that this machine cannot run.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE, "")
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    if kind == "cpu":
        return _cpu_backend(forced)
    return _gpu_backend(forced) if kind == "cuda" else Backend(REFERENCE, f"no kernels for {kind}")


def activation_bits() -> int:
    """Bits to which inputs of many tokens are rounded by kernels that multiply integers: 14, or 8 by the environment.

    Raises:
        SlabError: ``SLABLM_ACTIVATION_BITS`` is neither.
    """
    bits = os.environ.get(ACTIVATION_VARIABLE, "14")
    if bits not in ("8", "14"):
        raise SlabError(f"{ACTIVATION_VARIABLE} must be 8 or 14, got {bits!r}")
    return int(bits)


def explain(device: torch.device | str = "cpu") -> str:
    """One line for people: the backend and the reason.

    Args:
        device: where the weights are.
    """
    return str(backend(device))


def explain_symbols(device: torch.device | str = "cpu") -> str:
    """As `explain`, of layers in symbols.

    Args:
        device: where the weights are.
    """
    return str(symbols_backend(device))


@cache
def _cpu_backend(forced: str) -> Backend:
    library = native.load()
    if forced == REFERENCE:
        return Backend(REFERENCE, f"forced by {ENVIRONMENT_VARIABLE}")
    if isinstance(library, str):
        if forced:
            raise SlabError(f"{ENVIRONMENT_VARIABLE}={forced} cannot be used: {library}")
        return Backend(REFERENCE, f"{library}: plain torch, no speed-up")
    if not forced:
        return Backend(library.supported[0], "the fastest instruction set of this CPU", library)
    if forced not in library.supported:
        choices = ", ".join((*library.supported, REFERENCE))
        raise SlabError(f"{ENVIRONMENT_VARIABLE}={forced} cannot be used on this machine: choose one of {choices}")
    return Backend(forced, f"forced by {ENVIRONMENT_VARIABLE}", library)


@cache
def _gpu_backend(forced: str) -> Backend:
    if forced == REFERENCE:
        return Backend(REFERENCE, f"forced by {ENVIRONMENT_VARIABLE}")
    if find_spec("triton") is None:
        return Backend(REFERENCE, "triton is missing (pip install 'slablm[triton]'): plain torch, no speed-up")
    import triton

    from slablm.runtime.kernels import gpu

    if gpu.INTERPRETED:
        return Backend(TRITON, f"triton {triton.__version__}, interpreted on the CPU: slow, for tests")
    if not torch.cuda.is_available():
        return Backend(REFERENCE, f"triton {triton.__version__} is there, but torch sees no GPU")
    return Backend(TRITON, f"triton {triton.__version__} on {torch.cuda.get_device_name()}")


def symbols_backend(device: torch.device | str = "cpu") -> Backend:
    """As `backend`, of layers in symbols, which a GPU multiplies with other kernels.

    Args:
        device: where the weights are.
    """
    place = torch.device(device)
    if place.type != "cuda":
        return backend(place)
    return _symbols_gpu_backend(os.environ.get(ENVIRONMENT_VARIABLE, ""), place)


@cache
def _symbols_gpu_backend(forced: str, device: torch.device) -> Backend:
    if forced == REFERENCE:
        return Backend(REFERENCE, f"forced by {ENVIRONMENT_VARIABLE}")
    reason = cuda.missing()
    if reason is not None:
        return Backend(REFERENCE, f"{reason}: plain torch, no speed-up")
    if not torch.cuda.is_available():
        return Backend(REFERENCE, "torch sees no GPU")
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if major < _OLDEST_CAPABILITY:
        reason = f"{name} has compute capability {major}.{minor}, the kernels need {_OLDEST_CAPABILITY}.0"
        return Backend(REFERENCE, f"{reason}: plain torch, no speed-up")
    return Backend(CUDA, f"compiled for {name}")
