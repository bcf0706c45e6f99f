"""Publishing while requests fail: each repository is as before or as it is to be, and the same command completes it."""

import copy
import json

import pytest
import yaml
from hub_faults import FAULTS
from hub_repositories import Entry, Repo, different, not_whole
from hub_run import tiny_run
from hub_server import HubServer

from hlm.artefacts import HlmError
from results.measure import measure_publish
from results.measure.measure_publish import OUTAGES, missing_files, outcome, succeed, wrong_files

FEW = ["lost_answer", "corrupt", "outage_503"]


@pytest.fixture(scope="module")
def release(tmp_path_factory, tiny_bert) -> str:
    """A config of recipes/publish.py."""
    folder = tmp_path_factory.mktemp("release")
    given = {"name": "tiny", "space": str(measure_publish.ROOT / "spaces/query_to_ad"), "licence": "apache-2.0"}
    (folder / "publish.yaml").write_text(yaml.safe_dump(given | tiny_run(folder, tiny_bert, seed=3)))
    return str(folder / "publish.yaml")


def test_few_faults_and_the_round_trip(release, tmp_path):
    out = tmp_path / "hub.json"
    words = ["--release", release, "--output", str(out), "--faults", *FEW, "--every", "30"]
    measure_publish.main([*words, "--scenarios", "update", "pull", "--modes", "xet"])
    found = json.loads(out.read_text())
    trip, update, pull = (found["xet"][name] for name in ("round_trip", "update", "pull"))
    assert set(trip["max_difference"]) == {
        "student fp32",
        "student int8",
        "student torch",
        "adapter",
        "vectors/corpus",
        "vectors/queries",
        "index",
    }
    assert set(trip["max_difference"].values()) == {0.0} and trip["files_that_differ"] == []
    assert set(trip["files"]) == {"teacher", "dataset", "student", "space"} and trip["bytes"]["student"] > 50_000
    assert trip["downloads"]["/xorbs/"] > 3 and trip["downloads"]["/large/"] == 0
    assert update["requests"] > 50 and found["xet"]["tokens_in_output"] == 0
    assert set(update["faults"]) == set(FEW) and update["failures"] == pull["failures"] == []
    for fault, count in update["faults"].items():
        assert count["tried"] >= 1 and count["half_published"] == 0, fault
        assert count["completed"] + count["clear_error"] == count["reruns_completed"] == count["tried"], fault
    assert update["faults"]["outage_503"]["completed"] == 0
    for fault, count in pull["faults"].items():
        assert count["tried"] and count["wrong_content"] == count["other_error"] == 0, fault
        assert count["reruns_completed"] == count["tried"], fault
    assert pull["faults"]["disk_full"]["completed"] == 0
    assert found["publish_faults"]["tried"] == sum(count["tried"] for count in update["faults"].values())
    assert found["whole"] and found["not_proven"] and found["machine"]["instructions"] is not None
    assert found["settings"]["faults"] == FEW and set(OUTAGES.values()) <= set(FAULTS)


def test_what_is_half_published_lost_or_doubled_is_seen(tmp_path):
    with HubServer(tmp_path) as hub:
        empty = hub.saved()
        old_files = {"a": Entry.small(b"1"), "b": Entry.small(b"1")}
        new_files = {"a": Entry.small(b"2"), "b": Entry.small(b"2")}

        def state(*trees, tag=None):
            hub.restore(empty)
            repo = hub.state.repos["models", "acme/x"] = Repo(private=False)
            for files in trees:
                commit = repo.write("main", dict(files), "x")
            if tag:
                repo.tags[tag] = commit
            return hub.saved()

        old, new = state(old_files), state(old_files, new_files, tag="v2")
        for whole in (old, new, state(old_files, new_files)):
            hub.restore(whole)
            assert not_whole(hub, old, new) == []
        assert different(hub, new) == ["models/acme/x"]  # the tag is missing
        hub.restore(new)
        assert different(hub, new) == []
        half = state(old_files, old_files | {"a": new_files["a"]})
        hub.restore(half)
        assert len(not_whole(hub, old, new)) == 1
        state(old_files, new_files, new_files, tag="v2")
        assert not_whole(hub, old, new) == [] and different(hub, new)  # one commit too many
        state(old_files, tag="v2")
        assert not_whole(hub, old, new) == ["acme/x: tag v2"]
        lost = copy.deepcopy(new_files) | {"c": Entry.large("0" * 64, 1)}
        target = state(old_files, lost)
        (hub.folder / "large" / ("0" * 64)).write_bytes(b"!")
        hub.state = target
        assert not_whole(hub, old, target) == ["acme/x: content of c"]


def test_outcomes_and_missing_files_are_told_apart(tmp_path):
    assert outcome({"value": {}}) == "completed" and outcome({"error": "HlmError", "text": "x"}) == "clear_error"
    assert [outcome({"error": kind, "text": ""}) for kind in ("hung", "died", "ValueError")] == ["other_error"] * 3
    with pytest.raises(HlmError, match="expected a publish without faults to succeed, found hung"):
        succeed({"error": "hung", "text": "no answer"})
    (tmp_path / "a").write_bytes(b"1")
    right = {"x": {"a": b"1", "b": b"2"}, "y": {"a": b"1"}}
    assert missing_files({"x": str(tmp_path)}, right) == ["y", "x: b"]
    shown = tmp_path / "models--acme--tiny-x/snapshots/0123/b"
    shown.parent.mkdir(parents=True)
    shown.write_bytes(b"2")
    assert wrong_files(tmp_path, right) == []
    shown.write_bytes(b"3")
    assert wrong_files(tmp_path, right) == ["x: b"]


@pytest.mark.parametrize("wrong", [["--faults", "5xx"], ["--modes", "ftp"], ["--every", "0"], ["--release", "nowhere"]])
def test_what_cannot_be_measured_is_refused(release, tmp_path, wrong):
    with pytest.raises(HlmError, match="expected"):
        measure_publish.main(["--release", release, "--output", str(tmp_path / "x.json"), *wrong])
