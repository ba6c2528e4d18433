"""Write the data of the built-in reasoning suite: small problems of arithmetic and logic at three levels.

Deterministic: each task draws from its own `random.Random(name)`, so adding a task changes no other.
With `--check`, write nothing and fail if the file is out of date.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parents[1] / "src/holdfast/measure/suites/data/reasoning.json"
LEVELS = (1, 2, 3)
QUESTION = "Q: {question}\nA:"
EACH = 24  # items of a level; divisible by 2, 3 and 4, so that right answers stand in each place equally often
MOST_EQUAL = 2  # items of one task with the same free answer, or a constant guesser would do well
ABOUT = (
    "Small problems of arithmetic and logic, written for this project by tools/make_reasoning.py. An item has a level"
    " (1 easy to 3 hard), a question, the answers to choose from (one where the answer is free) and the right one."
)

Item = dict[str, Any]
Builder = Callable[[random.Random, int], Iterator[Item]]

NAMES = "Ann Ben Carl Dora Eva Finn Grace Hugo Ida Jack Kate Leo Mia Nick Olga Paul Rosa Sam Tina Vera".split()
THINGS = "apples marbles stamps pencils shells cards buttons beads".split()
KINDS = "wug dob fop zib lorp mib tove garn".split()
QUALITIES = "red green heavy round soft cold loud sweet".split()
RELATIONS = (
    ("taller", "shorter", "tallest", "shortest"),
    ("older", "younger", "oldest", "youngest"),
    ("faster", "slower", "fastest", "slowest"),
    ("stronger", "weaker", "strongest", "weakest"),
)

# A word problem and how it is solved. a, e: larger numbers; b, c, d: 2 to 9; n, m: names; t: things.
WORDS = {
    1: """{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?|{a} + {b}
There are {a} {t} in a box. {n} takes out {b}. How many {t} are left in the box?|{a} - {b}
One ticket costs {b} coins. How many coins do {c} tickets cost?|{b} * {c}
{n} read {a} pages on Monday and {b} pages on Tuesday. How many pages is that in all?|{a} + {b}
A rope is {a} metres long. {n} cuts off {b} metres. How many metres are left?|{a} - {b}
A hall has {b} rows of {c} chairs. How many chairs are there?|{b} * {c}
{n} walked {b} miles in the morning and {c} miles in the evening. How many miles is that in all?|{b} + {c}
A bus has {a} passengers. At the next stop {b} get off. How many passengers are left?|{a} - {b}
{n} fills {b} bags with {c} {t} each. How many {t} are in the bags?|{b} * {c}
{n} is {a} years old. How old will {n} be in {b} years?|{a} + {b}""",
    2: """{n} has {a} {t}, gives away {b} and then finds {c}. How many {t} does {n} have now?|{a} - {b} + {c}
{n} has {d} {t} and buys {b} packs of {c} {t} each. How many {t} does {n} have now?|{d} + {b} * {c}
There were {a} people in a hall. First {b} went home, then {c} more. How many people stayed?|{a} - {b} - {c}
A pen costs {b} coins. A book costs {c} coins more than the pen. What do both cost together?|{b} + {b} + {c}
{n} picks {a} plums, then {b} more, and eats {c} of them. How many plums are left?|{a} + {b} - {c}
A baker makes {b} trays of {c} rolls and sells {d} rolls. How many rolls are left?|{b} * {c} - {d}
A train has {a} passengers. At a station {b} get off and {c} get on. How many are there now?|{a} - {b} + {c}
{n} buys {b} cups for {c} coins each and pays with {a} coins. How many coins come back?|{a} - {b} * {c}
{n} saves {b} coins a week for {c} weeks and then spends {d} coins. How many coins are left?|{b} * {c} - {d}
{n} has {b} coins. {m} has {c} times as many. How many coins do they have together?|{b} + {b} * {c}""",
    3: """A shop has {a} {t}. It gets {b} boxes of {c} {t} and sells {d} {t}. How many are left?|{a} + {b} * {c} - {d}
{n} has {b} boxes. Each holds {c} red and {d} blue balls. How many balls are there?|{b} * ({c} + {d})
{n} works {b} hours a day for {c} days and earns {d} coins an hour. How many coins is that?|{b} * {c} * {d}
{n} has {e} coins and buys {b} books for {c} coins each and a bag for {d} coins. What is left?|{e} - {b} * {c} - {d}
A farm has {b} cows and {c} times as many hens. It sells {d} animals. How many stay?|{b} + {b} * {c} - {d}
For {c} days {n} runs {b} miles a day and {m} runs {d}. How many miles do both run together?|({b} + {d}) * {c}
A cinema has {b} rows of {c} seats. {a} seats are taken and {d} are broken. How many are free?|{b} * {c} - {a} - {d}
{b} children bring {c} {t} each and fill boxes of {d}. How many boxes do they fill?|{b} * {c} / {d}
{n} bakes {e} rolls, keeps {a} and fills bags of {b} with the rest. How many bags are filled?|({e} - {a}) / {b}
A book has {e} pages. {n} reads {b} pages a day for {c} days, then {a} more. What is left?|{e} - {b} * {c} - {a}""",
}  # fmt: skip


def _free(level: int, question: str, answer: int | str, **more: Any) -> Item:
    return {"level": level, "question": question, "answers": [str(answer)], "right": 0, **more}


def _addition(rng: random.Random, level: int) -> Iterator[Item]:
    low, high = ((11, 88), (15, 89), (120, 899))[level - 1]
    while True:
        a, b = rng.randint(low, high), rng.randint(low, high)
        carries = a % 10 + b % 10 > 9
        if carries == (level > 1) and (level > 1 or a + b < 100) and b % 10:
            yield _free(level, f"{a} + {b}", a + b)


def _multiplication(rng: random.Random, level: int) -> Iterator[Item]:
    (low, high), (least, most) = (((2, 9), (2, 9)), ((11, 49), (3, 9)), ((12, 49), (12, 29)))[level - 1]
    while True:
        a, b = rng.randint(low, high), rng.randint(least, most)
        if a % 10 and b % 10:
            yield _free(level, f"{a} * {b}", a * b)


CHAINS = (
    ("{b} + {c} + {d}",),
    ("{a} + {b} - {c}", "{a} - {b} + {c}"),
    ("({a} + {b}) * {c}", "{b} * {c} + {a} - {d}", "({b} + {c}) * {d} - {b}"),
)


def _chain(rng: random.Random, level: int) -> Iterator[Item]:
    while True:
        expression = rng.choice(CHAINS[level - 1]).format(**_numbers(rng))
        yield from (_free(level, expression, x) for x in _value(expression))


def _word_problem(rng: random.Random, level: int) -> Iterator[Item]:
    forms = [line.split("|") for line in WORDS[level].splitlines()]
    while True:
        for question, expression in forms:
            n, m = rng.sample(NAMES, 2)
            fill: dict[str, Any] = {"n": n, "m": m, "t": rng.choice(THINGS)}
            while True:  # draw until the numbers suit this form, or forms that seldom suit would be rare
                fill |= _numbers(rng)
                if value := _value(expression.format(**fill)):
                    break
            solved = expression.format(**fill)
            yield _free(level, question.format(**fill), value[0], expression=solved)


def _numbers(rng: random.Random) -> dict[str, int]:
    small = {k: rng.randint(2, 9) for k in "bcd"}
    return {"a": rng.randint(12, 48), "e": rng.randint(60, 120), **small}


def _value(expression: str) -> list[int]:
    """The value, if it is a whole number that a small problem may have."""
    value = eval(expression, {"__builtins__": {}})
    return [int(value)] if value == int(value) and 2 <= value <= 400 else []


def _comparison(rng: random.Random, level: int) -> Iterator[Item]:
    """1: numbers far apart, 2: the longer one begins with a smaller digit, 3: four digits that differ in one."""
    while True:
        if level == 1:
            a, b = rng.randint(11, 99), rng.randint(11, 99)
            fits = abs(a - b) >= 20
        elif level == 2:
            a, b = rng.sample((rng.randint(21, 99), rng.randint(101, 899)), 2)
            fits = (str(a) < str(b)) != (a < b)
        else:
            a = rng.randint(1111, 9999)
            place = rng.choice((1, 10, 100))
            b, fits = a + place * rng.choice((-2, -1, 1, 2)), True
        if fits and a != b:
            answers = [str(a), str(b)]
            yield {"level": level, "question": f"{a} and {b}", "answers": answers, "right": 0 if a > b else 1}


def _sequence(rng: random.Random, level: int) -> Iterator[Item]:
    """1: count up by 1 to 5 or 10, 2: other steps, also down, and doubling, 3: growing or alternating steps, sums."""
    while True:
        start = rng.randint(1, 30)
        if level == 1:
            terms = _walk(start, [rng.choice((1, 2, 3, 4, 5, 10))] * 5)
        elif level == 2:
            terms = rng.choice((_walk, _down, _doubling))(start, [rng.choice((6, 7, 8, 9, 11, 12))] * 5)
        else:
            first, second = rng.sample(range(1, 8), 2)
            grown = [first + n * (1 + second % 3) for n in range(5)]
            terms = rng.choice(
                (
                    _walk(start, grown),
                    _walk(start, [first, second, first, second, first]),
                    _sums(first, first + second),
                )
            )
        near = [terms[5] + d for d in (-10, -3, -2, -1, 1, 2, 3, 10) if terms[5] + d > 0]
        answers = rng.sample([terms[5], *rng.sample(near, 3)], 4)
        question = ", ".join(map(str, terms[:5]))
        place = answers.index(terms[5])
        yield {"level": level, "question": question, "answers": [str(x) for x in answers], "right": place}


def _walk(start: int, steps: Sequence[int]) -> list[int]:
    return [start + sum(steps[:n]) for n in range(len(steps) + 1)]


def _down(start: int, steps: Sequence[int]) -> list[int]:
    return [start + sum(steps[n:]) for n in range(len(steps) + 1)]


def _doubling(start: int, steps: Sequence[int]) -> list[int]:
    return [(start % 9 + 2) * 2**n for n in range(len(steps) + 1)]


def _sums(a: int, b: int) -> list[int]:
    terms = [a, b]
    while len(terms) < 6:
        terms.append(terms[-2] + terms[-1])
    return terms


def _ordering(rng: random.Random, level: int) -> Iterator[Item]:
    """1: one word for the order, 2: one or both, 3: five people, three of them asked about."""
    while True:
        more, less, most, least = rng.choice(RELATIONS)
        if level == 1 and rng.random() < 0.5:
            more, less = less, more
            most, least = least, most
        people = rng.sample(NAMES, 5 if level == 3 else 3)  # the first has the most
        words = [more] * (len(people) - 1) if level == 1 else rng.sample((more, less) * 2, len(people) - 1)
        facts = [
            f"{a} is {word} than {b}." if word == more else f"{b} is {word} than {a}."
            for word, (a, b) in zip(words, pairwise(people), strict=True)
        ]
        rng.shuffle(facts)
        text = " ".join(facts)
        up = rng.random() < 0.5
        if level == 3:
            asked = rng.sample(people, 3)
            question = f"Who is the {most if up else least} of {asked[0]}, {asked[1]} and {asked[2]}?"
        else:
            asked = sorted(people, key=text.index)  # in the order in which they are first named
            question = f"Who is the {most if up else least}?"
        ranked = sorted(asked, key=people.index)
        right = asked.index(ranked[0] if up else ranked[-1])
        yield {"level": level, "question": f"{text} {question}", "answers": asked, "right": right}


def _syllogism(rng: random.Random, level: int) -> Iterator[Item]:
    """Two chains of kinds, `level` links each, one to a quality and one to its absence; who belongs to which?

    Both words, "all" and "no", stand in every item, so neither tells the answer.
    """
    while True:
        kinds, quality, name = rng.sample(KINDS, 2 * level), rng.choice(QUALITIES), rng.choice(NAMES)
        has, lacks = kinds[:level], kinds[level:]
        facts = [f"All {a}s are {b}s." for ks in (has, lacks) for a, b in pairwise(ks)]
        facts += [f"All {has[-1]}s are {quality}.", f"No {lacks[-1]}s are {quality}."]
        rng.shuffle(facts)
        yes = rng.random() < 0.5
        question = f"{' '.join(facts)} {name} is a {(has if yes else lacks)[0]}. Is {name} {quality}?"
        yield {"level": level, "question": question, "answers": ["yes", "no"], "right": 0 if yes else 1}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One task; `name` is the seed of its draws.

    shots: "question|answer" or "question|answer|worked steps"; form: how a question is asked (small base models do
    better with "2 + 3 =" than with a question).
    """

    name: str
    kind: str
    build: Builder
    shots: str
    form: str = QUESTION


SPECS = [
    Spec(name="addition", kind="exact", form="{question} =", build=_addition, shots="""21 + 34|55
47 + 26|73
60 + 38|98
318 + 257|575"""),
    Spec(name="multiplication", kind="exact", form="{question} =", build=_multiplication, shots="""3 * 10|30
20 * 4|80
1 * 7|7
15 * 20|300"""),
    Spec(name="arithmetic chain", kind="exact", form="{question} =", build=_chain,
         shots="""1 + 4 + 6|11|1 + 4 = 5. 5 + 6 = 11.
20 - 7 + 10|23|20 - 7 = 13. 13 + 10 = 23.
(11 + 3) * 2|28|11 + 3 = 14. 14 * 2 = 28.
4 * 5 + 10 - 6|24|4 * 5 = 20. 20 + 10 = 30. 30 - 6 = 24."""),
    Spec(name="word problem", kind="exact", build=_word_problem,
         shots="""Tom has 10 eggs and buys 6 more. How many eggs does Tom have now?|16|10 + 6 = 16.
Lucy has 3 boxes of 5 cups and breaks 2 cups. How many cups are left?|13|3 * 5 = 15. 15 - 2 = 13.
There are 30 birds in a tree. First 8 fly away, then 4. How many stay?|18|30 - 8 = 22. 22 - 4 = 18.
Max buys 2 hats for 9 coins each and a tie for 7 coins. What does he pay?|25|2 * 9 = 18. 18 + 7 = 25."""),
    Spec(name="sequence", kind="choice", form="{question},", build=_sequence, shots="""2, 4, 6, 8, 10|12
60, 50, 40, 30, 20|10
1, 3, 9, 27, 81|243
1, 2, 4, 7, 11|16"""),
    Spec(name="comparison", kind="choice", form="The larger number of {question} is", build=_comparison,
         shots="""10 and 50|50
90 and 20|90
210 and 70|210
3000 and 4000|4000"""),
    Spec(name="ordering", kind="choice", build=_ordering,
         shots="""Tom is older than Lucy. Lucy is older than Max. Who is the oldest?|Tom
Max is slower than Ella. Max is faster than Tom. Who is the slowest?|Tom
Lucy is stronger than Tom. Ella is stronger than Lucy. Who is the weakest?|Tom
Tom is shorter than Max. Lucy is taller than Max. Who is the tallest?|Lucy"""),
    Spec(name="syllogism", kind="choice", build=_syllogism,
         shots="""All cogs are blue. No pims are blue. Tom is a cog. Is Tom blue?|yes
All cogs are hot. No pims are hot. Lucy is a pim. Is Lucy hot?|no
No pims are old. All wuds are cogs. All cogs are old. Max is a pim. Is Max old?|no
All wuds are pims. No cogs are new. All pims are new. Ella is a wud. Is Ella new?|yes"""),
]  # fmt: skip


def _items(spec: Spec) -> list[Item]:
    """EACH different items of every level; the right one of several answers stands in each place equally often."""
    rng, out = random.Random(spec.name), []
    seen = {shot.split("|")[0] for shot in spec.shots.splitlines()}
    answers: Counter[str] = Counter()
    for level in LEVELS:
        places: Counter[int] = Counter()
        made = spec.build(rng, level)
        while sum(places.values()) < EACH:
            item = next(made)
            choices = len(item["answers"])
            full = places[item["right"]] >= EACH // choices or (
                choices == 1 and answers[item["answers"][0]] >= MOST_EQUAL
            )
            if item["question"] not in seen and not full:
                seen.add(item["question"])
                places[item["right"]] += 1
                answers[item["answers"][0]] += 1
                out.append(item)
    return out


def _shot(line: str) -> dict[str, str]:
    return dict(zip(("question", "answer", "steps"), line.split("|"), strict=False))


def render() -> str:
    """The JSON text of the suite's data, one item a line; the same on every machine."""

    def lines(rows: Sequence[Any]) -> str:
        return "[\n" + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"

    tasks = [
        f'  {{"name": {json.dumps(s.name)}, "kind": {json.dumps(s.kind)}, "form": {json.dumps(s.form)},\n  "shots": '
        f'{lines([_shot(line) for line in s.shots.splitlines()])},\n  "items": {lines(_items(s))}}}'
        for s in SPECS
    ]
    return f'{{"version": 1,\n "about": {json.dumps(ABOUT)},\n "tasks": [\n' + ",\n".join(tasks) + "\n ]}\n"


def main(argv: list[str] | None = None) -> int:
    """Write the data, or with `--check` return 1 if the file is out of date."""
    parser = argparse.ArgumentParser(description="Write the data of the reasoning suite.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the file is out of date")
    if not parser.parse_args(argv).check:
        PATH.write_text(render(), encoding="utf-8")
    elif not PATH.exists() or PATH.read_text(encoding="utf-8") != render():
        print(f"out of date: {PATH.name}; run python tools/make_reasoning.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
