"""A local HTTP server for a test: on a free port, in a thread, as a context manager."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self


class LocalServer:
    """Answers requests by `handler`, whose instances find this object as ``self.state``."""

    def handler(self) -> type[Handler]:
        raise NotImplementedError

    def __enter__(self) -> Self:
        bound = type("BoundHandler", (self.handler(),), {"state": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), bound)
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
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """A request handler that logs nothing and sends bodies, broken off on request."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def send_body(
        self, status: int, headers: dict[str, str], body: bytes, cut: int | None = None
    ) -> None:
        """Send an answer, of its body the first `cut` bytes only, under the full length."""
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True
