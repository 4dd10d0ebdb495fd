"""A proxy in front of a real object store that breaks what passes through it, as networks and busy stores do. Requests
go on as they came, their signatures included, so that what is not broken is answered by the real server."""

from __future__ import annotations

import http.client
import threading
import time
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from tests.object_store import IMPATIENT, ObjectStore

THROUGH_PROXY = replace(IMPATIENT, timeout=19.0)
"""Another limit than the store's own, since clients are kept by their settings and each has its endpoint."""
ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>{}</Message></Error>'


@dataclass
class Fault:
    """What happens to the next requests: `times` of them, those of `method` whose path has `inside` in it."""

    kind: Literal["status", "slow", "drip", "cut", "short", "flip"]
    """status: an answer of the proxy's own; slow: seconds before the real one; drip: seconds before every byte of it;
    cut: half of the body, then the connection ends; short: half of the body, said to be all; flip: a byte altered."""
    times: int = 1_000_000
    inside: str = ""
    method: str = "GET"
    status: int = 503
    code: str = "SlowDown"
    message: str = "Please reduce your request rate."
    seconds: float = 0.0


@dataclass
class FaultyStore:
    """Listens on a port of its own; `faults` are tried in order, the first that fits breaks the request."""

    store: ObjectStore
    faults: list[Fault] = field(default_factory=list)
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path with query, range) of every request."""

    def __post_init__(self) -> None:
        proxy, self._lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                return

            def _pass(self) -> None:
                proxy.answer(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign] # clients hang up on what is slow
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str, inside: str = "") -> int:
        """Requests so far."""
        return sum(method == how and inside in path for how, path, _ in self.seen)

    def answer(self, asked: BaseHTTPRequestHandler) -> None:
        """One request, by the real server or by the fault that it meets."""
        body = asked.rfile.read(int(asked.headers.get("Content-Length", 0)))
        fault = self._fault(asked)
        if fault and fault.kind == "status":
            text = ERROR.format(fault.code, fault.message).encode()
            return self._send(asked, fault.status, [("Content-Type", "application/xml")], text, len(text))
        if fault and fault.kind == "slow":
            time.sleep(fault.seconds)
        real = http.client.HTTPConnection("127.0.0.1", self.store.port, timeout=30)
        real.request(asked.command, asked.path, body, dict(asked.headers))
        found = real.getresponse()
        content = found.read()
        real.close()
        kept = [(n, v) for n, v in found.getheaders() if n.lower() not in ("content-length", "transfer-encoding")]
        length = int(found.headers.get("Content-Length") or 0) if asked.command == "HEAD" else len(content)
        if fault and fault.kind in ("cut", "short"):
            content = content[: len(content) // 2]
            length = len(content) if fault.kind == "short" else length
        if fault and fault.kind == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._send(asked, found.status, kept, content, length, fault.seconds if fault and fault.kind == "drip" else 0)

    def _fault(self, asked: BaseHTTPRequestHandler) -> Fault | None:
        with self._lock:
            self.seen.append((asked.command, asked.path, asked.headers.get("Range", "")))
            for fault in self.faults:
                if fault.times and fault.method == asked.command and fault.inside in asked.path:
                    fault.times -= 1
                    return fault
        return None

    def _send(
        self,
        asked: BaseHTTPRequestHandler,
        status: int,
        headers: list[tuple[str, str]],
        content: bytes,
        length: int,
        every: float = 0,
    ) -> None:
        asked.send_response(status)
        for name, value in headers:
            asked.send_header(name, value)
        asked.send_header("Content-Length", str(length))
        asked.end_headers()
        if asked.command == "HEAD":
            return
        for place in range(0, len(content), 1 if every else max(1, len(content))):
            time.sleep(every)
            asked.wfile.write(content[place : place + 1] if every else content)
            asked.wfile.flush()
        if len(content) < length:
            asked.close_connection = True
