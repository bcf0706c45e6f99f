"""The command `hlm`: says what a run will cost, searches a catalogue with a student, and says whether a student fits a
catalogue's vectors."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlm import __version__
from hlm.artefacts import MANIFEST, HlmError, read_manifest
from hlm.plan_settings import Assumptions, read_steps

# torch, faiss and datasets are imported where they are used: `hlm --help` and a refusal come at once.
if TYPE_CHECKING:
    from hlm.index import AdIndex
    from hlm.store import VectorStore


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 after an `HlmError`, printed as one `error: ...` line."""
    options = parser().parse_args(argv)
    try:
        options.run(options)
    except HlmError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="hlm", description=__doc__, allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"hlm {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("plan", help="what a run will cost, before anything is paid for", allow_abbrev=False)
    command.add_argument("--config", required=True, metavar="FOLDER", help="the steps' YAML files, and plan.yaml")
    command.add_argument("--json", action="store_true", help="print JSON: bytes, FLOPs, hours")
    for item in fields(Assumptions):  # over what plan.yaml says
        command.add_argument(f"--{item.name.replace('_', '-')}", metavar="VALUE", help=item.metadata["help"])
    command.set_defaults(run=plan)

    command = commands.add_parser("search", help="the ads that a student finds for a query", allow_abbrev=False)
    command.add_argument("query", help="what a person types")
    command.add_argument("--student", required=True, metavar="FOLDER", help="what recipes/refine.py or align.py wrote")
    catalogue = command.add_mutually_exclusive_group(required=True)
    catalogue.add_argument("--index", metavar="FOLDER", help="a saved AdIndex")
    catalogue.add_argument("--vectors", metavar="FOLDER", help="the teacher's store of the ads; searched exactly")
    command.add_argument(
        "--corpus", metavar="DATA", help="the dataset, folder or Hub id, to print the ads' titles from"
    )
    command.add_argument("-k", type=int, default=10, help="how many ads (default: %(default)s)")
    command.set_defaults(run=search)

    command = commands.add_parser("verify", help="whether a student fits a store or an index", allow_abbrev=False)
    command.add_argument("student", help="folder of the student")
    command.add_argument("target", help="folder of the ads' vectors or of an index")
    command.set_defaults(run=verify)
    return top


def plan(options: argparse.Namespace) -> None:
    """Prints the plan; then refuses it where a phase needs more than the GPUs given hold."""
    steps = read_steps(options.config)

    from hlm.config import parse
    from hlm.hardware import parse_gpus
    from hlm.plan_report import as_dict, text
    from hlm.planner import check_fit, make_plan

    assumed = Path(options.config) / "plan.yaml"
    given = {item.name: getattr(options, item.name) for item in fields(Assumptions)}
    flags = [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]
    (sizes,) = parse(Assumptions, argv=["--config", str(assumed), *flags] if assumed.is_file() else flags)
    count, gpu = parse_gpus(sizes.gpus) if sizes.gpus else (1, None)
    made = make_plan(options.config, steps, sizes, count)
    print(json.dumps(as_dict(made, count, gpu), indent=2) if options.json else text(made, count, gpu), flush=True)
    if gpu:
        check_fit(made, count, gpu)


def search(options: argparse.Namespace) -> None:
    if not options.query.strip():
        raise HlmError("query: expected some text, found none")
    if options.k < 1:
        raise HlmError(f"-k: expected 1 or more, found {options.k}")
    student = read_student(options.student)
    catalogue = open_fitting(options.index or options.vectors, student, "index" if options.index else "vectors")

    from hlm.encoders import encode, load_encoder
    from hlm.index import AdIndex

    index = catalogue if isinstance(catalogue, AdIndex) else AdIndex.build(catalogue, dim=student["dim"])
    vectors = encode(load_encoder(options.student), [options.query], prompt_name="query")
    scores, (ids,) = index.search(vectors, options.k)
    titles = read_titles(options.corpus, ids) if options.corpus else [""] * len(ids)
    for rank, (score, ad, title) in enumerate(zip(scores[0], ids, titles, strict=False), 1):
        print(f"{rank:>3}  {score:.4f}  {ad}  {title}".rstrip())


def verify(options: argparse.Namespace) -> None:
    student = read_student(options.student)
    catalogue = open_fitting(options.target, student)
    print(
        f"ok: {options.student} (encoder {student['encoder']}, width {student['dim']}) searches the "
        f"{len(catalogue)} vectors of {options.target}, both of teacher {catalogue.encoder}"
    )


def read_student(folder: str) -> dict[str, Any]:
    """The student's manifest, with "encoder", "dim" and ["inputs"]["teacher"] for certain."""
    manifest = read_manifest(folder, "student")
    inputs = manifest.get("inputs")
    if not isinstance(inputs, dict) or "teacher" not in inputs or not {"encoder", "dim"} <= set(manifest):
        raise HlmError(
            f"{Path(folder) / MANIFEST} says neither whose student this is nor how wide it is; write the student again "
            "with this version"
        )
    return manifest


def open_fitting(folder: str, student: dict[str, Any], kind: str | None = None) -> VectorStore | AdIndex:
    """Opens the vectors or the index at `folder` where its teacher is the student's and its width fits.

    Raises:
        HlmError: another teacher's (both fingerprints are named), another width, not of `kind`, or damaged.
    """
    teacher, dim = student["inputs"]["teacher"], student["dim"]
    kind = kind or kind_of(folder)
    if kind == "index":
        from hlm.index import AdIndex

        index = AdIndex.load(folder, expect_encoder=teacher)
        if index.dim != dim:
            raise HlmError(
                f"expected an index of width {dim} (the student's), found {index.dim} at {folder}; build it from the "
                f"teacher's store with dim={dim}"
            )
        return index
    from hlm.store import VectorStore

    store = VectorStore.open(folder)
    store.check(encoder=teacher)
    if store.dim < dim:
        raise HlmError(f"expected vectors at least {dim} wide (the student's), found {store.dim} at {folder}")
    return store


def kind_of(folder: str) -> str:
    """Returns "index" where the manifest at `folder` says so, else "vectors", whose reader says what else is wrong."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "vectors"
    return "index" if isinstance(manifest, dict) and manifest.get("kind") == "index" else "vectors"


def read_titles(source: str, ids: list[str]) -> list[str]:
    """The title of each ad, or its text where it has no title; passes once over the corpus, a block at a time.

    Raises:
        HlmError: an ad of the index that the dataset does not have.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    from hlm.data import load

    corpus = load(source, splits=()).corpus
    columns = [name for name in ("_id", "title", "text") if name in corpus.column_names]
    wanted, found = pa.array(ids, pa.string()), {}
    for block in corpus.select_columns(columns).with_format("arrow").iter(batch_size=65_536):
        for row in block.filter(pc.is_in(block["_id"].cast(pa.string()), value_set=wanted)).to_pylist():
            found[row["_id"]] = row.get("title") or row.get("text")
    missing = [ad for ad in ids if ad not in found]
    if missing:
        raise HlmError(
            f"expected the ads of the index in {source}, found no {missing[0]!r}; name the dataset that was embedded"
        )
    return [found[ad] for ad in ids]


if __name__ == "__main__":
    sys.exit(main())
