"""The command `hlm`: what it prints and what it refuses, with one line and exit status 2."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata

import pytest
from huggingface_hub import ModelCard

from hlm import __version__, cli
from hlm.artefacts import HlmError
from hlm.cli import main
from hlm.data.contract import load
from hlm.encoders.loading import encode, fingerprint, load_encoder, save_encoder
from hlm.indexes.faiss_index import AdIndex
from hlm.serving import student_files
from hlm.vectors import canaries
from hlm.vectors.store import VectorStore, write_store


@pytest.fixture(scope="module")
def house(tmp_path_factory, tiny_bert):
    """A student that is its own teacher: what it finds for an ad's own text is that ad. It has no ONNX files."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HLM_CACHE", str(folder / "cache"))
        furnish(folder, tiny_bert)
        yield folder


def furnish(folder, tiny_bert):
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

    def local_folder(name, *, revision=None, repo_type="model", subfolder=None, patterns=None):
        if (name, revision, repo_type, subfolder) not in asked:
            asked.append((name, revision, repo_type, subfolder))
        folder = {"acme/student": house / "student", "acme/ads": tmp_path / "ads"}.get(name)
        if folder is None:
            raise HlmError(f"expected a folder or a Hub id at {name}, found neither")
        return folder / subfolder if subfolder else folder

    monkeypatch.setattr(cli, "local_folder", local_folder)
    monkeypatch.setattr(student_files, "local_folder", local_folder)
    return asked, tmp_path / "ads"


def test_hub_ids_stand_for_folders(hub, capsys):
    asked, ads = hub
    assert main(["verify", "acme/student@v1.0", "acme/ads@3f2a"]) == 0
    assert asked == [("acme/student", "v1.0", "model", None), ("acme/ads", "3f2a", "dataset", "index")]
    asked.clear()
    assert (
        main(["search", "steel kettle 1 litre", "--student", "acme/student", "--vectors", "acme/ads", "-k", "1"]) == 0
    )
    catalogue = ("acme/ads", None, "dataset", "vectors/corpus")
    weights = ("acme/student", "student", "model", None)  # of the commit that the pulled folder is named by
    assert asked == [("acme/student", None, "model", None), catalogue, weights]
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


def ran(*argv, stdout=subprocess.PIPE, env=None):
    # Unbuffered, argparse keeps to itself that it could not write.
    env = {name: value for name, value in (os.environ | (env or {})).items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "hlm.cli", *(word if isinstance(word, bytes) else str(word) for word in argv)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=env, check=False)


def search_argv(house, data="data"):
    return ["search", "red shoe", "--student", house / "student", "--index", house / "index", "--corpus", data]


@pytest.fixture
def odd_ads(tmp_path):
    """The ads of the index with titles that would move the cursor, set colours, turn the reading direction or end the
    line, and one in letters that Latin-1 has not."""
    titles = {
        "a1": "\x1b[31mRed\x1b[0m\x07 sh\u202eoe\r\nerror: x\u2028y",
        "a2": "k\u0151 ketl\u2615",
        "a3": "می\u200cخواهم\x9b2J",
    }
    rows = [json.dumps({"_id": name, "title": title, "text": ""}) for name, title in titles.items()]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "red shoe"}\n')
    return tmp_path


def test_control_characters_of_ads_never_reach_the_terminal(house, odd_ads, capsys):
    assert main([str(word) for word in search_argv(house, odd_ads)]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(out.split("\n")) - 1 == 3  # one line an ad, whatever a line's end is taken for
    assert not [c for c in out if (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c != "\n") or c in "\u202e"]
    assert "\\x1b[31mRed\\x1b[0m\\x07 sh\\u202eoe  error: x y" in out
    assert "می\u200cخواهم\\x9b2J" in out and "k\u0151 ketl\u2615" in out  # spelling is kept


def test_control_characters_of_manifests_never_reach_the_terminal(house, tmp_path, capsys):
    shutil.copytree(house / "student", tmp_path / "student")
    manifest = json.loads((tmp_path / "student/hlm.json").read_text())
    manifest["inputs"]["teacher"] = "\x1b]0;owned\x07\u202e"
    (tmp_path / "student/hlm.json").write_text(json.dumps(manifest))
    line = refusal(capsys, "verify", tmp_path / "student", house / "index")
    assert "\\x1b]0;owned\\x07\\u202e" in line and "\x1b" not in line


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_a_terminal_of_another_encoding_shows_every_ad(house, odd_ads, encoding):
    found = ran(*search_argv(house, odd_ads), env={"PYTHONIOENCODING": encoding})
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 3
    assert ("ketl\u2615" if encoding == "utf-8" else "ketl\\u2615") in found.stdout.decode(encoding)


def test_a_query_of_broken_bytes_is_refused(house):
    argv = search_argv(house, house / "data")
    found = ran(argv[0], b"red \xff shoe", *argv[2:])
    assert found.returncode == 2 and b"expected text in UTF-8" in found.stderr and b"Traceback" not in found.stderr
    found = ran(*argv[:5], b"/nowhere/\xff\x1b[31m")
    assert found.returncode == 2 and b"found neither" in found.stderr and b"\x1b" not in found.stderr


@pytest.mark.parametrize(("command", "status"), [("card", 141), ("--help", 141), ("verify", 2)])
def test_a_closed_pipe_ends_the_command_quietly(house, command, status):
    argv = [command, *{"card": [house / "student"], "verify": ["nowhere", "nowhere"]}.get(command, [])]
    reader, writer = os.pipe()
    os.close(reader)
    found = ran(*argv, stdout=writer)
    os.close(writer)
    assert found.returncode == status
    assert found.stderr.startswith(b"error: ") if status == 2 else found.stderr == b""


@pytest.mark.parametrize("command", ["card", "--help"])
def test_a_full_disk_is_one_line(house, command):
    with open("/dev/full", "w") as full:
        found = ran(command, *([house / "student"] if command == "card" else []), stdout=full)
    (line,) = found.stderr.decode().splitlines()
    assert found.returncode == 1 and line.startswith("error: the system says: No space left on device")


def test_a_cache_that_cannot_be_written_is_one_line(house, tmp_path):
    (tmp_path / "file").write_text("in the way")
    found = ran(*search_argv(house, house / "data"), env={"HLM_CACHE": str(tmp_path / "file/cache")})
    (line,) = [line for line in found.stderr.decode().splitlines() if "oading" not in line]
    assert (found.returncode, found.stdout) == (2, b"") and line.startswith("error: ") and "HLM_CACHE" in line, line


def test_ctrl_c_ends_with_130(house, monkeypatch, capsys):
    monkeypatch.setattr(cli, "read_student", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["verify", str(house / "student"), str(house / "index")]) == 130
    assert capsys.readouterr() == ("", "")


HEAVY = {"torch", "transformers", "sentence_transformers", "datasets", "faiss", "pyarrow", "onnxruntime", "numpy"}


@pytest.mark.parametrize(
    ("code", "loads"),
    [
        ("import hlm", set()),
        ("from hlm.cli import main; assert main(['verify', 'nowhere', 'nowhere']) == 2", set()),
        ("from hlm.cli import main; main(['--help'])", set()),
        ("import hlm; hlm.QueryEncoder.from_pretrained(sys.argv[1])", {"numpy", "onnxruntime"}),
        (
            "from hlm.cli import main; assert main(['search', 'red shoe', '--student', *sys.argv[1:4], '--corpus', "
            "sys.argv[4]]) == 0",
            {"numpy", "onnxruntime", "faiss", "pyarrow"},
        ),
    ],
    ids=["import", "refusal", "help", "from_pretrained", "search"],
)
def test_what_is_not_needed_is_not_loaded(house, capsys, code, loads):
    argv = [str(house / "student"), "--index", str(house / "index"), str(house / "data")]
    assert main(["search", "red shoe", "--student", *argv[:3]]) == 0  # exported, once
    code = f"import sys, atexit; atexit.register(lambda: print('loaded:', *{HEAVY} & set(sys.modules))); {code}"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    assert set(done.stdout.splitlines()[-1].split()[1:]) == loads, done.stdout


def test_version():
    shown = subprocess.run([sys.executable, "-m", "hlm.cli", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == f"hlm {__version__}"
