"""ICLAnchor: KL to the base on few-shot prompts of anchor tasks."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from holdfast.errors import HoldfastError, PlanError
from holdfast.measure.tasks import anchor_tasks
from holdfast.methods import ICLAnchor
from holdfast.services import Context


def test_hand_value(toy_view):
    # as KLToBase: KL(base || tuned) = ln 1.25; times weight 2 and every 3: 6 ln 1.25
    given = {"base": [[0.5, 0.25, 0.25]], "owner": "ICLAnchor"}
    view = toy_view(torch.tensor([[0.8, 0.1, 0.1]]).log(), [0], step=6, **given)
    term = ICLAnchor(weight=2.0, every=3).loss(view)
    assert term.owner == "ICLAnchor"
    assert term.value.item() == pytest.approx(6 * math.log(1.25), rel=1e-5)


def test_the_first_steps_weigh_more(toy_view):
    """In a short run before step `early` the factor is 32, whatever `every` is: 2 * 32 ln 1.25; then it is 2 * 3."""
    method = ICLAnchor(weight=2.0, every=3, early=4, early_factor=32.0)
    given = {"base": [[0.5, 0.25, 0.25]], "owner": "ICLAnchor"}
    values = []
    for step, total in ((0, 14), (3, 14), (4, 14), (0, 15)):
        view = toy_view(torch.tensor([[0.8, 0.1, 0.1]]).log(), [0], step=step, **given)
        view.total_steps = total
        values.append(method.loss(view).value.item() / math.log(1.25))
    assert values == pytest.approx([64, 64, 6, 6], rel=1e-5)


def test_hand_value_of_the_gold_answers(toy_view):
    """Two targets, the second is an answer with p = 1/4: the mean over answers is ln 4, the KL to itself is 0."""
    same = [[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]
    view = toy_view(torch.tensor(same).log(), [0, 2], base=same, owner="ICLAnchor", step=4)
    row = dataclasses.replace(view.packed.rows[0], gold=np.array([False, False, True]))
    view.packed.rows = [row]
    term = ICLAnchor(gold=0.5, every=2).loss(view)
    assert term.value.sum().item() / 2 == pytest.approx(2 * 0.5 * math.log(4), rel=1e-5)
    view.step, view.total_steps = 0, 14
    early = ICLAnchor(gold=0.5, every=2).loss(view)
    assert early.value.sum().item() / 2 == pytest.approx(0.5 * math.log(4), rel=1e-5)
    assert ICLAnchor(gold=0.0).loss(view).value.abs().max().item() < 1e-6


def test_gold_marks_the_answers(tiny_model, tokenizer):
    """The tokens marked as gold are those that `on: answers` scores."""
    ctx = Context(tiny_model(), tokenizer)
    every, only = (ICLAnchor(pool=20, on=on).asides(ctx) for on in ("all", "answers"))
    for a, b in zip(every, only, strict=True):
        assert (a.gold == b.scored).all() and a.num_scored == len(a.ids) - 1
        assert 3 <= b.num_scored < a.num_scored / 2


def test_task_tokens_are_not_compared(toy_view):
    view = toy_view(torch.tensor([[0.8, 0.1, 0.1]]).log(), [0], base=[[0.5, 0.25, 0.25]], owner="task")
    assert ICLAnchor().loss(view) is None


def test_every_second_step_with_twice_the_weight(tiny_model, start, token_rows, gradients):
    parts = {}
    for every in (1, 2):
        session = start([ICLAnchor(every=every, pool=4, shots=(1, 2))], tiny_model())
        with torch.no_grad():
            for p in session.params.values():
                p.mul_(1.3)
        for step in (0, 1):
            rows = [*token_rows, *session.rows_of(step)]
            owners = {o: sum(r.num_scored for r in rows if r.owner == o) for o in ("task", "ICLAnchor")}
            found = session.loss(session.model, rows, owners, step)[1]
            parts[every, step] = {name: value.item() for name, value in found.items()}
    assert parts[2, 0]["ICLAnchor"] == pytest.approx(2 * parts[1, 0]["ICLAnchor"], rel=1e-5)
    assert parts[1, 0]["ICLAnchor"] > 1e-3
    assert "ICLAnchor" in parts[1, 1]
    assert "ICLAnchor" not in parts[2, 1]


def test_the_pool_is_used_in_turn():
    method = ICLAnchor(every=2, prompts_per_step=3)
    assert [list(method.asides_at(s, 5, 60)) for s in range(5)] == [[0, 1, 2], [], [3, 4, 0], [], [1, 2, 3]]
    early = ICLAnchor(every=2, early=3, short=15)
    assert [list(early.asides_at(s, 9, 14)) for s in range(5)] == [[0], [1], [2], [], [2]]
    for total in (15, 0):  # long, and unknown
        assert [list(early.asides_at(s, 9, total)) for s in range(5)] == [[0], [], [1], [], [2]]


def test_held_out_tasks_are_refused(tiny_model, tokenizer):
    method, ctx = ICLAnchor(tasks=("antonym",)), Context(tiny_model(), tokenizer)
    for ask in (method.check, method.asides):
        with pytest.raises(HoldfastError, match="held-out"):
            ask(ctx)


def test_prompts_are_anchor_items_only(tiny_model, tokenizer):
    """Every prompt ends with an input and its output of an anchor task, and the query is shown only once."""
    tasks = anchor_tasks()
    method, ctx = ICLAnchor(pool=60, shots=(2, 3)), Context(tiny_model(), tokenizer)
    rows = method.asides(ctx)
    assert len(rows) > 50
    for n, row in enumerate(rows):
        assert row.owner == "ICLAnchor"
        assert row.num_scored == len(row.ids) - 1
        text = tokenizer.decode(row.ids)
        assert sum(x in text and y in text for t in tasks for x, y in t.items) >= 3, n


def test_answers_only_scores_exactly_the_answers(tiny_model, tokenizer):
    """'A' and 'u' stand in 'A:' and 'Output:' too: only the answer itself may be scored."""
    method = ICLAnchor(on="answers", pool=24, shots=(3, 3), tasks=("vowel_start_abstract", "last_letter"))
    for row in method.asides(Context(tiny_model(), tokenizer)):
        runs, before = [], False
        for token, flag in zip(row.ids, row.scored, strict=True):
            if flag and not before:
                runs.append([])
            if flag:
                runs[-1].append(token)
            before = flag
        answers = [tokenizer.decode(r).strip() for r in runs]
        assert len(answers) == 4
        assert all(len(a) == 1 for a in answers), answers


def test_prompts_that_do_not_fit_are_left_out(tiny_model, tokenizer):
    method = ICLAnchor(pool=40, shots=(1, 8))
    rows = method.asides(Context(tiny_model(), tokenizer, max_length=60))
    assert 0 < len(rows) < 40
    assert max(len(r.ids) for r in rows) <= 60


@pytest.mark.parametrize(
    "wrong",
    [{"direction": "x"}, {"on": "x"}, {"shots": (3, 1)}, {"every": 0}, {"pool": 0}, {"weight": -1.0}, {"gold": -1.0}],
)
def test_values_that_make_no_sense(wrong, tiny_model, tokenizer):
    with pytest.raises(PlanError, match="ICLAnchor"):
        ICLAnchor(**wrong).check(Context(tiny_model(), tokenizer))
