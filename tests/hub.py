"""A Hub on localhost, just large enough for the real client to download a model repository from."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMIT = "a" * 40


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[str]:
    """Serve folders as repositories; yields the address to use as HF_ENDPOINT."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None: ...

        def reply(self, code: int, body: bytes, **headers: str) -> None:
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/.+)?", path):
                self.describe(match[1], match[2])
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                self.give(match[1], match[2])
            else:
                self.reply(404, b"{}")

        do_HEAD = do_GET  # noqa: N815

        def describe(self, name: str, what: str | None) -> None:
            if name not in repositories:
                self.reply(404, b"{}", X_Error_Code="RepoNotFound")
                return
            files = sorted(repositories[name].iterdir())
            tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _oid(p)} for p in files]
            info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": p.name} for p in files], "tags": [], "private": False}
            self.reply(200, json.dumps(tree if what == "tree" else info).encode(), Content_Type="application/json")

        def give(self, name: str, file: str) -> None:
            path = repositories.get(name, Path("/nonexistent")) / file
            if not path.is_file():
                self.reply(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                return
            self.reply(200, path.read_bytes(), ETag=f'"{_oid(path)}"', X_Repo_Commit=COMMIT)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
