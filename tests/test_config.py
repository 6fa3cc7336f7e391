import pytest

from slablm import CompressionConfig, SlabError
from slablm.config import Pattern


def test_json_round_trip():
    config = CompressionConfig("slab", ratio=0.6, targets=("q_proj", "re:.*mlp.*"), ignore=("k_proj",), pattern="2:4")
    assert CompressionConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("method", "size", "other"), [("slab+", "bits_per_weight", "ratio"), ("rtn", "ratio", None)])
def test_of_two_kinds_of_size_a_method_has_one(method, size, other):
    config = CompressionConfig(method)
    assert getattr(config, size) == {"bits_per_weight": 4.0, "ratio": 0.5}[size]
    assert size in config.to_dict()
    assert other not in config.to_dict()
    assert CompressionConfig.from_dict(config.to_dict()) == config


OLD_SLAB_PLUS = {
    "method": "slab+",
    "ratio": 0.5,
    "bits_per_weight": 3.5,
    "magnitude_bits": 3,
    "refine": True,
    "seed": 7,
}


def test_settings_of_slab_plus_before_it_had_symbols_are_told_apart():
    config = CompressionConfig.from_dict(OLD_SLAB_PLUS)
    assert (config.method, config.ratio, config.bits_per_weight) == ("slab+1", 0.5, 3.5)
    assert CompressionConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "slab", "ratio": 0.0}, "ratio must lie strictly between 0 and 1"),
        ({"method": "slab", "ratio": 1.0}, "ratio must lie strictly between 0 and 1"),
        ({"method": "slab", "bits_per_weight": 4.0}, "bits_per_weight needs method 'slab\\+', got 'slab'"),
        ({"ratio": 0.5}, "ratio 0.5 needs another method, such as 'slab'"),
        ({"pattern": "2:4"}, "method 'slab\\+' has no pattern, got 2:4"),
        ({"rank": 2}, "method 'slab\\+' has rank 1, got rank 2"),
        ({"bits_per_weight": 2.0}, "bits_per_weight must lie above 2, got 2.0"),
        ({"bits_per_weight": float("nan")}, "bits_per_weight must lie above 2, got nan"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"head_bits": 4}, "head_bits must be 16 or 8, got 4"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"seq_len": 1}, "seq_len must be at least 2"),
        ({"targets": ()}, "targets is empty"),
        ({"method": "slab", "pattern": "2x4"}, "pattern '2x4' is not understood"),
        ({"method": "slab", "pattern": "4:4"}, "keeps 4 of every 4"),
        ({"value_dtype": "float32"}, "value_dtype must be one of"),
    ],
)
def test_bad_settings_name_the_culprit(settings, message):
    with pytest.raises(SlabError, match=message):
        CompressionConfig(**settings)


def test_settings_from_the_future_are_refused():
    with pytest.raises(SlabError, match="unknown compression setting 'telepathy'"):
        CompressionConfig.from_dict({"telepathy": 1})


def test_pattern():
    assert Pattern.parse("unstructured") is None
    assert Pattern.parse("2:4") == Pattern(survivors=2, group=4)
