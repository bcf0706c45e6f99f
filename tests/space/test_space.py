"""The demo: what is compared, strangers' text in ads and queries, the API, the MCP tool, and the page in Chromium."""

import asyncio
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from browser import HOSTILE, SCRIPT, hostile_run, opening, serious

from hlm.artefacts import HlmError
from hlm.data.contract import iterate, load
from hlm.demo.comparison import Demo, DemoConfig, load_demo
from hlm.demo.page import failure, results, table
from hlm.demo.plots import latency_charts, quality_charts
from hlm.indexes.faiss_index import AdIndex
from hlm.vectors.store import VectorStore

gradio = pytest.importorskip("gradio", reason="the demo needs the extra 'space'")


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config(tiny_bert, online_bert, catalogue_200, tmp_path_factory) -> DemoConfig:
    """A teacher, a student with the same weights, and a catalogue with hostile ads among others."""
    root = tmp_path_factory.mktemp("demo")
    run = hostile_run(root, tiny_bert, online_bert, catalogue_200)
    AdIndex.build(VectorStore.open(root / "vectors/corpus")).save(root / "index")
    for name, result in (("report", "quickstart"), ("latency", "latency-quickstart")):
        measured = json.loads((ROOT / f"results/{result}.json").read_text())
        (root / f"{name}.json").write_text(json.dumps(measured.get(name, measured)))
        run[name] = str(root / f"{name}.json")
    student = [str(root / "absent"), run["student"]]
    return DemoConfig(**run | {"student": student}, factories=["Flat", "HNSW8"], examples=["red shoe", "steel bottle"])


@pytest.fixture(scope="module")
def demo(config) -> Demo:
    return load_demo(config)


def test_both_encoders_are_compared_on_one_index(demo):
    found = demo.compare("red shoe", 7)
    assert found["overlap"] == 7 and set(found["ratio"]) == {"encode", "total"}  # the same weights: the same ads
    for side in (found["teacher"], found["student"]):
        assert [hit["rank"] for hit in side["hits"]] == [hit["other_rank"] for hit in side["hits"]] == list(range(1, 8))
        assert side["total_ms"] == pytest.approx(side["encode_ms"] + side["search_ms"])
    assert demo.compare("red shoe", 7, "HNSW8")["index"] == "HNSW8"
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("query", ["", "  \n\t ", "\u202e\u0000", None])
def test_an_empty_query_gets_a_message_and_no_search(demo, query):
    found = demo.compare(query)
    assert found["student"] is None and "Type a query" in results(found)


@pytest.mark.parametrize("query", ["w" * 10_000, "красная обувь 靴 🎒", "\ud800 shoe", SCRIPT, "${1} {{1}}", "🎒"])
def test_unusual_queries_are_answered(demo, query):
    found = demo.compare(query)
    assert len(found["student"]["hits"]) == 10
    assert ("first 1,000 char" in found["message"]) == (len(query) == 10_000) and len(found["query"]) <= 1000
    results(found).encode()


@pytest.mark.parametrize("k", [0, 51, 2.5, True, "5", float("nan")])
def test_k_is_checked(demo, k):
    with pytest.raises(HlmError, match="k: expected a whole number from 1 to 50"):
        demo.compare("red shoe", k)


def test_an_unknown_index_names_those_there_are(demo):
    with pytest.raises(HlmError, match="expected one of Flat, HNSW8, found 'IVF'"):
        demo.compare("red shoe", 5, "IVF")


def hostile_page(demo) -> str:
    hits = demo._hits([(name, 0.5) for name in HOSTILE], {}, f"red shoe {SCRIPT}")
    side = {"hits": hits, "encode_ms": 1.0, "search_ms": 1.0, "total_ms": 2.0}
    found = {"query": "", "k": 4, "index": "Flat", "message": SCRIPT, "overlap": 4, "ratio": None}
    return results({**found, "teacher": side, "student": side})


def test_what_strangers_wrote_is_text(demo):
    page = hostile_page(demo)
    tags = set(re.findall(r"<\s*/?([a-zA-Z0-9]+)", page))
    assert tags == {"div", "p", "section", "h2", "ol", "li", "span", "h3", "bdi", "mark", "b"}
    assert "&lt;<mark>" in page or "&lt;script" in page
    assert page.count("<li>") == 8 and not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\x00]", page)
    assert len(page) < 20_000
    for text in (failure(HlmError(SCRIPT)), failure(RuntimeError(SCRIPT)), table([(SCRIPT, SCRIPT)])):
        assert "<script" not in text and "<img" not in text
    assert SCRIPT not in failure(RuntimeError("secret")) and "secret" not in failure(RuntimeError("secret"))


def test_charts_say_what_is_undefined_and_what_is_absent(config):
    report = config.read_report("report")
    kept = report["recovery_by_system"]
    kept["pruned"]["ndcg@10"] = {"value": None, "ci95": None, "reason": f"the teacher scores 0 {SCRIPT}"}
    kept["aligned"]["ndcg@10"] |= {"ci95": None, "reason": "too few queries"}
    page = quality_charts(report)
    assert "<b>undefined</b>" in page and "no interval" in page and "aligned: too few queries" in page
    assert "<script" not in page and page.count("hlm-dot") == 3
    latency = config.read_report("latency")
    latency["systems"]["teacher"]["latency_ms"]["all"]["over"] = "all"
    assert "took part of the processor" in latency_charts(latency)
    absent = dataclasses.replace(config, report="./nowhere/report.json", latency=None)
    assert "No report.json" in quality_charts(absent.read_report("report"))
    assert "No latency.json" in latency_charts(absent.read_report("latency"))


def test_without_a_teacher_its_stored_vectors_answer(config):
    demo = load_demo(dataclasses.replace(config, teacher=None))
    known = next(iter(iterate(load(config.data).queries)))["text"]
    found = demo.compare(known.upper())
    assert found["overlap"] == 10 and found["teacher"]["encode_ms"] is None and found["ratio"] is None
    assert "vector read, not timed" in results(found)
    found = demo.compare("no such query in the data")
    assert found["teacher"] is None and "does not run here" in found["message"] and len(found["student"]["hits"]) == 10


def test_a_saved_index_and_one_of_another_teacher(config, tmp_path):
    where = str(Path(config.vectors).parent / "index")
    assert load_demo(dataclasses.replace(config, index=where)).names == ["Flat, as saved"]
    other = tmp_path / "student"
    shutil.copytree(config.student[1], other)
    manifest = json.loads((other / "hlm.json").read_text())
    manifest["inputs"]["teacher"] = "u" * 16
    (other / "hlm.json").write_text(json.dumps(manifest))
    for index in (where, None):
        with pytest.raises(HlmError, match="u{16}.*t{16}"):
            load_demo(dataclasses.replace(config, student=str(other), index=index))


def load_app(path="spaces/query_to_ad/app.py"):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    app = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    return app


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """Where Gradio keeps what it is sent."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def url(config, kept):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(kept))
        page = load_app().launch(config, server_name="127.0.0.1", server_port=None, quiet=True)
        yield page.local_url
        page.close()


def test_the_endpoint(url):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(url, verbose=False)
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert list(endpoints) == ["/search"]
    assert [p["python_type"]["type"] for p in endpoints["/search"]["parameters"]] == ["str", "int", "str"]
    found = client.predict("red shoe", 5, api_name="/search")
    assert found["overlap"] == 5 and len(found["student"]["hits"]) == 5
    assert "Type a query" in client.predict("", api_name="/search")["message"]
    with pytest.raises(AppError, match="k: expected a whole number"):
        client.predict("red shoe", 500, api_name="/search")


FILE = {"path": "https://example.org/large.bin", "meta": {"_type": "gradio.FileData"}}


REFUSED = {
    "upload": ("upload", {"files": {"files": ("a.bin", b"x" * 10)}}, 415),
    "many": ("upload", {"files": [("files", (f"{n}.bin", b"x")) for n in range(50)]}, 415),
    "recording": ("process_recording", {"files": {"video": ("a.mp4", b"x")}}, 415),
    "long": ("call/search", {"json": {"data": ["w" * 100_000, 10, ""]}}, 413),
    "chunked": ("call/search", {"data": iter([b"[" * 50_000, b"[" * 50_000])}, 413),
    "address": ("call/search", {"json": {"data": [FILE, 10, ""]}}, 415),
    "address among others": ("queue/join", {"json": {"data": [[{"a": FILE}]], "fn_index": 0}}, 415),
    "address behind a trap": ("call/search", {"json": {"a": FILE | {"meta": 1}, "data": [FILE, 10, ""]}}, 400),
    "address behind a pit": ("call/search", {"data": b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}"}, 400),
    "address escaped": ("call/search", {"data": json.dumps({"data": [FILE]}).replace("gradio", "\\u0067radio")}, 415),
    "mcp": ("mcp/", {"json": {"method": "tools/call", "params": {"arguments": {"query": FILE}}}}, 415),
    "form": ("call/search", {"data": {"data": "x"}}, 400),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_and_long_bodies_are_refused_and_nothing_is_kept(url, kept, case):
    import requests

    path, options, status = REFUSED[case]
    answer = requests.post(f"{url}gradio_api/{path}", timeout=60, **options)
    assert answer.status_code == status, answer.text
    assert [path for path in kept.rglob("*") if path.is_file()] == []


def test_a_pages_state_is_not_saved(url, kept):
    import requests

    joined = {"data": ["red shoe", 5, ""], "session_hash": "abc"}
    assert requests.post(f"{url}gradio_api/run/search", json=joined, timeout=60).status_code == 200
    assert requests.get(f"{url}gradio_api/deep_link?session_hash=abc", timeout=60).status_code == 404
    assert [path for path in kept.rglob("*") if path.is_file()] == []


def test_the_longest_query_that_can_be_typed_is_answered(url):
    import requests

    answer = requests.post(f"{url}gradio_api/run/search", json={"data": ["🎒" * 4000, 5, ""]}, timeout=60).json()
    assert "first 1,000 characters" in answer["data"][0]["message"] and len(answer["data"][0]["student"]["hits"]) == 5


def test_the_mcp_tool(url):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def ask():
        async with streamablehttp_client(f"{url}gradio_api/mcp/") as (read, write, _):
            async with ClientSession(read, write) as session:
                await session.initialize()
                tools = (await session.list_tools()).tools
                return tools, await session.call_tool("search", {"query": "red shoe", "k": 3})

    with ThreadPoolExecutor(1) as thread:  # Playwright has an event loop of its own in this one
        tools, answer = thread.submit(asyncio.run, ask()).result(120)
    assert [tool.name for tool in tools] == ["search"] and "shopper" in tools[0].description
    assert not answer.isError and "red shoe" in answer.content[0].text and "overlap" in answer.content[0].text


@pytest.fixture
def opened(browser, url):
    with opening(browser, url, ".hlm-columns li") as open_page:
        yield open_page


def test_search_examples_and_tabs(opened):
    page = opened()
    assert page.locator(".hlm-columns section").count() == 2 and page.locator(".hlm-columns li").count() == 20
    page.get_by_role("button", name="steel bottle").click()
    page.wait_for_selector(".hlm[data-query='steel bottle'] li")
    assert page.get_by_label("Query").input_value() == "steel bottle"
    page.get_by_label("Query").fill("   ")
    page.get_by_role("button", name="Search", exact=True).click()
    page.wait_for_selector("text=Type a query first")
    page.get_by_label("Query").fill("red shoe ${window.hacked = 1} " + SCRIPT)
    page.get_by_role("button", name="Search", exact=True).click()
    page.wait_for_selector(".hlm-columns li")
    assert page.evaluate("window.hacked") is None
    page.get_by_role("tab", name="Details").click()
    page.wait_for_selector("text=eeeeeeeeeeeeeeee")
    assert "The ads are synthetic" in page.inner_text("main")


def test_with_the_keyboard_alone(opened):
    page = opened()
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('textarea, input[type=text]')"):
            break
    page.keyboard.press("Control+A")
    page.keyboard.type("cheap steel bottle")
    page.keyboard.press("Enter")
    page.wait_for_selector(".hlm[data-query='cheap steel bottle'] li")


# Of every row of the charts: the boxes of its name, its marks and its value, and a mark's colour on the page's.
CHARTS = """() => ({
  boxes: [...document.querySelectorAll('.hlm-chart tr')].map(row => [...row.children].map(cell => {
    const range = document.createRange(); range.selectNodeContents(cell.firstElementChild ?? cell);
    const {left, right} = range.getBoundingClientRect(); return [left, right] })),
  colours: ['.hlm-bar.hlm-student', '.hlm-dot.hlm-teacher', '.hlm-bar.hlm-other'].map(mark =>
    getComputedStyle(document.querySelector(mark)).backgroundColor),
  page: getComputedStyle(document.body).backgroundColor })"""


def luminance(colour: str) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    ]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_charts_follow_the_theme_and_no_label_covers_a_mark(opened, scheme, width):
    page = opened(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.get_by_role("tab", name="Quality").click()
    page.wait_for_selector("text=Recovery of the teacher")
    found = page.evaluate(CHARTS)
    assert len(found["boxes"]) == 7 + 4 + 4 + 4
    for name, marks, value in found["boxes"]:
        assert name[0] >= 0 and name[1] <= marks[0] < marks[1] <= value[0] and value[1] <= width
    for colour in found["colours"]:  # WCAG: 3:1 for graphics
        light, dark = sorted((luminance(colour), luminance(found["page"])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3
    assert serious(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_in_both_themes(opened, scheme):
    page = opened(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    tops = [page.get_by_role("heading", name=name, exact=True).bounding_box()["y"] for name in ("Student", "Teacher")]
    assert tops[0] < tops[1]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    assert serious(page) == []


def test_hostile_ads_in_the_page(opened, demo):
    page = opened()
    page.evaluate("html => { document.querySelector('.hlm[data-query]').outerHTML = html }", hostile_page(demo))
    assert page.locator(".hlm-columns li").count() == 8 and page.evaluate("window.hacked") is None
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_load_that_fails_says_what_to_do(config, browser):
    app = load_app()
    page = app.launch(dataclasses.replace(config, student="./nowhere"), quiet=True)
    try:
        view = browser.new_page()
        view.goto(page.local_url, wait_until="commit")
        view.wait_for_selector("text=/This did not work.*expected a folder/", timeout=60_000)
        assert "Traceback" not in view.content()
        view.close()
    finally:
        page.close()


def test_the_page_builds_before_anything_is_loaded(config):
    assert load_app().build(config, Future()).fns


def test_the_demo_is_measured(opened, url):
    measure = load_app("results/measure/measure_demo.py")
    queries = ["red shoe", "steel bottle", "cheap lamp"]
    found = measure.in_browser(opened(), queries, 4)
    assert found["samples"] == 4 and 0 < found["p50"] <= found["p95"]
    found = measure.many_clients(url, queries, 2, 1.0)
    assert found["errors"] == 0 and found["samples"] >= 2


def test_the_container_holds_what_the_demo_needs(config, tmp_path):
    """Everything that the Dockerfile copies, laid out as it says, and no package beyond its requirements."""
    lines = (ROOT / "spaces/query_to_ad/Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            *sources, target = line.split()[1:]
            for source in sources:
                place = tmp_path / target / Path(source).name if target.endswith("/") else tmp_path / target
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copyfile
                copy(ROOT / source, place)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    pinned = re.findall(r"^([\w-]+)(?:\[\w+\])?==", (tmp_path / "requirements.txt").read_text(), re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][name] for name in ("index", "train", "eval")]
    needed = [name for names in (project["dependencies"], *extras) for name in names if not name.startswith("hlm[")]
    absent = {re.match(r"[\w-]+", name)[0] for name in needed} - set(pinned)
    # With those that are pinned; accelerate is only used where its installation is on record, as it is here.
    come_along = {"accelerate", "fsspec", "jinja2", "pyyaml", "safetensors", "tqdm"}
    modules = {name.replace("-", "_") for name in absent - come_along} | {"pytrec_eval"}
    assert "peft" in modules and lines[-1] == 'CMD ["python", "app.py"]'
    code = (
        f"import sys; sys.path[0] = ''; sys.modules.update(dict.fromkeys({sorted(modules)!r}))\n"
        "import app, hlm\nfrom hlm.demo.comparison import DemoConfig, load_demo\n"
        "print(hlm.__file__, load_demo(DemoConfig.read('config.json')).compare('red shoe')['overlap'])"
    )
    variables = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / "hlm/__init__.py"), "10"], done.stderr[-2000:]
