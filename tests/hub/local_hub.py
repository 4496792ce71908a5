"""A hub on loopback that speaks what huggingface_hub asks for, and can fail in the ways that hubs fail.

``/api/models/...`` gives commits, sizes and checksums; ``/<repo>/resolve/...`` serves small files itself and
redirects LFS files to a "CDN" under another host name, as the real one does. Faults are added per file; every
byte written to a client is counted.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_PIECE = 32 * 1024


@dataclass
class Fault:
    """One way to fail, ``times`` times, on requests of ``name`` (a file, a repository, '*' for all).

    on: ``api``, ``head``, ``get``. kind: ``status``, ``truncate``, ``corrupt``, ``ignore_range``,
    ``wrong_range``, ``drop`` (no answer at all), ``gzip_lie``.
    """

    name: str
    kind: str
    on: str = "get"
    times: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    at: int = 0


@dataclass
class Repo:
    """files: commit -> name -> bytes. refs: branch or tag -> commit."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    licence: str = "apache-2.0"

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        digest = hashlib.sha1(repr(sorted((n, hashlib.sha1(b).digest()) for n, b in files.items())).encode())
        commit = digest.hexdigest()
        self.files[commit] = dict(files)
        self.refs[branch] = commit
        return commit


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class LocalHub:
    """Use as a context manager. rate: bytes per second of each connection, 0 for as fast as it goes."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.rate = 0.0
        self.served: Counter[str] = Counter()
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.tokens_at_cdn: list[str] = []
        self.granted: set[str] = set()
        self._lock = threading.Lock()
        self._sha: dict[int, str] = {}
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo: str, files: dict[str, bytes]) -> str:
        return self.repos.setdefault(repo, Repo()).commit(files)

    def fail(self, name: str, kind: str, **how: object) -> Fault:
        fault = Fault(name, kind, **how)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def take_fault(self, on: str, name: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and fault.on == on and fault.name in ("*", name):
                    fault.times -= 1
                    return fault
        return None

    def sha256(self, content: bytes) -> str:
        return self._sha.setdefault(id(content), hashlib.sha256(content).hexdigest())

    def count(self, name: str, nbytes: int) -> None:
        with self._lock:
            self.served[name] += nbytes

    def gets(self, name: str) -> list[dict[str, str]]:
        """The headers of the GET requests of a file, at the CDN if it is there."""
        return [headers for method, at, headers in self.requests if method == "GET" and at == name]


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        # Small buffers, so that what is counted as served is nearly what has arrived.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * 1024)
        super().setup()

    def log_message(self, *_: object) -> None:
        return

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._model_info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(found[1], found[2], found[3])
        elif path.startswith("/cdn/"):
            query = parse_qs(parts.query)
            if "authorization" in self.headers:
                self.hub.tokens_at_cdn.append(self.headers["authorization"])
            files = self.hub.repos[query["repo"][0]].files[query["commit"][0]]
            name = query["name"][0]
            self._body(name, files[name], {})
        else:
            self._error(404, "EntryNotFound")

    def _allowed(self, name: str, file: bool) -> Repo | None:
        repo = self.hub.repos.get(name)
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        if token == "bad":
            self._error(401, "", "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and token not in self.hub.granted):
            self._error(404 if token else 401, "RepoNotFound", "Repository not found")
        elif repo.gated and file and token not in self.hub.granted:
            self._error(403 if token else 401, "GatedRepo", "Access to this model is restricted")
        else:
            return repo
        return None

    def _model_info(self, name: str, revision: str) -> None:
        self.hub.requests.append((self.command, "api", dict(self.headers)))
        if self._failed(self.hub.take_fault("api", name)) or (repo := self._allowed(name, False)) is None:
            return
        commit = repo.refs.get(revision, revision)
        if commit not in repo.files:
            self._error(404, "RevisionNotFound", "Invalid rev id")
            return
        siblings = []
        for file, content in repo.files[commit].items():
            entry = {"rfilename": file, "size": len(content), "blobId": git_sha1(content)}
            if is_lfs(file):
                entry["lfs"] = {"sha256": self.hub.sha256(content), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        info = {
            "_id": "0",
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "tags": ["safetensors", f"license:{repo.licence}"],
            "cardData": {"license": repo.licence},
            "downloads": 0,
            "siblings": siblings,
        }
        self._small(json.dumps(info).encode(), "application/json", {})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repo = self._allowed(name, True)
        if repo is None:
            return
        commit = repo.refs.get(revision, revision)
        content = repo.files.get(commit, {}).get(file)
        if content is None:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        headers = {"X-Repo-Commit": commit}
        if self.command == "HEAD" and self._failed(self.hub.take_fault("head", file)):
            return
        if not is_lfs(file):
            self._body(file, content, headers | {"ETag": f'"{git_sha1(content)}"'})
            return
        sha256 = self.hub.sha256(content)
        self.send_response(302)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("X-Linked-Etag", f'"{sha256}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("ETag", '"of-the-redirect"')
        self.send_header(
            "Location", f"{self.hub.cdn}/cdn/{sha256}?repo={name}&commit={commit}&name={file}&Signature=x"
        )
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _body(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        self.hub.requests.append((self.command, name, dict(self.headers)))
        fault = self.hub.take_fault("get", name) if self.command == "GET" else None
        if self._failed(fault):
            return
        kind = fault.kind if fault else ""
        start = 0
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if found and kind != "ignore_range":
            start = int(found[1])
            if start >= len(content):
                self._error(416, "")
                return
        if kind == "wrong_range":
            start = max(0, start - 7)
        self.send_response(206 if found and kind != "ignore_range" else 200)
        if found and kind != "ignore_range":
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "HEAD":
            return
        data = memoryview(content)[start:]
        if kind == "corrupt":
            data = memoryview(
                bytes(data[: len(data) // 2])
                + bytes([data[len(data) // 2] ^ 1])
                + bytes(data[len(data) // 2 + 1 :])
            )
        if kind == "truncate":
            data = data[: max(0, fault.at - start) if fault and fault.at else len(data) // 2]
            self.close_connection = True
        self._send(name, data)

    def _send(self, name: str, data: memoryview) -> None:
        began, sent = time.monotonic(), 0
        while sent < len(data):
            piece = data[sent : sent + _PIECE]
            self.wfile.write(piece)
            sent += len(piece)
            self.hub.count(name, len(piece))
            if self.hub.rate:
                time.sleep(max(0.0, sent / self.hub.rate - (time.monotonic() - began)))

    def _failed(self, fault: Fault | None) -> bool:
        if fault is None or fault.kind not in ("status", "drop"):
            return False
        self.close_connection = True
        if fault.kind == "status":
            self._error(fault.status, "", "fault", fault.headers)
        return True

    def _small(self, body: bytes, kind: str, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, **headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _error(
        self, status: int, code: str, message: str = "", headers: dict[str, str] | None = None
    ) -> None:
        extra = {"X-Error-Code": code, "X-Error-Message": message} if code or message else {}
        self._small(b"{}", "application/json", extra | (headers or {}), status)


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", "tokenizer.json"))
