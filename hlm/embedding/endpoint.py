"""A teacher behind an endpoint: OpenAI's `/embeddings`, which many servers speak, or `/embed` of
text-embeddings-inference.

The key comes from the environment and goes into one header, to the host that was named and nowhere else: redirects are
not followed, and no message, log or manifest holds it.
"""

from __future__ import annotations

import email.utils
import ipaddress
import logging
import os
import random
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from tqdm import tqdm

from hlm.artefacts import HlmError
from hlm.embedding.unit_length import normalised
from hlm.redaction import SECRET_NAME
from hlm.teacher_settings import EndpointSettings
from hlm.texts import well_formed

logger = logging.getLogger(__name__)

PATHS = {"openai": "embeddings", "tei": "embed"}
BATCH = {"openai": 128, "tei": 32}
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # what may be gone after a while
LONGEST_WAIT_S, FIRST_WAIT_S = 60.0, 1.0
LONGEST_RETRY_AFTER_S = 900.0
BYTES_A_TOKEN = 4  # of UTF-8, over the tokenizers of today's embedding models; an estimate


class Endpoint:
    """A teacher that is asked over HTTP. Threads may share it.

    Attributes:
        name: of the model there.
        width: of its vectors; known after the first answer.
    """

    def __init__(self, model: str, settings: EndpointSettings) -> None:
        """Checks the settings; sends nothing.

        Raises:
            HlmError: an address that is none, or that a key must not go to; no key; numbers out of their bounds.
        """
        self.name, self.settings = model, settings
        self.batch = settings.batch or BATCH[settings.kind]
        check_numbers(settings)
        check_fields(settings)
        url = checked_url(settings.url)
        self._key = _key(settings, url)
        self._url = f"{settings.url.rstrip('/')}/{PATHS[settings.kind]}"
        self.host = str(url.hostname)
        self._width: int | None = None
        self._pace = _Pace(settings.requests_a_minute)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # A proxy would read what goes to this machine over plain http.
        self._client = httpx.Client(headers=headers, timeout=settings.timeout_s, trust_env=not is_loopback(self.host))

    @property
    def width(self) -> int:
        if self._width is None:
            self.encode(["a"], prompt_name="query")
        assert self._width is not None
        return self._width

    def encode(self, texts: Sequence[str], *, prompt_name: str, bar: tqdm | None = None) -> np.ndarray:
        """The teacher's vectors, float32 (len(texts), width), L2-normalised, in the order of `texts`.

        Args:
            prompt_name: "query" or "document".
            bar: counts the texts.

        Raises:
            HlmError: the endpoint refuses, does not answer within the retries, or answers what is no vector of each
                text.
        """
        batches = [texts[start : start + self.batch] for start in range(0, len(texts), self.batch)]
        found, done = np.empty((0, self._width or 0), dtype=np.float32), 0
        pool = ThreadPoolExecutor(min(self.settings.connections, max(1, len(batches))))
        try:
            for vectors in pool.map(lambda batch: self._asked(batch, prompt_name), batches):
                if not done:  # filled in place: joining the answers would hold a shard twice
                    found = np.empty((len(texts), vectors.shape[1]), dtype=np.float32)
                found[done : done + len(vectors)] = vectors
                done += len(vectors)
                if bar is not None:
                    bar.update(len(vectors))
        except BaseException:
            self._pace.stopped.set()  # the others would go on trying for minutes
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self._pace.stopped.clear()
        return found

    def sent(self, text: str, prompt_name: str) -> str:
        """What goes out for a text: its prompt before it, cut to `max_characters`."""
        prompt = self.settings.query_prompt if prompt_name == "query" else self.settings.document_prompt
        return well_formed(prompt + text[: self.settings.max_characters])

    def tokens(self, texts: Sequence[str], prompt_name: str) -> int:
        """About how many tokens the endpoint will count for these texts."""
        return sum(1 + len(self.sent(text, prompt_name).encode()) // BYTES_A_TOKEN for text in texts)

    def _asked(self, texts: Sequence[str], prompt_name: str) -> np.ndarray:
        sent = [self.sent(text, prompt_name) for text in texts]
        more = self.settings.query_fields if prompt_name == "query" else self.settings.document_fields
        body = {"inputs": sent} if self.settings.kind == "tei" else {"model": self.name, "input": sent}
        answer = self._answer({**body, **more})
        vectors = read_vectors(answer, len(texts), self.settings.kind, self.host)
        if self._width is None:
            self._width = vectors.shape[1]
        if vectors.shape[1] != self._width:
            raise HlmError(
                f"{self.host}: expected vectors of {self._width} values as before, found {vectors.shape[1]}; see that "
                "one model answers there"
            )
        return vectors

    def _answer(self, body: dict[str, Any]) -> Any:
        """The JSON of a good answer, after as many tries as the settings allow."""
        for attempt in range(self.settings.retries + 1):
            self._pace.wait()
            wait = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                response = self._client.post(self._url, json=body)
                if response.is_success:
                    return response.json()
            except (httpx.TransportError, httpx.DecodingError) as error:
                why = f"{type(error).__name__}: {error}"
            except ValueError:
                why = "an answer that is no JSON"
            else:
                why = self._refusal(response)
                wait = retry_after(response.headers.get("Retry-After")) or wait
            if attempt < self.settings.retries:
                if wait > LONGEST_RETRY_AFTER_S:
                    why = f"a Retry-After of {wait:,.0f} seconds"
                    break
                logger.warning("%s: %s; again in %.1f s", self.host, self._scrubbed(why), wait)
                self._pace.pause(wait)
        raise HlmError(
            f"{self.host}: expected vectors, found {self._scrubbed(why)} after {attempt + 1} tries; what was written "
            "so far is kept: run again later, lower requests_a_minute or connections, or raise retries or timeout_s"
        )

    def _refusal(self, response: httpx.Response) -> str:
        """What the endpoint said, where asking again may help.

        Raises:
            HlmError: asking again does not help.
        """
        status = response.status_code
        said = self._scrubbed(" ".join(response.text.split())[:200])
        if status in (401, 403):
            named = f"the key in ${self.settings.key_variable}" if self._key else "a request without a key"
            # What it says is left out: some quote the key.
            raise HlmError(f"{self.host}: expected {named} to be accepted, found status {status}; set key_variable")
        if "insufficient_quota" in said or status not in AGAIN:
            raise HlmError(
                f"{self.host}: expected vectors of '{self.name}', found status {status} ({said}); correct url, model "
                "or kind, or lower batch or max_characters where texts are too many or too long"
            )
        return f"status {status} ({said})"

    def _scrubbed(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _Pace:
    """When the next request may go out, for all threads; `stopped` ends their waiting."""

    def __init__(self, requests_a_minute: float | None) -> None:
        self.stopped = threading.Event()
        self._gap = 60 / requests_a_minute if requests_a_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        while not self.stopped.is_set():
            with self._lock:
                left = self._next - time.monotonic()
                if left <= 0:
                    self._next = time.monotonic() + self._gap
                    return
            self.stopped.wait(left)
        raise HlmError("expected to go on, found that another request had failed")

    def pause(self, seconds: float) -> None:
        """Nobody asks for so long: a limit is the key's, not the thread's."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def read_vectors(answer: Any, count: int, kind: str, host: str) -> np.ndarray:
    """An answer's vectors, float32 (count, width), L2-normalised, in the order of the request.

    Args:
        kind: "openai": {"data": [{"embedding", "index"}, ...]} in any order; "tei": a list of vectors.

    Raises:
        HlmError: another number of vectors, widths that differ, or values that are no finite numbers.
    """
    rows = answer
    if kind == "openai":
        rows = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "embedding" in row for row in rows):
            raise HlmError(f"{host}: expected 'data' with an 'embedding' each, found none; correct url or kind")
        indexes = [row.get("index", number) for number, row in enumerate(rows)]
        if len(rows) == count:
            if set(map(repr, indexes)) != set(map(repr, range(count))):
                raise HlmError(f"{host}: expected each index from 0 to {count - 1} once, found {str(indexes)[:60]}")
            rows = [rows[place] for place in np.argsort(indexes)]
        rows = [row["embedding"] for row in rows]
    if not isinstance(rows, list) or len(rows) != count:
        found = len(rows) if isinstance(rows, list) else repr(rows)[:100]
        raise HlmError(f"{host}: expected {count} vectors, one for each text, found {found}; correct url or kind")
    widths = sorted({len(row) if isinstance(row, list) else 0 for row in rows})
    try:
        vectors = np.array(rows, dtype=np.float32) if len(widths) == 1 and widths[0] else None
    except (TypeError, ValueError):
        vectors = None
    if vectors is None or vectors.ndim != 2:
        raise HlmError(f"{host}: expected vectors of numbers, all of one width, found widths {widths[:5]}; see there")
    return normalised(vectors, lambda row: f"{host}: text {row} of a request")


def retry_after(header: str | None) -> float | None:
    """Seconds that the header asks to wait, written as a number or as a date; None: nothing that can be read."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def checked_url(url: str) -> Any:
    """The parts of the address.

    Raises:
        HlmError: no http or https, or something in it that may be a secret. It is not shown then.
    """
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise HlmError("endpoint: url: expected an address without user, password, ? or #; name the key's variable")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise HlmError(f"endpoint: url: expected one such as https://api.openai.com/v1, found {url!r}; correct it")
    return parts


def _key(settings: EndpointSettings, url: Any) -> str | None:
    if settings.key_variable is None:
        return None
    if not re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", settings.key_variable):
        raise HlmError(  # what stands there is not shown: it may be the key
            "endpoint: key_variable: expected the name of an environment variable in capitals, such as OPENAI_API_KEY, "
            "found another text; put the key into such a variable"
        )
    key = os.environ.get(settings.key_variable, "").strip()
    if not key:
        raise HlmError(
            f"endpoint: key_variable: expected the key in the environment's {settings.key_variable}, found none; "
            "export it there, and nowhere else"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise HlmError(f"endpoint: key_variable: expected a key in {settings.key_variable}, found no such text")
    if url.scheme != "https" and not is_loopback(str(url.hostname)):
        raise HlmError(
            f"endpoint: url: expected https for a request with a key, found http to {url.hostname}; the key would go "
            "over the network for all to read"
        )
    return key


def check_fields(settings: EndpointSettings) -> None:
    """Refuses keys among the fields of a request, which `teacher.json` keeps."""
    for name in [*settings.query_fields, *settings.document_fields]:
        if SECRET_NAME.fullmatch(str(name)):
            raise HlmError(f"endpoint: expected no secret among the fields, found '{name}'; use key_variable")


def check_numbers(settings: EndpointSettings) -> None:
    """Refuses numbers that make no sense."""
    least = {"batch": 1, "connections": 1, "retries": 0, "max_characters": 1, "price": 0, "max_cost": 0}
    for name, lowest in least.items():
        value = getattr(settings, name)
        if value is not None and not value >= lowest:
            raise HlmError(f"endpoint: {name}: expected {lowest} or more, found {value}")
    for name in ("requests_a_minute", "timeout_s"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise HlmError(f"endpoint: {name}: expected above 0, found {value}")
    if settings.max_cost is not None and settings.price is None:
        raise HlmError("endpoint: max_cost: expected the price of a million tokens beside it, found none; set price")
