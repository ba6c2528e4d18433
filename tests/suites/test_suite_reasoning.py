"""The reasoning suite: every answer solved again by other code, the judge, and what simple guessers score."""

import json
import re
import runpy
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from holdfast.measure.asking import _choice, score_suite
from holdfast.measure.probe import Ask
from holdfast.measure.scorer import Score
from holdfast.measure.suites.reasoning import (
    DATA,
    LIMIT,
    build_suite,
    chance_of,
    final_answer_is,
    read_answer,
    spread,
)

TASKS = {t["name"]: t for t in json.loads(DATA.read_text(encoding="utf-8"))["tasks"]}
TOOL = Path(__file__).parents[2] / "tools" / "make_reasoning.py"
OPPOSITE = {"shorter": "taller", "younger": "older", "slower": "faster", "weaker": "stronger"}
MOST = {"tallest": "taller", "oldest": "older", "fastest": "faster", "strongest": "stronger"}
LEAST = {"shortest": "taller", "youngest": "older", "slowest": "faster", "weakest": "stronger"}


def arithmetic(question):
    return str(eval(re.fullmatch(r"[-+*() \d]+", question)[0]))


def sequence(question):
    """The continuation by every rule that fits; they must agree."""
    terms = [int(x) for x in re.findall(r"\d+", question)]
    steps = [b - a for a, b in pairwise(terms)]
    growth = [b - a for a, b in pairwise(steps)]
    found = set()
    if len(set(growth)) == 1:
        found.add(terms[-1] + steps[-1] + growth[-1])
    if steps[0] == steps[2] and steps[1] == steps[3]:
        found.add(terms[-1] + steps[0])
    if all(a + b == c for a, b, c in zip(terms, terms[1:], terms[2:], strict=False)):
        found.add(terms[-1] + terms[-2])
    if all(b * terms[0] == a * terms[1] for a, b in pairwise(terms)):
        found.add(terms[-1] * terms[1] // terms[0])
    (answer,) = found
    return str(answer)


def comparison(question):
    return max(re.fullmatch(r"(\d+) and (\d+)", question).groups(), key=int)


def ordering(question):
    above = set()
    for a, word, b in re.findall(r"(\w+) is (\w+) than (\w+)\.", question):
        above.add((b, a) if word in OPPOSITE else (a, b))
    people = {p for pair in above for p in pair}
    for _ in people:  # what is above something above is above
        above |= {(a, d) for a, b in above for c, d in above if b == c}
    word, names = re.search(r"Who is the (\w+)(.*)\?", question).groups()
    asked = set(re.findall(r"[A-Z]\w+", names)) or people
    relations = {OPPOSITE.get(w, w) for w in re.findall(r"is (\w+) than", question)}
    assert relations == {{**MOST, **LEAST}[word]}
    return next(p for p in asked if all((p, q) in above if word in MOST else (q, p) in above for q in asked - {p}))


def syllogism(question):
    kinds = dict(re.findall(r"All (\w+)s are (\w+)s\.", question))
    name, kind = re.search(r"(\w+) is a (\w+)\.", question).groups()
    quality = re.search(rf"Is {name} (\w+)\?", question)[1]
    while kind in kinds:
        kind = kinds[kind]
    answers = {"All": "yes", "No": "no"}
    return answers[re.search(rf"(All|No) {kind}s are {quality}\.", question)[1]]


SOLVERS = {
    "addition": arithmetic,
    "multiplication": arithmetic,
    "arithmetic chain": arithmetic,
    "sequence": sequence,
    "comparison": comparison,
    "ordering": ordering,
    "syllogism": syllogism,
}


def gold(item):
    return item["answers"][item["right"]]


def test_every_task_is_checked_here():
    assert set(TASKS) == {*SOLVERS, "word problem"}


@pytest.mark.parametrize("name", SOLVERS)
def test_the_answers_are_right(name):
    for item in TASKS[name]["items"]:
        assert SOLVERS[name](item["question"]) == gold(item), item
    for shot in TASKS[name]["shots"]:
        assert SOLVERS[name](shot["question"]) == shot["answer"], shot


def test_word_problems_are_solved_with_their_own_numbers():
    for item in TASKS["word problem"]["items"]:
        assert eval(item["expression"]) == int(gold(item)) > 0
        told = set(re.findall(r"\d+", item["question"]))
        assert told == set(re.findall(r"\d+", item["expression"])), item


@pytest.mark.parametrize("name", ("arithmetic chain", "word problem"))
def test_the_worked_steps_are_right_and_end_in_the_answer(name):
    for shot in TASKS[name]["shots"]:
        steps = re.findall(r"([^.=]+) = (\d+)\.", shot["steps"])
        assert steps and all(eval(left) == int(right) for left, right in steps)
        assert steps[-1][1] == shot["answer"]
        told = re.findall(r"\d+", shot["question"]) + [right for _, right in steps]
        assert all(n in told for left, _ in steps for n in re.findall(r"\d+", left))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_sound(name):
    task = TASKS[name]
    questions = [i["question"] for i in task["items"]] + [s["question"] for s in task["shots"]]
    assert len(task["items"]) >= 60 and len(task["shots"]) == 4
    assert len(set(questions)) == len(questions)
    assert all(q.isascii() and q == q.strip() and "\n" not in q and "Q:" not in q for q in questions)
    assert len(set(Counter(i["level"] for i in task["items"]).values())) == 1
    assert all(len(set(i["answers"])) == len(i["answers"]) for i in task["items"])
    assert (task["kind"] == "choice") == (len(task["items"][0]["answers"]) > 1)


def test_chances():
    chances = {name: chance_of(t) for name, t in TASKS.items()}
    closed = {"sequence": 1 / 4, "comparison": 1 / 2, "ordering": 1 / 3, "syllogism": 1 / 2}
    assert {n: c for n, c in chances.items() if n in closed} == closed
    assert all(c < 0.05 for n, c in chances.items() if n not in closed)


def test_shallow_rules_do_not_solve_the_logic():
    def share(name, rule):
        return sum(rule(i) for i in TASKS[name]["items"]) / len(TASKS[name]["items"])

    def last_named(item):
        return max(item["answers"], key=item["question"].rindex) == gold(item)

    def last_fact(item):
        last = re.findall(r"(All|No) \w+ are", item["question"])[-1]
        return gold(item) == {"All": "yes", "No": "no"}[last]

    assert share("ordering", last_named) < 0.5
    assert share("syllogism", last_fact) < 0.65
    assert share("comparison", lambda i: max(i["answers"]) == gold(i)) < 0.8  # as text, so 9 comes after 10


def test_the_data_is_what_the_tool_writes():
    assert runpy.run_path(str(TOOL))["main"](["--check"]) == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    (
        ("5 + 4 = 9. 9 - 2 = 7. The answer is 7.", "7"),
        ("The answer is 12", "12"),
        ("the Answer is: 1,250.", "1250"),
        ("The answer is -3.", "-3"),
        ("The answer is 2.5.", "2.5"),
        ("5 + 4 = 9.", None),
        ("The answer is not known.", None),
        ("I do not know.\nQ: What is 1 + 1?\nA: The answer is 2.", None),
        ("The answer is 8.\nQ: What is 1 + 1?\nA: The answer is 2.", "8"),
        ("", None),
    ),
)
def test_reading_the_final_answer(text, answer):
    assert read_answer(text) == answer


def test_the_judge_compares_numbers():
    assert final_answer_is("7", "5 + 2 = 7. The answer is 7.") == 1
    assert final_answer_is("7", "The answer is 7.0") == 1
    assert final_answer_is("7", "The answer is 70.") == 0
    assert final_answer_is("7", "5 + 2 = 7.") == 0


def test_spread_keeps_the_first_ones_balanced():
    items = [("a", n) for n in range(5)] + [("b", n) for n in range(3)]
    order = spread("key", items, lambda x: x[0])
    assert sorted(order) == sorted(items)
    assert [x for x, _ in order] == ["a", "b"] * 3 + ["a", "a"]
    assert order != spread("other", items, lambda x: x[0])


def comparable(suite):
    return suite.groups, suite.settings, [(p.id, p.context, p.answers, p.right, p.expected) for p in suite.probes]


def test_sizes_settings_and_building_twice(tokenizer):
    suite = build_suite(Ask(tokenizer))
    counts = Counter(p.task for p in suite.probes)
    twins = {g.name for g in suite.groups if g.name.endswith(" with steps")}
    assert twins == {"arithmetic chain with steps", "word problem with steps"}
    assert all(counts[g.name] == (8 if g.name in twins else LIMIT) for g in suite.groups)
    assert suite.settings == {"limit": LIMIT, "seed": 0}
    assert len({p.id for p in suite.probes}) == len(suite.probes)
    assert comparable(suite) == comparable(build_suite(Ask(tokenizer)))


def test_items_of_a_task_share_their_demonstrations(tokenizer):
    shared = {}
    for p in build_suite(Ask(tokenizer)).probes:
        item = TASKS[p.task.removesuffix(" with steps")]["items"][int(p.id.split("/")[1])]
        shots, _, _ = p.context.rpartition(item["question"])
        shared.setdefault(p.task, set()).add(shots)
        assert p.context.count("\n") in (4, 9) and p.context[-1] != " "
    assert all(len(x) == 1 for x in shared.values())


def test_the_default_draw_is_balanced(tokenizer):
    probes = build_suite(Ask(tokenizer)).probes
    for name in ("sequence", "comparison", "ordering", "syllogism"):
        right = Counter(p.right for p in probes if p.task == name)
        assert len(set(right.values())) == 1, (name, right)


def test_twins_ask_the_same_questions(tokenizer):
    probes = build_suite(Ask(tokenizer)).probes
    for name in ("arithmetic chain", "word problem"):
        plain = {p.id.split("/")[1]: p for p in probes if p.task == name}
        steps = {p.id.split("/")[1]: p for p in probes if p.task == f"{name} with steps"}
        for n, p in steps.items():
            assert TASKS[name]["items"][int(n)]["question"] in p.context.splitlines()[-2]
            assert TASKS[name]["items"][int(n)]["question"] in plain[n].context
            assert p.judge(f"One line. The answer is{plain[n].answer.rstrip()}.") == 1
            assert p.judge(f"The answer is{plain[n].answer.rstrip()}1.") == 0


@pytest.mark.parametrize("limit", (1, 7))
def test_a_smaller_limit_asks_a_subset(tokenizer, limit):
    few, many = (build_suite(Ask(tokenizer, limit=n)) for n in (limit, 24))
    assert {p.id: p.context for p in few.probes}.items() < {p.id: p.context for p in many.probes}.items()
    assert {g.name for g in few.groups} == {p.task for p in few.probes}


def test_a_seed_draws_other_items(tokenizer):
    first, second = ({p.id for p in build_suite(Ask(tokenizer, limit=8, seed=s)).probes} for s in (0, 1))
    assert first != second


def test_guessers(tokenizer):
    """One that always takes the first answer scores chance, one that knows scores 1."""
    groups = {g.name: g for g in build_suite(Ask(tokenizer)).groups}
    first, perfect = {}, {}
    for p in build_suite(Ask(tokenizer)).probes:
        if p.kind == "choice":
            likes = [
                [Score(0.0 if n == best else -9.0, False, 2) for n in range(len(p.answers))] for best in (0, p.right)
            ]
            first.setdefault(p.task, []).append(_choice(p, likes[0])["correct"])
            perfect.setdefault(p.task, []).append(_choice(p, likes[1])["correct"])
    for name, scores in first.items():
        assert sum(scores) / len(scores) == pytest.approx(groups[name].chance)
        assert perfect[name] == [1] * LIMIT


def test_a_tiny_model_is_measured_twice_the_same(tokenizer, tiny_model):
    suite = build_suite(Ask(tokenizer, limit=2))
    first, second = (score_suite(tiny_model(), tokenizer, suite) for _ in range(2))
    assert first == second
    assert [len(t["items"]) for t in first["tasks"]] == [1 if "steps" in g.name else 2 for g in suite.groups]
    assert all(i["correct"] in (0, 1) for t in first["tasks"] for i in t["items"])
