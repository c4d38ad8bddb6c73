"""A local package index (PEP 503) that serves one wheel, for tests of fetching from an index."""

from __future__ import annotations

import hashlib
import io
import time
import zipfile
from dataclasses import dataclass, field

from local_server import Handler, LocalServer


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
class IndexServer(LocalServer):
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

    def handler(self) -> type[Handler]:
        return _Handler

    @property
    def url(self) -> str:
        return f"{self.address}/simple"

    @property
    def downloads(self) -> int:
        """How often the wheel was asked for."""
        return sum(path.endswith(".whl") for path in self.log)


class _Handler(Handler):
    state: IndexServer

    def do_GET(self) -> None:
        index = self.state
        index.log.append(self.path)
        if self.path == f"/simple/{index.package}/":
            sha256 = hashlib.sha256(index.wheel).hexdigest()
            link = f'<a href="/files/{index.filename}#sha256={sha256}">{index.filename}</a>'
            page = f"<!DOCTYPE html><html><body>{link}</body></html>"
            self.send_body(200, {"Content-Type": "text/html"}, page.encode())
        elif self.path == f"/files/{index.filename}":
            time.sleep(index.delay)
            body = index.wheel if index.served is None else index.served
            headers = {"Content-Type": "application/octet-stream"}
            self.send_body(200, headers, body, index.cut_after)
        else:
            self.send_error(404)
