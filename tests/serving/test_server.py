"""`slablm serve` as clients see it: one process with the tiny model, and OpenAI's own client."""

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.cli.test_cli import refused, slablm
from tests.serving.folders import with_template

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


def post(server, body, timeout=60):
    """(status, the answer's JSON) of a request for an answer in a conversation."""
    connection = http.client.HTTPConnection(server.removeprefix("http://"), timeout=timeout)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


@contextmanager
def served(folder, *options):
    """A process that serves a folder, and its address."""
    command = [sys.executable, "-m", "slablm", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        found = re.search(r" at (http://127\.0\.0\.1:\d+) ", line)
        assert found, line + process.stderr.read()
        assert process.stderr.readline().startswith(f"curl {found[1]}/v1/")
        yield process, found[1]
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture(scope="module")
def talking(compressed_folder, tmp_path_factory):
    return with_template(compressed_folder, tmp_path_factory.mktemp("serve") / "out")


@pytest.fixture(scope="module")
def server(talking):
    with served(talking, "--max-model-len", "100") as (_, address):
        yield address


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(talking):
    return str(talking)


def chat(client, model, text, **options):
    options = {"max_tokens": 12, "temperature": 0} | options
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)


def test_the_model_answers_whole_and_in_pieces(client, model):
    assert [listed.id for listed in client.models.list()] == [model]
    answer = chat(client, model, "Hello")
    assert answer.usage.completion_tokens == 12
    assert answer.choices[0].finish_reason == "length"
    pieces = list(chat(client, model, "Hello", stream=True))
    assert len(pieces) > 3
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == answer.choices[0].message.content
    text = client.completions.create(model=model, prompt="Hello", max_tokens=5).choices[0].text
    streamed = client.completions.create(model=model, prompt="Hello", max_tokens=5, stream=True)
    assert "".join(p.choices[0].text for p in streamed) == text


def test_a_stop_word_is_no_part_of_the_answer(client, model):
    whole = chat(client, model, "Hello").choices[0].message.content
    word = whole[4:6]
    for stop in (word, [word, "something else"]):
        answer = chat(client, model, "Hello", stop=stop)
        assert answer.choices[0].message.content == whole[: whole.index(word)]
        assert answer.choices[0].finish_reason == "stop"
        pieces = chat(client, model, "Hello", stop=stop, stream=True)
        assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole[: whole.index(word)]


def test_a_temperature_draws(client, model):
    assert len({chat(client, model, "Hello", temperature=1.5).choices[0].message.content for _ in range(3)}) > 1


def test_many_clients_get_the_answers_that_one_gets(client, model):
    texts = [f"Number {n}" for n in range(12)]
    alone = [chat(client, model, text).choices[0].message.content for text in texts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda text: chat(client, model, text).choices[0].message.content, texts))
    assert together == alone


HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (
            {"messages": [{"role": "user", "content": "a" * 200}]},
            400,
            r"prompt has \d+ tokens, .* 100 together: shorten it",
        ),
        ({}, 400, "'messages' is missing"),
        ({"messages": 5}, 400, "cannot be understood"),
        ({"messages": [{"content": "x"}]}, 400, "'role' is missing"),
        ({"messages": [{"role": "user"}, {"role": "system"}]}, 400, "system must come first"),
        ({"messages": HELLO, "temperature": "hot"}, 400, "could not convert"),
        ({"messages": HELLO, "max_tokens": 0}, 400, "new tokens must be 1 or more"),
        ({"messages": HELLO, "stop": [5]}, 400, "stop must be a text"),
        ({"messages": HELLO, "stop": ""}, 400, "stop must be a text"),
        ({"messages": HELLO, "top_p": 2}, 400, "top_p must lie above 0"),
        ({"messages": HELLO, "generation_config": '{"num_beams": 4}'}, 400, "only one text"),
        ({"messages": HELLO, "seed": 1 << 80}, 400, "cannot be understood"),
        ({"messages": [], "unheard": 1}, 422, "Unexpected fields"),
        ({"model": "gpt", "messages": []}, 404, "'gpt' is not here"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_have_their_status(server, request_, status, message, stream):
    answered, answer = post(server, request_ | {"stream": stream})
    assert answered == status, answer
    assert re.search(message, answer["error"]["message"])


def test_a_client_that_leaves_disturbs_nobody(server, client, model):
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 70}
    for _ in range(4):
        with pytest.raises(TimeoutError):
            post(server, body, timeout=0.02)
        with chat(client, model, "x", max_tokens=70, stream=True) as stream:
            next(iter(stream))
    assert chat(client, model, "Hello").usage.completion_tokens == 12


def test_the_page_runs_in_a_browser(server, model, tmp_path):
    """Under its own policy, its script asks for the model's name."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    options = ["--headless", "--no-sandbox", f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([browser, *options, server], capture_output=True, text=True, check=False, timeout=120)
    assert f'<small id="model">{model}</small>' in done.stdout, done.stderr


def test_what_was_asked_before_sigterm_is_answered_whole(talking, model):
    with served(talking, "--kv-cache", "fp8") as (process, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        begun = threading.Event()

        def ask(number):
            text = ""
            for piece in chat(client, model, f"Number {number}", max_tokens=60, stream=True):
                text += piece.choices[0].delta.content or ""
                begun.set()
            return piece.choices[0].finish_reason, piece.usage.completion_tokens

        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(ask, number) for number in range(6)]
            assert begun.wait(60)
            process.send_signal(signal.SIGTERM)
            assert {one.result() for one in asked} <= {("length", 60), ("stop", 60)}
        assert process.wait(60) == 0
        assert process.stderr.read() == "all requests are answered\n"
        with pytest.raises(openai.APIConnectionError):
            chat(client, model, "Hello")


def test_what_cannot_be_served(talking, tiny_gguf, tmp_path, monkeypatch):
    refused(slablm("serve", talking, "--host", "0.0.0.0"), "0.0.0.0 can be reached by others: .* --api-key-env")
    refused(slablm("serve", talking, "--api-key-env", "NO_SUCH_KEY"), "variable NO_SUCH_KEY holds no key")
    refused(slablm("serve", tiny_gguf), "is a GGUF file")
    refused(slablm("serve", talking, "--kv-cache", "int3"), "kv_cache must be one of fp8, quanto, hqq, got 'int3'")
    refused(slablm("serve", talking, "--max-model-len", 1000), "1000 is more than the model's 128 positions")
    refused(slablm("serve", tmp_path / "nowhere"), "does not exist")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(
            slablm("serve", talking, "--port", port), f"cannot listen on 127.0.0.1 port {port}: .*try another --port"
        )
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    refused(slablm("serve", talking), r"pip install 'slablm\[serve\]'")
