"""A small Hugging Face Hub on loopback, for the real clients: huggingface_hub, hf_xet and what builds on them.

    with HubServer(folder) as hub:
        subprocess.run([...], env=os.environ | hub.environment("acme"))

It answers what those clients of the installed versions ask when repositories are made, written to and read. References,
trees and small files live in memory, large files in `folder`; nothing outlives the object. What it is not: a check of
quotas, rate limits, cards' schemas, malware scans, gated repositories, organisations' roles, or of HTTPS.
"""

from __future__ import annotations

import base64
import binascii
import copy
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import hub_lfs
import hub_xet
from hub_faults import Answer, FaultyHandler, Refused, Request
from hub_repositories import GITATTRIBUTES, REPO, Entry, Repo, State, git_hash, pointer

DATE = "2026-01-01T00:00:00.000Z"
PAGE = r"(?P<prefix>datasets/|spaces/|)(?P<name>[\w.-]+/[\w.-]+)"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *client: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients go when they like
            super().handle_error(*client)


class HubServer:
    """The Hub, answering in threads of this process while the `with` block lasts.

    Attributes:
        url: its address, for HF_ENDPOINT or `endpoint=`.
        tokens: user -> token. Users write to repositories under their own name only.
        faults: request number, or method and file -> fault; see hub_faults.
        log: (number, method, path, status) of every request since `restart_log`.
        injected: (number, fault) of the faults that have happened since then.
        page_size: entries of a page of a tree.
    """

    def __init__(self, folder: str | Path, users: tuple[str, ...] = ("acme", "guest")) -> None:
        self.folder = Path(folder)
        (self.folder / "large").mkdir(parents=True, exist_ok=True)
        (self.folder / "xorbs").mkdir(exist_ok=True)
        self.tokens = {user: f"hf_loopback{user}" for user in users}
        self.state, self.lock, self.page_size = State(), threading.RLock(), 1000
        self.faults: Mapping[int | str, str] = {}
        self.injected: list[tuple[int, str]] = []
        self.log: list[tuple[int, str, str, int | str]] = []

    def __enter__(self) -> HubServer:
        self._server = _Server(("127.0.0.1", 0), type("Handler", (FaultyHandler,), {"hub": self}))
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, user: str | None = "acme", *, home: str | Path | None = None, xet: bool = True) -> dict:
        """Variables for a client's process: this Hub, the user's token, a cache of its own, and Xet or LFS."""
        variables = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": ""}
        variables |= {"HF_HOME": str(home or self.folder / "home"), "HF_HUB_DISABLE_XET": "0" if xet else "1"}
        variables |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost"}
        return variables | ({"HF_TOKEN": self.tokens[user]} if user else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})

    def restart_log(self) -> None:
        with self.lock:
            self.log, self.faults, self.injected = [], {}, []

    def saved(self) -> State:
        """A copy of the state, for `restore`."""
        with self.lock:
            return copy.deepcopy(self.state)

    def restore(self, state: State) -> None:
        """Back to a saved state: what has arrived since is gone."""
        with self.lock:
            self.state = copy.deepcopy(state)
            for folder, kept in (("large", state.stored), ("xorbs", state.xet.xorbs())):
                for path in (self.folder / folder).iterdir():
                    if path.name not in kept:
                        path.unlink()

    def branch(self, kind: str, name: str, branch: str = "main") -> tuple[str | None, dict[str, Entry]]:
        """(commit, path -> file) of a branch as it stands now; (None, {}) where there is none."""
        with self.lock:
            repo = self.state.repos.get((kind, name))
            commit = repo.branches.get(branch) if repo else None
            return commit, repo.commits[commit] if commit else {}

    def content(self, entry: Entry) -> bytes:
        if entry.content is not None:
            return entry.content
        path = self.folder / "large" / entry.sha256
        return path.read_bytes() if path.is_file() else self.state.xet.read(self.folder / "xorbs", entry.sha256)

    # What a request means.

    def answer(self, request: Request) -> Answer:
        for method, pattern, function in ROUTES:
            if method == request.method and (match := pattern.fullmatch(request.path)):
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if "prefix" in parts:
                    parts["kind"] = parts.pop("prefix").rstrip("/") or "models"
                try:
                    with self.lock:
                        return function(self, request, **parts)
                except Refused as refusal:
                    return refusal.answer
                except (ValueError, KeyError, TypeError, binascii.Error) as error:
                    return Refused(400, f"Malformed request: {error}").answer
        return Refused(404, f"Sorry, we can't find the page {request.path}").answer

    def user(self, request: Request) -> str | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        for user, own in self.tokens.items():
            if own == token:
                return user
        raise Refused(401, "Invalid credentials in Authorization header")

    def repo(self, request: Request, kind: str, name: str, *, write: bool = False) -> Repo:
        """The repository, if the request may see it (or write to it); what may not be seen is not there."""
        user, repo = self.user(request), self.state.repos.get((kind, name))
        mine = user == name.split("/")[0]
        if repo is None or (repo.private and not mine):
            if user is None:
                raise Refused(401, "Invalid username or password.")
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refused(401, "Invalid username or password.")
        if write and not mine:
            raise Refused(403, "You don't have the rights to write to this repository")
        return repo

    def whoami(self, request: Request) -> Answer:
        if (user := self.user(request)) is None:
            raise Refused(401, "Invalid username or password.")
        return Answer({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self, request: Request) -> Answer:
        if not isinstance(request.json()["content"], str):
            raise Refused(400, "Invalid content", errors=[{"message": "content is no text"}])
        return Answer({"errors": [], "warnings": []})

    def create_repo(self, request: Request) -> Answer:
        asked = request.json()
        user, kind = self.user(request), f"{asked.get('type') or 'model'}s"
        owner = asked.get("organization") or user
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if owner != user:
            raise Refused(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{owner}"')
        if kind == "spaces" and asked.get("sdk") not in ("gradio", "docker", "static"):
            raise Refused(400, "A Space needs an SDK")
        name = f"{owner}/{asked['name']}"
        url = f"{self.url}/{'' if kind == 'models' else kind + '/'}{name}"
        if (kind, name) in self.state.repos:
            raise Refused(409, f"You already created this {kind[:-1]} repo", url=url)
        repo = Repo(asked.get("visibility") == "private" or asked.get("private") is True)
        files = {".gitattributes": Entry.small(GITATTRIBUTES.encode())}
        if kind == "spaces":
            card = f"---\ntitle: {asked['name']}\nsdk: {asked['sdk']}\n---\n\nCheck out the configuration reference\n"
            files["README.md"] = Entry.small(card.encode())
        repo.write("main", files, "initial commit")
        self.state.repos[kind, name] = repo
        return Answer({"url": url, "name": name, "id": f"{len(self.state.repos):024x}"})

    def info(self, request: Request, kind: str, name: str, revision: str = "main") -> Answer:
        repo = self.repo(request, kind, name)
        commit = repo.commit_of(revision)
        files = repo.commits[commit]
        facts = {"_id": f"{1:024x}", "id": name, "author": name.split("/")[0], "sha": commit, "private": repo.private}
        facts |= {"gated": False, "disabled": False, "lastModified": DATE, "createdAt": DATE, "tags": []}
        facts |= {"downloads": 0, "likes": 0, "siblings": [{"rfilename": path} for path in sorted(files)]}
        return Answer(facts)

    def refs(self, request: Request, kind: str, name: str) -> Answer:
        repo = self.repo(request, kind, name)
        listed = {
            where: [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": commit} for n, commit in there.items()]
            for where, ref, there in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
        }
        return Answer(listed | {"converts": []})

    def commits(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        repo = self.repo(request, kind, name)
        made = list(repo.commits)[: list(repo.commits).index(repo.commit_of(revision)) + 1]
        facts = {"title": "", "message": "", "authors": [], "date": DATE}
        return Answer([{"id": commit, **facts} for commit in reversed(made)])

    def create_branch(self, request: Request, kind: str, name: str, branch: str) -> Answer:
        repo = self.repo(request, kind, name, write=True)
        if branch in repo.branches:
            raise Refused(409, f"Reference already exists: {branch}")
        repo.branches[branch] = repo.commit_of(request.json().get("startingPoint") or "main")
        return Answer({})

    def create_tag(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        repo, tag = self.repo(request, kind, name, write=True), request.json()["tag"]
        if tag in repo.tags:
            raise Refused(409, f"Tag reference exists already: {tag}")
        repo.tags[tag] = repo.commit_of(revision)
        return Answer({})

    @property
    def cdn(self) -> str:
        """Where large files are: another origin, as on the Hub, so that clients send no token there."""
        return f"http://localhost:{self.port}"

    def signature(self, oid: str) -> str:
        return hashlib.sha256(f"signed {self.port} {oid}".encode()).hexdigest()[:16]

    def commit(self, request: Request, kind: str, name: str, branch: str) -> Answer:
        repo = self.repo(request, kind, name, write=True)
        if branch not in repo.branches:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        if header["key"] != "header":
            raise ValueError("the first line is no header")
        title, parent, head = header["value"]["summary"], header["value"].get("parentCommit"), repo.branches[branch]
        if parent not in (None, head):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for operation in operations:
            path, value = operation["value"]["path"], operation["value"]
            if operation["key"] == "file":
                files[path] = Entry.small(base64.b64decode(value["content"], validate=True))
            elif operation["key"] == "lfsFile":
                files[path] = self.arrived(path, value)
            elif operation["key"] == "deletedFile":
                if files.pop(path, None) is None:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            elif operation["key"] == "deletedFolder":
                files = {one: entry for one, entry in files.items() if not one.startswith(path.rstrip("/") + "/")}
            else:
                raise ValueError(f"unknown operation {operation['key']}")
        commit = repo.write(branch, files, title)
        return Answer({"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{name}/commit/{commit}"})

    def arrived(self, path: str, value: dict[str, Any]) -> Entry:
        oid = value["oid"]
        size = self.state.stored.get(oid) or self.state.xet.size(oid)
        if size is None:
            raise Refused(400, f"Your push was rejected: {path} points to an LFS object that has not arrived")
        if size != value.get("size", size):
            raise Refused(400, f"Your push was rejected: the size of {path} is {size}")
        return Entry.large(oid, size)

    def listed(self, path: str, entry: Entry) -> dict[str, Any]:
        fact: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
        if entry.sha256:
            size = len(pointer(entry.sha256, entry.size))
            fact["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": size}
            if self.state.xet.has(entry.sha256):
                fact["xetHash"] = self.state.xet.files[entry.sha256].name
        return fact

    def tree(self, request: Request, kind: str, name: str, revision: str, under: str = "") -> Answer:
        repo = self.repo(request, kind, name)
        files = repo.commits[repo.commit_of(revision)]
        start = f"{under.rstrip('/')}/" if under else ""
        found: dict[str, dict[str, Any]] = {}
        for path, entry in sorted(files.items()):
            if not path.startswith(start):
                continue
            parts = path[len(start) :].split("/")
            for depth in range(1, len(parts)):
                folder = start + "/".join(parts[:depth])
                found[folder] = {"type": "directory", "path": folder, "size": 0, "oid": git_hash(folder.encode())}
            found[path] = self.listed(path, entry)
        if under and not found:
            raise Refused(404, f'{under} does not exist on "{revision}"', "EntryNotFound")
        if request.query.get("recursive", "").lower() != "true":
            found = {path: fact for path, fact in found.items() if "/" not in path[len(start) :]}
        first = int(request.query.get("cursor", 0))
        page, headers = list(found.values())[first : first + self.page_size], {}
        if first + self.page_size < len(found):
            following = f"{self.url}{request.path}?recursive={request.query.get('recursive', 'false')}"
            headers["Link"] = f'<{following}&cursor={first + self.page_size}>; rel="next"'
        return Answer(page, headers=headers)

    def paths_info(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        repo = self.repo(request, kind, name)
        files, asked = repo.commits[repo.commit_of(revision)], parse_qs(request.body.decode())
        return Answer([self.listed(path, files[path]) for path in asked.get("paths", []) if path in files])

    def resolve(self, request: Request, kind: str, name: str, revision: str, path: str) -> Answer:
        repo = self.repo(request, kind, name)
        commit = repo.commit_of(revision)
        entry = repo.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if entry is None:
            refusal = Refused(404, "Entry not found", "EntryNotFound").answer
            refusal.headers |= headers
            return refusal
        if entry.sha256 is None:
            return Answer(entry.content, headers=headers | {"ETag": f'"{entry.oid}"'})
        headers |= {"X-Linked-Size": str(entry.size), "X-Linked-Etag": f'"{entry.sha256}"', "ETag": f'"{entry.oid}"'}
        target = self.folder / "large" / entry.sha256
        if self.state.xet.has(entry.sha256):
            route = f"{self.url}/api/{kind}/{name}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": self.state.xet.files[entry.sha256].name, "Link": f'<{route}>; rel="xet-auth"'}
            if not target.is_file():  # as the Hub's bridge does for clients without Xet
                target.write_bytes(self.content(entry))
        headers["Location"] = f"{self.cdn}/large/{entry.sha256}?signature={self.signature(entry.sha256)}"
        return Answer(b"", 302, headers)

    def create_collection(self, request: Request) -> Answer:
        asked, user = request.json(), self.user(request)
        if user is None or asked["namespace"] != user:
            raise Refused(403 if user else 401, "You don't have the rights to create a collection there")
        words = re.sub(r"\W+", "-", asked["title"].lower()).strip("-")
        slug = f"{user}/{words}-{hashlib.sha1(asked['title'].encode()).hexdigest()[:24]}"
        if slug in self.state.collections:
            raise Refused(409, "This collection already exists", slug=slug)
        facts = {"slug": slug, "title": asked["title"], "owner": {"name": user, "type": "user"}, "items": []}
        facts |= {"description": asked.get("description"), "private": bool(asked.get("private")), "position": 0}
        self.state.collections[slug] = facts | {"theme": "green", "upvotes": 0, "lastUpdated": DATE}
        return Answer(self.state.collections[slug])

    def collection(self, request: Request, slug: str, *, write: bool = False) -> dict[str, Any]:
        user, found = self.user(request), self.state.collections.get(slug)
        if found is None or ((write or found["private"]) and slug.split("/")[0] != user):
            raise Refused(404, "Collection not found")
        return found

    def get_collection(self, request: Request, slug: str) -> Answer:
        return Answer(self.collection(request, slug))

    def add_item(self, request: Request, slug: str) -> Answer:
        collection, item = self.collection(request, slug, write=True), request.json()["item"]
        if (f"{item['type']}s", item["id"]) not in self.state.repos:
            raise Refused(404, "Repository not found")
        if any((one["type"], one["id"]) == (item["type"], item["id"]) for one in collection["items"]):
            raise Refused(409, "Item already in collection")
        fact = {"_id": f"{len(collection['items']):024x}", "id": item["id"], "type": item["type"]}
        collection["items"].append(fact | {"position": len(collection["items"])})
        return Answer(collection)


def _routes() -> list[tuple[str, re.Pattern[str], Callable[..., Answer]]]:
    hub, api = HubServer, rf"/api/{REPO}"
    slug = r"(?P<slug>[\w./-]+?)"
    table = [
        ("GET", r"/api/whoami-v2", hub.whoami),
        ("POST", r"/api/validate-yaml", hub.validate_yaml),
        ("POST", r"/api/repos/create", hub.create_repo),
        ("GET", rf"{api}(/revision/(?P<revision>[^/]+))?", hub.info),
        ("GET", rf"{api}/refs", hub.refs),
        ("GET", rf"{api}/commits/(?P<revision>[^/]+)", hub.commits),
        ("POST", rf"{api}/branch/(?P<branch>[^/]+)", hub.create_branch),
        ("POST", rf"{api}/tag/(?P<revision>[^/]+)", hub.create_tag),
        ("POST", rf"{api}/commit/(?P<branch>[^/]+)", hub.commit),
        ("GET", rf"{api}/tree/(?P<revision>[^/]+)(/(?P<under>.+))?", hub.tree),
        ("POST", rf"{api}/paths-info/(?P<revision>[^/]+)", hub.paths_info),
        ("GET", rf"{api}/xet-(?P<access>read|write)-token/(?P<revision>[^/]+)", hub_xet.token),
        ("GET", rf"/{PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", hub.resolve),
        ("POST", r"/api/collections", hub.create_collection),
        ("POST", rf"/api/collections/{slug}/items", hub.add_item),
        ("GET", rf"/api/collections/{slug}", hub.get_collection),
        *hub_lfs.ROUTES,
        *hub_xet.ROUTES,
    ]
    return [(method, re.compile(pattern), function) for method, pattern, function in table]


ROUTES = _routes()
