"""How recipes end where the machine or the user stops them: run for real, on full disks, closed pipes and Ctrl-C."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import children
import pytest

from hlm.artefacts import HlmError
from hlm.endings import ending

ROOT = Path(__file__).resolve().parent.parent


def run(body: str, start=children.Popen, **more) -> subprocess.Popen:
    """A recipe whose main is `body`."""
    code = "import os, sys, time, torch\nfrom hlm.artefacts import HlmError\nfrom hlm.config import run_recipe\n"
    code += "def main():\n" + "".join(f"    {line}\n" for line in body.splitlines()) + "run_recipe(main)\n"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "TORCHEL"))}
    environment |= {"PYTHONPATH": str(ROOT)} | more.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    return start([sys.executable, "-c", code], env=environment, text=True, **pipes)


def small_files():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


REFUSED = [
    ("with open('/dev/full', 'w') as file: file.write('x')", "No space left on device"),
    ("open('a', 'wb').write(bytes(9999))", "File too large"),
    ("from safetensors.torch import save_file; save_file({'a': torch.zeros(9999)}, 'a')", "File too large"),
    ("torch.save(torch.zeros(9999), 'a')", "most often because the disk is full"),
    ("import pyarrow.parquet as q, pyarrow as a; q.write_table(a.table({'a': list(range(9999))}), 'a')", "File too la"),
    ("raise PermissionError(13, 'Permission denied', '/data/x')", "Permission denied at /data/x; give this user"),
    ("raise OSError(30, 'Read-only file system', '/data/x')", "Read-only file system at /data/x; name a folder"),
    ("raise OSError(122, 'Disk quota exceeded')", "free some of your quota"),
    ("raise RuntimeError('a library gave up') from OSError(28, 'No space left', '/data/x')", "at /data/x; free some"),
]


def test_what_the_machine_refuses_is_one_line_and_status_2(tmp_path):
    (tmp_path / "bodies.json").write_text(json.dumps([body for body, _ in REFUSED]))
    body = "import json\nfor number, body in enumerate(json.load(open('bodies.json'))):\n"
    body += "    try: run_recipe(lambda: exec(body, {'torch': torch}))\n"
    body += "    except SystemExit as stop: print('status', stop.code, file=sys.stderr, flush=True)"
    process = run(body, cwd=tmp_path, preexec_fn=small_files)
    lines = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 0 and len(lines) == 2 * len(REFUSED), lines
    for told, status, (_, remedy) in zip(lines[::2], lines[1::2], REFUSED, strict=True):
        assert told.startswith("error: ") and remedy in told and status == "status 2"


def test_a_fault_of_the_program_keeps_its_traceback():
    process = run("raise KeyError('x')")
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" in told and told.splitlines()[-1] == "KeyError: 'x'"


def test_an_error_in_a_loader_worker_is_that_error_alone():
    body = "class Bad(torch.utils.data.Dataset):\n    def __len__(self): return 1\n"
    body += "    def __getitem__(self, row): raise HlmError('expected this, found that')\n"
    body += "list(torch.utils.data.DataLoader(Bad(), num_workers=1, multiprocessing_context='fork'))"
    process = run(body)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2 and told.splitlines()[-1] == "error: expected this, found that"


def test_ctrl_c_ends_with_130_and_one_line():
    process = run("print('ready', flush=True)\ntime.sleep(60)")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130 and told.startswith("interrupted: ") and len(told.splitlines()) == 1


def test_a_closed_pipe_ends_in_silence_with_141():
    process = run("for number in range(10**6): print(number)")
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.wait(timeout=120) == 141 and process.stderr.read() == ""
    process = run("sys.stdin.readline()\nprint('late')", stdin=subprocess.PIPE)  # only the flush at the end meets it
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(timeout=120) == 141 and process.stderr.read() == ""


def test_another_pipe_that_breaks_is_no_silent_end():
    process = run("read, write = os.pipe()\nos.close(read)\nos.write(write, b'x')")
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1 and "BrokenPipeError" in told


def test_a_terminal_that_is_not_utf8_gets_every_line():
    process = run("print('Café ☕')\nprint('end')", env={"PYTHONIOENCODING": "latin-1"}, encoding="latin-1")
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and told.splitlines()[-1] == "end" and "\\u2615" in told


def test_nothing_of_other_libraries_is_shown(tiny_bert):
    process = run(f"from hlm.encoders.loading import load_encoder\nload_encoder({tiny_bert!r})", subprocess.Popen)
    told = "".join(process.communicate(timeout=120))
    assert process.returncode == 0 and told == ""


@pytest.mark.parametrize("quiet", [True, False])
def test_accelerate_launch_shows_the_error(tmp_path, quiet):
    words = [
        "-m",
        "accelerate.commands.launch",
        *(["--quiet"] if quiet else []),
        "--config_file",
        str(ROOT / "recipes/configs/accelerate/single.yaml"),
        "recipes/align.py",
        "--student",
        "x",
    ]
    done = children.run(
        [sys.executable, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        forks=True,
    )
    lines = done.stderr.splitlines()
    assert done.returncode != 0 and lines[0].startswith("error: missing required settings: data"), done.stderr
    assert "--quiet" in lines[1] and (len(lines) == 2) == quiet


def test_torchrun_shows_the_error_last():
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "recipes/align.py"]
    done = children.run(
        [sys.executable, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        forks=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.strip("= -")]
    assert "error: missing required settings: " in lines[-1], done.stderr[-1500:]


def test_the_number_of_the_systems_error_is_found_wherever_a_library_puts_it():
    for text in ("I/O error: (os error 28)", "[Errno 28] failed", "write failed: No space left on device"):
        status, line = ending(RuntimeError(text))
        assert status == 2 and "free some space" in line
    assert ending(RuntimeError("(os error 2)")) is None and ending(FileNotFoundError(errno.ENOENT, "x")) is None
    assert ending(HlmError("a\n  b")) == (2, "error: a b")
    assert json.dumps(ending(KeyboardInterrupt()))
