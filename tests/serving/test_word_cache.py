"""Ids that are put together from known words are those of the tokenizer."""

import itertools
import string
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from hlm.serving import word_cache
from hlm.serving.query_encoder import QueryEncoder
from hlm.serving.word_cache import WordCache

PRINTABLE = string.ascii_letters * 2 + string.digits + " " * 20 + string.punctuation
# Controls, spaces of other kinds, accents that stand alone, capitals whose small letter depends on what follows.
CHARACTERS = [*PRINTABLE, *"\t\n\r\x0b\x0c\x00\x7f\x85\u00a0\u2003\u3000\u200d\u0301\u0327éßΣİǅ靴한🎒👩"]
TEXTS = ["red shoe", "", " ", "Red  SHOE", "red-shoe, 42.5%", "[MASK] red", "a [SEP]b", "[red]", "MASK]", "<s>",
         "x" * 200, "red " * 99, "größe 靴 🎒", "don't", "red\x00shoe", "red\u00a0shoe", "ΣΑΣ \u0301red",
         "-" * 700, "a-" * 700]  # fmt: skip


@pytest.fixture
def tokenizer(tiny_bert):
    return Tokenizer.from_file(str(Path(tiny_bert) / "tokenizer.json"))


def random_texts(count, seed):
    generator = np.random.default_rng(seed)
    return ["".join(generator.choice(CHARACTERS, generator.integers(0, 30))) for _ in range(count)]


def check(tokenizer, texts, prompt=""):
    cache = WordCache.of(tokenizer, prompt)
    expected = [encoding.ids for encoding in tokenizer.encode_batch([prompt + text for text in texts])]
    for _ in range(2):  # when nothing is known, and when everything is
        assert cache(texts) == expected
        assert [cache([text])[0] for text in texts] == expected
    return cache


@pytest.mark.parametrize("limit", [None, 3, 12])
@pytest.mark.parametrize("prompt", ["", "query: ", "query", "find (red) shoe for größe:", "[", "x " * 20])
def test_ids_are_the_tokenizers(tokenizer, prompt, limit):
    tokenizer.no_truncation()
    if limit:
        tokenizer.enable_truncation(limit)
    check(tokenizer, TEXTS + random_texts(500, seed=0), prompt)


# Scripts in their own ways: marks that join, no spaces, right to left, sequences of emoji, what normalisation changes.
SCRIPTS = [
    "Größe straße ẞ Œuvre naïve Åse", "ΛΕΥΚΌΣ ΣΊΣΥΦΟΣ ς", "İstanbul ıssız IĞDIR i̇",
    "чёрный ЩИ й и\u0306", "ქართული ᲥᲐᲠᲗ", "赤い靴 𠮷野家 ｶﾞｷﾞ ガ か\u3099", "红色 鞋子、靴",
    "빨간 구두 \u1112\u1161\u11ab \u3131", "รองเท้าสีแดง น้ำ", "ລາວ ຂອງ", "ភាសាខ្មែរ \u17b4",
    "မြန်မာ ဘာသာ", "लाल जूते क्\u200dष", "বাংলা ক্ষ", "தமிழ் கொ கொ", "മലയാളം ൻ", "తెలుగు",
    "සිංහල ශ්\u200dරී", "བོད་ཡིག", "حذاء أحمر \u0644\u064b\u0627 ﷺ ـــ",
    "עִבְרִית נעל \u202eabc\u202c", "אדום\u05be", "አማርኛ", "ᏣᎳᎩ ꮳꮃꭹ", "ᠮᠣᠩᠭᠣᠯ\u180e", "𞤀𞤁 𐐨𐐩",
    "🄰 Ⅷ ½ ﬃ №", "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇩 1️⃣ ❤\ufe0f", "e\u0301 é A\u030a Å ṩ s\u0323\u0307 s\u0307\u0323",
    "Ω Ω K K ſ", "a\u0334\u0301\u0327b\u20dd", "a\u00adb\u200bc\u200cd\u2060e\ufefff",
    "a\u2028b\u2029c\u0085d\x1ce\x0bf", "\u00a0a\u1680b\u2003c\u202fd\u3000e",
    "\x00a\x01\x7f\x9fb\ufffd\ufffe\uffff\ue000", "\U0001d400\U0001d7d8 \U000e0041\U000e007f",
    "„Schuh“ «soulier» ‹›¿¡…—–‐", "``a'' ´b` ~^ $+<=>|", "٣٤ ۳۴ ३४ ๓๔", "don’t l'eau o\u02bcclock",
    "\u0301", "\u0301 \u0301a", " \u200d ",
]  # fmt: skip


def unicode_texts(count, seed):
    """Of all of Unicode, halves of surrogate pairs aside; neighbours in a text are often of one block."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        starts = generator.integers(0, 0x32000, generator.integers(1, 6))
        codes = np.concatenate([start + generator.integers(0, 128, generator.integers(1, 12)) for start in starts])
        text = "".join(chr(code) if not 0xD800 <= code < 0xE000 else " " for code in codes)
        yield "".join(character + " " * (generator.random() < 0.15) for character in text)


@pytest.mark.parametrize("cased", [False, True])
@pytest.mark.parametrize("prompt", ["", "ค้นหา: é"])
def test_every_script_is_read_as_its_tokenizer_reads_it(tokenizer, prompt, cased):
    # So that words are told apart: each character of these texts is known, at the start of a word and within.
    texts = [*SCRIPTS, *(form for text in SCRIPTS for form in (text.upper(), text.lower(), text.title()))]
    texts += [unicodedata.normalize(form, text) for text in SCRIPTS for form in ("NFC", "NFD", "NFKC", "NFKD")]
    texts += [" ".join(pair) for pair in itertools.pairwise(SCRIPTS)] + list(unicode_texts(3000, seed=3))
    characters = sorted(set("".join(unicodedata.normalize("NFD", text.lower()) + text for text in texts)))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += [f"{before}{character}" for character in characters for before in ("", "##")]
    known = models.WordPiece({piece: n for n, piece in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]")
    tokenizer.model = known
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.no_truncation()
    check(tokenizer, texts, prompt)
    tokenizer.enable_truncation(12)
    check(tokenizer, texts, prompt)


@pytest.mark.parametrize("lowercase", [True, False])
def test_other_special_tokens_and_none_around_a_text(tokenizer, lowercase):
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.add_special_tokens(["<s>", "</s>", "{mask}"])
    tokenizer.add_tokens([AddedToken("red-", normalized=True), AddedToken("shoe!", single_word=True)])
    texts = [*TEXTS, "red- shoe!", "RED-SHOE!", "{mask}", "<s>red</s>", *random_texts(300, seed=1)]
    check(tokenizer, texts)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] [CLS] $A", special_tokens=[("[CLS]", tokenizer.token_to_id("[CLS]"))]
    )
    check(tokenizer, texts)


def test_words_that_were_seen_are_not_asked_for_again(tokenizer):
    cache = check(tokenizer, ["red shoe", "größe 42,5", "steel kettle", " "])
    cache._tokenizer = None
    texts = ["kettle shoe", "steel 42,5 größe  steel"]
    assert cache(texts) == [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    with pytest.raises(AttributeError):
        cache(["another"])


def test_no_more_words_are_kept_than_it_holds(tokenizer, monkeypatch):
    monkeypatch.setattr(word_cache, "WORDS", 5)
    monkeypatch.setattr(word_cache, "LONGEST", 8)
    texts = [*TEXTS, "a b c d e f g h", *random_texts(100, seed=2)]
    cache = check(tokenizer, texts)
    assert 0 < len(cache._words) <= 5 and max(map(len, cache._words)) <= 8
    expected = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: [cache([text])[0] for text in texts], range(16)):
            assert found == expected


def test_where_words_are_not_cut_independently_the_tokenizer_is_asked(tokenizer, tiny_qwen3):
    assert WordCache.of(Tokenizer.from_file(str(Path(tiny_qwen3) / "tokenizer.json"))) is None
    for change in (
        lambda other: setattr(other, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda other: setattr(other, "normalizer", normalizers.Lowercase()),
        lambda other: other.add_tokens(["red shoe"]),
        lambda other: other.add_tokens(["靴"]),  # which the tokenizer sets apart by spaces
        lambda other: other.enable_truncation(8, direction="left"),
        lambda other: other.enable_truncation(2),  # room for nothing but the special tokens
        lambda other: other.enable_padding(),
    ):
        other = Tokenizer.from_str(tokenizer.to_str())
        assert WordCache.of(other) is not None
        change(other)
        assert WordCache.of(other) is None


def test_the_encoder_has_it(tokenizer):
    encoder = QueryEncoder(tokenizer, lambda ids, mask: ids[:, :2].astype(np.float32), 2, prompt="query: ")
    ids = encoder.tokenise(["red shoe"])
    encoder.words._tokenizer = encoder._tokenizer = None
    assert encoder.tokenise(["red shoe"]) == ids == [tokenizer.encode("query: red shoe").ids]
