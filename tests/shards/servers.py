"""Real servers for tests of URLs: a web server of a folder, with faults, and an S3 server."""

from __future__ import annotations

import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class WebServer:
    """Web server of a folder. `cuts`: how many answers for a file break off in the middle."""

    folder: Path
    ranges: bool = False
    cuts: Counter[str] = field(default_factory=Counter)
    requests: list[str] = field(default_factory=list)
    """Requests as METHOD NAME, those for the rest of a file as METHOD NAME FIRST-."""
    url: str = ""
    status: int | None = None
    """Status of every answer; None for the true one."""


@contextmanager
def web_server(folder: Path, **options: object) -> Iterator[WebServer]:
    server = WebServer(folder, **options)

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self) -> None:
            name = self.path.partition("?")[0].strip("/")
            wanted = self.headers.get("Range", "")
            server.requests.append(f"GET {name} {wanted.removeprefix('bytes=')}".strip())
            if server.status:
                return self.send_error(server.status)
            if not (folder / name).is_file():
                return super().do_GET()
            data = (folder / name).read_bytes()
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            if wanted and server.ranges:
                data = data[int(first) : int(last) + 1 if last else None]
            self.send_response(206 if wanted and server.ranges else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if server.cuts[name] > 0:
                server.cuts[name] -= 1
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            else:
                self.wfile.write(data)
            return None

        def do_HEAD(self) -> None:
            return self.send_error(server.status) if server.status else super().do_HEAD()

        def log_message(self, *arguments: object) -> None:
            """Print nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        server.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            running.shutdown()
            thread.join()


S3_VARIABLES = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[str]:
    """Run an S3 server with the bucket `bucket`; yield its address."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        client = boto3.client(
            "s3", endpoint_url=address, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
        )
        client.create_bucket(Bucket="bucket")
        yield address
    finally:
        server.stop()
