"""The shots suite: sequences, the price of a curve, and what is read from it."""

import random
from itertools import pairwise

import pytest

from holdfast.engine.tree import grow
from holdfast.errors import HoldfastError
from holdfast.measure.asking import score_suite
from holdfast.measure.probe import Ask, Suite
from holdfast.measure.suites.shots import FORMS, LIMIT, MOST, TASKS, area, build_suite, curve, gain
from holdfast.measure.tasks import held_out_tasks


@pytest.fixture(scope="module")
def suite(tokenizer):
    return build_suite(Ask(tokenizer))


def by_cluster(suite):
    out = {}
    for p in suite.probes:
        out.setdefault(p.cluster, []).append(p)
    return out


def of_task(suite, task, cluster=None):
    probes = tuple(p for p in suite.probes if p.task == task and cluster in (None, p.cluster))
    return Suite(suite.name, tuple(g for g in suite.groups if g.name == task), probes, suite.settings)


def item(shots, correct, logprob=-1.0):
    return {"shots": shots, "correct": correct, "logprob": logprob}


def test_a_sequence_is_every_number_of_demonstrations_once(suite):
    sequences = by_cluster(suite)
    assert len(sequences) == len(TASKS) * LIMIT // (MOST + 1)
    assert all([p.shots for p in probes] == list(range(MOST + 1)) for probes in sequences.values())
    assert all(g.clustered and g.metric == "exact" for g in suite.groups)
    assert len({p.id for p in suite.probes}) == len(suite.probes)
    assert {p.cluster.split("/")[2] for p in suite.probes} == set(FORMS)


def test_each_context_and_its_answer_begin_the_next(suite):
    for probes in by_cluster(suite).values():
        for one, two in pairwise(probes):
            assert two.context.startswith(one.context + one.answer)


def test_questions_and_answers_are_the_tasks_own_and_asked_once(suite):
    for task in held_out_tasks(TASKS):
        probes = of_task(suite, task.name).probes
        asked = [(p.context.split("\n"), p.answer) for p in probes]
        pairs = []
        for lines, answer in asked:
            if lines[-1].endswith(" ->"):
                question = lines[-1].removesuffix(" ->")
            else:
                question = lines[-2].split(": ", 1)[1]
            pairs.append((question, answer.strip()))
        assert set(pairs) <= set(task.items)
        assert len(set(pairs)) == len(pairs)  # so a question is never among its own demonstrations


def test_a_curve_costs_what_its_longest_prompt_costs(suite, tiny_model, tokenizer):
    probes = by_cluster(of_task(suite, "past_tense")).values()
    for sequence in probes:
        alone = of_task(suite, "past_tense", sequence[0].cluster)
        measured = score_suite(tiny_model(False), tokenizer, alone)
        longest = len(tokenizer.encode(sequence[-1].context + sequence[-1].answer)) - 1
        apart = sum(len(tokenizer.encode(p.context + p.answer)) - 1 for p in sequence)
        assert longest <= measured["num_unique_tokens"] <= 1.1 * longest < 0.2 * apart
        assert [i["shots"] for i in measured["tasks"][0]["items"]] == list(range(MOST + 1))


@pytest.mark.parametrize("limit", [1, 5, 17, 20, 34])
def test_a_smaller_limit_asks_a_subset(suite, tokenizer, limit):
    small = build_suite(Ask(tokenizer, limit=limit))
    assert set(small.probes) < set(suite.probes)
    assert len(small.probes) == limit * len(TASKS)


def test_a_large_limit_takes_only_whole_sequences_of_what_there_is(tokenizer):
    large = build_suite(Ask(tokenizer, limit=10_000))
    for task in held_out_tasks(TASKS):
        assert len(of_task(large, task.name).probes) == len(task.items) // (MOST + 1) * (MOST + 1)


def test_building_twice_is_the_same_and_the_seed_matters(suite, tokenizer):
    assert build_suite(Ask(tokenizer)) == suite
    assert build_suite(Ask(tokenizer, num_fewshot=3)) == suite
    assert build_suite(Ask(tokenizer, seed=1)).probes != suite.probes


def test_the_whole_suite_stays_cheap(suite, tokenizer):
    encoded = [(ids, len(ids) - 1) for p in suite.probes for ids in [tokenizer.encode(p.context + p.answer)]]
    alone = [max(len(tokenizer.encode(p.context + p.answer)) for p in s) for s in by_cluster(suite).values()]
    assert len(grow(encoded)) <= 1.1 * sum(alone)


def test_a_curve_by_hand():
    items = [item(0, 0, -4.0), item(0, 1, -2.0), item(4, 1, -1.0), item(4, 1, -2.0), item(1, 0, -3.0), item(1, 1, -1)]
    assert curve(items) == {0: (0.5, 3.0), 1: (0.5, 2.0), 4: (1.0, 1.5)}
    assert list(curve(items)) == [0, 1, 4]
    assert gain(items) == pytest.approx((0.5 + 1.0) / 2 - 0.5)
    assert area(items) == pytest.approx((1 * 0.5 + 3 * 0.75) / 4)


def test_perfect_constant_and_learning_guessers(suite):
    shots = [p.shots for p in suite.probes]
    perfect, never = [item(k, 1) for k in shots], [item(k, 0) for k in shots]
    copies = [item(k, int(k > 0)) for k in shots]
    assert (gain(perfect), area(perfect)) == (0, 1)
    assert (gain(never), area(never)) == (0, 0)
    assert gain(copies) == 1
    assert area(copies) == pytest.approx((MOST - 0.5) / MOST)


def test_the_order_of_items_does_not_matter():
    items = [item(k % 17, int(k % 3 == 0), -k / 7) for k in range(102)]
    mixed = random.Random(0).sample(items, len(items))
    assert curve(mixed) == {k: pytest.approx(v) for k, v in curve(items).items()}
    assert area(mixed) == pytest.approx(area(items))


def test_what_has_no_curve_is_refused():
    assert area([item(3, 1), item(3, 0)]) == 0.5
    for items in ([], [{"correct": 1, "logprob": -1.0}]):
        with pytest.raises(HoldfastError, match="suite 'shots'"):
            curve(items)
    for items in ([item(0, 1)], [item(2, 1), item(3, 0)]):
        with pytest.raises(HoldfastError, match="without and with"):
            gain(items)
