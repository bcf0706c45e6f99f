"""The Hub on loopback answers the real clients, in processes of their own, and fails on demand."""

import hashlib
import http.client
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from hub_faults import FAULTS, Always
from hub_server import HubServer

OWNER = """
import json, os, sys
from pathlib import Path
import numpy as np
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
name, api, out = sys.argv[1], HfApi(), {}

def status(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except HfHubHTTPError as error:
        return error.response.status_code

floats = np.random.default_rng(0).standard_normal(60_001).astype(np.float32).round(2)
files = {"README.md": b"# x", "config.json": b"{}", "empty.txt": b"", "a/model.safetensors": floats.tobytes(),
         "a/b/words.bin": b"the same words " * 20_000 + b"\\0", "noise.parquet": os.urandom(200_000)}
out["user"] = api.whoami()["name"]
for kind, sdk in (("model", {}), ("dataset", {}), ("space", {"space_sdk": "gradio"})):
    api.create_repo(name, repo_type=kind, private=True, **sdk)
out["again"] = status(api.create_repo, name)
api.create_repo(name, exist_ok=True)
out["foreign"] = status(api.create_repo, "guest/x")
head = api.repo_info(name).sha
Path("from_disk").write_bytes(files["noise.parquet"])
sources = files | {"noise.parquet": "from_disk"}
adds = [CommitOperationAdd(path, source) for path, source in sources.items()]
first = api.create_commit(name, adds, commit_message="one", parent_commit=head).oid
api.create_tag(name, tag="v1", revision=first)
out["tag again"] = status(api.create_tag, name, tag="v1", revision=head)
more = [CommitOperationAdd("config.json", b"[1]"), CommitOperationDelete("a/b/words.bin")]
out["conflict"] = status(api.create_commit, name, more, commit_message="two", parent_commit=head)
second = api.create_commit(name, more, commit_message="two", parent_commit=first).oid
api.create_branch(name, branch="next", revision=first)
api.create_branch(name, branch="next", exist_ok=True)
refs = api.list_repo_refs(name)
out["refs"] = [{r.name: r.target_commit for r in refs.branches} == {"main": second, "next": first},
               {r.name: r.target_commit for r in refs.tags} == {"v1": first}]
out["paths"] = [one.path for one in api.get_paths_info(name, ["a/model.safetensors", "missing"])]
out["missing revision"] = status(api.repo_info, name, revision="v9")

def pulled(revision):
    folder = Path(snapshot_download(name, revision=revision))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

old, new = pulled("v1"), pulled("main")
attributes = {".gitattributes": old[".gitattributes"]}
del (now := files | {"config.json": b"[1]"})["a/b/words.bin"]
out["equal"] = [old == files | attributes, new == now | attributes, pulled(first) == old]
shelf = api.create_collection("A Shelf", namespace="acme", exists_ok=True)
for kind in ("model", "dataset", "dataset"):
    api.add_collection_item(shelf.slug, name, kind, exists_ok=True)
shelf = api.create_collection("A Shelf", namespace="acme", exists_ok=True)
out["shelf"] = [(item.item_id, item.item_type) for item in shelf.items][-2:] == [(name, "model"), (name, "dataset")]
print(json.dumps(out))
"""
STRANGER = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
try:
    folder = Path(snapshot_download(sys.argv[1], cache_dir=sys.argv[2]))
    print(json.dumps({p.name: len(p.read_bytes()) for p in folder.rglob("*") if p.is_file()}))
except HfHubHTTPError as error:
    print(json.dumps([type(error).__name__, error.response.status_code]))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(autouse=True)
def no_old_faults(hub):
    hub.restart_log()


def run(hub, code, *words, cwd, **who):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=environment | hub.environment(**who, home=cwd / "home"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("xet", [True, False])
def test_what_is_written_is_read_in_both_modes(hub, tmp_path, xet):
    name = f"acme/{'xet' if xet else 'lfs'}"
    hub.page_size = 3  # so that trees come in pages
    assert run(hub, OWNER, name, cwd=tmp_path, user="acme", xet=xet) == {
        "user": "acme",
        "again": 409,
        "foreign": 403,
        "tag again": 409,
        "conflict": 412,
        "refs": [True, True],
        "paths": ["a/model.safetensors"],
        "missing revision": 404,
        "equal": [True, True, True],
        "shelf": True,
    }
    by_xet = {method for _, method, path, status in hub.log if "/xorbs/" in path and status in (200, 206)}
    by_lfs = {method for _, method, path, status in hub.log if path.startswith("/large/") and status in (200, 206)}
    assert (by_xet, by_lfs) == (({"POST", "GET"}, set()) if xet else (set(), {"PUT", "GET"}))
    # What was sent one way comes the other way, too.
    (tmp_path / "other").mkdir()
    sizes = run(hub, STRANGER, name, tmp_path / "cache", cwd=tmp_path / "other", user="acme", xet=not xet)
    assert sizes["model.safetensors"] == 240_004 and sizes["noise.parquet"] == 200_000
    for user, status in ((None, 401), ("guest", 404)):  # as if it were not there
        refused = run(hub, STRANGER, name, tmp_path / "none", cwd=tmp_path, user=user, xet=xet)
        assert refused[1] == status, refused


def ask(hub, method, path, body=b"", **headers):
    headers = {"Authorization": f"Bearer {hub.tokens['acme']}"} | headers
    request = urllib.request.Request(hub.url + path, body or None, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.fixture
def repo(hub, tmp_path):
    name = f"acme/{tmp_path.name}"[:40]
    created = {"name": name[5:], "organization": "acme", "type": "model"}
    assert ask(hub, "POST", "/api/repos/create", json.dumps(created).encode())[0] == 200
    return name


def lines(*operations):
    header = {"key": "header", "value": {"summary": "x"}}
    return b"\n".join(json.dumps(one).encode() for one in (header, *operations))


def small(path, content="eA=="):
    return {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}}


def test_a_content_that_is_not_what_was_announced_is_refused(hub, repo):
    oid = hashlib.sha256(b"content").hexdigest()
    path = f"/large/{oid}?signature={hub.signature(oid)}"
    assert ask(hub, "PUT", f"/large/{oid}", b"content")[0] == 403
    assert ask(hub, "PUT", path, b"contEnt")[0] == 400
    before = hub.branch("models", repo)
    named = {"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", "oid": oid, "size": 7}}
    commit = f"/api/models/{repo}/commit/main"
    assert ask(hub, "POST", commit, lines(small("first"), named))[0] == 400  # it has not arrived: nothing of both is
    assert hub.branch("models", repo) == before
    assert ask(hub, "PUT", path, b"content")[0] == 200
    wrong = {"key": "lfsFile", "value": named["value"] | {"size": 8}}
    gone = {"key": "deletedFile", "value": {"path": "nowhere"}}
    for bad in (lines(small("first"), wrong), lines(named, gone), lines(small("first", "?")), lines(named)[:-20]):
        assert ask(hub, "POST", commit, bad)[0] in (400, 404)
    assert hub.branch("models", repo) == before
    assert ask(hub, "POST", commit, lines(small("first"), named))[0] == 200
    assert set(hub.branch("models", repo)[1]) == {".gitattributes", "first", "x.bin"}


def test_faults_happen_at_their_request_and_only_there(hub, repo):
    path, made = f"/api/models/{repo}/branch/", {}
    for fault in FAULTS:
        hub.restart_log()
        hub.faults = {2: fault}
        assert ask(hub, "GET", f"/api/models/{repo}")[0] == 200
        try:
            made[fault] = ask(hub, "POST", path + fault, b"{}")[0]
        except (ConnectionError, http.client.HTTPException) as error:
            made[fault] = type(error)
        assert ask(hub, "POST", path + f"after-{fault}", b"{}")[0] == 200
        assert [status for *_, status in hub.log][::2] == [200, 200]
        assert (fault in hub.state.repos["models", repo].branches) == (
            fault in ("lost_answer", "cut_answer", "corrupt")
        )
    assert [made[fault] for fault in ("500", "503", "429", "corrupt")] == [500, 503, 429, 200]
    assert issubclass(made["lost_request"], ConnectionResetError)
    assert issubclass(made["lost_answer"], ConnectionResetError)
    assert made["cut_answer"] is http.client.IncompleteRead
    hub.faults = Always(len(hub.log) + 2, "503")
    assert [ask(hub, "GET", f"/api/models/{repo}")[0] for _ in range(3)] == [200, 503, 503]


def test_a_corrupt_upload_is_refused_and_a_corrupt_answer_differs_in_one_byte(hub, repo):
    oid = hashlib.sha256(b"more content").hexdigest()
    hub.restart_log()
    hub.faults = {1: "corrupt", 3: "corrupt"}
    path = f"/large/{oid}?signature={hub.signature(oid)}"
    assert [ask(hub, "PUT", path, b"more content")[0] for _ in range(2)] == [400, 200]
    _, raw = ask(hub, "GET", path)
    assert len(raw) == 12 and sum(one != other for one, other in zip(raw, b"more content", strict=True)) == 1
    assert ask(hub, "GET", path, Range="bytes=5-8") == (206, b"cont")
