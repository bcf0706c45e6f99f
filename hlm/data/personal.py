"""Queries that hold what belongs to a person: e-mail addresses, numbers of telephones and cards; and web addresses.

It errs on the side of the person. A long number is taken for a telephone's unless something says that it is a
product's: the catalogue has it, its check digit is that of a GTIN or ISBN, or it is written as a size, price, date or
tyre is.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np

# Providers of mail are addresses of persons even where the sign is missing ("jane.doe gmail.com").
_EMAIL = re.compile(
    r"\S@|@\s*\w+\s*\.\s*\w|\w\s*[\[({<]\s*(?:at|ät)\s*[\])}>]\s*\w"
    r"|\w\s+at\s+[\w-]*[a-z][\w-]*\s*(?:\.|\sdot\s|\spunkt\s|[\[({]dot[\])}])\s*[a-z]{2,}"
    r"|\b(?:gmail|googlemail|hotmail|outlook|yahoo|icloud|gmx|web|aol|protonmail|live|mail|yandex|qq|orange|libero"
    r"|t-online)\s*(?:\.|\sdot\s)\s*(?:com|de|net|org|fr|it|es|ru|co|cn|at|ch|me|info)\b"
)
_URL = re.compile(
    r"\w+://|\bwww\d?\s?\.|\b[\w-]+(?:\.[\w-]+)*\.(?:com|net|org|info|biz|edu|gov|io|shop|store|app|dev|online|site"
    r"|co\.uk|com\.\w\w|de|fr|it|es|nl|pl|ru|at|ch|se|eu|uk|ly)(?=$|[\s/:?#,;)])"
)
# Digits with what may stand between those of one number.
_RUN = re.compile(r"(?:\+\s?|\(\s?\+?\s?)?\d(?:[\s().\-/_·*:,|]{0,3}\d)+")
_WORDS = re.compile(r"\b(?:tel\w*|phone\w*|fon|mobile?|mob|cell|handy|call|fax|whats\s?app|sms|viber)\b")
_CARDS = re.compile(
    r"4|5[0-8]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)|3(?:[47]|0[0-5]|[689])|35(?:2[89]|[3-8])|6"
)  # Visa, Mastercard and Maestro, the newer Mastercard, Amex and Diners, JCB, Discover and UnionPay
# As barcodes and ISBNs are written: without signs, or in the groups that are printed below the bars.
_BARCODE = re.compile(r"\d{12,14}|\d[\s-]\d{5}[\s-]\d{5}[\s-]\d|\d\s\d{6}\s\d{6}|97[89][\s-]?\d[\d\s-]*")
_DATE = re.compile(
    r"(?:0?[1-9]|[12]\d|3[01])[./-](?:0?[1-9]|1[0-2])[./-](?:19|20)\d\d"
    r"|(?:0?[1-9]|1[0-2])[./-](?:0?[1-9]|[12]\d|3[01])[./-](?:19|20)\d\d"
    r"|(?:19|20)\d\d[./-](?:0?[1-9]|1[0-2])[./-](?:0?[1-9]|[12]\d|3[01])"
)
_YEARS = re.compile(r"(?:19|20)\d\d(?:\s?[\s/,-]\s?(?:19|20)\d\d)+")
_TYRE = re.compile(r"[1-3]\d5[\s/-][2-9][05][\s/-](?:1\d|2[0-4])")
_PRICE = re.compile(r"[1-9]\d{0,2}(?:\.\d{3}){1,2},\d\d|[1-9]\d{0,2}(?:,\d{3}){1,2}\.\d\d|[1-9](?:[.,]\d{3}){2}")
_MONEY = re.compile(r"[1-9]\d{0,2}(?:[.,]\d{3})*(?:[.,]\d\d)?")
_SIZE = re.compile(r"[1-9]\d{0,3}(?:[.,]\d{1,2})?(?:[\s/*:]+[1-9]\d{0,3}(?:[.,]\d{1,2})?){1,2}")
_UNIT = re.compile(
    r"\s?(?:mm|cm|m|in|inch|inches|zoll|ft|kg|g|mg|ml|l|w|kw|kwh|v|mah|gb|tb|mb|hz|mhz|ghz|lm|k|nm|bar)\b"
)
_SIGN = re.compile(r"\s?(?:€|\$|£|eur|euro|usd|gbp|chf|dollars?)(?!\w)")
_SIGN_BEFORE = re.compile(r"(?:€|\$|£|\beur|\busd|\bgbp|\bchf)\s?$")
SHORTEST = 7  # digits of a number that is written in groups; without any, one more


class ProductNumbers:
    """The long numbers of a catalogue, by their digits.

    A number of a length of which the catalogue has so many that a telephone's could be among them by chance (more than
    one of 10,000 possible) is not known by being there.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._pending = array("Q")
        self._known = np.zeros(0, dtype=np.uint64)
        for text in texts:
            self.add(text)
        self.close()

    def add(self, text: str) -> None:
        """Takes up the numbers of a text of the catalogue: its runs of digits, and those of one word together."""
        for digits in _runs_of(text):
            self._pending.append(_code(digits))
        if len(self._pending) > 1 << 20:
            self.close()

    def close(self) -> None:
        """Must be called after the last text."""
        new = np.frombuffer(self._pending, dtype=np.uint64) if self._pending else np.zeros(0, dtype=np.uint64)
        self._known = np.unique(np.concatenate([self._known, new]))
        self._pending = array("Q")
        bounds = [np.searchsorted(self._known, np.array([10**n, 2 * 10**n], dtype=np.uint64)) for n in range(19)]
        self._dense = {n for n, (low, high) in enumerate(bounds) if int(high - low) > 10 ** (n - 4)}

    def __contains__(self, digits: str) -> bool:
        if not SHORTEST <= len(digits) <= 18 or len(digits) in self._dense:
            return False
        at = int(np.searchsorted(self._known, np.uint64(_code(digits))))
        return at < len(self._known) and int(self._known[at]) == _code(digits)


def _code(digits: str) -> int:
    return int("1" + digits)  # the leading one keeps leading zeros


def _runs_of(text: str) -> Iterator[str]:
    if not any(character.isdigit() for character in text):
        return
    for match in _RUN.finditer(plain(text)):
        whole = re.sub(r"\D", "", match[0])
        for digits in {whole, *re.findall(r"\d+", match[0])}:
            if SHORTEST <= len(digits) <= 18:
                yield digits


def plain(text: str) -> str:
    """The text in small letters with every script's digits as 0 to 9, one kind of dash, and nothing invisible."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        text = "".join(_plain_character(character) for character in text)
    return " ".join(text.lower().split())


@cache
def _plain_character(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Nd":
        return str(unicodedata.digit(character))
    return "-" if kind == "Pd" or character == "−" else "" if kind in ("Cf", "Mn", "Me") else character


def personal(text: str, known: ProductNumbers | None = None) -> str | None:
    """What of a person, or which address, is in a query: "e-mail", "card number", "phone number", "web address"; None
    where nothing is.

    Args:
        known: the catalogue's numbers, which are nobody's.
    """
    text = plain(text)
    if ("@" in text or "at" in text or "." in text or "dot" in text or "punkt" in text) and _EMAIL.search(text):
        return "e-mail"
    if ("." in text or "://" in text) and _URL.search(text):
        return "web address"
    if sum(map(str.isdigit, text)) < SHORTEST:
        return None
    for match in _RUN.finditer(text):
        if found := _number(text, match, known):
            return found
    return None


def _number(text: str, match: re.Match[str], known: ProductNumbers | None) -> str | None:
    run = match[0]
    digits = re.sub(r"\D", "", run)
    if len(digits) < SHORTEST:
        return None
    if known is not None and digits in known:
        return None
    if _is_card(digits):
        return "card number"
    if _BARCODE.fullmatch(run) and _is_gtin(digits) and not _WORDS.search(text) and not _rings(digits):
        return None
    if _is_measure(text, match):
        return None
    if len(digits) == len(run.strip("( ")) == SHORTEST:  # a bare number of seven digits has no area: a part's number
        return "phone number" if _WORDS.search(text) else None
    before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
    glued = (before.isalpha() and not re.search(r"[^\W\d_]{4}$", text[: match.start()])) or after.isalpha()
    if glued and digits == run and len(digits) <= 8 and not _WORDS.search(text):
        return None  # of a model's name: SM1234567
    if re.search(r"\s", run) and "+" not in run and not _dialled(run, digits) and not _WORDS.search(text):
        return _of_groups(run, known)
    return "phone number"


def _dialled(run: str, digits: str) -> bool:
    """Whether groups of digits between spaces can be one number that is dialled."""
    groups = [len(group) for group in re.findall(r"\d+", run)]
    return len(digits) >= 9 or groups in (
        [3, 4],
        [4, 4],
        [4, 3],
        [2, 2, 2, 2],
        [3, 2, 2],
        [2, 3, 3],
        [3, 2, 3],
        [1, 3, 4],
        [2, 6],
        [3, 5],
    )


def _of_groups(run: str, known: ProductNumbers | None) -> str | None:
    """Of several numbers side by side, whether one alone is a telephone's."""
    for part in run.split():
        digits = re.sub(r"\D", "", part)
        if len(digits) > SHORTEST and not (known is not None and digits in known):
            return "phone number"
    return None


def _is_measure(text: str, match: re.Match[str]) -> bool:
    run = match[0].strip(" .,:;-/()*")
    end = match.start() + match[0].rfind(run[-1]) + 1
    if _DATE.fullmatch(run) or _YEARS.fullmatch(run) or _TYRE.fullmatch(run) or _PRICE.fullmatch(run):
        return True
    if _MONEY.fullmatch(run) and (_SIGN.match(text, end) or _SIGN_BEFORE.search(text[: match.start()])):
        return "." in run or "," in run or len(run) <= 7
    return len(re.sub(r"\D", "", run)) <= 9 and bool(_SIZE.fullmatch(run) and _UNIT.match(text, end))


def _is_card(digits: str) -> bool:
    if not 13 <= len(digits) <= 19 or not _CARDS.match(digits):
        return False
    if len(digits) == 13 and _is_gtin(digits):  # cards of 13 digits are long gone
        return False
    doubled = (int(digit) * (2 if place % 2 else 1) for place, digit in enumerate(reversed(digits)))
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def _is_gtin(digits: str) -> bool:
    """Whether it ends in the check digit of a UPC, an EAN (an ISBN of 13 digits is one) or a GTIN-14."""
    if len(digits) not in (12, 13, 14):
        return False
    total = sum(int(digit) * (3 if place % 2 else 1) for place, digit in enumerate(reversed(digits)))
    return total % 10 == 0


@cache
def _library() -> Any:
    import phonenumbers

    return phonenumbers


def _rings(digits: str) -> bool:
    """Whether a telephone has it: dialled with the country's code, or a mobile's at home where numbers are so long."""
    library = _library()
    abroad = ["+" + digits, *("+" + digits[n:] for n, prefix in ((2, "00"), (3, "011")) if digits.startswith(prefix))]
    if any(_valid(form, None) for form in abroad):
        return True
    return digits[0] == "0" and any(
        (number := _valid(digits, region)) and library.number_type(number) == library.PhoneNumberType.MOBILE
        for region in ("DE", "AT", "ID", "BR")
    )


def _valid(form: str, region: str | None) -> Any:
    library = _library()
    try:
        number = library.parse(form, region)
    except library.NumberParseException:
        return None
    return number if library.is_valid_number(number) else None
