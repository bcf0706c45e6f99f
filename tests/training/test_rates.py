"""Of several learning rates the one is kept that dev finds better by more than noise: its weights are those of a run at
that rate alone, killed or not."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file

import hlm
from hlm.artefacts import HlmError, read_manifest
from hlm.publishing.cards import student_card
from hlm.training import rates

SETTINGS = {"min_score": 3, "per_device_train_batch_size": 32, "seed": 3, "max_steps": 12, "disable_tqdm": True}
SETTINGS |= {"eval_strategy": "steps", "eval_steps": 6, "save_strategy": "steps", "save_steps": 6}
SETTINGS |= {"load_best_model_at_end": True, "metric_for_best_model": "dev_ndcg@10", "greater_is_better": True}
HELPS, IDLE, HARMS, NOISE = 3e-3, 1e-9, 1e-2, 1e-3


@pytest.fixture(scope="module")
def house(tmp_path_factory, catalogue_200, tiny_bert):
    """A cut student, and the vectors of its teacher."""
    folder = tmp_path_factory.mktemp("rates")
    hlm.embed(model=tiny_bert, data=catalogue_200, output=str(folder / "vectors"))
    hlm.prune(
        model=tiny_bert,
        data=catalogue_200,
        vectors=str(folder / "vectors"),
        output=str(folder / "pruned"),
        keep=2,
    )
    return folder


@pytest.fixture(autouse=True)
def dev(monkeypatch):
    """What dev says of each rate: 20 queries and twelve steps would say what a processor's rounding makes of them."""
    gains = {IDLE: [0.0, 0.0], HELPS: [0.2, 0.3], HARMS: [-0.1, -0.2], NOISE: [1.5, -0.9]}

    def scores(trainer):
        gain = gains[trainer.args.learning_rate]
        return {query: 0.5 + gain[number % 2] for number, query in enumerate(sorted(trainer.evaluator.qrels))}

    monkeypatch.setattr(rates, "scores_on_dev", scores)


@pytest.fixture
def refined(house, catalogue_200, tmp_path):
    def make(name, rate, others=(), data=catalogue_200, vectors=house / "vectors"):
        output = tmp_path / name
        given = {"student": str(house / "pruned"), "data": str(data), "vectors": str(vectors), "output": str(output)}
        hlm.refine(**given, learning_rate=rate, try_learning_rates=list(others), **SETTINGS)
        return output

    return make


def same(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_a_better_rate_is_kept_as_if_it_were_the_only_one(refined):
    tried, alone = refined("tried", IDLE, [NOISE, HELPS, HARMS]), refined("alone", HELPS)
    assert same(tried, alone)
    manifest, plain = read_manifest(tried, "student"), read_manifest(alone, "student")
    chosen = manifest["chosen"]
    assert chosen["learning_rate"] == HELPS and chosen["queries"] == 20 and "chosen" not in plain
    table = {row.pop("learning_rate"): row for row in chosen["table"]}
    assert list(table) == [IDLE, NOISE, HELPS, HARMS]
    assert table[IDLE] == {"ndcg@10": 0.5, "gain": 0, "ci90": [0, 0]}
    assert (table[HELPS]["ndcg@10"], table[HELPS]["gain"], table[HARMS]["gain"]) == (0.75, 0.25, -0.15)
    assert table[NOISE]["gain"] == 0.3 and table[NOISE]["ci90"][0] < 0  # the highest gain, which noise may be
    assert manifest["dev"] == plain["dev"]  # what the weights that were saved reach
    assert "learning rate 0.003" in " ".join(student_card(tried, repo_id="acme/student").split())
    assert not tried.with_name("tried.training").exists()


def test_what_is_no_better_leaves_the_rate_that_was_asked_for(refined):
    tried = refined("tried", HELPS, [HARMS, IDLE])
    assert same(tried, refined("alone", HELPS))
    assert read_manifest(tried, "student")["chosen"]["learning_rate"] == HELPS


def test_a_run_that_was_killed_within_a_later_rate_goes_on_there(refined, monkeypatch):
    whole = refined("whole", IDLE, [HELPS])
    before, steps = rates.train, []

    def killed(trainer, identity):
        if trainer.args.learning_rate == HELPS:
            trainer.callback_handler.callbacks[-1].on_step_end = strike
        return before(trainer, identity)

    def strike(args, state, control, **kwargs):
        if state.global_step == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(rates, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        refined("killed", IDLE, [HELPS])

    def counted(trainer, identity):
        found = before(trainer, identity)
        steps.append((trainer.args.learning_rate, trainer.state.global_step))
        return found

    monkeypatch.setattr(rates, "train", counted)
    resumed = refined("killed", IDLE, [HELPS])
    assert same(resumed, whole)
    assert read_manifest(resumed, "student")["chosen"] == read_manifest(whole, "student")["chosen"]
    assert steps == [(IDLE, 12), (HELPS, 12)]


def test_derived_queries_choose_no_rate(refined, catalogue_200, tiny_bert, tmp_path, caplog):
    data = tmp_path / "data"
    shutil.copytree(catalogue_200, data)
    queries = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
    (data / "queries.jsonl").write_text("".join(json.dumps(row | {"derived": True}) + "\n" for row in queries))
    hlm.embed(model=tiny_bert, data=str(data), output=str(tmp_path / "vectors"))
    plain = refined("plain", IDLE, [HELPS], data, tmp_path / "vectors")
    assert "dev needs 20 queries or more that people judged, and has 0" in caplog.text
    assert "chosen" not in read_manifest(plain, "student") and same(plain, refined("alone", IDLE))


def test_judgements_that_call_themselves_derived_afterwards_choose_anew(house, refined, catalogue_200, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(catalogue_200, data)
    assert "chosen" in read_manifest(refined("tried", IDLE, [HELPS], data), "student")
    queries = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
    (data / "queries.jsonl").write_text("".join(json.dumps(row | {"derived": True}) + "\n" for row in queries))
    assert "chosen" not in read_manifest(refined("tried", IDLE, [HELPS], data), "student")


def test_a_rate_named_twice_is_tried_once(refined):
    tried = refined("tried", IDLE, [IDLE, HELPS, HELPS])
    table = read_manifest(tried, "student")["chosen"]["table"]
    assert [row["learning_rate"] for row in table] == [IDLE, HELPS]


@pytest.mark.parametrize(("rate", "told"), [(0.0, "above 0, found 0.0"), (float("nan"), "found nan")])
def test_rates_that_cannot_be_tried_are_refused_first(refined, rate, told):
    with pytest.raises(HlmError, match=f"try_learning_rates.*{told}"):
        refined("refused", HELPS, [rate], data="nowhere")
