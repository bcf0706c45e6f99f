"""The command `hlm`: says what a run will cost, searches a catalogue with a student, says whether a student fits a
catalogue's vectors, and writes a card."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hlm import __version__
from hlm.artefacts import MANIFEST, HlmError
from hlm.hub_cache import local_folder
from hlm.lineage import open_fitting, read_student
from hlm.plan_settings import Assumptions, read_steps

# torch, faiss and datasets are imported where they are used: `hlm --help` and a refusal come at once.
REVISION = "or a Hub id, owner/name or owner/name@revision"


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
    command.add_argument("--student", required=True, metavar="ID", help=f"folder of a student {REVISION}")
    catalogue = command.add_mutually_exclusive_group(required=True)
    catalogue.add_argument("--index", metavar="ID", help=f"folder of an index, or a dataset with one, {REVISION}")
    catalogue.add_argument(
        "--vectors", metavar="ID", help=f"the teacher's store of the ads, searched exactly: a folder {REVISION}"
    )
    command.add_argument(
        "--corpus", metavar="DATA", help="the dataset, folder or Hub id, to print the ads' titles from"
    )
    command.add_argument("-k", type=int, default=10, help="how many ads (default: %(default)s)")
    command.set_defaults(run=search)

    command = commands.add_parser("verify", help="whether a student fits a store or an index", allow_abbrev=False)
    command.add_argument("student", help=f"folder of the student {REVISION}")
    command.add_argument("target", help=f"folder of the ads' vectors or of an index {REVISION} of a dataset")
    command.set_defaults(run=verify)

    command = commands.add_parser("card", help="prints the card of a student, teacher or dataset", allow_abbrev=False)
    command.add_argument("folder", help="what a recipe wrote: a student, a teacher, or a dataset")
    command.add_argument("--report", metavar="FILE", help="report.json of recipes/evaluate.py")
    command.add_argument("--latency", metavar="FILE", help="latency.json of recipes/benchmark.py")
    command.add_argument("--repo-id", metavar="ID", help="where it will stand (default: local/<name of the folder>)")
    for name in ("teacher", "student", "dataset"):
        command.add_argument(f"--{name}-repo", metavar="ID", help=f"where the run's {name} stands")
    command.add_argument("--base-model", metavar="ID", help="the backbone on the Hub, where the run had it elsewhere")
    command.add_argument("--licence", metavar="ID", help="as the Hub writes it, for example apache-2.0")
    command.add_argument("--language", metavar="CODE", nargs="+", default=[], help="of the texts, for example en de")
    command.add_argument("--command", metavar="TEXT", help="what makes it again (default: the report's own command)")
    command.add_argument("--commit", metavar="SHA", help="of the code (default: the report's)")
    command.set_defaults(run=card)
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
    folder = located(options.student)
    student = read_student(folder)
    kind = "index" if options.index else "vectors"
    catalogue = open_fitting(located_catalogue(options.index or options.vectors, kind), student, kind)

    from hlm.encoders import encode, load_encoder
    from hlm.index import AdIndex

    index = catalogue if isinstance(catalogue, AdIndex) else AdIndex.build(catalogue, dim=student["dim"])
    vectors = encode(load_encoder(str(folder)), [options.query], prompt_name="query")
    scores, (ids,) = index.search(vectors, options.k)
    titles = read_titles(options.corpus, ids) if options.corpus else [""] * len(ids)
    for rank, (score, ad, title) in enumerate(zip(scores[0], ids, titles, strict=False), 1):
        print(f"{rank:>3}  {score:.4f}  {ad}  {title}".rstrip())


def verify(options: argparse.Namespace) -> None:
    student = located(options.student)
    read_student(student)  # what is no student is refused before a catalogue is downloaded
    target = located_catalogue(options.target)

    from hlm import lineage

    facts = lineage.verify(student, target)
    print(
        f"ok: {options.student} (encoder {facts['encoder']}, width {facts['dim']}) searches the {facts['vectors']} "
        f"vectors of {options.target}, both of teacher {facts['teacher']}"
    )
    if facts["canaries"] is None:
        print(f"checked by fingerprint alone: {options.target} is older than canaries; embed again to have them")
    else:
        print(
            f"canaries: {facts['canaries']} of {facts['of']} queries nearest to the teacher's own vector, mean cosine "
            f"{facts['mean_cosine']:.3f}"
        )


def card(options: argparse.Namespace) -> None:
    folder = Path(options.folder)
    if not folder.is_dir():
        raise HlmError(f"expected a folder at {folder}, found none; name what a recipe wrote")
    kind = read_json(folder / MANIFEST).get("kind") if (folder / MANIFEST).is_file() else None

    from hlm.cards import dataset_card, student_card, teacher_card

    write = {"student": student_card, "teacher": teacher_card}.get(kind, dataset_card)
    name = re.sub(r"[^A-Za-z0-9]+", "-", folder.resolve().name).strip("-") or "artefact"
    about = {
        "repo_id": options.repo_id or f"local/{name}",
        "report": read_json(options.report) if options.report else None,
        "latency": read_json(options.latency) if options.latency else None,
    }
    names = ("teacher_repo", "student_repo", "dataset_repo", "base_model", "licence", "language", "command", "commit")
    print(write(folder, **about, **{name: getattr(options, name) for name in names}))


def read_json(path: str | Path) -> dict[str, Any]:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HlmError(f"expected a JSON object at {path}, found none to read ({error}); correct the path") from error
    if not isinstance(value, dict):
        raise HlmError(f"expected a JSON object at {path}, found {type(value).__name__}; correct the path")
    return value


def located(name: str, repo_type: str = "model", subfolder: str | None = None) -> Path:
    """The folder that `name` stands for; a Hub id, owner/name or owner/name@revision, is downloaded."""
    where, _, revision = name.partition("@")
    if Path(name).is_dir():
        where, revision = name, ""
    return local_folder(where, revision=revision or None, repo_type=repo_type, subfolder=subfolder)


def located_catalogue(name: str, kind: str = "index") -> Path:
    """The index or store at a folder, in a dataset's folder, or in a dataset on the Hub."""
    inside = {"index": "index", "vectors": "vectors/corpus"}[kind]
    if Path(name).is_dir():
        return Path(name) / inside if (Path(name) / inside / MANIFEST).is_file() else Path(name)
    return located(name, "dataset", inside)


def read_titles(source: str, ids: list[str]) -> list[str]:
    """The title of each ad, or its text where it has no title; passes once over the corpus, a block at a time.

    Raises:
        HlmError: an ad of the index that the dataset does not have.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    from hlm.data import load

    corpus = load(source, splits=(), skip_bad_rows=True).corpus
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
