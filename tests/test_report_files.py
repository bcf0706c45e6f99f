"""report.json and latency.json: what is written is what is read, and what is no report is refused by its field."""

import copy
import json
from pathlib import Path

import pytest

from hlm.artefacts import HlmError
from hlm.report_files import checked_report, read_latency, read_report, write_latency, write_report
from hlm.report_types import SCHEMA_VERSION

RESULTS = Path(__file__).resolve().parent.parent / "results"
REPORTS = {name: json.loads((RESULTS / f"{name}.json").read_text())["report"] for name in ("quickstart", "electronics")}
LATENCIES = sorted(RESULTS.glob("latency-*.json"))


def test_the_results_of_every_version_are_reports():
    assert len(LATENCIES) >= 5
    for name, report in REPORTS.items():
        older = {key: value for key, value in report.items() if key != "schema_version"}
        assert report["schema_version"] == SCHEMA_VERSION
        assert checked_report(report, name) is report and checked_report(older, name) is older
    for path in LATENCIES:
        assert read_latency(path) == json.loads(path.read_text())


def test_what_is_written_is_what_is_read(tmp_path):
    write_report(tmp_path, REPORTS["quickstart"])
    write_latency(tmp_path, read_latency(LATENCIES[0]))
    version = {"schema_version": SCHEMA_VERSION}
    assert read_report(tmp_path / "report.json") == version | REPORTS["quickstart"]
    assert read_latency(tmp_path / "latency.json") == version | read_latency(LATENCIES[0])


def changed(value, path, new):
    """A copy with another value at `path`; without the key where `new` is None."""
    value = copy.deepcopy(value)
    *outer, last = path
    holder = value
    for step in outer:
        holder = holder[step]
    if new is None:
        del holder[last]
    else:
        holder[last] = new
    return value


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        (["schema_version"], SCHEMA_VERSION + 1, f"of version {SCHEMA_VERSION} or before, found {SCHEMA_VERSION + 1}"),
        (["k"], "10", "a whole number as 'k', found str '10'"),
        (["systems"], None, "a mapping as 'systems', found nothing"),
        (["systems", "student"], [1], "a mapping as 'systems.student', found list"),
        (["systems", "student", "ndcg@10"], "high", "a number as 'systems.student.ndcg@10', found str 'high'"),
        (["recovery", "ndcg@10", "ci95"], None, "a list as 'recovery.ndcg@10.ci95', found nothing"),
        (["recovery", "ndcg@10", "ci95", 1], [], "a number as 'recovery.ndcg@10.ci95.1', found list"),
        (["recovery", "ndcg@10", "value"], float("nan"), "a number as 'recovery.ndcg@10.value', found float nan"),
        (["environment", "cores"], True, "a whole number as 'environment.cores', found bool True"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, path, new, message):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(changed(REPORTS["quickstart"], path, new)))
    with pytest.raises(HlmError) as error:
        read_report(file)
    assert message in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        (["blocks", 3, "contaminated"], 0, "true or false as 'blocks.3.contaminated', found int 0"),
        (
            ["systems", "online", "latency_ms", "all", "p99"],
            None,
            "as 'systems.online.latency_ms.all.p99', found nothing",
        ),
        (["systems", "online", "agreement", "with"], None, "a text as 'systems.online.agreement.with', found nothing"),
        (["systems", "online", "floor", "left", "over"], "low", "as 'systems.online.floor.left.over', found str 'low'"),
        (["rates"], {}, "a mapping as 'rates.bandwidth_gb_per_s', found nothing"),
    ],
)
def test_what_is_no_latency_report_is_refused(tmp_path, path, new, message):
    file = tmp_path / "latency.json"
    file.write_text(json.dumps(changed(json.loads((RESULTS / "latency-quickstart.json").read_text()), path, new)))
    with pytest.raises(HlmError) as error:
        read_latency(file)
    assert message in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize("text", ["[]", "{", "", "7"])
def test_what_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(HlmError, match="report.json: expected a JSON object"):
        read_report(tmp_path / "report.json")
