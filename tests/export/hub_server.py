"""Stand-in for the Hugging Face Hub on this machine: it records requests, keeps the files, and serves them again."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from local_servers import running

TOKEN = "hf_stand_in"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubServer:
    """State of the server."""

    address: str = ""
    writable: bool = True
    """False: the token may only read."""
    created: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the requests to create a repository."""
    cards: list[str] = field(default_factory=list)
    """Model cards that were sent for validation."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Committed files by path."""


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a server in this context."""
    state = HubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, content: object, status: int = 200, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_GET(self) -> None:
            if self.path.startswith("/api/whoami"):
                known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                self.answer({"name": "ada", "type": "user"} if known else {"error": "Invalid"}, 200 if known else 401)
            elif found := re.fullmatch(r"/[\w/.-]+/resolve/\w+/(.+)", self.path):
                content = state.files.get(found[1])
                if content is None:
                    self.answer({}, 404, X_Error_Code="EntryNotFound")
                else:
                    tag = f'"{hashlib.sha256(content).hexdigest()}"'
                    self.answer(content, ETag=tag, X_Repo_Commit=COMMIT)
            elif "/tree/" in self.path:
                self.answer(
                    [
                        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for name, content in state.files.items()
                    ]
                )
            elif self.path.startswith("/api/models/"):
                self.answer(
                    {"id": "ada/demo", "sha": COMMIT, "siblings": [{"rfilename": name} for name in state.files]}
                )
            else:
                self.answer({"error": f"unknown {self.path}"}, 404)

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            content = self.body()
            state.blobs[hashlib.sha256(content).hexdigest()] = content
            self.answer(b"")

        def do_POST(self) -> None:
            body = self.body()
            if self.path != "/api/validate-yaml" and not state.writable:
                self.answer({"error": "You don't have the rights"}, 403)
            elif self.path == "/api/repos/create":
                state.created.append(json.loads(body))
                self.answer({"url": f"{state.address}/ada/demo", "id": "ada/demo"})
            elif self.path == "/api/validate-yaml":
                state.cards.append(json.loads(body)["content"])
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                large = (".safetensors", ".onnx", ".pt2")
                modes = {file["path"]: "lfs" if file["path"].endswith(large) else "regular" for file in files}
                self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**entry, "actions": {"upload": {"href": f"{state.address}/blobs/{entry['oid']}", "header": {}}}}
                    for entry in json.loads(body)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": objects})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        state.files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        state.files[value["path"]] = state.blobs[value["oid"]]
                self.answer({"commitUrl": f"{state.address}/ada/demo/commit/{COMMIT}", "commitOid": COMMIT})
            else:
                self.answer({"error": f"unknown {self.path}"}, 404)

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as state.address:
        yield state
