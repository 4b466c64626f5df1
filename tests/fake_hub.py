"""A hub of one process: the part of huggingface.co's HTTP interface that uploading and fetching a repository use.

It keeps commits in memory, files by content. Tests run a program against it in a process of its own (`environment`), since
huggingface_hub reads its address once.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 20_000  # bytes from which a file goes the way of large ones
TOKEN = "hf_of_a_test"


class FakeHub(ThreadingHTTPServer):
    """Repositories by name, each with commits by hash and branches; `requests` are (method, path)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.blobs: dict[str, bytes] = {}  # large files by SHA-256
        self.commits: dict[str, dict[str, bytes]] = {}  # files by path, by hash
        self.branches: dict[str, dict[str, str]] = {}  # hash by branch, by repository
        self.private: dict[str, bool] = {}
        self.requests: list[tuple[str, str]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process that talks to this hub alone."""
        return os.environ | {
            "HF_ENDPOINT": self.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch or commit."""
        branches = self.branches[repository]
        return self.commits[branches.get(revision, revision)]

    def commit(self, repository: str, branch: str, files: dict[str, bytes]) -> str:
        parts = [f"{name} {hashlib.sha256(content).hexdigest()}" for name, content in sorted(files.items())]
        number = hashlib.sha1("\n".join([repository, branch, str(len(self.commits)), *parts]).encode()).hexdigest()
        self.commits[number] = files
        self.branches.setdefault(repository, {})[branch] = number
        return number


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self) -> None:
        body, hub = self._body(), self.server
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(("POST", path))
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "no token"}, 401)
        if path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said.get('organization') or 'me'}/{said['name']}"
            if said.get("organization") == "not":
                return self._answer({"error": "You don't have the rights to create a model there"}, 403)
            if name in hub.branches:
                return self._answer({"error": "exists", "url": f"{hub.address}/{name}"}, 409)
            hub.private[name] = bool(said.get("private") or said.get("visibility") == "private")
            hub.commit(name, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
            return self._answer({"url": f"{hub.address}/{name}", "name": name, "id": name})
        if parts[-1] == "batch":
            objects = [
                {
                    "oid": item["oid"],
                    "size": item["size"],
                    "actions": {"upload": {"href": f"{hub.address}/lfs/{item['oid']}"}},
                }
                for item in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        repository, action, branch = "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
        if action == "branch":
            if branch in hub.branches[repository]:
                return self._answer({"error": "exists"}, 409)
            hub.branches[repository][branch] = hub.branches[repository]["main"]
            return self._answer({})
        if branch not in hub.branches[repository]:
            return self._answer({"error": f"Invalid rev id: {branch}"}, 404, X_Error_Code="RevisionNotFound")
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] > LARGE else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        files = dict(hub.files(repository, branch))
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = hub.blobs[value["oid"]]
        number = hub.commit(repository, branch, files)
        return self._answer(
            {"success": True, "commitOid": number, "commitUrl": f"{hub.address}/{repository}/commit/{number}"}
        )

    def do_PUT(self) -> None:
        oid, content = self.path.rsplit("/", 1)[1], self._body()
        self.server.requests.append(("PUT", self.path))
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.blobs[oid] = content
        self._answer(b"")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return self._answer({"type": "user", "name": "me", "orgs": []})
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repository not in hub.branches:
            return self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        at = 5 if parts[0] == "api" else 3
        revision = parts[at] if len(parts) > at else "main"
        number = hub.branches[repository].get(revision, revision)
        if number not in hub.commits:
            return self._answer({"error": f"Invalid rev id: {revision}"}, 404, X_Error_Code="RevisionNotFound")
        files = hub.commits[number]
        if parts[0] == "api" and "tree" in parts[4:5]:
            return self._answer([_entry(name, content) for name, content in sorted(files.items())])
        if parts[0] == "api":
            siblings = [{"rfilename": name} for name in sorted(files)]
            return self._answer({"id": repository, "sha": number, "siblings": siblings, "private": hub.private[repository]})
        content = files["/".join(parts[4:])]
        etag = hashlib.sha256(content).hexdigest()
        return self._answer(content, X_Repo_Commit=number, ETag=f'"{etag}"')


def _entry(name: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha256(content).hexdigest()
    large = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 130}} if len(content) > LARGE else {}
    return {"type": "file", "path": name, "size": len(content), "oid": oid[:40]} | large
