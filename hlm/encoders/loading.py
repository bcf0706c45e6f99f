"""Teacher and student as `SentenceTransformer`: loading, encoding, saving, and the fingerprint of an encoder."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tqdm import tqdm

from hlm.artefacts import HlmError, atomic_folder, write_manifest
from hlm.encoders.families import has_shifted_positions, longest_text
from hlm.encoders.fingerprint import fingerprint
from hlm.encoders.folder import MODULES, EncoderFolder
from hlm.encoders.layout import write_legacy_layout
from hlm.encoders.padding import right_padded
from hlm.encoders.static import of_stock
from hlm.progress import progress
from hlm.texts import as_texts, well_formed

Batch = TypeVar("Batch")
logger = logging.getLogger(__name__)

PACKAGE = "package:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(name_or_path: str) -> str:
    """A folder or Hub id that transformers understands: `package:<package>/<folder>` becomes the folder in the package.

    Raises:
        HlmError: the package is not installed, or has no such folder.
    """
    if not name_or_path.startswith(PACKAGE):
        return name_or_path
    package, _, inside = name_or_path[len(PACKAGE) :].partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise HlmError(
            f"expected an installed package '{package}' ({name_or_path}), found none; pip install "
            f"{package.replace('_', '-')}, or name a folder or a Hub id instead"
        )
    folder = Path(spec.submodule_search_locations[0]) / inside
    if not folder.is_dir():
        raise HlmError(f"expected a folder '{inside}' in the package '{package}', found none; correct {name_or_path}")
    return str(folder)


def devices() -> str:
    """What torch could compute on here, for messages."""
    if not torch.accelerator.is_available():
        built = "" if torch.version.cuda or torch.version.hip else ", a build for the CPU alone"
        return f"no GPU that torch {torch.__version__} can use{built}"
    kind, count = torch.accelerator.current_accelerator().type, torch.accelerator.device_count()
    return f"{kind}:0" if count == 1 else f"{kind}:0 to {kind}:{count - 1}"


def check_device(device: str | None, setting: str = "device") -> None:
    """Refuses a device that is not there, before any work.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps" ..., "accelerator" for whatever GPU there is; None is always fine.
        setting: its name in the message.

    Raises:
        HlmError: names what there is.
    """
    if device is None:
        return
    here = torch.accelerator.is_available()
    if device != "accelerator":
        try:
            wanted = torch.device(device)
        except RuntimeError as error:
            raise HlmError(f"{setting}: expected cpu, cuda or cuda:<number>, found {device!r}") from error
        if wanted.type in ("cpu", "meta"):
            return
        here = here and wanted.type == torch.accelerator.current_accelerator().type
        here = here and (wanted.index or 0) < torch.accelerator.device_count()
    if not here:
        asked = "a GPU" if device == "accelerator" else device
        raise HlmError(f"{setting}: expected {asked}, found {devices()}; leave it out, or run where there is one")


def find_encoder(name_or_path: str) -> str:
    """What `load_encoder` would load, without loading it: a sentence-transformers folder that is there, or a Hub id.

    Raises:
        HlmError: no such folder or package, or a bare backbone.
    """
    source = resolve(str(name_or_path))
    folder = Path(source)
    if folder.is_dir():
        if not (folder / MODULES).is_file():
            raise HlmError(
                f"expected a sentence-transformers folder at {folder}, found no modules.json; a bare backbone would be "
                "loaded with mean pooling and no normalisation: save the whole SentenceTransformer there"
            )
    elif source.startswith((".", "/")) or source.count("/") > 1:
        raise HlmError(f"expected a model folder at {source}, found none; run the step that writes it")
    return source


def load_encoder(
    name_or_path: str,
    *,
    device: str | None = None,
    dtype: str = "float32",
    max_seq_length: int | None = None,
    revision: str | None = None,
) -> SentenceTransformer:
    """Loads an encoder from a folder, the Hub or an installed package (`package:<package>/<folder in it>`).

    Args:
        name_or_path: A whole sentence-transformers folder (with modules.json) or a Hub id.
        device: For example "cpu" or "cuda:0"; None takes what sentence-transformers takes.
        dtype: "float32" (what a student trains in), "bfloat16" or "float16". Never the checkpoint's own by accident.
        max_seq_length: Tokens a text is cut to, the special ones counted; None keeps the model's own limit.
        revision: Branch, tag or commit of a Hub repository.

    Raises:
        HlmError: nothing to load there, a bare backbone (whose pooling would be guessed), an unknown dtype, or a device
            that is not there.
    """
    check_device(device)
    if dtype not in DTYPES:
        raise HlmError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    source = find_encoder(name_or_path)
    if Path(source).is_dir():
        _check_modules(EncoderFolder(source))
    try:
        model = SentenceTransformer(
            source, device=device, revision=revision, model_kwargs={"dtype": DTYPES[dtype]}, trust_remote_code=False
        )
    except Exception as error:  # damaged files end in whatever the libraries that read them raise, Exception included
        raise HlmError(
            f"could not load the model {source} ({type(error).__name__}: {error}); expected a whole folder or a "
            "reachable Hub id: copy or pull it again"
        ) from error
    if isinstance(model[0], modules.StaticEmbedding):
        model[0] = of_stock(model[0])
        model.to(dtype=DTYPES[dtype])
    elif not isinstance(model[0], Transformer) or not any(isinstance(module, Pooling) for module in model):
        found = ", ".join(type(module).__name__ for module in model)
        raise HlmError(
            f"expected a Transformer with Pooling at {source}, found {found}; use a single-route text encoder"
        )
    if not isinstance(model[-1], Normalize):
        model.append(Normalize())  # every vector of HLM has length 1; the flag is part of what is saved
    if max_seq_length is not None:
        model.max_seq_length = max_seq_length
    config = getattr(getattr(model[0], "model", None), "config", {})  # a static encoder has none
    longest, limit = longest_text(config), model.max_seq_length
    if has_shifted_positions(config) and longest is not None and (limit is None or limit > longest):
        model.max_seq_length = longest  # sentence-transformers counts rows that stand for no token
    return model.eval()


def _check_modules(files: EncoderFolder) -> None:
    """Refuses modules other than sentence-transformers' own: their types name what is imported.

    Raises:
        HlmError: another module, or no list of modules.
    """
    homes = ("sentence_transformers.models", "sentence_transformers.sentence_transformer.modules")
    known = {f"{home}.{name}" for home in homes for name in modules.__all__}
    known |= {f"{part.__module__}.{part.__name__}" for part in (getattr(modules, name) for name in modules.__all__)}
    for module in files.modules():
        if module.type not in known:
            raise HlmError(
                f"{files.folder / MODULES}: expected a module of sentence-transformers, found {module.type!r}; nothing "
                "of another package is loaded: use a model without code of its own"
            )


def prompt_of(model: SentenceTransformer, prompt_name: str | None) -> str:
    """The text that goes before every input of this role; "" where the model has none."""
    return (model.prompts or {}).get(prompt_name) or "" if prompt_name else ""


def tokenise(
    model: SentenceTransformer, texts: list[str], prompt: str = "", limit: int | None = None
) -> list[list[int]]:
    """Token ids of each text with the model's own special tokens, cut to `limit` or else to the model's
    `max_seq_length`; nothing is padded.

    The tokenizer's post-processor places the special tokens, after truncation too: for Qwen3 that is the pooled
    `<|endoftext|>`, which `tokenizer.eos_token` does not name. Half a surrogate pair counts as U+FFFD.

    Raises:
        HlmError: a text that is no str.
    """
    limit, prompt = limit or model.max_seq_length, well_formed(prompt)
    texts = [prompt + text for text in as_texts(texts)]
    return model.tokenizer(texts, truncation=limit is not None, max_length=limit, padding=False)["input_ids"]


def pad(model: SentenceTransformer, ids: list[list[int]]) -> dict[str, torch.Tensor]:
    """`pad_rows` with the model's own padding token."""
    return pad_rows(ids, pad_id(model))


def pad_id(model: SentenceTransformer) -> int:
    """The token that rows are filled up with; 0 where the tokenizer names none (the mask hides it)."""
    fill = model.tokenizer.pad_token_id
    return 0 if fill is None else fill


def pad_rows(ids: Sequence[Sequence[int] | np.ndarray], fill: int) -> dict[str, torch.Tensor]:
    """Right-padded int64 `input_ids` and `attention_mask` of shape (rows, longest row).

    Right padding with last-token pooling gives the same vectors as left padding and keeps the fast causal kernel.
    """
    longest = max(map(len, ids))
    rows = np.full((len(ids), longest), fill, dtype=np.int64)
    mask = np.zeros_like(rows)
    for row, tokens in enumerate(ids):
        rows[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return {"input_ids": torch.from_numpy(rows), "attention_mask": torch.from_numpy(mask)}


def token_batches(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Row numbers in batches of similar length: rows x longest stays within `batch_tokens` (one row at the least)."""
    order = np.argsort(lengths, kind="stable")[::-1]
    batches, start = [], 0
    while start < len(order):
        rows = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + rows])
        start += rows
    return batches


@torch.inference_mode()
def encode(
    model: SentenceTransformer,
    texts: list[str],
    *,
    prompt_name: str | None = None,
    dim: int | None = None,
    batch_tokens: int = 4096,
    bar: tqdm | None = None,
) -> np.ndarray:
    """Encodes texts in batches of similar length.

    Args:
        prompt_name: "query" or "document": the prompt of that role goes before every text.
        dim: Keep the first `dim` values and normalise again (Matryoshka); None keeps all.
        batch_tokens: Padded tokens a batch holds at the most.
        bar: Counts the texts, instead of a bar of this call's own.

    Returns:
        float32 (len(texts), dim), rows L2-normalised, in the order of `texts`.

    Raises:
        HlmError: `dim` outside 1 ... the model's width, or a text that is no str.
    """
    width = model.get_embedding_dimension()
    if dim is not None and not 1 <= dim <= width:
        raise HlmError(f"dim: expected 1 to {width} (the width of the model), found {dim}")
    texts = as_texts(texts)
    out = np.empty((len(texts), dim or width), dtype=np.float32)
    if not texts:
        return out
    was_training = model.training
    model.eval()
    ids = tokenise(model, texts, prompt_of(model, prompt_name))
    batches = token_batches(np.array([len(tokens) for tokens in ids]), batch_tokens)
    own = progress(what="encode", unit="text", total=len(texts), shown=bar is None and len(batches) > 1)

    def begun(rows: np.ndarray) -> Callable[[], np.ndarray]:
        features = {name: sent(value, model.device) for name, value in pad(model, [ids[n] for n in rows]).items()}
        vectors = model(features)["sentence_embedding"].float()[:, : dim or width]
        return fetched(torch.nn.functional.normalize(vectors, dim=-1))

    with right_padded(model), own:
        for rows, vectors in one_ahead((rows, begun(rows)) for rows in batches):
            out[rows] = vectors
            (own if bar is None else bar).update(len(rows))
    model.train(was_training)
    return out


def one_ahead(batches: Iterable[tuple[Batch, Callable[[], np.ndarray]]]) -> Iterator[tuple[Batch, np.ndarray]]:
    """Each batch with what was begun for it (see `fetched`), in order, waited for when the next one is begun: a GPU
    computes a batch while the caller deals with the one before."""
    waiting: tuple[Batch, Callable[[], np.ndarray]] | None = None
    for started in batches:
        if waiting:
            yield waiting[0], waiting[1]()
        waiting = started
    if waiting:
        yield waiting[0], waiting[1]()


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; to a GPU without waiting for what it still computes."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fetched(vectors: torch.Tensor) -> Callable[[], np.ndarray]:
    """Begins the copy to the host; what it gives waits for it. From a GPU the array is a view of pinned memory."""
    if vectors.device.type != "cuda":
        return vectors.cpu().numpy
    host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
    host.copy_(vectors, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(vectors.device))

    def wait() -> np.ndarray:
        done.synchronize()
        return host.numpy()

    return wait


def save_encoder(
    model: SentenceTransformer,
    folder: str | Path,
    kind: str,
    *,
    beside: Callable[[Path], None] | None = None,
    **manifest: Any,
) -> None:
    """Writes the whole sentence-transformers folder and its `hlm.json`, aside first, then renamed.

    The layout is the one that every reader knows, see `hlm.encoders.layout`.

    Args:
        kind: "teacher" or "student".
        beside: writes more into the folder before it takes its name.
        manifest: `inputs`, `config` and further facts for `write_manifest`; the encoder's fingerprint is added.
    """
    with atomic_folder(folder, kind) as aside:
        model.save_pretrained(str(aside), create_model_card=False)
        write_legacy_layout(aside)
        if beside is not None:
            beside(aside)
        encoder = fingerprint(model)
        write_manifest(aside, kind, encoder=encoder, dim=model.get_embedding_dimension(), **manifest)
    logger.info("%s: %s %s", folder, kind, encoder)


def add_head(model: SentenceTransformer, student: np.ndarray, teacher: np.ndarray) -> SentenceTransformer:
    """Puts a linear head before the normalisation, in place and inside the model, so that it is saved and loaded.

    It starts from the least-squares map of sample vectors: a random one would waste the first thousand steps. Their
    directions of less than a thousandth of the largest singular value are left out: noise there makes huge weights.

    Args:
        student: float32 (n, the model's width), the model's vectors of a sample of queries.
        teacher: float32 (n, the teacher's width), the teacher's vectors of the same queries.
    """
    from sentence_transformers.sentence_transformer.modules import Dense

    weight, *_ = np.linalg.lstsq(student, teacher, rcond=1e-3)
    head = Dense(student.shape[1], teacher.shape[1], bias=False, activation_function=torch.nn.Identity())
    head.linear.weight.data.copy_(torch.from_numpy(weight.T.copy()))
    model.insert(len(model) - 1, head.to(model.device))
    return model
