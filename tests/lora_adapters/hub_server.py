"""A local Hub server on 127.0.0.1 with the endpoints that huggingface_hub uses to create, write and read repositories.

    with HubServer() as hub:
        hub.endpoint                       # the value for HF_ENDPOINT
        hub.repos["me/x"].files("main")    # {path: bytes}

Every commit stores all files. Repositories may be private or gated; `hub.fail(n)` answers the next n matching requests
with status 503, to simulate an outage.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_me"  # has all rights; hf_reader can only read public repositories
_LFS_FROM = 1024  # bytes; larger files, and all weights, go through LFS


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.put("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def put(self, ref: str, files: dict[str, bytes], message: str) -> str:
        """Add a commit to a branch."""
        commit = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[commit], self.refs[ref] = dict(files), commit
        self.messages.append(message)
        return commit

    def commit(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.commit(revision)]


def _is_lfs(path: str, size: int) -> bool:
    return size >= _LFS_FROM or path.endswith((".safetensors", ".png", ".bin"))


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: "HubServer"

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, content=b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.answer(status, {"error": message}, **headers)

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            if self.hub.failing > 0 and re.search(self.hub.failing_path, path):
                self.hub.failing -= 1
                self.refuse(self.hub.failing_status, None, "Service Unavailable")
                return
            self.route(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def route(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            hub.yaml.append(content)
            good = content.startswith("---\n")
            self.answer(200 if good else 400, {"errors": [] if good else [{"message": "no metadata"}], "warnings": []})
        elif match := re.fullmatch(r"/lfs/(\w+)", path):
            hub.lfs[match[1]] = body
            good = hashlib.sha256(body).hexdigest() == match[1]
            self.answer(200 if good else 422)
        elif path == "/lfs-verify":
            self.answer(200, {})
        elif match := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            if self.may_write(match[1]):
                self.lfs_batch(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)/(.+?))?", path):
            self.api(match[1], match[2], match[3] or "main", body)
        elif match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+|refs/pr/\d+)/(.+)", path):
            self.resolve(*match.groups())
        else:
            self.answer(404, {"error": f"no endpoint {path}"})

    # --- permissions -------------------------------------------------------------------------------------------

    def may_read(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if self.token not in (None, TOKEN, "hf_reader"):
            self.refuse(401, None, "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and self.token != TOKEN):
            self.refuse(401 if self.token is None else 404, "RepoNotFound", "Repository not found")
        else:
            return repo
        return None

    def may_write(self, name: str) -> Repo | None:
        if self.token is None:
            self.refuse(401, None, "Invalid username or password.")
            return None
        repo = self.may_read(name)
        if repo is not None and self.token != TOKEN:
            self.refuse(403, None, "You don't have the rights to write to this repo")
            return None
        return repo

    def create(self, asked: dict) -> None:
        if self.token is None:
            self.refuse(401, None, "Invalid username or password.")
        elif self.token != TOKEN:
            self.refuse(403, None, "You don't have the rights to create a model under this namespace")
        else:
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            url = {"url": f"{self.hub.endpoint}/{name}"}
            if name in self.hub.repos:
                self.answer(409, {"error": "You already created this model repo", **url})
            else:
                private = asked.get("visibility") == "private" or asked.get("private", False)
                self.hub.repos[name] = Repo(private=private)
                self.answer(200, url)

    # --- the API of one repository -----------------------------------------------------------------------------

    def api(self, name: str, verb: str | None, rest: str, body: bytes) -> None:
        writes = verb in ("preupload", "commit", "branch")
        repo = self.may_write(name) if writes else self.may_read(name)
        if repo is None:
            return
        revision = rest if verb != "tree" else rest.partition("/")[0]
        if verb == "branch":
            known = rest in repo.refs
            repo.refs.setdefault(rest, repo.refs["main"])
            self.answer(409 if known else 201, {"error": "Reference already exists"} if known else {})
            return
        commit = repo.commit(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif verb == "preupload":
            self.preupload(repo.commits[commit], json.loads(body)["files"])
        elif verb == "commit":
            self.commit(name, repo, revision, body)
        elif verb == "tree":
            self.answer(200, [self.entry(path, content) for path, content in sorted(repo.commits[commit].items())])
        else:  # info
            siblings = [{"rfilename": path} for path in sorted(repo.commits[commit])]
            facts = {"id": name, "modelId": name, "sha": commit, "private": repo.private, "tags": [], "downloads": 0}
            self.answer(200, {**facts, "siblings": siblings, "gated": "auto" if repo.gated else False})

    def entry(self, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
        if _is_lfs(path, len(content)):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def preupload(self, present: dict[str, bytes], files: list[dict]) -> None:
        def mode(one: dict) -> dict:
            lfs = _is_lfs(one["path"], one["size"])
            facts = {"path": one["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if one["path"] in present:
                content = present[one["path"]]
                facts["oid"] = hashlib.sha256(content).hexdigest() if lfs else _blob(content)
            return facts

        self.answer(200, {"files": [mode(one) for one in files]})

    def lfs_batch(self, asked: dict) -> None:
        def action(one: dict) -> dict:
            if one["oid"] in self.hub.lfs:
                return dict(one)
            upload = {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}
            return {**one, "actions": {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/lfs-verify"}}}

        self.answer(200, {"transfer": "basic", "objects": [action(one) for one in asked["objects"]]})

    def commit(self, name: str, repo: Repo, revision: str, body: bytes) -> None:
        files, message = dict(repo.files(revision)), ""
        for line in body.splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        commit = repo.put(revision, files, message)
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "pullRequestUrl": None})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.may_read(name)
        if repo is None:
            return
        commit = repo.commit(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif path not in repo.commits[commit]:
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=commit)
        elif repo.gated and self.token != TOKEN:
            said = f"Access to model {name} is restricted. You must have access to it and be authenticated"
            self.refuse(401 if self.token is None else 403, "GatedRepo", said)
        else:
            content = repo.commits[commit][path]
            etag = hashlib.sha256(content).hexdigest() if _is_lfs(path, len(content)) else _blob(content)
            self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=commit)


class HubServer:
    """The server, in a thread. `requests` lists (method, path) of all requests."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.yaml: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.failing, self.failing_path, self.failing_status = 0, "", 503
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def fail(self, times: int, path: str = "", status: int = 503) -> None:
        """Answer the next `times` requests whose path matches the pattern with this status, without a reason."""
        self.failing, self.failing_path, self.failing_status = times, path, status

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self.server.shutdown()
        self.server.server_close()
