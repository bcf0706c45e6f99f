"""The command `hlm`: what it prints and what it refuses, with one line and exit status 2."""

import json
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from hlm import __version__, canaries, cli
from hlm.artefacts import HlmError
from hlm.cli import main
from hlm.data import load
from hlm.encoders import encode, fingerprint, load_encoder, save_encoder
from hlm.index import AdIndex
from hlm.store import VectorStore, write_store


@pytest.fixture(scope="module")
def house(tmp_path_factory, tiny_bert):
    """A student that is its own teacher: what it finds for an ad's own text is that ad."""
    folder = tmp_path_factory.mktemp("cli")
    model = load_encoder(tiny_bert, device="cpu")
    teacher = fingerprint(model)
    save_encoder(model, folder / "student", "student", inputs={"teacher": teacher}, config={})
    save_encoder(model, folder / "stranger", "student", inputs={"teacher": "0123456789abcdef"}, config={})
    save_encoder(model, folder / "teacher", "teacher", inputs={}, config={})
    ads = {"a1": ("Red shoe", ""), "a2": ("", "steel kettle 1 litre"), "a3": ("Desk lamp", "black")}
    (folder / "data").mkdir()
    rows = [{"_id": name, "title": title, "text": text} for name, (title, text) in ads.items()]
    (folder / "data/corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data/queries.jsonl").write_text('{"_id": "q1", "text": "red shoe"}\n')
    records = [(row["_id"], row["title"] or row["text"]) for row in rows]
    source = load(str(folder / "data"), splits=()).fingerprint("corpus")
    write_store(
        folder / "vectors",
        records,
        lambda texts: encode(model, texts),
        dim=model.get_embedding_dimension(),
        encoder=teacher,
        source=source,
        n_rows=len(records),
    )
    canaries.keep(folder / "vectors", "vectors", canaries.made_by(model))
    AdIndex.build(VectorStore.open(folder / "vectors")).save(folder / "index")
    AdIndex.build(VectorStore.open(folder / "vectors"), dim=8).save(folder / "narrow")
    return folder


def refusal(capsys, *argv) -> str:
    assert main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == ""
    return line


@pytest.mark.parametrize("where", ["index", "vectors"])
def test_search_prints_rank_score_id_and_title(house, capsys, where):
    argv = ["search", "steel kettle 1 litre", "--student", str(house / "student"), f"--{where}", str(house / where)]
    assert main([*argv, "--corpus", str(house / "data"), "-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].split(maxsplit=3) == ["1", "1.0000", "a2", "steel kettle 1 litre"]  # no title: the text
    assert main(argv) == 0  # without a corpus: ids alone; more are asked for than there are
    ids = [line.split()[2:] for line in capsys.readouterr().out.splitlines()]
    assert ids[0] == ["a2"] and sorted(ids) == [["a1"], ["a2"], ["a3"]]


@pytest.mark.parametrize("where", ["index", "vectors"])
def test_verify_names_the_teacher(house, capsys, where):
    assert main(["verify", str(house / "student"), str(house / where)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ok: ") and VectorStore.open(house / "vectors").encoder in out
    assert "canaries: 12 of 12 queries" in out and "mean cosine 1.000" in out


def test_verify_says_where_there_are_no_canaries(house, tmp_path, capsys):
    shutil.copytree(house / "vectors", tmp_path / "vectors")
    manifest = json.loads((tmp_path / "vectors/hlm.json").read_text())
    del manifest["canaries"]
    (tmp_path / "vectors/hlm.json").write_text(json.dumps(manifest))
    assert main(["verify", str(house / "student"), str(tmp_path / "vectors")]) == 0
    assert "checked by fingerprint alone" in capsys.readouterr().out


@pytest.fixture
def hub(house, monkeypatch, tmp_path):
    """Two repositories; what is asked of them is kept."""
    shutil.copytree(house / "data", tmp_path / "ads")
    shutil.copytree(house / "index", tmp_path / "ads/index")
    shutil.copytree(house / "vectors", tmp_path / "ads/vectors/corpus")
    asked = []

    def local_folder(name, *, revision=None, repo_type="model", subfolder=None):
        asked.append((name, revision, repo_type, subfolder))
        folder = {"acme/student": house / "student", "acme/ads": tmp_path / "ads"}.get(name)
        if folder is None:
            raise HlmError(f"expected a folder or a Hub id at {name}, found neither")
        return folder / subfolder if subfolder else folder

    monkeypatch.setattr(cli, "local_folder", local_folder)
    return asked, tmp_path / "ads"


def test_hub_ids_stand_for_folders(hub, capsys):
    asked, ads = hub
    assert main(["verify", "acme/student@v1.0", "acme/ads@3f2a"]) == 0
    assert asked == [("acme/student", "v1.0", "model", None), ("acme/ads", "3f2a", "dataset", "index")]
    asked.clear()
    assert (
        main(["search", "steel kettle 1 litre", "--student", "acme/student", "--vectors", "acme/ads", "-k", "1"]) == 0
    )
    assert asked == [("acme/student", None, "model", None), ("acme/ads", None, "dataset", "vectors/corpus")]
    assert capsys.readouterr().out.splitlines()[-1].split() == ["1", "1.0000", "a2"]
    assert main(["verify", "acme/student", str(ads)]) == 0  # a dataset's folder: the index in it
    capsys.readouterr()
    assert "found neither" in refusal(capsys, "verify", "acme/student", "acme/none")


def test_a_missing_folder_is_named_and_not_looked_for_on_the_hub(house, capsys):
    for name in ("./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"):
        assert f"at {name}, found neither" in refusal(capsys, "verify", name, house / "index")
        assert f"at {name}, found neither" in refusal(capsys, "verify", house / "student", name)


def test_card_is_printed(house, tmp_path, capsys):
    assert main(["card", str(house / "student"), "--repo-id", "acme/student", "--licence", "mit"]) == 0
    card = ModelCard(capsys.readouterr().out)
    assert card.data.license == "mit" and card.data.library_name == "sentence-transformers"
    assert 'SentenceTransformer("acme/student")' in card.content and "Not measured" in card.content
    assert main(["card", str(house / "teacher")]) == 0
    assert ModelCard(capsys.readouterr().out).data.library_name == "peft"
    assert main(["card", str(house / "data"), "--student-repo", "acme/student", "--language", "en", "de"]) == 0
    out = capsys.readouterr().out
    assert "# data" in out and "text-retrieval" in out and "https://huggingface.co/acme/student" in out
    (tmp_path / "report.json").write_text("{")
    assert "report.json" in refusal(capsys, "card", house / "student", "--report", tmp_path / "report.json")
    assert "expected a folder" in refusal(capsys, "card", tmp_path / "none")
    assert "owner/name" in refusal(capsys, "card", house / "student", "--repo-id", "no id")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["plan", "search", "verify", "card"]),
        (["plan"], ["--config FOLDER", "--json", "--gpus"]),
        (["search"], ["query", "--student ID", "--index ID", "--vectors ID", "--corpus", "-k", "@revision"]),
        (["verify"], ["student", "target", "@revision"]),
        (["card"], ["folder", "--report FILE", "--latency FILE", "--repo-id ID", "--licence", "--base-model"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) and len(value) < 2 else "",
)
def test_help_names_what_there_is(command, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and out.startswith(" ".join(["usage: hlm", *command]))
    assert all(word in " ".join(out.split()) for word in words)


@pytest.mark.parametrize("where", ["index", "vectors"])
def test_another_teachers_student_is_refused(house, capsys, where):
    found = VectorStore.open(house / "vectors").encoder
    for argv in (
        ["verify", house / "stranger", house / where],
        ["search", "red shoe", "--student", house / "stranger", f"--{where}", house / where],
    ):
        line = refusal(capsys, *argv)
        assert "0123456789abcdef" in line and found in line


def test_what_does_not_fit_is_refused(house, tmp_path, capsys):
    assert "'student'" in refusal(capsys, "verify", house / "teacher", house / "index")  # a teacher is no student
    assert "found no hlm.json" in refusal(capsys, "verify", tmp_path, house / "index")
    assert "'vectors'" in refusal(capsys, "verify", house / "student", tmp_path)
    assert "found 'index'" in refusal(
        capsys, "search", "lamp", "--student", house / "student", "--vectors", house / "index"
    )
    assert "width 32 (the student's), found 8" in refusal(capsys, "verify", house / "student", house / "narrow")
    manifest = json.loads((house / "student/hlm.json").read_text())
    del manifest["inputs"]["teacher"]
    (tmp_path / "hlm.json").write_text(json.dumps(manifest))
    assert "whose student" in refusal(capsys, "verify", tmp_path, house / "index")


def test_bad_values_are_refused(house, tmp_path, capsys):
    common = ["--student", house / "student", "--vectors", house / "vectors"]
    assert "query: expected some text" in refusal(capsys, "search", "  ", *common)
    assert "-k: expected 1 or more, found 0" in refusal(capsys, "search", "lamp", *common, "-k", "0")
    (tmp_path / "corpus.jsonl").write_text('{"_id": "other", "title": "Bike", "text": ""}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "bike"}\n')
    assert "name the dataset that was embedded" in refusal(capsys, "search", "lamp", *common, "--corpus", tmp_path)


@pytest.mark.parametrize("argv", [[], ["plan"], ["search", "lamp", "--student", "x"], ["verify", "x"], ["card"]])
def test_usage_errors_end_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2 and "usage: hlm" in capsys.readouterr().err


def test_help_and_refusals_load_nothing_heavy():
    code = (
        "import sys; from hlm.cli import main; assert main(['verify', 'nowhere', 'nowhere']) == 2; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'faiss', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    shown = subprocess.run([sys.executable, "-m", "hlm.cli", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == f"hlm {__version__}"
