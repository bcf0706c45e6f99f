"""What a backbone costs, against counted parameters, counted FLOPs and bytes measured in real training steps."""

import contextlib
import json
import os
import subprocess
import sys

import children
import pytest
import torch
from hub_faults import Always
from hub_server import HubServer
from live_bytes import LiveBytes
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, BertConfig, Gemma3TextConfig, ModernBertConfig, Qwen3Config

from hlm.artefacts import HlmError
from hlm.encoders.lora import leave_casts_to_autocast
from hlm.encoders.pruning import cut_config, parameter_counts
from hlm.planning.footprint import (
    Precision,
    Shape,
    backbone_config,
    forward_flops,
    inference_memory,
    saved_bytes,
    training_flops,
    training_memory,
)

QWEN3 = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 512}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BF16, FP32 = "bfloat16", "float32"
KINDS = ["qwen3", "bert", "modernbert", "gemma3_text"]
PRECISIONS = [
    Precision(),
    Precision(autocast=True),
    Precision(lora_rank=12),
    Precision(BF16, autocast=True, lora_rank=12),
    Precision(autocast=True, lora_rank=12),
    Precision(BF16, lora_rank=12),
]


def config_of(kind, layers=3, hidden=48, ffn=160, vocabulary=300, **more):
    common = {"vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": ffn}
    if kind == "qwen3":
        return Qwen3Config(**common | QWEN3 | {"use_cache": False} | more)  # sentence-transformers turns the cache off
    if kind == "modernbert":
        return ModernBertConfig(**common | SPECIAL | {"cls_token_id": 1, "sep_token_id": 2, "num_attention_heads": 4})
    if kind == "gemma3_text":
        own = {"use_cache": False, "use_bidirectional_attention": True, "query_pre_attn_scalar": 24}
        return Gemma3TextConfig(**common | QWEN3 | SPECIAL | own)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(**common | dropout | {"num_attention_heads": 4} | more)


def model_of(config, precision=None, device="cpu"):
    """A real model of this precision, LoRA on, ready to train."""
    precision = precision or Precision()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModel.from_config(config, dtype=getattr(torch, precision.weights)).train()
        if precision.lora_rank:
            lora = LoraConfig(
                r=precision.lora_rank,
                target_modules="all-linear",
                exclude_modules=r".*pooler.*",
                task_type="FEATURE_EXTRACTION",
            )
            model = get_peft_model(model, lora)
            leave_casts_to_autocast(model)
    return model


def batch_of(rows, tokens):
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    mask = torch.ones_like(ids)
    if rows > 1 and type(mask) is torch.Tensor:
        mask[0, -3:] = 0  # some padding, as in every real batch
    return {"input_ids": ids, "attention_mask": mask}


def checkpointed(model):
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def step_peak(model, precision, batch):
    """Measured peak bytes of a training step with AdamW, gradients of the step before still there."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    live = LiveBytes([*model.parameters(), *model.buffers(), *batch.values()])

    def backward():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision.autocast):
            loss = model(**batch).last_hidden_state[:, -1].float().square().sum()
        loss.backward()

    with live:
        backward()
        optimizer.step()
        live.peak = live.now
        backward()
        optimizer.step()
    return live.peak


# ---- parameters


@pytest.mark.parametrize(
    "name, total, embeddings",
    [
        ("0.6B", 595_776_512, 151_669 * 1024),
        ("4B", 4_021_774_336, 151_665 * 2560),
        ("8B", 7_567_295_488, 151_665 * 4096),
    ],
)
def test_the_shipped_shapes_have_the_published_counts(name, total, embeddings):
    shape = Shape.of(backbone_config(f"Qwen/Qwen3-Embedding-{name}"))
    assert (shape.parameters, shape.embeddings) == (total, embeddings)
    assert shape.gated and shape.qk_norm and shape.head_dim == 128 and shape.kv_heads == 8


@pytest.mark.parametrize("kind", KINDS)
def test_lora_counts_are_pefts(kind):
    config = config_of(kind)
    model = model_of(config, Precision(lora_rank=12), "meta")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert Shape.of(config).lora_parameters(12) == trained


def test_lora_count_of_the_papers_teacher_is_pefts():
    config = cut_config(backbone_config("Qwen/Qwen3-Embedding-8B"), 2, 12288)  # every layer is alike
    model = model_of(config, Precision(BF16, lora_rank=256), "meta")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert Shape.of(config).lora_parameters(256) == trained
    assert trained * 18 == Shape.of(backbone_config("Qwen/Qwen3-Embedding-8B")).lora_parameters(256) == 698_351_616


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_shape_is_the_cut_models(kind):
    shape = Shape.of(config_of(kind, layers=6), layers=2, ffn_width=40)
    real = AutoModel.from_config(config_of(kind, layers=2, ffn=40))
    assert (shape.parameters, shape.parameters - shape.embeddings) == parameter_counts(real)
    assert (shape.layers, shape.ffn) == (2, 40)


def test_config_of_a_saved_model_and_of_none(tiny_qwen3, tmp_path):
    assert backbone_config(tiny_qwen3).hidden_size == 32
    with pytest.raises(HlmError, match="shipped: qwen3-embedding-0.6b, qwen3-embedding-4b, qwen3-embedding-8b"):
        backbone_config("Qwen/Qwen3-Embedding-9B")
    (tmp_path / "qwen3-embedding-8b").mkdir()
    with pytest.raises(HlmError, match="found none"):  # an empty folder is no reason to take the shipped shape
        backbone_config(str(tmp_path / "qwen3-embedding-8b"))
    nested = tmp_path / "nested"
    (nested / "0_Transformer").mkdir(parents=True)
    config_of("bert").save_pretrained(nested / "0_Transformer")
    (nested / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "0_Transformer", "type": "x"}]))
    assert backbone_config(str(nested)).model_type == "bert"


MADE = """
import sys
from huggingface_hub import HfApi
for name in ("acme/bert", "acme/empty"):
    HfApi().create_repo(name)
HfApi().upload_file(path_or_fileobj=sys.argv[1], path_in_repo="config.json", repo_id="acme/bert")
"""
# One process answers all questions: to import what it needs takes seconds.
ASKED = """
import sys
from hlm.artefacts import HlmError
from hlm.planning.footprint import backbone_config, encoder_width
for line in sys.stdin:
    what, name = line.split()
    try:
        print(encoder_width(name) if what == "width" else backbone_config(name).hidden_size, flush=True)
    except HlmError as error:
        print(error, flush=True)
"""


def test_the_hub_is_asked_once_and_of_shipped_shapes_never(tmp_path):
    """Counted in requests: huggingface_hub asks six times in half a minute where the Hub is out of reach."""
    with HubServer(tmp_path / "hub") as hub:
        environment = os.environ | hub.environment("acme", home=tmp_path / "home")

        config_of("bert").save_pretrained(tmp_path / "bert")
        command = [sys.executable, "-c", MADE, str(tmp_path / "bert/config.json")]
        children.run(command, check=True, env=environment, timeout=100)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        with children.Popen([sys.executable, "-c", ASKED], **pipes) as process:

            def ran(what, name):
                hub.log.clear()
                process.stdin.write(f"{what} {name}\n")
                process.stdin.flush()
                return process.stdout.readline().strip(), len(hub.log)

            assert ran("config", "Qwen/Qwen3-Embedding-8B") == ("4096", 0)
            assert ran("config", "qwen/qwen3-embedding-0.6b") == ("1024", 0)
            assert ran("width", "acme/bert")[0] == "48"
            assert "at 'acme/empty', found none" in ran("config", "acme/empty")[0]
            unknown, _ = ran("config", "acme/none")
            assert "at 'acme/none', found none" in unknown and "404" in unknown and "shipped: qwen3-emb" in unknown
            hub.faults = Always(1, "503")
            assert ran("config", "acme/bert") == ("48", 1)  # as it was seen last
            assert ran("config", "mirror/Qwen3-Embedding-8B") == ("4096", 1)
            unknown, asked = ran("config", "acme/other")
            assert asked == 1 and "503" in unknown and "name a folder or a reachable Hub id" in unknown
            process.stdin.close()


def test_what_cannot_be_is_refused():
    with pytest.raises(HlmError, match="nearest that works is 3"):
        Shape.of(config_of("qwen3"), layers=4)
    with pytest.raises(HlmError, match="nearest that works is 160"):
        Shape.of(config_of("qwen3"), ffn_width=161)
    with pytest.raises(HlmError, match="dtype: .*'int8'"):
        Precision("int8")
    with pytest.raises(HlmError, match="lora_rank: .*0"):
        Precision(lora_rank=0)


# ---- memory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_layer_keeps_the_bytes_that_autograd_saves(kind, precision):
    """What three layers save more than two, by saved-tensor hooks: exactly, or within a tenth of the other families."""
    rows, tokens, saved = 4, 24, []
    for layers in (2, 3):
        model = model_of(config_of(kind, layers), precision)
        own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
        kept = {}

        def keep(value, own=own, kept=kept):
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = (storage.nbytes(), value)  # held, or its address would be used again
            return value

        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision.autocast)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), autocast:
            model(**batch_of(rows, tokens)).last_hidden_state.sum()
        saved.append(sum(size for size, _ in kept.values()))
    shape = Shape.of(config_of(kind))
    copies = 0
    if precision.autocast:  # half-precision copies of weights: the adapter's, or all; frozen fp32 ones are cast as well
        rank = precision.lora_rank
        copies = 2 * (shape.lora_parameters(rank) // shape.layers if rank else shape.layer_weights)
        copies += 2 * shape.layer_weights if rank and precision.weights == FP32 else 0
    planned = rows * tokens * saved_bytes(shape, tokens, precision) + copies
    exact = kind in ("qwen3", "bert")
    assert saved[1] - saved[0] == (planned if exact else pytest.approx(planned, rel=0.1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "precision, checkpointing", [*((each, False) for each in PRECISIONS), *((each, True) for each in PRECISIONS[:4])]
)
def test_the_peak_of_a_step_is_the_measured_one(kind, precision, checkpointing):
    """Within 6% (12% of the other families), weights, gradients and optimizer included: a real step on the CPU, every
    allocation counted."""
    config = config_of(kind, layers=4, hidden=64, ffn=192)
    model = model_of(config, precision)
    if checkpointing:
        checkpointed(model)
    measured = step_peak(model, precision, batch_of(16, 32))
    planned = training_memory(Shape.of(config), [(16, 32)], precision, checkpointing=checkpointing)
    assert sum(planned.values()) == pytest.approx(measured, rel=0.06 if kind in ("qwen3", "bert") else 0.12)


@pytest.mark.parametrize(
    "name, cut, precision, rows, tokens, checkpointing",
    [
        ("0.6B", (4, 768), Precision(autocast=True), 512, 64, False),  # the paper's student, whole
        ("8B", (3, None), Precision(BF16, autocast=True, lora_rank=256), 16, 256, False),  # its teacher: 3 of 36 layers
        ("8B", (3, None), Precision(BF16, autocast=True, lora_rank=256), 16, 256, True),
    ],
)
def test_the_peak_at_true_shapes(name, cut, precision, rows, tokens, checkpointing):
    """Within 7% of the allocations of a step without data: fake tensors have sizes and lifetimes, no content."""
    config = backbone_config(f"Qwen/Qwen3-Embedding-{name}")
    shape = Shape.of(config, *cut)
    config = cut_config(config, shape.layers, shape.ffn)
    config.use_cache = False
    model = model_of(config, precision, "meta")
    with real_sizes(model):
        if checkpointing:
            checkpointed(model)
        measured = step_peak(model, precision, batch_of(rows, tokens))
    planned = training_memory(shape, [(rows, tokens)], precision, checkpointing=checkpointing)
    assert sum(planned.values()) == pytest.approx(measured, rel=0.07)


@contextlib.contextmanager
def real_sizes(model):
    """Gives a model on the meta device fake tensors that pass for ones on the CPU."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode():
            model._apply(lambda value: torch.empty(value.shape, dtype=value.dtype, device="cpu"))
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize("kind", ["qwen3", "bert"])
def test_encoding_peaks_where_it_was_measured(kind):
    config = config_of(kind, hidden=64, ffn=192)
    model = model_of(config).eval()
    batch = batch_of(32, 40)
    live = LiveBytes([*model.parameters(), *model.buffers(), *batch.values()])
    with live, torch.inference_mode():
        model(**batch)
    assert sum(inference_memory(Shape.of(config), 32, 40, FP32).values()) == pytest.approx(live.peak, rel=0.1)


def test_more_gpus_add_buckets_and_sharding_splits():
    shape = Shape.of(config_of("qwen3"))
    one = training_memory(shape, [(8, 16)], Precision())
    two = training_memory(shape, [(8, 16)], Precision(), gpus=2)
    split = training_memory(shape, [(8, 16)], Precision(), gpus=2, sharded=True)
    assert two == one | {"DDP buckets": 4 * shape.parameters}
    assert [2 * split[name] for name in ("weights", "gradients", "optimizer")] == [
        one[name] for name in ("weights", "gradients", "optimizer")
    ]
    assert split["gathered"] == 4 * (2 * shape.layer_weights + shape.embeddings)


# ---- FLOPs


@pytest.mark.parametrize("kind", ["qwen3", "bert"])
@pytest.mark.parametrize("rank, checkpointing", [(None, False), (None, True), (12, False), (12, True)])
def test_flops_are_the_counted_ones(kind, rank, checkpointing):
    # Attention written out: the counter does not know the CPU's fused kernel.
    config = config_of(kind, layers=4, attn_implementation="eager")
    model, shape = model_of(config, Precision(lora_rank=rank)), Shape.of(config)
    if checkpointing:
        checkpointed(model)
    with FlopCounterMode(display=False) as counter:
        out = model(**batch_of(4, 24)).last_hidden_state
    adapter = 2 * 4 * 24 * shape.lora_parameters(rank) if rank else 0
    pooler = 2 * 4 * 48 * 48 if kind == "bert" else 0
    # Older transformers multiply positions by frequencies as matrices.
    by_module = counter.get_flop_counts().items()
    rotary = sum(sum(counts.values()) for name, counts in by_module if name.endswith("rotary_emb"))
    assert counter.get_total_flops() == forward_flops(shape, 4, 24) + adapter + pooler + rotary
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    total = counter.get_total_flops() + backward.get_total_flops() - pooler
    # Nothing below the first layer needs a gradient under LoRA, and recomputation ends at the last tensor needed.
    planned = training_flops(shape, 4, 24, lora_rank=rank, checkpointing=checkpointing)
    assert total == pytest.approx(planned, rel=0.08)
    caching = training_flops(shape, 4, 24, lora_rank=rank, caching=True)
    assert caching == training_flops(shape, 4, 24, lora_rank=rank) + counter.get_total_flops() - pooler - rotary
