"""A static web server on loopback, of the kinds that there are: with ranges or without, redirects, pages, logins."""

import gzip
import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CUT = 0
PAGE = b"<!DOCTYPE html><html><body>Nothing is here, or everything is.</body></html>"


@dataclass
class WebServer:
    """A server of the files of a folder. It knows GET and nothing else, as one behind signed links does.

    ranges:   "all"; "plain", without those of a file's last bytes (bytes=-4); "none", as Python's own http.server
    absent:   the status for a file that is not there; 200 with a page
    to:       where every file is instead, with a signature; the answer is a redirect
    token:    the header Authorization that is asked for
    gzipped:  files are sent compressed, whatever is asked for
    failures: statuses for the next requests; CUT: the connection ends in the middle of an answer
    asked:    (method, path, headers) of each request
    """

    folder: Path
    ranges: str = "all"
    absent: int = 404
    to: str = ""
    token: str = ""
    gzipped: bool = False
    failures: list[int] = field(default_factory=list)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        self.asked.append((method, path, headers))
        if self.failures:
            status = self.failures.pop(0)
            return status, ({"Content-Length": "1000", "Connection": "close"} if status == CUT else {}), b"{"
        if self.token and headers.get("authorization") != self.token:
            return 401, {}, PAGE
        if method != "GET":
            return 405, {}, PAGE
        name = urlsplit(path).path  # a proxy is asked for a whole URL
        if self.to:
            return 302, {"Location": f"{self.to}{name}?sig=SIGNATURE"}, b""
        file = self.folder / name.lstrip("/")
        if not file.is_file():
            return self.absent, {}, PAGE
        return self._content(file.read_bytes(), headers.get("range", ""))

    def _content(self, content: bytes, wanted: str) -> tuple[int, dict[str, str], bytes]:
        if self.gzipped:
            return 200, {"Content-Encoding": "gzip"}, gzip.compress(content)
        bounds = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
        if bounds is None or self.ranges == "none" or (self.ranges == "plain" and not bounds[1]):
            return 200, {}, content
        size = len(content)
        start = int(bounds[1]) if bounds[1] else max(0, size - int(bounds[2]))
        stop = min(size, int(bounds[2]) + 1) if bounds[1] and bounds[2] else size
        if start >= stop:
            return 416, {"Content-Range": f"bytes */{size}"}, b""
        return 206, {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}, content[start:stop]


@contextmanager
def serving(server: WebServer) -> Iterator[WebServer]:
    """The server at its `url`, until the end."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer in one piece: else each waits for the client's acknowledgement of its headers

        def __getattr__(self, name: str) -> Any:
            if name.startswith("do_"):
                return self.respond
            raise AttributeError(name)

        def respond(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, own, content = server.answer(self.command, self.path, headers)
            self.send_response(200 if status == CUT else status)
            for name, value in {"Content-Length": str(len(content)), **own}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content if self.command == "GET" else b"")

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:  # the client wanted no more of it
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        server.url = f"http://127.0.0.1:{listening.server_port}"
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            listening.shutdown()
