"""A local server that speaks as much of the Hugging Face Hub's protocol as the client needs.

One model repository, in memory: revision and tree listings, and files with HEAD, GET, ranges,
ETag and commit headers. Every way in which the real one can fail is a field of `HubServer`.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from local_server import Handler, LocalServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubServer(LocalServer):
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

    def handler(self) -> type[Handler]:
        return _Handler

    @property
    def endpoint(self) -> str:
        return self.address

    def downloads(self, file: str) -> list[str | None]:
        """Return the Range header of each GET of `file`."""
        return [
            given for method, path, given in self.log if method == "GET" and path.endswith(file)
        ]


class _Handler(Handler):
    state: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.state
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
        if repo != self.state.repo:
            self._error(404, "RepoNotFound")
        elif revision not in (self.state.commit, *self.state.branches):
            self._error(404, "RevisionNotFound")
        else:
            return True
        return False

    def _listing(self, repo: str, kind: str, revision: str) -> None:
        if not self._known(repo, revision):
            return
        hub = self.state
        if kind == "tree":
            document: object = [_tree_entry(name, data) for name, data in hub.files.items()]
        else:
            siblings = [{"rfilename": name} for name in hub.files]
            document = {"id": hub.repo, "sha": hub.commit, "siblings": siblings}
        headers = {"Content-Type": "application/json"}
        self.send_body(200, headers, json.dumps(document).encode())

    def _file(self, repo: str, revision: str, name: str) -> None:
        if not self._known(repo, revision):
            return
        hub = self.state
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
        self.send_body(status, headers, data, cuts.pop(0) if cuts else None)

    def _error(self, status: int, code: str) -> None:
        self.send_body(status, {"X-Error-Code": code} if code else {}, b"")


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
