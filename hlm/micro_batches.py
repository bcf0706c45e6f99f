"""Queries that arrive together are encoded together: micro-batches for asyncio."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hlm.artefacts import HlmError
from hlm.runtime import QueryEncoder


class AsyncQueryEncoder:
    """Queries that arrive together are encoded together.

    Args:
        encoder: what encodes, in one thread of its own.
        window_ms: how long the first query of a batch waits for others, beside those that came while the batch before
            was computed. Under load these are enough; without load a window is only added to the latency.
        max_tokens: a batch is closed where it holds so many tokens, window or not.
        max_waiting: callers beyond these wait for room before they are queued.
    """

    def __init__(
        self, encoder: QueryEncoder, *, window_ms: float = 0.0, max_tokens: int = 512, max_waiting: int = 4096
    ) -> None:
        if window_ms < 0 or max_tokens < 1 or max_waiting < 1:
            raise HlmError(
                f"expected window_ms from 0 and max_tokens and max_waiting from 1, found {window_ms}, {max_tokens} and "
                f"{max_waiting}"
            )
        self._encoder, self._window, self._max_tokens = encoder, window_ms / 1e3, max_tokens
        self._queue: asyncio.Queue[tuple[list[int], asyncio.Future[np.ndarray]] | None] = asyncio.Queue(max_waiting)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hlm-encoder")
        self._worker: asyncio.Task[None] | None = None
        self._closed = False

    async def __aenter__(self) -> AsyncQueryEncoder:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def encode(self, text: str) -> np.ndarray:
        """float32 (dim,), L2-normalised.

        Raises:
            HlmError: a text that is no str, or an encoder that was closed.
        """
        if self._closed:
            raise HlmError("expected an open AsyncQueryEncoder, found a closed one; make a new one")
        if not isinstance(text, str):  # refused here: one caller's mistake must not fail the others of its batch
            raise HlmError(f"expected a text to encode, found {type(text).__name__}; pass a str")
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        (ids,) = self._encoder.tokenise([text])  # microseconds, so not worth a thread
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        await self._queue.put((ids, future))
        return await future

    async def close(self) -> None:
        """Encodes what is queued, then stops."""
        self._closed = True
        if self._worker is not None:
            await self._queue.put(None)
            await self._worker
            self._worker = None
        self._thread.shutdown()

    async def _next(self, seconds: float) -> tuple[list[int], asyncio.Future[np.ndarray]] | None:
        """What is queued, or comes within so many seconds.

        Raises:
            TimeoutError: nothing.
        """
        try:
            return self._queue.get_nowait()
        except asyncio.QueueEmpty:
            if seconds <= 0:
                raise TimeoutError from None
        return await asyncio.wait_for(self._queue.get(), seconds)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        last = False
        while not last:
            batch, tokens = [], 0
            item = await self._queue.get()
            deadline = loop.time() + self._window
            while item is not None:
                batch.append(item)
                tokens += len(item[0])
                if tokens >= self._max_tokens:
                    break
                try:
                    item = await self._next(deadline - loop.time())
                except TimeoutError:
                    break
            last = item is None
            batch = [(ids, future) for ids, future in batch if not future.done()]  # a cancelled one costs nothing
            if not batch:
                continue
            try:
                vectors = await loop.run_in_executor(self._thread, self._encoder.encode_ids, [ids for ids, _ in batch])
            except Exception as error:  # goes to every caller of this batch; the next batch is served
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), vector in zip(batch, vectors, strict=True):
                if not future.done():
                    future.set_result(vector)
