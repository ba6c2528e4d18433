"""The calibration suite: its probes, its floor, and the summary of its items."""

from collections import Counter

import pytest

from holdfast.errors import HoldfastError
from holdfast.measure.asking import _calibrated, _choice, score_suite
from holdfast.measure.probe import Ask, Probe
from holdfast.measure.scorer import Score
from holdfast.measure.suites import knowledge
from holdfast.measure.suites.calibration import LABELS, LIMIT, build_suite, summary, uniform_score
from holdfast.measure.tasks import held_out_tasks

LABELLED = {t.name: t for t in held_out_tasks() if t.labels}
MULTIPLE = knowledge.CHOICE


def by_task(suite, task):
    return [p for p in suite.probes if p.task == task]


def probe(k, right=0):
    return Probe(MULTIPLE, "x", "calibrated", "Q", tuple(f" {n}" for n in range(k)), right)


def test_default_size_and_shape(tokenizer):
    suite = build_suite(Ask(tokenizer))
    assert [g.name for g in suite.groups] == [MULTIPLE, LABELS]
    assert Counter(p.task for p in suite.probes) == {MULTIPLE: LIMIT, LABELS: LIMIT}
    assert len({p.id for p in suite.probes}) == 2 * LIMIT
    assert {p.kind for p in suite.probes} == {"calibrated"}
    assert suite.settings == {"num_fewshot": 8, "limit": LIMIT, "seed": 0}
    assert suite.groups[0].clustered and all(p.cluster for p in suite.probes)


def test_the_questions_are_those_of_knowledge(tokenizer):
    asked = by_task(build_suite(Ask(tokenizer, limit=30, seed=2)), MULTIPLE)
    known = by_task(knowledge.build_suite(Ask(tokenizer, limit=30, seed=2)), MULTIPLE)
    parts = [(p.id, p.context, p.answers, p.right, p.cluster) for p in asked]
    assert parts == [(p.id, p.context, p.answers, p.right, p.cluster) for p in known]


def test_labels_are_a_closed_set_in_every_format(tokenizer):
    asked = by_task(build_suite(Ask(tokenizer)), LABELS)
    assert Counter(p.id.split("/")[1] for p in asked) == dict.fromkeys(LABELLED, LIMIT // len(LABELLED))
    assert len({p.cluster for p in asked}) == 3 * len(LABELLED)  # task and format
    for p in asked:
        task = LABELLED[p.id.split("/")[1]]
        assert tuple(a.strip() for a in p.answers) == task.labels
        last = max(task.items, key=lambda pair: (p.context.rfind(pair[0]) + len(pair[0]), len(pair[0])))
        assert p.context.count(last[0]) and p.answer.strip() == last[1]  # the question is what stands last


def test_no_label_begins_another():
    """Then the probability of a label needs no stop after it."""
    for task in LABELLED.values():
        assert not [(a, b) for a in task.labels for b in task.labels if a != b and b.startswith(a)]


def test_a_smaller_limit_asks_a_subset_and_building_twice_is_the_same(tokenizer):
    small, large = build_suite(Ask(tokenizer, limit=10)), build_suite(Ask(tokenizer, limit=40))
    assert len(small.probes) == 20 and set(small.probes) < set(large.probes)
    assert large == build_suite(Ask(tokenizer, limit=40))


@pytest.mark.parametrize("k", [2, 4, 10])
def test_chance_is_the_score_of_equal_probabilities(k):
    scores = [Score(-1.0, False, 1)] * k
    assert _calibrated(probe(k), scores)["correct"] == pytest.approx(uniform_score(k))


def test_chance_of_the_groups_is_that_of_their_answers(tokenizer):
    multiple, labels = build_suite(Ask(tokenizer)).groups
    assert multiple.chance == 0.625
    assert labels.chance == pytest.approx(sum(uniform_score(len(t.labels)) for t in LABELLED.values()) / len(LABELLED))


def test_a_sure_answer_scores_one_if_right_and_nothing_if_wrong():
    scores = [Score(0.0, True, 1), *[Score(-800.0, False, 1)] * 3]
    assert _calibrated(probe(4, right=0), scores)["correct"] == 1
    assert _calibrated(probe(4, right=1), scores)["correct"] == 0


def test_summary_by_hand():
    some = [
        {"id": "a", "confidence": 0.9, "hit": 1, "brier": 0.02},
        {"id": "b", "confidence": 0.9, "hit": 0, "brier": 1.62},
        {"id": "c", "confidence": 0.5, "hit": 1, "brier": 0.5},
        {"id": "d", "confidence": 0.5, "hit": 0, "brier": 0.5},
    ]
    assert summary(some) == pytest.approx({"ece": 0.2, "brier": 0.66, "accuracy": 0.5, "confidence": 0.7})


def test_summary_of_a_perfect_guesser():
    sure = _calibrated(probe(4), [Score(0.0, True, 1), *[Score(-800.0, False, 1)] * 3])
    assert summary([sure] * 3) == {"ece": 0.0, "brier": 0.0, "accuracy": 1.0, "confidence": 1.0}


def test_summary_refuses_nothing_and_items_of_another_kind():
    with pytest.raises(HoldfastError, match="no items"):
        summary([])
    plain = _choice(probe(4), [Score(-1.0, False, 1)] * 4)
    with pytest.raises(HoldfastError, match="odd one"):
        summary([{"id": "odd one", **plain}])


def test_a_random_model_can_be_asked(tiny_model, tokenizer):
    out = score_suite(tiny_model(), tokenizer, build_suite(Ask(tokenizer, num_fewshot=2, limit=8)))
    for task in out["tasks"]:
        assert len(task["items"]) == 8
        assert all(0 <= i["correct"] <= 1 for i in task["items"])
        assert summary(task["items"]).keys() == {"ece", "brier", "accuracy", "confidence"}
