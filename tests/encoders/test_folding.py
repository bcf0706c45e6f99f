"""Folding: a student's embeddings start as what the dropped first layers made of each token alone."""

import json

import numpy as np
import pytest
import torch

from hlm.artefacts import HlmError
from hlm.encoders.families import FAMILIES
from hlm.encoders.loading import load_encoder
from hlm.encoders.pruning import check_cascade, cut, prune
from hlm.encoders.static_words import static_student
from hlm.planning.plan import cascade
from recipes import align, embed
from recipes import prune as prune_recipe

ABLE = [name for name, family in FAMILIES.items() if family.ending_norm and name != "electra"]  # its rows are narrow
TEXTS = ["red shoe", "kettle", "ü"]


def states(model, ids, layer):
    """What enters a layer, for one text of these tokens."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        return (
            model[0]
            .model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
            .hidden_states[layer][0]
        )


@pytest.mark.parametrize("name", ABLE)
def test_a_token_alone_enters_the_kept_layers_as_the_dropped_ones_left_it(name, tiny_family):
    model = load_encoder(tiny_family(name), device="cpu")
    read = model.tokenizer("kettle", return_special_tokens_mask=True)
    place = read["special_tokens_mask"].index(0)
    rest = [token for token, special in zip(read["input_ids"], read["special_tokens_mask"], strict=True) if special]
    alone = [*rest[:place], read["input_ids"][place], *rest[place:]]
    expected = states(model, alone, 3)[place].numpy()
    small = cut(model, [3, 5], 24, "middle_skip", TEXTS, fold=True)
    small[0].model.embeddings.position_embeddings.weight.data.zero_()  # they are beside the rows, not in them
    np.testing.assert_allclose(states(small, alone, 0)[place], expected, atol=1e-4)
    plain = cut(model, [3, 5], 24, "middle_skip", TEXTS)
    assert np.abs(states(plain, alone, 0)[place].numpy() - expected).max() > 0.1


def test_special_tokens_get_their_mean_beside_all_tokens(tiny_family):
    model = load_encoder(tiny_family("bert"), device="cpu")
    start, *_, end = model.tokenizer("kettle")["input_ids"]
    beside = torch.stack([states(model, [start, token, end], 2) for token in range(len(model.tokenizer))])
    small = cut(model, [2], None, "middle_skip", TEXTS, fold=True)
    small[0].model.embeddings.position_embeddings.weight.data.zero_()
    found, wanted = states(small, [start, end], 0), beside[:, [0, 2]].mean(dim=0)
    assert torch.cosine_similarity(found, wanted).min() > 0.999  # of a mean the norm makes a state of its own length


def test_the_model_given_and_all_else_of_the_student_stay(tiny_family):
    model = load_encoder(tiny_family("bert"), device="cpu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = cut(model, [4, 5], None, "middle_skip", TEXTS, fold=True).state_dict()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    plain = prune(model, layers=[4, 5]).state_dict()
    changed = {name.partition("embeddings.")[2] for name in plain if not torch.equal(plain[name], small[name])}
    assert {"word_embeddings.weight", "token_type_embeddings.weight"} <= changed
    assert changed <= {"word_embeddings.weight", "token_type_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias"}
    lengths = [table["0.model.embeddings.word_embeddings.weight"].norm(dim=1).median() for table in (plain, small)]
    torch.testing.assert_close(*lengths)


@pytest.mark.parametrize(
    "name, layers, message",
    [
        ("bert", [0, 5], r"without the first one, 0, found \[0, 5\]"),
        ("bert", 2, "by their numbers.* found 2"),
        ("bert", None, "found None"),
        ("qwen3", [5], r"end in a norm \(bert, .*found 'qwen3'; leave fold out"),
        ("electra", [5], "as wide as the layers, 32, found 16"),
        ("roberta-prelayernorm", [5], "found 'roberta-prelayernorm'"),
    ],
)
def test_what_cannot_be_folded_is_refused_before_any_work(name, layers, message, tiny_family):
    model = load_encoder(tiny_family(name), device="cpu")
    with pytest.raises(HlmError, match=message):
        cut(model, layers, None, "middle_skip", TEXTS, fold=True)
    with pytest.raises(HlmError, match=message):
        cascade(model[0].model.config, [{"layers": layers, "fold": True}])


def test_a_stage_says_true_or_false():
    with pytest.raises(HlmError, match="stage 1: fold: expected true or false, found 'yes'"):
        check_cascade([{"layers": [5], "fold": "yes"}])


def test_the_recipes_fold(tiny_bert, catalogue_200, tmp_path):
    where = ["--data", catalogue_200, "--output"]
    embed.main(["--model", tiny_bert, *where, str(tmp_path / "vectors")])
    vectors = ["--vectors", str(tmp_path / "vectors"), *where]
    prune_recipe.main(["--model", tiny_bert, "--layers", "5", "--fold", "true", *vectors, str(tmp_path / "pruned")])
    expected = cut(load_encoder(tiny_bert, device="cpu"), [5], None, "middle_skip", TEXTS, fold=True)
    pruned = load_encoder(str(tmp_path / "pruned"), device="cpu")
    np.testing.assert_allclose(pruned.encode(TEXTS), expected.encode(TEXTS), atol=1e-6)
    align.main(
        ["--student", tiny_bert, "--cascade", json.dumps([{"layers": [5], "fold": True}]), *vectors]
        + [str(tmp_path / "aligned"), "--learning_rate", "1e-9", "--num_train_epochs", "1"]
        + "--per_device_train_batch_size 32 --disable_tqdm true --save_strategy no".split()
    )
    aligned = load_encoder(str(tmp_path / "aligned"), device="cpu")
    np.testing.assert_allclose(aligned.encode(TEXTS), expected.encode(TEXTS), atol=1e-4)


def test_a_static_student_has_nothing_to_fold(tiny_bert):
    student = static_student(load_encoder(tiny_bert, device="cpu"), TEXTS, 3)
    with pytest.raises(HlmError, match="found a static one; leave layers, ffn and fold out"):
        cut(student, None, None, "middle_skip", TEXTS, fold=True)
