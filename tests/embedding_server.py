"""A teacher behind HTTP on loopback: a real tiny model that answers as OpenAI's `/v1/embeddings` and as `/embed` of
text-embeddings-inference, and goes wrong on demand.

server.faults = ["429", "nan"]   # the next request, and the one after it; then all is well
"""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from hlm.encoders.loading import encode, load_encoder

KEY = "sk-loopback-0123456789abcdefghijklmnop"


class EmbeddingServer(ThreadingHTTPServer):
    """Holds what it was asked: `requests` of (path, headers, body)."""

    daemon_threads = True

    def __init__(self, model, key=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.key, self.lock = load_encoder(model, device="cpu"), key, threading.Lock()
        self.requests, self.faults, self.noise, self.retry_after = [], [], 0.0, "0"

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def texts(self):
        return [text for _, _, body in self.requests for text in body.get("input", body.get("inputs"))]

    def handle_error(self, request, client_address):
        """A client that hung up is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
            fault = self.server.faults.pop(0) if self.server.faults else None
            if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
                return self.answer(401, {"error": f"Incorrect key: {self.headers['Authorization']}"})
            tei = self.path == "/embed"
            vectors = encode(self.server.model, body["inputs" if tei else "input"])
            vectors = vectors + self.server.noise * np.random.default_rng().normal(size=vectors.shape)
        rows = vectors.tolist()
        if fault == "timeout":
            time.sleep(0.5)
        if fault == "cut":
            self.connection.close()
            return None
        if fault == "html":
            return self.answer(200, b"<html>busy</html>")
        if fault == "redirect":
            return self.answer(302, b"", Location="http://127.0.0.1:1/elsewhere")
        if fault and fault.isdigit():
            said = {"error": {"message": f"no, {self.headers['Authorization']}"}}
            return self.answer(int(fault), said, **{"Retry-After": self.server.retry_after})
        if fault == "quota":
            return self.answer(429, {"error": {"code": "insufficient_quota"}})
        rows = spoilt(rows, fault)
        if tei:
            return self.answer(200, rows)
        data = [{"object": "embedding", "index": number, "embedding": row} for number, row in enumerate(rows)]
        if fault == "twice":
            data[0]["index"] = 1
        if fault == "reversed":
            data.reverse()
        return self.answer(200, {"object": "list", "data": data, "model": "tiny"})

    def answer(self, status, body, **headers):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(raw)

    def log_message(self, *args):
        pass


def spoilt(rows, fault):
    if fault == "fewer":
        return rows[:-1]
    if fault == "narrow":
        return [row[:8] for row in rows]
    if fault == "ragged":
        return [rows[0][:8], *rows[1:]]
    changed = {"nan": float("nan"), "null": None, "text": "x"}
    if fault in changed:
        return [[changed[fault], *rows[0][1:]], *rows[1:]]
    return [[0.0] * len(rows[0]), *rows[1:]] if fault == "zero" else rows


@contextlib.contextmanager
def embedding_server(model, key=None):
    server = EmbeddingServer(model, key)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
