"""A store of 23 rows in three shards, written from texts, and what it must hold."""

import numpy as np

ROWS, DIM, SHARD = 23, 8, 9  # three shards: 9, 9 and 5 rows
PLAN = {"dim": DIM, "encoder": "teacher-a", "source": "texts-a", "n_rows": ROWS, "shard_rows": SHARD}


def vector(text):
    values = np.random.default_rng(int(text.removeprefix("text "))).normal(size=DIM)
    return values / np.linalg.norm(values)


def encode(texts):
    return np.array([vector(text) for text in texts], dtype=np.float32)


def records(start, stop):
    return ((f"ad-{row:03d}", f"text {row}") for row in range(start, stop))


def vectors():
    return encode([f"text {row}" for row in range(ROWS)])


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
