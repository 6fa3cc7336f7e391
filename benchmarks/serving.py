"""What `slablm serve` stands: many clients at once, malformed requests, a long life, an end in the middle.

    python benchmarks/serving.py OUT

Starts the server in a process of its own, asks it through OpenAI's client (`pip install 'slablm[serve]'`), greedily,
and prints a line of JSON per case:

- ``load``: clients that ask at once, how many answers were lost, and how many differ from those that one client gets;
- ``malformed``: requests that are none, their statuses, and whether the server is healthy and answers as before;
- ``memory``: resident memory after the first 20 requests and after all;
- ``sigterm``: answers that had been asked for when the signal came, and how many came whole.

Exit status 1 if one of them is not as it should be.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai

FIRST_REQUESTS = 20
LARGEST_GROWTH = 0.05
TOPICS = ("the sea", "bread", "a fox", "winter", "music", "a bridge", "the moon", "trade", "a garden", "iron")


@dataclass
class Server:
    """A process that serves a folder."""

    process: subprocess.Popen[str]
    address: str
    model: str

    def client(self) -> openai.OpenAI:
        """A client that does not ask twice."""
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=3600)

    def resident_bytes(self) -> int:
        """Resident set of the process now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])


@contextmanager
def served(folder: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "slablm", "serve", folder, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        found = re.search(r" at (http://\S+) ", line)
        if found is None:
            raise SystemExit(line + process.stderr.read())
        process.stderr.readline()  # what to type
        threading.Thread(target=lambda: sys.stderr.writelines(process.stderr), daemon=True).start()
        yield Server(process, found[1], folder)
    finally:
        process.terminate()
        process.wait()


def prompts(count: int) -> list[str]:
    return [f"Write {n} words about {TOPICS[n % len(TOPICS)]}." for n in range(count)]


def answer(client: openai.OpenAI, model: str, prompt: str, tokens: int, stream: bool) -> str:
    messages = [{"role": "user", "content": prompt}]
    options = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}
    if not stream:
        return client.chat.completions.create(**options).choices[0].message.content
    pieces = client.chat.completions.create(**options, stream=True)
    return "".join(piece.choices[0].delta.content or "" for piece in pieces)


def load(server: Server, clients: int, requests: int, tokens: int) -> dict[str, float]:
    texts = prompts(requests)
    alone = [answer(server.client(), server.model, text, tokens, stream=False) for text in texts]

    def ask_all(number: int) -> list[str | None]:
        client, order, got = server.client(), list(range(requests)), [None] * requests
        random.Random(number).shuffle(order)
        for place in order:
            try:
                got[place] = answer(client, server.model, texts[place], tokens, stream=(number + place) % 2 == 0)
            except openai.OpenAIError as error:
                print(f"lost: {error!r}", file=sys.stderr)
        return got

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        got = [one for of_client in pool.map(ask_all, range(clients)) for one in zip(of_client, alone, strict=True)]
    return {
        "requests": len(got),
        "lost": sum(one is None for one, _ in got),
        "different": sum(one is not None and one != expected for one, expected in got),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def malformed_bodies(count: int) -> Iterator[bytes]:
    """Requests that are wrong in many ways: cut short, changed bytes, values of other types, wild sizes."""
    draw = random.Random(0)
    values = [None, True, -1, 0, 1e300, 1 << 80, "", "x", "\ud800", [], {}, [[]], {"a": {}}, ["x"] * 5, "0" * 10_000]
    right = {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["a"],
        "seed": 1,
        "stream": False,
        "logit_bias": {"5": 1},
    }
    for number in range(count):
        body = dict(right)
        if number % 3 == 0:
            body[draw.choice(list(right))] = draw.choice(values)
            body |= {"max_tokens": -5} if draw.random() < 0.5 else {"unheard of": 1}
            yield json.dumps(body).encode()
        elif number % 3 == 1:
            yield json.dumps(body).encode()[: draw.randrange(1, 80)]
        else:
            changed = bytearray(json.dumps(body).encode())
            for _ in range(8):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            yield bytes(changed)


def malformed(server: Server, count: int, tokens: int) -> dict[str, object]:
    before = answer(server.client(), server.model, "Hello", tokens, stream=False)
    statuses: Counter[int] = Counter()
    for number, body in enumerate(malformed_bodies(count)):
        connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=600)
        path = "/v1/chat/completions" if number % 2 else "/v1/completions"
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        statuses[connection.getresponse().status] += 1
        connection.close()
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"))
    connection.request("GET", "/health")
    return {
        "requests": count,
        "statuses": dict(sorted(statuses.items())),
        "healthy": connection.getresponse().status == 200,
        "answers as before": answer(server.client(), server.model, "Hello", tokens, stream=False) == before,
    }


def memory(server: Server, requests: int, tokens: int) -> dict[str, float]:
    client, first = server.client(), 0
    for number, text in enumerate(prompts(requests)):
        answer(client, server.model, text, tokens, stream=number % 2 == 0)
        if number + 1 == FIRST_REQUESTS:
            first = server.resident_bytes()
    last = server.resident_bytes()
    return {"requests": requests, "first": first, "last": last, "growth": round(last / first - 1, 4)}


def sigterm(server: Server, clients: int) -> dict[str, int]:
    begun = threading.Event()

    def ask(number: int) -> bool:
        text, finish = prompts(number + 1)[-1], None
        pieces = server.client().chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": text}],
            max_tokens=32,
            temperature=0,
            stream=True,
        )
        for piece in pieces:
            begun.set()
            finish = piece.choices[0].finish_reason or finish
        return finish is not None

    with ThreadPoolExecutor(clients) as pool:
        asked = [pool.submit(ask, number) for number in range(clients)]
        begun.wait()
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        whole = sum(one.result() for one in asked)
    return {"asked": clients, "whole": whole, "exit status": server.process.wait()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder to serve")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=20, help="of each client")
    parser.add_argument("--malformed", type=int, default=1000)
    parser.add_argument("--memory", type=int, default=500, help="requests between two looks at the memory")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    options = parser.parse_args()
    fine = []

    def report(case: str, result: dict[str, object], as_it_should_be: bool) -> None:
        print(json.dumps({"case": case, **result, "fine": as_it_should_be}), flush=True)
        fine.append(as_it_should_be)

    with served(options.model) as server:
        result = memory(server, options.memory, options.tokens)
        report("memory", result, abs(result["growth"]) <= LARGEST_GROWTH)
        result = load(server, options.clients, options.requests, options.tokens)
        report("load", result, result["lost"] == result["different"] == 0)
        result = malformed(server, options.malformed, options.tokens)
        report("malformed", result, all(s < 500 for s in result["statuses"]) and result["healthy"])
        result = sigterm(server, options.clients)
        report("sigterm", result, result["whole"] == options.clients and result["exit status"] == 0)
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
