"""The command line as a user meets it: output, exit status, one clear line on bad input."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from unittest import mock

import pytest

from slablm.cli import main
from slablm.runtime import kernels


def slablm(*arguments):
    """Run the command's entry point in this process (a process of its own costs seconds of imports)."""
    stdout, stderr = io.StringIO(), io.StringIO()
    arguments = ["slablm", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", arguments),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as stop,
    ):
        main()
    return subprocess.CompletedProcess(arguments, stop.value.code, stdout.getvalue(), stderr.getvalue())


def refused(done, match):
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("slablm: error: ")
    assert re.search(match, last), last
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def quick(text_file):
    return ["--calibration", text_file, "--num-samples", 4, "--seq-len", 32, "--iterations", 4]


@pytest.fixture(scope="module")
def made(tiny_folder, quick, tmp_path_factory):
    """One compression through the command line: (finished process, output folder)."""
    out = tmp_path_factory.mktemp("cli") / "out"
    return slablm("compress", tiny_folder, out, *quick, "--json"), out


def test_compress_prints_one_json_object(made):
    done, out = made
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["out"] == str(out)
    assert result["layers"] == 14
    assert (result["method"], result["config"]["method"]) == ("slab+", "slab+")
    assert 0 < result["output_error"] < result["unseen_error"] < 1  # four windows of 32 tokens are few
    assert 0.7 < result["compression_ratio"] < 0.8
    assert 4 < result["bits_per_weight"] < 6  # with the headers, which weigh much in so small a model
    assert result["bytes_on_disk"] == (out / "model.safetensors").stat().st_size
    assert result["config"]["num_samples"] == 4
    assert "hidden states" in done.stderr


def test_two_runs_give_identical_files(made, tiny_folder, quick, tmp_path):
    slablm("compress", tiny_folder, tmp_path / "out", *quick)
    first, second = sorted(made[1].iterdir()), sorted((tmp_path / "out").iterdir())
    assert [path.name for path in first] == [path.name for path in second]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


def test_compress_without_json_prints_both_sizes(tiny_folder, quick, tmp_path):
    done = slablm("compress", tiny_folder, tmp_path / "out", *quick, "--method", "wanda", "--ignore", "k_proj")
    assert "true bits per weight" in done.stdout
    assert "compression ratio (paper)" in done.stdout
    assert "left dense: model.layers.0.self_attn.k_proj (ignored by 'k_proj')" in done.stderr
    assert re.search(
        r"mean relative output error +0\.\d{4} on calibration text, 0\.\d{4} on unseen text\n", done.stdout
    )
    assert re.search(r"drift on unseen text +0\.\d{4} behind the last block\n", done.stdout)
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"\| drift of the hidden states behind the last block, on that text \| 0\.\d{4} \|", card)
    assert re.search(r"method \*\*wanda\*\* to a ratio of 0\.\d{4}\n", card)
    assert "`model.layers.0.self_attn.k_proj` (ignored by 'k_proj')" in card
    assert str(tmp_path) not in card
    assert "`pip install slablm`" in card
    assert "import slablm" not in card
    assert re.search(r"\| the same on text that calibrated nothing \| 0\.\d{4} \|", card)


def test_a_text_that_ends_with_the_last_window(tiny_folder, tmp_path):
    """Nothing is left to measure on; and the card says the budget where there was one."""
    (tmp_path / "short.txt").write_text("a" * 127, encoding="utf-8")  # with <s>, 4 windows
    options = ["--calibration", tmp_path / "short.txt", "--num-samples", 4, "--seq-len", 32]
    done = slablm("compress", tiny_folder, tmp_path / "out", *options, "--bits-per-weight", 5, "--json")
    result = json.loads(done.stdout)
    assert result["unseen_error"] is result["drift"] is None, done.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "method **slab+** with a budget of 5 true bits per weight" in card
    assert "calibrated nothing" not in card
    done = slablm("inspect", tmp_path / "out")
    assert done.returncode == 0
    assert "drift" not in done.stdout + card


def test_eval(made, tiny_folder, text_file):
    for model in (tiny_folder, made[1]):
        done = slablm("eval", model, "--text", text_file, "--seq-len", 64, "--max-windows", 3, "--json")
        result = json.loads(done.stdout)
        assert set(result) == {"perplexity", "stderr", "windows", "tokens", "bos"}
        assert result["bos"]  # of the tiny model's tokenizer
        assert (result["windows"], result["tokens"]) == (3, 3 * 63)
        assert 100 < result["perplexity"] < 1000  # a random model over 258 tokens
    done = slablm("eval", made[1], "--text", text_file, "--seq-len", 64, "--max-windows", 1)
    assert re.match(r"perplexity \d+\.\d{3} \(1 window of 64 tokens", done.stdout)  # one window has no standard error


def test_eval_writes_into_the_card(made, tiny_folder, text_file, tmp_path):
    shutil.copytree(made[1], tmp_path / "out")
    options = ["--text", text_file, "--seq-len", 32, "--max-windows", 2, "--card"]
    done = slablm("eval", tmp_path / "out", *options)
    number = re.match(r"perplexity (\S+ ± \S+) ", done.stdout)[1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        f"| perplexity on sample.txt | {number} | 2 windows of 32 tokens, each begun with BOS, float32, slablm" in card
    )
    refused(slablm("eval", tiny_folder, *options), "--card writes into the card of a folder that slablm has written")


def test_generate(made):
    done = slablm("generate", made[1], "Hello", "--max-new-tokens", 4)
    assert done.returncode == 0
    assert done.stdout.startswith("Hello")
    refused(slablm("generate", made[1], ""), "the prompt is empty")
    refused(slablm("generate", made[1], "Hi", "--chat"), "no chat template")


def test_inspect(made):
    _, out = made
    result = json.loads(slablm("inspect", out, "--json").stdout)
    tensor = next(t for t in result["tensors"] if t["name"] == "model.layers.0.self_attn.q_proj")
    numbers = {"kept_fraction", "symbol_bits", "bits_per_weight", "compression_ratio", "output_error", "unseen_error"}
    assert {"name", "shape"} | numbers == set(tensor)
    assert len(result["tensors"]) == 14
    assert tensor["shape"] == [64, 64]
    assert 0 < tensor["output_error"] < 1
    assert 0 < tensor["unseen_error"] < 1
    done = slablm("inspect", out)
    assert "model.layers.1.mlp.down_proj" in done.stdout
    assert "true bits per weight" in done.stdout
    assert result["head_bits"] == 16
    assert "head and embedding: 16 bits" in done.stdout
    drift = result["drift"]
    assert [set(block) for block in drift["blocks"]] == [{"first", "rest"}] * 2
    assert drift["last"] == drift["blocks"][1]
    assert drift["mean"]["rest"] == pytest.approx(sum(block["rest"] for block in drift["blocks"]) / 2)
    shown = (
        f"on unseen text: {drift['last']['rest']:.4f} behind the last block, {drift['mean']['rest']:.4f} in the mean"
    )
    assert shown in " ".join(done.stdout.split())


def test_sizes_are_measured_on_the_file(made):
    _, out = made
    result = json.loads(slablm("inspect", out, "--json").stdout)
    from safetensors.torch import load_file

    packed = sum(t.nbytes for name, t in load_file(out / "model.safetensors").items() if "proj." in name)
    header = (out / "model.safetensors").stat().st_size - sum(
        t.nbytes for t in load_file(out / "model.safetensors").values()
    )
    assert result["bits_per_weight"] == pytest.approx(8 * (packed + header) / result["weights"])


BAD_COMPRESSIONS = {
    "ratio too high": (
        ["--method", "slab", "--ratio", 0.93],
        r"q_proj: ratio 0\.93 keeps no entry .* use at most ratio 0\.\d+",
    ),
    "ratio out of range": (["--method", "slab", "--ratio", 1.5], "ratio must lie strictly between 0 and 1"),
    "pattern": (["--method", "slab", "--pattern", "5:7"], r"pattern 5:7 does not divide the 64 inputs"),
    "pattern text": (["--method", "slab", "--pattern", "half"], "pattern 'half' is not understood"),
    "bits too few": (["--bits-per-weight", 2.1], r"2\.1 bits per weight are too few: use at least \d"),
    "bits out of range": (["--bits-per-weight", 1], "bits_per_weight must lie above 2"),
    "a ratio of symbols": (["--ratio", 0.5], "ratio 0.5 needs another method, such as 'slab'"),
    "method": (["--method", "magic"], "unknown method 'magic'"),
    "yardstick": (["--method", "gptq"], "no packed format"),
    "targets": (["--targets", "nothing"], "pattern 'nothing' matches no linear layer"),
    "missing text": (["--calibration", "nowhere.txt"], r"text file nowhere\.txt does not exist"),
    "too many windows": (["--num-samples", 100000], "too short: .* 100000 are needed"),
    "long windows": (["--seq-len", 4096], r"longer than the model's 128 positions: use --seq-len 128"),
    "device": (["--device", "warp"], "device 'warp' cannot be used"),
    "dtype": (["--dtype", "int3"], "dtype must be one of"),
    "no hub": (["--calibration", "c4"], "'c4' needs the Hugging Face hub.*use --calibration builtin"),
}


@pytest.mark.parametrize("case", BAD_COMPRESSIONS)
def test_bad_settings(case, tiny_folder, quick, tmp_path):
    options, message = BAD_COMPRESSIONS[case]
    refused(slablm("compress", tiny_folder, tmp_path / "out", *quick, *options), message)
    assert list(tmp_path.iterdir()) == []


def test_empty_text(tiny_folder, quick, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    options = [*quick, "--calibration", tmp_path / "empty.txt"]
    refused(slablm("compress", tiny_folder, tmp_path / "out", *options), "empty.txt is empty")
    assert not (tmp_path / "out").exists()


def test_bad_weights(tiny_folder, quick, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_folder, tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.layers.0.mlp.gate_proj.weight"][3, 3] = float("inf")
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    refused(
        slablm("compress", tmp_path / "model", tmp_path / "out", *quick),
        r"NaN or Inf in model\.layers\.0\.mlp\.gate_proj\.weight",
    )
    assert not (tmp_path / "out").exists()


def test_an_existing_model_is_kept(made, tiny_folder, quick):
    _, out = made
    before = (out / "model.safetensors").read_bytes()
    refused(slablm("compress", tiny_folder, out, *quick), "already holds a model: .* --overwrite")
    assert (out / "model.safetensors").read_bytes() == before


def test_a_compressed_model_is_not_compressed_again(made, quick, tmp_path):
    refused(slablm("compress", made[1], tmp_path / "out", *quick), "already compressed by slablm")


def test_a_damaged_checkpoint(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    refused(slablm("inspect", tmp_path / "copy"), "is corrupted")
    refused(slablm("generate", tmp_path / "copy", "Hi"), "is corrupted")
    path.write_bytes(data[:-10])
    refused(slablm("inspect", tmp_path / "copy"), "truncated or damaged")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "model folder './nowhere' does not exist"),
        ("nowhere.gguf", "GGUF file 'nowhere.gguf' does not exist"),
        ("nobody/nothing", "model 'nobody/nothing' cannot be loaded.* with --calibration builtin"),
    ],
)
def test_models_that_are_not_there(model, message):
    refused(slablm("eval", model, "--text", "builtin"), message)


def test_a_text_for_evaluation_that_is_not_there(made):
    refused(slablm("eval", made[1], "--text", "wikitext2"), "use --text builtin or a text file")


def test_a_model_that_writes_its_calibration_text_says_how_far_it_is(tiny_folder, quick, tmp_path, monkeypatch):
    monkeypatch.setattr("slablm.system.waiting.WORTH_A_LINE", 0.0)
    done = slablm("compress", tiny_folder, tmp_path / "out", *quick, "--calibration", "self", "--method", "wanda")
    lines = re.findall(r"^Writing the calibration text: (\d+) %", done.stderr, re.MULTILINE)
    assert list(map(int, lines)) == list(range(10, 101, 10)), done.stderr


def test_inspect_of_something_else(tiny_folder, tmp_path):
    refused(slablm("inspect", tmp_path), "is no model folder")
    refused(slablm("inspect", tiny_folder), "is not a slablm checkpoint")
    (tmp_path / "config.json").write_text("{")
    refused(slablm("inspect", tmp_path), "is damaged")


def test_doctor_says_what_runs_and_why(monkeypatch):
    facts = json.loads(slablm("doctor", "--json").stdout)
    assert facts["cpu_kernels"] in {"avx512", "avx2", "neon", "portable", "reference"}
    assert facts["cpu_kernels_reason"]
    assert facts["gpu_kernels"] in {"triton", "reference"}
    assert facts["gpu_kernels_reason"]
    assert facts["gpu_symbols"] in {"cuda", "reference"}
    assert f"{facts['gpu_symbols']}: {facts['gpu_symbols_reason']}" == kernels.explain_symbols("cuda")
    monkeypatch.setenv("SLABLM_KERNEL", "reference")
    forced = [line for line in slablm("doctor").stdout.splitlines() if line.endswith("forced by SLABLM_KERNEL")]
    assert [line.split(" reason")[0] for line in forced] == ["cpu kernels", "gpu kernels", "gpu symbols"]
    monkeypatch.setenv("SLABLM_KERNEL", "abacus")
    refused(slablm("doctor"), "SLABLM_KERNEL=abacus cannot be used")


def test_help_and_version_as_a_process():
    def run(*arguments):
        command = [sys.executable, "-m", "slablm", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert "compress" in run("--help").stdout
    assert re.fullmatch(r"slablm \d+\.\d+\.\d+\n", run("--version").stdout)
    done = run("inspect", "/nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "slablm: error: /nowhere/config.json does not exist: /nowhere is no model folder\n"
