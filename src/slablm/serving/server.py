"""transformers' own server with one model in it, and a gate in front: ``slablm serve``.

The server's class is made for its command line. It builds everything and then runs, or starts a thread; here it starts
nothing, so that the application can be put behind `slablm.serving.gate` and run in this thread, which gets the signals.
This file and `slablm.serving.answers` are the only ones that know that class.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from slablm.checkpoint.verification import open_folder
from slablm.dense.loading import check_device, explained, is_compressed, locate, quiet_libraries, wanted_dtype
from slablm.errors import SlabError
from slablm.serving.gate import App, Gate, RequestError
from slablm.serving.kv_cache import check_backend, use_in_generate


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens and what it takes.

    Attributes:
        host: address; others than this machine's own need a key.
        port: 0 for any that is free.
        api_key_env: environment variable with the key that clients have to send; None for no key.
        max_model_len: tokens of a prompt and its answer together; None for all that the model has.
        dtype: as for `slablm.dense.loading.load`.
        device: torch device.
        trust_remote_code: run model code from the hub.
        kv_cache: one of `slablm.serving.kv_cache.BACKENDS`; None keeps keys and values as they are.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_env: str | None = None
    max_model_len: int | None = None
    dtype: str = "auto"
    device: str = "cpu"
    trust_remote_code: bool = False
    kv_cache: str | None = None


def serve(source: str, options: ServerOptions, say: Callable[[str], None]) -> None:
    """Serve a model until SIGTERM or Ctrl-C; what has been asked by then is answered.

    Args:
        source: hub id or folder, dense or compressed.
        options: see there.
        say: told where the model is, and what to type.

    Raises:
        SlabError: the model cannot be loaded, the address cannot be had or is open to others without a key, or a
            package is missing.
    """
    source, key = source.rstrip("/") or source, _key(options)
    _check(source, options)
    with _bound(options) as listener:
        server, with_template = _loaded(source, options, key)
        listener.listen()
        where = f"http://{_shown(options.host)}:{listener.getsockname()[1]}"
        say(f"{source} at {where} (a page to try it, and /v1 for OpenAI's clients); Ctrl-C ends it")
        say(_curl(where, source, with_template, options.api_key_env))
        # uvicorn raises the signal that ended it again when all is answered: an orderly end, not a death.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        server.run(sockets=[listener])
    say("all requests are answered")


def _key(options: ServerOptions) -> str | None:
    """What clients have to send.

    Raises:
        SlabError: there is none where one is needed, or it is no text that can be sent.
    """
    if options.api_key_env is None:
        if not _is_loopback(options.host):
            raise SlabError(
                f"{options.host} can be reached by others: name a variable that holds a key with --api-key-env, "
                "or listen on 127.0.0.1"
            )
        return None
    key = os.environ.get(options.api_key_env, "")
    if not key.strip() or not key.isascii():
        raise SlabError(f"environment variable {options.api_key_env} holds no key: put some ASCII text into it")
    return key


def _check(source: str, options: ServerOptions) -> None:
    """All that can be refused before a model is read."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise SlabError("serving needs further packages: pip install 'slablm[serve]'")
    if options.max_model_len is not None and options.max_model_len < 2:
        raise SlabError(f"max_model_len must be 2 or more, got {options.max_model_len}")
    if options.kv_cache is not None:
        check_backend(options.kv_cache)
    check_device(options.device)
    wanted_dtype(options.dtype, gguf=False)
    where, others = locate(source)
    if others:
        raise SlabError(f"{source} is a GGUF file: llama.cpp serves those; here it needs a folder or a hub id")
    if is_compressed(where):
        open_folder(Path(where))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bound(options: ServerOptions) -> socket.socket:
    """A socket that has the address and does not listen yet.

    Raises:
        SlabError: it cannot be had.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SlabError(f"cannot listen on {options.host} port {options.port}: {reason}: try another --port") from error
    return listener


def _loaded(source: str, options: ServerOptions, key: str | None) -> tuple[Any, bool]:
    """Uvicorn's server around the loaded model, and whether there is a chat template."""
    from transformers.cli.serve import Serve

    class Waiting(Serve):
        def start_server(self) -> None:
            """Not now."""

    quiet_libraries()
    with explained(source):
        serving = Waiting(
            force_model=source,
            device=options.device,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
            log_level="error",
            non_blocking=True,
        )
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    (loaded,) = serving._model_manager.loaded_models.values()
    if options.kv_cache is not None:
        use_in_generate(loaded.model, options.kv_cache)
    _use_answers(serving, _longest(loaded.model, options.max_model_len))
    config = serving.server.config
    # Clients drop idle connections after 5 s, and so does uvicorn: some would ask on one that is just being closed.
    config.timeout_keep_alive = 30
    _explain_errors(config.app)
    page = Path(__file__).with_name("page.html").read_bytes()
    config.app = Gate(cast(App, config.app), source, key, page)
    return serving.server, bool(getattr(loaded.processor, "chat_template", None))


def _use_answers(serving: Any, longest: int) -> None:
    """Let the server generate in our way."""
    from slablm.serving.answers import Answers

    answers = Answers(longest)
    serving._generation_state.get_manager = lambda model_id, use_cb=False: answers


def _longest(model: Any, wanted: int | None) -> int:
    """Tokens of a prompt and its answer.

    Raises:
        SlabError: more are wanted than the model has positions.
    """
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return wanted or 1 << 30
    if wanted is not None and wanted > positions:
        raise SlabError(f"--max-model-len {wanted} is more than the model's {positions} positions")
    return wanted or positions


def _explain_errors(app: Any) -> None:
    """Say what is wrong in one form; what the handlers stumble over is a bad request, no failure of the server."""
    from fastapi.responses import JSONResponse
    from jinja2.exceptions import TemplateError
    from starlette.exceptions import HTTPException

    def answer(status: int, why: str) -> JSONResponse:
        error = RequestError(status, " ".join(why.split()), "invalid_request")
        return JSONResponse(error.content(), status_code=status)

    async def refused(_: Any, error: Any) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    async def not_understood(_: Any, error: Exception) -> JSONResponse:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
        return answer(400, f"the request cannot be understood: {why}")

    app.add_exception_handler(HTTPException, refused)
    for kind in (TemplateError, LookupError, TypeError, ValueError, AttributeError):
        app.add_exception_handler(kind, not_understood)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _curl(where: str, model: str, with_template: bool, key_variable: str | None) -> str:
    """What to type for a first answer."""
    key = f' -H "Authorization: Bearer ${key_variable}"' if key_variable else ""
    path = "completions"
    request: dict[str, Any] = {"model": model, "prompt": "Once upon a time"}
    if with_template:
        path, request = "chat/completions", {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
    body = json.dumps(request).replace("'", "'\\''")
    return f"curl {where}/v1/{path} -H 'Content-Type: application/json'{key} -d '{body}'"
