"""``slablm bench --against`` a GGUF file: a stand-in for llama.cpp's llama-bench says what it was asked."""

import json
import sys

import pytest

from slablm import SlabError
from slablm.cli.bench import _cell
from slablm.evaluation.llama_bench import LlamaBench
from slablm.evaluation.speed import Run, Workload
from tests.cli.test_cli import refused, slablm

# Speeds are 10 × tokens read + tokens written, and a thread adds 0.5: so the test sees what was asked.
PROGRAM = """#!{python}
import json, sys
arguments = sys.argv[1:]
value = lambda name: arguments[arguments.index(name) + 1] if name in arguments else "0"
with open({log!r}, "a") as file:
    file.write(" ".join(arguments) + "\\n")
threads = int(value("-t")) / 2
tests = [(int(value("-p")), int(value("-n")))] if value("-p") != "0" or value("-n") != "0" else []
tests += [tuple(map(int, value("-pg").split(",")))] if "-pg" in arguments else []
print(json.dumps([dict(avg_ts=10 * p + n + threads, model_size=12345) for p, n in tests]))
"""


@pytest.fixture
def program(tmp_path):
    """(path of the stand-in, path of its log)."""
    return stand_in(tmp_path, PROGRAM)


def stand_in(folder, text):
    path, log = folder / "llama-bench", folder / "log"
    path.write_text(text.format(python=sys.executable, log=str(log)))
    path.chmod(0o755)
    return path, log


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "Q4_0.gguf"
    path.write_bytes(b"GGUF")
    return path


def test_what_is_asked_and_what_is_made_of_it(program, gguf):
    path, log = program
    contender = LlamaBench(str(gguf), str(path))
    assert contender.run(Workload(20, 3, document=True), threads=2) == Run(
        prefill=201, first_token=None, decode=4, document=640 / (5120 + 128 + 1), energy=None
    )
    read, wrote = log.read_text().splitlines()
    assert read == f"-m {gguf} -t 2 -r 1 -ngl 0 -o json -p 20 -n 0 -pg 512,128"
    assert wrote.endswith("-p 0 -n 3 -d 20"), "new tokens are written behind a prompt, as a model does"
    assert contender.run(Workload(20, 3), threads=1).document is None
    assert contender.weight_bytes() == 12345


@pytest.mark.skipif(sys.platform == "win32", reason="no such figure there")
def test_memory_is_the_programs_own(tmp_path, gguf):
    """Not that of whoever starts it; it takes 60 MB."""
    path, _ = stand_in(tmp_path, PROGRAM + "filled = bytearray(60_000_000)\n")
    found = LlamaBench(str(gguf), str(path)).footprint(20)
    assert found.resident is None
    assert 60_000_000 < found.peak < 120_000_000


def test_it_takes_turns_with_the_model(tiny_folder, program, gguf):
    path, _ = program
    quick = ["--prompt-tokens", 20, "--new-tokens", 3, "--rounds", 2, "--threads", "1,2"]
    both = ["--against", tiny_folder, "--against", gguf, "--llama-bench", path]
    done = slablm("bench", tiny_folder, *quick, *both, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    names = ["model", "dense float32", "dense bfloat16", "llama.cpp Q4_0"]
    assert [entry["contender"] for entry in result["speed"]] == 2 * names
    for entry, threads in zip(result["speed"][3::4], (1, 2), strict=True):
        assert (entry["decode"]["median"], entry["prefill"]["median"]) == (3 + threads / 2, 200 + threads / 2)
        assert entry["decode"]["ratio_to_dense_float32"] > 0
        assert "first_token" not in entry
    assert result["memory"][3]["weight_bytes"] == 12345
    assert _cell(None, None, "first_token") == "not measured"


def test_bad_input(tiny_folder, program, gguf, tmp_path):
    path, _ = program
    other = tmp_path / "other" / "Q4_0.gguf"
    other.parent.mkdir()
    other.write_bytes(b"GGUF")

    def against(*files, bench=path):
        options = [option for file in files for option in ("--against", file)]
        return slablm("bench", tiny_folder, *options, "--llama-bench", bench)

    refused(against(tmp_path / "no.gguf"), "--against .*no.gguf: there is no such file")
    refused(against(gguf, bench=tmp_path / "nothing"), "nothing is no program: .*--llama-bench takes")
    refused(against(gguf, other), "two files are called Q4_0.gguf; rename one")
    refused(against(tiny_folder, tmp_path), "one dense model and any number of GGUF files")


BROKEN = {
    "an error": ('import sys; sys.exit("error: failed to load model")', "could not measure .*: error: failed to load"),
    "no output": ("", "could not measure .*exit status 0"),
    "other output": ("print('[{{}}]')", "could not measure .*avg_ts"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_program_that_fails(case, tmp_path, gguf):
    text, message = BROKEN[case]
    path, _ = stand_in(tmp_path, "#!{python}\n" + text + "\n")
    for ask in (lambda c: c.run(Workload(20, 3), 1), LlamaBench.weight_bytes, lambda c: c.footprint(20)):
        with pytest.raises(SlabError, match=message) as info:
            ask(LlamaBench(str(gguf), str(path)))
        assert "\n" not in str(info.value)
