"""What a plan says of students that are cut, of tables that get smaller, and of those without layers."""

import json
import re
import string
from itertools import product

import pytest
import torch
from live_bytes import LiveBytes
from transformers import ModernBertConfig

from hlm.artefacts import HlmError
from hlm.cli import main
from hlm.encoders.loading import load_encoder, save_encoder
from hlm.encoders.pruning import parameter_counts
from hlm.encoders.static_words import static_student
from hlm.encoders.vocabulary import choose_tokens, count_tokens, cut_vocabulary
from hlm.planning.footprint import Precision, Shape, training_memory
from hlm.planning.hardware import Gpu
from hlm.planning.phases import AGREED_DOCUMENTS, CHECKPOINTS
from hlm.planning.plan import check_step
from hlm.planning.students import Model, after_cut, model_at
from hlm.settings import defaults_of
from hlm.step_table import STEPS
from hlm.training.agreement import DEPTH, MOST
from hlm.training.trainer import TrainingArguments

NEW = ["".join(letters) * 2 for letters in product(string.ascii_lowercase[:10], repeat=3)]  # "abcabc": no token is it
CUT = {"fold": False, "layers": [], "keep": None, "ffn": None, "vocabulary": {}, "static": None}


def saved_static(teacher, texts, words, folder):
    student = static_student(load_encoder(teacher, device="cpu"), texts, words)
    save_encoder(student, folder, "student", inputs={"teacher": "t" * 16}, config={})
    return student


@pytest.mark.parametrize("teacher", ["tiny_bert", "tiny_qwen3"])
def test_the_table_of_a_static_student_is_the_one_on_disk(teacher, request, tmp_path):
    """Within 4%: a Qwen3 has no pieces of words to give, so that they are the log's, beside its characters."""
    path = request.getfixturevalue(teacher)
    planned = after_cut(model_at(path), CUT | {"static": len(NEW)}).shape
    real = saved_static(path, NEW, len(NEW), tmp_path / "static")
    on_disk = (tmp_path / "static/model.safetensors").stat().st_size
    assert 4 * planned.parameters == pytest.approx(on_disk, rel=0.04)
    found = model_at(str(tmp_path / "static")).shape  # of one that is there every token is known
    assert (found.parameters, found.embeddings) == (parameter_counts(real)[0],) * 2 and found.hidden == 32


def test_words_that_are_tokens_as_well_are_counted_twice(tiny_bert, tmp_path):
    planned = after_cut(model_at(tiny_bert), CUT | {"static": 40}).table
    real = saved_static(tiny_bert, ["red blue green steel cheap new used"] * 2, 40, tmp_path / "static")
    assert len(real.tokenizer) < planned[0] <= len(real.tokenizer) + 40


def test_without_a_tokenizer_all_tokens_are_taken():
    backbone = model_at("Qwen/Qwen3-Embedding-0.6B")  # a shape that is shipped, whose tokenizer is not
    assert after_cut(backbone, CUT | {"static": 1000}).table == (backbone.config.vocab_size + 1001, 1024)


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3", "xlm-roberta"])
def test_the_table_of_a_smaller_vocabulary_is_the_real_one(tiny_family, family):
    model = load_encoder(tiny_family(family), device="cpu")
    whole = len(model[0].model.get_input_embeddings().weight)
    kept = choose_tokens(model, count_tokens(model, ["red shoe with laces"]), keep=whole - 40)
    real = parameter_counts(cut_vocabulary(model, kept)[0].model)
    before = model_at(tiny_family(family))
    planned = after_cut(before, CUT | {"vocabulary": {"keep": len(kept)}})
    assert (planned.shape.parameters, planned.shape.parameters - planned.shape.embeddings) == real
    assert planned.shape.parameters < before.shape.parameters
    for vocabulary in ({"keep": 10**6}, {"min_count": 2}):
        assert after_cut(before, CUT | {"vocabulary": vocabulary}).shape == before.shape


def test_numbers_of_tokens_beyond_a_smaller_vocabulary_are_no_hindrance():
    backbone = Model("none", ModernBertConfig(num_hidden_layers=4))  # its padding token is number 50,283
    smaller = after_cut(backbone, CUT | {"vocabulary": {"keep": 8000}})
    assert backbone.shape.parameters - smaller.shape.parameters == (backbone.config.vocab_size - 8000) * 768


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({"static": 10, "keep": 2}, "static: expected it alone"),
        ({"static": 0}, "expected 1 word or more, found 0"),
        ({"vocabulary": {"kep": 5}}, "did you mean 'keep'"),
        ({"keep": 7}, "1 to 6 .*found 7"),
    ],
)
def test_cuts_that_cannot_be_made(tiny_bert, cut, message):
    with pytest.raises(HlmError, match=message):
        after_cut(model_at(tiny_bert), CUT | cut)


@pytest.mark.parametrize("autocast", [False, True])
def test_what_a_training_step_of_a_table_needs(tiny_bert, autocast):
    """Measured with AdamW, gradients and moments there: a table and vectors of the batch alike."""
    student = static_student(load_encoder(tiny_bert, device="cpu"), NEW, len(NEW)).train()
    rows, tokens = 64, 50
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    batch = {name: torch.ones(rows, tokens, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    live = LiveBytes([*student.parameters(), *batch.values()])
    with live:
        for _ in range(2):
            features = dict(batch)  # as a trainer's batch it holds what was looked up until the step ends
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = student(features)["sentence_embedding"].float().square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    table = student[0].embedding.weight
    shape = Shape.static(*table.shape)
    planned = training_memory(shape, [(rows, tokens)], Precision(autocast=autocast), checkpointing=autocast)
    assert planned["weights"] + planned["gradients"] + planned["optimizer"] == 16 * table.numel()
    assert sum(planned.values()) == pytest.approx(live.peak, rel=0.1)


@pytest.fixture
def folder(tmp_path, tiny_bert):
    """Every step that trains or cuts."""
    batch = "per_device_train_batch_size: 32\n"
    steps = {
        "teacher": f"backbone: {tiny_bert}\noutput: t\nlora_rank: 4\nhard_negatives: 0\n{batch}",
        "embed": "model: t\noutput: v\ndim: 32\n",
        "prune": "model: t\noutput: p\nkeep: 2\nffn: 16\nvocabulary: {keep: 100}\n",
        "align": f"student: t\noutput: a\n{batch}cascade: [{{layers: 2}}]\n"
        "learning_rate_mapping: {word_embeddings: 0.01}\n",
        "refine": f"student: a\noutput: s\n{batch}pool: 100\nmax_steps: 10\n",
        "contrastive_only": f"student: p\noutput: c\n{batch}pool: 100\nmax_steps: 7\n",
        "static_cut": "model: t\noutput: sc\nstatic: 50\n",
        "static": f"student: sc\noutput: st\n{batch}num_train_epochs: 2\n",
        "plan": "documents: 1000\nqueries: 200\nunlabelled: 600\n",
    }
    for name, text in steps.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def planned(folder, capsys, *words):
    assert main(["plan", "--config", str(folder), *words]) == 0
    return capsys.readouterr().out


def test_every_step_that_trains_or_cuts_is_planned(folder, tiny_bert, capsys):
    plan = json.loads(planned(folder, capsys, "--gpus", "2xH100", "--json"))
    phases = {phase["step"]: phase for phase in plan["phases"]}
    assert list(phases) == [name for name, step in STEPS.items() if step.trains or step.script in ("embed", "prune")]
    assert all(phase["gpu_bytes_peak"] > 0 and phase["fits"] for phase in plan["phases"])
    assert {phase["step"] for phase in plan["phases"] if phase["disk_bytes"]} == phases.keys()
    assert plan["hours"] == pytest.approx(sum(phase["hours"] for phase in plan["phases"]))

    backbone = model_at(tiny_bert)
    cut = after_cut(backbone, CUT | {"keep": 2, "ffn": 16, "vocabulary": {"keep": 100}}).shape
    table = after_cut(backbone, CUT | {"static": 50}).shape.parameters
    assert cut.embeddings == (100 + 64 + 2) * 32  # tokens, positions, and BERT's two types
    assert plan["models"]["pruned"] == plan["models"]["contrastive_only"]
    assert plan["models"]["pruned"]["parameters"] == cut.parameters
    assert phases["contrastive_only"]["disk_bytes"]["student"] == phases["prune"]["disk_bytes"]["student"]
    assert phases["contrastive_only"]["steps"] == 7
    assert phases["prune"]["flops"] > 0  # FFN units are scored

    static = phases["static"]
    assert static["steps"] == 24  # 800 queries in batches of 2 x 32, twice
    assert static["flops"] == 0 and static["lookups"] == pytest.approx(24 * 64 * 8 * 1.1)
    assert static["hours"] == pytest.approx(24 * 0.035 / 3600)
    assert {name: static["gpu_bytes"][name] / table for name in ("weights", "gradients", "optimizer")} == {
        "weights": 4,
        "gradients": 4,
        "optimizer": 8,
    }
    assert static["alternatives_gpu_bytes"] == {}  # nothing of it could be computed again
    assert static["disk_bytes"]["student"] == phases["static_cut"]["disk_bytes"]["student"] == 4 * table
    assert phases["static_cut"]["flops"] > 0  # the teacher encodes each token
    assert plan["launch"]["static"].endswith(f"recipes/align.py --config {folder}/static.yaml")
    assert plan["launch"]["contrastive_only"].endswith(f"recipes/refine.py --config {folder}/contrastive_only.yaml")
    assert not {"prune", "static_cut"} & set(plan["launch"])  # of one process


@pytest.mark.parametrize(("step", "student"), [("teacher", "merged model"), ("refine", "student")])
def test_each_rate_that_is_tried_trains_anew(folder, capsys, step, student):
    def phase():
        plan = json.loads(planned(folder, capsys, "--gpus", "2xH100", "--json"))
        return next(phase for phase in plan["phases"] if (phase["step"], phase["phase"]) == (step, "train"))

    path = folder / f"{step}.yaml"
    if step == "teacher":  # whose rate is chosen with the weight, or not at all
        path.write_text(path.read_text() + "merge_weight: auto\nsave_strategy: epoch\n")
    once = phase()
    path.write_text(path.read_text() + "try_learning_rates: [1e-4, 1e-3]\n")
    thrice = phase()
    assert thrice["steps"] == 3 * once["steps"] and thrice["flops"] == pytest.approx(3 * once["flops"])
    kept = {name: thrice["disk_bytes"][name] / held for name, held in once["disk_bytes"].items()}
    assert kept[student] == 1 and kept[CHECKPOINTS] == 3
    assert thrice["hours"] > 2 * once["hours"]


def test_the_choice_of_a_teacher_is_counted(folder, tiny_bert, capsys):
    path, given = folder / "teacher.yaml", (folder / "teacher.yaml").read_text()
    (folder / "plan.yaml").write_text((folder / "plan.yaml").read_text() + "dev_documents: 200\n")

    def phases(more):
        path.write_text(given + "dev_documents: 300\n" + more)
        plan = json.loads(planned(folder, capsys, "--gpus", "2xH100", "--json"))
        return {phase["phase"]: phase for phase in plan["phases"] if phase["step"] == "teacher"}

    fixed = phases("")
    once = fixed["dev retrieval"]["flops"] / 2  # before and after
    more = "merge_weight: [0.5, 1.0]\nsave_strategy: steps\nsave_steps: 4\n"  # nine steps: three checkpoints
    chosen = phases(more)
    assert chosen["dev retrieval"]["flops"] == pytest.approx((1 + 3 * 2) * once)
    assert chosen["train"]["disk_bytes"][CHECKPOINTS] == 3 / 2 * fixed["train"]["disk_bytes"][CHECKPOINTS]
    # With a weight that is given there is one rate.
    assert chosen["train"]["flops"] == phases("try_learning_rates: [1e-3]\n")["train"]["flops"]
    rates = phases(more + "try_learning_rates: [1e-3]\n")
    assert rates["dev retrieval"]["flops"] == pytest.approx((1 + 2 * 3 * 2) * once)
    assert rates["train"]["flops"] == pytest.approx(2 * chosen["train"]["flops"])
    # Nine steps are three epochs; the last step is evaluated after, too.
    for strategy, evaluated in (("epoch", 3), ("steps\neval_steps: 4", 3), ("steps\neval_steps: 3", 3)):
        assert phases(f"eval_strategy: {strategy}\n")["dev retrieval"]["flops"] == pytest.approx((2 + evaluated) * once)
    four = phases("max_steps: 4\neval_strategy: epoch\n")  # a whole epoch and a part of one
    assert four["dev retrieval"]["flops"] == pytest.approx((2 + 2) * once)


def test_where_nobody_judged_the_backbone_reads_the_catalogue(folder, capsys):
    path, sizes = folder / "teacher.yaml", (folder / "plan.yaml").read_text()
    path.write_text(path.read_text() + "merge_weight: auto\n")

    def names(sizes):
        (folder / "plan.yaml").write_text(sizes)
        plan = json.loads(planned(folder, capsys, "--json"))
        return [phase["phase"] for phase in plan["phases"] if phase["step"] == "teacher"]

    assert names(sizes) == ["judge typed queries", "train", "dev retrieval"]
    assert names(sizes + "dev_documents: 200\n") == ["train", "dev retrieval"]
    assert names(re.sub("unlabelled: .*", "unlabelled: 0", sizes)) == ["train", "dev retrieval"]
    notes = json.loads(planned(folder, capsys, "--json"))["notes"]
    assert notes[0].startswith("teacher: ") and notes[0].endswith("the backbone is handed on, untrained")
    assert 2 * MOST * DEPTH == AGREED_DOCUMENTS


def test_what_is_not_known_beforehand_is_said(folder, tiny_bert, capsys):
    (folder / "prune.yaml").write_text("model: t\noutput: p\nvocabulary: {min_count: 2}\n")
    text = planned(folder, capsys)
    lines = " ".join(text.split())
    whole = f"{model_at(tiny_bert).config.vocab_size:,}"
    assert "prune: how many tokens {min_count: 2} keeps is not known before the log is counted" in lines
    assert f"the whole table of {whole} is taken" in lines
    assert "static_cut: a table of at most " in lines and "a lookup a token, and no FLOPs" in lines
    (row,) = [line for line in text.splitlines() if line.startswith("  static: ") and "lookups" in line]
    assert "tokens, no layers" in row
    notes = json.loads(planned(folder, capsys, "--json"))["notes"]
    assert [note.split(":")[0] for note in notes] == ["prune", "static_cut"]


def test_a_run_file_is_planned_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("like: esci_mini\noutput: runs/mine\ndata: data\n")
    plan = json.loads(planned(tmp_path, capsys, "--documents", "6764", "--queries", "32000", "--json"))
    assert {"prune", "contrastive_only", "static_cut", "static"} <= {phase["step"] for phase in plan["phases"]}


def test_a_table_that_cannot_fit_is_refused_before_it_is_loaded(tiny_bert, tmp_path):
    saved_static(tiny_bert, NEW, len(NEW), tmp_path / "static")
    defaults = defaults_of(TrainingArguments)
    settings = defaults | defaults_of(STEPS["static"].settings) | {"student": str(tmp_path / "static")}
    check_step("align", settings, gpu=Gpu("Tiny-GPU", int(1.2 * 2**30), 0.0))
    with pytest.raises(HlmError, match="expected one with layers to cut, found a static student"):
        after_cut(model_at(settings["student"]), CUT | {"keep": 2})
    with pytest.raises(HlmError, match="cascade: expected none"):
        check_step("align", settings | {"cascade": [{"layers": 2}]})
    with pytest.raises(HlmError, match="align, stage 1: expected at most 0.1 GiB .*set per_device_train_batch") as told:
        check_step(
            "align", settings | {"per_device_train_batch_size": 10**6}, gpu=Gpu("Tiny-GPU", int(1.2 * 2**30), 0.0)
        )
    assert "checkpointing" not in str(told.value)
    (tmp_path / "static/model.safetensors").write_bytes(b"no table")
    with pytest.raises(HlmError, match="expected a table of tokens, found none"):
        check_step("align", settings)
