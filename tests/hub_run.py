"""A run so small that it is published in a second: everything the recipes write, of a BERT of two layers."""

from __future__ import annotations

from pathlib import Path

from hlm.artefacts import read_manifest
from hlm.data.contract import load
from hlm.data.sample_catalogue import write_catalogue
from hlm.encoders.loading import load_encoder, save_encoder
from recipes import embed, export, teacher
from results.measure.measure_reliability import tiny_encoder


def tiny_run(folder: Path, tokenizer_of: str, seed: int) -> dict[str, str]:
    """By the recipes: a teacher with its adapter, stores, a student with ONNX files; where each of them lies."""
    data = str(folder / "data")
    write_catalogue(data, ads=60, unlabelled=40, train_queries=40, dev_queries=10, test_queries=20, seed=seed)
    texts = list(load(data, splits=()).queries["text"])
    tiny_encoder(folder / "base", tokenizer_of, texts, seed)
    teacher.main(
        ["--backbone", str(folder / "base"), "--data", data, "--output", str(folder / "teacher")]
        + "--min_score 3 --lora_rank 4 --max_steps 1 --per_device_train_batch_size 16".split()
        + "--save_strategy no --disable_tqdm true".split()
    )
    embed.main(["--model", str(folder / "teacher"), "--data", data, "--output", str(folder / "vectors")])
    model = load_encoder(str(folder / "teacher"), device="cpu", max_seq_length=24)  # so it is another encoder
    inputs = {"teacher": read_manifest(folder / "teacher", "teacher")["encoder"]}
    save_encoder(model, folder / "student", "student", inputs=inputs, config={})
    export.main(["--student", str(folder / "student"), "--output", str(folder / "online")])
    own = {"student": folder / "online", "teacher": folder / "teacher", "vectors": folder / "vectors", "data": data}
    return {name: str(path) for name, path in own.items()}
