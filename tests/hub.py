"""A stand-in for the Hugging Face Hub: a real HTTP server that huggingface_hub talks to, with the Hub's own checks.

Repositories, commits, large files and model cards, as far as the library uses them to push and to fetch. A card is
checked by what the Hub documents of its metadata (docs/hub/model-cards, modelcard.md of huggingface/hub-docs).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import typing as t
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN, USER, ORGANISATION = "hf_write", "ada", "lab"
LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "cc-by-nc-sa-4.0", "other", "unknown"}
TASKS = {"image-segmentation", "image-classification", "text-to-image"}


class Repository:
    """Files by commit, newest last. private: as it was created."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.commit({})

    def commit(self, files: dict[str, bytes]) -> str:
        names = json.dumps([len(self.commits), *sorted((name, _sha256(of)) for name, of in files.items())])
        sha = hashlib.sha1(names.encode()).hexdigest()
        self.commits.append((sha, files))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a revision: main is the newest."""
        if revision == "main":
            return self.commits[-1]
        return next((each for each in self.commits if each[0] == revision), None)


class Hub:
    """The server. requests: `METHOD path` of each. down: answer nothing but 503."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.down = False
        handler = type("Bound", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repositories[repo].commits[-1][1]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def card_errors(text: str) -> list[str]:
    """What the Hub would reject in a model card, or warn of."""
    found = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", text, re.DOTALL)
    if not found:
        return ["empty or missing yaml metadata in repo card"]
    try:
        card = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    errors = []
    if card.get("license") not in LICENCES:
        errors.append(f'"license" must be one of [{", ".join(sorted(LICENCES))}]')
    if card.get("license") == "other" and not {"license_name", "license_link"} <= card.keys():
        errors.append('"license_name" and "license_link" are required where license is other')
    if card.get("pipeline_tag") not in TASKS:
        errors.append('"pipeline_tag" must be a task')
    for key in ("tags", "datasets", "metrics"):
        values = card.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
            errors.append(f'"{key}" must be an array of strings')
    for name in card.get("datasets", []):
        if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", name):
            errors.append(f'"datasets" {name} is no dataset id')
    for model in card.get("model-index", []):
        errors += [f'"model-index[0].{key}" is required' for key in ("name", "results") if not model.get(key)]
        for result in model.get("results", []):
            errors += [] if result.get("task", {}).get("type") in TASKS else ['"results.task.type" must be a task']
            dataset = result.get("dataset", {})
            errors += [f'"dataset.{key}" is required' for key in ("type", "name") if not dataset.get(key)]
            for metric in result.get("metrics") or [{}]:
                errors += [f'"metrics.{key}" is required' for key in ("type", "value") if metric.get(key) is None]
    return errors


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: t.Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.down:
            return self.reply(503, {"error": "Service Unavailable"})
        for pattern, method in (
            (r"/api/whoami-v2", self.whoami),
            (r"/api/validate-yaml", self.validate),
            (r"/api/repos/create", self.create),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self.info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self.tree),
            (r"/api/models/([^/]+/[^/]+)/preupload/main", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/main", self.commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/large/(\w+)", self.put),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ):
            if found := re.fullmatch(pattern, path):
                return method(body, *found.groups())
        return self.reply(404, {"error": f"the stand-in knows no {path}"})

    def reply(self, status: int, content: t.Any = b"", **headers: str) -> None:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    @property
    def may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def whoami(self, body: bytes) -> None:
        if not self.may_write:
            return self.reply(401, {"error": "Invalid username or password."})
        return self.reply(200, {"type": "user", "name": USER, "orgs": [{"name": ORGANISATION}], "auth": {}})

    def validate(self, body: bytes) -> None:
        errors = [{"message": message} for message in card_errors(json.loads(body)["content"])]
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self, body: bytes) -> None:
        given = json.loads(body)
        name = f"{given['organization'] or USER}/{given['name']}"
        if not self.may_write:
            return self.reply(401, {"error": "Invalid username or password."})
        status = 409 if name in self.hub.repositories else 200
        private = given.get("visibility") == "private" or bool(given.get("private"))
        self.hub.repositories.setdefault(name, Repository(private))
        return self.reply(status, {"url": f"{self.hub.url}/{name}", "name": name, "error": "exists"})

    def found(self, repo: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """The commit, or None after the answer that there is none."""
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and not self.may_write):
            self.reply(404 if self.may_write else 401, {"error": "Not found"}, X_Error_Code="RepoNotFound")
            return None
        there = repository.at(revision or "main")
        if there is None:
            self.reply(404, {"error": "Invalid rev"}, X_Error_Code="RevisionNotFound")
        return there

    def info(self, body: bytes, repo: str, revision: str | None) -> None:
        if there := self.found(repo, revision):
            files = [{"rfilename": name} for name in there[1]]
            private = self.hub.repositories[repo].private
            self.reply(200, {"id": repo, "sha": there[0], "siblings": files, "private": private, "tags": []})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        if there := self.found(repo, revision):
            self.reply(200, [_entry(name, content) for name, content in there[1].items()])

    def preupload(self, body: bytes, repo: str) -> None:
        there = self.hub.files(repo)
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if _is_large(each["path"]) else "regular",
                "shouldIgnore": False,
                "oid": _oid(each["path"], there[each["path"]]) if each["path"] in there else None,
            }
            for each in json.loads(body)["files"]
        ]
        self.reply(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/large/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self.reply(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, sha256: str) -> None:
        if _sha256(body) != sha256:
            return self.reply(400, {"error": "wrong hash"})
        self.hub.large[sha256] = body
        return self.reply(200)

    def commit(self, body: bytes, repo: str) -> None:
        if not self.may_write:
            return self.reply(403, {"error": "You don't have the rights to write"})
        files = dict(self.hub.files(repo))
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.repositories[repo].commit(files)
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        return self.reply(200, {"commitUrl": url, "commitOid": sha, "pullRequestUrl": None})

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        there = self.found(repo, revision)
        if there is None:
            return None
        sha, files = there
        if name not in files:
            return self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        return self.reply(200, files[name], X_Repo_Commit=sha, ETag=f'"{_oid(name, files[name])}"')


def _is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def _entry(name: str, content: bytes) -> dict[str, t.Any]:
    """A file in a listing: git's blob id; of a large file, that of its pointer and the SHA-256 of the content."""
    large = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    if _is_large(name):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{large['oid']}\nsize {len(content)}\n"
        return {"type": "file", "path": name, "size": len(content), "oid": _blob(pointer.encode()), "lfs": large}
    return {"type": "file", "path": name, "size": len(content), "oid": _blob(content)}


def _oid(name: str, content: bytes) -> str:
    """What the Hub compares contents by: git's blob id, and the SHA-256 of a large file."""
    entry = _entry(name, content)
    return str(entry.get("lfs", entry)["oid"])


def _blob(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
