"""A small Hub on 127.0.0.1 on which huggingface_hub can create repositories, upload and download.

huggingface_hub has no such test double. Files are kept in memory; large files use the Git LFS protocol, without Xet.
This file also writes cache entries by hand, for tests of offline use.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> its files
    names: dict[str, str] = field(default_factory=dict)  # main, refs/pr/1, … -> commit

    def commit(self, files: dict[str, bytes | None], name: str = "main") -> str:
        """Commit files to main. None deletes a file."""
        files = {path: content for path, content in {**self.files(), **files}.items() if content is not None}
        oid = hashlib.sha1(f"{len(self.revisions)} {sorted(files)}".encode()).hexdigest()
        self.revisions[oid] = files
        self.names[name] = oid
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.revisions.get(self.names.get(revision, revision), {})


@dataclass
class Hub:
    """The server's state. `with Hub() as hub` starts and stops it."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    writers: dict[str, str] = field(
        default_factory=lambda: {"hf_writer": "org"}
    )  # token -> owner whose repositories it may write
    large_files: dict[str, bytes] = field(default_factory=dict)  # uploaded by LFS, by their sha256
    requests: list[str] = field(default_factory=list)  # method and path
    ranges: list[str] = field(default_factory=list)  # ranges of files that were requested in part
    # makes requests fail: called with method and path, returns a status code, or "cut" to close the connection
    # half-way
    fault: Callable[[str, str], int | str | None] = lambda method, path: None

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - names of http.server

    def _handle(self):
        self.url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.state.requests.append(f"{self.command} {self.path}")
        if self.command == "GET" and (wanted := self.headers.get("Range")):
            self.state.ranges.append(wanted)
        fault = self.state.fault(self.command, self.url.path)
        if isinstance(fault, int):
            return self._answer({"error": "something is wrong with the server"}, fault)
        self.cut = fault == "cut"
        parts = [unquote(part) for part in self.url.path.strip("/").split("/")]
        if self.url.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.url.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if parts[0] == "lfs":
            assert hashlib.sha256(body).hexdigest() == parts[1]
            if self.cut:
                return self._break_off()
            self.state.large_files[parts[1]] = body
            return self._answer({})
        if parts[0] == "api":
            name, action, revision = "/".join(parts[2:4]), (parts[4:5] or [""])[0], "/".join(parts[5:]) or "main"
        elif parts[1].endswith(".git"):
            name, action, revision = f"{parts[0]}/{parts[1].removesuffix('.git')}", "batch", "main"
        else:
            name, action, revision = "/".join(parts[:2]), "resolve", "/".join(parts[3:4])
        repository = self.state.repositories.get(name)
        if repository is None or (repository.private and not self._may_write(name)):
            # without a token the Hub does not say whether a repository exists
            return self._answer(
                {"error": "Repository not found"}, 404 if self._token() else 401, error_code="RepoNotFound"
            )
        if action == "resolve":
            return self._resolve(repository, revision, "/".join(parts[4:]))
        as_pr = "create_pr" in self.url.query or action == "batch"  # any logged-in user may open a pull request
        if action in ("preupload", "commit", "batch") and not (self._may_write(name) or (as_pr and self._token())):
            return self._answer({"error": "You have no write permission"}, 403 if self._token() else 401)
        if action == "preupload":
            return self._preupload(repository, json.loads(body))
        if action == "batch":
            return self._batch(json.loads(body))
        if action == "commit":
            return self._commit(name, repository, body)
        return self._describe(name, repository, action, revision)

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _may_write(self, name: str) -> bool:
        return self.state.writers.get(self._token()) == name.split("/")[0]

    def _create(self, body: dict):
        name = f"{body.get('organization') or self.state.writers.get(self._token())}/{body['name']}"
        if self._token() is None:
            return self._answer({"error": "Invalid username or password."}, 401)
        if not self._may_write(name):
            return self._answer({"error": "You don't have the rights to create a model here"}, 403)
        url = f"{self.state.url}/{name}"
        if name in self.state.repositories:
            return self._answer({"error": "You already created this model repo", "url": url}, 409)
        private = body.get("visibility") == "private" or bool(body.get("private"))
        self.state.repositories[name] = Repository(private=private)
        self.state.repositories[name].commit({".gitattributes": b""})
        return self._answer({"url": url, "name": name, "id": name})

    def _preupload(self, repository: Repository, body: dict):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": _oid(repository.files()[file["path"]]) if file["path"] in repository.files() else None,
            }
            for file in body["files"]
        ]
        return self._answer({"files": files})

    def _batch(self, body: dict):
        objects = []
        for item in body["objects"]:
            if item["oid"] not in self.state.large_files:  # otherwise there is nothing to do
                item["actions"] = {"upload": {"href": f"{self.state.url}/lfs/{item['oid']}"}}
            objects.append(item)
        return self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repository: Repository, body: bytes):
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.large_files[value["oid"]]
            elif line["key"] == "deletedFile":
                files[value["path"]] = None
        as_pr = "create_pr" in self.url.query
        number = sum(name.startswith("refs/pr/") for name in repository.names) + 1
        oid = repository.commit(files, f"refs/pr/{number}" if as_pr else "main")
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.state.url}/{name}/commit/{oid}"}
        if as_pr:
            answer["pullRequestUrl"] = f"{self.state.url}/{name}/discussions/{number}"
        return self._answer(answer)

    def _describe(self, name: str, repository: Repository, action: str, revision: str):
        files = repository.files(revision)
        if action == "tree":
            return self._answer(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
                    for path, content in files.items()
                ]
            )
        oid = repository.names.get(revision, revision)
        siblings = [{"rfilename": path} for path in files]
        return self._answer(
            {"id": name, "modelId": name, "sha": oid, "private": repository.private, "siblings": siblings}
        )

    def _resolve(self, repository: Repository, revision: str, path: str):
        oid = repository.names.get(revision, revision)
        if repository.gated and not self._token():
            return self._answer({"error": "Access is restricted"}, 401, error_code="GatedRepo")
        if oid not in repository.revisions:
            return self._answer({"error": "Invalid rev id"}, 404, error_code="RevisionNotFound")
        content = repository.files(revision).get(path)
        if content is None:
            return self._answer({"error": "Entry not found"}, 404, {"X-Repo-Commit": oid}, "EntryNotFound")
        large = path.endswith((".ckpt", ".safetensors"))
        etag = hashlib.sha256(content).hexdigest() if large else _oid(content)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        status = 200
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        return self._answer(content, status, headers)

    def _answer(self, content, status: int = 200, headers: dict | None = None, error_code: str | None = None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if error_code:
            self.send_header("X-Error-Code", error_code)
        if not isinstance(content, bytes) and "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if getattr(self, "cut", False):
            self.wfile.write(body[: len(body) // 2])
            return self._break_off()
        self.wfile.write(body)

    def _break_off(self):
        self.close_connection = True
        self.connection.close()


def _oid(content: bytes) -> str:
    """Return the git hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def put_into_cache(cache: Path, repository: str, files: dict[str, Path]) -> Path:
    """
    Write the cache entry that a download would write. See
    https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
    """
    folder, commit = cache / f"models--{repository.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    snapshot = folder / "snapshots" / commit
    for name, file in files.items():
        blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.symlink_to(file)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(file)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    return snapshot
