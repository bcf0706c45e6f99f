"""Raw logs with every kind of dirt through `hlm prepare`: what time and memory it takes, and does anything of a person
get through?

    python results/measure/measure_prepare.py --output results/prepare.json

`dirty` logs are CSV as `raw_logs.py` makes them, with e-mail addresses and numbers of telephones and cards planted by
rule, each typed by six users. `long` ones are Parquet, every second line a query that no other has: what has to be held
of a log are its distinct texts. Memory is the largest resident set of the process.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq

from hlm.artefacts import read_manifest, write_json
from hlm.config import parse, run_recipe
from hlm.data.log_cleaning import clean
from hlm.data.personal import ProductNumbers
from hlm.data.words import fold
from hlm.machine import facts

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from results.measure import raw_logs

RECIPE = Path(__file__).resolve().parents[2] / "recipes/prepare_logs.py"


@dataclass
class MeasurePrepareConfig:
    output: str = field(default="results/prepare.json", metadata={"help": "file for the figures"})
    dirty: list[int] = field(default_factory=lambda: [500_000, 2_000_000], metadata={"help": "lines of CSV"})
    long: list[int] = field(
        default_factory=lambda: [1_000_000, 5_000_000, 100_000_000], metadata={"help": "lines of Parquet"}
    )
    ads: int = field(default=20_000, metadata={"help": "in the catalogue"})
    planted: int = field(default=10_000, metadata={"help": "personal queries in each dirty log"})
    product_numbers: int = field(default=100_000, metadata={"help": "that are looked at alone"})
    memory: str = field(default="1GB", metadata={"help": "what `hlm prepare` is told to keep to"})


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(MeasurePrepareConfig, argv=argv)
    runs = []
    for kind, sizes in (("dirty", config.dirty), ("long", config.long)):
        for lines in sizes:
            with tempfile.TemporaryDirectory(prefix="hlm-prepare-") as folder:
                runs.append(measured(Path(folder), kind, lines, config))
                print(runs[-1], flush=True)
    from hlm.evaluation.report import command_line, environment  # a process takes over its parent's peak, and torch's

    about = {"environment": environment(command_line("results/measure/measure_prepare.py", argv)) | facts()}
    found = {"config": asdict(config), "runs": runs, "product_numbers": lost_product_numbers(config)}
    write_json(config.output, about | found)


def measured(folder: Path, kind: str, lines: int, config: MeasurePrepareConfig) -> dict[str, Any]:
    """One log, made and prepared in a process of its own."""
    planted: list[str] = []
    if kind == "dirty":
        planted = raw_logs.make(folder, total=lines, ads=config.ads, planted=config.planted)
        log = folder / "queries.csv"
    else:
        raw_logs.catalogue(folder, config.ads, 0)
        log = long_log(folder, lines)
    words = [folder / "data", "--catalogue", folder / "ads.csv", "--log", log, "--clicks", folder / "clicks.csv"]
    more = ["--memory", config.memory, *(["--min_users", "1"] if kind == "long" else [])]
    started = time.monotonic()
    child = subprocess.Popen([sys.executable, RECIPE, *map(str, words), *more], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"hlm prepare ended with {child.returncode}")
    manifest = read_manifest(folder / "data", "dataset")
    return {
        "kind": kind,
        "lines": lines,
        "log_mib": round(log.stat().st_size / 2**20, 1),
        "seconds": round(time.monotonic() - started, 1),
        "peak_mib": round(usage.ru_maxrss / 1024, 1),
        "counts": manifest["counts"],
        "dropped": manifest["dropped"],
        "planted": len(planted),
        "planted_found": found_in(folder / "data", planted),
    }


def long_log(folder: Path, lines: int) -> Path:
    """Every second line is a query of its own, the others are up to 100,000 frequent ones, of which some have clicks; a
    tenth as many users."""
    path = folder / "queries.parquet"
    clicks = (f"shoe {n // 10},ad{n // 20:07d},u{n % 10},{1_700_000_000 + n * 600}" for n in range(5000))
    (folder / "clicks.csv").write_text("query,sku,user,time\n" + "\n".join(clicks) + "\n")
    own = "'lamp ' || md5(i::VARCHAR)[:6] || ' chair ' || md5(i::VARCHAR)[7:12]"
    frequent = f"'shoe ' || (hash(i) % {min(100_000, lines // 10)})"
    user = f"'u' || (hash(i + 1) % {max(1, lines // 10)})"
    duckdb.execute(
        f"COPY (SELECT CASE WHEN i % 2 = 0 THEN {own} ELSE {frequent} END AS query, {user} AS user, "
        f"1700000000 + i * 5000000 // {lines} AS time FROM range({lines}) t(i)) TO '{path}' (FORMAT parquet)"
    )
    return path


def found_in(data: Path, planted: Sequence[str]) -> int:
    """How many of the planted queries are in the data's queries or its report: as they are, or their number alone."""
    if not planted:
        return 0
    texts = [(data / f"report.{kind}").read_text(encoding="utf-8") for kind in ("txt", "html")]
    for name in ("queries", "unlabelled"):
        texts += pq.read_table(data / f"{name}.parquet")["text"].to_pylist()
    text = fold("\n".join(texts))
    digits = re.sub(r"[ .\-()/]", "", text)
    numbers = (re.sub(r"\D", "", max(re.findall(r"\d[\d ().\-/]*", query) or [""], key=len)) for query in planted)
    return sum(
        fold(query) in text or (len(number) > 8 and number in digits)
        for query, number in zip(planted, numbers, strict=True)
    )


def lost_product_numbers(config: MeasurePrepareConfig) -> dict[str, int]:
    """How many sizes, prices, models and numbers of the catalogue are taken for a person's."""
    known = ProductNumbers(f"{raw_logs.ean_of(n)}, {raw_logs.article_of(n)}" for n in range(config.ads))
    rng = random.Random(0)
    made = (raw_logs.product_number(rng, rng.randrange(config.ads)) for _ in range(config.product_numbers))
    return {"of": config.product_numbers, "lost": sum(clean(text, known, 200)[2] is not None for text in made)}


if __name__ == "__main__":
    run_recipe(main)
