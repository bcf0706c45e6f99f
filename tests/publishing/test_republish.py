"""Publishing again where others worked on the Hub meanwhile: what they added stays, what they edited is not lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import children
import pytest
from hub_server import HubServer

from hlm.artefacts import HlmError
from hlm.encoders.loading import fingerprint, load_encoder, save_encoder
from hlm.hub.changes import RECORD, Changes, compare, foreign, hashes, make_record, read_record

ROOT = Path(__file__).resolve().parents[2]
# Each step is printed as [error or None, commit, changed, added, changed, deleted, kept, edited, overwritten].
STEPS = """
import json, sys
from dataclasses import replace
from pathlib import Path
from huggingface_hub import HfApi
from hlm.artefacts import HlmError
from hlm.publishing.publish import publish_folder
from hlm.hub.repository import Repository
folder, name, steps = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
kinds = ("added", "changed", "deleted", "kept", "edited", "overwritten")
for step in steps:
    said = None
    if "upload" in step:
        HfApi().upload_file(path_or_fileobj=step["content"].encode(), path_in_repo=step["upload"], repo_id=name)
    elif "delete" in step:
        HfApi().delete_file(step["delete"], repo_id=name)
    elif "write" in step:
        files, flags = {path: text.encode() for path, text in step["write"].items()}, step.get("flags", {})
        repository = Repository(name)
        repository.create()
        try:
            said = [None, *repository.write(files, "by hand", **flags)]
        except HlmError as error:
            said = [str(error)]
    else:
        try:
            made = publish_folder(folder, name, **step)
            lists = [list(getattr(made.changes, kind)) for kind in kinds] if made.changes else made.not_compared
            said = [None, made.commit, made.changed, lists]
        except HlmError as error:
            said = [str(error)]
    print("RESULT", json.dumps(said))
"""


def run(hub: HubServer, folder: Path, name: str, *steps: dict) -> list:
    hub.restart_log()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= hub.environment("acme", xet=False) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = children.run(
        [sys.executable, "-c", STEPS, str(folder), name, json.dumps(steps)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]


def written(hub: HubServer) -> list[str]:
    return [path for _, method, path, _ in hub.log if method in ("POST", "PUT") and "repos/create" not in path]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def student(tmp_path_factory, tiny_bert) -> Path:
    folder = tmp_path_factory.mktemp("student") / "student"
    model = load_encoder(tiny_bert, device="cpu")
    save_encoder(model, folder, "student", inputs={"teacher": fingerprint(model)}, config={})
    return folder


def content(hub: HubServer, name: str) -> dict[str, bytes]:
    return {path: hub.content(entry) for path, entry in hub.branch("models", name)[1].items()}


def test_what_others_added_stays_and_what_they_edited_is_not_overwritten(hub, student):
    name, ours, new = "acme/student", {"card": "# One\n"}, {"card": "# Two\n"}
    dry, first, again = run(hub, student, name, ours | {"dry_run": True}, ours, ours)
    names = sorted(path.relative_to(student).as_posix() for path in student.rglob("*") if path.is_file())
    assert dry[:3] == [None, None, False] and sorted(dry[3][0]) == sorted(first[3][0]) == sorted([*names, "README.md"])
    assert first[2] and again == [None, first[1], False, [[], [], [], [], [], []]]
    edited = "# One\n\nKnown issues, written by hand.\n"
    others = [{"upload": "thumbnail.png", "content": "x"}, {"upload": "README.md", "content": edited}]
    *_, dry, refused, same = run(hub, student, name, *others, new | {"dry_run": True}, new, {"card": edited})
    assert dry == [None, None, False, [[], ["README.md"], [], ["thumbnail.png"], ["README.md"], []]]
    assert "model acme/student was not changed" in refused[0] and "--overwrite_edited" in refused[0]
    assert same[2] and same[3][3:] == [["thumbnail.png"], [], []]  # their card, taken over, is ours from now on
    assert content(hub, name)["README.md"] == edited.encode() and content(hub, name)["thumbnail.png"] == b"x"
    taken, kept = run(hub, student, name, new, new)
    assert taken[2] and taken[3] == [[], ["README.md"], [], ["thumbnail.png"], [], []]
    assert not kept[2] and kept[3][3] == ["thumbnail.png"]
    flags = {"overwrite_edited": True, "delete_others": True}
    _, _, dry, last = run(hub, student, name, *others, new | flags | {"dry_run": True}, new | flags)
    assert dry[3] == last[3] == [[], ["README.md"], ["thumbnail.png"], [], [], ["README.md"]]
    assert content(hub, name).keys() == {*names, "README.md", RECORD, ".gitattributes"}
    assert content(hub, name)["README.md"] == b"# Two\n"


def test_a_dry_run_and_a_refusal_send_nothing(hub, student):
    run(hub, student, "acme/quiet", {"card": "# One\n"}, {"upload": "README.md", "content": "by hand"})
    before = hub.branch("models", "acme/quiet")
    run(hub, student, "acme/quiet", {"card": "# Two\n", "dry_run": True}, {"card": "# Two\n"})
    assert written(hub) == [] and hub.branch("models", "acme/quiet") == before
    run(hub, student, "acme/absent", {"card": "# Two\n", "dry_run": True})
    assert ("models", "acme/absent") not in hub.state.repos


def test_any_edited_file_counts_and_a_lost_record_makes_all_files_others(hub, student):
    name, ours = "acme/edited", {"card": "# One\n"}
    edits = [{"upload": "LICENSE", "content": "theirs"}, {"upload": "hlm.json", "content": "{}"}]
    *_, refused, overwritten, _, lost, other, _, last = run(
        hub,
        student,
        name,
        ours,
        *edits,
        ours,
        ours | {"overwrite_edited": True},
        {"delete": RECORD},
        ours,
        {"card": "# Two\n"},
        {"upload": RECORD, "content": "[]"},
        {"card": "# Three\n"},
    )
    assert "expected hlm.json there as HLM wrote it" in refused[0] and overwritten[3][5] == ["hlm.json"]
    assert lost[2] and lost[3] == [[], [], [], ["LICENSE"], [], []]  # equal to ours: the record alone is written again
    assert other[2] and other[3][1] == ["README.md"]
    assert "README.md there as HLM wrote it" in last[0]


def test_a_repository_writes_as_publishing_does(hub, student):
    name, flags = "acme/written", {"delete_others": True, "overwrite_edited": True}
    one, two = {"hlm.json": "{}", "a": "1", "b": "1"}, {"hlm.json": "{}", "a": "2"}
    (_, commit, made), _, (_, second, _), (_, same, again) = run(
        hub, student, name, {"write": one}, {"upload": "theirs", "content": "x"}, {"write": two}, {"write": two}
    )
    assert made and second != commit and (same, again) == (second, False)
    assert content(hub, name).keys() == {".gitattributes", "hlm.json", "a", "theirs", RECORD}  # b was ours
    _, (refused,), (_, _, made) = run(
        hub, student, name, {"upload": "a", "content": "theirs"}, {"write": one}, {"write": one, "flags": flags}
    )
    assert "expected a there as HLM wrote it" in refused and made
    assert content(hub, name).keys() == {".gitattributes", "hlm.json", "a", "b", RECORD}


def test_a_card_that_the_hub_made_itself_is_replaced_and_one_that_somebody_wrote_is_not(hub, student):
    create = "from huggingface_hub import HfApi; HfApi().create_repo('acme/{0}', repo_type='space', space_sdk='gradio')"
    write = (
        "from hlm.hub.repository import Repository; "
        "print(Repository('acme/{0}', 'space').write({{'README.md': b'ours', 'hlm/x.py': b''}}, 'x'))"
    )
    upload = (
        "from huggingface_hub import HfApi; HfApi().upload_file(path_or_fileobj=b'by hand', path_in_repo='README.md', "
        "repo_id='acme/{0}', repo_type='space')"
    )

    def act(*codes: str) -> subprocess.CompletedProcess:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= hub.environment("acme", xet=False) | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", "\n".join(codes)]
        return children.run(command, env=environment, capture_output=True, text=True, check=False)

    done = act(create.format("fresh"), write.format("fresh"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert hub.content(hub.branch("spaces", "acme/fresh")[1]["README.md"]) == b"ours"
    done = act(create.format("used"), upload.format("used"), write.format("used"))
    assert "expected README.md there as HLM wrote it" in done.stderr
    assert hub.content(hub.branch("spaces", "acme/used")[1]["README.md"]) == b"by hand"


def test_without_a_network_a_dry_run_says_that_it_could_not_compare(student, tmp_path):
    with HubServer(tmp_path) as hub:
        pass  # its port is closed from here on
    (dry,) = run(hub, student, "acme/student", {"card": "# One\n", "dry_run": True})
    assert dry[:3] == [None, None, False]
    assert "model acme/student could not be compared" in dry[3] and "check the connection" in dry[3]


FILES = {"hlm.json": b"{}", "new": b"1", "same": b"2", "ours": b"3", "theirs": b"4", "taken": b"5"}


def there(**more: bytes) -> dict[str, str]:
    """Path -> hash, large files by SHA-256."""
    held = {"same": b"2", "ours": b"old", "theirs": b"edited", "gone": b"6", "gone_edited": b"edited"}
    held |= {"taken": b"theirs"}
    return {path: hashes(text)[path == "gone"] for path, text in (held | more).items()}


def test_files_are_told_apart_by_the_record():
    record = make_record({"same": b"2", "ours": b"old", "theirs": b"4 before", "gone": b"6", "gone_edited": b"7"})
    found = compare("head", there(added=b"x", **{".gitattributes": b"y", RECORD: record}), FILES, record, False)
    assert found.added == ("hlm.json", "new") and found.changed == ("ours", "theirs", "taken")
    assert found.deleted == ("gone",) and found.kept == ("added", "gone_edited") and found.edited == ("theirs", "taken")
    with pytest.raises(HlmError, match="expected theirs, taken there"):
        found.refuse_edited("model acme/x")
    asked = found.asked(delete_others=True, overwrite_edited=True)
    assert asked.deleted == ("gone", "added", "gone_edited") and not asked.kept and not asked.edited
    asked.refuse_edited("model acme/x")
    assert list(found.lines()) == [
        "added: hlm.json, new",
        "changed: ours, theirs, taken",
        "deleted: gone",
        "kept, as others wrote it: added, gone_edited; --delete_others deletes it",
        "refused, as others edited it on the Hub: theirs, taken; --overwrite_edited replaces it",
    ]
    assert "overwritten, though others edited it on the Hub: theirs, taken" in asked.lines()
    none = compare("head", there(), FILES, None, False)
    assert none.edited == none.changed == ("ours", "theirs", "taken") and none.kept == ("gone", "gone_edited")
    assert list(Changes("head", outdated=False).lines()) == ["unchanged"]
    assert next(Changes(None, added=("a",)).lines()).startswith("new: ")


@pytest.mark.parametrize(
    "record", [None, b"", b"{", b"[]", b'{"files": 3}', b'{"files": {"a": 3}}', b'{"files": null}', b"\xff"]
)
def test_a_record_that_is_none_claims_nothing(record):
    assert read_record(record) == {}


def test_where_hlm_never_wrote_others_files_are_foreign():
    assert foreign({".gitattributes": "", "README.md": "", "pytorch_model.bin": ""}) == ["pytorch_model.bin"]
    assert foreign({".gitattributes": "", "README.md": ""}) == foreign({"x": "", "vectors/corpus/hlm.json": ""}) == []
