"""A model hub on localhost that the real client talks to, with faults on request.

It answers what the client asks: a repository's listing with sizes and hashes, HEAD and GET of
``/{owner}/{name}/resolve/{commit}/{file}`` with the hub's metadata headers, and byte ranges.
Large files can be sent from another host name, as the hub does.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 10_000
CHUNK_BYTES = 16 * 1024


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@dataclass
class Repository:
    files: dict[str, bytes]
    branches: tuple[str, ...] = ("main",)

    @property
    def commit(self) -> str:
        parts = (name.encode() + content for name, content in sorted(self.files.items()))
        return hashlib.sha1(b"".join(parts)).hexdigest()

    def listing(self, repository: str) -> dict[str, object]:
        return {
            "id": repository,
            "sha": self.commit,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [_sibling(name, content) for name, content in self.files.items()],
        }


def _sibling(name: str, content: bytes) -> dict[str, object]:
    sibling: dict[str, object] = {
        "rfilename": name,
        "size": len(content),
        "blobId": git_sha1(content),
    }
    if len(content) >= LARGE_BYTES:
        digest = hashlib.sha256(content).hexdigest()
        sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
    return sibling


@dataclass
class Faults:
    """What goes wrong, and for how many requests of a file where a count is given."""

    cut_after: dict[str, int] = field(default_factory=dict)
    cuts_left: Counter[str] = field(default_factory=Counter)
    corrupt_left: Counter[str] = field(default_factory=Counter)
    status: int | None = None
    error_code: str | None = None
    file_status: dict[str, int] = field(default_factory=dict)
    delay_s_per_chunk: float = 0.0
    ignores_ranges: bool = False
    large_elsewhere: bool = False
    no_hashes: bool = False
    not_json: bool = False

    def cut(self, file: str, after: int, times: int = 1) -> None:
        """The connection breaks after so many bytes of a file."""
        self.cut_after[file], self.cuts_left[file] = after, times


@dataclass(frozen=True)
class Served:
    """One GET of a file: the first byte asked for, and the bytes sent if the client stays."""

    file: str
    start: int
    sent: int
    had_token: bool


class HubStandin:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults = Faults()
        self.served: list[Served] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, repository: str, files: dict[str, bytes]) -> Repository:
        self.repositories[repository] = Repository(files)
        return self.repositories[repository]

    def gets(self, file: str) -> list[Served]:
        return [served for served in self.served if served.file == file]

    def take(self, counter: Counter[str], file: str) -> bool:
        with self.lock:
            if counter[file] <= 0:
                return False
            counter[file] -= 1
            return True

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(_Handler):
            standin = hub

        return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    standin: HubStandin

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.standin.requests.append(f"{self.command} {path}")
        faults = self.standin.faults
        if faults.status is not None:
            self._error(faults.status, faults.error_code)
        elif path.startswith("/api/models/"):
            self._listing(path.removeprefix("/api/models/"))
        else:
            self._file(path, with_body)

    def _listing(self, path: str) -> None:
        repository, _, revision = path.partition("/revision/")
        found = self._found(repository, revision or "main")
        if found is None:
            return
        listing = found.listing(repository)
        if self.standin.faults.no_hashes:
            for sibling in listing["siblings"]:
                sibling.pop("size"), sibling.pop("blobId"), sibling.pop("lfs", None)
        body = b"<html>sign in</html>"
        if not self.standin.faults.not_json:
            body = json.dumps(listing).encode()
        self._send(200, body, {"Content-Type": "application/json"})

    def _found(self, repository: str, revision: str) -> Repository | None:
        """The repository at a revision that it has; None once the answer says that it has not."""
        found = self.standin.repositories.get(repository)
        if found is not None and revision in (*found.branches, found.commit):
            return found
        self._error(404, "RepoNotFound" if found is None else "RevisionNotFound")
        return None

    def _file(self, path: str, with_body: bool) -> None:
        repository, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        found = self._found(repository, revision)
        if found is None:
            return
        if file not in found.files:
            self._error(404, "EntryNotFound")
            return
        faults = self.standin.faults
        if file in faults.file_status:
            self._error(faults.file_status[file], None)
            return
        content = found.files[file]
        large = len(content) >= LARGE_BYTES
        is_elsewhere = self.headers.get("Host", "").startswith("localhost")
        if faults.large_elsewhere and large and not is_elsewhere:
            elsewhere = self.standin.endpoint.replace("127.0.0.1", "localhost")
            self._send(302, b"", {"Location": elsewhere + path})
            return
        etag = hashlib.sha256(content).hexdigest() if large else git_sha1(content)
        headers = {"X-Repo-Commit": found.commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        if not with_body:
            self._send(200, b"", headers | {"Content-Length": str(len(content))})
            return
        self._body(file, content, headers)

    def _body(self, file: str, content: bytes, headers: dict[str, str]) -> None:
        faults = self.standin.faults
        asked = self.headers.get("Range")
        start = 0
        if asked and not faults.ignores_ranges:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            total = len(content)
            headers = headers | {"Content-Range": f"bytes {start}-{total - 1}/{total}"}
        if self.standin.take(faults.corrupt_left, file):
            content = content[:-1] + bytes([content[-1] ^ 1])
        cut = faults.cut_after.get(file)
        cuts = cut is not None and self.standin.take(faults.cuts_left, file)
        body = content[start:][: cut if cuts else None]
        had_token = "Authorization" in self.headers
        self.standin.served.append(Served(file, start, len(body), had_token))
        self.send_response(206 if start else 200)
        length = len(content) - start
        for key, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(key, value)
        self.end_headers()
        self._write(body)
        if cuts:
            self.close_connection = True
            self.connection.close()

    def _write(self, body: bytes) -> None:
        try:
            for at in range(0, len(body), CHUNK_BYTES):
                if self.standin.faults.delay_s_per_chunk:
                    time.sleep(self.standin.faults.delay_s_per_chunk)
                self.wfile.write(body[at : at + CHUNK_BYTES])
            self.wfile.flush()
        except OSError:
            self.close_connection = True

    def _error(self, status: int, code: str | None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def hub_standin() -> Iterator[HubStandin]:
    hub = HubStandin()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()
