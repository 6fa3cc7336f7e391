"""``slablm serve``: a model behind OpenAI's API."""

from __future__ import annotations

from typing import Annotated

import typer

from slablm.cli import options
from slablm.cli.console import Device, Dtype, TrustRemoteCode, say


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Local folder (compressed or dense) or hub id.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's own need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any that is free.")] = 8000,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the key that clients have to send.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of a prompt and its answer together. (default: all that the model has)")
    ] = None,
    kv_cache: options.KvCache = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve MODEL on transformers' own server, with OpenAI's API and a page to try it, until Ctrl-C or SIGTERM."""
    from slablm.serving.server import ServerOptions, serve

    serve(model, ServerOptions(host, port, api_key_env, max_model_len, dtype, device, trust_remote_code, kv_cache), say)
