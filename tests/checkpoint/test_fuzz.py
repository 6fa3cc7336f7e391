"""A few hundred mutants of compressed folders; `tests/fuzz.py` tries thousands."""

from collections import Counter

import pytest

from tests import fuzz


@pytest.fixture(scope="module")
def originals(tmp_path_factory, text_file):
    place = tmp_path_factory.mktemp("fuzz")
    return fuzz.read_originals(fuzz.build_originals(place, text_file), place / "copies")


def test_no_mutant_crashes_and_none_loads_wrong(originals):
    results = list(fuzz.try_mutants(originals, "tests", range(300)))
    assert [entry for entry in results if entry[2].partition(" ")[0] not in {"right", "refused"}] == []
    counts = Counter(result for _, _, result in results)
    assert counts["refused by us"] > 200
    assert counts["right"] > 5


def test_the_fuzzer_would_see_a_wrong_model(originals, monkeypatch):
    """Without digests of tensors it finds wrong numbers soon."""
    monkeypatch.setattr("slablm.checkpoint.integrity.verify_tensors", lambda files, expected: None)
    results = [result for _, _, result in fuzz.try_mutants(originals, "blind", range(60))]
    assert any(result.startswith("wrong") for result in results)
