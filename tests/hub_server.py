"""A local server that speaks as much of the Hugging Face Hub's protocol as the client needs.

One model repository, in memory: revision and tree listings, and files with HEAD, GET, ranges,
ETag and commit headers. Every way in which the real one can fail is a field of `HubServer`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubServer:
    """The repository and its faults; a context manager that serves it on a free port.

    Attributes
    ----------
    files : dict
        Content by file name.
    repo, commit, branches
        Names under which it is found.
    token : str, optional
        If set, requests without it are answered as by a gated repository.
    status : int
        If set, every request is answered with this HTTP status.
    served : dict
        Other content that is sent in place of a file, under the same length and ETag.
    lost : set
        Files that are listed but not there.
    cut_after : dict
        For a file, how many bytes are sent before the connection breaks, once per entry.
    delay : float
        Seconds that every answer takes.
    log : list
        ``(method, path, Range header)`` of each request.
    """

    files: dict[str, bytes]
    repo: str = "owner/model"
    commit: str = COMMIT
    branches: tuple[str, ...] = ("main",)
    token: str | None = None
    status: int = 0
    served: dict[str, bytes] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    delay: float = 0.0
    log: list[tuple[str, str, str | None]] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        state = self

        class Handler(_Handler):
            hub = state

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def downloads(self, file: str) -> list[str | None]:
        """Return the Range header of each GET of `file`."""
        return [
            given for method, path, given in self.log if method == "GET" and path.endswith(file)
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        hub.log.append((self.command, path, self.headers.get("Range")))
        time.sleep(hub.delay)
        if hub.status:
            return self._error(hub.status, "")
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            known = self.headers.get("Authorization") is not None
            return self._error(403 if known else 401, "GatedRepo")
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path)
        if listing:
            return self._listing(*listing.groups())
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if resolve:
            return self._file(*resolve.groups())
        return self._error(404, "")

    def _known(self, repo: str, revision: str) -> bool:
        if repo != self.hub.repo:
            self._error(404, "RepoNotFound")
        elif revision not in (self.hub.commit, *self.hub.branches):
            self._error(404, "RevisionNotFound")
        else:
            return True
        return False

    def _listing(self, repo: str, kind: str, revision: str) -> None:
        if not self._known(repo, revision):
            return
        hub = self.hub
        if kind == "tree":
            document: object = [_tree_entry(name, data) for name, data in hub.files.items()]
        else:
            siblings = [{"rfilename": name} for name in hub.files]
            document = {"id": hub.repo, "sha": hub.commit, "siblings": siblings}
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, revision: str, name: str) -> None:
        if not self._known(repo, revision):
            return
        hub = self.hub
        if name not in hub.files or name in hub.lost:
            return self._error(404, "EntryNotFound")
        etag = hashlib.sha256(hub.files[name]).hexdigest()
        data = hub.served.get(name, hub.files[name])
        headers = {
            "ETag": f'"{etag}"',
            "X-Linked-ETag": f'"{etag}"',
            "X-Linked-Size": str(len(data)),
            "X-Repo-Commit": hub.commit,
            "Accept-Ranges": "bytes",
        }
        status = 200
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[start:]
        cuts = hub.cut_after.get(name, []) if self.command == "GET" else []
        self._send(status, data, headers, cuts.pop(0) if cuts else None)

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code} if code else {})

    def _send(
        self, status: int, body: bytes, headers: Mapping[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut is None:
            self.wfile.write(body)
        else:
            self.wfile.write(body[:cut])
            self.close_connection = True


def _tree_entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {
        "type": "file",
        "path": name,
        "size": len(data),
        "oid": hashlib.sha1(data).hexdigest(),
    }
    if name.endswith(".safetensors"):
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
    return entry
