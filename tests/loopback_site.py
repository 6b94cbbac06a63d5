"""A web server on 127.0.0.1 for pictures; also stands in for OSS, whose client is the genuine one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """A web server on 127.0.0.1. What it answers is set with :meth:`add`; ``seen`` has the headers of each request."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes | Iterable[bytes], dict[str, str]]] = {}
        self.seen: list[Message] = []
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": self}))
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, path: str, body: bytes | Iterable[bytes], status: int = 200, **headers: str) -> str:
        """Serve ``body`` at ``path``, in chunks if it is no bytes; ``Content_Type=`` is a header. Returns its URL."""
        self.answers[path] = status, body, {key.replace("_", "-"): value for key, value in headers.items()}
        return self.address + path

    def __enter__(self) -> Site:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news: those of endless answers must."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.site.seen.append(self.headers)
        status, body, headers = self.site.answers.get(self.path, (404, b"", {}))
        self.send_response(status)
        headers = {"Connection": "close"} | headers
        whole = isinstance(body, bytes)
        headers |= {"Content-Length": headers.get("Content-Length", str(len(body)))} if whole else {}
        headers |= {} if whole else {"Transfer-Encoding": "chunked"}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if whole:
            self.wfile.write(body)
            return
        for piece in body:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")


def closed_port() -> int:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return closed.getsockname()[1]
