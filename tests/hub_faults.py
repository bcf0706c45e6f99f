"""HTTP for the Hub on loopback, and what goes wrong with it on demand: faults by the number of the request, or
by its method and the last part of its path.

hub.faults = {7: "cut_answer"}                 # the seventh request from now, once
hub.faults = {7: "503", 8: "503"}              # and its first repetition
hub.faults = {"GET config.json": "corrupt"}    # every one, whenever it comes: clients send several at a time
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

if TYPE_CHECKING:
    from hub_server import HubServer

FAULTS = {
    "lost_request": "the connection ends while the request is sent; nothing done",
    "lost_answer": "what was asked is done, and the connection ends before the answer",
    "cut_answer": "what was asked is done, and the connection ends in the middle of the answer",
    "404": "HTTP 404, nothing done",
    "500": "HTTP 500, nothing done",
    "503": "HTTP 503, nothing done",
    "429": "HTTP 429 with Retry-After, nothing done",
    "corrupt": "one byte arrives altered: of the content where a file is uploaded, else of the answer",
}


class Refused(Exception):
    """An answer that is an error, in the Hub's headers."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        self.answer = Answer({"error": message, **more}, status, {"X-Error-Message": message})
        if code:
            self.answer.headers["X-Error-Code"] = code


@dataclass
class Answer:
    body: Any = b""  # bytes, a file's path, or what becomes JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    method: str
    path: str  # without query, as it was sent
    query: dict[str, str]
    headers: Any
    body: bytes

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")


class Always(Mapping[int | str, str]):
    """Faults for an outage: every request from `first` on fails in the same way."""

    def __init__(self, first: int, fault: str) -> None:
        self.first, self.fault = first, fault

    def __getitem__(self, number: int | str) -> str:
        if isinstance(number, str) or number < self.first:
            raise KeyError(number)
        return self.fault

    def __iter__(self) -> Any:
        return iter((self.first,))

    def __len__(self) -> int:
        return 1


class FaultyHandler(BaseHTTPRequestHandler):
    """One connection. Requests are numbered from 1 as they arrive, and logged with what became of them."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        with self.hub.lock:
            self.hub.log.append((number := len(self.hub.log) + 1, self.command, self.path, "pending"))
            log, faults = self.hub.log, self.hub.faults
            fault = faults.get(number) or faults.get(f"{self.command} {urlsplit(self.path).path.rsplit('/', 1)[-1]}")
        self._note = lambda status: log.__setitem__(number - 1, (number, self.command, self.path, status))
        length = int(self.headers.get("Content-Length") or 0)
        if fault:
            self.hub.injected.append((number, fault))
        if fault == "lost_request":
            self.rfile.read(length // 2)
            return self._end(fault)
        body = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        if len(body) < length:  # the client is gone: what it did not send whole was never asked
            return self._end("cut short")
        if fault in ("404", "500", "503", "429"):
            headers = {"Retry-After": "1"} if fault == "429" else {}
            return self._send(Answer({"error": f"injected {fault}"}, int(fault), headers))
        upload = self.command == "PUT" or self.path.startswith(("/v1/xorbs/", "/v1/shards"))
        if fault == "corrupt" and upload:
            body, fault = altered(body), None
        parts = urlsplit(self.path)
        method = "GET" if self.command == "HEAD" else self.command
        request = Request(method, parts.path, dict(parse_qsl(parts.query)), self.headers, body)
        answer = self.hub.answer(request)
        self._send(answer, fault)

    do_HEAD = do_POST = do_PUT = do_GET

    def _send(self, answer: Answer, fault: str | None = None) -> None:
        raw, headers = answer.body, dict(answer.headers)
        if isinstance(raw, Path):
            raw = raw.read_bytes()
        elif not isinstance(raw, bytes):
            raw, headers["Content-Type"] = json.dumps(raw).encode(), "application/json"
        status, raw = self._ranged(answer.status, raw, headers)
        if fault == "lost_answer":
            return self._end(fault)
        if fault == "corrupt" and self.command != "HEAD":
            raw = altered(raw)
        self._note(fault or status)
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            if fault == "cut_answer":
                self.wfile.write(raw[: len(raw) // 2] if self.command != "HEAD" else b"")
                return self._end(fault)
            if self.command != "HEAD":
                self.wfile.write(raw)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _ranged(self, status: int, raw: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        wanted = self.headers.get("Range", "")
        if status != 200 or "Accept-Ranges" not in headers or not wanted.startswith("bytes=") or "," in wanted:
            return status, raw
        first, last = wanted.removeprefix("bytes=").split("-")
        start = int(first) if first else max(len(raw) - int(last), 0)
        end = min(int(last), len(raw) - 1) if first and last else len(raw) - 1
        if start > end:
            headers["Content-Range"] = f"bytes */{len(raw)}"
            return 416, b""
        headers["Content-Range"] = f"bytes {start}-{end}/{len(raw)}"
        return 206, raw[start : end + 1]

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _end(self, why: str) -> None:
        self._note(why)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def altered(raw: bytes) -> bytes:
    if not raw:
        return raw
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 0x15]) + raw[middle + 1 :]
