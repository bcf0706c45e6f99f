"""The command `hlm`: says what a run will cost, searches a catalogue with a student, says whether a student fits a
catalogue's vectors, writes a card, and runs the steps of the recipe."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from hlm import __version__
from hlm.artefacts import MANIFEST, HlmError
from hlm.endings import INTERRUPTED, NO_READER
from hlm.extras import check_extra, extras_named
from hlm.fields import optional, read_json
from hlm.hub.cache import local_folder
from hlm.indexes.lineage import open_fitting, read_student
from hlm.planning.run_file import QUESTIONS, RAW, RUN_FILE, ask, data_of, one_step, write_run_file
from hlm.planning.settings import Assumptions, check_folder, read_steps
from hlm.recipe_files import recipes
from hlm.step_table import STEPS

# torch, faiss and datasets are imported where they are used: `hlm --help` and a refusal come at once.
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
JOINERS = "\u200c\u200d"  # Persian and Hindi are misspelt without them
# What recipes/<name>.py does, as a command.
SCRIPTS = {"quickstart": "run all steps of a folder of configs, skip what is up to date"}
SCRIPTS |= {step.script: step.help for step in reversed(STEPS.values())}  # the first use of a script
# The raw log's step is what most people begin with: it has the short name as a command. As a file of settings,
# prepare.yaml has long been that of the step which derives queries.
SHORT = {"prepare": "prepare_logs"}
SCRIPTS |= {short: f"{SCRIPTS[name]} (also {name})" for short, name in SHORT.items()}
EXTRA_OF = {"quickstart": "eval", "evaluate": "eval", "benchmark": "eval", "prepare_logs": "logs"}
REVISION = "or a Hub id, owner/name or owner/name@revision"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit status: 0; 2 after an `HlmError`, 1 where the system refused to read or write, each printed as one
        `error: ...` line; 130 after Ctrl-C and 141 where the reader of the output went away, both without a word.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the terminal cannot show must not end the command
    try:
        try:
            words = sys.argv[1:] if argv is None else argv
            if words and words[0] in SCRIPTS:
                run_script(*words)
            options = parser().parse_args(words)
            with extras_named("this command"):
                options.run(options)
        finally:
            # Here rather than when Python ends: there a closed pipe or a full disk would be a traceback.
            if sys.stdout is not None:
                sys.stdout.flush()
    except HlmError as error:
        return refuse(str(error), 2)
    except BrokenPipeError:
        drop_output()
        return NO_READER
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        drop_output()
        place = f" ({error.filename})" if error.filename else ""
        return refuse(
            f"the system says: {error.strerror or error}{place}; free some space, or set HLM_CACHE and HF_HOME to "
            "folders that this user can write to",
            1,
        )
    return 0


def drop_output() -> None:
    """What could not be written is not tried once more when Python ends."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def refuse(message: str, status: int) -> int:
    print(f"error: {' '.join(printable(message).split())}", file=sys.stderr)
    return status


def printable(text: str, *, keep: str = "") -> str:
    """The text in one line that a terminal shows as it is: what would move its cursor, change its colours or turn its
    reading direction is written as an escape; `keep` names the white space that stays besides blanks."""
    shown = (c if c in keep or c in JOINERS or unicodedata.category(c) not in UNSEEN else escaped(c) for c in text)
    return "".join(shown)


def escaped(character: str) -> str:
    return " " if character.isspace() else character.encode("unicode_escape", "surrogatepass").decode("ascii")


def show(text: str) -> None:
    """Prints lines at once: a refusal may follow them."""
    print(printable(text, keep="\n"), flush=True)


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

    add_readers(commands)
    add_runners(commands)
    for name, text in SCRIPTS.items():
        commands.add_parser(name, help=text, add_help=False)  # `run_script` runs it
    return top


def add_readers(commands: Any) -> None:
    """The commands that work on what the steps wrote."""
    command = commands.add_parser("search", help="the ads that a student finds for a query", allow_abbrev=False)
    command.add_argument("query", help="what a person types")
    command.add_argument("--student", required=True, metavar="ID", help=f"folder of a student {REVISION}")
    catalogue = command.add_mutually_exclusive_group(required=True)
    catalogue.add_argument("--index", metavar="ID", help=f"an index: folder, URI, or a dataset with one {REVISION}")
    catalogue.add_argument(
        "--vectors", metavar="ID", help=f"the teacher's store of the ads, searched exactly: a folder {REVISION}"
    )
    command.add_argument(
        "--corpus", metavar="DATA", help="the dataset, folder or Hub id, to print the ads' titles from"
    )
    command.add_argument("-k", type=int, default=10, help="how many ads (default: %(default)s)")
    command.set_defaults(run=search)

    add_catalogue(commands)

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


def add_runners(commands: Any) -> None:
    """The commands that set up a run and start it."""
    command = commands.add_parser("doctor", help="whether this machine can run HLM", allow_abbrev=False)
    command.add_argument("--json", action="store_true", help="print JSON: name, status, text and remedy of each check")
    command.set_defaults(run=doctor)

    command = commands.add_parser("init", help="a folder of your own, for `hlm run`", allow_abbrev=False)
    command.add_argument("folder", help="made where it is missing; nothing in it is overwritten")
    command.add_argument("--data", metavar="ID", help="a folder or Hub id (default: a sample catalogue)")
    for name in RAW:
        command.add_argument(f"--{name}", metavar="FILE", nargs="+", help=f"raw files in its place: {RAW[name]}")
    command.add_argument("--hardware", metavar="NAME", help="cpu, or GPUs such as 8xH100 (default: cpu)")
    command.add_argument("--p99-ms", metavar="MS", help="latency budget of one query (default: 15)")
    command.add_argument(
        "--min-score", metavar="GRADE", help="lowest grade of a good ad (default: the set's; of raw files 1)"
    )
    command.add_argument("--like", metavar="NAME", help="write out a set of configs instead, one file a step")
    command.set_defaults(run=init)

    command = commands.add_parser("run", help="runs all steps of a folder that `hlm init` made", allow_abbrev=False)
    command.add_argument("folder", help="with run.yaml, or one YAML file a step")
    command.add_argument("--processes", default="1", metavar="N", help="to launch each training step on")
    command.add_argument("--publish", metavar="NAME", help="afterwards publish it for this user or organisation")
    command.add_argument("--dry-run", action="store_true", help="of --publish: print what it would send, send nothing")
    command.add_argument("--check", action="store_true", help="say what is wrong with the settings, run nothing")
    command.set_defaults(run=run_all)


def add_catalogue(commands: Any) -> None:
    """The commands about a store or an index that is there."""
    command = commands.add_parser("verify", help="whether a student fits a store or an index", allow_abbrev=False)
    command.add_argument("student", help=f"folder of the student {REVISION}")
    command.add_argument("target", help=f"folder of the ads' vectors or of an index {REVISION} of a dataset")
    command.set_defaults(run=verify)

    command = commands.add_parser(
        "rollback", help="go back to an older version of a store or an index", allow_abbrev=False
    )
    command.add_argument("folder", help="folder of the store or of the index")
    command.add_argument("--to", type=int, metavar="NUMBER", help="which version (default: the one before)")
    command.add_argument("--list", action="store_true", help="print the versions and change nothing")
    command.set_defaults(run=rollback)


def run_script(name: str, *words: str) -> NoReturn:
    """Becomes `python recipes/<name>.py`, of a checkout or of the installed package. A folder with `run.yaml` as the
    first word stands for `--config` and the step's settings there.

    Raises:
        HlmError: a package that the step imports is not installed, or what is wrong with `run.yaml`.
    """
    if words and name not in SHORT and (Path(words[0]) / RUN_FILE).is_file():
        words = ("--config", one_step(words[0], name), *words[1:])
    script = recipes() / f"{SHORT.get(name, name)}.py"
    check_extra(EXTRA_OF.get(script.stem, "train"), f"hlm {name}")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(script), *words])


def init(options: argparse.Namespace) -> None:
    from hlm import recipe_files

    folder = options.folder.rstrip("/")
    answers = {name: getattr(options, name) for name in (*QUESTIONS, "min_score")}
    raw: dict[str, list[str]] = {name: found for name in RAW if (found := getattr(options, name))}
    if options.like:
        if any(answers.values()) or raw:
            raise HlmError("expected --like, or what goes into run.yaml, found both; leave --like out")
        files = recipe_files.init(options.folder, options.like)
        show(f"{len(files)} files in {folder}; all steps: hlm run {folder}")
        return
    if raw:
        check_extra("logs", "hlm init with raw files")
        from hlm.config import log_to_stderr  # transformers comes with it

        log_to_stderr()
    written = write_run_file(options.folder, raw=raw, **(answers if raw else ask(answers)))
    if raw:
        show((data_of(written) / "report.txt").read_text(encoding="utf-8"))
    show(f"{written}; all steps: hlm run {folder}")


def run_all(options: argparse.Namespace) -> None:
    words = ["--publish", options.publish] if options.publish else []
    words += ["--dry-run"] if options.dry_run else []
    words += ["--check"] if options.check else []
    run_script("quickstart", "--configs", options.folder, "--processes", options.processes, *words)


def doctor(options: argparse.Namespace) -> None:
    """Prints the checks.

    Raises:
        HlmError: a check found a problem.
    """
    from hlm.planning.doctor import as_text, examine

    checks = examine()
    show(json.dumps([check._asdict() for check in checks], indent=2) if options.json else as_text(checks))
    if problems := [check.name for check in checks if check.status == "problem"]:
        raise HlmError(f"expected a machine that can run HLM, found problems with {', '.join(problems)}; see above")


def plan(options: argparse.Namespace) -> None:
    """Prints the plan; then refuses it where a phase needs more than the GPUs given hold."""
    check_folder(options.config)

    from hlm.config import parse
    from hlm.planning.hardware import parse_gpus
    from hlm.planning.plan import check_fit, make_plan
    from hlm.planning.report import as_dict, text
    from hlm.training.trainer import TrainingArguments

    steps = read_steps(options.config, TrainingArguments)
    assumed = Path(options.config) / "plan.yaml"
    given = {item.name: getattr(options, item.name) for item in fields(Assumptions)}
    flags = [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]
    (sizes,) = parse(Assumptions, argv=["--config", str(assumed), *flags] if assumed.is_file() else flags)
    count, gpu = parse_gpus(sizes.gpus) if sizes.gpus else (1, None)
    made = make_plan(options.config, steps, sizes, count)
    show(json.dumps(as_dict(made, count, gpu), indent=2) if options.json else text(made, count, gpu))
    if gpu:
        check_fit(made, count, gpu)


def search(options: argparse.Namespace) -> None:
    if not options.query.strip():
        raise HlmError("query: expected some text, found none")
    if any(unicodedata.category(character) == "Cs" for character in options.query):
        raise HlmError("query: expected text in UTF-8, found other bytes; check the terminal's encoding")
    if options.k < 1:
        raise HlmError(f"-k: expected 1 or more, found {options.k}")
    from hlm.serving.student_files import StudentFiles

    source, revision = named(options.student)
    student = read_student(StudentFiles.folder_of(source, revision))
    kind = "index" if options.index else "vectors"
    catalogue = open_fitting(located_catalogue(options.index or options.vectors, kind), student, kind)

    from hlm.data.contract import titles
    from hlm.indexes.index import Index
    from hlm.serving.query_encoder import QueryEncoder

    if isinstance(catalogue, Index):
        index = catalogue
    else:
        from hlm.indexes.faiss_index import AdIndex

        index = AdIndex.build(catalogue, dim=student["dim"])
    encoder = QueryEncoder.from_pretrained(source, revision=revision)
    scores, ids = index.search(encoder.encode(options.query), options.k)
    names = titles(options.corpus, list(map(str, ids))) if options.corpus else [""] * len(ids)
    for rank, (score, ad, title) in enumerate(zip(scores, ids, names, strict=False), 1):
        print(printable(f"{rank:>3}  {score:.4f}  {ad}  {title}").rstrip())


def verify(options: argparse.Namespace) -> None:
    student = located(options.student)
    read_student(student)  # what is no student is refused before a catalogue is downloaded
    target = located_catalogue(options.target)

    from hlm.indexes import lineage

    facts = lineage.verify(student, target)
    show(
        f"ok: {options.student} (encoder {facts['encoder']}, width {facts['dim']}) searches the {facts['vectors']} "
        f"vectors of {options.target}, both of teacher {facts['teacher']}"
    )
    if facts["canaries"] is None:
        show(f"checked by fingerprint alone: {options.target} is older than canaries; embed again to have them")
    else:
        show(
            f"canaries: {facts['canaries']} of {facts['of']} queries nearest to the teacher's own vector, mean cosine "
            f"{facts['mean_cosine']:.3f}"
        )


def rollback(options: argparse.Namespace) -> None:
    from hlm.indexes.rollback import roll_back, shown_versions

    if not options.list:
        roll_back(options.folder, options.to)
    show(shown_versions(options.folder))


def card(options: argparse.Namespace) -> None:
    folder = Path(options.folder)
    if not folder.is_dir():
        raise HlmError(f"expected a folder at {folder}, found none; name what a recipe wrote")
    found = folder / MANIFEST
    kind = optional(read_json(found), str, "kind", where=found) if found.is_file() else None

    from hlm.publishing.cards import dataset_card, student_card, teacher_card
    from hlm.report_files import read_latency, read_report

    write = {"student": student_card, "teacher": teacher_card}.get(kind or "", dataset_card)
    name = re.sub(r"[^A-Za-z0-9]+", "-", folder.resolve().name).strip("-") or "artefact"
    about = {
        "repo_id": options.repo_id or f"local/{name}",
        "report": read_report(options.report) if options.report else None,
        "latency": read_latency(options.latency) if options.latency else None,
    }
    names = ("teacher_repo", "student_repo", "dataset_repo", "base_model", "licence", "language", "command", "commit")
    show(write(folder, **about, **{name: getattr(options, name) for name in names}))


def located(name: str, repo_type: str = "model", subfolder: str | None = None) -> Path:
    """The folder that `name` stands for; a Hub id, owner/name or owner/name@revision, is downloaded."""
    where, revision = named(name)
    return local_folder(where, revision=revision, repo_type=repo_type, subfolder=subfolder)


def named(name: str) -> tuple[str, str | None]:
    """A folder or Hub id, and the revision that is named with it."""
    if Path(name).is_dir():
        return name, None
    where, _, revision = name.partition("@")
    return where, revision or None


def located_catalogue(name: str, kind: str = "index") -> Path | str:
    """The index or store at a folder, in a dataset's folder, or in a dataset on the Hub; a service's URI as it is."""
    if "://" in name:
        return name
    inside = {"index": "index", "vectors": "vectors/corpus"}[kind]
    if Path(name).is_dir():
        return Path(name) / inside if (Path(name) / inside / MANIFEST).is_file() else Path(name)
    return located(name, "dataset", inside)


if __name__ == "__main__":
    sys.exit(main())
