"""The requests that the small Hub of hub_server.py answers, in the Hub's wire format."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_state import Blob, Hub, Repo

USER = "ann"
LFS_BYTES = 4096  # text of this size and more goes to LFS too, as 10 MB does on the real Hub


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # header and body in one packet: the client waits 40 ms for the second
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        path = parts.path
        if self.command == "PUT" and self.hub.faults.cut_uploads:
            self.rfile.read(10)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        try:
            self.body = self._read_body()
            self._check_token()
            for methods, pattern, route in _ROUTES:
                if self.command in methods and (match := re.fullmatch(pattern, path)):
                    route(self, **{k: unquote(v) for k, v in match.groupdict().items() if v})
                    return
            raise _Refusal(404, f"no route for {self.command} {path}")
        except _Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._send(refusal.status, {"error": refusal.message}, headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _check_token(self) -> None:
        given = self.headers.get("Authorization")
        known = {f"Bearer {self.hub.token}", f"Bearer {self.hub.read_token}"}
        if given is not None and given not in known:
            raise _Refusal(401, "Invalid credentials in Authorization header")

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _may_write(self) -> None:
        given = self.headers.get("Authorization")
        if given is None:
            raise _Refusal(401, "Invalid username or password.")
        if given != f"Bearer {self.hub.token}":
            raise _Refusal(403, "Forbidden: a token with write permission is needed")

    def _repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and "Authorization" not in self.headers):
            # As on the real Hub, a private repository is not told from one that is not there.
            signed = "Authorization" in self.headers
            raise _Refusal(404 if signed else 401, "Repository not found", "RepoNotFound")
        return repo

    def _tree(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]]:
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repo.commits[oid]

    def whoami(self) -> None:
        if "Authorization" not in self.headers:
            raise _Refusal(401, "Invalid username or password.")
        self._send(200, {"type": "user", "name": USER, "orgs": []})

    def create(self) -> None:
        self._may_write()
        wanted = json.loads(self.body)
        if (wanted.get("organization") or USER) != USER:
            raise _Refusal(403, "You don't have the rights to create a model under the namespace")
        repo_id = f"{USER}/{wanted['name']}"
        reply = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            self._send(409, reply | {"error": "You already created this model repo"})
            return
        # Clients before 2 send `private`, later ones `visibility`.
        private = wanted.get("private") or wanted.get("visibility") == "private"
        repo = self.hub.repos[repo_id] = Repo(private=bool(private))
        attributes = self.hub.store(b"*.safetensors filter=lfs\n", lfs=False)
        repo.commit("main", {".gitattributes": attributes}, "initial commit")
        self._send(200, reply)

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        header = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        values = yaml.safe_load(header[1]) if header else None
        base = values.get("base_model", "a/b") if isinstance(values, dict) else ""
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)):
            self._send(200, {"errors": [], "warnings": []})
        else:
            message = f'"base_model" with value "{base}" is not valid, or there is no metadata'
            self._send(400, {"errors": [{"message": message}], "warnings": []})

    def branch(self, repo_id: str, name: str) -> None:
        self._may_write()
        repo = self._repo(repo_id)
        if name in repo.branches:
            raise _Refusal(409, "Reference already exists")
        start = json.loads(self.body).get("startingPoint", "main")
        repo.branches[name] = self._tree(repo, start)[0]
        self._send(200, {})

    def preupload(self, repo_id: str, revision: str) -> None:
        self._may_write()
        tree = self._tree(self._repo(repo_id), revision)[1]
        files = []
        for entry in json.loads(self.body)["files"]:
            lfs = entry["path"].endswith(".safetensors") or entry["size"] >= LFS_BYTES
            old = tree.get(entry["path"])
            answer = {"path": entry["path"], "shouldIgnore": False}
            answer["uploadMode"] = "lfs" if lfs else "regular"
            if old is not None:
                answer["oid"] = old.sha256 if old.lfs else old.git_oid
            files.append(answer)
        self._send(200, {"files": files})

    def lfs_batch(self, repo_id: str) -> None:
        self._may_write()
        self._repo(repo_id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if not (self.hub.folder / wanted["oid"]).exists():
                # The upload itself carries no token: as in a signed URL, its address is the secret.
                upload = f"{self.hub.url}/lfs/{wanted['oid']}?size={wanted['size']}"
                verify = f"{self.hub.url}/{repo_id}.git/info/lfs/verify"
                answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(answer)
        self._send(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        limit = self.hub.faults.lfs_uploads
        if limit is not None and len(self.hub.uploads) >= limit:
            raise _Refusal(403, "Request has expired")
        if len(self.body) != int(self.query["size"]) or self._sha256() != oid:
            raise _Refusal(400, "BadDigest")
        self.hub.store(self.body, lfs=True)
        self.hub.uploads.append(oid)
        self._send(200, b"", {"ETag": f'"{oid}"'})

    def _sha256(self) -> str:
        return hashlib.sha256(self.body).hexdigest()

    def lfs_verify(self, repo_id: str) -> None:
        self._may_write()
        wanted = json.loads(self.body)
        path = self.hub.folder / wanted["oid"]
        if not path.exists() or path.stat().st_size != wanted["size"]:
            raise _Refusal(404, "the object was not uploaded")
        self._send(200, {})

    def commit(self, repo_id: str, revision: str) -> None:
        self._may_write()
        repo = self._repo(repo_id)
        if self.hub.faults.move:
            repo.commit(revision, dict(self._tree(repo, revision)[1]), "somebody else's")
        head, old = self._tree(repo, revision)
        tree = dict(old)
        message = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            message = self._apply(tree, item["key"], item["value"], head) or message
        oid = repo.commit(revision, tree, message)
        url = f"{self.hub.url}/{repo_id}/commit/{oid}"
        self._send(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def _apply(self, tree: dict[str, Blob], key: str, value: dict[str, Any], head: str) -> str:
        """Do one line of a commit; the header's is its message."""
        faults, path = self.hub.faults, value.get("path", "")
        if key == "header":
            if value.get("parentCommit", head) != head:
                raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
            return value["summary"]
        if key == "deletedFile":
            del tree[path]
            return ""
        if key == "file":
            content, lfs = base64.b64decode(value["content"]), False
        else:
            stored, lfs = self.hub.folder / value["oid"], True
            if key != "lfsFile" or not stored.exists():
                raise _Refusal(400, f"{key}: cannot commit {path}")
            content = stored.read_bytes()
        if path == faults.damage:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if path != faults.lose:
            tree[path] = self.hub.store(content, lfs)
        return ""

    def info(self, repo_id: str, revision: str = "main") -> None:
        repo = self._repo(repo_id)
        oid, tree = self._tree(repo, revision)
        siblings = [{"rfilename": name} for name in tree]
        identity = {"id": repo_id, "modelId": repo_id, "author": USER, "sha": oid}
        self._send(200, identity | {"private": repo.private, "tags": [], "siblings": siblings})

    def tree(self, repo_id: str, revision: str, below: str = "") -> None:
        tree = self._tree(self._repo(repo_id), revision)[1]
        entries = [
            _entry(n, blob) for n, blob in tree.items() if n.startswith(f"{below}/"[below == "" :])
        ]
        if below and not entries:
            raise _Refusal(404, f"{below} does not exist", "EntryNotFound")
        self._send(200, entries)

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        oid, tree = self._tree(self._repo(repo_id), revision)
        headers = {"X-Repo-Commit": oid}
        if name not in tree:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self._send(404, b"Entry not found", headers)
            return
        blob = tree[name]
        if blob.lfs:
            headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
            # 127.0.0.1 and localhost are two hosts to the client, as the Hub and its store are.
            place = self.hub.url.replace("127.0.0.1", "localhost")
            self._send(302, b"", headers | {"Location": f"{place}/store/{blob.sha256}"})
        else:
            headers["ETag"] = f'"{blob.git_oid}"'
            self._send(200, blob.path.read_bytes(), headers)

    def store(self, oid: str) -> None:
        self._send(200, (self.hub.folder / oid).read_bytes(), {"ETag": f'"{oid}"'})


def _entry(name: str, blob: Blob) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": blob.size, "oid": blob.git_oid}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
    return entry


_REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+?)"
_ROUTES: tuple[tuple[tuple[str, ...], str, Callable[..., None]], ...] = (
    (("GET",), "/api/whoami-v2", HubHandler.whoami),
    (("POST",), "/api/repos/create", HubHandler.create),
    (("POST",), "/api/validate-yaml", HubHandler.validate_yaml),
    (("POST",), rf"/api/models/{_REPO}/branch/(?P<name>[^/]+)", HubHandler.branch),
    (("POST",), rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", HubHandler.preupload),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", HubHandler.lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", HubHandler.lfs_upload),
    (("POST",), rf"/{_REPO}\.git/info/lfs/verify", HubHandler.lfs_verify),
    (("POST",), rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", HubHandler.commit),
    (("GET",), rf"/api/models/{_REPO}", HubHandler.info),
    (("GET",), rf"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", HubHandler.info),
    (("GET",), rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<below>.+))?", HubHandler.tree),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", HubHandler.resolve),
    (("GET", "HEAD"), r"/store/(?P<oid>[0-9a-f]{64})", HubHandler.store),
)
