"""The knowledge suite: its data, its probes, and what is made of their scores."""

import math
import re
from collections import Counter

import pytest

from holdfast.errors import HoldfastError
from holdfast.measure.asking import _choice, _exact, score_suite
from holdfast.measure.probe import Ask, Probe
from holdfast.measure.scorer import Score
from holdfast.measure.suites.knowledge import (
    CHOICE,
    LIMIT,
    SHORT,
    build_suite,
    facts,
    order,
    per_phrasing,
    phrasing_spread,
)
from holdfast.measure.tasks import anchor_tasks


def mentions(text, name):
    return re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE)


def by_task(suite, task):
    return [p for p in suite.probes if p.task == task]


# ---- data


def test_there_are_enough_facts_of_every_level():
    assert Counter(f.level for f in facts()) == {"easy": 42, "medium": 42, "hard": 42}
    assert min(Counter(f.area for f in facts()).values()) >= 8


def test_every_fact_has_three_phrasings_and_four_different_answers():
    for f in facts():
        assert len(f.questions) == len(f.clozes) == 3
        answers = (f.answer, *f.wrong)
        assert len({a.lower() for a in answers}) == 4, f
        assert all(a and a == a.strip() and a.isascii() for a in answers)


def test_no_text_and_no_fact_stands_twice():
    texts = [t for f in facts() for t in f.questions + f.clozes]
    assert len(set(texts)) == len(texts) == 126 * 6
    assert len({f.answer.lower() for f in facts()}) == 126


def test_questions_end_as_questions_and_clozes_break_off():
    for f in facts():
        assert all(q.endswith("?") and q.isascii() for q in f.questions)
        assert all(re.search(r"[\w),]\"?$", c) and c.isascii() for c in f.clozes), f


def test_no_text_gives_its_answer_away():
    for f in facts():
        for answer in {f.answer, f.short} - {""}:
            assert not [t for t in f.questions + f.clozes if mentions(t, answer)], f


def test_short_forms_end_or_begin_their_answer():
    assert all(f.answer.endswith(f.short) or f.answer.startswith(f.short) for f in facts())
    assert all(len((f.short or f.answer).split()) <= 2 for f in facts())


def test_no_anchor_task_teaches_a_fact():
    taught = {(x, y.lower()) for task in anchor_tasks() for x, y in task.items}
    for f in facts():
        for x, y in taught:
            known = y in (f.answer.lower(), f.short.lower())
            assert not (known and any(mentions(t, x) for t in f.questions + f.clozes)), (f, x)


# ---- probes


def test_default_size_and_shape(tokenizer):
    suite = build_suite(Ask(tokenizer))
    assert [g.name for g in suite.groups] == [CHOICE, SHORT]
    assert [g.chance for g in suite.groups] == [0.25, 0.0]
    assert all(g.clustered for g in suite.groups)
    assert suite.settings == {"limit": LIMIT, "seed": 0}
    for task in (CHOICE, SHORT):
        clusters = Counter(p.cluster for p in by_task(suite, task))
        assert len(clusters) == 40 and set(clusters.values()) == {3}
    ids = [p.id for p in suite.probes]
    assert len(set(ids)) == len(ids) == 2 * LIMIT
    assert all(re.fullmatch(rf"({CHOICE}|{SHORT})/\d+/[abc]", i) for i in ids)
    assert not {p.cluster for p in by_task(suite, CHOICE)} & {p.cluster for p in by_task(suite, SHORT)}


def test_a_probe_says_what_its_fact_says(tokenizer):
    for p in build_suite(Ask(tokenizer, limit=378)).probes:
        _, number, letter = p.id.split("/")
        fact, n = facts()[int(number)], "abc".index(letter)
        if p.task == CHOICE:
            assert p.context == f"Question: {fact.questions[n]}\nAnswer:"
            assert p.answer == f" {fact.answer}\n" and len(p.answers) == 4
        else:
            assert (p.context, p.answers) == (fact.clozes[n], (f" {fact.short or fact.answer}",))


def test_a_smaller_limit_asks_a_subset_and_building_twice_is_the_same(tokenizer):
    small, large = build_suite(Ask(tokenizer, limit=31)), build_suite(Ask(tokenizer, limit=90))
    assert len(small.probes) == 62 and set(small.probes) < set(large.probes)
    assert large == build_suite(Ask(tokenizer, limit=90))
    assert set(build_suite(Ask(tokenizer, limit=90, seed=1)).probes) != set(large.probes)


def test_the_order_mixes_levels():
    asked = order(3)
    assert sorted(f.number for f in asked) == list(range(126))
    assert [f.level for f in asked[:6]] == ["easy", "medium", "hard"] * 2


# ---- scores


def test_choice_sums_and_exact_is_greedy():
    probe = Probe(CHOICE, "x", "choice", "Question: Q?\nAnswer:", (" Oslo", " Rome", " Paris", " Bonn"))
    likeliest = [Score(-2.0, False, 4), Score(-3.0, False, 1), Score(-3.0, False, 1), Score(-9.0, False, 1)]
    assert _choice(probe, likeliest)["correct"] == 1  # the sum decides, not the mean per token
    assert _choice(probe, likeliest[1:] + likeliest[:1])["correct"] == 0
    assert _exact(probe, [Score(-0.1, True, 1)])["correct"] == 1
    assert _exact(probe, [Score(-0.1, False, 1)])["correct"] == 0


def items(scores, task=SHORT):
    return [
        {"id": f"{task}/{n}/{letter}", "correct": x}
        for n, row in enumerate(scores)
        for letter, x in zip("abc", row, strict=False)
    ]


def test_spread_by_hand():
    some = items([(1, 1, 1), (1, 0, 0), (0, 0, 0), (1, 1, 0)])
    assert phrasing_spread(some) == pytest.approx(2 * math.sqrt(2 / 9) / 4)
    assert per_phrasing(some) == {"a": 0.75, "b": 0.5, "c": 0.25}


def test_spread_of_a_perfect_and_a_constant_guesser_is_none():
    assert phrasing_spread(items([(1, 1, 1)] * 5)) == phrasing_spread(items([(0, 0, 0)] * 5)) == 0


def test_spread_keeps_tasks_apart_and_leaves_out_a_lone_phrasing():
    both = items([(1, 1, 1)], CHOICE) + items([(0, 0, 0)], SHORT)
    assert phrasing_spread(both) == 0
    assert phrasing_spread(items([(1, 0), (1,)])) == 0.5
    with pytest.raises(HoldfastError, match="two phrasings"):
        phrasing_spread(items([(1,)]))


@pytest.mark.parametrize("name", ["capital/3", "capital/3/x", "oddity"])
def test_items_of_another_suite_are_refused(name):
    with pytest.raises(HoldfastError, match=name):
        per_phrasing([{"id": name, "correct": 1}])


def test_a_random_model_can_be_asked(tiny_model, tokenizer):
    out = score_suite(tiny_model(), tokenizer, build_suite(Ask(tokenizer, limit=6)))
    choice, short = (task["items"] for task in out["tasks"])
    assert len(choice) == len(short) == 6 and list(per_phrasing(choice)) == ["a", "b", "c"]
    assert sum(i["correct"] for i in short) == 0
    assert 0 <= phrasing_spread(choice) <= math.sqrt(2 / 9)
