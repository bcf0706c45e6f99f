import re
import time
import unicodedata

import pytest

from hlm.data.spelling import canonical, normalise, spellings, words_of
from hlm.data.words import count_words, fold, terms
from hlm.evaluation.bm25 import bm25_run, tokenise
from hlm.evaluation.metrics import length_slice, ranking

# language: ads, a query, the ad that it must find first
FOUND = {
    "Japanese": (["防水ワイヤレスイヤホン", "木製ダイニングテーブル", "登山用テント四人用"], "ワイヤレス イヤホン", 0),
    "Japanese, half-width": (["防水ワイヤレスイヤホン", "木製テーブル", "テント"], "ﾜｲﾔﾚｽ", 0),
    "Chinese": (["不锈钢电热水壶", "实木餐桌", "四人露营帐篷"], "电热水壶", 0),
    "Chinese, one character": (["实木餐桌", "绿茶礼盒", "露营帐篷"], "茶", 1),
    "Chinese beside Latin": (["Sony无线耳机XM4", "Sony相机", "无线鼠标"], "sony耳机", 0),
    "Korean": (["무선이어폰 블랙", "캠핑텐트", "원목식탁"], "이어폰", 0),
    "Korean, particle": (["무선 이어폰을 찾는", "캠핑 텐트", "원목 식탁"], "이어폰", 0),
    "Thai": (["กาต้มน้ำสแตนเลส", "รองเท้าวิ่งสีแดง", "โคมไฟตั้งโต๊ะ"], "รองเท้า", 1),
    "Lao": (["ແຈວບອງ", "ເກີບແລ່ນ", "ໂຄມໄຟ"], "ເກີບ", 1),
    "Khmer": (["ស្បែកជើងរត់", "តុឈើ", "តង់"], "ស្បែកជើង", 0),
    "Burmese": (["ဖိနပ်အနီ", "စားပွဲ", "မီးအိမ်"], "ဖိနပ်", 0),
    "Hindi": (["कुली", "किला", "लाल जूता"], "किला", 1),
    "Hindi, joiner": (["क्‍षमा", "कमा"], "क्षमा", 0),
    "Tamil": (["காலணி", "குடை"], "குடை", 1),
    "Bengali, composed or not": (["বড়", "বর"], unicodedata.normalize("NFD", "বড়"), 0),
    "Arabic, with vowels": (["كُرسي", "كِتَاب جَدِيد"], "كتاب", 1),
    "Hebrew, with points": (["כִּסֵּא", "סֵפֶר"], "ספר", 1),
    "Persian, joiner": (["می‌خواهم", "کتاب"], "میخواهم", 0),
    "Turkish": (["Pamuk gömlek", "İPEK EŞARP"], "ipek eşarp", 1),
    "Turkish, dotless": (["Yün kazak", "IŞIK LAMBA"], "ışık lamba", 1),
    "German": (["Teekessel", "Größe 42 Straßenschuh"], "STRASSENSCHUH", 1),
    "Greek, final sigma": (["ΦΩΣ", "ΛΑΜΠΑ"], "φως", 0),
    "French, decomposed": (["cle", "cle\u0301 anglaise"], "clé", 1),
    "soft hyphen": (["Tee", "Straßen\u00adschuh"], "straßenschuh", 1),
    "emoji": (["kettle ☕️", "tv®️ 55"], "tv", 1),
}


@pytest.mark.parametrize("language", FOUND)
def test_bm25_finds_words_of_every_script(language):
    ads, query, wanted = FOUND[language]
    run = bm25_run([{"_id": str(n), "title": ad, "text": None} for n, ad in enumerate(ads)], [("q", query)], 10)["q"]
    best = ranking(run)
    assert best and best[0] == str(wanted)
    assert len(best) == 1 or run[best[0]] > run[best[1]]


def test_terms():
    assert terms("Sony製XM4 ワイヤレス") == ["sony", "製", "xm4", "ワイ", "イヤ", "ヤレ", "レス"]
    assert terms("水壶", single=True) == ["水", "壶", "水壶"]
    assert terms("รองเท้า") == ["รอ", "อง", "งเ", "เท้", "ท้า"]  # a tone mark stays with its letter
    assert terms("किला") == ["किला"] and terms("किला", single=True) == ["किला"]
    assert terms("“don’t” 1️⃣ m² ❤️") == ["don", "t", "1", "m2"]
    assert tokenise("防水 Jackets") == ["防水", "jacket"]


def before(text):
    """The tokens of results that are published."""
    return re.findall(r"\d+(?:[.,]\d+)+\w*|\w+", unicodedata.normalize("NFKC", text).lower())


def test_latin_text_has_the_tokens_of_the_published_results():
    texts = [
        'Sony WH-1000XM4, 15.6" Headphones.',
        "can't, e.g. 1,000.50 a.b:c usb_c 802.11n + C++ ___",
        "",
        "Café “Crème brûlée” – naïve’s 5½ №7 ﬁne",
        "Łódź æther Œuvre ĳ smørrebrød",
        "½ m² 10°C Ⅳ ①",
        "x" * 5000,
    ]
    for text in texts:
        assert terms(text) == before(text), text


def test_ascii_text_is_not_slower(monkeypatch):
    texts = ["Acme XR-100 wireless noise cancelling headphones, 15.6 inch, black " * 5] * 500

    def seconds(cut):
        times = []
        for _ in range(5):
            start = time.process_time()
            for text in texts:
                cut(text)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(terms) < 2 * seconds(before)


def test_words_of_queries_keep_their_signs():
    assert words_of("सफ़ेद कुर्सी, हिंदी-उर्दू") == [unicodedata.normalize("NFKC", w) for w in ("सफ़ेद", "कुर्सी", "हिंदी-उर्दू")]
    assert words_of("防水ワイヤレスイヤホン XM4") == ["防水ワイヤレスイヤホン", "xm4"]
    assert words_of("รองเท้า วิ่ง") == ["รองเท้า", "วิ่ง"]
    assert words_of("İpek USB-C® 2.0") == ["ipek", "usb-c", "2.0"]
    assert words_of("\u0301 \u0301é") == ["é"]
    assert normalise("Café  É") == "café é"


def test_the_same_query_in_another_case_or_form():
    assert canonical("STRASSE lampe") == canonical("Lampe straße")
    assert spellings("İPEK") & spellings("ipek") and spellings("ışık") & spellings("IŞIK")
    assert canonical("कुली") != canonical("किला")
    assert fold("ﾜｲﾔﾚｽ") == "ワイヤレス"


def test_words_are_counted():
    assert [count_words(text) for text in ("", "tv", 'lg 55" tv', "café – crème", "लाल किला", "무선 이어폰을")] == [
        0,
        1,
        3,
        3,
        2,
        2,
    ]
    assert [length_slice(text) for text in ("水壶", "电热水壶", "防水 ワイヤレス", "รองเท้าวิ่งสีแดง")] == [
        "1",
        "2",
        "3-4",
        "5+",
    ]
