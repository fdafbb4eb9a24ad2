"""A Hub on localhost, just large enough for the real client to read models from and to push them to."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

USER, TOKEN = "me", "hf_mine"
Files = dict[str, bytes]


@dataclass
class Repository:
    """Files by commit, and commits by the name of a branch."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, branch: str = "main") -> str:
        """Put `files` on a branch; returns the commit."""
        state = [self.branches.get(branch, ""), *((name, _sha256(data)) for name, data in sorted(files.items()))]
        oid = hashlib.sha1(repr(state).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        """The commit that a branch's or a commit's name stands for."""
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None


@dataclass
class Hub:
    """What is stored, what was asked, and what is to go wrong.

    Attributes:
        objects: large files by sha256.
        tokens: the roles of the tokens that are valid.
        requests: method and path of everything that was asked.
        faults: by pattern of "METHOD /path", what happens to the next requests that match, one each: a status to answer with, a
            text to answer with 503 for one, or something to do before the request is served as usual.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=lambda: {TOKEN: "write"})
    requests: list[str] = field(default_factory=list)
    faults: dict[str, list[int | str | Callable[[], object]]] = field(default_factory=dict)
    endpoint: str = ""

    def asked(self, pattern: str) -> list[str]:
        return [request for request in self.requests if re.search(pattern, request)]

    def files(self, name: str, branch: str = "main") -> Files:
        repository = self.repositories[name]
        return repository.commits[repository.branches[branch]]


@contextmanager
def serve(folders: dict[str, Path]) -> Iterator[str]:
    """Serve folders as repositories; yields the address to use as HF_ENDPOINT."""
    hub = Hub()
    for name, folder in folders.items():
        add(hub, name, folder)
    with running(hub):
        yield hub.endpoint


def add(hub: Hub, name: str, folder: Path, branch: str = "main") -> str:
    """Put a folder into a repository; returns the commit."""
    repository = hub.repositories.setdefault(name, Repository())
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return repository.commit(files, branch)


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serve a hub; its `endpoint` is the address."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # else it ends half a second late
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, code: int, message: str, error: str = "", **more: str) -> None:
        super().__init__(message)
        self.body = {"error": message, **more}
        self.code, self.headers = code, {"X-Error-Message": message} | ({"X-Error-Code": error} if error else {})


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _large(name: str) -> bool:
    return name.endswith(".safetensors")


def _oid(name: str, data: bytes) -> str:
    return _sha256(data) if _large(name) else _git_hash(data)


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else what is written in two parts waits for the client's word, 40 ms each time

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        address = urllib.parse.urlparse(self.path)
        self.where = urllib.parse.unquote(address.path)
        self.query = urllib.parse.parse_qs(address.query)
        self.body = self._read()
        self.hub.requests.append(f"{self.command} {self.path}")
        try:
            if not self._fault():
                self._route()
        except Refusal as refusal:
            self.reply(refusal.code, json.dumps(refusal.body).encode(), **refusal.headers)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _fault(self) -> bool:
        """Let go wrong what is to go wrong; whether that was the answer."""
        for pattern, planned in self.hub.faults.items():
            if planned and re.search(pattern, f"{self.command} {self.where}"):
                fault = planned.pop(0)
                if isinstance(fault, int):
                    raise Refusal(fault, "out of order")
                if isinstance(fault, str):
                    self.reply(503, fault.encode())
                    return True
                fault()
        return False

    def _route(self) -> None:
        for pattern, serve_it in _ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {self.where}"):
                serve_it(self, *match.groups())
                return
        raise Refusal(404, f"this small hub does not know {self.command} {self.where}", "EntryNotFound")

    def reply(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def tell(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def role(self) -> str | None:
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def may_write(self, name: str) -> None:
        if self.role() is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if self.role() != "write" or not name.startswith(f"{USER}/"):
            raise Refusal(403, f"You don't have the rights to write to {name}")

    def repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.role() is None):
            raise Refusal(404 if self.role() else 401, "Repository not found", "RepoNotFound")
        return found

    def commit(self, name: str, revision: str) -> str:
        oid = self.repository(name).find(revision)
        if oid is None:
            raise Refusal(404, "Invalid rev id", "RevisionNotFound")
        return oid

    def whoami(self) -> None:
        if self.role() is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        self.tell({"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": self.role()}}})

    def validate(self) -> None:
        self.tell({"warnings": [], "errors": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        self.may_write(name)
        if name in self.hub.repositories:
            raise Refusal(409, "You already created this model repo", url=f"{self.hub.endpoint}/{name}")
        made = self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.tell({"url": f"{self.hub.endpoint}/{name}"})

    def describe(self, name: str, revision: str | None = None) -> None:
        oid = self.commit(name, revision or "main")
        repository = self.repository(name)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[oid])]
        self.tell({"id": name, "sha": oid, "siblings": siblings, "tags": [], "private": repository.private})

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        files, start = self.repository(name).commits[self.commit(name, revision)], f"{folder}/" if folder else ""
        inside = {path: data for path, data in sorted(files.items()) if path.startswith(start)}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        deep = self.query.get("recursive", ["true"])[0].lower() == "true"
        folders = (
            {}
            if deep
            else dict.fromkeys(start + path[len(start) :].split("/")[0] for path in inside if "/" in path[len(start) :])
        )
        found = [{"type": "directory", "path": path, "size": 0, "oid": _git_hash(path.encode())} for path in folders]
        self.tell(found + [_entry(path, data) for path, data in inside.items() if deep or "/" not in path[len(start) :]])

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository, oid = self.repository(name), self.commit(name, revision)
        if repository.gated and self.role() is None:
            raise Refusal(403, "Access to this model is restricted", "GatedRepo")
        data = repository.commits[oid].get(path)
        if data is None:
            self.reply(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        else:
            self.reply(200, data, ETag=f'"{_oid(path, data)}"', X_Repo_Commit=oid)

    def branch(self, name: str, branch: str) -> None:
        self.may_write(name)
        repository = self.repository(name)
        if branch in repository.branches:
            raise Refusal(409, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self.tell({})

    def preupload(self, name: str, revision: str) -> None:
        there = self.repository(name).commits[self.commit(name, revision)]
        self.tell({"files": [_mode(one["path"], there) for one in json.loads(self.body)["files"]]})

    def batch(self, name: str) -> None:
        self.may_write(name)
        self.tell({"transfer": "basic", "objects": [self._object(one) for one in json.loads(self.body)["objects"]]})

    def _object(self, one: dict[str, Any]) -> dict[str, Any]:
        at = self.hub.endpoint
        upload = {"upload": {"href": f"{at}/objects/{one['oid']}"}, "verify": {"href": f"{at}/verify"}}
        return {"oid": one["oid"], "size": one["size"]} | ({} if one["oid"] in self.hub.objects else {"actions": upload})

    def keep(self, oid: str) -> None:
        if _sha256(self.body) != oid:
            raise Refusal(400, "sha256 of the content differs")
        self.hub.objects[oid] = self.body
        self.tell({})

    def verify(self) -> None:
        self.tell({})

    def take(self, name: str, revision: str) -> None:
        self.may_write(name)
        before = self.commit(name, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        if lines[0]["value"].get("parentCommit", before) != before:
            raise Refusal(412, "A commit has happened since")
        repository, number = self.repository(name), len(self.repository(name).branches)
        request = f"refs/pr/{number}" if "create_pr" in self.query else ""
        oid = repository.commit(_applied(repository.commits[before], lines[1:], self.hub.objects), request or revision)
        discussion = {"pullRequestUrl": f"{self.hub.endpoint}/{name}/discussions/{number}"} if request else {}
        self.tell({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid} | discussion)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}


def _mode(path: str, there: Files) -> dict[str, Any]:
    oid = _oid(path, there[path]) if path in there else None
    return {"path": path, "uploadMode": "lfs" if _large(path) else "regular", "shouldIgnore": False, "oid": oid}


def _applied(files: Files, lines: list[dict[str, Any]], objects: dict[str, bytes]) -> Files:
    """The files after a commit's operations."""
    files = dict(files)
    for line in lines:
        what, value = line["key"], line["value"]
        if what == "deletedFile":
            del files[value["path"]]
        else:
            files[value["path"]] = objects[value["oid"]] if what == "lfsFile" else base64.b64decode(value["content"])
    return files


_MODEL, _ID = r"/api/(?:models/|(?=datasets/))((?:datasets/)?[^/]+/[^/]+)", r"/((?:datasets/)?[^/]+/[^/]+)"
_ROUTES: dict[str, Callable[..., None]] = {
    "GET /api/whoami-v2": _Handler.whoami,
    "POST /api/validate-yaml": _Handler.validate,
    "POST /api/repos/create": _Handler.create,
    f"GET {_MODEL}": _Handler.describe,
    f"GET {_MODEL}/revision/(.+)": _Handler.describe,
    f"GET {_MODEL}/tree/(refs/[^/]+/[^/]+|[^/]+)(?:/(.+))?": _Handler.tree,
    f"POST {_MODEL}/branch/(.+)": _Handler.branch,
    f"POST {_MODEL}/preupload/(.+)": _Handler.preupload,
    f"POST {_MODEL}/commit/(.+)": _Handler.take,
    rf"POST {_ID}\.git/info/lfs/objects/batch": _Handler.batch,
    "PUT /objects/([0-9a-f]+)": _Handler.keep,
    "POST /verify": _Handler.verify,
    f"(?:GET|HEAD) {_ID}/resolve/(refs/[^/]+/[^/]+|[^/]+)/(.+)": _Handler.resolve,
}
