"""Every recipe's main, end to end on the 200-ad catalogue with tiny models; kills, resumption, refusals."""

import json
import multiprocessing
import signal
from dataclasses import replace
from pathlib import Path

import kill_at
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import hlm
from hlm.artefacts import HlmError, read_manifest
from hlm.data.contract import load
from hlm.encoders.families import layers_of
from hlm.encoders.loading import encode, fingerprint, load_encoder
from hlm.steps import TeacherConfig
from hlm.training.batches import TokenTable
from hlm.training.losses import qwen3_contrastive
from hlm.training.teacher import Batches, Pairs
from hlm.vectors.store import VectorStore
from recipes import align, embed, evaluate, make_catalogue, prune, quickstart, refine, teacher

TRAIN = ["--per_device_train_batch_size", "32", "--seed", "3", "--disable_tqdm", "true", "--learning_rate", "3e-3"]
BEST = ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--load_best_model_at_end", "true"]
BEST += ["--metric_for_best_model", "dev_ndcg@10", "--greater_is_better", "true"]
ONLY_LAST = "--eval_strategy no --save_strategy no --load_best_model_at_end false".split()


def teacher_arguments(data, backbone, output):
    given = ["--backbone", backbone, "--data", data, "--output", str(output), *TRAIN]
    given += "--min_score 3 --lora_rank 4 --pairs_per_query 2 --queries_per_document 2".split()
    return given + "--max_steps 6 --save_strategy steps --save_steps 2".split()


def align_arguments(house, output, *more):
    given = ["--student", str(house / "teacher"), "--data", house.data, "--vectors", str(house / "vectors")]
    return [*given, "--output", str(output), "--num_train_epochs", "2", *TRAIN, *BEST, *more]


def refine_arguments(house, student, output, *more):
    given = ["--student", str(student), "--data", house.data, "--vectors", str(house / "vectors")]
    return [*given, "--output", str(output), "--min_score", "3", "--num_train_epochs", "2", *TRAIN, *BEST, *more]


class House(type(Path())):
    data: str


@pytest.fixture(scope="module", params=["tiny_bert", "tiny_qwen3"])
def house(request, tmp_path_factory, catalogue_200):
    """Teacher -> embed -> prune -> align -> refine, once for each kind of backbone."""
    folder = House(tmp_path_factory.mktemp("house"))
    folder.data = catalogue_200
    backbone = request.getfixturevalue(request.param)
    teacher.main(teacher_arguments(catalogue_200, backbone, folder / "teacher"))
    embed.main(["--model", str(folder / "teacher"), "--data", catalogue_200, "--output", str(folder / "vectors")])
    given = ["--model", str(folder / "teacher"), "--data", catalogue_200, "--vectors", str(folder / "vectors")]
    prune.main([*given, "--output", str(folder / "pruned"), "--keep", "2"])
    cascade = json.dumps([{"layers": 4, "epochs": 1}, {"layers": 2, "ffn": 32}])
    align.main(align_arguments(folder, folder / "aligned", "--cascade", cascade))
    refine.main(refine_arguments(folder, folder / "aligned", folder / "student", "--alignment_weight", "0.5"))
    folder.backbone = backbone
    return folder


def test_the_teacher_is_merged_and_its_adapter_beside_it(house):
    from peft import PeftModel

    merged, plain = load_encoder(str(house / "teacher")), load_encoder(house.backbone)
    assert fingerprint(merged) != fingerprint(plain)
    adapted = load_encoder(house.backbone)
    adapted[0].model = PeftModel.from_pretrained(adapted[0].model, str(house / "teacher/adapter"))
    texts = ["red shoe", "steel kettle 1 l"]
    want = encode(merged, texts, prompt_name="query")
    np.testing.assert_allclose(encode(adapted, texts, prompt_name="query"), want, atol=1e-5)
    assert np.abs(want - encode(plain, texts, prompt_name="query")).max() > 1e-3


def test_the_teacher_says_what_it_does_not_read(tiny_bert, catalogue_200, tmp_path, caplog):
    caplog.set_level("INFO")
    short = "--max_steps 1 --max_seq_length 4 --dev_documents 0".split()
    teacher.main([*teacher_arguments(catalogue_200, tiny_bert, tmp_path / "teacher"), *short])
    said = [record.getMessage() for record in caplog.records if "their ends are not read" in record.getMessage()]
    assert len(said) == 2 and "queries looked at" in said[0] and said[1].startswith("100% of 200 ads looked at")


def test_the_cascade_ends_in_the_shape_asked_for(house):
    model = load_encoder(str(house / "student"))
    assert len(layers_of(model[0].model)) == 2 and model[0].model.config.intermediate_size == 32
    assert len(layers_of(load_encoder(str(house / "aligned.stages/1"))[0].model)) == 4
    assert model.prompts["query"] == ""  # alignment teaches the prompt


def test_alignment_brings_queries_to_the_teachers(house):
    data = load(house.data)
    queries = dict(data.split_queries("test"))
    store = VectorStore.open(house / "vectors/queries")
    target = store.gather(store.rows_of(list(queries)))
    # The pruned student keeps its prompt: it must lose against the aligned one that has none.
    cosines = {
        name: float(
            (encode(load_encoder(str(house / name)), list(queries.values()), prompt_name="query") * target)
            .sum(axis=1)
            .mean()
        )
        for name in ("pruned", "aligned")
    }
    assert cosines["aligned"] > cosines["pruned"]


def test_manifests_tell_the_lineage(house):
    store = VectorStore.open(house / "vectors/corpus")
    for name in ("pruned", "aligned", "student"):
        assert read_manifest(house / name, "student")["inputs"]["teacher"] == store.encoder
    assert read_manifest(house / "teacher", "teacher")["encoder"] == store.encoder
    assert not list(house.glob("*.training"))  # checkpoints are gone once the artefact is whole


def test_a_second_run_changes_nothing(house, caplog):
    before = (house / "aligned/model.safetensors").stat().st_mtime_ns
    caplog.set_level("INFO")
    cascade = json.dumps([{"layers": 4, "epochs": 1}, {"layers": 2, "ffn": 32}])
    align.main(align_arguments(house, house / "aligned", "--cascade", cascade))
    assert (house / "aligned/model.safetensors").stat().st_mtime_ns == before
    assert caplog.text.count("up to date") == 2


def test_a_step_called_in_python_is_the_scripts(house, caplog):
    """The same settings as keywords: nothing is made again; another setting would be another student."""
    before = {path: path.stat().st_mtime_ns for path in house.rglob("*.safetensors")}
    caplog.set_level("INFO")
    training = {"per_device_train_batch_size": 32, "seed": 3, "learning_rate": 3e-3, "disable_tqdm": True}
    best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "dev_ndcg@10", "greater_is_better": True, "num_train_epochs": 2}
    teacher = hlm.train_teacher(
        house.backbone,
        house.data,
        house / "teacher",
        min_score=3,
        lora_rank=4,
        pairs_per_query=2,
        queries_per_document=2,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        **training,
    )
    vectors = hlm.embed(teacher, house.data, house / "vectors")
    assert hlm.prune(teacher, house.data, vectors, house / "pruned", keep=2) == house / "pruned"
    stages = ({"layers": 4, "epochs": 1}, {"layers": 2, "ffn": 32})
    aligned = hlm.align(teacher, house.data, vectors, house / "aligned", cascade=stages, **training, **best)
    student = hlm.refine(
        aligned, house.data, vectors, house / "student", min_score=3, alignment_weight=0.5, **training, **best
    )
    assert student == house / "student" and caplog.text.count("up to date") == 8  # three stores, two stages
    assert {path: path.stat().st_mtime_ns for path in house.rglob("*.safetensors")} == before


def test_evaluation_reports_every_system(house, tmp_path, capsys):
    systems = {"bm25": None, "backbone": house.backbone}
    systems["teacher"] = {"model": str(house / "teacher"), "corpus": str(house / "vectors/corpus")}
    systems |= {name: str(house / name) for name in ("pruned", "aligned", "student")}
    # So small a teacher finds few ads of a higher grade.
    arguments = ["--data", house.data, "--output", str(tmp_path), "--relevance_level", "1"]
    evaluate.main([*arguments, "--systems", json.dumps(systems)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["systems"]) == list(systems)
    assert report["recovery"]["ndcg@10"]["value"] == pytest.approx(
        report["systems"]["student"]["ndcg@10"] / report["systems"]["teacher"]["ndcg@10"]
    )
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert "student" in capsys.readouterr().out


def test_students_of_another_teacher_are_refused(house, tmp_path):
    embed.main(["--model", house.backbone, "--data", house.data, "--output", str(tmp_path / "vectors")])
    other = House(tmp_path)
    other.data = house.data
    with pytest.raises(HlmError, match="expected a student of teacher"):
        refine.main(refine_arguments(other, house / "aligned", tmp_path / "student"))


def test_a_sample_of_the_queries_is_aligned_on(house, tmp_path):
    for name, more in {"all": [], "few": ["--queries", "32"]}.items():
        arguments = align_arguments(house, tmp_path / name, "--max_steps", "2")
        align.main([*arguments, "--cascade", '[{"layers": 2}]', *ONLY_LAST, *more])
    few, every = (load_file(tmp_path / name / "model.safetensors") for name in ("few", "all"))
    assert any(np.abs(few[name] - every[name]).max() > 1e-5 for name in few)
    for more, message in {
        ("--also", '{"l3": 1.0}'): "also: expected weights of l2, cosine, kernel, kl, found 'l3'",
        ("--queries", "0"): "queries: expected 1 or more, found 0",
        ("--kinds", "log"): r"kinds: expected unlabelled queries with a column 'kind', found \['text'\]",
    }.items():
        with pytest.raises(HlmError, match=message):
            align.main(align_arguments(house, tmp_path / "no", *more))


@pytest.mark.parametrize("objective", ["cosine", "kernel", "kl"])
def test_other_objectives_train(house, tmp_path, objective):
    arguments = align_arguments(house, tmp_path / "aligned", "--objective", objective, "--max_steps", "2")
    align.main([*arguments, "--cascade", '[{"layers": 2}]', *ONLY_LAST])
    assert len(layers_of(load_encoder(str(tmp_path / "aligned"))[0].model)) == 2


def test_a_head_makes_a_student_as_wide_as_the_teacher(house, tmp_path):
    align.main([*align_arguments(house, tmp_path / "aligned", "--head", "true"), *ONLY_LAST, "--max_steps", "2"])
    model = load_encoder(str(tmp_path / "aligned"))
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Dense", "Normalize"]


@pytest.mark.parametrize(
    "flags", [["--cache_chunk", "8"], ["--gradient_checkpointing", "true"]], ids=lambda f: f[0][2:]
)
def test_what_saves_memory_trains_to_the_same_teacher(house, tmp_path, flags):
    if "tiny_bert" in house.backbone:
        pytest.skip("dropout falls differently on other chunks")
    arguments = teacher_arguments(house.data, house.backbone, tmp_path / "saving")
    teacher.main([*arguments, *flags])
    one, other = (load_file(folder / "model.safetensors") for folder in (house / "teacher", tmp_path / "saving"))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=2e-3, err_msg=name)


def test_short_queries_fill_a_chunk_up_to_the_longest_document(house, tmp_path):
    config = TeacherConfig(house.backbone, house.data, str(tmp_path), min_score=3, hard_negatives=0, cache_chunk=4)
    model = load_encoder(house.backbone)
    pairs = Pairs(load(house.data, splits=("train", "dev")), config)
    batches = Batches.of(model, pairs, np.zeros((len(pairs.queries), 0), np.int64), config)
    batches = replace(batches, queries=TokenTable(model, [text.split()[0] for text in pairs.queries]))
    batch = batches.collate(list(range(24)))
    most = 4 * batches.documents.lengths().max()  # tokens that memory is planned for
    sizes = {name: [tuple(chunk["input_ids"].shape) for chunk in batch[name]] for name in ("query", "document")}
    assert all(rows <= 4 for rows, _ in sizes["document"]) and len(sizes["document"]) == 6
    assert 1 <= len(sizes["query"]) < 6 and sum(rows for rows, _ in sizes["query"]) == 24
    assert all(rows * tokens <= most for shapes in sizes.values() for rows, tokens in shapes)


def test_each_document_of_a_batch_is_encoded_once_and_the_loss_stays(house, tmp_path):
    config = TeacherConfig(house.backbone, house.data, str(tmp_path), min_score=3, hard_negatives=2)
    model = load_encoder(house.backbone).eval()
    pairs = Pairs(load(house.data, splits=("train", "dev")), config)
    negatives = np.random.default_rng(0).integers(-1, 200, size=(len(pairs.queries), 2))
    batches = Batches.of(model, pairs, negatives, config)
    rows = np.argsort(pairs.rows[:, 1], kind="stable")[:48].tolist()  # several queries a document
    batch = batches.collate(rows)
    encoded = sum(len(chunk["input_ids"]) for chunk in batch["document"])
    assert encoded == len(set(pairs.rows[rows, 1]) | set(np.maximum(negatives[pairs.rows[rows, 0]], 0).ravel()))
    query, positive = pairs.rows[rows].T
    vectors = {
        name: torch.from_numpy(encode(model, texts, prompt_name=name))
        for name, texts in [("query", pairs.queries), ("document", pairs.documents)]
    }
    plain = qwen3_contrastive(
        vectors["query"][query],
        vectors["document"][positive],
        vectors["document"][negatives[query]],
        query_ids=torch.from_numpy(query),
        positive_ids=torch.from_numpy(positive),
        negative_ids=torch.from_numpy(negatives[query]),
        excluded_ids=pairs.excluded[query],
        temperature=config.temperature,
        margin=config.margin,
    )
    with torch.no_grad():
        assert batches.loss(model, batch).item() == pytest.approx(plain.item(), rel=1e-4)


# Processes that are killed come from one that has imported what takes longest, and has done nothing else.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["recipes.teacher", "recipes.align", "recipes.refine"])
KILLED = {
    "teacher": lambda house, output: teacher_arguments(house.data, house.backbone, output),
    "align": lambda house, output: align_arguments(house, output, "--cascade", '[{"layers": 2}]'),
    "refine": lambda house, output: refine_arguments(house, house / "aligned", output, "--alignment_weight", "0.5"),
}


@pytest.mark.parametrize("name", list(KILLED))
def test_a_killed_step_ends_in_the_same_weights(house, tmp_path, name):
    """Killed at a step after the first checkpoint, or with its second checkpoint half written."""
    arguments = [str(value) for value in KILLED[name](house, tmp_path / "killed")]
    moment = ["step", "2"] if "qwen3" in house.backbone else ["checkpoint", "2"]
    killed = FORKS.Process(target=kill_at.main, args=(name, *moment, *arguments))
    killed.start()
    killed.join(300)
    assert killed.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert len(list((tmp_path / "killed.training").glob("checkpoint-*/whole"))) == 1
    {"teacher": teacher, "align": align, "refine": refine}[name].main(arguments)
    whole = {"teacher": house / "teacher", "refine": house / "student"}.get(name, tmp_path / "whole")
    if name == "align":  # the house's has a longer cascade
        align.main([str(value) for value in KILLED[name](house, whole)])
    resumed, never = (load_file(folder / "model.safetensors") for folder in (tmp_path / "killed", whole))
    for tensor in never:
        np.testing.assert_array_equal(resumed[tensor], never[tensor], err_msg=tensor)


def test_resuming_with_another_configuration_is_refused_by_name(house, tmp_path):
    arguments = align_arguments(house, tmp_path / "aligned", "--cascade", '[{"layers": 2}]')
    work = tmp_path / "aligned.training"
    (work / "checkpoint-5").mkdir(parents=True)
    (work / "checkpoint-5/whole").write_text("{}")
    manifest = read_manifest(house / "aligned", "student")
    (work / "identity.json").write_text(json.dumps({name: manifest[name] for name in ("inputs", "config")}))
    with pytest.raises(HlmError, match="checkpoints of another run: .*delete"):
        align.main(arguments)


def test_a_growing_cascade_stops_before_anything_loads(tmp_path):
    with pytest.raises(HlmError, match="grows from 2 to 4"):
        align.main(
            ["--student", "nowhere", "--data", "nowhere", "--vectors", "nowhere", "--output", str(tmp_path)]
            + ["--cascade", '[{"layers": 2}, {"layers": 4}]']
        )


def test_make_catalogue_is_up_to_date_the_second_time(tmp_path, caplog):
    caplog.set_level("INFO")
    arguments = ["--output", str(tmp_path / "data"), "--ads", "200", "--unlabelled", "50", "--train_queries", "50"]
    arguments += ["--dev_queries", "5", "--test_queries", "5"]
    make_catalogue.main(arguments)
    before = (tmp_path / "data/corpus.jsonl").stat().st_mtime_ns
    make_catalogue.main(arguments)
    assert (tmp_path / "data/corpus.jsonl").stat().st_mtime_ns == before and "up to date" in caplog.text


def test_quickstart_skips_what_has_not_changed(tmp_path, capfd):
    configs, output = tmp_path / "configs", tmp_path / "run/data"
    configs.mkdir()
    text = f"output: {output}\nads: 200\nunlabelled: 50\ntrain_queries: 50\ndev_queries: 5\ntest_queries: 5\n"
    (configs / "make_catalogue.yaml").write_text(text)
    assert quickstart.main(["--configs", str(configs)]) == 0
    assert "make_catalogue: up to date" not in capfd.readouterr().out
    assert quickstart.main(["--configs", str(configs)]) == 0
    assert "make_catalogue: up to date" in capfd.readouterr().out
    (configs / "make_catalogue.yaml").write_text(text.replace("ads: 200", "ads: 0"))
    assert quickstart.main(["--configs", str(configs)]) == 2
    assert "step make_catalogue ended with status 2" in capfd.readouterr().err
