"""Xet storage of the Hub on loopback: xorbs (chunks of contents) and shards (which of them make a file) over HTTP.

Formats and endpoints are those of the Xet protocol's specification, https://huggingface.co/docs/xet: version 1 of the
endpoints; to upload grants and version 2 it answers 404, upon which hf_xet falls back to these. A file counts as
arrived when its shard is registered, which is refused unless its xorbs give the SHA-256 that the shard names. The
names of xorbs (a BLAKE3 tree) are taken as they come.
"""

from __future__ import annotations

import hashlib
import re
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from hub_faults import Answer, Refused, Request

if TYPE_CHECKING:
    from hub_server import HubServer

VERIFIED, WITH_SHA256 = 1 << 31, 1 << 30
HASH = r"(?P<name>[0-9a-f]{64})"


@dataclass(frozen=True)
class Term:
    xorb: str
    size: int
    first: int  # chunk
    end: int


@dataclass(frozen=True)
class XetFile:
    name: str  # its hash in Xet
    terms: tuple[Term, ...]

    @property
    def size(self) -> int:
        return sum(term.size for term in self.terms)


@dataclass
class XetStore:
    files: dict[str, XetFile] = field(default_factory=dict)  # SHA-256 -> ...

    def has(self, sha256: str) -> bool:
        return sha256 in self.files

    def size(self, sha256: str) -> int | None:
        return self.files[sha256].size if sha256 in self.files else None

    def xorbs(self) -> set[str]:
        return {term.xorb for file in self.files.values() for term in file.terms}

    def read(self, folder: Path, sha256: str) -> bytes:
        return content(folder, self.files[sha256])


def content(folder: Path, file: XetFile) -> bytes:
    parts = []
    for term in file.terms:
        raw = (folder / term.xorb).read_bytes()
        parts += [unpacked(raw, start) for start, _ in chunks(raw)[term.first : term.end]]
    return b"".join(parts)


def chunks(raw: bytes) -> list[tuple[int, int]]:
    """(start, end) of each chunk of a xorb, with its header of 8 bytes."""
    found, at = [], 0
    while at + 8 <= len(raw) and raw[at] == 0:  # what follows the chunks is a footer
        end = at + 8 + int.from_bytes(raw[at + 1 : at + 4], "little")
        if end > len(raw):
            raise ValueError("a xorb ends in the middle of a chunk")
        found.append((at, end))
        at = end
    return found


def unpacked(raw: bytes, start: int) -> bytes:
    packed = int.from_bytes(raw[start + 1 : start + 4], "little")
    scheme, size = raw[start + 4], int.from_bytes(raw[start + 5 : start + 8], "little")
    body = raw[start + 8 : start + 8 + packed]
    if scheme == 0:
        return body
    plain = pa.Codec("lz4").decompress(body, size, asbytes=True)
    if scheme == 1:
        return plain
    grouped, at = bytearray(size), 0
    for position in range(4):  # bytes were grouped by their position in groups of four
        count = len(range(position, size, 4))
        grouped[position::4] = plain[at : at + count]
        at += count
    return bytes(grouped)


def shard_files(raw: bytes) -> dict[str, XetFile]:
    """SHA-256 -> file, of the shard's first section."""
    found, at = {}, 48
    while raw[at : at + 32] != b"\xff" * 32:
        name, (flags, count) = hex_of(raw[at : at + 32]), struct.unpack_from("<II", raw, at + 32)
        if not flags & WITH_SHA256 or at + 48 * (count + 1) > len(raw):
            raise ValueError("a shard without SHA-256, or cut short")
        terms = []
        for entry in range(at + 48, at + 48 * (count + 1), 48):
            _, size, first, end = struct.unpack_from("<IIII", raw, entry + 32)
            terms.append(Term(hex_of(raw[entry : entry + 32]), size, first, end))
        at += 48 * (count + 1) + (48 * count if flags & VERIFIED else 0)
        found[hex_of(raw[at : at + 32])] = XetFile(name, tuple(terms))
        at += 48
    return found


def hex_of(raw: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


# What requests mean.


def token(hub: HubServer, request: Request, kind: str, name: str, access: str, revision: str) -> Answer:
    hub.repo(request, kind, name, write=access == "write").commit_of(revision)
    headers = {"X-Xet-Cas-Url": hub.url, "X-Xet-Access-Token": f"xet-{access}-{hub.signature(access)}"}
    body = {"casUrl": hub.url, "accessToken": headers["X-Xet-Access-Token"], "exp": int(time.time()) + 3600}
    return Answer(body, headers=headers | {"X-Xet-Token-Expiration": str(body["exp"])})


def allow(hub: HubServer, request: Request, *access: str) -> None:
    given = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if given not in {f"xet-{one}-{hub.signature(one)}" for one in access}:
        raise Refused(401, "expected the token of this Hub")


def upload_xorb(hub: HubServer, request: Request, name: str) -> Answer:
    allow(hub, request, "write")
    if not chunks(request.body):
        raise Refused(400, "expected a xorb")
    path = hub.folder / "xorbs" / name
    new = not path.exists()
    path.write_bytes(request.body)
    return Answer({"was_inserted": new})


def upload_shard(hub: HubServer, request: Request) -> Answer:
    allow(hub, request, "write")
    try:
        files = shard_files(request.body)
    except (ValueError, struct.error) as error:
        raise Refused(400, f"the shard cannot be read: {error}") from None
    for sha256, file in files.items():
        try:
            right = hashlib.sha256(content(hub.folder / "xorbs", file)).hexdigest() == sha256
        except (OSError, ValueError):  # a xorb that is missing or damaged
            right = False
        if not right:
            for term in file.terms:
                (hub.folder / "xorbs" / term.xorb).unlink(missing_ok=True)
            raise Refused(400, "the contents do not have the SHA-256 that the shard names")
    hub.state.xet.files |= files
    return Answer({"result": 1})


def reconstruction(hub: HubServer, request: Request, name: str) -> Answer:
    """Which ranges of bytes of which xorbs give the file, or the range of it that was asked for."""
    allow(hub, request, "read", "write")
    file = next((one for one in hub.state.xet.files.values() if one.name == name), None)
    if file is None:
        raise Refused(404, "no such file")
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "bytes=0-"))
    first, last = int(wanted[1]), int(wanted[2] or file.size - 1)
    if first >= file.size:
        raise Refused(416, "the range starts behind the file's end")
    terms, fetch, at, offset = [], {}, 0, None
    for term in file.terms:
        start, at = at, at + term.size
        if at <= first or start > last:
            continue
        offset = first - start if offset is None else offset
        span = {"start": term.first, "end": term.end}
        terms.append({"hash": term.xorb, "unpacked_length": term.size, "range": span})
        found = chunks((hub.folder / "xorbs" / term.xorb).read_bytes())[term.first : term.end]
        url = f"{hub.cdn}/xorbs/{term.xorb}?signature={hub.signature(term.xorb)}"
        part = {"range": span, "url": url, "url_range": {"start": found[0][0], "end": found[-1][1] - 1}}
        if part not in fetch.setdefault(term.xorb, []):
            fetch[term.xorb].append(part)
    body: dict[str, Any] = {"offset_into_first_range": offset, "terms": terms, "fetch_info": fetch}
    return Answer(body)


def xorb(hub: HubServer, request: Request, name: str) -> Answer:
    path = hub.folder / "xorbs" / name
    if request.query.get("signature") != hub.signature(name) or not path.is_file():
        raise Refused(403, "SignatureDoesNotMatch")
    return Answer(path, headers={"Accept-Ranges": "bytes"})


ROUTES = [
    ("POST", rf"/v1/xorbs/default/{HASH}", upload_xorb),
    ("POST", r"/v1/shards", upload_shard),
    ("GET", rf"/v1/reconstructions/{HASH}", reconstruction),
    ("GET", rf"/xorbs/{HASH}", xorb),
]
