"""Which formats are written and read, and the sentence that keeps other readers from a wrong model.

transformers 5 without slablm only warns about an unknown ``quant_method``, then fills the missing weights with random
numbers. But before it opens any weights it looks at ``transformers_weights`` in ``config.json``, and refuses with a
ValueError that quotes the entry when it is no safetensors file name. So slablm writes `GUARD` there, and its quantizer
(`slablm.checkpoint.hf`) takes it away while loading.
"""

from __future__ import annotations

from typing import Any

from slablm.errors import SlabError

QUANT_METHOD = "slab"
GUARD = "this model is compressed by slablm: run `pip install slablm` and `import slablm` before loading it"
# Of FORMAT.md: what is written, and what can be read. Version 2 added values in few bits, 3 errors on unseen text, 4
# digests of what config.json says, 5 the drift, 6 symbols in the place of values in few bits (of a form that was never
# released, and is not read), 7 those of today, 8 int8 rows, 9 experts one by one, 10 symbols of 6 bits; since 4 values
# in few bits are FP16 numbers in memory. A file says the first version that has all that there is in it, from 8 on.
FORMAT_VERSION = 8
READABLE_VERSIONS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
FIRST_WITH_FP16_GRID = 4
UNRELEASED_SYMBOLS = 6
FIRST_WITH_SYMBOLS = 7
FIRST_WITH_INT8_ROWS = 8
FIRST_WITH_EXPERTS = 9
FIRST_WITH_SIX_BITS = 10


def written_version(experts: bool, six_bits: bool) -> int:
    """The version of what is written: the first that has all that there is.

    Args:
        experts: whether there are some, stored one by one.
        six_bits: whether there are symbols of so many.
    """
    if six_bits:
        return FIRST_WITH_SIX_BITS
    return FIRST_WITH_EXPERTS if experts else FORMAT_VERSION


def check_version(version: Any) -> None:
    """Refuse formats this slablm does not know.

    Raises:
        SlabError: naming both versions.
    """
    # True and 3.0 are equal to versions, and are none.
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise SlabError(
            f"checkpoint format version {version!r} is not supported, "
            f"this slablm reads versions up to {READABLE_VERSIONS[-1]}: upgrade slablm (pip install -U slablm)"
        )
