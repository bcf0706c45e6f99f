"""Rows of texts as batches of token ids: texts tokenised once into a flat table, rows grouped anew every epoch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from torch import Tensor

from hlm.artefacts import HlmError, atomic_file, fingerprint_json
from hlm.encoders.loading import pad_id, pad_rows, tokenise
from hlm.progress import progress

BLOCK = 8192  # texts tokenised at a time


class TokenTable:
    """Token ids of many texts in one flat int32 array: 4 bytes a token, no padding, no Python object a text.

    Args:
        texts: read once, by slices of `BLOCK`: a list, or a view of a table that lies on disk.
        prompt: goes before every text.
        folder: the array and each text's end in it go into files there and are read through memory maps. The first
            process writes them, the others wait. Files made from the same texts with the same tokenizer, prompt and
            limit are used again.
        source: fingerprint of `texts`; goes with `folder`.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        texts: Sequence[str],
        prompt: str = "",
        *,
        folder: str | Path | None = None,
        source: str = "",
    ) -> None:
        self.fill = pad_id(model)
        blocks = _tokenised(model, texts, prompt)
        if folder is None:
            found = list(blocks)
            self.flat = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in found)])
            self.ends = np.cumsum(
                np.concatenate([np.zeros(0, np.int32), *(length for _, length in found)]), dtype="<i8"
            )
        else:
            key = fingerprint_json([_tokenizer(model), model.max_seq_length, prompt, source, len(texts)])
            flat, ends = (Path(folder) / f"tokens-{key}.{part}" for part in ("ids", "ends"))
            with PartialState().main_process_first():
                if not _whole(flat, ends, len(texts)):
                    _write(blocks, flat, ends)
            self.flat, self.ends = _mapped(flat, "<i4"), _mapped(ends, "<i8")

    def __len__(self) -> int:
        return len(self.ends)

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a memory map would copy its content into every data loader worker: they open the file instead.
        maps = {name: value for name, value in vars(self).items() if isinstance(value, np.memmap)}
        return vars(self) | {name: (str(value.filename), value.dtype.str) for name, value in maps.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for name in ("flat", "ends"):
            if isinstance(state[name], tuple):
                setattr(self, name, _mapped(*state[name]))

    def lengths(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Tokens of each of these texts, of all by default: int32."""
        if rows is None:
            return np.diff(self.ends, prepend=0).astype(np.int32)
        return (self.ends[rows] - np.where(rows > 0, self.ends[rows - 1], 0)).astype(np.int32)

    def features(self, rows: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """Right-padded `input_ids` and `attention_mask`, int64 (rows, longest)."""
        return pad_rows([self.flat[self.ends[row - 1] if row else 0 : self.ends[row]] for row in rows], self.fill)


def _whole(flat: Path, ends: Path, count: int) -> bool:
    """Whether both files are there with the sizes that belong together."""
    if not flat.is_file() or not ends.is_file() or ends.stat().st_size != 8 * count:
        return False
    return flat.stat().st_size == 4 * int(_mapped(ends, "<i8")[-1])


def _mapped(path: str | Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r")


def _write(blocks: Iterable[tuple[np.ndarray, np.ndarray]], flat: Path, ends: Path) -> None:
    last = 0
    with atomic_file(flat) as aside, open(aside, "wb") as file:
        with atomic_file(ends) as other, open(other, "wb") as file_of_ends:
            for ids, lengths in blocks:
                file.write(ids.astype("<i4").data)
                file_of_ends.write((last + np.cumsum(lengths, dtype="<i8")).data)
                last += len(ids)


def _tokenised(
    model: SentenceTransformer, texts: Sequence[str], prompt: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(token ids one after another, number of them in each text), int32, block by block."""
    with progress(what="tokenise", unit="text", total=len(texts)) as bar:
        for start in range(0, len(texts), BLOCK):
            ids = tokenise(model, list(texts[start : start + BLOCK]), prompt)
            lengths = np.fromiter(map(len, ids), dtype=np.int32, count=len(ids))
            flat = np.fromiter((token for row in ids for token in row), dtype=np.int32, count=int(lengths.sum()))
            yield flat, lengths
            bar.update(len(ids))


def _tokenizer(model: SentenceTransformer) -> str:
    state = json.loads(model.tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None  # these two change with every call of the tokenizer
    return fingerprint_json(state)


class GroupedBatches:
    """Batches of rows, new every epoch, the same for the same seed and epoch whatever happened before.

    With `keys`, rows are sorted by key and cut into groups, and batches are put together from groups at random: rows of
    one key meet, while every epoch still mixes the rows. Token counts as keys save padding; documents as keys let a
    document be encoded once for several queries.

    Args:
        keys: a number for each row, or None for batches at random.
        group: rows that stay together; divides batch_size. By default a whole batch, and then only the rows of 32
            batches at a time are sorted: every batch would otherwise hold the same rows in every epoch.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: int,
        *,
        keys: np.ndarray | None = None,
        group: int | None = None,
        drop_last: bool = True,
    ) -> None:
        if rows < batch_size and drop_last:
            raise HlmError(
                f"expected at least one whole batch of {batch_size}, found {rows} rows; lower "
                "per_device_train_batch_size or give more data"
            )
        group = group or batch_size
        if batch_size % group:
            raise HlmError(f"expected a group that divides the batch of {batch_size}, found {group}")
        self.rows, self.batch_size, self.seed, self.drop_last = rows, batch_size, seed, drop_last
        self.keys, self.group = keys, group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows // self.batch_size if self.drop_last else -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(np.arange(self.rows, dtype=np.int32))
        whole = 0
        if self.keys is not None:
            wide = self.batch_size * 32 if self.group == self.batch_size else self.rows
            for start in range(0, self.rows, wide):
                block = order[start : start + wide]
                block[:] = block[np.argsort(self.keys[block], kind="stable")]
            whole = self.rows // self.group
            starts = generator.permutation(whole) * self.group
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            places = np.arange(start, min(start + self.batch_size, self.rows))
            # Groups change places, as many as are whole; a copy of all rows in that order would live for an epoch.
            moved = places < whole * self.group
            if moved.any():
                places[moved] = starts[places[moved] // self.group] + places[moved] % self.group
            yield order[places].tolist()
