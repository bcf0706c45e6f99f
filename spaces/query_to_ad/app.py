"""Type a query, see the ads that teacher and student find, how far they agree and what each costs.

    python spaces/query_to_ad/app.py                        # config.json beside this file, or HLM_SPACE_CONFIG

The page comes up at once; models and catalogue are loaded behind it.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

# While it is imported Gradio parses the source of each of its classes to write type stubs: half of the page's start. A
# class that lies in no file is left out.
_getfile = inspect.getfile


def _no_gradio_file(thing: Any) -> str:
    if getattr(thing, "__module__", "").startswith("gradio."):
        raise OSError("not asked for")
    return _getfile(thing)


inspect.getfile = _no_gradio_file
try:
    import gradio as gr
finally:
    inspect.getfile = _getfile

from starlette.middleware import Middleware  # noqa: E402

from hlm.artefacts import HlmError  # noqa: E402
from hlm.demo import page as demo_page  # noqa: E402
from hlm.demo import plots as demo_plots  # noqa: E402
from hlm.demo.comparison import MAX_K, MAX_TYPED, Demo, DemoConfig, load_demo  # noqa: E402
from hlm.demo.limits import Limits  # noqa: E402
from hlm.demo.page import failure, notice, results, table  # noqa: E402

logger = logging.getLogger(__name__)

INTRO = """# Query to ad: teacher and student

A large **teacher** encoded the ads once, offline. A small **student** encodes your query and searches the teacher's own
index. """
LIVE = "Both answer here, side by side, timed as you ask."
STORED = "The student answers here, timed as you ask; the teacher's answers come from vectors that it stored."
THEME = gr.themes.Base(
    primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800")
PAINT_S = 0.8  # given to the first visitor's page before loading begins
ONE_AT_A_TIME = {"concurrency_limit": 2, "concurrency_id": "models"}  # more would only slow each other on two cores


def build(config: DemoConfig, loading: Future[Demo]) -> gr.Blocks:
    """The page, its API endpoint and MCP tool `search`; they wait for `loading`."""

    def search(query: str, k: int = 10, index: str = "") -> dict[str, Any]:
        """Finds the ads for a shopper's query with the teacher and with the student, and compares the two.

        Args:
            query: what a shopper types, for example "wool baby blanket".
            k: how many ads, 1 to 50.
            index: which of the indexes to search; empty: the first.

        Returns:
            The ads of "teacher" and "student" with ranks, scores and matched words, the milliseconds each took, how
            many ads both found ("overlap") and the teacher's time over the student's ("ratio").
        """
        try:
            return dict(loading.result().compare(query, k, index or None))
        except HlmError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def show(query: str, k: int, index: str) -> str:
        try:
            return results(loading.result().compare(query, k, index or None))
        except Exception as error:
            logger.exception("search failed")
            return failure(error)

    def first_query(typed: str) -> str:
        return typed or (loading.result().examples[1][0] if loading.exception() is None else "")

    with gr.Blocks(title="Query to ad: teacher and student", analytics_enabled=False) as page:
        gr.Markdown(INTRO + (LIVE if config.teacher else STORED))
        noted = gr.HTML(padding=False)
        with gr.Tab("Search"):
            with gr.Row(equal_height=True):
                query = gr.Textbox(
                    label="Query", placeholder="What would a shopper type?", scale=5, max_length=MAX_TYPED
                )
                go = gr.Button("Search", elem_id="search-button", variant="primary", scale=1, min_width=110)
            examples = gr.Dataset(components=[query], samples=[], samples_per_page=20, label="Examples")
            with gr.Accordion("Settings", open=False):
                k = gr.Slider(1, MAX_K, value=10, step=1, label="Ads from each (k)")
                choices = [("as saved", "")] if config.index else [(name, name) for name in config.factories]
                index = gr.Dropdown(choices, value=choices[0][1], label="Index")
            found = gr.HTML('<div class="hlm"><p class="hlm-note" role="status">Loading the models …</p></div>')
        with gr.Tab("Quality"):
            quality, latency = gr.HTML(), gr.HTML()
        with gr.Tab("Details"):
            shown = gr.HTML()

        asks = {"fn": show, "inputs": [query, k, index], "outputs": found, "api_visibility": "private", **ONE_AT_A_TIME}
        for event in (go.click, query.submit, k.release, index.input):
            event(**asks)
        private = {"api_visibility": "private"}
        examples.click(lambda row: row[0], examples, query, **private).then(**asks)
        begun = page.load(lambda: opening(loading), None, [examples, noted, shown], **private)
        begun.then(first_query, query, query, **private).then(**asks)
        page.load(lambda: charts(config), None, [quality, latency], **private)
        gr.api(search, api_name="search", **ONE_AT_A_TIME)
    return page.queue(max_size=256)


def opening(loading: Future[Demo]) -> tuple[gr.Dataset, str, str]:
    """The examples, the notice and the table of facts, once all is loaded; or why it was not."""
    try:
        demo = loading.result()
    except Exception as error:
        return gr.Dataset(visible=False), "", failure(error)
    label, queries = demo.examples
    return gr.Dataset(samples=[[text] for text in queries], label=label), notice(demo.synthetic), table(demo.facts)


def charts(config: DemoConfig) -> tuple[str, str]:
    """Quality and latency of the run, as HTML."""
    drawn = []
    for draw, name in ((demo_plots.quality_charts, "report"), (demo_plots.latency_charts, "latency")):
        try:
            drawn.append(draw(config.read_report(name)))
        except Exception as error:  # a file of another version; the rest of the page does not depend on it
            logger.exception("%s is not drawn", name)
            drawn.append(failure(error))
    return drawn[0], drawn[1]


def launch(config: DemoConfig, **options: Any) -> gr.Blocks:
    """Serves the page, then loads what it shows; `options` go to Gradio's `launch`."""
    loading: Future[Demo] = Future()

    def load() -> None:
        try:
            loading.set_result(load_demo(config))
        except Exception as error:
            logger.exception("the demo did not load")
            loading.set_exception(error)

    page = build(config, loading)
    page.launch(
        theme=THEME,
        css=demo_page.CSS + demo_plots.CSS,
        mcp_server=True,
        ssr_mode=False,
        footer_links=["api"],
        prevent_thread_lock=True,
        run_history=False,
        app_kwargs={"middleware": [Middleware(Limits)]},
        **options,
    )
    loader = threading.Timer(PAINT_S, load)  # imports of models would hold the interpreter while the page is served
    loader.daemon = True
    loader.start()
    return page


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    settings = os.environ.get("HLM_SPACE_CONFIG") or Path(__file__).with_name("config.json")
    launch(DemoConfig.read(settings)).block_thread()
