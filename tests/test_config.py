import pytest

from slablm import CompressionConfig, SlabError
from slablm.config import Pattern


def test_json_round_trip():
    config = CompressionConfig(ratio=0.6, targets=("q_proj", "re:.*mlp.*"), ignore=("k_proj",), pattern="2:4")
    assert CompressionConfig.from_dict(config.to_dict()) == config


def test_refinement_is_named_only_where_it_is_on():
    """Settings, and the keys of results made from them, are what they were before there was refinement."""
    assert "refine" not in CompressionConfig().to_dict()
    config = CompressionConfig(refine=True)
    assert CompressionConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, "ratio must lie strictly between 0 and 1"),
        ({"ratio": 1.0}, "ratio must lie strictly between 0 and 1"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"seq_len": 1}, "seq_len must be at least 2"),
        ({"targets": ()}, "targets is empty"),
        ({"pattern": "2x4"}, "pattern '2x4' is not understood"),
        ({"pattern": "4:4"}, "keeps 4 of every 4"),
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
