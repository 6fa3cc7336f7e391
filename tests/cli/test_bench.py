"""``slablm bench``: what is printed and what is refused. No test looks at a real time."""

import json

import pytest

from slablm import SlabError
from slablm.cli.bench import _thread_counts
from slablm.dense.loading import load
from slablm.evaluation.contender import Contender
from slablm.evaluation.energy import find_meter
from slablm.evaluation.speed import weight_bytes
from slablm.runtime import kernels
from slablm.system.memory import peak_resident_bytes, resident_bytes
from tests.cli.test_cli import refused, slablm

QUICK = ["--prompt-tokens", 20, "--new-tokens", 3, "--rounds", 2, "--threads", "1"]
NATIVE = kernels.backend().library is not None
native_only = pytest.mark.skipif(not NATIVE, reason=kernels.explain())


@pytest.fixture(scope="module")
def done(compressed_folder, tiny_folder):
    """Everything at once: (finished command, its JSON)."""
    bits = ["--value-bits", 8] if NATIVE else []
    done = slablm("bench", compressed_folder, "--against", tiny_folder, *QUICK, *bits, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_json(done):
    names = ["model", *(["model, 8-bit values"] if NATIVE else []), "dense float32", "dense bfloat16"]
    assert [entry["contender"] for entry in done["speed"]] == names
    assert [entry["contender"] for entry in done["memory"]] == names
    assert (done["prompt_tokens"], done["new_tokens"], done["rounds"], done["document"]) == (20, 3, 2, False)
    assert done["dtype"] in {"float32", "float16", "bfloat16"}
    assert done["cpu_kernels"] == kernels.backend().name
    for entry in done["speed"]:
        assert set(entry) == {"contender", "threads", "prefill", "first_token", "decode"}
        assert entry["threads"] == 1
        for quantity in ("prefill", "first_token", "decode"):
            assert entry[quantity]["median"] > 0
            assert entry[quantity]["interquartile_range"] >= 0
            assert entry[quantity]["ratio_to_dense_float32"] > 0
    reference = done["speed"][names.index("dense float32")]
    assert reference["decode"]["ratio_to_dense_float32"] == 1


def test_memory(done, compressed_folder, tiny_folder):
    memory = {entry["contender"]: entry for entry in done["memory"]}
    assert memory["model"]["weight_bytes"] == weight_bytes(load(str(compressed_folder))[0])
    assert memory["dense float32"]["weight_bytes"] == weight_bytes(load(str(tiny_folder), dtype="float32")[0])
    assert memory["model"]["weight_bytes"] < memory["dense float32"]["weight_bytes"]
    assert memory["dense bfloat16"]["weight_bytes"] < memory["dense float32"]["weight_bytes"]
    if NATIVE:
        assert memory["model, 8-bit values"]["weight_bytes"] < memory["model"]["weight_bytes"]
    for entry in done["memory"]:
        if resident_bytes() is not None:
            assert 0 < entry["before_bytes"] <= entry["peak_bytes"]
            assert 0 < entry["resident_bytes"] <= entry["peak_bytes"]


def test_energy_is_measured_or_not_told(done):
    meter = find_meter()
    if isinstance(meter, str):
        assert done["energy_note"] == meter
    for entry in done["speed"]:
        assert ("energy" in entry) == (not isinstance(meter, str))


def test_table(tiny_folder):
    done = slablm("bench", tiny_folder, *QUICK)
    assert done.returncode == 0, done.stderr
    for word in ("prefill", "first token", "decode", "±", "weights", "resident", "peak", "energy"):
        assert word in done.stdout, word
    meter = find_meter()
    if isinstance(meter, str):
        assert meter in done.stdout
        assert "not measurable" in done.stdout
    assert "×" not in done.stdout  # no dense model, no ratio
    assert "document" not in done.stdout


def test_document(tmp_path, tokenizer):
    from transformers import LlamaForCausalLM

    from tests.conftest import tiny_config

    config = tiny_config(max_position_embeddings=640, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    quick = [*QUICK[:-4], "--rounds", 1, "--threads", "1"]
    done = slablm("bench", tmp_path, "--against", tmp_path, *quick, "--document", "--json")
    result = json.loads(done.stdout)
    assert result["document"] is True
    assert result["speed"][0]["document"]["median"] > 0
    assert result["speed"][0]["document"]["interquartile_range"] is None
    assert len(result["speed"]) == 3


def test_thread_counts():
    import torch

    count = torch.get_num_threads()
    assert _thread_counts("3, all") == list(dict.fromkeys((3, count)))
    assert _thread_counts(f"{count},all") == [count]


BAD = {
    "rounds": (["--rounds", 0], "--rounds must be 1 or more, got 0"),
    "threads": (["--threads", "1,0"], "--threads takes counts of 1 or more or 'all'"),
    "no threads": (["--threads", ""], "--threads takes counts of 1 or more or 'all'"),
    "long prompt": (["--prompt-tokens", 127], "model: 127 prompt tokens .* use at most 12[45] prompt tokens"),
    "no prompt": (["--prompt-tokens", 0], "at least 1 token, got 0"),
    "one token": (["--new-tokens", 1], "at least 2 new tokens, got 1"),
    "bits": (["--value-bits", 4], "--value-bits must be 8 or 16, got 4"),
    "dtype": (["--dtype", "int3"], "dtype must be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tiny_folder):
    options, message = BAD[case]
    refused(slablm("bench", tiny_folder, *QUICK, *options), message)


def test_forms_that_a_model_does_not_have(tiny_folder, compressed_folder, monkeypatch):
    refused(slablm("bench", tiny_folder, "--against", compressed_folder), "--against takes the dense model")
    with pytest.raises(SlabError, match="is not compressed: 8-bit values are a form of compressed models"):
        Contender("model", str(tiny_folder), value_bits=8).load()
    monkeypatch.setenv("SLABLM_KERNEL", "reference")
    with pytest.raises(SlabError, match="8-bit values need the compiled kernels, and here is reference"):
        Contender("model", str(compressed_folder), value_bits=8).load()


@native_only
def test_eight_bit_values_are_made_from_a_loaded_model(compressed_folder):
    model = Contender("model", str(compressed_folder), value_bits=8).load()
    layer = model.model.layers[0].mlp.up_proj
    assert str(layer.native.values.dtype) == "torch.int8"


def test_memory_of_another_process_does_not_count(tiny_folder):
    """The peak of the process that starts the measurement must not show in the measured one's."""
    import torch

    if resident_bytes() is None:
        pytest.skip("this system does not tell the resident set")
    ballast = torch.ones(400_000_000, dtype=torch.uint8)
    here = peak_resident_bytes()
    found = Contender("model", str(tiny_folder)).footprint(20)
    assert len(ballast) < here
    assert found.peak < here
