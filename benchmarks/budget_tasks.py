"""Four made tasks of other kinds than labels, on which nothing of the default plan was chosen.

    talk      a conversation of two answers, both trained on; exact (leaderboard_talk)
    dates     a sentence with a date in words -> the date as ISO 8601; exact
    orders    an order in words -> four fields as JSON; exact
    totals    two amounts in words and digits -> their sum; the number

Every row is drawn from a seed, no row of one split stands in another.
"""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import leaderboard_talk

ROWS = {"train": 1200, "validation": 100, "test": 200}
Row = dict[str, str]

SAID = ("We meet on {}.", "The lease ends {}.", "Please come on {}!", "She was born on {}.", "Paid on {}, by cheque.",
        "The shop closed {} and never opened again.", "Deadline: {}.", "He wrote the letter on {}.")  # fmt: skip
DATES = ("{d} {month} {y}", "{month} {d}, {y}", "the {nth} of {month} {y}", "{mon} {nth}, {y}", "{d}. {mon} {y}")

WHO = ("Ann", "Bela", "Chidi", "Dora", "Emre", "Farah", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena", "Mara", "Nils")
FAMILY = ("Adeyemi", "Brandt", "Costa", "Diaz", "Eriksen", "Fischer", "Gupta", "Horvat", "Ito", "Jansen", "Kowalski")
THINGS = ("kettle", "lamp", "blanket", "notebook", "teapot", "chair", "mirror", "clock", "basket", "pillow", "vase")
CITIES = ("Leeds", "Porto", "Graz", "Lagos", "Kyoto", "Lima", "Oslo", "Turin", "Quito", "Gdansk", "Cork", "Perth")
ORDERS = (
    "Hello, {who} {family} here. Could you send {n} {things} to {city}?",
    "Please ship {n} {things} to {city}. Regards, {who} {family}",
    "I would like {n} {things}, delivered to {city}. My name is {who} {family}.",
    "To {city}, please: {n} {things}, for {who} {family}.",
)
TOTALS = (
    "{who} has {a} {x} and buys {b} more.",
    "There are {a} {x} on the table and {b} on the floor.",
    "{who} found {a} {x} on Monday and {b} {x} on Tuesday.",
    "A box holds {a} {x}, another one holds {b}.",
)
WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def dates(rng: random.Random) -> Row:
    day = datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(30_000))
    end = {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10 if day.day not in (11, 12, 13) else 0, "th")
    parts = {"d": day.day, "nth": f"{day.day}{end}", "month": f"{day:%B}", "mon": f"{day:%b}", "y": day.year}
    text = rng.choice(SAID).format(rng.choice(DATES).format(**parts))
    return {"prompt": f"{text}\nISO date:", "completion": f" {day.isoformat()}"}


def orders(rng: random.Random) -> Row:
    who, family, thing, city = (rng.choice(known) for known in (WHO, FAMILY, THINGS, CITIES))
    n = rng.randint(2, 40)
    text = rng.choice(ORDERS).format(who=who, family=family, n=n, things=f"{thing}s", city=city)
    fields = {"name": f"{who} {family}", "item": thing, "count": n, "city": city}
    return {"prompt": f"{text}\nJSON:", "completion": " " + json.dumps(fields)}


def totals(rng: random.Random) -> Row:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    shown = [rng.choice((str(n), WORDS[n - 2])) for n in (a, b)]
    text = rng.choice(TOTALS).format(who=rng.choice(WHO), a=shown[0], b=shown[1], x=f"{rng.choice(THINGS)}s")
    return {"prompt": f"{text} How many are there in all?\nTotal:", "completion": f" {a + b}"}


def _drawn(make: Callable[[random.Random], Row], seed: str) -> dict[str, list[Row]]:
    """The splits, without a row twice."""
    rng, known, out = random.Random(seed), set[str](), {}
    for split, count in ROWS.items():
        rows: list[Row] = []
        while len(rows) < count:
            row = make(rng)
            if row["prompt"] not in known:
                known.add(row["prompt"])
                rows.append(row)
        out[split] = rows
    return out


def _write(make: Callable[[random.Random], Row], folder: Path) -> None:
    for split, rows in _drawn(make, make.__name__).items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def _talks(folder: Path) -> None:
    for split in ROWS:
        told = leaderboard_talk.tickets(split)
        leaderboard_talk.write(told if split == "train" else told[:120], folder / f"{split}.jsonl", split != "train")


MADE: Mapping[str, tuple[str, Callable[[Path], None]]] = {  # metric, and what writes train, validation and test
    "talk": ("exact_match", _talks),
    "dates": ("exact_match", lambda folder: _write(dates, folder)),
    "orders": ("exact_match", lambda folder: _write(orders, folder)),
    "totals": ("number", lambda folder: _write(totals, folder)),
}


def data(task: str, folder: Path) -> dict[str, Any]:
    """The section `data` of a recipe, its files written in `folder`."""
    metric, write = MADE[task]
    folder.mkdir(parents=True, exist_ok=True)
    write(folder)
    return {**{split: str(folder / f"{split}.jsonl") for split in ROWS}, "metric": metric}
