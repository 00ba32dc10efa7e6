"""A stand-in for the hub: the part of its HTTP API that downloads use, over local folders."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What is served, and what was fetched.

    Attributes:
        repositories: `owner/name` -> its folder.
        gated: those that ask who one is.
        fetched: `owner/name/file` of every file whose bytes were sent.
    """

    repositories: Mapping[str, Path]
    gated: frozenset[str] = frozenset()
    fetched: list[str] = field(default_factory=list)
    url: str = ""


def _files(folder: Path) -> list[tuple[str, int]]:
    """Each file's path in the repository, and its size in bytes."""
    return [
        (str(file.relative_to(folder)), file.stat().st_size) for file in sorted(folder.rglob("*")) if file.is_file()
    ]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub, at `hub.url`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, *_: object) -> None:
            return

        def _answer(self) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            about = parts[:2] == ["api", "models"]
            name = "/".join(parts[2:4] if about else parts[:2])
            if name in hub.gated:
                self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
            elif name not in hub.repositories:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"})
            elif about and parts[4] == "tree":
                entries = [
                    {"type": "file", "path": path, "size": size, "oid": hashlib.sha1(path.encode()).hexdigest()}
                    for path, size in _files(hub.repositories[name])
                ]
                self._send(200, json.dumps(entries).encode())
            elif about and parts[4] == "revision":
                listed = [{"rfilename": path} for path, _ in _files(hub.repositories[name])]
                about_it = {"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": []}
                self._send(200, json.dumps({**about_it, "downloads": 0, "siblings": listed}).encode())
            elif parts[2:3] == ["resolve"]:
                self._file(name, "/".join(parts[4:]))
            else:
                self._send(404, b"{}")

        def _file(self, name: str, wanted: str) -> None:
            file = hub.repositories[name] / wanted
            if not file.is_file():
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                return
            content = file.read_bytes()
            if self.command == "GET":
                hub.fetched.append(f"{name}/{wanted}")
            etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
            self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

        def _send(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
