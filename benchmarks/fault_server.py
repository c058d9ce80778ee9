"""Web server of a folder that fails on purpose, for tests of shards at URLs.

It answers requests for files, or for ranges of them. A fault is one of

    reset      the connection is reset after half of the answer
    stall      half of the answer comes, then nothing until the client gives up
    truncate   the connection is closed in order after half of the answer
    busy       503 Service Unavailable
    corrupt    one byte of the answer is another one
"""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from local_servers import running

Fault = Literal["reset", "stall", "truncate", "busy", "corrupt"]
FAULTS: tuple[Fault, ...] = get_args(Fault)


class Served(NamedTuple):
    """Answer to a request for content, also of a file that does not exist."""

    name: str
    """File name."""
    fault: Fault | None
    first: int
    """First byte that was asked for."""


class FaultServer(ThreadingHTTPServer):
    """Server of the files of a folder, which gives the faults of `plan` to the next requests for content."""

    daemon_threads = True

    def __init__(self, folder: Path, ranges: bool) -> None:
        self.folder = folder
        self.ranges = ranges
        """False: a request for a range gets the whole file."""
        self.status: int | None = None
        """Status of every answer; None for the true one."""
        self.plan: list[tuple[str, Fault]] = []
        """Faults to come, each with the end of the names that it may hit. A request gets the first that fits."""
        self.served: list[Served] = []
        """Answers so far, in order."""
        self.over = threading.Event()
        """Set when the server ends, which ends its stalls."""
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def next_fault(self, name: str, first: int) -> Fault | None:
        """Return the fault of a request for a file from a byte on, and note the request."""
        with self._lock:
            fault = None
            for place, (suffix, planned) in enumerate(self.plan):
                if name.endswith(suffix):
                    fault = planned
                    del self.plan[place]
                    break
            self.served.append(Served(name, fault, first))
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultServer

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer(content=False)

    def do_GET(self) -> None:
        self._answer(content=True)

    def _answer(self, content: bool) -> None:
        name = self.path.partition("?")[0].strip("/")
        path = self.server.folder / name
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        fault = self.server.next_fault(name, start) if content else None
        if fault == "busy" or self.server.status is not None or not path.is_file():
            self.send_error(503 if fault == "busy" else self.server.status or 404)
            return
        data = path.read_bytes()
        size, ranged = len(data), wanted is not None and self.server.ranges
        if wanted and ranged:
            data = data[start : int(wanted[2] or size - 1) + 1]
        if fault == "corrupt":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{size}")
        self.end_headers()
        if not content:
            return
        if fault in ("reset", "stall", "truncate"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            if fault == "stall":
                self.server.over.wait()
            if fault == "reset":
                # Closing now discards what was not sent, and tells the client so by a reset.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            return
        self.wfile.write(data)


@contextmanager
def serving(folder: Path, ranges: bool = True) -> Iterator[FaultServer]:
    """Serve a folder while the context is open."""
    server = FaultServer(folder, ranges)
    with running(server):
        try:
            yield server
        finally:
            server.over.set()
