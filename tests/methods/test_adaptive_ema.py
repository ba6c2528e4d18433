"""AdaptiveEMA: beta by hand, its properties, and the average along a real run."""

import pytest
import torch

from cases import run
from holdfast.errors import PlanError
from holdfast.method import Past
from holdfast.methods import AdaptiveEMA


def after(method, steps, start=(0.0, 0.0)):
    """The average after steps of (gradient, weights behind the step)."""
    state, p = {}, torch.tensor(start)
    for grad, weights in steps:
        past = Past(0, 0, {}, 1.0, params={"w": p}, grads={} if grad is None else {"w": torch.tensor(grad)})
        state.update(method.steer(past, state).state)
        p = torch.tensor(weights)
    return method.settled("w", p, state)


def test_values_by_hand():
    """Step 1 from (0, 0) to (1, 1): no earlier gradient, so beta = 0.01: e = (0.01, 0.01).
    Step 2 to (10.01, 10.01): g_prev (1, 0), g (-1, 2): a = 20, b = 3, c = 2 + 2 = 4.
    beta = 2 * 4 / (20 * 4) = 0.1: e = (0.01 + 0.1 * 10) = 1.01."""
    first = ([1.0, 0.0], [1.0, 1.0])
    assert after(AdaptiveEMA(), [first]).tolist() == pytest.approx([0.01, 0.01])
    got = after(AdaptiveEMA(), [first, ([-1.0, 2.0], [10.01, 10.01])])
    assert got.tolist() == pytest.approx([1.01, 1.01])
    # means: a = 10, b = 1.5, c = 2: beta = 5 / 20 = 0.25
    got = after(AdaptiveEMA(norm="mean"), [first, ([-1.0, 2.0], [10.01, 10.01])])
    assert got.tolist() == pytest.approx([2.51, 2.51])


def test_outside_of_0_and_1_it_falls_back():
    first = ([1.0, 0.0], [0.0, 0.0])
    near = after(AdaptiveEMA(), [first, ([-1.0, 2.0], [0.1, 0.1])])  # a c = 0.8: beta = 10
    assert near.tolist() == pytest.approx([0.001, 0.001])
    same = after(AdaptiveEMA(fallback=0.5), [first, ([1.0, 0.0], [4.0, 4.0])])  # c = 0
    assert same.tolist() == pytest.approx([2.0, 2.0])
    none = after(AdaptiveEMA(), [first, (None, [4.0, 4.0])])
    assert none.tolist() == pytest.approx([0.04, 0.04])


def test_beta_falls_as_the_distance_grows():
    method, state = AdaptiveEMA(), {"norms/w": torch.tensor([3.0, 4.0])}
    rates = [method.rate("w", torch.zeros(2), torch.full((2,), k * 10.0), state) for k in (1, 3)]
    assert rates == pytest.approx([0.1, 0.1 / 3])


def test_weights_that_stand_still_stay():
    steps = [([1.0, -2.0], [3.0, 5.0])] * 3
    torch.testing.assert_close(after(AdaptiveEMA(), steps, start=(3.0, 5.0)), torch.tensor([3.0, 5.0]))


def test_a_run_trains_as_without_and_ends_with_the_average(tiny_model, tokenizer, rows):
    method = AdaptiveEMA(fallback=0.3)
    weights, rates = [], []

    def watch(session, step):
        weights.append({n: p.detach().clone() for n, p in session.params.items()})

    class Noting(AdaptiveEMA):
        def rate(self, name, average, param, state):
            rates.append((name, super().rate(name, average, param, state)))
            return rates[-1][1]

    got = run([Noting(fallback=0.3)], tiny_model(), tokenizer, rows, 4, watch=watch)
    plain = run([], tiny_model(), tokenizer, rows, 4)
    assert got.log.loss == plain.log.loss
    base = dict(tiny_model().named_parameters())
    for name, w in got.weights.items():
        wanted = base[name].detach()
        for now, beta in zip(weights, [r for n, r in rates if n == name], strict=True):
            wanted = torch.lerp(wanted, now[name], beta)
        torch.testing.assert_close(w, wanted, rtol=1e-6, atol=1e-7)
    assert {round(r, 6) for _, r in rates} != {method.fallback}  # the formula decided somewhere


@pytest.mark.parametrize("wrong", [{"norm": "max"}, {"fallback": 0.0}])
def test_values_that_make_no_sense(wrong):
    with pytest.raises(PlanError, match="AdaptiveEMA"):
        AdaptiveEMA(**wrong).check(None)


def test_the_average_keeps_its_memory_and_is_not_moved_by_the_end():
    method, state = AdaptiveEMA(), {}
    for w in (1.0, 2.0, 4.0, 8.0):
        before = state.get("average/w")
        state.update(method.steer(Past(0, 0, {}, 1.0, params={"w": torch.tensor([w])}), state).state)
        assert before is None or state["average/w"] is before
    ends = [method.settled("w", torch.tensor([16.0]), state).item() for _ in range(2)]
    assert ends[0] == ends[1] != state["average/w"].item()
