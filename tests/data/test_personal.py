"""What is taken for a person's, and what for a product's."""

import random

import pytest

from hlm.data.log_cleaning import clean
from hlm.data.personal import ProductNumbers, personal
from results.measure.raw_logs import article_of, card, ean, ean_of, email, phone, product_number

ADS = 2000


@pytest.fixture(scope="module")
def known():
    return ProductNumbers(f"lamp, EAN {ean_of(n)}, article {article_of(n)}, id {n:07d}" for n in range(ADS))


@pytest.mark.parametrize(
    ("kind", "found"), [(email, {"e-mail"}), (phone, {"phone number", "card number"}), (card, {"card number"})]
)
def test_none_of_the_planted_gets_through(kind, found, known):
    rng = random.Random(1)
    planted = [
        f"{before}{kind(rng)}{after}" for before in ("", "red shoe ") for after in ("", " lamp") for _ in range(850)
    ]
    through = [query for query in planted if clean(query, known, 200)[2] not in found]
    assert len(planted) == 3400 and not through


def test_products_keep_their_numbers(known):
    rng = random.Random(2)
    numbers = [product_number(rng, rng.randrange(ADS)) for _ in range(5000)]
    lost = [number for number in numbers if clean(number, known, 200)[2]]
    assert len(lost) < len(numbers) / 1000, lost[:5]


def test_barcodes_of_others_are_known_by_their_check_digit():
    rng = random.Random(3)
    codes = [
        ean(f"{start}{rng.randrange(10**9):09d}")
        for start in ("400", "405", "340", "500", "690", "760", "872")
        for _ in range(50)
    ]
    assert not [code for code in codes if personal(code)]
    wrong = [code[:-1] + str((int(code[-1]) + 1) % 10) for code in codes]
    assert all(personal(code) for code in wrong)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("jane.doe@gmail.com", "e-mail"),
        ("jane doe gmail.com", "e-mail"),
        ("jane at example dot org", "e-mail"),
        ("jane@example", "e-mail"),
        ("https://shop.example/a", "web address"),
        ("shoes.com", "web address"),
        ("4111 1111 1111 1111", "card number"),
        ("378282246310005", "card number"),
        ("4111-1111-1111-1112", "phone number"),
        ("0171 1234567", "phone number"),
        ("lamp 555-123-4567", "phone number"),
        ("٠١٧١ ١٢٣٤٥٦٧", "phone number"),
        ("０１７１－１２３４５６７", "phone number"),
        ("0 1 7 1 1 2 3 4 5 6 7", "phone number"),
        ("anna01711234567", "phone number"),
        ("call 5551234", "phone number"),
        ("DE89 3704 0044 0532 0130 00", "phone number"),
        ("0114 48833396", "phone number"),
    ],
)
def test_persons(query, found):
    assert personal(query) == found


@pytest.mark.parametrize(
    "query",
    [
        "vitamin (a) cream",
        "12v at 1.50 amp",
        "look at me",
        "node.js",
        "iphone 12 64 256",
        "calendar 2023 2024",
        "10-24-2023",
        "1.299.000 €",
        "$1,299.00",
        "12.499,00",
        "978-3-16-148410-0",
        "205/55 R16 91V",
        "225 45 17",
        "100 200 300 cm",
        "part 1234567",
        "sm12345678",
        "90x200 100x200",
        "1/2 3/4 5/8",
        "wh-1000xm4",
        "18650 3.7v 3400mah",
        "4 006381 333931",
        "",
    ],
)
def test_products(query):
    assert personal(query) is None


def test_a_catalogue_full_of_numbers_of_a_length_says_nothing_about_one_of_them():
    few, many = (ProductNumbers(f"{n:08d}" for n in range(10_000_000, 10_000_000 + size)) for size in (100, 20_000))
    assert "10000007" in few and personal("10000007", few) is None
    assert "10000007" not in many and personal("10000007", many) == "phone number"
    assert "123" not in few and "1" * 30 not in few


@pytest.mark.parametrize(
    ("text", "key", "shown"),
    [
        ("  Red\u00a0 SHOE ", "red shoe", "Red SHOE"),
        ("ｒｅｄ shoe", "red shoe", "red shoe"),
        ("red%20shoe", "red shoe", "red shoe"),
        ("red+shoe%21", "red shoe", "red shoe!"),
        ("50%25 off", "50% off", "50% off"),
        ("h&amp;m", "h&m", "h&m"),
        ("'lamp'?", "lamp", "'lamp'?"),
        ("red\u200bshoe\x00", "redshoe", "redshoe"),
        ("c++", "c++", "c++"),
        ("Ünder\tWear", "ünder wear", "Ünder Wear"),
    ],
)
def test_a_query_has_one_key(text, key, shown):
    assert clean(text, None, 200) == (key, shown, None)


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "without"), ("  ?! ", "without"), ("\u200b", "without"), ("a" * 201, "over-long"), ("sch\ufffdh", "broken")],
)
def test_what_is_no_query(text, why):
    key, shown, reason = clean(text, None, 200)
    assert (key, shown) == ("", "") and reason.startswith(why)
