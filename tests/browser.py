"""For the tests of the two demo pages: Chromium, and a run whose catalogue has ads that try to be more than text."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from hlm.artefacts import write_manifest
from hlm.data.contract import document_text, iterate, load
from hlm.encoders.loading import encode, load_encoder
from hlm.vectors.store import write_store

CHROMIUM = Path("/usr/bin/chromium")
AXE = Path(__file__).parent / "space/node_modules/axe-core/axe.min.js"
SCRIPT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
HOSTILE = {
    "script": {"title": f"red shoe {SCRIPT}", "text": "</li></ol><h1>mine</h1>", "brand": '"><b onclick=x>'},
    "template": {"title": "red shoe ${window.hacked = 1}", "text": "{{7*7}} {{{this}}} `", "brand": "&lt;b&gt;"},
    "bidi": {"title": "red shoe \u202egnp.exe\u2066", "text": "حذاء أحمر \u200fred", "brand": "\u202d\u0000x"},
    "huge": {"title": "red " + "W" * 100_000, "text": "shoe " * 50_000, "brand": "B" * 5_000},
}


def hostile_run(root: Path, encoder: str, online: Path, catalogue: str) -> dict[str, str]:
    """The catalogue with `HOSTILE` added, a teacher, `online` as its student with the same weights, and the stores."""
    shutil.copytree(catalogue, root / "data")
    with open(root / "data/corpus.jsonl", "a", encoding="utf-8") as file:
        for name, ad in HOSTILE.items():
            file.write(json.dumps({"_id": name, "price": 1234.5, **ad}) + "\n")
    shutil.copytree(encoder, root / "teacher")
    write_manifest(root / "teacher", "teacher", inputs={}, config={}, encoder="t" * 16, dim=32)
    shutil.copytree(online, root / "student")
    data, model = load(str(root / "data")), load_encoder(encoder, device="cpu")
    parts = {
        "corpus": [(row["_id"], document_text(row)) for row in iterate(data.corpus)],
        "queries": [(row["_id"], row["text"]) for row in iterate(data.queries)],
    }
    for part, records in parts.items():
        write_store(
            root / "vectors" / part,
            records,
            lambda texts: encode(model, texts, prompt_name="query"),
            dim=32,
            encoder="t" * 16,
            source=data.fingerprint(part),
            n_rows=len(records),
        )
    return {name: str(root / name) for name in ("teacher", "student", "data", "vectors")}


@contextlib.contextmanager
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.is_file():
        pytest.skip(f"no Chromium at {CHROMIUM}")
    names = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=str(CHROMIUM), args=[f"--{name}" for name in names.split()], timeout=120_000
        )
        yield browser
        browser.close()


@contextlib.contextmanager
def opening(browser, url: str, ready: str):
    """A function that opens the page and waits for `ready`; at the end nothing may have gone wrong in a console or left
    the machine."""
    wrong, contexts = [], []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(60_000)
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else wrong.append(r.url))
        page.goto(url, wait_until="commit")
        page.wait_for_selector(ready)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


# Gradio dims a result to a fifth while its event still runs, and fades it in: colours measured meanwhile are too faint.
SETTLED = """() => !document.querySelector('.pending') && document.getAnimations().every(animation =>
  animation.playState !== 'running' || animation.effect.getComputedTiming().iterations === Infinity)"""


def serious(page) -> list[str]:
    """What axe-core finds that keeps people out, once the page has come to rest."""
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: npm ci in tests/space")
    page.wait_for_function(SETTLED)
    page.evaluate(AXE.read_text())
    return [
        f"{rule['id']}: {node['html'][:200]}"
        for rule in page.evaluate("axe.run().then(r => r.violations)")
        for node in rule["nodes"]
        if rule["impact"] in ("serious", "critical")
    ]
