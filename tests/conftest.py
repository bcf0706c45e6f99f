"""Real tiny models made from config and a small catalogue, shared by the tests; nothing is fetched."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal

# Sums of two threads end in other bits than those of one.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

from pathlib import Path

import pytest
import torch
from browser import chromium
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
)

# A shell starts what runs in the background deaf to these, and so is what tests start and end by them.
for number, heard in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, heard)

LONGEST = ("test_two_processes.py", "test_wheel.py", "test_gpu_check.py", "test_compare.py", "test_measure_publish.py",
           "test_publish.py", "test_recipes.py", "test_checkpoints.py", "test_export.py")  # fmt: skip
LAYERS, HIDDEN, FFN = 6, 32, 64
WORDS = """red blue green black white steel wooden cotton small large cheap new used laptop notebook printer camera
phone charger cable shoe boot jacket kettle vacuum cleaner drill saw lamp desk chair bike helmet tent bottle litre inch
with without for and the a of in 1 2 3 4 5 6 7 8 9 0""".split()


def sentence_transformer(backbone, tokenizer, folder: Path, pooling: str, prompts: dict[str, str], heads=()) -> str:
    bare = folder / "bare"
    backbone.save_pretrained(bare)
    tokenizer.save_pretrained(bare)
    transformer = Transformer(str(bare))
    transformer.max_seq_length = 48
    model = SentenceTransformer(
        modules=[transformer, Pooling(HIDDEN, pooling_mode=pooling), *heads, Normalize()], prompts=prompts, device="cpu"
    )
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return str(folder / "model")


def pytest_collection_modifyitems(items):
    """The longest first, or one worker has them left when the other is done. Within a module the order stays."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish():
    """What is imported by now stays: without it a collection of garbage visits little, which saves a sixth of the time
    of what makes many objects, such as exports, and the whole visit at the end of the process."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def handlers_and_levels():
    """Takes back what a test leaves in its process: the handler of SIGCHLD that torch's data loader never removes, and
    the logging levels of a recipe that ran as a program."""
    handler, root = signal.getsignal(signal.SIGCHLD), logging.getLogger()
    loggers = {name: logging.getLogger(name) for name in ("hlm", "recipes", "__main__")}
    levels = {name: logger.level for name, logger in loggers.items()} | {"": root.level}
    yield
    signal.signal(signal.SIGCHLD, handler if handler is not None else signal.SIG_DFL)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> str:
    """A BERT of 6 layers, 32 wide, FFN 64, mean pooling, no prompts: the path of a sentence-transformers folder."""
    # The vocabulary is written out: a trained one breaks ties differently in every process.
    characters = [chr(code) for code in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters), *WORDS]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=48,
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=FFN,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return sentence_transformer(BertModel(config), fast, tmp_path_factory.mktemp("tiny_bert"), "mean", {})


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory) -> str:
    """A Qwen3 of 6 layers, 32 wide, FFN 64, last-token pooling, with an instruction for queries.

    As with Qwen3-Embedding, the tokenizer's post-processor appends `<|endoftext|>` while `eos_token` is `<|im_end|>`.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = list(
        dict.fromkeys(
            (text[:end], text[end]) for word in WORDS for text in (word, f"Ġ{word}") for end in range(1, len(text))
        )
    )
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", model_max_length=48
    )
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=FFN,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    prompts = {"query": "Instruct: find the ad\nQuery:", "document": ""}
    return sentence_transformer(Qwen3Model(config), fast, tmp_path_factory.mktemp("tiny_qwen3"), "lasttoken", prompts)


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory, tiny_bert, tiny_qwen3):
    """model_type -> the path of a model of that family, 32 wide, FFN 64, six layers.

    Gemma 3 is EmbeddingGemma's: attention to both sides, a window in five of six layers, mean pooling, two heads and
    prompts. The windows of ModernBERT and Gemma 3 are shorter than texts can be.
    """
    made: dict[str, str] = {}

    def make(name: str) -> str:
        if name not in made:
            tokenizer = SentenceTransformer(tiny_bert if name in WORDPIECE else tiny_qwen3, device="cpu").tokenizer
            config = CONFIG_MAPPING[name](**family_settings(name, tokenizer))
            torch.manual_seed(0)
            backbone = AutoModel.from_config(config)
            gemma = name == "gemma3_text"
            path = sentence_transformer(
                backbone,
                tokenizer,
                tmp_path_factory.mktemp(name),
                "lasttoken" if name in CAUSAL else "mean",
                {"query": "task: search result | query: ", "document": "title: none | text: "} if gemma else {},
                [
                    Dense(HIDDEN, 64, bias=False, activation_function=torch.nn.Identity()),
                    Dense(64, HIDDEN, bias=False, activation_function=torch.nn.Identity()),
                ]
                if gemma
                else [],
            )
            made[name] = path
        return made[name]

    return make


WORDPIECE = ("bert", "distilbert", "electra", "ernie", "megatron-bert", "modernbert")
CAUSAL = ("qwen2", "qwen3", "llama", "mistral")


def family_settings(name: str, tokenizer) -> dict[str, object]:
    # The row of a padding token is zero, and so is the vector of a text of nothing else: of none that ends all texts.
    pad = {} if name in CAUSAL else {"pad_token_id": 0 if name in WORDPIECE else 1}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "initializer_range": 0.2} | pad
    if name == "distilbert":
        return sizes | {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": FFN}
    sizes |= {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": FFN}
    if name == "electra":
        return sizes | {"embedding_size": 16}
    if name == "modernbert":
        ids = {f"{kind}_token_id": tokenizer.cls_token_id for kind in ("bos", "cls", "eos", "sep")}
        return sizes | ids | {"local_attention": 8, "global_attn_every_n_layers": 3}
    if name == "gemma3_text":
        own = {"query_pre_attn_scalar": 8, "sliding_window": 8, "use_bidirectional_attention": True, "eos_token_id": 0}
        return sizes | {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 2} | own
    return sizes | ({"num_key_value_heads": 2} if name in CAUSAL else {})


def exported(folder: str, home: Path) -> Path:
    """The encoder as a student with its ONNX files. Tracing one takes seconds: tests that write take a copy."""
    from hlm.artefacts import write_manifest
    from hlm.serving.export import export

    home = shutil.copytree(folder, home / "student")
    made = {"inputs": {"teacher": "t" * 16}, "config": {}, "encoder": "e" * 16, "dim": HIDDEN}
    write_manifest(home, "student", **made, onnx=export(str(home), home))
    return home


@pytest.fixture(scope="session")
def online_bert(tiny_bert, tmp_path_factory) -> Path:
    return exported(tiny_bert, tmp_path_factory.mktemp("online_bert"))


@pytest.fixture(scope="session")
def online_qwen3(tiny_qwen3, tmp_path_factory) -> Path:
    """Of two layers: tracing takes a second a layer."""
    from hlm.encoders.loading import load_encoder
    from hlm.encoders.pruning import prune

    home = tmp_path_factory.mktemp("online_qwen3")
    shallow = prune(load_encoder(tiny_qwen3, device="cpu"), layers=[0, 5])
    shallow.save_pretrained(str(home / "shallow"), create_model_card=False)
    return exported(str(home / "shallow"), home)


@pytest.fixture(scope="session")
def catalogue_200(tmp_path_factory) -> str:
    """The sample catalogue at 200 ads, in the data contract."""
    from hlm.data.sample_catalogue import write_catalogue

    folder = tmp_path_factory.mktemp("catalogue") / "data"
    write_catalogue(folder, ads=200, unlabelled=400, train_queries=150, dev_queries=20, test_queries=80, seed=0)
    return str(folder)


@pytest.fixture(scope="module")
def browser():
    """Chromium."""
    with chromium() as started:
        yield started
