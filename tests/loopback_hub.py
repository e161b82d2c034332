"""A small Hugging Face Hub on 127.0.0.1: enough of its HTTP interface for the real client to push to and load from.

Repositories, branches and commits live in memory. As on the Hub, large files go by Git LFS to a storage that must not see
the token, a commit is one request, and refusals carry the `X-Error-Code` that the client looks for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin", ".png")
RELATIONS = ("finetune", "adapter", "merge", "quantized")


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    pipeline_tag: str | None = None
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{branch} {message} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class LoopbackHub(ThreadingHTTPServer):
    """Serve it with `serve_forever` in a thread; tests read and set its attributes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        # Another host name, as on the Hub: the client must not take its token there, nor follow redirects for their metadata.
        self.storage = f"http://localhost:{self.server_address[1]}/storage"
        self.tokens = {"hf_writer": ("ada", "write"), "hf_reader": ("ada", "read"), "hf_other": ("eve", "write")}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, bool]] = []  # method, path, whether it had a token
        self.cuts = 0  # uploads whose connection breaks half way
        self.cut_after: int | None = None  # uploads that get through before all others break
        self.before_commit = None  # called once, just before the next commit
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        pass  # broken connections are what some tests are about


class RefusalError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, *_):
        pass

    def handle_one_method(self):
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        self.server.requests.append((self.command, path, authorization is not None))
        try:
            for method, pattern, name in ROUTES:
                if (method == self.command or (method, self.command) == ("GET", "HEAD")) and (
                    match := re.fullmatch(pattern, path)
                ):
                    return getattr(self, name)(*match.groups())
            raise RefusalError(404, f"no such endpoint: {self.command} {path}")
        except RefusalError as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self.answer({"error": refusal.message}, status=refusal.status, headers=headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one_method  # noqa: N815

    # --- the conversation -------------------------------------------------------------------------------------------
    def body(self) -> bytes:
        if not hasattr(self, "_body"):
            length = int(self.headers.get("Content-Length") or 0)
            self._body = self.rfile.read(length)
        return self._body

    def answer(self, content, *, status=200, headers=None):
        if self.command in ("POST", "PUT"):
            self.body()  # what is not read would be taken for the next request
            del self._body
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def account(self, required=True):
        header = self.headers.get("Authorization", "")
        token = header.removeprefix("Bearer ")
        if token in self.server.tokens:
            return self.server.tokens[token]
        if header:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        if required:
            raise RefusalError(401, "Invalid username or password.")
        return None, None

    def repo(self, name: str, *, write=False, content=False) -> Repo:
        user, role = self.account(required=write)
        repo, owner = self.server.repos.get(name), name.split("/")[0]
        if repo is None or (repo.private and user != owner):
            raise RefusalError(404 if user else 401, "Repository not found", "RepoNotFound")
        if content and repo.gated and user != owner:
            raise RefusalError(403 if user else 401, f"Access to model {name} is restricted.", "GatedRepo")
        if write and (user != owner or role != "write"):
            raise RefusalError(403, "You don't have the required permissions")
        return repo

    def at(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # --- accounts and repositories ----------------------------------------------------------------------------------
    def whoami(self):
        user, role = self.account()
        self.answer({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create(self):
        user, role = self.account()
        wanted = json.loads(self.body())
        owner = wanted["organization"] or user
        if role != "write" or owner != user:
            raise RefusalError(403, f"You don't have the rights to create a model under the namespace {owner!r}.")
        name = f"{owner}/{wanted['name']}"
        url = {"url": f"{self.server.endpoint}/{name}", "name": name}
        if name in self.server.repos:
            return self.answer({"error": "You already created this model repo", **url}, status=409)
        repo = self.server.repos[name] = Repo(private=wanted.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.answer(url)

    def branch(self, name, branch):
        repo = self.repo(name, write=True)
        if branch in repo.branches:
            raise RefusalError(409, "Reference already exists")
        start = json.loads(self.body() or b"{}").get("startingPoint", "main")
        repo.branches[branch] = self.at(repo, start)
        self.answer({})

    def info(self, name, revision=None):
        repo = self.repo(name)
        sha = self.at(repo, revision or "main")
        siblings = [{"rfilename": file} for file in repo.commits[sha]]
        self.answer(
            {
                "_id": name,
                "id": name,
                "sha": sha,
                "private": repo.private,
                "siblings": siblings,
                "tags": [],
                "library_name": "transformers",
                "pipeline_tag": repo.pipeline_tag,
            }
        )

    def refs(self, name):
        branches = self.repo(name).branches.items()
        rows = [{"name": key, "ref": f"refs/heads/{key}", "targetCommit": sha} for key, sha in branches]
        self.answer({"branches": rows, "tags": [], "converts": []})

    def tree(self, name, revision, folder=None):
        repo = self.repo(name)
        files = repo.commits[self.at(repo, revision)]
        inside = {key: data for key, data in files.items() if folder is None or key.startswith(f"{folder}/")}
        if folder is not None and not inside:
            raise RefusalError(404, f"{folder} does not exist", "EntryNotFound")
        rows = [{"type": "file", "path": key, "size": len(data), "oid": git_oid(data)} for key, data in inside.items()]
        self.answer(rows)

    # --- upload -----------------------------------------------------------------------------------------------------
    def validate_yaml(self):
        errors = card_errors(json.loads(self.body())["content"])
        messages = [{"message": error} for error in errors]
        self.answer({"errors": messages, "warnings": []}, status=400 if errors else 200)

    def preupload(self, name, revision):
        repo = self.repo(name, write=True)
        present = repo.commits[self.at(repo, revision)]
        rows = []
        for file in json.loads(self.body())["files"]:
            large, data = file["path"].endswith(LARGE), present.get(file["path"])
            oid = None if data is None else sha256(data) if large else git_oid(data)
            mode = "lfs" if large else "regular"
            rows.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": rows, "commitOid": self.at(repo, revision)})

    def lfs_batch(self, name):
        self.repo(name, write=True)
        rows = []
        for item in json.loads(self.body())["objects"]:
            row = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.blobs:
                link = {"href": f"{self.server.storage}/{item['oid']}"}
                row["actions"] = {
                    "upload": link,
                    "verify": {"href": f"{self.server.endpoint}/{name}.git/info/lfs/verify"},
                }
            rows.append(row)
        self.answer({"transfer": "basic", "objects": rows})

    def upload(self, oid):
        with self.server.lock:
            cut = self.server.cuts > 0 or self.server.cut_after == 0
            self.server.cuts -= self.server.cuts > 0
            if self.server.cut_after:
                self.server.cut_after -= 1
        if cut:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            self.connection.close()
            raise ConnectionResetError
        data = self.body()
        if sha256(data) != oid:
            raise RefusalError(400, "checksum mismatch")
        self.server.blobs[oid] = data
        self.answer(b"")

    def lfs_verify(self, name):
        self.repo(name, write=True)
        wanted = json.loads(self.body())
        if len(self.server.blobs.get(wanted["oid"], b"")) != wanted["size"]:
            raise RefusalError(422, "size mismatch")
        self.answer({})

    def commit(self, name, branch):
        repo = self.repo(name, write=True)
        hook, self.server.before_commit = self.server.before_commit, None
        if hook:
            hook(repo)
        lines = [json.loads(line) for line in self.body().splitlines()]
        header, parent = lines[0]["value"], self.at(repo, branch)
        if header.get("parentCommit") not in (None, parent):
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[parent])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(branch, files, header["summary"])
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.server.endpoint}/{name}/commit/{sha}"})

    # --- download ---------------------------------------------------------------------------------------------------
    def resolve(self, name, revision, file):
        repo = self.repo(name, content=True)
        sha = self.at(repo, revision)
        headers = {"X-Repo-Commit": sha}
        data = repo.commits[sha].get(file)
        if data is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.answer({"error": "Entry not found"}, status=404, headers=headers)
        if not file.endswith(LARGE):
            return self.answer(data, headers=headers | {"ETag": f'"{git_oid(data)}"'})
        oid = sha256(data)
        self.server.blobs[oid] = data
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        self.answer(b"", status=302, headers=headers | {"Location": f"{self.server.storage}/{oid}"})

    def download(self, oid):
        self.answer(self.server.blobs[oid], headers={"ETag": f'"{oid}"'})


ID = r"([^/]+/[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/models/{ID}/branch/(.+)", "branch"),
    ("POST", rf"/api/models/{ID}/preupload/(.+)", "preupload"),
    ("POST", rf"/api/models/{ID}/commit/(.+)", "commit"),
    ("GET", rf"/api/models/{ID}/refs", "refs"),
    ("GET", rf"/api/models/{ID}/tree/([^/]+)(?:/(.+))?", "tree"),
    ("GET", rf"/api/models/{ID}/revision/(.+)", "info"),
    ("GET", rf"/api/models/{ID}", "info"),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", rf"/{ID}\.git/info/lfs/verify", "lfs_verify"),
    ("PUT", "/storage/(.+)", "upload"),
    ("GET", "/storage/(.+)", "download"),
    ("GET", rf"/{ID}/resolve/([^/]+)/(.+)", "resolve"),
)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def card_errors(content: str) -> list[str]:
    """What the Hub objects to in a card's metadata, as far as its documentation of the fields goes."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", content, re.DOTALL)
    if not match:
        return ["No metadata block"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    errors = []
    base = data.get("base_model", [])
    for name in [base] if isinstance(base, str) else base:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            errors.append(f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.')
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {RELATIONS}')
    if "base_model_relation" in data and not base:
        errors.append('"base_model_relation" needs a "base_model"')
    for name in ("license", "library_name", "pipeline_tag"):
        if not isinstance(data.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be a list of strings')
    languages = data.get("language", [])
    for code in [languages] if isinstance(languages, str) else languages:
        if not isinstance(code, str):  # `no` is false in YAML
            errors.append(f'"language" has {code!r}')
    for entry in data.get("model-index", []):
        if not isinstance(entry.get("name"), str):
            errors.append('"model-index[0].name" is required')
        for result in entry.get("results", []):
            if not isinstance(result.get("task", {}).get("type"), str):
                errors.append('"model-index[0].results[0].task.type" is required')
            if not {"name", "type"} <= result.get("dataset", {}).keys():
                errors.append('"model-index[0].results[0].dataset" needs name and type')
            for metric in result.get("metrics", [{}]):
                if "type" not in metric or not isinstance(metric.get("value"), (int, float, str)):
                    errors.append('"model-index[0].results[0].metrics[0]" needs type and value')
    return errors
