"""What stands in front of the server, with a made-up application behind it."""

import asyncio
import json

import pytest

from slablm.serving.gate import Gate

MODEL = "the/model"


async def echo(scope, receive, send):
    """Answers with what it was sent."""
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def ask(gate, path, body=b"", method="POST", headers=()):
    """(status, headers, body) of one request, its body in two parts."""
    parts = [
        {"type": "http.request", "body": part, "more_body": more}
        for part, more in ((body[:3], True), (body[3:], False))
    ]
    sent = []

    async def receive():
        return parts.pop(0) if parts else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "headers": [(b"content-length", b"9"), *headers]}
    asyncio.run(gate(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(message["body"] for message in sent[1:])


@pytest.fixture
def gate():
    return Gate(echo, MODEL, None, b"<html>")


def test_a_request_arrives_whole(gate):
    request = {"model": MODEL, "prompt": "café \u2603"}
    assert json.loads(ask(gate, "/v1/completions", json.dumps(request).encode())[2]) == request


def test_the_page_may_load_nothing_and_talk_to_nobody_else(gate):
    status, headers, body = ask(gate, "/", method="GET")
    assert (status, body) == (200, b"<html>")
    assert b"default-src 'none'" in headers[b"content-security-policy"]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", b"{", 400, "the request is no JSON"),
        ("/v1/completions", b"\xff\xfe", 400, "the request is no JSON"),
        ("/v1/completions", b"[" * 100_000, 400, "the request is no JSON"),
        ("/v1/completions", b'["a"]', 400, "it is no object"),
        ("/v1/completions", b'{"temperature": NaN}', 400, "the request is no JSON"),
        ("/v1/completions", rb'{"prompt": "\ud800"}', 400, "the request is no JSON"),
        ("/v1/completions", b'{"model": "gpt"}', 404, "the model 'gpt' is not here: this is 'the/model'"),
        ("/v1/completions", b" " * (16 << 20) + b"{}", 413, "larger than 16 MiB"),
        ("/load_model", b'{"model": "somebody/else"}', 404, "is not here"),
        ("/reset", b"{}", 404, "there is no '/reset' here"),
        ("/v1/audio/transcriptions", b"", 404, "there is no"),
    ],
)
def test_what_is_no_request_for_this_model(gate, path, body, status, message):
    answered, _, text = ask(gate, path, body)
    assert answered == status
    assert message in json.loads(text)["error"]["message"]


@pytest.mark.parametrize("given", [b"", b"Bearer wrong", b"secret", b"bearer secret"])
def test_without_the_key_nothing_but_the_page_and_the_health(given):
    gate = Gate(echo, MODEL, "secret", b"<html>")
    headers = [(b"authorization", given)] if given else []
    status, answered, _ = ask(gate, "/v1/completions", b"{}", headers=headers)
    assert (status, answered[b"www-authenticate"]) == (401, b"Bearer")
    assert ask(gate, "/v1/models", method="GET", headers=headers)[0] == 401
    assert ask(gate, "/health", method="GET")[0] == ask(gate, "/", method="GET")[0] == 200
    assert ask(gate, "/v1/completions", b"{}", headers=[(b"authorization", b"Bearer secret")])[0] == 200


def test_what_a_client_no_longer_waits_for_is_cancelled():
    async def leave(*messages):
        ended = []

        async def slow(scope, receive, send):
            await receive()
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(True)

        left = list(messages)

        async def receive():
            return left.pop(0)

        async def send(message):
            raise AssertionError("nobody is there")

        scope = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}
        await asyncio.wait_for(Gate(slow, MODEL, None, b"")(scope, receive, send), 10)
        return ended

    body, leaves = {"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}
    assert asyncio.run(leave(body, leaves)) == [True]
    assert asyncio.run(leave(leaves)) == []


def test_an_error_of_the_application_is_passed_on():
    async def fails(scope, receive, send):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        ask(Gate(fails, MODEL, None, b""), "/v1/completions", b"{}")
