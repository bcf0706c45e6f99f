"""What a recipe shows: bars on a terminal, lines of the log elsewhere, and nothing that a user can do nothing about."""

import ast
import contextlib
import logging
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

from hlm import progress as module
from hlm.progress import AboveBars, progress

ROOT = Path(__file__).resolve().parent.parent


def on_a_terminal(*command: str, **environment: str) -> str:
    """What a program writes on a terminal of 100 columns; it must end well."""
    ours, theirs = pty.openpty()
    window = f"stty rows 40 cols 100 < {os.ttyname(theirs)}"
    subprocess.run(window, shell=True, check=True)
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side was closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode()


COUNT = """
import logging, time
from hlm import progress
logging.basicConfig(level=logging.INFO, handlers=[progress.AboveBars()], format="%(message)s")
progress.SHOWN_AFTER_S = 0.01
with progress.progress(what="embed corpus", unit="text", total=3) as bar:
    for number in range(3):
        time.sleep(0.2)
        bar.update()
        logging.info("line %d", number)
for _ in progress.progress(range(2), what="quick", unit="row"):
    pass
print("end")
"""


def test_a_bar_on_a_terminal_has_a_unit_and_the_time_left_and_goes_away():
    written = on_a_terminal(sys.executable, "-c", COUNT)
    assert re.search(r"embed corpus:  67%\|.*\| 2/3 \[00:00<00:00, +\d+\.\d\d text/s\]", written)
    assert "quick" not in written  # done before a bar is worth showing
    lines = [re.sub(r".*\r(?=.)", "", line.rstrip("\r")).strip() for line in written.split("\n")]
    assert lines[:4] == ["line 0", "line 1", "line 2", "end"]  # each begins a line of its own, and no bar is left


def test_only_the_first_process_shows_a_bar():
    assert "embed corpus" not in on_a_terminal(sys.executable, "-c", COUNT, RANK="1")


def test_without_a_terminal_the_log_has_a_line_now_and_then(caplog, monkeypatch):
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(module, "shows_bars", lambda: False)
    with caplog.at_level(logging.INFO, logger="hlm.progress"):
        with progress(what="embed corpus", unit="text", total=4, initial=1) as bar:
            bar.update(2)
        assert list(progress(iter("ab"), what="check corpus", unit="row")) == ["a", "b"]
        list(progress([1], what="hidden", unit="row", shown=False))
    assert caplog.messages[:2] == ["embed corpus: 1 of 4 texts, ? left", "embed corpus: 3 of 4 texts, 00:00 left"]
    assert "check corpus: 2 rows in 00:00" in caplog.messages
    assert not any("hidden" in line for line in caplog.messages)


def test_the_library_has_no_other_bars():
    for path in [*(ROOT / "hlm").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "tqdm" for name in names):
                assert path.name == "progress.py" or "tqdm(" not in path.read_text(), path


def test_records_go_above_bars_into_the_stream(capsys):
    handler = AboveBars(sys.stderr)
    handler.emit(logging.LogRecord("hlm", logging.INFO, "", 0, "a line", None, None))
    assert capsys.readouterr().err == "a line\n"


FORK = """
import logging, os, threading
from hlm import progress
logging.basicConfig(level=logging.INFO, handlers=[progress.AboveBars()], format="%(message)s")
held, over = threading.Event(), threading.Event()
def hold():
    with progress.tqdm.get_lock():
        held.set()
        over.wait()
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    logging.info("from the worker")
    os._exit(0)
status = os.waitpid(child, 0)[1]
over.set()
raise SystemExit(status)
"""


def test_a_forked_worker_logs_without_the_lock_of_the_bars():
    process = subprocess.Popen(
        [sys.executable, "-c", FORK],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.communicate(timeout=60)[1] == b"from the worker\n" and process.returncode == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # where it hangs, its child hangs too


def test_training_shows_a_bar_its_loss_and_no_notes_of_other_libraries(tiny_bert, catalogue_200, tmp_path):
    # LoRA, evaluation and checkpoints: all that transformers, peft, accelerate and torch have something to say about.
    given = ["--backbone", tiny_bert, "--data", catalogue_200, "--output", str(tmp_path / "teacher")]
    given += "--lora_rank 4 --hard_negatives 1 --max_steps 4 --per_device_train_batch_size 16".split()
    given += "--eval_strategy steps --eval_steps 2 --save_steps 2 --logging_steps 2".split()
    given += "--load_best_model_at_end true --metric_for_best_model dev_ndcg@10 --dataloader_num_workers 1".split()
    written = on_a_terminal(sys.executable, str(ROOT / "recipes/teacher.py"), *given)
    assert re.search(r"train: .*\| 2/4 \[.* step/s\]", written)
    assert re.search(r"step 2 of 4: loss \d+\.\d+, learning rate \d", written)
    assert not re.findall(
        r"\S*Warning.*|\[transformers\].*|.*huggingface/tokenizers.*|\{'.*|.*shards.*|.*it/s.*", written
    )
    lines = [re.sub(r".*\r(?=.)", "", line.strip("\r ")) for line in written.split("\n")]
    ours = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING) (hlm\.[a-z_.]+|__main__): ")
    assert [line for line in lines if line.strip() and not ours.match(line) and "step/s" not in line] == []
