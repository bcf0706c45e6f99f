"""A teacher that nobody here can load: behind an endpoint, or its vectors are ready. Embedded, aligned to, refined
against, evaluated, exported, and told of on the card; and told apart from another one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_server import KEY, embedding_server

from hlm.artefacts import HlmError, read_manifest
from hlm.data.contract import document_text, load, query_text
from hlm.embedding import endpoint as endpoint_module
from hlm.embedding.embed import embed
from hlm.encoders.loading import encode, fingerprint, load_encoder, save_encoder
from hlm.indexes.lineage import verify
from hlm.publishing.cards import dataset_card, student_card
from hlm.vectors.store import VectorStore
from recipes import align, evaluate, export, prune, refine

TRAIN = "--per_device_train_batch_size 32 --seed 3 --disable_tqdm true --eval_strategy no".split()
PARTS = ("corpus", "unlabelled", "queries")


@pytest.fixture(scope="module")
def running(tiny_bert):
    with embedding_server(tiny_bert, KEY) as server:
        yield server


@pytest.fixture
def server(running, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT_S", 0.001)
    running.requests.clear()
    running.faults.clear()
    running.noise = 0.0
    return running


def asked(server, data, output, model="tiny-1", endpoint=(), **settings):
    at = {"url": f"{server.url}/v1", "key_variable": "TEACHER_KEY", "batch": 64, "retries": 1, **dict(endpoint)}
    return embed(model, data, output, endpoint=at, **settings)


@pytest.fixture(scope="module")
def vectors(running, catalogue_200, tmp_path_factory):
    """The stores of the teacher behind the endpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEACHER_KEY", KEY)
        return asked(running, catalogue_200, tmp_path_factory.mktemp("asked") / "vectors", index="Flat")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def of_part(data, part):
    return [(document_text if part == "corpus" else query_text)(row) for row in getattr(data, part)]


@pytest.fixture(scope="module")
def tables(tiny_bert, catalogue_200, tmp_path_factory):
    """The teacher's vectors as a user might have them: a Parquet file a part, by id or by text."""
    folder, data, model = tmp_path_factory.mktemp("ready"), load(catalogue_200), load_encoder(tiny_bert, device="cpu")
    for part in PARTS:
        texts = of_part(data, part)
        keys = texts if part == "unlabelled" else getattr(data, part)["_id"][:]
        rows = {"text" if part == "unlabelled" else "id": keys, "embedding": (2 * encode(model, texts)).tolist()}
        pq.write_table(pa.table(rows), folder / f"{part}.parquet")
    return folder


def paths(tables, *parts):
    return {part: str(tables / f"{part}.parquet") for part in parts or PARTS}


def test_the_stores_hold_what_the_endpoint_answers(vectors, server, catalogue_200):
    data = load(catalogue_200)
    teacher = json.loads((vectors / "teacher.json").read_text())
    for part in PARTS:
        store, texts = VectorStore.open(vectors / part), of_part(data, part)
        np.testing.assert_allclose(store.gather(range(len(store))), encode(server.model, texts), atol=1e-3)
        assert store.encoder == teacher["encoder"] and store.source == data.fingerprint(part)
        assert store.canaries == VectorStore.open(vectors / "corpus").canaries
        assert store.manifest["config"]["teacher"] == {"model": "tiny-1", "kind": "openai"}
    before = contents(vectors)
    asked(server, catalogue_200, vectors, index="Flat")
    assert contents(vectors) == before and server.texts[1:] == teacher["canaries"]["texts"]
    everything = b"".join(before.values())
    assert KEY.encode() not in everything and str(server.server_address[1]).encode() not in everything


def test_a_run_that_failed_goes_on_and_asks_nothing_twice(vectors, server, catalogue_200, tmp_path):
    server.faults = [None] * 4 + ["503"] * 100
    output, settings = tmp_path / "again", {"endpoint": {"connections": 1}, "shard_rows": 100, "parts": ["corpus"]}
    with pytest.raises(HlmError, match=r"found status 503 .* what was written so far is kept"):
        asked(server, catalogue_200, output, **settings)
    done = len(list((output / "corpus").glob("shard-*.json")))
    assert done == 1
    server.faults.clear()
    server.requests.clear()
    asked(server, catalogue_200, output, **settings)
    assert len(server.texts) == 1 + 12 + 100  # its width, the canaries, the shard that was missing
    store, other = VectorStore.open(output / "corpus"), VectorStore.open(vectors / "corpus")
    np.testing.assert_allclose(store.gather(range(200)), other.gather(range(200)), atol=1e-3)


def test_of_a_changed_catalogue_only_the_new_texts_are_asked(vectors, server, catalogue_200, tmp_path, caplog):
    data, output = shutil.copytree(catalogue_200, tmp_path / "data"), shutil.copytree(vectors, tmp_path / "v")
    rows = [json.loads(line) for line in (data / "corpus.jsonl").read_text().splitlines()]
    rows[3] |= {"title": "a new kettle"}
    rows.append(rows[0] | {"_id": "another", "title": "another lamp"})
    (data / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    caplog.set_level("INFO")
    asked(server, data, output, index="Flat")
    assert len(server.texts) == 1 + 12 + 2 and "corpus: 2 texts to send" in caplog.text
    texts, store = of_part(load(str(data)), "corpus"), VectorStore.open(output / "corpus")
    wanted = encode(server.model, [texts[3], texts[-1]])
    np.testing.assert_allclose(store.gather(store.rows_of([rows[3]["_id"], "another"])), wanted, atol=1e-3)
    assert store.encoder == VectorStore.open(vectors / "corpus").encoder


def test_what_it_costs_is_told_before_anything_is_sent(server, catalogue_200, tmp_path, caplog):
    caplog.set_level("INFO")
    texts = of_part(load(catalogue_200), "corpus")
    with pytest.raises(HlmError, match=r"max_cost: expected at most 0.5, found about [\d.,]+ for [\d,]+ tokens"):
        asked(server, catalogue_200, tmp_path / "v", endpoint={"price": 1e6, "max_cost": 0.5})
    assert len(server.texts) == 1 + 12
    tokens = sum(1 + len(text.encode()) // 4 for text in texts)
    assert f"corpus: 200 texts to send, about {tokens:,} tokens, about {tokens:,.4f} at 1e+06 a million" in caplog.text
    assert KEY not in caplog.text


def test_the_model_behind_a_name_may_not_change(vectors, server, catalogue_200, tmp_path, tiny_qwen3):
    shutil.copytree(vectors, tmp_path / "v")
    server.noise = 1e-4  # as between two batches of a GPU
    asked(server, catalogue_200, tmp_path / "v", index="Flat")
    more = asked(server, catalogue_200, tmp_path / "more", parts=["queries"], same_as=vectors)
    assert VectorStore.open(more / "queries").encoder == VectorStore.open(vectors / "corpus").encoder
    server.noise = 0.3
    for settings in ({"output": tmp_path / "v"}, {"output": tmp_path / "w", "same_as": vectors}):
        with pytest.raises(HlmError, match=r"puts a canary query at cosine [\d.-]+ to where it was: the model behind"):
            asked(server, catalogue_200, parts=["queries"], **settings)
    server.noise = 0.0
    for given, named in (
        ({"model": "tiny-2"}, "model: here 'tiny-2'"),
        ({"endpoint": {"query_prompt": "q: "}}, "query_p"),
    ):
        with pytest.raises(HlmError, match=f"teacher.json is of another teacher .*{named}"):
            asked(server, catalogue_200, tmp_path / "v", **given)
    with pytest.raises(HlmError, match="same_as: expected teacher.json in"):
        asked(server, catalogue_200, tmp_path / "x", same_as=tmp_path)


def test_ready_vectors_are_the_same_space_and_a_teacher_of_their_own(
    vectors, tables, tiny_bert, catalogue_200, tmp_path
):
    made = embed("tiny-1", catalogue_200, tmp_path / "v", ready=paths(tables))
    for part in PARTS:
        store, other = VectorStore.open(made / part), VectorStore.open(vectors / part)
        np.testing.assert_allclose(store.gather(range(len(store))), other.gather(range(len(other))), atol=1e-3)
        assert store.ids == other.ids and store.encoder != other.encoder
    texts = store.canaries["texts"]
    assert len(set(texts)) == 12 and set(texts) <= set(of_part(load(catalogue_200), "queries"))
    before = contents(made)
    embed("tiny-1", catalogue_200, made, ready=paths(tables))
    assert contents(made) == before
    narrow = embed("tiny-1", catalogue_200, tmp_path / "n", ready=paths(tables), dim=8)
    assert (
        VectorStore.open(narrow / "queries").encoder == store.encoder and VectorStore.open(narrow / "corpus").dim == 8
    )
    again = embed("tiny-1", catalogue_200, tmp_path / "s", ready=paths(tables), same_as=made)
    assert VectorStore.open(again / "corpus").encoder == store.encoder
    for space, inputs in ((made, store.encoder), (vectors, other.encoder)):
        student = tmp_path / f"student-{inputs}"
        save_encoder(load_encoder(tiny_bert), student, "student", inputs={"teacher": inputs}, config={})
        assert verify(student, space / "corpus")["canaries"] == 12
    with pytest.raises(HlmError, match="expected vectors made by the encoder"):
        verify(student, made / "corpus")


def test_ready_ads_beside_an_endpoint_or_a_model(server, tables, tiny_bert, tiny_qwen3, catalogue_200, tmp_path):
    """Ready vectors are compared with what the teacher says of some of their texts."""
    made = asked(server, catalogue_200, tmp_path / "e", ready=paths(tables, "corpus"))
    titles = set(of_part(load(catalogue_200), "corpus"))
    assert len([text for text in server.texts if text in titles]) == 16
    assert VectorStore.open(made / "corpus").encoder == VectorStore.open(made / "queries").encoder
    own = embed(tiny_bert, catalogue_200, tmp_path / "m", ready=paths(tables, "corpus"))
    assert VectorStore.open(own / "corpus").encoder == fingerprint(server.model)
    assert VectorStore.open(own / "corpus").canaries == VectorStore.open(own / "queries").canaries
    with pytest.raises(HlmError, match=r"ready: corpus: expected vectors of this teacher, found that only \d+ of 16"):
        embed(tiny_qwen3, catalogue_200, tmp_path / "q", ready=paths(tables, "corpus"))


def test_ads_alone_are_told_apart_by_their_vectors(tables, catalogue_200, tmp_path):
    """Without queries there are no canaries: then the file says whose they are."""
    table = pq.read_table(tables / "corpus.parquet")
    others = pa.array([row[::-1] for row in table["embedding"].to_pylist()])
    pq.write_table(table.set_column(1, "embedding", others), tmp_path / "others.parquet")
    encoders = []
    for name, path in (("one", tables / "corpus.parquet"), ("two", tmp_path / "others.parquet")):
        made = embed("tiny-1", catalogue_200, tmp_path / name, ready={"corpus": str(path)}, parts=["corpus"])
        store = VectorStore.open(made / "corpus")
        assert store.canaries is None
        encoders.append(store.encoder)
    assert encoders[0] != encoders[1]
    with pytest.raises(HlmError, match="expected canaries to know the teacher by, found none"):
        embed("tiny-1", catalogue_200, tmp_path / "s", ready=paths(tables), same_as=tmp_path / "one")


def test_ready_vectors_that_cannot_be(tables, server, catalogue_200, tmp_path):
    wide = pq.read_table(tables / "queries.parquet")
    rows = {"id": wide["id"], "embedding": [row + [1.0] for row in wide["embedding"].to_pylist()]}
    pq.write_table(pa.table(rows), tmp_path / "wide.parquet")
    for ready, message in (
        (paths(tables) | {"queries": str(tmp_path / "wide.parquet")}, r"expected vectors of one teacher, all of one "),
        (
            paths(tables) | {"quries": "x"},
            "ready: expected some of the parts .*, found 'quries'; did you mean 'queries'",
        ),
        ({"corpus": 3}, "ready: corpus: expected a path"),
        ({"corpus": {"path": "x", "column": "y"}}, "unknown key 'column'"),
    ):
        with pytest.raises(HlmError, match=message):
            embed("tiny-1", catalogue_200, tmp_path / "v", ready=ready)
    with pytest.raises(HlmError, match="same_as: expected an endpoint or ready vectors, found neither"):
        embed("tiny-1", catalogue_200, tmp_path / "v", same_as="x")
    with pytest.raises(HlmError, match="endpoint: unknown key 'api_key'"):
        asked(server, catalogue_200, tmp_path / "v", endpoint={"api_key": KEY})


def test_students_of_another_backbone_by_a_slice_and_by_a_head(vectors, tables, tiny_qwen3, catalogue_200, tmp_path):
    """From ready vectors wider than the student to its report and card."""
    for part in PARTS:
        table = pq.read_table(tables / f"{part}.parquet")
        wide = [row + row[:16] for row in table["embedding"].to_pylist()]
        pq.write_table(table.set_column(1, "embedding", pa.array(wide)), tmp_path / f"{part}.parquet")
    space = embed("tiny-1", catalogue_200, tmp_path / "v", ready=paths(tmp_path))
    common = ["--data", catalogue_200, "--vectors", str(space)]
    made = {name: str(tmp_path / name) for name in ("pruned", "sliced", "headed", "student", "looked_up", "online")}
    prune.main(["--model", tiny_qwen3, *common, "--output", made["pruned"], "--keep", "2"])
    for name, head in (("sliced", "false"), ("headed", "true")):
        flags = ["--head", head, *TRAIN, "--learning_rate", "3e-3", "--num_train_epochs", "1"]
        align.main(["--student", made["pruned"], *common, "--output", made[name], *flags])
        assert read_manifest(made[name], "student")["dim"] == {"sliced": 32, "headed": 48}[name]
    flags = [*TRAIN, "--learning_rate", "1e-5", "--max_steps", "2", "--min_score", "3", "--hard_negatives", "0"]
    refine.main(["--student", made["headed"], *common, "--output", made["student"], *flags])
    prune.main(["--model", tiny_qwen3, *common, "--output", made["looked_up"], "--static", "20"])
    export.main(["--student", made["looked_up"], "--output", made["online"]])  # of layers it would take seconds
    teacher = {"corpus": str(space / "corpus"), "queries": str(space / "queries")}
    systems = {"teacher": teacher, "pruned": made["pruned"], "aligned": made["sliced"], "student": made["student"]}
    settings = {"systems": json.dumps(systems), "output": str(tmp_path), "bootstrap_samples": "100"}
    evaluate.main(["--data", catalogue_200, *(word for name in settings for word in (f"--{name}", settings[name]))])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["environment"]["encoders"]["teacher"] == VectorStore.open(space / "corpus").encoder
    shared = {name: report["systems"][name].get("overlap@10") for name in systems}
    assert shared["teacher"] is None and min(shared["aligned"], shared["student"]) > 2 * shared["pruned"]
    assert report["recovery"]["ndcg@10"]["value"] > 0
    for name in made:
        assert read_manifest(made[name], "student")["named_teacher"] == {"model": "tiny-1", "kind": "ready"}
    card = student_card(made["student"], repo_id="shop/student", report=report)
    assert "The teacher is known by name alone: `tiny-1`, whose vectors were ready. **Its terms were not" in card
    assert "Licence: not stated. The terms of the teacher `tiny-1` were not checked." in card
    with pytest.raises(HlmError, match="expected vectors made by the encoder"):
        verify(made["student"], vectors / "corpus")


def test_the_card_of_a_dataset_names_the_terms_too(vectors, tmp_path):
    (tmp_path / "vectors").mkdir()
    shutil.copytree(vectors / "corpus", tmp_path / "vectors/corpus")
    card = dataset_card(tmp_path, repo_id="shop/data")
    assert "`tiny-1`, which was asked over an API. **Its terms were not checked.**" in card
