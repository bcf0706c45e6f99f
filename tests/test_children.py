"""A forked program is the program: its words, its variables, its streams, its end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import children
import pytest

ROOT = Path(__file__).resolve().parent.parent
TOLD = """
import json, os, sys
from huggingface_hub import constants
where = [path for path in sys.path if path.startswith((os.getcwd(), os.environ["PYTHONPATH"])) or not path]
print(json.dumps([sys.argv, where, os.getcwd(), os.getppid(), constants.ENDPOINT, sys.stdin.read(), __name__]))
print("aside", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("kind", ["code", "script", "module"])
@pytest.mark.parametrize("flags", [[], ["-P"]])
def test_it_is_told_what_a_new_process_is_told(tmp_path, kind, flags):
    (tmp_path / "told.py").write_text(TOLD)
    words = {"code": ["-c", TOLD], "script": ["told.py"], "module": ["-m", "told"]}[kind]
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "told.py").write_text(TOLD)
    for endpoint in ("http://one", "http://two"):
        variables = os.environ | {"HF_ENDPOINT": endpoint, "PYTHONPATH": str(beside)}
        given = {"input": "hello", "capture_output": True, "text": True, "cwd": tmp_path, "env": variables}
        found, wanted = (
            run([sys.executable, *flags, *words, "a", "b"], **given, check=False)
            for run in (children.run, subprocess.run)
        )
        assert (found.stdout, found.stderr, found.returncode) == (wanted.stdout, "aside\n", 3)
        assert json.loads(found.stdout)[3] == os.getpid() and endpoint in found.stdout


def test_it_has_the_libraries_and_not_hlm():
    code = "import sys; print('sentence_transformers' in sys.modules, any(name[:3] == 'hlm' for name in sys.modules))"
    assert children.run([sys.executable, "-c", code], capture_output=True).stdout == b"True False\n"
    code = "import os; print(len(os.listdir('/proc/self/task')), len(os.listdir('/proc/self/fd')))"
    assert children.run([sys.executable, "-c", code], capture_output=True).stdout == b"1 4\n"  # one lists the files


def test_it_ends_as_a_process_ends():
    for code, status in (("1 / 0", 1), ("raise KeyboardInterrupt", -signal.SIGINT), ("sys.exit('said')", 1)):
        done = children.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True, text=True)
        assert done.returncode == status and done.stderr
    with children.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"], stdout=-1) as one:
        assert one.stdout.readline() == b"1\n" and one.poll() is None
        one.send_signal(signal.SIGTERM)
        assert one.wait(30) == -signal.SIGTERM
    with pytest.raises(subprocess.TimeoutExpired):
        children.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.1)


def test_what_no_fork_can_be_is_a_new_process(tmp_path):
    code = "import sys; print('torch' in sys.modules, sys.flags.utf8_mode)"
    for words, more in ((["-c", code], {"env": os.environ | {"PYTHONUTF8": "1"}}), (["-X", "utf8", "-c", code], {})):
        done = children.run([sys.executable, *words], capture_output=True, text=True, **more)
        assert done.stdout == "False 1\n"


def test_what_a_launcher_starts_is_a_fork_of_it(tmp_path):
    (tmp_path / "worker.py").write_text(
        "import os, sys; open(os.environ['RANK'], 'w').write(str('datasets' in sys.modules)); sys.exit(len(sys.argv))"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "worker.py"]
    done = children.run(launch, cwd=tmp_path, forks=True, capture_output=True, text=True)
    assert done.returncode == 1 and "exitcode  : 1" in done.stderr
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == "True"
