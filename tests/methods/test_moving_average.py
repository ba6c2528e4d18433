"""MovingAverage: the recursion by hand, and along a real run of weights and of an adapter."""

import pytest
import torch

from cases import run
from holdfast.errors import PlanError
from holdfast.method import Past, canonical
from holdfast.methods import LoRA, MovingAverage, SpIEL


def after(method, *weights):
    """The average after steps that made these weights, from a start of 100."""
    state, p = {}, torch.tensor([100.0])
    for w in weights:
        state.update(method.steer(Past(0, 0, {}, 1.0, params={"w": p}), state).state)
        p = torch.tensor([w])
    return method.settled("w", p, state).item()


def test_values_by_hand():
    """decay 0.25: a = 0 for the first step, min(1/2, 1/4) = 1/4 from then on. The start plays no part.
    2;  then 0.25 * 2 + 0.75 * 4 = 3.5;  then 0.25 * 3.5 + 0.75 * 6 = 5.375."""
    assert [after(MovingAverage(), *w) for w in ((2.0,), (2.0, 4.0), (2.0, 4.0, 6.0))] == [2.0, 3.5, 5.375]
    # decay 0.9 is more than 1 - 1/(t + 1) for nine steps: until then it is the plain mean
    assert after(MovingAverage(decay=0.9), 2.0, 4.0, 9.0) == pytest.approx(5.0)


def test_a_run_ends_with_the_average_of_its_weights_and_trains_as_without(tiny_model, tokenizer, rows):
    seen = []

    def watch(session, step):
        seen.append({n: p.detach().clone() for n, p in session.params.items()})

    got = run([MovingAverage(decay=0.5)], tiny_model(), tokenizer, rows, 5, watch=watch)
    plain = run([], tiny_model(), tokenizer, rows, 5)
    assert got.log.loss == plain.log.loss
    for name, w in got.weights.items():
        wanted = seen[0][name]
        for t, now in enumerate(seen[1:], start=1):
            a = min(1 - 1 / (t + 1), 0.5)
            wanted = a * wanted + (1 - a) * now[name]
        torch.testing.assert_close(w, wanted, rtol=1e-6, atol=1e-7)
        assert not torch.equal(w, plain.weights[name])


def test_the_factors_of_an_adapter_are_averaged(tiny_model, tokenizer, rows):
    seen = []

    def watch(session, step):
        seen.append({canonical(n): p.detach().clone() for n, p in session.model.named_parameters() if p.requires_grad})

    got = run([LoRA(r=2), MovingAverage(decay=0.9)], tiny_model(), tokenizer, rows, 3, watch=watch)
    for name in seen[0]:
        mean = sum(s[name] for s in seen) / 3
        torch.testing.assert_close(got.weights[name], mean, rtol=1e-5, atol=1e-7)


def test_entries_that_left_are_the_bases(tiny_model, tokenizer, rows):
    """Entries of SpIEL come and go: the average remembers those that left, and they stay at the base all the same."""
    base = dict(tiny_model().named_parameters())
    sparse = SpIEL(density=0.1, every=3, accumulate=1)
    got = run([sparse, MovingAverage(decay=0.9)], tiny_model(), tokenizer, rows, 9)
    masks, state = got.session.chosen.masks, got.session.state["MovingAverage"]
    assert masks and all(torch.equal(got.weights[n][~m], base[n].detach()[~m]) for n, m in masks.items())
    assert any(not torch.equal(state[f"average/{n}"][~m], base[n].detach()[~m]) for n, m in masks.items())
    assert any(not torch.equal(got.weights[n], base[n]) for n in masks)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_values_that_make_no_sense(decay):
    with pytest.raises(PlanError, match=r"MovingAverage\.decay"):
        MovingAverage(decay=decay).check(None)


def test_the_average_keeps_its_memory_and_is_not_moved_by_the_end():
    method, state = MovingAverage(), {}
    for w in (1.0, 2.0, 4.0, 8.0):
        before = state.get("average/w")
        state.update(method.steer(Past(0, 0, {}, 1.0, params={"w": torch.tensor([w])}), state).state)
        assert before is None or state["average/w"] is before
    ends = [method.settled("w", torch.tensor([16.0]), state).item() for _ in range(2)]
    assert ends[0] == ends[1] != state["average/w"].item()
