"""A teacher behind HTTP: batches, order, tries, what is refused, and a key that nobody sees."""

import logging
import time
from email.utils import formatdate

import numpy as np
import pytest
from embedding_server import KEY, embedding_server

from hlm.artefacts import HlmError
from hlm.embedding import endpoint as module
from hlm.embedding.endpoint import Endpoint, read_vectors, retry_after
from hlm.encoders.loading import encode
from hlm.teacher_settings import EndpointSettings

TEXTS = ["red kettle", "blue shoe", "steel pan", "a desk", "wool  blanket", "ceiling lamp \ud83d", "tent"]


@pytest.fixture(scope="module")
def running(tiny_bert):
    with embedding_server(tiny_bert) as server:
        yield server


@pytest.fixture
def server(running, monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.001)
    running.requests.clear()
    running.faults.clear()
    running.key, running.retry_after = None, "0"
    return running


def asked(server, kind="openai", **settings):
    url = f"{server.url}/v1/" if kind == "openai" else server.url
    return Endpoint("tiny", EndpointSettings(url, kind, **{"batch": 3, "retries": 2, "timeout_s": 5.0, **settings}))


@pytest.mark.parametrize("kind", ["openai", "tei"])
def test_the_vectors_of_each_text_in_their_order(server, kind):
    endpoint = asked(server, kind)
    vectors = endpoint.encode(TEXTS, prompt_name="query")
    expected = encode(server.model, TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert vectors.dtype == np.float32 and endpoint.width == expected.shape[1]
    assert sorted(len(body.get("input", body.get("inputs"))) for _, _, body in server.requests) == [1, 3, 3]
    assert {path for path, _, _ in server.requests} == {"/embed" if kind == "tei" else "/v1/embeddings"}
    assert endpoint.encode([], prompt_name="query").shape == (0, expected.shape[1])


def test_prompts_fields_and_cut_texts_go_out(server):
    endpoint = asked(
        server, query_prompt="find: ", document_fields={"input_type": "document"}, max_characters=5, connections=1
    )
    endpoint.encode(["red kettle"], prompt_name="query")
    endpoint.encode(["red kettle"], prompt_name="document")
    bodies = [body for _, _, body in server.requests]
    assert bodies == [
        {"model": "tiny", "input": ["find: red k"]},
        {"model": "tiny", "input": ["red k"], "input_type": "document"},
    ]
    assert endpoint.tokens(["red kettle", "ü" * 5], "query") == (1 + 11 // 4) + (1 + 16 // 4)


@pytest.mark.parametrize("fault", ["429", "500", "503", "408", "cut", "html", "timeout"])
def test_what_passes_is_tried_again(server, fault):
    server.faults = [fault, fault]
    timeout_s = 0.2 if fault == "timeout" else 5.0
    vectors = asked(server, connections=1, timeout_s=timeout_s).encode(TEXTS[:3], prompt_name="query")
    np.testing.assert_allclose(vectors, encode(server.model, TEXTS[:3]), atol=1e-5)
    assert len(server.requests) == 3


def test_retry_after_holds_for_all_requests(server):
    server.faults, server.retry_after = ["429"], "0.3"
    begun = time.monotonic()
    asked(server, connections=2).encode(TEXTS, prompt_name="query")
    assert time.monotonic() - begun >= 0.3
    assert retry_after("7") == 7 and retry_after("soon") is None and retry_after(None) is None
    assert 50 < retry_after(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert retry_after(formatdate(time.time() - 60, usegmt=True)) == 0
    server.faults, server.retry_after = ["429"], "86400"
    with pytest.raises(HlmError, match="found a Retry-After of 86,400 seconds after 1 tries"):
        asked(server).encode(["tent"], prompt_name="query")


def test_no_more_requests_a_minute_than_allowed(server):
    begun = time.monotonic()
    asked(server, requests_a_minute=600, connections=3).encode(TEXTS, prompt_name="query")
    assert time.monotonic() - begun >= 0.2 and len(server.requests) == 3


@pytest.mark.parametrize(
    "fault, message",
    [
        ("fewer", "expected 3 vectors, one for each text, found 2"),
        ("nan", "text 0 of a request: expected a finite vector with a direction, found NaN or infinity"),
        ("zero", "found zeros alone"),
        ("null", "NaN or infinity|vectors of numbers"),
        ("text", "expected vectors of numbers"),
        ("ragged", "all of one width"),
        ("twice", "expected each index from 0 to 2 once, found"),
        ("400", r"expected vectors of 'tiny', found status 400 \(.*no, .*correct url, model"),
        ("redirect", "found status 302"),
        ("quota", "status 429 .*insufficient_quota"),
    ],
)
def test_what_does_not_pass_ends_at_once(server, fault, message):
    server.faults = [fault]
    with pytest.raises(HlmError, match=message):
        asked(server, connections=1).encode(TEXTS[:3], prompt_name="query")
    assert len(server.requests) == 1


def test_another_width_is_another_model(server):
    endpoint = asked(server)
    endpoint.encode(["tent"], prompt_name="query")
    server.faults = ["narrow"]
    with pytest.raises(HlmError, match="expected vectors of 32 values as before, found 8"):
        endpoint.encode(["tent"], prompt_name="query")


def test_answers_in_any_order(server):
    server.faults = ["reversed"]
    vectors = asked(server).encode(TEXTS[:3], prompt_name="query")
    np.testing.assert_allclose(vectors, encode(server.model, TEXTS[:3]), atol=1e-5)
    without = {"data": [{"embedding": [1, 0]}, {"embedding": [0, 2]}]}
    assert read_vectors(without, 2, "openai", "host").tolist() == [[1, 0], [0, 1]]
    for answer in ({}, [], {"data": [1]}, {"data": None}):
        with pytest.raises(HlmError, match="expected 'data' with an 'embedding' each"):
            read_vectors(answer, 1, "openai", "host")
    with pytest.raises(HlmError, match="expected 1 vectors"):
        read_vectors({"error": "busy"}, 1, "tei", "host")


def test_an_endpoint_that_stays_away_ends_and_stops_the_others(server):
    server.faults = ["503"] * 100
    begun = time.monotonic()
    with pytest.raises(HlmError, match="found status 503 .* after 3 tries; what was written so far is kept"):
        asked(server, connections=2).encode(TEXTS, prompt_name="query")
    assert time.monotonic() - begun < 3
    server.faults.clear()
    assert len(asked(server).encode(TEXTS, prompt_name="query")) == len(TEXTS)


def test_the_key_goes_to_the_host_and_nowhere_else(server, monkeypatch, caplog):
    monkeypatch.setenv("TEACHER_KEY", f" {KEY}\n")
    server.key = KEY
    caplog.set_level(logging.DEBUG)
    said = []
    for fault in (None, "429", "500", "400", "redirect"):
        server.faults = [fault] * 9 if fault else []
        try:
            asked(server, key_variable="TEACHER_KEY").encode(["tent"], prompt_name="query")
        except HlmError as error:
            said.append(str(error))
    server.faults, server.key = [], "another"
    with pytest.raises(HlmError, match=r"expected the key in \$TEACHER_KEY to be accepted, found status 401") as error:
        asked(server, key_variable="TEACHER_KEY").encode(["tent"], prompt_name="query")
    assert len(said) == 4 and all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.requests)
    assert "***" in said[2]  # it quotes the key
    assert KEY not in "".join([*said, str(error.value), caplog.text])
    assert KEY not in repr(vars(asked(server, key_variable="TEACHER_KEY"))["settings"])


@pytest.mark.parametrize(
    "url, message",
    [
        ("http://api.example.com/v1", "expected https for a request with a key, found http to api.example.com"),
        ("https://me:secret@api.example.com/v1", "without user, password"),
        ("https://api.example.com/v1?key=secret", "without user, password"),
        ("api.example.com/v1", "expected one such as https"),
        ("ftp://api.example.com", "expected one such as https"),
    ],
)
def test_addresses_that_a_key_must_not_go_to(url, message, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with pytest.raises(HlmError, match=message) as error:
        Endpoint("tiny", EndpointSettings(url, key_variable="TEACHER_KEY"))
    assert "secret" not in str(error.value) and KEY not in str(error.value)


def test_a_key_in_the_wrong_place_is_not_shown():
    for settings in ({"key_variable": KEY}, {"query_fields": {"api_key": KEY}}, {"document_fields": {"token": KEY}}):
        with pytest.raises(HlmError, match="key_variable") as error:
            Endpoint("tiny", EndpointSettings("https://api.example.com/v1", **settings))
        assert KEY not in str(error.value)


def test_keys_that_are_none(monkeypatch):
    for key, message in (("", "found none; export it there"), ("two words", "found no such text")):
        monkeypatch.setenv("TEACHER_KEY", key)
        with pytest.raises(HlmError, match=message):
            Endpoint("tiny", EndpointSettings("https://api.example.com/v1", key_variable="TEACHER_KEY"))


@pytest.mark.parametrize("name, value", [("batch", 0), ("timeout_s", 0.0), ("retries", -1), ("max_cost", 1.0)])
def test_numbers_that_make_no_sense(name, value):
    with pytest.raises(HlmError, match=f"endpoint: {name}: expected"):
        Endpoint("tiny", EndpointSettings("http://127.0.0.1:1", **{name: value}))
