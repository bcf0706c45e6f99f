"""Queries that arrive together are encoded together: micro-batches for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from hlm.artefacts import HlmError
from hlm.serving.query_encoder import QueryEncoder
from hlm.texts import as_texts

IN_THE_LOOP = 2048  # characters that are tokenised in the event loop: they keep it for less than a millisecond
CLOSED = "expected an open AsyncQueryEncoder, found a closed one; make a new one"

Waiting = tuple[list[int], "asyncio.Future[np.ndarray]"]


class AsyncQueryEncoder:
    """Queries that arrive together are encoded together.

    It belongs to the event loop that first calls `encode`. Every caller gets a vector or an error, whatever ends.

    Args:
        encoder: what encodes, in one thread of its own.
        window_ms: how long the first query of a batch waits for others, beside those that came while the batch before
            was computed. Under load these are enough; without load a window is only added to the latency.
        max_tokens: a batch is closed where it holds so many tokens, window or not.
        max_waiting: queries that `close` still encodes; it refuses those that came after them.
    """

    def __init__(
        self, encoder: QueryEncoder, *, window_ms: float = 0.0, max_tokens: int = 512, max_waiting: int = 4096
    ) -> None:
        if not window_ms >= 0 or max_tokens < 1 or max_waiting < 1:
            raise HlmError(
                f"expected window_ms from 0 and max_tokens and max_waiting from 1, found {window_ms}, {max_tokens} and "
                f"{max_waiting}"
            )
        self._encoder, self._window = encoder, window_ms / 1e3
        self._max_tokens, self._max_waiting = max_tokens, max_waiting
        self._waiting: deque[Waiting] = deque()
        self._tokens = 0  # of those that wait
        self._timer: asyncio.Handle | None = None  # starts the next batch
        self._computing = self._closed = False
        self._closing: list[asyncio.Future[None]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hlm-encoder")
        self._home: tuple[asyncio.AbstractEventLoop, int] | None = None  # the event loop, and its process
        self._settling = threading.Lock()

    async def __aenter__(self) -> AsyncQueryEncoder:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __reduce__(self) -> tuple:
        raise HlmError("expected a QueryEncoder to pickle, found an AsyncQueryEncoder; pickle the QueryEncoder in it")

    async def encode(self, texts: str | Iterable[str]) -> np.ndarray:
        """float32 (dim,) of a single str; of a list (n, dim), in its order. Vectors are L2-normalised.

        Raises:
            HlmError: a text that is no str, an encoder that was closed, or another event loop or process than the one
                that used it first.
        """
        one = isinstance(texts, str)
        # Here: one caller's mistake must not fail the others of its batch.
        texts = as_texts([texts] if isinstance(texts, str) else texts)
        loop = self._loop()
        if sum(map(len, texts)) > IN_THE_LOOP:
            ids = await asyncio.to_thread(self._encoder.tokenise, texts)
        else:
            ids = self._encoder.tokenise(texts)
        if self._closed:
            raise HlmError(CLOSED)
        futures = [loop.create_future() for _ in ids]
        self._waiting.extend(zip(ids, futures, strict=True))
        self._tokens += sum(map(len, ids))
        self._start_soon()
        if one:
            return await futures[0]
        return np.stack(await asyncio.gather(*futures)) if futures else np.empty((0, self._encoder.dim), np.float32)

    async def close(self) -> None:
        """Encodes the first `max_waiting` queries that wait, refuses the others and later ones, then stops. May be
        called again, and by a caller of `encode`.

        Raises:
            HlmError: called from another event loop than its own, while that one is open.
        """
        self._closed = True
        if self._home is not None and not self._home[0].is_closed():
            loop = self._loop(closing=True)
            left = [each for each in self._waiting if not each[1].done()]
            self._waiting = deque(left[: self._max_waiting])
            self._refuse(left[self._max_waiting :], HlmError(CLOSED))
            self._start()
            if self._computing:
                self._closing.append(loop.create_future())
                await self._closing[-1]
        self._thread.shutdown(wait=False)

    def _loop(self, *, closing: bool = False) -> asyncio.AbstractEventLoop:
        """The running event loop, which must be the one that this belongs to."""
        if self._closed and not closing:
            raise HlmError(CLOSED)
        here = asyncio.get_running_loop(), os.getpid()
        with self._settling:
            self._home = self._home or here
        if self._home != here:
            found = "another event loop" if self._home[1] == here[1] else "a forked process"
            raise HlmError(
                f"expected the event loop that used this AsyncQueryEncoder first, found {found}; make one for each, of "
                "the same QueryEncoder"
            )
        return here[0]

    def _owner(self) -> asyncio.AbstractEventLoop:
        if self._home is None:
            raise RuntimeError("no event loop has used this AsyncQueryEncoder yet")
        return self._home[0]

    def _start_soon(self) -> None:
        """The next batch starts when it is full, or when the window of its first query ends."""
        if self._computing or not self._waiting:
            return
        loop = self._owner()
        if self._tokens >= self._max_tokens or self._closed:
            self._start()
        elif self._timer is None:  # without a window: once those have asked who can at this moment
            self._timer = loop.call_later(self._window, self._start) if self._window else loop.call_soon(self._start)

    def _start(self) -> None:
        """Gives the next batch to the thread, unless that computes one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._computing:
            return
        batch: list[Waiting] = []
        tokens = 0
        while self._waiting and tokens < self._max_tokens:
            ids, future = self._waiting.popleft()
            self._tokens -= len(ids)
            if not future.done():  # a cancelled one costs nothing
                batch.append((ids, future))
                tokens += len(ids)
        if not batch:
            return
        try:
            self._thread.submit(self._compute, batch)
            self._computing = True
        except RuntimeError as error:  # the thread is gone, as when the interpreter ends
            self._closed = True
            gone = HlmError(f"the thread of this AsyncQueryEncoder has ended ({error}); make a new one")
            self._refuse([*batch, *self._waiting], gone)
            self._waiting.clear()

    def _compute(self, batch: list[Waiting]) -> None:
        """In the thread; an error goes to every caller of this batch, and the next batch is served."""
        error: BaseException | None = None
        vectors = None
        try:
            vectors = self._encoder.encode_ids([ids for ids, _ in batch])
            if len(vectors) != len(batch):
                error = HlmError(f"expected {len(batch)} vectors of the encoder, found {len(vectors)}")
        except BaseException as raised:  # none may leave the callers without an answer
            error = raised
            if not isinstance(raised, Exception) or isinstance(raised, StopIteration):  # no future takes these
                error = HlmError(f"the encoder ended with {type(raised).__name__}: {raised}")
        with contextlib.suppress(RuntimeError):  # the loop has ended, and its callers with it
            self._owner().call_soon_threadsafe(self._finish, batch, vectors, error)

    def _finish(self, batch: list[Waiting], vectors: Any, error: BaseException | None) -> None:
        self._computing = False
        if error is not None:
            self._refuse(batch, error)
        else:
            for (_, future), vector in zip(batch, vectors, strict=True):
                if not future.done():
                    future.set_result(vector)
        self._start_soon()
        if not self._computing:
            for closing in self._closing:
                if not closing.done():
                    closing.set_result(None)

    @staticmethod
    def _refuse(waiting: Iterable[Waiting], error: BaseException) -> None:
        for _, future in waiting:
            if not future.done():
                future.set_exception(error)
