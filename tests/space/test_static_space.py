"""The demo that runs in the browser alone: the same ads as in Python, strangers' text, keyboard, phone, axe."""

import contextlib
import functools
import importlib.util
import json
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from browser import SCRIPT, hostile_run, opening, serious

from hlm.artefacts import HlmError
from hlm.data.contract import iterate, load
from hlm.indexes.faiss_index import AdIndex
from hlm.serving.export import export
from hlm.serving.query_encoder import QueryEncoder
from hlm.vectors.store import VectorStore

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "tests/node/node_modules/@huggingface/transformers/dist/transformers.min.js"
spec = importlib.util.spec_from_file_location("static_space_recipe", ROOT / "recipes/static_space.py")
recipe = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)


@pytest.fixture(scope="module")
def given(tiny_bert, online_bert, catalogue_200, tmp_path_factory) -> dict[str, str]:
    run = hostile_run(tmp_path_factory.mktemp("static"), tiny_bert, online_bert, catalogue_200)
    return {name: run[name] for name in ("student", "data", "vectors")}


def build(given, output, *more: str) -> Path:
    recipe.main(
        [*(word for name, value in given.items() for word in (f"--{name}", value)), "--output", str(output), *more]
    )
    return output


@pytest.fixture(scope="module")
def known(given) -> str:
    return load(given["data"]).queries["text"][0]


@pytest.fixture(scope="module")
def folder(given, known, tmp_path_factory) -> Path:
    if not LIBRARY.is_file():
        pytest.skip("transformers.js is not installed: npm ci --ignore-scripts in tests/node")
    return build(given, tmp_path_factory.mktemp("page") / "static", "--examples", known, "red shoe")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(folder):
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def url(folder):
    with serving(folder) as address:
        yield address


@pytest.fixture
def opened(browser, url):
    with opening(browser, url, "#results li") as open_page:
        yield open_page


def ask(page, query: str) -> list[str]:
    """The titles found, by the keyboard."""
    page.get_by_label("Query").fill(query)
    page.keyboard.press("Enter")
    page.wait_for_function("query => document.querySelector('#results').dataset.query === query", arg=query)
    return page.locator("#results h2").all_inner_texts()


def test_vectors_and_ads_in_the_folder(folder, given):
    about, ads = (json.loads((folder / name).read_text()) for name in ("about.json", "ads.json"))
    store = VectorStore.open(Path(given["vectors"]) / "corpus")
    raw = (folder / "vectors.bin").read_bytes()
    scales = np.frombuffer(raw, "<f4", about["ads"])
    codes = np.frombuffer(raw, "i1", offset=4 * about["ads"]).reshape(about["ads"], about["dim"])
    exact = store.gather(np.arange(len(store)))
    assert np.abs(codes * scales[:, None] - exact).max() <= scales.max() / 2 + 1e-6
    assert [ad["id"] for ad in ads] == store.ids.to_pylist() and about["ads"] == 204
    assert len(about["examples"][0]["teacher"]) == 50 and about["examples"][1]["teacher"] == []
    assert "\u202e" not in (folder / "ads.json").read_text()


def test_the_page_finds_what_python_finds(opened, given, known):
    page = opened()
    encoder = QueryEncoder.from_pretrained(given["student"], precision="int8")
    index = AdIndex.build(VectorStore.open(Path(given["vectors"]) / "corpus"))
    titles = {row["_id"]: " ".join(row["title"].split()) for row in iterate(load(given["data"]).corpus)}
    shared = 0
    for query in (known, "cheap steel bottle", "größe 靴 🎒", "used laptop with a black cable"):
        found = [title.split(". ", 1)[1] for title in ask(page, query)]
        _, (ids,) = index.search(encoder.encode([query]), 10)
        shared += len(set(found) & {titles[name] for name in ids}) / len({titles[name] for name in ids})
    assert shared / 4 >= 0.9  # int8 vectors swap neighbours
    ask(page, known)
    assert "The teacher finds" in page.inner_text("#status") and "ms" in page.inner_text("#status")
    page.get_by_label("Ads", exact=True).fill("3")
    assert len(ask(page, "red shoe")) == 3


def test_a_student_whose_weights_lie_beside_its_graph(browser, folder, given, known, opened, tmp_path, monkeypatch):
    expected = ask(opened(), known)
    large = Path(shutil.copytree(given["student"], tmp_path / "student"))
    monkeypatch.setattr("hlm.serving.export.EXTERNAL_BYTES", 1000)
    export(str(large), large)
    page_folder = build(given | {"student": str(large)}, tmp_path / "static", "--examples", known)
    assert (page_folder / "student/onnx/model_quantized.onnx_data").is_file()
    with serving(page_folder) as url, opening(browser, url, "#results li") as open_page:
        assert ask(open_page(), known) == expected


def test_examples_are_chosen_and_what_is_synthetic_is_said(given, browser, tmp_path):
    if not LIBRARY.is_file():
        pytest.skip("transformers.js is not installed")
    made = build(given, tmp_path / "static")
    about = json.loads((made / "about.json").read_text())
    texts = [example["text"] for example in about["examples"]]
    judged = dict(load(given["data"], splits=("test",)).split_queries("test"))
    assert 1 <= len(texts) <= 6 and set(texts) <= set(judged.values())
    assert about["synthetic"] and all(len(example["teacher"]) == 50 for example in about["examples"])
    with serving(made) as url, opening(browser, url, "#results li") as open_page:
        page = open_page(viewport={"width": 390, "height": 844})
        assert page.get_by_text("The ads are synthetic").is_visible()
        assert page.get_by_role("group", name="Examples: the test queries").get_by_role("button").count() == len(texts)
        assert page.evaluate("document.querySelector('#results').dataset.query") == texts[0]
    (Path(given["data"]) / "hlm.json").rename(tmp_path / "aside")
    try:
        about = json.loads((build(given, tmp_path / "other", "--examples", "red shoe") / "about.json").read_text())
    finally:
        (tmp_path / "aside").rename(Path(given["data"]) / "hlm.json")
    assert not about["synthetic"] and about["examples_label"] == "Examples"


def test_without_the_teachers_vector_nothing_is_compared(opened):
    page = opened()
    ask(page, "red shoe")  # an example, but no query of the data
    assert "Encoded in" in page.inner_text("#status") and "teacher" not in page.inner_text("#status")


def test_odd_queries(opened):
    page = opened()
    page.get_by_label("Query").fill("   ")
    page.get_by_role("button", name="Search", exact=True).click()
    page.wait_for_selector("text=Type a query first")
    page.get_by_label("Query").fill("red shoe " * 400)
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Cut to its first 1,000 characters")
    assert len(ask(page, f"red shoe {SCRIPT}")) == 10 and page.evaluate("window.hacked") is None


def test_hostile_ads_stay_text(opened):
    page = opened()
    page.get_by_label("Ads", exact=True).fill("50")
    for query in ("red shoe", "W" * 50, "shoe " * 20 + "end"):
        ask(page, query)
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#results script, #results img, #results h1").count() == 0


def test_keyboard_examples_and_facts(opened):
    page = opened()
    page.get_by_role("button", name="red shoe").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#results').dataset.query === 'red shoe'")
    page.get_by_text("What is shown").click()
    page.wait_for_selector("text=eeeeeeeeeeeeeeee")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_in_both_themes(opened, scheme):
    page = opened(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert serious(page) == []


def test_a_broken_folder_says_what_to_do(folder, url, browser):
    page = browser.new_page()
    page.route("**/vectors.bin", lambda route: route.fulfill(status=200, body=b"cut short"))
    page.goto(url)
    page.wait_for_selector("text=/This did not work: expected 204 ads and .* found 204 and 9; build this folder again/")
    page.close()


def test_bad_settings_are_refused(given, tmp_path):
    with pytest.raises(HlmError, match="npm ci --ignore-scripts"):
        build(given, tmp_path / "out", "--node_modules", str(tmp_path))
    with pytest.raises(HlmError, match="precision int8 or fp32"):
        build(given, tmp_path / "out", "--precision", "int4")
    assert not (tmp_path / "out").exists()


def test_only_a_page_of_its_own_is_replaced(given, known, folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(HlmError, match="found a folder with other files .*notes.txt"):
        build(given, tmp_path)
    with pytest.raises(HlmError, match="found an artefact of kind 'catalogue'"):
        build(given, given["data"])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    before = (folder / "about.json").read_bytes()
    again = build(given, shutil.copytree(folder, tmp_path / "again"), "--examples", known, "red shoe")
    assert (again / "about.json").read_bytes() == before
    manifest = (folder / "hlm.json").read_text()  # served to everybody
    assert not any(given[name] in manifest for name in given) and str(folder.parent) not in manifest


def test_a_part_of_the_catalogue_says_so(given, known, tmp_path):
    if not LIBRARY.is_file():
        pytest.skip("transformers.js is not installed")
    about = json.loads((build(given, tmp_path / "out", "--ads", "30", "--examples", known) / "about.json").read_text())
    assert about["ads"] == 30 and "30 of 204 ads" in str(about["facts"])
    (example,) = about["examples"]
    ids = [ad["id"] for ad in json.loads((tmp_path / "out/ads.json").read_text())]
    assert len(example["teacher"]) == 30 and set(example["teacher"]) == set(ids)
