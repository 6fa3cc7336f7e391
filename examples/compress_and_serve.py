"""Compress a model, serve it behind OpenAI's API, ask it something, and stop the server.

    pip install 'slablm[serve]'
    python examples/compress_and_serve.py smollm2 out "The capital of France is"

The two commands are those that one would type; the question is an ordinary HTTP request.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen


def main(arguments: list[str] | None = None) -> None:
    """Compress unless that is done already, serve, ask, stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local folder or smollm2")
    parser.add_argument("out", type=Path, help="folder for the compressed model")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--seq-len", default="256", help="tokens per calibration window")
    options = parser.parse_args(arguments)

    slablm = [sys.executable, "-m", "slablm"]
    settings = ["--quick", "--seq-len", options.seq_len, "--resume"]  # with --resume nothing is done twice
    subprocess.run([*slablm, "compress", options.model, str(options.out), *settings], check=True)
    # Port 0 is any that is free; the server says which.
    server = subprocess.Popen([*slablm, "serve", str(options.out), "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = server.stderr.readline()
        found = re.search(r" at (http://\S+) ", said)
        if found is None:
            raise SystemExit(said + server.stderr.read())
        print(options.prompt + ask(found[1], str(options.out), options.prompt))
    finally:
        server.terminate()
        server.communicate()


def ask(address: str, model: str, prompt: str) -> str:
    """The continuation of a prompt.

    Args:
        address: the server's.
        model: the name under which it serves the model.
        prompt: text to continue.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": 20, "temperature": 0}
    request = Request(f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        result: Any = json.loads(answer.read())
    return str(result["choices"][0]["text"])


if __name__ == "__main__":
    main()
