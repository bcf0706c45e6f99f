"""A student with fewer tokens through prune, align, export and QueryEncoder."""

import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import hlm
from hlm import QueryEncoder
from hlm.artefacts import HlmError
from hlm.data.contract import load
from hlm.encoders.loading import encode, load_encoder
from hlm.encoders.vocabulary import share_kept


def test_from_the_cut_to_what_serves(tiny_bert, catalogue_200, tmp_path):
    hlm.embed(tiny_bert, catalogue_200, tmp_path / "vectors")
    vectors = tmp_path / "vectors"
    hlm.prune(tiny_bert, catalogue_200, vectors, tmp_path / "whole", keep=1)
    hlm.prune(tmp_path / "whole", catalogue_200, vectors, tmp_path / "small", vocabulary={"min_count": 3})
    whole, small = (load_encoder(str(tmp_path / name), device="cpu") for name in ("whole", "small"))
    told = json.loads((tmp_path / "small/hlm.json").read_text())
    facts = told["vocabulary"]
    assert facts["tokens"] == len(small.tokenizer) < facts["tokens_before"] == len(whole.tokenizer)
    data = load(catalogue_200)
    kept = [whole.tokenizer.convert_tokens_to_ids(token) for token in small.tokenizer.get_vocab()]
    test = [text for _, text in data.split_queries("test")]
    assert facts["queries_whole"]["test"] == share_kept(whole, kept, test) > 0.5
    texts = [text for text in test if share_kept(whole, kept, [text])]
    np.testing.assert_array_equal(encode(small, texts), encode(whole, texts))

    settings = {"max_steps": 2, "eval_steps": 1, "save_steps": 1, "per_device_train_batch_size": 32, "use_cpu": True}
    hlm.align(tmp_path / "small", catalogue_200, vectors, tmp_path / "aligned", **settings)
    hlm.export(tmp_path / "aligned", tmp_path / "online", lookup=False)
    online = QueryEncoder.from_pretrained(tmp_path / "online")
    stock = SentenceTransformer(str(tmp_path / "online"), device="cpu")
    assert stock[0].model.config.vocab_size == len(stock.tokenizer) == facts["tokens"]
    texts = [*test[:20], "never seen Wörds 靴"]
    np.testing.assert_allclose(online.encode(texts), stock.encode(texts), atol=1e-5)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"kep": 3}, "did you mean 'keep'"),
        ({"keep": 0}, "vocabulary: keep: expected 1 or more, found 0"),
        ({"keep": 9000, "min_count": 2}, "expected keep or min_count, found both"),
    ],
)
def test_settings_are_refused_before_weights_load(tiny_bert, catalogue_200, tmp_path, vocabulary, message):
    with pytest.raises(HlmError, match=message):
        hlm.prune(tiny_bert, catalogue_200, tmp_path / "none", tmp_path / "out", vocabulary=vocabulary)
