"""Further queries to align on, each crossed from two that are there.

A student of one layer has to have met words beside each other. Alignment needs no judgements, so any text will do that
the teacher can read: of few real queries many more are made.
"""

from __future__ import annotations

import random
from collections.abc import Sequence, Set

from hlm.data.spelling import normalise, spellings

MOST_WORDS = 9
TRIES = 20  # for each query that is asked for; few and short ones give no more than they can


def cross(
    typed: Sequence[str], derived: Sequence[str], count: int, *, known: Set[str], judged: Set[str], rng: random.Random
) -> list[str]:
    """New queries: the beginning of one and the end of another, a query with one word of another in the place of its
    own, or less some of its words.

    Args:
        typed: queries of people, which the first of each two is drawn from; empty: `derived` are.
        derived: of the other ones half are drawn from these, half from `typed`.
        count: how many; fewer where no more differ.
        known: normalised texts that are there.
        judged: spellings of judged queries, which none of the new ones has.

    Returns:
        The normalised queries, all different, in the order of drawing.
    """
    first = [words for text in typed or derived if (words := normalise(text).split())]
    second = [words for text in derived or typed if (words := normalise(text).split())]
    found: dict[str, None] = {}
    for _ in range(TRIES * count if first else 0):
        if len(found) == count:
            break
        one, other = rng.choice(first), rng.choice(rng.choice((first, second)))
        way = rng.randrange(3)
        if way == 0:
            words = one[: rng.randint(1, len(one))] + other[-rng.randint(1, len(other)) :]
        elif way == 1:
            words = list(one)
            words[rng.randrange(len(words))] = rng.choice(other)
        else:
            words = [word for word in one if rng.random() < 0.7]
        text = " ".join(words[:MOST_WORDS])
        if text and text not in known and text not in found and not spellings(text) & judged:
            found[text] = None
    return list(found)
