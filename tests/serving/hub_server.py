"""A stand-in for the hub's HTTP API: as much of it as uploading a model asks for, kept in memory."""

from __future__ import annotations

import base64
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub:
    """What the stand-in holds.

    Attributes:
        role: of the token.
        repositories: name → {"private", "files": {path: bytes}}.
        may_write: whether the token may write to repositories that exist.
        failures: requests that are refused, as (method, part of the path, status); each once.
        asked: all requests, as (method, path).
    """

    def __init__(self):
        self.role, self.may_write = "write", True
        self.repositories, self.failures, self.asked = {}, [], []

    def add(self, name, *, private=False, files=()):
        self.repositories[name] = {"private": private, "files": dict(files)}

    def answer(self, method, path, body):
        """Status, headers and content of the answer to a request."""
        for failure in self.failures:
            if failure[0] == method and failure[1] in path:
                self.failures.remove(failure)
                return failure[2], {}, b"{}"
        account = {"type": "user", "name": "me", "orgs": [{"name": "ours"}]}
        account |= {"auth": {"accessToken": {"role": self.role}}}
        fixed = {"/api/whoami-v2": account, "/api/validate-yaml": {"errors": [], "warnings": []}}
        if path in fixed:
            return self.json(fixed[path])
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            self.add(name, private=wanted.get("private", wanted.get("visibility") == "private"))
            return self.json({"url": f"/{name}", "name": name})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            headers = {"X-Repo-Commit": "1" * 40, "ETag": f'"{found[2]}"'}
            content = self.repositories[found[1]]["files"].get(found[2])
            return (
                (404, headers | {"X-Error-Code": "EntryNotFound"}, b"") if content is None else (200, headers, content)
            )
        found = re.fullmatch(r"/api/models/([^/]+/[^/?]+)(.*)", path)
        if found is None or found[1] not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        return self.of_repository(found[1], found[2], body)

    def of_repository(self, name, request, body):
        repository = self.repositories[name]
        files = repository["files"]
        if request == "/auth-check/write":
            return (200 if self.may_write else 403), {}, b"{}"
        if request.startswith("/preupload/"):
            wanted = json.loads(body)["files"]
            each = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in wanted]
            return self.json({"files": each})
        if request.startswith("/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    assert line["value"]["encoding"] == "base64"
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            return self.json({"commitOid": "2" * 40, "commitUrl": f"/{name}/commit/2", "hookOutput": ""})
        if request.startswith("/tree/"):
            return self.json([{"type": "file", "path": path, "size": len(files[path]), "oid": "3"} for path in files])
        assert request.split("?")[0] in ("", "/revision/main"), request
        siblings = [{"rfilename": path} for path in files]
        return self.json({"id": name, "private": repository["private"], "siblings": siblings, "sha": "1" * 40})

    @staticmethod
    def json(data):
        return 200, {"Content-Type": "application/json"}, json.dumps(data).encode()


@contextmanager
def serving(hub):
    """Serve it on this machine; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_all(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append((self.command, self.path))
            if self.headers.get("Authorization") != "Bearer good":
                status, headers, content = 401, {}, b'{"error": "Invalid credentials"}'
            else:
                status, headers, content = hub.answer(self.command, self.path, body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = handle_all  # noqa: N815

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
