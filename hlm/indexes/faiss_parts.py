"""FAISS below the ad index: factory strings that cannot end the process, threads, and the parts of an index.

FAISS answers some factory strings with a signal, and computes with OpenMP, whose threads a forked process lacks: a
search there would wait for them for ever.
"""

from __future__ import annotations

import contextlib
import logging
import math
import numbers
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import faiss
import numpy as np

from hlm.artefacts import HlmError
from hlm.fields import shown, whole_number
from hlm.indexes.index_parts import normalised
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)

FACTORY_CHARACTERS = 200  # FAISS's parser recurses: tens of thousands of characters overflow its stack
GRAPH_DEGREES = {"HNSW": (2, 2048), "NSG": (16, 512)}  # below them FAISS divides by zero or never ends
CODEBOOK_BYTES = 2**32
CODE_BITS, CELL_BITS, LARGEST = 16, 12, 2**14  # of "4x8", of "IMI2x8", of any other number but the cells of an IVF

# FAISS warns of fewer rows than 39 a cell, and trains on 256 a cell at the most.
TRAIN_ROWS, ROWS_A_CELL = 131_072, 40

# Candidates for a new node's neighbours in a graph. FAISS's own 40 build in a quarter of the time, but of a million ads
# such a graph found 0.98 of the neighbours at efSearch 3,200, in 6.4 ms; one of 200 at efSearch 200, in 0.5 ms.
EF_CONSTRUCTION = 200

# Kinds whose cells are one array of codes each.
COUNTED = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)

_forked = False
_reading = threading.Lock()


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


@contextlib.contextmanager
def threads(*, one: bool) -> Iterator[None]:
    """Within it FAISS computes on one thread in this thread of Python: if `one`, and always in a forked process, which
    has no other threads than the one that forked it."""
    before = faiss.omp_get_max_threads()
    if not (one or _forked) or before == 1:
        yield
        return
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def checked_factory(factory: str, width: int, rows: int) -> str:
    """Refuses the factory strings that FAISS answers with a signal, an endless loop or an allocation of any size.

    Args:
        width: of the vectors.
        rows: how many train the index.

    Returns:
        The factory string to build: a graph of degree 1, which FAISS ends the process for, becomes one of 2.

    Raises:
        HlmError: names the number and its bounds.
    """
    if not isinstance(factory, str) or not re.fullmatch(rf"[\w ,+():.-]{{1,{FACTORY_CHARACTERS}}}", factory, re.ASCII):
        raise HlmError(
            f"factory: expected a FAISS factory string of up to {FACTORY_CHARACTERS} characters such as 'Flat', found "
            f"{shown(factory)}"
        )

    asked, factory = factory, re.sub(r"(HNSW)1(?!\d)", r"\g<1>2", factory, flags=re.IGNORECASE)
    if factory != asked:
        logger.warning("FAISS builds no graph of degree 1: '%s' is built as '%s'", asked, factory)

    def check(what: str, number: int, least: int, most: int) -> None:
        if not least <= number <= most:
            raise HlmError(
                f"FAISS cannot build '{factory}' over {rows} vectors of width {width}: expected {least} to {most} "
                f"{what}, found {number}; choose another factory string, or more rows"
            )

    for name, digits in re.findall(r"([A-Za-z]*)(-?\d+)", factory):
        number, letters = int(digits), name.upper()
        if letters.endswith(tuple(GRAPH_DEGREES)):
            least, most = next(bounds for graph, bounds in GRAPH_DEGREES.items() if letters.endswith(graph))
            check(f"as {name}'s degree", number, least, most if letters.endswith("HNSW") else min(most, rows // 2))
        elif letters.endswith("IVF"):
            check("cells of an IVF", number, 1, rows)
        else:
            check(f"after '{name}'", number, 1, LARGEST)
    for name, chain in re.findall(r"([A-Za-z]*)(\d+(?:x\d+)+)", factory):
        *counts, bits = map(int, chain.split("x"))
        check("bits a code", bits, 1, CELL_BITS if name.upper() == "IMI" else CODE_BITS)
        check("bytes of codebooks", math.prod(counts) * 2**bits * width * 4, 1, CODEBOOK_BYTES)
    return factory


def check_parts(index: faiss.Index) -> None:
    """Refuses an index whose search FAISS ends with a signal: an IVF computes no distance to a single vector, which is
    what refinement asks for.

    Raises:
        HlmError: an IVF within `Refine(...)`.
    """
    for part in parts(index):
        if isinstance(part, faiss.IndexRefine) and any(map(is_ivf, parts(part.refine_index))):
            raise HlmError("expected a refinement without cells such as ',RFlat', found one by an IVF; choose another")


def fill(index: faiss.Index, blocks: Callable[[str], Iterable[np.ndarray]], rows: int) -> None:
    """Adds all vectors to a trained, empty index. Memory for their codes is allocated once, at its final size: grown as
    vectors come, it would be copied to twice its size, be there twice meanwhile, and stay larger than it need be.

    Args:
        blocks: what is done with them -> the vectors in blocks, float32 (n, width); all `rows` each time it is called.
    """
    reserve(index, rows)
    if type(index) not in COUNTED:
        for block in blocks("build"):
            index.add(block)
        return
    cells = np.concatenate([index.quantizer.search(block, 1)[1].ravel() for block in blocks("find the cells of")])
    lists = faiss.downcast_InvertedLists(index.invlists)
    for cell, count in enumerate(np.bincount(cells, minlength=index.nlist).tolist()):
        lists.resize(cell, count)
        lists.resize(cell, 0)  # keeps what is allocated
    for block in blocks("build"):
        found = cells[index.ntotal :][: len(block)]
        index.add_core(len(block), faiss.swig_ptr(block), None, faiss.swig_ptr(found))


def reserve(index: faiss.Index, rows: int) -> None:
    """Allocates the codes that flat parts will hold of so many vectors."""
    for part in parts(index, storing=True):
        flat = faiss.downcast_index(part.storage) if isinstance(part, faiss.IndexHNSW) else part
        if isinstance(flat, faiss.IndexFlatCodes):
            flat.codes.resize(rows * flat.code_size)
            flat.codes.resize(0)  # keeps what is allocated


def read_index(path: Path) -> faiss.Index:
    """Maps an index into memory: pages are read as a search touches them, and processes share them. FAISS before 1.11
    reads it instead. What is allocated is bounded by the file's size.

    Raises:
        HlmError: not an index, damaged, or of a later FAISS.
    """
    size = path.stat().st_size
    try:
        with _limits(size):
            index = faiss.read_index(str(path), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
    except (RuntimeError, MemoryError) as error:
        raise HlmError(
            f"FAISS {faiss.__version__} cannot read {path}: {reason(error)}; build the index again"
        ) from error
    check_parts(index)
    return index


@contextlib.contextmanager
def _limits(size: int) -> Iterator[None]:
    names = ("deserialization_vector_byte_limit", "deserialization_loop_limit")
    if not hasattr(faiss, f"set_{names[0]}"):  # FAISS before 1.15 has a limit of its own, 1 TiB
        yield
        return
    with _reading:  # they hold for the whole process
        before = [getattr(faiss, f"get_{name}")() for name in names]
        try:
            for name in names:
                getattr(faiss, f"set_{name}")(size)
            yield
        finally:
            for name, value in zip(names, before, strict=True):
                getattr(faiss, f"set_{name}")(value)


def parts(index: faiss.Index, *, storing: bool = False) -> Iterator[faiss.Index]:
    """The parts that a search goes through for its candidates, outermost first: what refines them is left out. With
    `storing` the parts that hold something of every vector: what refines is one, the quantizer of an IVF is not."""
    index = faiss.downcast_index(index)
    yield index
    inner = []
    if isinstance(index, faiss.IndexPreTransform):
        inner = [index.index]
    elif isinstance(index, faiss.IndexRefine):
        inner = [index.base_index, index.refine_index] if storing else [index.base_index]
    elif is_ivf(index) and not storing:
        inner = [index.quantizer]
    for part in inner:
        yield from parts(part, storing=storing)


def is_ivf(index: faiss.Index) -> bool:
    # GpuIndexIVF exists only in GPU builds.
    return isinstance(index, (faiss.IndexIVF, *([faiss.GpuIndexIVF] if hasattr(faiss, "GpuIndexIVF") else [])))


def parameters(
    index: faiss.Index, options: dict[str, float | None], selector: faiss.IDSelector | None = None
) -> faiss.SearchParameters | None:
    """Search parameters nested as the index is, with the rows that it may find; None where it has none."""
    index = faiss.downcast_index(index)
    chosen = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexPreTransform):
        inner = parameters(index.index, options, selector)
        return faiss.SearchParametersPreTransform(index_params=inner) if inner is not None else None
    if isinstance(index, faiss.IndexRefine):
        inner = parameters(index.base_index, options, selector)
        nested = {"base_index_params": inner} if inner is not None else {}
        return faiss.IndexRefineSearchParameters(k_factor=options["k_factor"], **nested)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=options["ef_search"], **chosen)
    if is_ivf(index):
        inner = parameters(index.quantizer, options)
        nested = {"quantizer_params": inner} if inner is not None else {}
        return faiss.SearchParametersIVF(nprobe=options["nprobe"], **nested, **chosen)
    return None


def rows_to_train(factory: str) -> int:
    """How many rows train an index: more than 131,072 where the cells of its IVF need them."""
    cells = max((int(cells) for cells in re.findall(r"IVF(\d+)", factory, re.IGNORECASE)), default=0)
    return max(TRAIN_ROWS, ROWS_A_CELL * cells)


def cells_in(index: faiss.Index) -> int:
    """Cells of the outermost IVF; 0 without one."""
    return next((part.nlist for part in parts(index) if is_ivf(part)), 0)


def default_options(index: faiss.Index) -> dict[str, float | None]:
    """nprobe, ef_search and k_factor; None where the index has no part for it. FAISS's own defaults (1, 16 and 1) trade
    most of the recall away; k_factor=1 even makes refinement a no-op."""
    found, cells = list(parts(index)), cells_in(index)
    return {
        "nprobe": min(cells, max(8, math.ceil(cells / 16))) if cells else None,
        "ef_search": 128 if any(isinstance(part, faiss.IndexHNSW) for part in found) else None,
        "k_factor": 10.0 if any(isinstance(part, faiss.IndexRefine) for part in found) else None,
    }


def checked_options(
    given: dict[str, float | None], defaults: dict[str, float | None], factory: str, cells: int, rows: int
) -> dict[str, float | None]:
    """The options that are given, within what the index has, and the defaults of the others.

    Raises:
        HlmError: an option that the index has no part for, or that is no number from 1 on.
    """
    wanted = {"nprobe": "IVF", "ef_search": "HNSW graph", "k_factor": "refinement such as ',RFlat'"}
    for name, value in given.items():
        if value is not None and defaults[name] is None:
            raise HlmError(f"{name}={shown(value)} was given, but '{factory}' has no {wanted[name]}; leave {name} out")
    options = {name: default if given[name] is None else given[name] for name, default in defaults.items()}
    if options["nprobe"] is not None:
        options["nprobe"] = min(whole_number("nprobe", options["nprobe"], least=1), cells)
    if options["ef_search"] is not None:
        options["ef_search"] = min(whole_number("ef_search", options["ef_search"], least=1), max(16, rows))
    if options["k_factor"] is not None:
        factor = options["k_factor"]
        if isinstance(factor, bool) or not isinstance(factor, numbers.Real) or not 1 <= factor < math.inf:
            raise HlmError(f"k_factor: expected 1 or more, a finite number, found {shown(factor)}; correct it")
        options["k_factor"] = float(min(factor, max(1, rows)))
    return options


def to_gpu(index: faiss.Index) -> faiss.Index:
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        raise HlmError(
            f"gpu=True needs a GPU build of FAISS and a GPU; found FAISS {faiss.__version__} that sees "
            f"{faiss.get_num_gpus()} GPUs; install faiss-gpu in place of faiss-cpu, or leave gpu out"
        )
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)


def reason(error: Exception) -> str:
    # "Error in <C++ signature> at <file>:<line>: <reason>"
    return re.sub(r"^Error in .* at \S+:\d+: ", "", str(error), flags=re.DOTALL).strip() or "out of memory"


def trained(store: VectorStore, factory: str, width: int, train_rows: int, seed: int, gpu: bool) -> faiss.Index:
    """An empty index, trained on a sample of the store where it needs training."""
    index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    check_parts(index)
    for part in parts(index):
        if isinstance(part, faiss.IndexHNSW):
            part.hnsw.efConstruction = EF_CONSTRUCTION
    if gpu:
        index = to_gpu(index)
    if not index.is_trained:
        rows = np.arange(len(store))
        if len(store) > train_rows:
            rows = np.sort(np.random.default_rng(seed).choice(len(store), train_rows, replace=False))
        logger.info("training %s on %d of %d vectors", factory, len(rows), len(store))
        index.train(normalised(store.gather(rows), width, first_row=0))
    return index
