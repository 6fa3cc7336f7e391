"""What stands in front of transformers' server: who may ask, what is a request, and a page to try the model.

An ASGI application around another one. It lets through what a served model is for; keeps out everybody without the key
and all that is no request for this model, with the status that says so; and ends what its client no longer waits for.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# transformers' server can also load other models, unload this one, and hear; none of it is for those who ask here.
_PATHS = frozenset(("/health", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/load_model"))
_LARGEST_BODY = 16 << 20
_JSON, _HTML = b"application/json", b"text/html; charset=utf-8"
# The page is one file that loads nothing and talks to nobody else.
_PAGE_POLICY = b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


class RequestError(Exception):
    """A request that is not passed on.

    Args:
        status: of HTTP.
        why: one line for the client.
        code: as OpenAI's clients know it.
    """

    def __init__(self, status: int, why: str, code: str) -> None:
        super().__init__(why)
        self.status, self.code = status, code

    def content(self) -> dict[str, Any]:
        """In the form that OpenAI's clients read."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "code": self.code}}


class Gate:
    """The application as the world sees it.

    Args:
        app: transformers' server.
        model: the one name under which the model is served.
        key: what a client has to send as a bearer token; None for no such thing.
        page: HTML shown at ``/``.
    """

    def __init__(self, app: App, model: str, key: str | None, page: bytes) -> None:
        self.app, self.model, self.page = app, model, page
        self._bearer = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            if scope["path"] == "/" and scope["method"] in {"GET", "HEAD"}:
                await _respond(send, 200, _HTML, self.page, [(b"content-security-policy", _PAGE_POLICY)])
                return
            self._admit(scope)
            body = self._checked(await _read(receive)) if scope["method"] == "POST" else b""
        except RequestError as error:
            more = [(b"www-authenticate", b"Bearer")] if error.status == 401 else []
            await _respond(send, error.status, _JSON, json.dumps(error.content()).encode(), more)
        except ConnectionError:
            pass
        else:
            await self._pass_on(scope, body, receive, send)

    def _admit(self, scope: Message) -> None:
        if scope["path"] not in _PATHS:
            raise RequestError(404, f"there is no {scope['path']!r} here", "not_found")
        if self._bearer is not None and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._bearer):
                raise RequestError(401, "the API key is missing or wrong: send it as a bearer token", "invalid_api_key")

    def _checked(self, body: bytes) -> bytes:
        """A request's JSON, written anew.

        Raises:
            RequestError: it is none, or for another model.
        """
        try:
            request = json.loads(body)
            if not isinstance(request, dict):
                raise ValueError("it is no object")
            written = json.dumps(request, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError) as error:  # wrong UTF-8, half a character and NaN are ValueErrors
            raise RequestError(400, f"the request is no JSON: {error}", "invalid_json") from error
        wanted = request.get("model")
        if wanted is not None and wanted != self.model:
            raise RequestError(404, f"the model {wanted!r} is not here: this is {self.model!r}", "model_not_found")
        return written

    async def _pass_on(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        """Let the application answer, for as long as the client is there."""
        gone, begun = asyncio.Event(), False

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        async def replay() -> Message:
            nonlocal begun
            if not begun:
                begun = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        answering = asyncio.ensure_future(self.app(scope, replay, send))
        watching = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            if not answering.done():
                answering.cancel()
            with suppress(asyncio.CancelledError):
                await answering


async def _read(receive: Receive) -> bytes:
    """A request's body.

    Raises:
        RequestError: it is too large.
        ConnectionError: the client has left.
    """
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _LARGEST_BODY:
            raise RequestError(413, f"the request is larger than {_LARGEST_BODY >> 20} MiB", "too_large")
        if not message.get("more_body", False):
            return b"".join(parts)


async def _respond(
    send: Send, status: int, kind: bytes, body: bytes, more: list[tuple[bytes, bytes]] | None = None
) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *(more or [])]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
