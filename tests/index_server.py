"""A local package index (PEP 503) that serves one wheel, for tests of fetching from an index."""

from __future__ import annotations

import hashlib
import io
import threading
import time
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


def make_wheel(name: str, version: str, files: dict[str, bytes]) -> bytes:
    """Return a wheel that holds `files` and the least metadata that pip accepts."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in {
            **files,
            f"{info}/METADATA": metadata.encode(),
            f"{info}/WHEEL": wheel.encode(),
            f"{info}/RECORD": b"",
        }.items():
            archive.writestr(zipfile.ZipInfo(path), data)
    return buffer.getvalue()


@dataclass
class IndexServer:
    """Serves one wheel on a free port; a context manager.

    Attributes
    ----------
    package, filename, wheel
        What is offered.
    served : bytes, optional
        Other content sent in its place, under the same name and promised hash.
    cut_after : int, optional
        Bytes of the wheel after which the connection breaks.
    delay : float
        Seconds before the wheel is sent.
    log : list
        Path of each request.
    """

    package: str
    filename: str
    wheel: bytes
    served: bytes | None = None
    cut_after: int | None = None
    delay: float = 0.0
    log: list[str] = field(default_factory=list)

    def __enter__(self) -> IndexServer:
        state = self

        class Handler(_Handler):
            index = state

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
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/simple"

    @property
    def downloads(self) -> int:
        """How often the wheel was asked for."""
        return sum(path.endswith(".whl") for path in self.log)


class _Handler(BaseHTTPRequestHandler):
    index: IndexServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        index = self.index
        self.index.log.append(self.path)
        if self.path == f"/simple/{index.package}/":
            sha256 = hashlib.sha256(index.wheel).hexdigest()
            link = f'<a href="/files/{index.filename}#sha256={sha256}">{index.filename}</a>'
            self._send("text/html", f"<!DOCTYPE html><html><body>{link}</body></html>".encode())
        elif self.path == f"/files/{index.filename}":
            time.sleep(index.delay)
            body = index.wheel if index.served is None else index.served
            self._send("application/octet-stream", body, index.cut_after)
        else:
            self.send_error(404)

    def _send(self, kind: str, body: bytes, cut: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])
