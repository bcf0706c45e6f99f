"""Chromium for the tests of the two demo pages, and ads that try to be more than text."""

import contextlib
from pathlib import Path

import pytest

CHROMIUM = Path("/usr/bin/chromium")
AXE = Path(__file__).parent / "space/node_modules/axe-core/axe.min.js"
SCRIPT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
HOSTILE = {
    "script": {"title": f"red shoe {SCRIPT}", "text": "</li></ol><h1>mine</h1>", "brand": '"><b onclick=x>'},
    "template": {"title": "red shoe ${window.hacked = 1}", "text": "{{7*7}} {{{this}}} `", "brand": "&lt;b&gt;"},
    "bidi": {"title": "red shoe \u202egnp.exe\u2066", "text": "حذاء أحمر \u200fred", "brand": "\u202d\u0000x"},
    "huge": {"title": "red " + "W" * 100_000, "text": "shoe " * 50_000, "brand": "B" * 5_000},
}


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


def serious(page) -> list[str]:
    """What axe-core finds that keeps people out."""
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: npm ci in tests/space")
    page.evaluate(AXE.read_text())
    return [
        f"{rule['id']}: {node['html'][:200]}"
        for rule in page.evaluate("axe.run().then(r => r.violations)")
        for node in rule["nodes"]
        if rule["impact"] in ("serious", "critical")
    ]
