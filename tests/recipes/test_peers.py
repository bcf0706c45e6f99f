"""Other projects' recipes on tiny models: each is trained by its own code and read like a student."""

import pytest
import torch

from hlm.artefacts import HlmError, read_manifest
from hlm.encoders.loading import encode, load_encoder
from hlm.indexes.lineage import check_student
from recipes import embed, peers, prune


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_bert, catalogue_200):
    """The teacher's vectors and a student of one layer."""
    folder = tmp_path_factory.mktemp("peers")
    data = ["--data", catalogue_200]
    embed.main(["--model", tiny_bert, *data, "--output", str(folder / "vectors")])
    given = ["--vectors", str(folder / "vectors"), "--output", str(folder / "cut"), "--keep", "1"]
    prune.main(["--model", tiny_bert, *data, *given])
    return folder


def arguments(start, tiny_bert, catalogue_200, recipe, output):
    given = ["--recipe", recipe, "--student", str(start / "cut"), "--teacher", tiny_bert, "--data", catalogue_200]
    given += ["--vectors", str(start / "vectors"), "--output", str(output), "--queries", "64", "--epochs", "1"]
    return [*given, "--batch_size", "32", "--learning_rate", "1e-3"]


@pytest.mark.parametrize("recipe", ["mse", "embed_distill", "leaf", "contrastive", "margin_mse", "scratch"])
def test_a_peer_trains_what_it_starts_from(start, tiny_bert, catalogue_200, tmp_path, recipe):
    peers.main(arguments(start, tiny_bert, catalogue_200, recipe, tmp_path / "made"))
    manifest = read_manifest(tmp_path / "made", "student")
    check_student(tmp_path / "made", manifest["inputs"]["teacher"])
    assert (manifest.get("dev") or {"end": 0})["end"] >= 0 and ("dev" in manifest) == (recipe != "scratch")
    model, before = load_encoder(str(tmp_path / "made")), load_encoder(str(start / "cut"))
    ours, theirs = (encode(one, ["red shoe", "steel kettle"]) for one in (model, before))
    assert abs(ours - theirs).max() > 1e-4
    assert len(model) == len(before) + (recipe == "leaf")
    written = (tmp_path / "made/hlm.json").stat().st_mtime_ns
    peers.main(arguments(start, tiny_bert, catalogue_200, recipe, tmp_path / "made"))
    assert (tmp_path / "made/hlm.json").stat().st_mtime_ns == written


def test_embedding_mse_comes_nearer_to_the_teacher(start, tiny_bert, catalogue_200, tmp_path):
    more = ["--epochs", "6", "--queries", "300", "--learning_rate", "3e-3"]
    peers.main([*arguments(start, tiny_bert, catalogue_200, "mse", tmp_path / "made"), *more])
    inputs = peers.Inputs(
        peers.PeersConfig("mse", "", "", catalogue_200, str(start / "vectors"), ""), peers.load(catalogue_200), None
    )
    texts, vectors = inputs.log()
    cosines = [
        float((torch.from_numpy(encode(load_encoder(str(path)), texts)) * torch.from_numpy(vectors)).sum(1).mean())
        for path in (start / "cut", tmp_path / "made")
    ]
    assert cosines[1] > cosines[0] + 0.05


@pytest.mark.parametrize("recipe", ["pynife", "model2vec"])
def test_a_package_that_is_missing_is_named(start, tiny_bert, catalogue_200, tmp_path, recipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HlmError, match=rf"pip install '{recipe}.*=="):
        peers.main(arguments(start, tiny_bert, catalogue_200, recipe, tmp_path / "made"))
