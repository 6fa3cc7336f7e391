"""``slablm doctor``: what this installation can do, and why."""

from __future__ import annotations

from slablm.cli.console import Json, echo, next_step, print_json


def doctor(json: Json = False) -> None:
    """Show versions, threads, and which kernels run compressed layers here and why."""
    import platform

    import torch
    import transformers

    from slablm.runtime import kernels
    from slablm.system.versions import __version__

    facts = {
        "slablm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_kernels": kernels.backend().name,
        "cpu_kernels_reason": kernels.backend().reason,
        "gpu_kernels": kernels.backend("cuda").name,
        "gpu_kernels_reason": kernels.backend("cuda").reason,
        "gpu_symbols": kernels.symbols_backend("cuda").name,
        "gpu_symbols_reason": kernels.symbols_backend("cuda").reason,
    }
    if json:
        print_json(facts)
        return
    for label, value in facts.items():
        echo(f"{label.replace('_', ' '):<20}{'none' if value is None else value}")
    next_step("slablm", "demo")
