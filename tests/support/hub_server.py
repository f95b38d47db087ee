"""A model hub on the loopback device: as much of the protocol as a run needs, with faults on demand."""

import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"the only commit").hexdigest()
_LARGE = {".safetensors", ".bin", ".parquet"}  # the hub keeps them apart, and redirects to where they are


@dataclass
class Fault:
    """What goes wrong with requests of a method whose path contains `where`, `times` times or (None) for ever."""

    status: int = 0  # answer this
    code: str = ""  # and why, in the hub's header for that
    cut: bool = False  # break off in the middle of a body
    silent: bool = False  # take the request and never answer
    where: str = ""
    method: str = ""
    times: int | None = None


class Hub(ThreadingHTTPServer):
    """Serves repositories: ("model" or "dataset", id) -> folder, each with one commit on its branch main."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repositories: dict[tuple[str, str], Path] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []  # method, path, status (0: none)
        self.gone = threading.Event()
        self._sums: dict[Path, str] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def elsewhere(self) -> str:
        """Another host by name, as large files have; the client must not follow blindly."""
        return f"http://localhost:{self.server_port}"

    def close(self) -> None:
        self.gone.set()
        self.shutdown()
        self.server_close()

    def counts(self) -> Counter[tuple[str, int]]:
        """Requests by method and status."""
        return Counter((method, status) for method, _, status in self.requests)

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.where in path and fault.method in ("", method) and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    def sum(self, path: Path) -> str:
        """Of a large file sha256, of a small one git's sum."""
        if path not in self._sums:
            content = path.read_bytes()
            git = hashlib.sha1(f"blob {len(content)}\0".encode() + content)
            self._sums[path] = (hashlib.sha256(content) if path.suffix in _LARGE else git).hexdigest()
        return self._sums[path]

    def handle_error(self, *_: object) -> None:
        """A client that has hung up is nothing to tell."""


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.server.fault_for(self.command, path)
        if fault is not None and fault.silent:
            self.server.requests.append((self.command, path, 0))
            self.server.gone.wait(60)
            self.close_connection = True
        elif fault is not None and fault.status:
            self._error(fault.status, fault.code, {"Retry-After": "0"} if fault.status in (429, 503) else {})
        else:
            self._serve(path, cut=fault is not None)

    def _serve(self, path: str, cut: bool) -> None:
        parts = path.strip("/").split("/")
        if parts[0] == "elsewhere":
            file = next((file for file, digest in self.server._sums.items() if digest == parts[1]), None)
            if file is None:
                return self._error(404)
            return self._file(file, cut)
        if parts[0] == "api" and len(parts) >= 4 and parts[1] in ("models", "datasets"):
            kind, name, rest = parts[1][:-1], "/".join(parts[2:4]), parts[4:]
            folder = self.server.repositories.get((kind, name))
            if folder is None:
                return self._error(404, "RepoNotFound")
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            if not rest or rest[0] == "revision":
                siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
                return self._json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False})
            if rest[0] == "tree":
                return self._json([self._entry(file, folder) for file in files])
            return self._error(404)
        kind = "dataset" if parts[0] == "datasets" else "model"
        parts = parts[1:] if kind == "dataset" else parts
        if len(parts) < 5 or parts[2] != "resolve":
            return self._error(404)
        folder = self.server.repositories.get((kind, "/".join(parts[:2])))
        if folder is None:
            return self._error(404, "RepoNotFound")
        if parts[3] not in ("main", COMMIT):
            return self._error(404, "RevisionNotFound")
        file = folder.joinpath(*parts[4:])
        if not file.is_file():
            return self._error(404, "EntryNotFound")
        if file.suffix in _LARGE:
            headers = {"X-Linked-Etag": f'"{self.server.sum(file)}"', "X-Linked-Size": str(file.stat().st_size)}
            headers["Location"] = f"{self.server.elsewhere}/elsewhere/{self.server.sum(file)}"
            return self._send(302, b"", headers)
        return self._file(file, cut)

    def _entry(self, file: Path, folder: Path) -> dict[str, Any]:
        digest, size = self.server.sum(file), file.stat().st_size
        entry = {"type": "file", "path": str(file.relative_to(folder)), "size": size, "oid": digest[:40]}
        if file.suffix in _LARGE:
            entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 130}
        return entry

    def _file(self, file: Path, cut: bool) -> None:
        content, status = file.read_bytes(), 200
        headers = {"ETag": f'"{self.server.sum(file)}"', "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is not None:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        self._send(status, content, headers, cut)

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str = "", headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code} | (headers or {}) if code else headers or {})

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.server.requests.append((self.command, urlsplit(self.path).path, status))
        self.send_response(status)
        for name, value in (headers | {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut
