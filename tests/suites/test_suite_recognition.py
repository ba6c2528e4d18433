"""The recognition suite: its data, its three kinds of labels, and the split into recognition and learning."""

from collections import Counter

import pytest

from holdfast.errors import HoldfastError
from holdfast.measure.asking import score_suite
from holdfast.measure.probe import Ask
from holdfast.measure.suites.recognition import (
    CONDITIONS,
    LIMIT,
    SHOTS,
    SYMBOLS,
    build_suite,
    group_name,
    halves,
    labelled_tasks,
    random_labels,
    relabelled,
    split,
)
from holdfast.measure.tasks import anchor_tasks

TASKS = labelled_tasks()[1]
NAMES = [t.name for t in TASKS]


@pytest.fixture(scope="module")
def suite(tokenizer):
    return build_suite(Ask(tokenizer))


def of(suite, task, condition):
    return [p for p in suite.probes if p.task == group_name(task, condition)]


def demonstrations(probe):
    return [tuple(line.split(" -> ")) for line in probe.context.split("\n")[:-1]]


def question(probe):
    return probe.context.split("\n")[-1].removesuffix(" ->")


def gold(task):
    return {x: y for y, inputs in task.items.items() for x in inputs}


def measured(suite, pick):
    """A measurement of a guesser: pick(probe) -> index of its answer."""
    tasks = [
        {
            "name": g.name,
            "chance": g.chance,
            "items": [{"correct": int(pick(p) == p.right)} for p in suite.probes if p.task == g.name],
        }
        for g in suite.groups
    ]
    return {"suite": suite.name, "tasks": tasks}


# ---- data


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_the_data_is_sound(task):
    inputs = [x for items in task.items.values() for x in items]
    assert 2 <= len(task.labels) <= 4 and len(inputs) >= 60
    assert len({len(items) for items in task.items.values()}) == 1  # so a constant guesser is at 1 / labels
    assert len({x.lower() for x in inputs}) == len(inputs)
    assert all(x.isascii() and x.strip() == x and x and "\n" not in x and "->" not in x for x in inputs)
    words = {w for x in inputs for w in x.lower().replace(",", "").split()}
    assert not words & set(task.labels)  # an input does not say its label
    assert not any(a != b and a.startswith(b) for a in task.labels for b in task.labels)
    assert not {y[0].upper() for y in task.labels} & set(SYMBOLS)


def test_four_tasks_and_none_of_an_anchor():
    assert len(TASKS) >= 4
    anchored = {y for t in anchor_tasks() for y in t.labels or ()}
    assert not anchored & {y for t in TASKS for y in t.labels}


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_what_is_asked_is_never_shown(task):
    shown, asked = halves(task, 0)
    assert set(shown) | set(asked) == set(gold(task).items())
    assert not {x for x, _ in shown} & {x for x, _ in asked}
    assert len(shown) >= SHOTS and len(asked) >= LIMIT


# ---- labels


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_conditions_differ_in_labels_only(suite, task):
    true, random, abstract = (of(suite, task.name, c) for c in CONDITIONS)
    assert len(true) == len(random) == len(abstract) == LIMIT
    for one, two, three in zip(true, random, abstract, strict=True):
        assert question(one) == question(two) == question(three)
        shown = [[x for x, _ in demonstrations(p)] for p in (one, two, three)]
        assert shown[0] == shown[1] == shown[2] and len(shown[0]) == SHOTS
        assert one.right == two.right == three.right
        assert one.answers == two.answers == tuple(f" {y}\n" for y in task.labels)
        assert one.answer.strip() == gold(task)[question(one)]


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_true_random_and_abstract_demonstrations(suite, task):
    true, random, abstract = (of(suite, task.name, c)[0] for c in CONDITIONS)
    truth, each = gold(task), SHOTS // len(task.labels)
    assert all(truth[x] == y for x, y in demonstrations(true))
    assert set(Counter(y for _, y in demonstrations(true)).values()) == {each}
    assert set(Counter(y for _, y in demonstrations(random)).values()) == {each}
    assert sum(truth[x] == y for x, y in demonstrations(random)) == each  # as often as chance
    letters = dict(zip(task.labels, (a.strip() for a in abstract.answers), strict=True))
    assert len(set(letters.values())) == len(task.labels) and set(letters.values()) <= set(SYMBOLS)
    assert all(letters[truth[x]] == y for x, y in demonstrations(abstract))


def test_random_labels_say_nothing_of_the_truth_over_many_draws():
    shots = [(f"word {n}", "ab"[n % 2]) for n in range(8)]
    draws = [random_labels(shots, "ab", str(n)) for n in range(200)]
    assert all(sum(y == z for (_, y), (_, z) in zip(shots, d, strict=True)) == 4 for d in draws)
    for n in range(8):  # each place carries either label about half the time: 3.5 standard errors
        assert abs(sum(d[n][1] == "a" for d in draws) - 100) < 25


def test_letters_change_with_the_seed():
    maps = {tuple(relabelled("abstract", [], ("hot", "cold"), f"t/{n}")[1].items()) for n in range(200)}
    assert len(maps) == 12  # every ordered pair of four letters


# ---- the suite


def test_groups_and_ids(suite):
    assert [g.name for g in suite.groups] == [group_name(n, c) for n in NAMES for c in CONDITIONS]
    assert len({p.id for p in suite.probes}) == len(suite.probes)
    assert all(len({p.cluster for p in suite.probes if p.task == g.name}) == 1 for g in suite.groups)
    assert suite.settings == {"num_fewshot": SHOTS, "limit": LIMIT, "seed": 0}


@pytest.mark.parametrize("limit", [1, 4, 31])
def test_a_smaller_limit_asks_a_subset(suite, tokenizer, limit):
    small = build_suite(Ask(tokenizer, limit=limit))
    assert set(small.probes) < set(suite.probes)
    assert len(small.probes) == limit * len(suite.groups)


def test_building_twice_is_the_same_and_the_seed_matters(suite, tokenizer):
    assert build_suite(Ask(tokenizer)) == suite
    assert not set(build_suite(Ask(tokenizer, seed=1)).probes) & set(suite.probes)


# ---- the split


def test_perfect_and_constant_guessers(suite):
    above = sum(1 - 1 / len(t.labels) for t in TASKS) / len(TASKS)
    assert split(measured(suite, lambda p: p.right)) == {
        "recognition": pytest.approx(above),
        "learning": pytest.approx(above),
        "true": pytest.approx(above),
    }
    for constant in (0, 1):
        assert split(measured(suite, lambda p, n=constant: n)) == {"recognition": 0, "learning": 0, "true": 0}


def test_who_knows_and_who_learns_are_told_apart(suite):
    """One guesser knows the words and ignores demonstrations; one follows the demonstrated label of the truth."""
    truth = {x: y for t in TASKS for x, y in gold(t).items() if t.name == "temperature"}
    two = [p for p in suite.probes if p.task.startswith("temperature")]

    def knows(p):
        answers = [a.strip() for a in p.answers]
        return answers.index(truth[question(p)]) if truth[question(p)] in answers else 0

    def learns(p):
        alike = Counter(y for x, y in demonstrations(p) if truth[x] == truth[question(p)])
        return [a.strip() for a in p.answers].index(min(alike, key=lambda y: (-alike[y], y)))

    def accuracy(guess, condition):
        asked = [p for p in two if p.task == group_name("temperature", condition)]
        return sum(guess(p) == p.right for p in asked) / len(asked)

    assert [accuracy(knows, c) for c in CONDITIONS] == [1, 1, 0.5]
    assert [accuracy(learns, c) for c in CONDITIONS] == [1, 0.5, 1]


def test_a_split_by_hand():
    def group(task, condition, chance, hits, count):
        items = [{"correct": int(n < hits)} for n in range(count)]
        return {"name": group_name(task, condition), "chance": chance, "items": items}

    tasks = [
        *(group("one", c, 0.5, hits, 4) for c, hits in zip(CONDITIONS, (4, 3, 2), strict=True)),
        *(group("two", c, 0.25, hits, 4) for c, hits in zip(CONDITIONS, (3, 1, 4), strict=True)),
    ]
    assert split({"suite": "recognition", "tasks": tasks}) == {"recognition": 0.125, "learning": 0.375, "true": 0.5}
    with pytest.raises(HoldfastError, match="not 'anchors'"):
        split({"suite": "anchors", "tasks": tasks})


def test_a_random_model_is_measured_and_shares_its_prompts(tiny_model, tokenizer):
    small = build_suite(Ask(tokenizer, limit=4))
    got = score_suite(tiny_model(False), tokenizer, small)
    apart = sum(len(tokenizer.encode(p.context + a)) - 1 for p in small.probes for a in p.answers)
    assert got["num_unique_tokens"] < 0.2 * apart
    assert all(len(t["items"]) == 4 and {i["correct"] for i in t["items"]} <= {0, 1} for t in got["tasks"])
    assert set(split(got)) == {"recognition", "learning", "true"}
    assert all(-0.5 <= x <= 0.75 for x in split(got).values())
