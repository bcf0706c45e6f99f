"""Raw files as a shop has them, made from a seed: a catalogue, a query log and clicks with every kind of dirt.

python results/measure/raw_logs.py /tmp/raw --lines 2000000 --ads 20000
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hlm.data.sample_catalogue import row as sample_ad

START = 1_700_000_000  # seconds since 1970
DAYS = 60
DOMAINS = ("gmail.com", "web.de", "example.org", "mail.example.co.uk", "gmx.net")
NAMES = "anna bob carla dmitri elif farah giorgos hana ivan jane kofi lena maria noah olga pavel".split()
# Forms of telephone numbers: # is any digit, 1 one from 1 to 9.
PHONES = (
    "+49 1## #######", "+49-1##-########", "00491##########", "01## ########", "(01##) ### ####", "+1 (1##) 1##-####",
    "1##-1##-####", "1##.1##.####", "1## 1## ####", "(1##) 1##-####", "+1 1## 1## ####", "+44 20 #### ####",
    "07### ######", "+33 1 ## ## ## ##", "06 ## ## ## ##", "+34 6## ## ## ##", "+39 3## #######", "+91 ##### #####",
    "+86 1## #### ####", "+7 (9##) ###-##-##", "0##/1######", "030-1#######", "0049 (0)30 1#######", "+4930 1#######",
    "call 1##-####", "tel. 1######", "tel:+4917########", "whatsapp +55 11 9#### ####", "phone 0171/#######",
    "+81 90-####-####",
    "+43 664 #######", "+41 79 ### ## ##", "8 (9##) ### ## ##", "+90 5## ### ## ##",
)  # fmt: skip
CARDS = (
    ("4", 16),
    ("51", 16),
    ("55", 16),
    ("2221", 16),
    ("34", 15),
    ("37", 15),
    ("6011", 16),
    ("36", 14),
    ("3528", 16),
)


def luhn(digits: str) -> str:
    """The digits with their check digit."""
    doubled = (int(digit) * (2 if place % 2 == 0 else 1) for place, digit in enumerate(reversed(digits)))
    return digits + str(-sum(value - 9 if value > 9 else value for value in doubled) % 10)


def ean(digits: str) -> str:
    """Twelve digits with the check digit of an EAN."""
    return digits + str(-sum(int(d) * (3 if place % 2 else 1) for place, d in enumerate(digits)) % 10)


def email(rng: random.Random) -> str:
    name = rng.choice(NAMES) + rng.choice(("", ".", "_", "-")) + rng.choice(NAMES) + str(rng.randrange(1000))
    domain = rng.choice(DOMAINS)
    spelled = (
        f"{name}@{domain}",
        f"{name} @ {domain}",
        f"{name}@{domain}".upper(),
        f"mailto:{name}@{domain}",
        f"{name}＠{domain}",
        f"{name}%40{domain}",
        f"{name} at {domain.replace('.', ' dot ')}",
        f"{name}(at){domain}",
        f"{name} [at] {domain}",
        f"<{name}@{domain}>",
        f"{name}@\u200b{domain}",
        f"{name}&#64;{domain}",
    )
    return rng.choice(spelled)


def phone(rng: random.Random) -> str:
    form = rng.choice(PHONES)
    made = "".join(str(rng.randrange(10)) if c == "#" else c for c in form)
    if rng.random() < 0.05:
        made = made.replace(" ", "\u00a0")
    if rng.random() < 0.03:
        made = made.translate({ord(str(n)): chr(0x0660 + n) for n in range(10)})
    if rng.random() < 0.03:
        made = made.translate({ord(str(n)): chr(0xFF10 + n) for n in range(10)})
    return made


def card(rng: random.Random) -> str:
    start, length = rng.choice(CARDS)
    digits = luhn(start + "".join(str(rng.randrange(10)) for _ in range(length - 1 - len(start))))
    sign = rng.choice(("", " ", "-", "."))
    return sign.join(digits[at : at + 4] for at in range(0, length, 4))


def personal_query(rng: random.Random) -> str:
    """An e-mail address, a telephone or a card number, alone or among words."""
    made = rng.choice((email, phone, card))(rng)
    before, after = (
        rng.choice(("", "", "red shoes ", "order status ", "contact ")),
        rng.choice(("", "", " return", " lamp")),
    )
    return before + made + after


def product_number(rng: random.Random, number: int) -> str:
    """What looks like a number and is a product's: of the catalogue, or a size, price, tyre, model, year or ISBN."""
    a, b, c = rng.randrange(10, 99), rng.randrange(100, 999), rng.randrange(1000, 9999)
    forms = (
        ean_of(number),
        article_of(number),
        f"wh-{c}xm{a % 9}",
        f"rtx {c}",
        f"{a}x{b}x{a} cm",
        f"{b} x {b} x {a} mm",
        f"205/55 R{15 + a % 6} tyre",
        f"225 45 {15 + a % 6}",
        f"{a}.{b},99 €",
        f"${a},{b}.50",
        f"iphone {a % 16} {b % 5 * 128 or 64} gb",
        f"calendar {2000 + a % 30} {2001 + a % 30}",
        f"sm-g{b}b",
        f"lego {c}{a % 9}",
        f"{ean('978' + f'{number:05d}{c}')} book",
        f"{c} mah powerbank",
        f"M{a % 20} x {b} screw",
        f"SN{c}{b}",
        f"{b}-{a}-{a % 9} filter",
        f"usb 3.{a % 3} {c} mbit",
    )
    return rng.choice(forms)


def ean_of(number: int) -> str:
    return ean(f"40{number * 7919 % 10**10:010d}")


def article_of(number: int) -> str:
    """Ten digits that could be a telephone's."""
    return f"0{(445_110_376 + number * 104_729) % 10**9:09d}"


def catalogue(folder: Path, ads: int, seed: int) -> None:
    with open(folder / "ads.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["sku", "name", "description", "bid_keyword", "landing_url", "brand"])
        for number in range(ads):
            ad = sample_ad(seed, number)
            text = f"<p>{ad['text']}</p> EAN {ean_of(number)}, article {article_of(number)} &amp; more"
            bids = " | ".join(
                [f"[{ad['bid_keywords'][0]}]", f'"{ad["bid_keywords"][1]}"', ad["bid_keywords"][2], "-free"]
            )
            writer.writerow([ad["_id"], ad["title"], text, bids, f"https://shop.example/{number}", ad["brand"]])


def words_of(ads: int, seed: int, distinct: int) -> list[tuple[str, int]]:
    """Queries and the ad that each wants."""
    rng = random.Random(f"queries {seed}")
    made = []
    for _ in range(distinct):
        number = rng.randrange(ads)
        ad = sample_ad(seed, number)
        attributes = list(ad["attributes"].values())
        form = rng.choice(("{c}", "{b} {c}", "{a} {c}", "{a} {a2} {c}", "{b}", "{c} for {a}"))
        made.append((form.format(c=ad["category"], b=ad["brand"], a=attributes[0], a2=attributes[1]), number))
    return made


def lines(ads: int, total: int, seed: int) -> Iterator[tuple[str, str, str, str, int, int]]:
    """(time, user, query, ad, position, clicked) of each line of the log."""
    rng = random.Random(f"log {seed}")
    wanted = words_of(ads, seed, max(50, total // 100))
    weights = [1 / (rank + 10) for rank in range(len(wanted))]
    drawn = iter(())
    for number in range(total):
        at = START + number * DAYS * 86_400 // total
        when = datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
        user = f"user{rng.randrange(max(20, total // 20))}"
        dirt = rng.random()
        choice = next(drawn, None)
        if choice is None:
            drawn = iter(rng.choices(wanted, weights, k=10_000))
            choice = next(drawn)
        query, ad = choice
        if number % (total // 4) < total // 100:  # four robots, each for some hours
            user = f"robot{number // (total // 4)}"
        elif dirt < 0.03:
            user, query = "burst", "best cheap offer"
        elif dirt < 0.04:
            query = rng.choice(("", "  ", "???", "-", "\u200b"))
        elif dirt < 0.05:
            query = rng.choice(("https://shop.example/sale?id=7", "www.example.org", "shop.example.com/shoes"))
        elif dirt < 0.06:
            query = " ".join([query] * 30)
        elif dirt < 0.07:
            query = product_number(rng, rng.randrange(ads))
        elif dirt < 0.12:
            query = rng.choice(
                (query.upper(), f"  {query} ", query.title(), query.replace(" ", "\u00a0"), f'"{query}"')
            )
        elif dirt < 0.14:
            query = f"{query} {rng.randrange(10**6)}"  # a tail that nobody else types
        position = min(10, 1 + int(rng.expovariate(0.4)))
        clicked = int(rng.random() < 0.6 / position)
        yield when, user, query, f"ad{(ad if rng.random() < 0.7 else rng.randrange(ads)):07d}", position, clicked


class Line(NamedTuple):
    """What one user searched for and was shown; `number` counts the lines of the log, and is None of a planted one."""

    number: int | None
    when: str
    user: str
    query: str
    ad: str
    position: int
    clicked: int

    @property
    def shows(self) -> bool:
        """Whether the ad shown is known: of every second line, and of what was planted."""
        return self.number is None or self.number % 2 == 0


def planted_into(secrets: Sequence[str], ads: int, total: int, seed: int) -> Iterator[Line]:
    """The log's lines, and evenly among them every secret by more users than are asked for."""
    every = max(1, total // max(1, len(secrets)))
    left = iter(secrets)
    for number, (when, user, query, ad, position, clicked) in enumerate(lines(ads, total, seed)):
        if number % every == 0 and (secret := next(left, None)) is not None:
            for other in range(6):
                yield Line(None, when, f"user{other}", secret, ad, 1, 1)
        yield Line(number, when, user, query, ad, position, clicked)


def secrets_of(planted: int, seed: int) -> list[str]:
    rng = random.Random(f"planted {seed}")
    return [personal_query(rng) for _ in range(planted)]


def make(folder: Path, *, total: int, ads: int, planted: int = 0, seed: int = 0) -> list[str]:
    """Writes ads.csv, queries.csv and clicks.csv; returns the personal queries that were planted into the last two."""
    folder.mkdir(parents=True, exist_ok=True)
    catalogue(folder, ads, seed)
    secrets = secrets_of(planted, seed)
    with (
        open(folder / "queries.csv", "w", encoding="utf-8", newline="") as log,
        open(folder / "clicks.csv", "w", encoding="utf-8", newline="") as clicks,
    ):
        log_rows, click_rows = csv.writer(log), csv.writer(clicks)
        log_rows.writerow(["timestamp", "user_id", "search_term"])
        click_rows.writerow(["timestamp", "user_id", "search_term", "sku", "position", "clicked"])
        for line in planted_into(secrets, ads, total, seed):
            log_rows.writerow([line.when, line.user, line.query])
            if line.shows:
                click_rows.writerow(line[1:])
            if line.number is not None and line.number % 5000 == 4999:
                log.write(f'{line.when},"broken\r\n')
                log.write(f"{line.when},{line.user},too,many,cells\r\n")
    return secrets


def make_ubi(folder: Path, *, total: int, ads: int, planted: int = 0, seed: int = 0) -> list[str]:
    """Writes ads.csv, and the same log as one ubi.ndjson of queries and events; returns the personal queries in it."""
    folder.mkdir(parents=True, exist_ok=True)
    catalogue(folder, ads, seed)
    secrets = secrets_of(planted, seed)
    with open(folder / "ubi.ndjson", "w", encoding="utf-8") as file:
        for place, line in enumerate(planted_into(secrets, ads, total, seed)):
            stamp = f"{line.when.replace(' ', 'T')}.000Z"
            about = {"query_id": f"q{place}", "client_id": line.user, "timestamp": stamp}
            file.write(json.dumps({"user_query": line.query, **about}) + "\n")
            shown = {"object": {"object_id": line.ad}, "position": {"ordinal": line.position}}
            actions = ("impression", "click")[: 1 + line.clicked] if line.shows else ()
            for action in actions:
                file.write(json.dumps({"action_name": action, **about, "event_attributes": shown}) + "\n")
    return secrets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lines", type=int, default=2_000_000)
    parser.add_argument("--ads", type=int, default=20_000)
    parser.add_argument("--planted", type=int, default=10_000)
    options = parser.parse_args()
    make(options.folder, total=options.lines, ads=options.ads, planted=options.planted)


if __name__ == "__main__":
    main()
