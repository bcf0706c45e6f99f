"""Large files by LFS, for the Hub on loopback: which files are large, and how they arrive and go out."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
from typing import TYPE_CHECKING

from hub_faults import Answer, Refused, Request
from hub_repositories import REPO, Entry

if TYPE_CHECKING:
    from hub_server import HubServer


def preupload(hub: HubServer, request: Request, kind: str, name: str, revision: str) -> Answer:
    repo = hub.repo(request, kind, name, write=True)
    there = repo.commits[repo.commit_of(revision)]
    attributes = there.get(".gitattributes", Entry.small(b"")).content.decode().splitlines()
    patterns = [line.split()[0] for line in attributes if "filter=lfs" in line]
    files = []
    for one in request.json()["files"]:
        path, name_only = one["path"], one["path"].rsplit("/", 1)[-1]
        large = one["size"] > 10_000_000 or b"\0" in base64.b64decode(one["sample"])
        large |= any(fnmatch.fnmatchcase(name_only, pattern) for pattern in patterns)
        oid = (there[path].sha256 or there[path].oid) if path in there else None
        files.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
    return Answer({"files": files})


def batch(hub: HubServer, request: Request, kind: str, name: str) -> Answer:
    hub.repo(request, kind, name, write=True)
    asked, objects = request.json(), []
    for one in asked["objects"]:
        oid, size = one["oid"], one["size"]
        here = f"{hub.url}/{'' if kind == 'models' else kind + '/'}{name}.git/info/lfs/objects/verify"
        upload = {"href": f"{hub.cdn}/large/{oid}?signature={hub.signature(oid)}"}
        known = oid in hub.state.stored or hub.state.xet.has(oid)
        actions = {} if known else {"actions": {"upload": upload, "verify": {"href": here}}}
        objects.append({"oid": oid, "size": size, **actions})
    return Answer({"transfer": "basic", "objects": objects})


def upload(hub: HubServer, request: Request, oid: str) -> Answer:
    if request.query.get("signature") != hub.signature(oid):
        raise Refused(403, "SignatureDoesNotMatch")
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refused(400, "BadDigest: the content's SHA-256 is not the one that was announced")
    (hub.folder / "large" / oid).write_bytes(request.body)
    hub.state.stored[oid] = len(request.body)
    return Answer(headers={"ETag": f'"{oid}"'})


def verify(hub: HubServer, request: Request, kind: str, name: str) -> Answer:
    hub.repo(request, kind, name, write=True)
    asked = request.json()
    if hub.state.stored.get(asked["oid"]) != asked["size"]:
        raise Refused(404, "The object has not arrived")
    return Answer({})


def download(hub: HubServer, request: Request, oid: str) -> Answer:
    if request.query.get("signature") != hub.signature(oid) or not (hub.folder / "large" / oid).is_file():
        raise Refused(403, "SignatureDoesNotMatch")
    return Answer(hub.folder / "large" / oid, headers={"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


_LFS = r"/(?P<prefix>datasets/|spaces/|)(?P<name>[\w.-]+/[\w.-]+?)\.git/info/lfs/objects"
ROUTES = [
    ("POST", rf"/api/{REPO}/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", rf"{_LFS}/batch", batch),
    ("POST", rf"{_LFS}/verify", verify),
    ("PUT", r"/large/(?P<oid>[0-9a-f]{64})", upload),
    ("GET", r"/large/(?P<oid>[0-9a-f]{64})", download),
]
