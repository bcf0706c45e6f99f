"""`hlm doctor`: what this machine can run, and the remedy where it cannot."""

import importlib.util
import json

import pytest
from hub_server import HubServer
from huggingface_hub import constants

from hlm import cli, machine
from hlm.planning import doctor

NAMES = ["Python", "processor", "memory", "disk", "torch", "GPU", "engines", "FAISS", "extras", "Hub"]


def test_ten_checks_of_this_machine(monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.main(["doctor"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "->" not in line]
    assert [line.split()[1] for line in lines] == NAMES
    assert cli.main(["doctor", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in checks] == NAMES
    assert {check["name"] for check in checks if check["status"] != "ok"} <= {"memory", "GPU", "Hub"}
    assert f"{machine.cores()} cores" in checks[1]["text"]


def test_a_problem_ends_with_a_status(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HLM_CACHE", str(tmp_path / "file/cache"))
    assert cli.main(["doctor"]) == 2
    printed = capsys.readouterr()
    assert (
        "FIX   disk       HLM_CACHE cannot be written to\n                 -> set HLM_CACHE to a folder" in printed.out
    )
    assert "found problems with disk" in printed.err


def test_a_container_of_little_memory(monkeypatch):
    monkeypatch.setattr(machine, "memory_limit_mib", lambda: 1024.0)
    check = doctor._memory()
    assert check.status == "note" and "1.0 GiB available, a container's limit is 1.0" in check.text
    assert "the quickstart took 3.3 GiB" in check.remedy


def test_a_gpu_that_torch_does_not_use(monkeypatch, tmp_path):
    if doctor._gpu().status == "ok":
        pytest.skip("torch uses the GPU here")
    (tmp_path / "version").touch()
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path / "version")
    assert doctor._gpu().status == "problem"


def test_packages_that_are_not_installed(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: None if name in ("faiss", "torch") else there(name)
    )
    assert doctor._faiss().remedy == "pip install 'hlm[index]'"
    assert doctor._torch().status == doctor._gpu().status == "note"
    extras = doctor._extras()
    assert extras.status == "note" and "index lacks faiss; train lacks torch" in extras.text
    assert extras.remedy == "pip install 'hlm[index,train]'"


def test_two_builds_of_faiss(monkeypatch):
    found = {"faiss-cpu": "1.15.1", "faiss-gpu-cu12": "1.15.1"}
    monkeypatch.setattr(machine, "installed_versions", lambda packages: found)
    check = doctor._faiss()
    assert check.status == "problem" and check.remedy.startswith("pip uninstall faiss-cpu")


def test_what_the_hub_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer(tmp_path) as hub:
        user, token = next(iter(hub.tokens.items()))
        checks = [doctor.hub_answer(hub.url, given, "kept") for given in (token, None, "hf_wrong")]
    with HubServer(tmp_path) as gone:
        pass
    checks.append(doctor.hub_answer(gone.url, token, "kept"))
    assert [check.status for check in checks] == ["ok", "note", "problem", "note"]
    assert checks[0].text == f"logged in as {user}; kept" and "out of reach" in checks[3].text
    assert not any(secret in str(checks) for secret in (token, "hf_wrong"))
