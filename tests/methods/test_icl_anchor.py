"""ICLAnchor: KL to the base on few-shot prompts of anchor tasks."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from cases import run
from holdfast.data.rendered import Rendered
from holdfast.data.rows import Row
from holdfast.errors import HoldfastError, PlanError
from holdfast.measure.tasks import anchor_tasks
from holdfast.method import Past
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


# ---- a bound in place of a fixed weight


def looked(method, looks, total=60, state=None):
    """The weights after looks (step, KL, learning rate), and the state."""
    state, weights = {} if state is None else state, []
    for step, kl, rate in looks:
        said = method.steer(Past(step, total, {"task": 1.0, "ICLAnchor/kl": kl}, rate), state)
        state |= said.state
        weights.append(float(state["weight"]))
    return weights, state


def test_steps_of_the_weight_by_hand():
    """hold 0.05, every 2, rate 0.1, means of 2 looks, so a look moves log w by 0.2 * error * learning rate / largest.

    step 0: KL 0, one look of two, which may not lower: w = 1
    step 2: mean (0 + 0.02) / 2 = 0.01, error 0.01 / 0.05 - 1 = -0.8: log w = -0.16, w = 0.852144
    step 4: mean (0.02 + 0.18) / 2 = 0.1, error 1: log w = 0.04, w = 1.040811
    step 6: mean 0.3, error 5, clipped at 1, half the learning rate: log w = 0.14, w = 1.150274
    step 8: mean 0.21, learning rate 0: as before
    """
    method = ICLAnchor(hold=0.05, hold_over=2)
    looks = [(0, 0.0, 1e-3), (2, 0.02, 1e-3), (4, 0.18, 1e-3), (6, 0.42, 5e-4), (8, 0.0, 0.0)]
    weights, state = looked(method, looks)
    assert weights == pytest.approx([1.0, 0.852144, 1.040811, 1.150274, 1.150274], abs=1e-6)
    assert state["looks"].tolist() == [0.42, 0.0] and float(state["most"]) == 1e-3
    assert method.steer(Past(9, 60, {"task": 1.0}, 1e-3), state) is None  # a step without prompts


def test_an_early_step_counts_once_and_the_weight_stays_in_its_range():
    """In a run of 14 steps the first 4 all have prompts: 0.1 a look. Error 1 at most, so 0.1 and then 0.2, as every is
    2; from 1 it takes e^0.3 = 1.349859. Then 300 looks at 0 and as many far above the bound."""
    method = ICLAnchor(hold=0.1, hold_over=1)
    assert looked(method, [(3, 9.0, 1e-3), (4, 9.0, 1e-3)], total=14)[0] == pytest.approx(
        [math.exp(0.1), 1.349859], abs=1e-6
    )
    weights, state = looked(method, [(2 * n, 0.0, 1e-3) for n in range(300)])
    assert weights[0] == pytest.approx(math.exp(-0.2)) and weights[-1] == pytest.approx(0.01)
    back = looked(method, [(2 * n, 1.0, 1e-3) for n in range(300)], state=state)[0]
    assert back[22] < 1 < back[23] and back[-1] == pytest.approx(32.0)  # ln 100 / 0.2 = 23.03 looks to 1


def test_the_term_has_the_weight_of_its_state_and_shows_both(toy_view):
    """Weight 3 in the state: 3 * every 2 * ln 1.25; shown are ln 1.25 and 3."""
    view = toy_view(torch.tensor([[0.8, 0.1, 0.1]]).log(), [0], step=6, base=[[0.5, 0.25, 0.25]], owner="ICLAnchor")
    view.state["weight"] = torch.tensor(3.0, dtype=torch.float64)
    term = ICLAnchor(hold=0.05).loss(view)
    assert term.value.item() == pytest.approx(6 * math.log(1.25), rel=1e-5)
    assert term.shown["kl"].item() == pytest.approx(math.log(1.25), rel=1e-5) and term.shown["weight"].item() == 3


HELD = {"pool": 8, "shots": (1, 2), "every": 1, "short": 0, "prompts_per_step": 2}


def shown(result, name):
    return [p[f"ICLAnchor/{name}"] for _, p in result.log.loss]


def test_the_weight_falls_below_the_bound_and_rises_above_it(tiny_model, tokenizer, rows):
    loose = run([ICLAnchor(hold=1e3, **HELD)], tiny_model(), tokenizer, rows, 12)
    low = shown(loose, "weight")
    assert low[:4] == pytest.approx([1.0] * 4) and all(b < a for a, b in pairwise(low[3:]))
    tight = run([ICLAnchor(hold=1e-6, **HELD)], tiny_model(), tokenizer, rows, 12)
    high = shown(tight, "weight")
    assert high[-1] > 1.5 and all(b >= a * (1 - 1e-6) for a, b in pairwise(high))
    assert shown(tight, "kl")[-1] < shown(loose, "kl")[-1]
    assert float(tight.session.state["ICLAnchor"]["weight"]) >= high[-1]


def test_a_bound_that_moves_nothing_is_the_fixed_weight_bit_for_bit(tiny_model, tokenizer, rows):
    """With hold_rate 0 the KL is only shown; without a bound the method has no `steer` and shows nothing."""
    fixed = run([ICLAnchor(**HELD)], tiny_model(), tokenizer, rows, 6)
    watched = run([ICLAnchor(hold=0.05, hold_rate=0.0, **HELD)], tiny_model(), tokenizer, rows, 6)
    assert all(torch.equal(watched.weights[n], w) for n, w in fixed.weights.items())
    assert set(fixed.log.loss[0][1]) == {"task", "ICLAnchor"} and fixed.session.state["ICLAnchor"] == {}
    assert "steer" not in ICLAnchor().sites() and "steer" in ICLAnchor(hold=0.05).sites()
    assert shown(watched, "weight") == [1.0] * 6


def test_micro_batches_of_a_step_move_the_weight_once(tiny_model, tokenizer, rows):
    whole, parts = (
        run([ICLAnchor(hold=1e-3, **HELD)], tiny_model(), tokenizer, rows, 6, batch_size=8 // n,
            gradient_accumulation_steps=n)
        for n in (1, 4)
    )  # fmt: skip
    for name in ("kl", "weight"):
        assert shown(parts, name) == pytest.approx(shown(whole, name), rel=1e-3, abs=1e-9)
    assert len(parts.session.state["ICLAnchor"]["looks"]) == 4


def test_a_stronger_bound_is_a_lower_one():
    assert ICLAnchor(hold=0.06).stronger(3) == ICLAnchor(hold=0.02, gold=0.3 * 3)


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
    [
        *({"direction": "x"}, {"on": "x"}, {"shots": (3, 1)}, {"every": 0}, {"pool": 0}),
        *({"weight": -1.0}, {"gold": -1.0}, {"hold": 0.0}, {"hold": -1.0}, {"hold": math.nan}),
        *({"hold": 0.1, **more} for more in ({"hold_rate": -1.0}, {"hold_over": 0}, {"weight": 0.0})),
        *({"hold": 0.1, "hold_range": some} for some in ((2.0, 3.0), (0.0, 3.0), (0.1, 0.5))),
    ],
)
def test_values_that_make_no_sense(wrong, tiny_model, tokenizer):
    with pytest.raises(PlanError, match="ICLAnchor"):
        ICLAnchor(**wrong).check(Context(tiny_model(), tokenizer))


def test_requests_stand_among_the_prompts_of_chat_alone(tiny_model, tokenizer):
    """Of 9 prompts every third is a request where the task's rows go through the template; the others stay."""
    model, plain, chat = tiny_model(), Row("Hi:", " yes"), Row(Rendered("Hi:"), " yes")
    method = ICLAnchor(pool=9)
    shots, same, mixed = (method.asides(Context(model, tokenizer, rows=rows)) for rows in ((), (plain,), (chat,)))
    assert [r.ids.tolist() for r in shots] == [r.ids.tolist() for r in same]
    differ = [n for n, (a, b) in enumerate(zip(shots, mixed, strict=True)) if a.ids.tolist() != b.ids.tolist()]
    assert differ == [2, 5, 8]
    for row in (mixed[n] for n in differ):
        assert row.owner == "ICLAnchor" and row.gold is None and len(row.ids) <= 128
        assert row.num_scored == len(row.ids) - 1
    assert len({tuple(mixed[n].ids.tolist()) for n in differ}) == 3
    none = dataclasses.replace(method, requests=0.0).asides(Context(model, tokenizer, rows=(chat,)))
    assert [r.ids.tolist() for r in shots] == [r.ids.tolist() for r in none]
    with pytest.raises(PlanError, match="requests is 1"):
        ICLAnchor(requests=1.0).check(Context(model, tokenizer))
