"""What goes to the Hub and what does not: decided, checked and listed without any network."""

import errno
import hashlib
import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import errors
from huggingface_hub.errors import HfHubHTTPError
from safetensors.numpy import save_file

from hlm import redaction
from hlm.artefacts import HlmError, file_records, read_manifest
from hlm.data.contract import document_text, iterate, load
from hlm.encoders.loading import encode, fingerprint, load_encoder, save_encoder
from hlm.hub import changes as hub_changes
from hlm.hub.repository import Repository, hub_errors
from hlm.indexes.faiss_index import AdIndex
from hlm.publishing.files import release_files
from hlm.publishing.publish import link_files, local_folder, publish_folder
from hlm.vectors.store import VectorStore, write_store

# The Hub's client speaks HTTP by httpx, or by httpx2 in newer versions.
httpx = importlib.import_module(errors.HTTPError.__module__.split(".")[0])
SECRET = "hf_" + "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def house(tmp_path_factory, tiny_bert, catalogue_200):
    home = tmp_path_factory.mktemp("hub")
    model = load_encoder(tiny_bert, device="cpu")
    teacher = fingerprint(model)
    config = {"student": "/srv/private/team/aligned", "seed": 3}
    save_encoder(model, home / "student", "student", inputs={"teacher": teacher}, config=config)
    save_encoder(model, home / "teacher", "teacher", inputs={}, config={"backbone": "acme/backbone"})
    (home / "teacher/adapter").mkdir()
    settings = {"base_model_name_or_path": "/srv/private/backbone", "r": 4, "peft_type": "LORA"}
    (home / "teacher/adapter/adapter_config.json").write_text(json.dumps(settings))
    weights = {"base_model.model.layer.0.lora_A.weight": np.ones((4, 32), np.float32)}
    save_file(weights, home / "teacher/adapter/adapter_model.safetensors")
    shutil.copytree(catalogue_200, home / "dataset")
    data = load(str(home / "dataset"), splits=())
    records = [(row["_id"], document_text(row)) for row in iterate(data.corpus)]
    write_store(
        home / "dataset/vectors/corpus",
        records,
        lambda texts: encode(model, texts),
        dim=32,
        encoder=teacher,
        source=data.fingerprint("corpus"),
        n_rows=len(records),
    )
    AdIndex.build(VectorStore.open(home / "dataset/vectors/corpus")).save(home / "dataset/index")
    (home / "dataset/reports").mkdir()
    report = {"dataset": "/srv/private/team/shop", "environment": {"command": f"x --token {SECRET}"}}
    (home / "dataset/reports/report.json").write_text(json.dumps(report))
    return home


@pytest.fixture
def mine(house, tmp_path):
    shutil.copytree(house, tmp_path / "mine")
    return tmp_path / "mine"


def test_a_dry_run_lists_every_file_with_its_size_and_the_card(house):
    made = publish_folder(house / "student", "acme/student", card="# Card\n", dry_run=True)
    on_disk = {p.relative_to(house / "student").as_posix(): p for p in (house / "student").rglob("*") if p.is_file()}
    assert set(made.files) == {*on_disk, "README.md"} and made.files["README.md"] == 7
    assert all(made.files[name] == path.stat().st_size for name, path in on_disk.items() if name != "hlm.json")
    assert (made.card, made.commit, made.changed) == ("# Card\n", None, False)
    made = publish_folder(house / "teacher", "acme/teacher", dry_run=True)
    assert set(made.files) == {"adapter_config.json", "adapter_model.safetensors", "hlm.json"}  # not its 32-bit weights


def test_no_path_of_the_machine_and_no_token_is_published(house):
    for kind in ("student", "teacher", "dataset"):
        for name, content in release_files(house / kind, kind).items():
            raw = content if isinstance(content, bytes) else content.read_bytes()
            assert b"/srv" not in raw and SECRET.encode() not in raw, name
    manifest = json.loads(release_files(house / "student", "student")["hlm.json"])
    kept = read_manifest(house / "student", "student")
    assert manifest == kept | {"config": {"student": "aligned", "seed": 3}}
    report = json.loads(release_files(house / "dataset", "dataset")["reports/report.json"])
    assert report == {"dataset": "shop", "environment": {"command": "x --token ***"}}


@pytest.mark.parametrize("token", [SECRET, "plain-looking-token"])
def test_a_secret_anywhere_else_stops_it(mine, monkeypatch, token):
    monkeypatch.setattr(redaction, "get_token", lambda: "plain-looking-token")
    path = mine / "student/config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"note": token}))
    manifest = read_manifest(mine / "student", "student") | {"files": file_records(mine / "student")}
    (mine / "student/hlm.json").write_text(json.dumps(manifest))
    with pytest.raises(HlmError, match="config_sentence_transformers.json: expected nothing secret") as caught:
        release_files(mine / "student", "student")
    assert token not in str(caught.value)
    with pytest.raises(HlmError, match="README.md: expected nothing secret"):
        release_files(mine / "teacher", "teacher", card=f"call it with {token}")


@pytest.mark.parametrize(
    "kind, name",
    [
        ("student", "optimizer.pt"),
        ("student", "runs/log.txt"),
        ("student", "pytorch_model.bin"),
        ("student", "model.safetensors.bak"),
        ("teacher", "adapter/training_args.bin"),
        ("dataset", "per_query.parquet"),
        ("dataset", "vectors/unlabelled/x.pkl"),
        ("dataset", "vectors/corpus/vectors-00000.npy"),
    ],
)
def test_what_has_no_place_there_is_refused_by_name(mine, kind, name):
    path = mine / kind / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    with pytest.raises(
        HlmError, match=f"expected only the documented files of a {kind}, found '{Path(name).name}|{name}"
    ):
        release_files(mine / kind, kind)


def test_hidden_files_stay_at_home(mine):
    (mine / "student/.cache").mkdir()
    (mine / "student/.cache/x.lock").write_text("x")
    (mine / "student/.eval_results").mkdir()
    (mine / "student/.eval_results/hlm.yaml").write_text("- x: 1\n")
    files = release_files(mine / "student", "student")
    assert ".eval_results/hlm.yaml" in files and not any("cache" in name for name in files)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def change(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 0x55
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [cut, change])
@pytest.mark.parametrize(
    "kind, name",
    [
        ("student", "model.safetensors"),
        ("dataset", "vectors/corpus/vectors-00000.safetensors"),
        ("dataset", "index/index.faiss"),
        ("dataset", "index/ads.arrow"),
    ],
)
def test_what_was_tampered_with_is_not_published(mine, kind, name, damage):
    damage(mine / kind / name)
    with pytest.raises(HlmError):
        publish_folder(mine / kind, "acme/x", repo_type="dataset" if kind == "dataset" else "model", dry_run=True)


def test_what_does_not_belong_together_is_not_published(mine):
    with pytest.raises(HlmError, match="expected safetensors|adapter"):
        cut(mine / "teacher/adapter/adapter_model.safetensors")
        release_files(mine / "teacher", "teacher")
    save_file({"x": np.ones(1, np.float32)}, mine / "teacher/adapter/adapter_model.safetensors")
    with pytest.raises(HlmError, match="expected LoRA weights, found x"):
        release_files(mine / "teacher", "teacher")
    corpus = mine / "dataset/corpus.jsonl"
    lines = corpus.read_text().splitlines()
    row = json.loads(lines[0]) | {"title": "Another ad"}
    corpus.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    with pytest.raises(HlmError, match="expected vectors made from the texts"):
        release_files(mine / "dataset", "dataset")
    shutil.rmtree(mine / "dataset/vectors")
    with pytest.raises(HlmError, match="expected an index of the texts"):
        release_files(mine / "dataset", "dataset")
    with pytest.raises(HlmError, match="no app.py"):
        release_files(mine / "dataset", "space")


def test_objects_are_published_as_their_folders_are(house):
    model = load_encoder(str(house / "student"), device="cpu")
    teacher = read_manifest(house / "student", "student")["inputs"]["teacher"]
    made = publish_folder(model, "acme/student", teacher=teacher, dry_run=True)
    assert set(made.files) == set(publish_folder(house / "student", "acme/student", dry_run=True).files)
    with pytest.raises(HlmError, match="teacher: expected the fingerprint"):
        publish_folder(model, "acme/student", dry_run=True)
    store = VectorStore.open(house / "dataset/vectors/corpus")
    made = publish_folder(store, "acme/ads", repo_type="dataset", dry_run=True)
    assert {name.rsplit("/", 1)[0] for name in made.files} == {"vectors/corpus"} and len(made.files) == 3
    made = publish_folder(AdIndex.build(store), "acme/ads", repo_type="dataset", dry_run=True)
    assert set(made.files) == {"index/hlm.json", "index/ads.arrow", "index/index.faiss"}


def test_a_linked_view_is_published_like_the_folder(house, tmp_path):
    link_files(house / "student", tmp_path / "view")
    made = release_files(tmp_path / "view", "student", sources=[house / "student"])
    assert made.keys() == release_files(house / "student", "student").keys()
    with pytest.raises(HlmError, match="expected a file or folder of its own, found a link to"):
        release_files(tmp_path / "view", "student")


def linked(folder: Path, outside: Path) -> dict[str, tuple[Path, Path]]:
    """Way out of the folder -> (link in it, what the link says)."""
    (folder / "inner").symlink_to(outside / "secret.txt")
    return {
        "straight": (folder / "vocab.txt", outside / "secret.txt"),
        "relative": (folder / "vocab.txt", Path("../outside/secret.txt")),
        "by way of itself": (folder / "vocab.txt", Path("../student/../outside/secret.txt")),
        "over a link inside": (folder / "vocab.txt", Path("inner")),
        "a folder": (folder / "onnx2", outside),
        "a folder inside": (folder / "again", folder / "1_Pooling"),
        "to nothing": (folder / "vocab.txt", Path("nowhere")),
        "to itself": (folder / "vocab.txt", Path("vocab.txt")),
        "the card": (folder / "README.md", outside / "secret.txt"),
        "results": (folder / ".eval_results", outside),
    }


WAYS = (
    "straight, relative, by way of itself, over a link inside, a folder, a folder inside, to nothing, to itself, "
    "the card, results"
).split(", ")


@pytest.mark.parametrize("way", WAYS)
def test_a_link_that_leads_out_is_refused(mine, way):
    outside = mine / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("x\n")
    (outside / "hlm.yaml").write_text("x\n")
    folder = mine / "student"
    link, target = linked(folder, outside)[way]
    link.symlink_to(target)
    if way != "over a link inside":
        (folder / "inner").unlink()
    for act in (lambda: release_files(folder, "student"), lambda: link_files(folder, mine / "view")):
        with pytest.raises(HlmError, match="expected a file") as caught:
            act()
        assert str(link) in str(caught.value) or "inner" in str(caught.value)
        shutil.rmtree(mine / "view", ignore_errors=True)


def test_what_a_manifest_records_of_files_is_what_is_published(mine):
    manifest = read_manifest(mine / "teacher", "teacher")  # as recipes/teacher.py records it, the adapter too
    manifest["files"] |= {f"adapter/adapter_{name}": "0" * 16 for name in ("config.json", "model.safetensors")}
    (mine / "teacher/hlm.json").write_text(json.dumps(manifest))
    for kind, count in (("student", 9), ("teacher", 2), ("dataset", 2)):
        files = release_files(mine / kind, kind, card="# Card\n")
        manifests = [name for name in files if name.endswith("hlm.json")]
        raw = {name: one if isinstance(one, bytes) else one.read_bytes() for name, one in files.items()}
        for name in manifests:
            records = json.loads(raw[name]).get("files", {})
            folder = name.removesuffix("hlm.json")
            assert records == {short: hashlib.sha256(raw[folder + short]).hexdigest()[:16] for short in records}
        assert sum(len(json.loads(raw[name]).get("files", {})) for name in manifests) >= count, kind


def test_links_inside_and_a_snapshot_of_the_hubs_cache_are_published(mine):
    folder, blobs = mine / "student", mine / "cache/blobs"
    (folder / "LICENSE").write_text("Apache\n")
    (folder / "LICENSE.md").symlink_to("LICENSE")
    assert {"LICENSE", "LICENSE.md"} <= release_files(folder, "student").keys()
    snapshot = mine / "cache/snapshots/0123"
    shutil.copytree(folder, snapshot)
    blobs.mkdir()
    (snapshot / "config.json").rename(blobs / "0a1b")
    (snapshot / "config.json").symlink_to("../../blobs/0a1b")
    assert release_files(snapshot, "student").keys() == release_files(folder, "student").keys()
    (mine / "adapter").mkdir()
    (mine / "teacher/adapter").rename(mine / "elsewhere")
    (mine / "teacher/adapter").symlink_to(mine / "elsewhere")
    with pytest.raises(HlmError, match="teacher/adapter: expected a file or folder of its own"):
        release_files(mine / "teacher", "teacher")


@pytest.mark.parametrize(
    "kind, name",
    [
        ("student", "LICENSE"),
        ("student", "vocab.txt"),
        ("student", "notes.model"),
        ("student", "README.md"),
        ("student", "chat_template.jinja"),
        ("student", "LICENSE.key"),
        ("student", ".eval_results/hlm.yaml"),
        ("dataset", "unlabelled.jsonl"),
        ("dataset", "LICENSE.txt"),
        ("teacher", "adapter/LICENSE"),
    ],
)
def test_secrets_are_found_in_every_text_that_is_allowed_by_name(mine, kind, name):
    path = mine / kind / name
    path.parent.mkdir(exist_ok=True)
    for secret in (SECRET, "-----BEGIN RSA PRIVATE KEY-----", "AKIAIOSFODNN7EXAMPLE"):
        path.write_text(json.dumps({"text": secret}) + "\n")
        with pytest.raises(HlmError, match=f"{Path(name).name}: expected nothing secret, found a") as caught:
            release_files(mine / kind, kind)
        assert secret not in str(caught.value)


def test_the_machines_names_are_refused_in_texts_but_not_in_tables_of_words(mine, monkeypatch):
    monkeypatch.setattr(redaction, "_user", lambda: "janedoe")
    folder = mine / "student"
    for name in ("vocab.txt", "LICENSE"):
        (folder / name).write_text("janedoe\n")
    release_files(folder, "student")
    with pytest.raises(HlmError, match="README.md: expected nothing secret, found the user's name, janedoe, in line 2"):
        release_files(folder, "student", card="# x\nby janedoe\n")
    publish_folder(folder, "janedoe/x", card="# janedoe/x\n", dry_run=True)  # the owner is read there anyway
    publish_folder(folder, "acme/x", card="by janedoe\n", dry_run=True, public_names=["janedoe"])


def status_error(status: int) -> HfHubHTTPError:
    request = httpx.Request("POST", "http://hub.test/api/models/acme/x")
    response = httpx.Response(status, request=request)
    address = f"https://cdn.test/x?Signature={SECRET}&Expires=1"
    return HfHubHTTPError(f"{status} Client Error for url: {address} token {SECRET}", response=response)


def wrapped(error: BaseException) -> RuntimeError:
    try:
        raise RuntimeError("Error while uploading 'x' to the Hub.") from error
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    "error, cause, remedy",
    [
        (status_error(401), "HTTP 401", "hf auth login"),
        (status_error(403), "HTTP 403", "a token that may write there"),
        (status_error(404), "HTTP 404", "correct the name"),
        (status_error(409), "HTTP 409", "run it again"),
        (status_error(412), "HTTP 412", "run it again"),
        (status_error(429), "HTTP 429", "wait some minutes"),
        (status_error(503), "HTTP 503", "check the connection, then run it again"),
        (wrapped(status_error(500)), "HTTP 500", "run it again"),
        (httpx.ConnectError("refused"), "ConnectError", "check the connection"),
        (httpx.RemoteProtocolError("peer closed"), "RemoteProtocolError", "run it again"),
        (OSError("Consistency check failed: file should be of size 3"), "Consistency check", "run it again"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left", "free some space"),
        (wrapped(OSError(errno.ENOSPC, "No space left on device")), "No space left", "free some space"),
    ],
)
def test_errors_name_the_cause_and_the_remedy_and_no_token(error, cause, remedy, monkeypatch):
    with pytest.raises(HlmError) as caught, hub_errors("model acme/x was not changed"):
        raise error
    text = str(caught.value)
    assert text.startswith("model acme/x was not changed (") and cause in text and remedy in text
    assert SECRET not in text and "Signature" not in text and "\n" not in text


def test_our_own_refusals_pass_and_mistakes_in_code_are_not_hidden():
    with pytest.raises(HlmError, match="^plain$"), hub_errors("x"):
        raise HlmError("plain")
    with pytest.raises(TypeError), hub_errors("x"):
        raise TypeError("a mistake")


def test_repositories_show_no_token_and_refuse_commits_as_branches():
    assert SECRET not in repr(Repository("acme/x", token=SECRET))
    with pytest.raises(HlmError, match="expected a branch, found the commit"):
        Repository("acme/x", revision="0" * 40).create()


def test_content_is_compared_by_either_hash(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"hello\n")
    git = "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    large = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"  # sha256sum
    for content in (path, b"hello\n"):
        assert hub_changes.same_content(content, git) and hub_changes.same_content(content, large)
        assert not hub_changes.same_content(content, git[:-1] + "b") and not hub_changes.same_content(content, None)


def test_a_name_that_is_nothing_is_one_clear_error(tmp_path):
    odd = ["acme/x y", "acme/..", "acme/x--y", "acme/-x", "acme/x.git", "acme/", "acme/x\n", "acm\u00e9/x", "C:/x"]
    odd += [" /x", "a/" + "b" * 200, "a" * 5000, "x\0y/z", ""]
    for name in ("./nowhere", "/nowhere/at/all", "a/b/c", "nowhere", *odd):
        with pytest.raises(HlmError, match="expected a folder or a Hub id"):
            local_folder(name)
    with pytest.raises(HlmError, match="expected a folder or a Hub dataset at acme/none, revision v1, found neither"):
        local_folder("acme/none", revision="v1", repo_type="dataset")  # offline, and not in the cache
    for subfolder in ("../x", "/etc", "a/../../x"):
        with pytest.raises(HlmError, match="subfolder: expected a folder inside"):
            local_folder(tmp_path, subfolder=subfolder)
    with pytest.raises(HlmError, match="repo_type: expected model, dataset or space, found 'modell'"):
        local_folder("acme/none", repo_type="modell")
    for name in ("acme/x y", "acme", "a/b/c"):
        with pytest.raises(HlmError, match="expected a Hub id"):
            publish_folder(tmp_path, name, dry_run=True)
    with pytest.raises(HlmError, match="expected a folder 'index'"):
        local_folder(tmp_path, subfolder="index")
