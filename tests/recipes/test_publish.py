"""recipes/publish.py against a Hub on loopback, spoken to by the real clients in processes of their own."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import children
import pytest
from hub_server import HubServer
from huggingface_hub import RepoCard

from hlm.artefacts import HlmError, read_manifest
from hlm.config import parse
from hlm.encoders.loading import load_encoder, save_encoder
from hlm.publishing.publish import Published
from hlm.publishing.release import repositories_of
from hlm.publishing.staging import stage_space
from hlm.steps import PublishConfig
from recipes import embed, evaluate, export, publish, teacher

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"teacher": "models", "dataset": "datasets", "student": "models", "space": "spaces"}


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_bert, catalogue_200) -> Path:
    """A run by the recipes: a teacher with its adapter, its stores, a student that is its copy, a report."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(catalogue_200, folder / "data")
    data = str(folder / "data")
    teacher.main(
        ["--backbone", tiny_bert, "--data", data, "--output", str(folder / "teacher")]
        + "--min_score 3 --lora_rank 4 --max_steps 2 --per_device_train_batch_size 32 --learning_rate 1e-2".split()
        + "--save_strategy no --disable_tqdm true".split()
    )
    embed.main(["--model", str(folder / "teacher"), "--data", data, "--output", str(folder / "vectors")])
    fingerprint = read_manifest(folder / "teacher", "teacher")["encoder"]
    model = load_encoder(str(folder / "teacher"), device="cpu", max_seq_length=24)  # so it is another encoder
    save_encoder(model, folder / "student", "student", inputs={"teacher": fingerprint}, config={"data": data})
    export.main(["--student", str(folder / "student"), "--output", str(folder / "online")])
    systems = {name: str(folder / name) for name in ("teacher", "student")}
    systems["teacher"] = {"model": systems["teacher"], "corpus": str(folder / "vectors/corpus")}
    evaluate.main(["--data", data, "--output", str(folder), "--relevance_level", "1", "--systems", json.dumps(systems)])
    return folder


def arguments(home: Path, *more: str) -> list[str]:
    made = {"student": "online", "vectors": "vectors", "data": "data", "teacher": "teacher", "report": "report.json"}
    return [
        *"--name tiny --namespace acme --base_model acme/backbone --licence apache-2.0 --language en".split(),
        *(word for name, file in made.items() for word in (f"--{name}", str(home / file))),
        *["--space", str(ROOT / "spaces/query_to_ad"), *more],
    ]


def test_a_dry_run_prints_every_file_and_card_and_sends_nothing(home, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("a dry run sends nothing")

    monkeypatch.setattr("socket.socket.connect", no_network)
    planned = publish.main(arguments(home, "--dry-run"))
    out = capsys.readouterr().out
    assert list(planned) == list(PARTS) and out.endswith("dry run: nothing was sent\n")
    assert out.count("  not compared with the Hub: ") == 4 and "acme/tiny-space could not be compared (Offline" in out
    with pytest.raises(HlmError, match="model acme/tiny-teacher could not be compared"):
        publish.main(arguments(home))  # and without --dry-run nothing is begun
    for part, one in planned.items():
        assert one.commit is None and f"{one.repo_type} acme/tiny-{part}\n" in out and one.card in out
        for name, size in one.files.items():
            assert re.search(rf"^ +{size:,}  {re.escape(name)}$", out, flags=re.MULTILINE), name
    assert set(planned["teacher"].files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "hlm.json",
    }
    assert {"model.safetensors", "onnx/model.onnx", "onnx/model_quantized.onnx", ".eval_results/hlm.yaml"} <= set(
        planned["student"].files
    )
    assert {
        "corpus.jsonl",
        "queries.jsonl",
        "qrels/test.jsonl",
        "vectors/queries/hlm.json",
        "index/index.faiss",
        "reports/report.json",
        "reports/report.png",
    } <= set(planned["dataset"].files)
    assert not any("unlabelled" in name for name in planned["dataset"].files)  # may be a log of what people typed
    assert "unlabelled.jsonl" in publish.main(arguments(home, "--dry-run", "--unlabelled"))["dataset"].files
    library = {"hlm/publishing/publish.py", "hlm/demo/comparison.py"}
    assert library | {"app.py", "config.json", "requirements.txt"} <= set(planned["space"].files)
    assert str(home) not in out


def test_the_demos_settings_and_front_matter_name_what_was_published(home, tmp_path):
    (config,) = parse(PublishConfig, argv=arguments(home))
    repositories = repositories_of(config)
    kind = Published
    done = {
        "student": kind("acme/tiny-student", "model", {"model.safetensors": 9, "config.json": 2}, "", "5" * 40, True),
        "dataset": kind("acme/tiny-dataset", "dataset", {}, "", "d" * 40, True),
    }
    card = stage_space(config, repositories, done, tmp_path / "space")
    settings = json.loads((tmp_path / "space/config.json").read_text())
    assert settings["student"] == "acme/tiny-student" and settings["teacher"] is None and settings["latency"] is None
    assert {settings[name] for name in ("data", "vectors", "index", "report")} == {"acme/tiny-dataset"}
    pinned = dict.fromkeys(("data", "vectors", "index", "report"), "d" * 40) | {"student": "5" * 40}
    assert settings["revisions"] == pinned
    assert not settings.get("examples")  # the demo chooses them from the judgements
    front, before = (
        RepoCard(text).data.to_dict() for text in (card, (ROOT / "spaces/query_to_ad/README.md").read_text())
    )
    assert front["models"] == ["acme/tiny-student", "acme/tiny-teacher"] and front["datasets"] == ["acme/tiny-dataset"]
    assert front["preload_from_hub"] == [f"acme/tiny-student model.safetensors,config.json {'5' * 40}"]
    assert before.items() <= front.items()


def test_what_does_not_fit_stops_before_anything_is_sent(home, tmp_path, tiny_bert):
    with pytest.raises(HlmError, match="expected namespace or teacher_repo"):
        publish.main([word for word in arguments(home, "--dry-run") if word not in ("--namespace", "acme")])
    shutil.copytree(home / "data", tmp_path / "data")
    (tmp_path / "data/unlabelled").mkdir()
    (tmp_path / "data/unlabelled.jsonl").rename(tmp_path / "data/unlabelled/0.jsonl")
    with pytest.raises(HlmError, match="unlabelled: expected one table of them"):
        publish.main(arguments(home, "--dry-run", "--unlabelled", "--data", str(tmp_path / "data")))
    other = tmp_path / "other"
    save_encoder(load_encoder(tiny_bert, device="cpu"), other, "teacher", inputs={}, config={})
    with pytest.raises(HlmError, match="expected the student's teacher .* name that teacher"):
        publish.main(arguments(home, "--dry-run", "--teacher", str(other)))
    shutil.copytree(home / "online", tmp_path / "online")
    (tmp_path / "online/scheduler.pt").write_bytes(b"x")
    with pytest.raises(HlmError, match="found 'scheduler.pt'"):
        publish.main(arguments(home, "--dry-run", "--student", str(tmp_path / "online")))
    for folder, name, words in (
        ("data", "corpus.jsonl", ["--data", str(tmp_path / "data")]),
        ("online", "vocab.txt", ["--student", str(tmp_path / "online")]),
        ("demo", "notes.txt", ["--space", str(tmp_path / "demo")]),
    ):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
        shutil.copytree({"demo": ROOT / "spaces/query_to_ad"}.get(folder, home / folder), tmp_path / folder)
        (tmp_path / folder / name).unlink(missing_ok=True)
        (tmp_path / folder / name).symlink_to(home / "data/corpus.jsonl")
        with pytest.raises(HlmError, match=f"{folder}/{name}: expected a file or folder of its own, found a link"):
            publish.main(arguments(home, "--dry-run", *words))
    with pytest.raises(HlmError, match="space: expected the demo's folder"):
        publish.main(arguments(home, "--dry-run", "--space", str(tmp_path)))


PUBLISH = """
import json, sys
from hlm.artefacts import HlmError
from recipes import publish
for argv in json.loads(sys.argv[1]):
    try:
        done = publish.main(argv)
        print("RESULT", json.dumps({part: [one.commit, one.changed] for part, one in done.items()}))
    except HlmError as error:
        print("RESULT", json.dumps(str(error)))
"""
PULL = """
import json, sys
from pathlib import Path
import numpy as np
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from hlm import QueryEncoder, cli
from hlm.data.contract import load
from hlm.encoders.loading import encode, load_encoder
from hlm.publishing.publish import local_folder
from hlm.indexes.faiss_index import AdIndex
from hlm.vectors.store import VectorStore

home, base, texts, far = Path(sys.argv[1]), sys.argv[2], ["red shoe", "steel kettle 1 litre", "lamp"], {}

def difference(one, other):
    return float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).max())

student, dataset = "acme/tiny-student", "acme/tiny-dataset"
for precision in ("fp32", "int8"):
    pulled, kept = (QueryEncoder.from_pretrained(where, precision=precision) for where in (student, home / "online"))
    far["QueryEncoder " + precision] = difference(pulled.encode(texts), kept.encode(texts))
pulled, kept = (SentenceTransformer(str(where)) for where in (student, home / "online"))
far["SentenceTransformer"] = difference(pulled.encode(texts), kept.encode(texts))

def merged(adapter):
    model = load_encoder(base)
    model[0].model = PeftModel.from_pretrained(model[0].model, adapter).merge_and_unload()
    return encode(model, texts)

far["adapter"] = difference(merged("acme/tiny-teacher"), merged(str(home / "teacher/adapter")))
assert difference(merged("acme/tiny-teacher"), encode(load_encoder(base), texts)) > 1e-4
for part in ("corpus", "queries"):
    folder = local_folder(dataset, repo_type="dataset", subfolder="vectors/" + part)
    pulled, kept = VectorStore.open(folder), VectorStore.open(home / "vectors" / part)
    pulled.verify()
    assert pulled.ids.to_pylist() == kept.ids.to_pylist() and pulled.fingerprint == kept.fingerprint
    far["vectors/" + part] = difference(pulled.gather(range(len(kept))), kept.gather(range(len(kept))))
index = AdIndex.load(local_folder(dataset, repo_type="dataset", subfolder="index"), expect_encoder=pulled.encoder)
kept = AdIndex.build(VectorStore.open(home / "vectors/corpus"))
queries = QueryEncoder.from_pretrained(student).encode(texts)
(scores, ids), (kept_scores, kept_ids) = index.search(queries, 10), kept.search(queries, 10)
assert ids == kept_ids
far["index"] = difference(scores, kept_scores)
pulled, kept = load(dataset), load(str(home / "data"))
for part in ("corpus", "queries", "qrels/train", "qrels/dev", "qrels/test"):
    assert pulled.fingerprint(part) == kept.fingerprint(part), part
assert cli.main(["verify", student, dataset]) == 0
old = local_folder(student, revision="v1") / "README.md"
new = local_folder(student) / "README.md"
licences = [path.read_text().split("license: ")[1].split()[0] for path in (old, new)]
space = local_folder("acme/tiny-space", repo_type="space", revision="v1")
print("RESULT", json.dumps({"far": far, "licences": licences, "space": str(space)}))
"""
SPACE = """
import json, os
import hlm
from hlm.demo.comparison import DemoConfig, load_demo
assert hlm.__file__.startswith(os.getcwd()), hlm.__file__
config = DemoConfig.read("config.json")
demo = load_demo(config)
found = demo.compare(demo.examples[1][0], 5)
report = config.read_report("report")
print("RESULT", json.dumps([found["overlap"], len(found["student"]["hits"]), len(found["teacher"]["hits"]),
                            report["split"], demo.synthetic]))
"""
OWN = """
import json, sys
from pathlib import Path
import numpy as np
from hlm import QueryEncoder
from hlm.artefacts import HlmError
from hlm.publishing.publish import local_folder
try:
    pulled = QueryEncoder.from_pretrained(local_folder("acme/hidden-student")).encode(["red shoe"])
    kept = QueryEncoder.from_pretrained(Path(sys.argv[2]) / "online").encode(["red shoe"])
    print("RESULT", json.dumps(float(np.abs(pulled - kept).max())))
except HlmError as error:
    print("RESULT", json.dumps(str(error)))
"""
TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz01"


class Client:
    """Processes that know the Hub by their environment alone and share a cache of their own."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub, self.folder, self.said = hub, folder, ""

    def run(self, code: str, *words: str, user: str | None = "acme", xet: bool = True, cwd: Path = ROOT) -> list:
        """What the code printed after RESULT."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= self.hub.environment(user, home=self.folder / "hf", xet=xet)
        environment |= {"HLM_CACHE": str(self.folder / "hlm"), "PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1"}
        done = children.run(
            [sys.executable, "-c", code, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        self.said += done.stdout + done.stderr
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line[:7] == "RESULT "]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        hub.tokens["acme"] = TOKEN
        yield hub


@pytest.fixture(scope="module")
def published(hub, home, tmp_path_factory):
    """The run as release v1, published again, again with another licence under the same tag, and at last without."""
    client = Client(hub, tmp_path_factory.mktemp("publisher"))
    other = ["--licence", "mit"]
    runs = [["--tag", "v1"], ["--tag", "v1"], [*other, "--tag", "v1"], other, other]
    return client, client.run(PUBLISH, json.dumps([arguments(home, *more) for more in runs]))


def test_the_same_run_makes_one_commit_a_repository_and_a_tag_is_never_moved(hub, published):
    _, (first, second, refused, last, _) = published
    assert list(first) == list(PARTS) and all(changed for _, changed in first.values())
    assert second == {part: [commit, False] for part, (commit, _) in first.items()}
    assert "tag v1 of model acme/tiny-teacher: expected it to be free" in refused and "Whole so far: nothing" in refused
    for part, kind in PARTS.items():
        repo = hub.state.repos[kind, f"acme/tiny-{part}"]
        assert repo.tags == {"v1": first[part][0]} and repo.branches == {"main": last[part][0]}
        assert len(repo.commits) == 3, part  # the Hub's own first one, v1, and the one with another licence
    (collection,) = hub.state.collections.values()
    assert [item["id"] for item in collection["items"]] == [f"acme/tiny-{part}" for part in PARTS]


def test_the_same_content_is_not_sent_twice(hub, published):
    *_, last, again = published[1]
    assert again == {part: [commit, False] for part, (commit, _) in last.items()}
    written = [(method, path) for _, method, path, _ in hub.log if method in ("POST", "PUT")]
    final = max(number for number, (_, path) in enumerate(written) if "/commit/" in path)
    after = {path for _, path in written[final + 1 :]}
    assert after and all(re.match(r"/api/(repos/create|collections)", path) for path in after), after


def test_pulled_by_someone_else_vectors_are_equal(hub, home, published, tiny_bert, tmp_path):
    client = Client(hub, tmp_path)
    (found,) = client.run(PULL, str(home), tiny_bert, user=None)
    assert len(found["far"]) == 7 and set(found["far"].values()) == {0.0}
    assert found["licences"] == ["apache-2.0", "mit"]  # revision v1, and main
    (shown,) = client.run(SPACE, user=None, cwd=Path(found["space"]))
    assert shown[1:] == [5, 5, "test", True]  # it runs on its own copy of the package
    assert TOKEN not in client.said + published[0].said


EDIT = """
import sys
from huggingface_hub import HfApi
for repo, kind, path in (("tiny-dataset", "dataset", "notes.md"), ("tiny-student", "model", "README.md")):
    HfApi().upload_file(path_or_fileobj=b"by hand", path_in_repo=path, repo_id="acme/" + repo, repo_type=kind)
"""


def test_a_card_that_others_edited_stops_the_whole_release(home, tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        client, other = Client(hub, tmp_path / "owner"), ["--licence", "mit"]
        client.run(PUBLISH, json.dumps([arguments(home)]))
        client.run(EDIT)
        before = {part: hub.branch(kind, f"acme/tiny-{part}")[0] for part, kind in PARTS.items()}
        runs = [arguments(home, "--dry-run"), arguments(home, *other, "--dry-run"), arguments(home, *other)]
        same, dry, refused = client.run(PUBLISH, json.dumps(runs))
        assert {part: hub.branch(kind, f"acme/tiny-{part}")[0] for part, kind in PARTS.items()} == before
        assert same["teacher"] == [before["teacher"], False] and same["student"] == dry["teacher"] == [None, False]
        assert "model acme/tiny-student was not changed: expected README.md there as HLM wrote it" in refused
        assert "kept, as others wrote it: notes.md; --delete_others deletes it" in client.said
        assert "refused, as others edited it on the Hub: README.md; --overwrite_edited" in client.said
        (done,) = client.run(PUBLISH, json.dumps([arguments(home, *other, "--overwrite_edited")]))
        assert all(changed for _, changed in done.values())
        assert "notes.md" in hub.branch("datasets", "acme/tiny-dataset")[1]
        assert b"by hand" not in hub.content(hub.branch("models", "acme/tiny-student")[1]["README.md"])


def test_private_repositories_are_seen_with_a_token_alone(home, tmp_path):
    """On a Hub of its own, which large files reach by LFS."""
    with HubServer(tmp_path / "hub") as hub:
        hub.tokens["acme"] = TOKEN
        client, words = Client(hub, tmp_path / "owner"), arguments(home, "--private", "--name", "hidden")
        runs = [words, [*words, "--namespace", "guest"], arguments(home), arguments(home, "--private")]
        _, refused, _, exposed, equal = client.run(PUBLISH + OWN, json.dumps(runs), str(home), xet=False)
        assert all(hub.state.repos[kind, f"acme/hidden-{part}"].private for part, kind in PARTS.items())
        assert [found["private"] for found in hub.state.collections.values()] == [True, False]
        assert "guest/hidden-teacher could not be made ready" in refused and "a token that may write there" in refused
        assert "expected model acme/tiny-teacher to be private, found it public" in exposed
        weights = hub.branch("models", "acme/hidden-student")[1]["model.safetensors"]
        assert equal == 0.0 and weights.sha256 in hub.state.stored
        (refused,) = Client(hub, tmp_path / "stranger").run(OWN, "", str(home), user=None)
    assert "expected a folder or a Hub model at acme/hidden-student, found neither" in refused
    assert "HTTP 401" in refused and "hf auth login" in refused and TOKEN not in client.said


PULL_ONE = """
import json
from hlm.artefacts import HlmError
from hlm.publishing.publish import local_folder
try:
    print("RESULT", json.dumps(str(local_folder("acme/tiny-teacher"))))
except HlmError as error:
    print("RESULT", json.dumps(str(error)))
"""


@pytest.mark.parametrize("mode", ["lfs", "xet"])
@pytest.mark.parametrize("refused", [None, "README.md"])
def test_what_arrives_damaged_is_removed_and_the_next_pull_is_whole(hub, published, tmp_path, mode, refused):
    _, right = hub.branch("models", "acme/tiny-teacher")
    right = {name: hub.content(entry) for name, entry in right.items()}
    client = Client(hub, tmp_path)
    hub.restart_log()
    hub.faults = {"GET adapter_config.json": "corrupt"} | ({f"GET {refused}": "404"} if refused else {})
    (error,) = client.run(PULL_ONE, xet=mode == "xet")
    assert ("HTTP 404" if refused else "adapter_config.json as the Hub has it, found it damaged on arrival") in error
    assert refused or "run it again" in error
    assert "corrupt" in dict(hub.injected).values()
    hub.restart_log()
    (folder,) = client.run(PULL_ONE, xet=mode == "xet")
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == right and len(right) == 6
