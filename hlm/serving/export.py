"""ONNX export of a query encoder: pooling, head and normalisation in the graph, checked against the model itself.

    onnx/model.onnx             fp32
    onnx/model_quantized.onnx   int8 in blocks of 32; activations are quantised as they come
    onnx/model_lookup.onnx      fp32 for `hlm.QueryEncoder`: what the first layer projects is looked up, where that pays

Beside a graph of more than 256 MiB, and beside that with look-ups, lies <name>_data with its weights.

Inputs `input_ids` and `attention_mask`, int64 (batch, length), both dimensions free, right padding. Outputs
`last_hidden_state` (batch, length, width) and `sentence_embedding` (batch, dim), L2-normalised. The graph with look-ups
is ONNX Runtime's alone, reads texts of one length, so it has no `attention_mask`, and gives `sentence_embedding` only.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from sentence_transformers import SentenceTransformer

from hlm.artefacts import MANIFEST, HlmError, amend_manifest, fingerprint_file
from hlm.encoders.families import FAMILIES
from hlm.encoders.folder import GRAPHS
from hlm.encoders.loading import load_encoder, pad, prompt_of, tokenise
from hlm.encoders.static import is_static
from hlm.progress import progress
from hlm.serving.online_graph import LookupGraph, OnlineGraph, StaticGraph, lookup_pays

# Loggers of what exports, which say nothing that a user could act on.
CHATTY = (
    "torch.onnx",
    "onnxscript",
    "onnx_ir",
    "sentence_transformers",
    "onnxruntime.quantization.matmul_nbits_quantizer",
)

# fp32 sums in another order: components of unit vectors differ by some 1e-7 to 1e-6.
FP32_TOLERANCE = 1e-4
# Of weights. More lie in a file of their own, which sessions map and share instead of holding each a copy; and
# protobuf ends at 2 GiB.
EXTERNAL_BYTES = 2**28
# Short, long, cut off, not ASCII, and nothing but special tokens.
PROBES = ("red shoe", "a", "", "laptop 15.6 inch " * 100, "größe 42 ½ 靴 🎒", "used printer with cable, black")


def export(name_or_path: str, folder: str | Path, *, int8: bool = True) -> dict[str, dict[str, Any]]:
    """`export_model` of an encoder by folder, Hub id or `package:...`."""
    with _quietly():
        return export_model(load_encoder(name_or_path, device="cpu"), folder, int8=int8)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keeps what torch, transformers and ONNX Runtime's quantizer say of themselves off the screen and out of the
    application's log, whose root logger the quantizer would configure."""
    from transformers.utils import logging as transformers_logging

    root, bars = logging.getLogger(), transformers_logging.is_progress_bar_enabled()
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in ("root", *CHATTY)}
    if bars:
        transformers_logging.disable_progress_bar()
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        # Older versions of torch print how many rules it applied.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
        if bars:
            transformers_logging.enable_progress_bar()


def export_model(
    model: SentenceTransformer, folder: str | Path, *, int8: bool = True, lookup: bool = True
) -> dict[str, dict[str, Any]]:
    """Writes `onnx/model.onnx` and the other files of a student under `folder`; those it does not write it removes.
    Where the folder is a whole artefact already, its manifest tells of the new files.

    Args:
        model: fp32, on the CPU, ending in Normalize. It is left in eval mode with eager attention.
        int8: writes `onnx/model_quantized.onnx`; not of a static student, which multiplies nothing.
        lookup: writes `onnx/model_lookup.onnx` of a BERT for which it saves a tenth of the multiply-adds at least, by
            tables of 256 MiB at most.

    Returns:
        {"fp32": {"file", "fingerprint", "data": the same two of its weights, where these lie beside it,
        "max_abs_difference", "min_cosine", "tolerance"}, "lookup": the same, "int8": the same without a tolerance}:
        differences to the model's own vectors of `PROBES`, one by one and as one padded batch.

    Raises:
        HlmError: weights that are not fp32, or an fp32 graph whose vectors differ by more than `FP32_TOLERANCE`.
    """
    if model.dtype != torch.float32:
        raise HlmError(f"expected an encoder in float32 to export, found {model.dtype}; load it in float32")
    with _quietly():
        facts = _exported(model.eval(), Path(folder), int8=int8, lookup=lookup)
    if (Path(folder) / MANIFEST).is_file():
        amend_manifest(folder, "onnx", onnx=facts)
    return facts


def _exported(model: SentenceTransformer, folder: Path, *, int8: bool, lookup: bool) -> dict[str, dict[str, Any]]:
    if is_static(model):
        int8 = False  # it multiplies nothing
    else:
        model[0].model.set_attn_implementation("eager")  # sdpa becomes the same arithmetic in 24 nodes more
    folder.mkdir(parents=True, exist_ok=True)
    bar = progress(what="export", unit="graph", total=1 + (lookup and lookup_pays(model)) + int8)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx.") as aside, bar:
        paths = {"fp32": Path(aside) / Path(GRAPHS["fp32"]).name}
        try:
            traced = _traced(model)
        except Exception as error:  # torch.export, torch.onnx and the model's own code raise whatever they raise
            first = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
            raise HlmError(
                f"expected a backbone that torch {torch.__version__} can trace, found "
                f"'{_kind(model)}' ({first}); families that are known to work: "
                f"{', '.join(FAMILIES)}"
            ) from error
        _save(traced, paths["fp32"])
        bar.update()
        if lookup and lookup_pays(model):
            paths["lookup"] = Path(aside) / Path(GRAPHS["lookup"]).name
            _save(_traced(model, lookup=True), paths["lookup"], external=True)
            bar.update()
        facts = {name: _differences(model, path) | {"tolerance": FP32_TOLERANCE} for name, path in paths.items()}
        found = max(fact["max_abs_difference"] for fact in facts.values())
        if not found <= FP32_TOLERANCE:
            raise HlmError(
                f"expected the exported graph to give the model's vectors within {FP32_TOLERANCE}, found a difference "
                f"of {found:.2g}; this architecture does not export truly with this torch ({torch.__version__})"
            )
        if int8:
            paths["int8"] = Path(aside) / Path(GRAPHS["int8"]).name
            quantise(paths["fp32"], paths["int8"])
            facts["int8"] = _differences(model, paths["int8"])
            bar.update()
        for file in {GRAPHS[name] for name in GRAPHS.keys() - paths.keys()}:
            for leftover in (folder / file, folder / f"{file}_data"):  # of an earlier student
                leftover.unlink(missing_ok=True)
        for name in reversed(facts):  # fp32 last: where it is, all are
            facts[name] = _moved(paths[name], folder) | facts[name]
    return facts


def _kind(model: SentenceTransformer) -> str:
    return "static" if is_static(model) else model[0].model.config.model_type


@torch.no_grad()
def _traced(model: SentenceTransformer, *, lookup: bool = False) -> ir.Model:
    ids = torch.ones(2, 9, dtype=torch.int64)  # sizes that nothing in a model is equal to by accident
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    whole = StaticGraph if is_static(model) else OnlineGraph
    graph, inputs = (LookupGraph(model), (ids,)) if lookup else (whole(model), (ids, mask))
    program = torch.onnx.export(
        graph.eval(),
        inputs,
        dynamo=True,
        dynamic_shapes=tuple({0: batch, 1: length} for _ in inputs),
        input_names=["input_ids", "attention_mask"][: len(inputs)],
        output_names=["sentence_embedding"] if lookup else ["last_hidden_state", "sentence_embedding"],
        opset_version=20,
        external_data=False,
        verbose=False,  # 20 has Gelu
    )
    _simplify(program.model)
    return program.model


def _save(model: ir.Model, path: Path, *, external: bool = False) -> None:
    """Weights of many bytes go into `<name>_data` beside the graph, where the Hub's tools look for them."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    ir.save(model, path, external_data=f"{path.name}_data" if external or size > EXTERNAL_BYTES else None)


def _moved(graph: Path, folder: Path) -> dict[str, Any]:
    """Moves a graph and its weights to `folder`/onnx, the graph last; returns their names and fingerprints."""
    weights, target = graph.with_name(f"{graph.name}_data"), folder / "onnx"
    target.mkdir(exist_ok=True)
    moved = [path for path in (weights, graph) if path.is_file()]
    for path in moved:
        os.replace(path, target / path.name)
    if weights not in moved:
        (target / weights.name).unlink(missing_ok=True)  # of an earlier, larger student
    record, *data = (
        {"file": f"onnx/{path.name}", "fingerprint": fingerprint_file(target / path.name)} for path in reversed(moved)
    )
    return record | ({"data": data[0]} if data else {})


def _simplify(model: ir.Model) -> None:
    """Shapes that keep (batch, length) in front say so by zeros, instead of being put together at every call. Where in
    which file a node came from leaves the graph: it is nobody's business."""
    for node in model.graph:
        node.metadata_props.clear()
        if node.op_type == "Reshape":
            old, new = node.inputs[0].shape, node.outputs[0].shape
            if None not in (old, new) and old[:2] == new[:2] and all(isinstance(size, int) for size in new[2:]):
                shape = ir.tensor([0, 0, *new[2:]], dtype=ir.DataType.INT64, name=f"{node.outputs[0].name}_shape")
                value = ir.Value(name=shape.name, const_value=shape, type=ir.TensorType(shape.dtype), shape=shape.shape)
                model.graph.register_initializer(value)
                node.replace_input_with(1, value)
                node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
    ir.passes.common.RemoveUnusedNodesPass()(model)


def quantise(source: Path, target: Path) -> None:
    """int8 of every matrix product, with a scale for every 32 weights of an output channel, and for every 32 values
    of what it is multiplied by.

    One scale for a whole activation, as dynamic quantisation has it, loses what lies beside an outlier: it cost 4% of
    the first ten documents of a student for whom this costs 0.6%.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    settings = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4, bits=8)
    quantizer = MatMulNBitsQuantizer(onnx.load(str(source)), algo_config=settings)
    quantizer.process()
    _save(ir.serde.deserialize_model(quantizer.model.model), target)


def _differences(model: SentenceTransformer, path: Path) -> dict[str, float]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {part.name for part in session.get_inputs()}
    ids = tokenise(model, list(PROBES), prompt_of(model, "query"))
    ids = [tokens for tokens in ids if tokens]
    together = ids if "attention_mask" in inputs else [ids[0], ids[0][::-1]]
    largest, smallest = 0.0, 1.0
    for rows in [*([tokens] for tokens in ids), together]:
        features = pad(model, rows)
        with torch.no_grad():
            expected = model(dict(features))["sentence_embedding"].numpy()
        feed = {name: value.numpy() for name, value in features.items() if name in inputs}
        (found,) = session.run(["sentence_embedding"], feed)
        largest = np.maximum(largest, np.abs(found - expected).max())  # NaN stays NaN, which `max` would lose
        smallest = np.minimum(smallest, (found * expected).sum(axis=1).min())
    return {"max_abs_difference": float(largest), "min_cosine": float(smallest)}
