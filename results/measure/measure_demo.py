"""The demo as a visitor meets it: time to the first useful paint, a search in the browser, many clients at once.

    python results/measure/measure_demo.py --output results/demo.json --screenshot spaces/query_to_ad/screenshot.png

Starts spaces/query_to_ad/app.py itself, asks the first queries of its data; needs Chromium and the extra `test`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from hlm.artefacts import HlmError, write_json
from hlm.config import parse, run_recipe
from hlm.data.contract import load
from hlm.demo.comparison import DemoConfig, clean
from hlm.evaluation.report import command_line, environment
from hlm.machine import facts

APP = Path(__file__).resolve().parents[2] / "spaces/query_to_ad"
ARGS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
# From the click to the frame after the answer to this query is in the page.
SEARCH = """query => new Promise((done, fail) => {
  const start = performance.now();
  document.querySelector('#search-button').click();
  setTimeout(() => fail(new Error('no answer to ' + query)), 30000);
  const look = () => document.querySelector('.hlm[data-query]')?.dataset.query === query
    ? requestAnimationFrame(() => done(performance.now() - start)) : requestAnimationFrame(look);
  look();
})"""


@dataclass
class MeasureDemoConfig:
    settings: str = field(default=str(APP / "config.json"), metadata={"help": "what the demo shows"})
    output: str = field(default="results/demo.json", metadata={"help": "file for the figures"})
    screenshot: str | None = field(default=None, metadata={"help": "PNG of the page with its first ads"})
    chromium: str = field(default="/usr/bin/chromium", metadata={"help": "the browser"})
    starts: int = field(default=3, metadata={"help": "fresh starts of the app; each is reported"})
    repeats: int = field(default=50, metadata={"help": "searches in the browser"})
    clients: int = field(default=20, metadata={"help": "clients that search at once"})
    seconds: float = field(default=60.0, metadata={"help": "how long the clients ask"})


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(MeasureDemoConfig, argv=argv)
    from playwright.sync_api import sync_playwright

    queries = first_queries(DemoConfig.read(config.settings))
    if len(queries) < 2 or not Path(config.chromium).is_file():
        raise HlmError(f"expected two or more queries in the data and Chromium at {config.chromium}, found less")
    given = asdict(config) | {"settings": os.path.relpath(config.settings)}  # no path of this machine
    here = environment(command_line("results/measure/measure_demo.py", argv)) | facts()
    measured: dict[str, Any] = {"settings": given, "environment": here, "starts": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=config.chromium, args=[f"--{name}" for name in ARGS.split()]
        )
        for number in range(config.starts):
            app, page, start = started(browser, config.settings)
            try:
                measured["starts"].append(start)
                if config.screenshot and number == 0:
                    page.screenshot(path=config.screenshot)
                if number == config.starts - 1:
                    measured["search_in_browser_ms"] = in_browser(page, queries, config.repeats)
                    page.context.close()
                    measured["clients"] = many_clients(page.url, queries, config.clients, config.seconds)
            finally:
                app.terminate()
                app.wait()
        browser.close()
    write_json(config.output, measured)
    print({name: measured[name] for name in ("starts", "search_in_browser_ms", "clients")})


def first_queries(settings: DemoConfig) -> list[str]:
    """Six queries of the data, which a teacher that does not run has vectors of."""
    return [clean(text) for text in load(settings.data, splits=()).queries[:6]["text"]]


def started(browser: Any, settings: str) -> tuple[subprocess.Popen, Any, dict[str, float]]:
    """The app, its page, and the seconds from the start of its process to the search box and to the first ads."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
    page.set_default_timeout(120_000)
    begun = time.perf_counter()
    variables = {"GRADIO_SERVER_PORT": str(port), "HLM_SPACE_CONFIG": settings}
    app = subprocess.Popen([sys.executable, str(APP / "app.py")], env={**os.environ, **variables})
    while True:
        if app.poll() is not None:
            raise HlmError(f"the demo ended with status {app.returncode}; see what it printed above")
        with socket.socket() as door:
            if door.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.01)
    page.goto(f"http://127.0.0.1:{port}/", wait_until="commit")
    page.get_by_label("Query").wait_for()
    painted = time.perf_counter() - begun
    page.wait_for_selector(".hlm-columns li")
    return app, page, {"first_useful_paint_s": painted, "first_ads_s": time.perf_counter() - begun}


def in_browser(page: Any, queries: Sequence[str], repeats: int) -> dict[str, float]:
    """From the click to the painted ads, every query another than the one before; the first three do not count."""
    times = []
    for _, query in zip(range(repeats + 3), cycle([*queries[1:], queries[0]]), strict=False):
        page.get_by_label("Query").fill(query)
        times.append(page.evaluate(SEARCH, query))
    return summary(times[3:])


def many_clients(url: str, queries: Sequence[str], count: int, seconds: float) -> dict[str, Any]:
    """`count` clients of the API that ask one query after the other, all in threads of this process."""
    from gradio_client import Client

    clients = [Client(url, verbose=False) for _ in range(count)]
    times: list[float] = []
    errors: list[str] = []
    end = time.perf_counter() + seconds

    def ask(client: Client, first: int) -> None:
        for query in cycle([*queries[first:], *queries[:first]]):
            begun = time.perf_counter()
            if begun > end:
                return
            try:
                found = client.predict(query, 10, api_name="/search")
                if len(found["student"]["hits"]) != 10:
                    errors.append(f"{query}: {len(found['student']['hits'])} ads")
            except Exception as error:  # whatever it is, it is what is counted here
                errors.append(f"{type(error).__name__}: {error}")
            times.append((time.perf_counter() - begun) * 1e3)

    threads = [threading.Thread(target=ask, args=(client, n % len(queries))) for n, client in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"clients": count, "seconds": seconds, "errors": len(errors), "first_errors": errors[:3]} | summary(times)


def summary(times: Sequence[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(times, [50, 95, 99])
    return {"p50": p50, "p95": p95, "p99": p99, "samples": len(times)}


if __name__ == "__main__":
    run_recipe(main)
