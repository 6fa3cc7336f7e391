"""Programs that never say slablm load its folders: torch's autoload tells transformers and PEFT of them."""

import importlib
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from slablm import autoload
from tests.cli.test_cli import slablm
from tests.serving.folders import with_template

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """As after `pip install`: the entry points of pyproject.toml, whatever is installed here."""
    place = tmp_path_factory.mktemp("site")
    information = place / "slablm-0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: slablm\nVersion: 0\n")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in named.items())
        for group, named in groups.items()
    ]
    (information / "entry_points.txt").write_text("".join(lines))
    paths = [str(place), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def run(command, environment, **changes):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False, env=environment | changes
    )
    assert "slablm" not in " ".join(map(str, command))
    return done


# transformers.quantizers.auto as the first to import torch: the registry is half there when slablm hears of it.
TRAP = "import transformers.quantizers.auto as registry; from transformers import AutoModelForCausalLM as Auto"


def test_the_registry_may_be_what_imports_torch(compressed_folder, environment, tmp_path):
    folder = tmp_path / "model"
    folder.symlink_to(compressed_folder)
    code = f"{TRAP}; print(type(Auto.from_pretrained({str(folder)!r}).model.layers[0].mlp.up_proj).__name__)"
    done = run(["-c", code], environment)
    assert (done.returncode, done.stdout) == (0, "RowLinear\n"), done.stderr
    done = run(["-c", code], environment, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "run `pip install slablm` and `import slablm` before loading it" in done.stderr.splitlines()[-1]


def test_a_pipeline(compressed_folder, environment):
    code = """
        import sys
        from transformers import pipeline
        write = pipeline("text-generation", model=sys.argv[1])
        print(write("Hello", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("Hello"))
    """
    done = run(["-c", _dedent(code), compressed_folder], environment)
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr


def test_an_adapter_of_peft_is_trained_saved_and_loaded(compressed_folder, environment, tmp_path):
    pytest.importorskip("peft")
    code = """
        import sys
        import torch, transformers, peft
        load = lambda: transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
        tokens = torch.arange(48).view(2, 24)
        loss = lambda: model(tokens, labels=tokens).loss
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(load(), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            losses.append(loss())
            losses[-1].backward()
            optimizer.step()
        trained = loss().item()
        model.save_pretrained(sys.argv[2])
        model = peft.PeftModel.from_pretrained(load(), sys.argv[2])
        print(trained < losses[0].item() - 0.2, abs(loss().item() - trained) < 1e-5)
    """
    done = run(["-c", _dedent(code), compressed_folder, tmp_path / "adapter"], environment)
    assert done.stdout.splitlines()[-1:] == ["True True"], done.stderr


def test_lm_eval_gives_the_accuracies_of_slablm_eval(compressed_folder, environment, tmp_path):
    pytest.importorskip("lm_eval")
    questions = [{"query": f"{n} and {n} is", "choices": ["more", "not less"], "gold": n % 2} for n in range(7)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'sums.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: query\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    task = ["--tasks", "sums", "--include_path", tmp_path, "--output_path", tmp_path / "results"]
    model = ["--model", "hf", "--model_args", f"pretrained={compressed_folder}", "--device", "cpu"]
    done = run(["-m", "lm_eval", "run", *model, *task], environment, HF_HOME=str(tmp_path / "cache"))
    results = list((tmp_path / "results").rglob("results_*.json"))
    assert results, done.stderr
    theirs = json.loads(results[0].read_text())["results"]["sums"]
    ours = slablm("eval", compressed_folder, "--task-file", tmp_path / "sums.jsonl", "--json")
    ours = json.loads(ours.stdout)["tasks"]["sums"]
    assert 0 < ours["acc"] < 1
    assert (theirs["acc,none"], theirs["acc_norm,none"]) == (ours["acc"], ours["acc_norm"])


def test_transformers_own_server_and_chat(compressed_folder, environment, tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pexpect = pytest.importorskip("pexpect")
    folder = with_template(compressed_folder, tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = ["-c", "from transformers.cli.transformers import main; main()"]
    command = [sys.executable, *program, "serve", str(folder), "--device", "cpu", "--port", str(port)]
    server = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert any("running on" in line for line in server.stderr)
        talk = [*program, "chat", str(folder), f"http://localhost:{port}/v1", "max_new_tokens=4", "do_sample=False"]
        quiet = environment | {"TERM": "dumb", "HF_HUB_OFFLINE": "0"}  # which is of every address, this machine too
        child = pexpect.spawn(sys.executable, talk, env=quiet, encoding="utf-8", codec_errors="replace", timeout=60)
        child.expect(r"already\s+loaded")
        child.sendline("Hello")
        child.expect(r"\d+ tokens in")
        child.close(force=True)
    finally:
        server.kill()
        server.communicate()


def test_what_fails_in_a_hook_is_a_warning(monkeypatch):
    """It runs while somebody else's library is imported, who may not want slablm at all."""
    registry = types.ModuleType("registry")
    registry.__spec__ = importlib.machinery.ModuleSpec("registry", None)

    def fails(name):
        raise ImportError("cannot import name 'register_quantizer'")

    monkeypatch.setattr(autoload, "import_module", fails)
    with pytest.warns(RuntimeWarning, match="slablm cannot announce its format: .*register_quantizer"):
        autoload._register_format(registry)


def _dedent(code):
    lines = code.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] for line in lines)
