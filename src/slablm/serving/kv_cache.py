"""Keys and values of what a model has read, kept quantised: transformers' own caches, by the names of their backends.

As they are they take 2 · layers · kv_heads · head_dim numbers per token, which with long texts is more than a
compressed model. Quantised they take a half (``fp8``) or a quarter (``quanto`` and ``hqq``, 4 bits) of 16-bit numbers,
and every token makes all of them into numbers again: it takes longer, and the CPU kernels' path of a token is for plain
caches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import DynamicCache, QuantizedCache, cache_utils
from transformers.utils.import_utils import is_hqq_available, is_optimum_quanto_available

from slablm.errors import SlabError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

BACKENDS = ("fp8", "quanto", "hqq")


def check_backend(backend: str) -> None:
    """Refuse a backend that cannot be used here.

    Args:
        backend: what somebody has typed.

    Raises:
        SlabError: it is unknown, or its package is missing.
    """
    if backend not in BACKENDS:
        raise SlabError(f"kv_cache must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        raise SlabError("kv_cache fp8 needs a newer transformers: pip install --upgrade transformers")
    packages = {"quanto": ("optimum-quanto", is_optimum_quanto_available), "hqq": ("hqq", is_hqq_available)}
    if backend in packages:
        package, is_available = packages[backend]
        if not is_available():
            raise SlabError(f"kv_cache {backend} needs a further package: pip install {package}")


def new_cache(model: PreTrainedModel, backend: str | None) -> Cache:
    """An empty cache.

    Args:
        model: a causal language model with a cache of keys and values.
        backend: one of `BACKENDS`; None keeps them as they are.
    """
    config = model.config.get_text_config(decoder=True)
    return DynamicCache(config=config) if backend is None else QuantizedCache(backend, config)


def use_in_generate(model: PreTrainedModel, backend: str) -> None:
    """Let the model's `generate` make such caches where it is given none.

    Args:
        model: any causal language model.
        backend: one of `BACKENDS`.
    """
    settings = model.generation_config
    assert settings is not None
    settings.cache_implementation, settings.cache_config = "quantized", {"backend": backend}
