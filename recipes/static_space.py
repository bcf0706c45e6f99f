"""Writes the demo that runs in the browser alone: the student under transformers.js, ads as int8 vectors.

    npm ci --ignore-scripts --prefix tests/node
    python recipes/static_space.py --config recipes/configs/quickstart/static_space.yaml
    python -m http.server --directory runs/quickstart/static

The folder is whole in itself: any file server serves it, and nothing is fetched from elsewhere.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hlm.artefacts import HlmError, atomic_folder, check_output, write_manifest
from hlm.config import parse, run_recipe
from hlm.data.contract import iterate, load
from hlm.demo.comparison import ad_texts, is_synthetic, stored_teacher
from hlm.demo.examples import choose_examples
from hlm.encoders.folder import GRAPHS
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.lineage import open_fitting, read_student
from hlm.serving.query_encoder import QueryEncoder
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)
KIND = "static_space"
PAGE = Path(__file__).resolve().parent.parent / "spaces/query_to_ad_static"
# Under node_modules -> under lib/
LIBRARY = {
    "@huggingface/transformers/dist/transformers.min.js": "transformers.min.js",
    "@huggingface/transformers/LICENSE": "LICENSE.transformers.js",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs": "ort-wasm-simd-threaded.asyncify.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm": "ort-wasm-simd-threaded.asyncify.wasm",
    "onnxruntime-web/package.json": "onnxruntime-web.package.json",  # names its licence, MIT
}
DTYPES = {"int8": "q8", "fp32": "fp32"}  # as transformers.js names them
TAUGHT = 50  # ads of the teacher kept for each example: as many as the page shows at most (MAX_K in app.js)
MAX_TEXT = 300  # characters of an ad's text that are sent; the page shows 240


@dataclass
class StaticSpaceConfig:
    student: str = field(metadata={"help": "the online folder: the student with its ONNX files"})
    data: str = field(metadata={"help": "the catalogue: a folder or a Hub id"})
    vectors: str = field(metadata={"help": "the teacher's stores: corpus, and queries for the examples"})
    output: str = field(metadata={"help": "folder to serve"})
    ads: int = field(default=20_000, metadata={"help": "at most so many, the first of the catalogue"})
    examples: list[str] = field(
        default_factory=list, metadata={"help": "queries to click; none: chosen from the judgements"}
    )
    precision: str = field(default="int8", metadata={"help": "of the student: int8 or fp32"})
    node_modules: str = field(default="tests/node/node_modules", metadata={"help": "with @huggingface/transformers"})


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(StaticSpaceConfig, argv=argv)
    if config.precision not in DTYPES or config.ads < 1:
        raise HlmError(f"expected precision int8 or fp32 and 1 ad or more, found {config.precision} and {config.ads}")
    library = {Path(config.node_modules) / source: name for source, name in LIBRARY.items()}
    if absent := [str(path) for path in library if not path.is_file()]:
        raise HlmError(
            f"node_modules: expected transformers.js there, found no {', '.join(absent)}; run `npm ci --ignore-scripts "
            "--prefix tests/node`, or name a folder where @huggingface/transformers was installed"
        )
    output = check_output(config.output, KIND)
    student = QueryEncoder.from_pretrained(config.student, precision=config.precision)
    store: Any = open_fitting(Path(config.vectors) / "corpus", read_student(config.student), "vectors")
    data = load(config.data, splits=() if config.examples else ("test", "dev"), skip_bad_rows=True)
    store.check(source=data.fingerprint("corpus"))
    with atomic_folder(output, KIND) as folder:
        shutil.copytree(PAGE, folder, dirs_exist_ok=True)
        (folder / "lib").mkdir()
        for path, name in library.items():
            shutil.copyfile(path, folder / "lib" / name)
        write_student(config, folder / "student")
        count = write_ads(data, store, student.dim, config.ads, folder)
        about = settings(config, data, store, student, count)
        (folder / "about.json").write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")
        inputs: dict[str, Any] = {"student": student.fingerprint, "teacher": store.encoder, "corpus": store.source}
        # The whole folder is public: no path of this machine.
        write_manifest(folder, KIND, inputs=inputs, config={"precision": config.precision, "ads": count})
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output}: {count:,} ads, {size / 2**20:.0f} MiB; python -m http.server --directory {output}")


def write_student(config: StaticSpaceConfig, folder: Path) -> None:
    (folder / "onnx").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(config.student) / name, folder / name)
    graph, weights = graph_files(config)
    for path in (graph, weights) if weights.is_file() else (graph,):
        shutil.copyfile(path, folder / "onnx" / path.name)


def graph_files(config: StaticSpaceConfig) -> tuple[Path, Path]:
    """The student's graph, and where its weights lie if they are many."""
    graph = Path(config.student) / GRAPHS[config.precision]
    return graph, graph.with_name(f"{graph.name}_data")


def write_ads(data: Any, store: VectorStore, dim: int, most: int, folder: Path) -> int:
    """ads.json and vectors.bin of the first `most` ads, in the store's order; returns their number.

    A vector, cut to `dim` and L2-normalised, becomes int8 codes and one scale: largest component / 127.
    """
    count = min(most, len(store))
    names = store.ids[:count].to_pylist()
    rows = {row["_id"]: row for row in iterate(data.corpus)}
    ads = []
    for name in names:
        shown = ad_texts(rows[name])
        shown["text"] = shown["text"][:MAX_TEXT]
        ads.append({"id": name} | {key: text for key, text in shown.items() if text})
    vectors = store.gather(np.arange(count))[:, :dim].astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scales = np.abs(vectors).max(axis=1) / 127
    codes = np.rint(vectors / scales[:, None]).astype(np.int8)
    (folder / "ads.json").write_text(json.dumps(ads, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    (folder / "vectors.bin").write_bytes(scales.astype("<f4").tobytes() + codes.tobytes())
    return count


def settings(config: StaticSpaceConfig, data: Any, store: VectorStore, student: QueryEncoder, count: int) -> dict:
    """What the page must know, and what it tells."""
    folder = Path(config.student)
    shown = f"{count:,} of {len(store):,} ads" if count < len(store) else f"{count:,} ads"
    label, chosen = examples(config, data, store, student, count)
    return {
        "ads": count,
        "dim": student.dim,
        "max_tokens": student.max_tokens,
        "prompt": student.prompt,
        "dtype": DTYPES[config.precision],
        "weights_beside": graph_files(config)[1].is_file(),
        "synthetic": is_synthetic(config.data),
        "examples_label": label,
        "examples": chosen,
        "facts": [
            ["Student", f"{folder.name}, {config.precision}, width {student.dim}"],
            ["Student's fingerprint", student.fingerprint or "none"],
            ["Teacher's fingerprint", f"{store.encoder}, the same in the student and in the vectors"],
            ["Catalogue", f"{shown}, their vectors as int8"],
            ["Fingerprint of the ads' texts", store.source],
        ],
    }


def examples(
    config: StaticSpaceConfig, data: Any, store: VectorStore, student: QueryEncoder, count: int
) -> tuple[str, list[dict[str, Any]]]:
    """A label, and each example with the ids of the ads that the teacher finds for it among the `count` shown, best
    first; one whose vector the teacher has not stored cannot be compared and has none."""
    index = AdIndex.from_vectors(store.gather(np.arange(count))[:, : student.dim], store.ids[:count].to_pylist())
    folder = Path(config.vectors) / "queries"
    teach: Callable[[str], np.ndarray | None] = lambda text: None  # noqa: E731
    if folder.is_dir():
        queries = VectorStore.open(folder)
        queries.check(encoder=store.encoder)
        teach = stored_teacher(queries, data.queries, student.dim)
    label, texts = "Examples", config.examples
    if not texts:
        label, texts = choose_examples(data, student.encode, teach, index)
    found = []
    for text in texts:
        vector = teach(text)
        found.append({"text": text, "teacher": [] if vector is None else index.search(vector, TAUGHT)[1][0]})
    return label, found


if __name__ == "__main__":
    run_recipe(main)
