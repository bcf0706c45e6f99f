"""Every caller of AsyncQueryEncoder gets a vector or an error, whatever ends."""

import asyncio
import collections
import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest

from hlm.artefacts import HlmError
from hlm.encoders.loading import load_encoder
from hlm.serving.micro_batches import AsyncQueryEncoder
from hlm.serving.query_encoder import QueryEncoder


@pytest.fixture(scope="module")
def student(tiny_bert):
    return QueryEncoder.from_model(load_encoder(tiny_bert, device="cpu"))


class Broken(QueryEncoder):
    """Encodes until a text holds "bad"; then it does what it is told to."""

    def __init__(self, student, fault):
        super().__init__(student._tokenizer, student._run, student.dim)
        self.fault, self.bad = fault, self.tokenise(["bad"])[0]

    def encode_ids(self, ids):
        return self.fault(self, ids) if self.bad in ids else super().encode_ids(ids)


def fail(error):
    def fault(self, ids):
        raise error

    return fault


async def answers(tasks, seconds=20):
    """What each task ended with: "vector", an error's class, or "nothing"."""
    await asyncio.wait(tasks, timeout=seconds)
    said = collections.Counter(
        "nothing"
        if not task.done()
        else "cancelled"
        if task.cancelled()
        else type(task.exception()).__name__
        if task.exception()
        else "vector"
        for task in tasks
    )
    for task in tasks:
        task.cancel()
    return said


@pytest.mark.parametrize(("room", "callers"), [(1, 20), (16, 400), (4096, 300), (50, 6000)])
@pytest.mark.parametrize("pause", [0, 0.003])
def test_close_answers_or_refuses_everybody(student, room, callers, pause):
    async def run():
        encoder = AsyncQueryEncoder(student, max_waiting=room)
        tasks = [asyncio.create_task(encoder.encode(f"red shoe {n}")) for n in range(callers)]
        await asyncio.sleep(pause)
        closing = [asyncio.create_task(encoder.close()) for _ in range(3)]
        said = await answers(tasks)
        assert set(said) <= {"vector", "HlmError"} and said["vector"] >= min(room, callers if pause else 0)
        await asyncio.wait_for(asyncio.gather(*closing), 20)
        with pytest.raises(HlmError, match="found a closed one; make a new one"):
            await encoder.encode("red")
        await encoder.close()

    asyncio.run(run())


def test_a_caller_may_close_and_others_may_be_cancelled(student):
    async def run():
        encoder = AsyncQueryEncoder(student, max_waiting=3)

        async def caller(n):
            await encoder.encode(f"query {n}")
            await encoder.close()

        tasks = [asyncio.create_task(caller(n)) for n in range(50)]
        await asyncio.sleep(0)
        for task in tasks[10:20]:
            task.cancel()
        said = await answers(tasks)
        assert said["cancelled"] == 10 and sum(said.values()) - said["vector"] - said["HlmError"] == 10

    asyncio.run(run())


def test_the_loop_may_end_while_queries_are_computed(student):
    go = threading.Event()
    slow = Broken(student, lambda self, ids: (go.wait(30), student.encode_ids(ids))[1])
    encoder, ended = AsyncQueryEncoder(slow), []

    async def caller():
        try:
            await encoder.encode("bad")
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def run():
        for _ in range(3):
            asyncio.get_running_loop().create_task(caller())
        await asyncio.sleep(0.05)

    asyncio.run(run())
    go.set()
    assert ended == ["cancelled"] * 3

    async def again():
        with pytest.raises(HlmError, match="found another event loop; make one for each"):
            await encoder.encode("red")
        await encoder.close()  # that loop is gone: there is nobody to wait for
        with pytest.raises(HlmError, match="closed"):
            await encoder.encode("red")

    asyncio.run(asyncio.wait_for(again(), 20))


def test_another_loop_is_refused_while_the_first_runs(student):
    async def run():
        async with AsyncQueryEncoder(student) as encoder:
            await encoder.encode("red")
            for call in (encoder.encode("red"), encoder.close()):
                with pytest.raises(HlmError, match="found another event loop"):
                    await asyncio.to_thread(asyncio.run, call)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fault", "raised", "match"),
    [
        (fail(MemoryError("no room")), MemoryError, "no room"),
        (fail(StopIteration()), HlmError, "StopIteration"),
        (fail(SystemExit(3)), HlmError, "SystemExit: 3"),
        (fail(KeyboardInterrupt()), HlmError, "KeyboardInterrupt"),
        (lambda self, ids: np.zeros((len(ids) + 1, 2)), HlmError, "vectors of the encoder, found"),
        (lambda self, ids: None, TypeError, "NoneType"),
    ],
)
def test_an_error_goes_to_its_batch_and_the_next_one_is_served(student, fault, raised, match):
    async def run():
        async with AsyncQueryEncoder(Broken(student, fault), max_tokens=1) as encoder:
            tasks = [asyncio.create_task(encoder.encode(text)) for text in ("red", "bad", "lamp")]
            await asyncio.wait(tasks, timeout=20)
            with pytest.raises(raised, match=match):
                await tasks[1]
            np.testing.assert_allclose(await tasks[0], student.encode("red"), atol=1e-5)
            np.testing.assert_allclose(await tasks[2], student.encode("lamp"), atol=1e-5)

    asyncio.run(run())


def test_a_thread_that_ended_is_told_to_all(student):
    async def run():
        encoder = AsyncQueryEncoder(student)
        await encoder.encode("red")
        encoder._thread.shutdown()
        tasks = [asyncio.create_task(encoder.encode(text)) for text in ("red", "lamp")]
        assert await answers(tasks) == {"HlmError": 2}
        await asyncio.wait_for(encoder.close(), 20)

    asyncio.run(run())


def test_one_text_gives_one_vector_and_a_list_gives_rows(student):
    async def run():
        async with AsyncQueryEncoder(student, max_tokens=8) as encoder:
            texts = ["red shoe", "", "lamp", "a\ud83d"]
            rows = await encoder.encode(texts)
            np.testing.assert_allclose(rows, student.encode(texts), atol=1e-5)
            np.testing.assert_allclose(await encoder.encode(text for text in texts), rows, atol=1e-5)
            assert (await encoder.encode("lamp")).shape == (student.dim,)
            assert (await encoder.encode([])).shape == (0, student.dim)
            tasks = [asyncio.create_task(encoder.encode(each)) for each in ("red", 3, ["a", None], b"a", ["lamp"])]
            assert await answers(tasks) == {"vector": 2, "HlmError": 3}

    asyncio.run(run())


@pytest.mark.parametrize("text", ["," * 10**6, "靴" * 10**6, "x" * 10**6, " " * 10**6, "\u200b" * 10**6])
def test_a_megabyte_leaves_the_loop_to_others(student, text):
    async def run():
        gaps = []

        async def tick():
            last = time.perf_counter()
            while True:
                await asyncio.sleep(0.001)
                now = time.perf_counter()
                gaps.append(now - last)
                last = now

        async with AsyncQueryEncoder(student) as encoder:
            await encoder.encode("red")
            ticking = asyncio.create_task(tick())
            vectors = await asyncio.gather(encoder.encode(text), encoder.encode("red"))
            ticking.cancel()
        np.testing.assert_allclose(vectors, student.encode([text, "red"]), atol=1e-5)
        return max(gaps, default=0)

    assert min(asyncio.run(run()) for _ in range(3)) < 0.1  # whole, in the loop, it stands still for 0.05 to 2 s


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told_at_once(student):
    encoder = AsyncQueryEncoder(student)
    asyncio.run(encoder.encode("red"))
    child = os.fork()
    if not child:
        signal.alarm(20)
        said = 1
        try:
            asyncio.run(encoder.encode("red"))
        except HlmError as error:
            said = 0 if "found a forked process; make one for each" in str(error) else 2
        os._exit(said)
    assert os.waitpid(child, 0)[1] == 0


def test_it_is_not_pickled_but_its_encoder_is(student):
    with pytest.raises(HlmError, match="pickle the QueryEncoder in it"):
        pickle.dumps(AsyncQueryEncoder(student))


@pytest.mark.parametrize(
    "wrong", [{"window_ms": -1}, {"window_ms": float("nan")}, {"max_tokens": 0}, {"max_waiting": 0}]
)
def test_settings_that_make_no_sense(student, wrong):
    with pytest.raises(HlmError, match="expected window_ms from 0"):
        AsyncQueryEncoder(student, **wrong)
