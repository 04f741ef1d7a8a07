"""A small hub on 127.0.0.1 for the real clients: public and gated datasets, slow answers, downloads that break off in the middle."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "x" * 30


@dataclass
class Repo:
    """A dataset repository: its files, who may read it, and how its downloads behave."""

    files: dict[str, bytes] = field(default_factory=dict)
    gated: bool = False
    accepted: bool = False
    break_after: int | None = None
    delay_s: float = 0.0


class Hub(ThreadingHTTPServer):
    """`repos` can be changed while it runs; `ranges` lists the byte offsets at which downloads were asked for."""

    daemon_threads = True

    def __init__(self, repos: dict[str, Repo]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = repos
        self.ranges: list[int] = []
        self.broken: set[str] = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes = b"") -> None:
        path = urlparse(self.path).path
        name = next((n for n in self.server.repos if f"/{n}" in path), None)
        if name is None:
            return self._send(404 if self.headers.get("Authorization") else 401, b"", {"X-Error-Code": "RepoNotFound"})
        repo = self.server.repos[name]
        time.sleep(repo.delay_s)
        if repo.gated and not (repo.accepted and self.headers.get("Authorization") == f"Bearer {TOKEN}"):
            return self._send(403 if self.headers.get("Authorization") else 401, b"", {"X-Error-Code": "GatedRepo"})
        if found := re.search(r"/resolve/[^/]+/(.+)$", path):
            return self._file(repo, found[1])
        if "/tree/" in path:
            return self._json([self._entry(p, c) for p, c in repo.files.items()])
        if "/paths-info/" in path:
            wanted = parse_qs(body.decode()).get("paths") or (json.loads(body)["paths"] if body.startswith(b"{") else [])
            return self._json([self._entry(p, repo.files[p]) for p in wanted if p in repo.files])
        return self._json({"_id": "1", "id": name, "sha": SHA, "private": False, "gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0,
                           "tags": [], "siblings": [{"rfilename": p} for p in repo.files]})  # fmt: skip

    @staticmethod
    def _entry(path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _file(self, repo: Repo, path: str) -> None:
        if path not in repo.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = repo.files[path]
        headers = {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        start = int(found[1]) if (found := re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")) else 0
        if self.command == "GET":
            self.server.ranges.append(start)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = None
        if repo.break_after is not None and self.command == "GET" and path not in self.server.broken:
            self.server.broken.add(path)
            cut = repo.break_after
        return self._send(206 if start else 200, content[start:], headers, cut)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True
