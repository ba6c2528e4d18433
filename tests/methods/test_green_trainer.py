"""GreenTrainer: the choice against all choices there are; what is not chosen stands still and gets no gradient."""

import re
from itertools import chain, combinations

import numpy as np
import pytest
import torch

from cases import run, weights_of
from holdfast.errors import PlanError
from holdfast.method import Past
from holdfast.methods import GreenTrainer
from holdfast.methods.steer.green_trainer import _costs, _tensors, best
from holdfast.services import Context


def test_the_choice_by_hand():
    """Three tensors of gradient cost 0.1, to pass through 0.2 each; 0.5 may go. The deepest alone costs 0.1 + 0.4,
    worth 5; the two above it cost 0.2 + 0.2 and are worth 2 + 4: they are chosen. Worth 7, the deepest is."""
    cost, through = np.full(3, 0.1), np.full(3, 0.2)
    assert best(np.array([5.0, 2.0, 4.0]), cost, through, 0.5) == [1, 2]
    assert best(np.array([7.0, 2.0, 4.0]), cost, through, 0.5) == [0]
    assert best(np.array([7.0, -2.0, 4.0]), cost, through, 0.9) == [0, 2]
    assert best(np.array([7.0, 2.0, 4.0]), cost, through, 0.05) == []


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all(seed):
    draw = np.random.default_rng(seed)
    value, cost, through = draw.normal(size=9) + 0.3, draw.integers(0, 9, 9), draw.integers(0, 9, 9)
    limit = int(draw.integers(10, 60))

    def spent(chosen):
        return cost[list(chosen)].sum() + through[min(chosen) + 1 :].sum() if chosen else 0

    every = chain.from_iterable(combinations(range(9), n) for n in range(10))
    wanted = max(value[list(c)].sum() for c in every if spent(c) <= limit)
    got = best(value, cost / 100, through / 100, limit / 100, 100)
    assert spent(got) <= limit and value[got].sum() == pytest.approx(wanted)


def changed(a, b):
    return {n for n in a if not torch.equal(a[n], b[n])}


def test_what_is_not_chosen_stands_still(tiny_model, tokenizer, rows):
    """24 rows in steps of 4, a choice every epoch of 6 steps: all move in step 1 and, the epoch being over, in step
    7; in between only what was chosen, and no gradient is made below it. With decay."""
    at, grads = {0: weights_of(tiny_model())}, {}

    def watch(session, step):
        at[step] = weights_of(session.model)
        grads[step] = {n for n, p in session.params.items() if p.requires_grad}

    method = GreenTrainer(rho=0.5, epochs=1)
    got = run([method], tiny_model(), tokenizer, rows, 12, weight_decay=0.1, watch=watch, lr_scheduler_type="constant")
    moved = {s: changed(at[s - 1], at[s]) for s in range(1, 13)}
    everything = set(at[0])
    assert moved[1] == moved[7] == everything
    for first, last in ((2, 6), (8, 12)):
        assert moved[first] and all(moved[s] == moved[first] < everything for s in range(first, last + 1))
        assert all(grads[s] == moved[s] for s in range(first + 1, last + 1))
    assert grads[1] == grads[2] == grads[7] == grads[8] == everything
    state = got.session.state["GreenTrainer"]
    assert {k.split("/")[1] for k in state if "/" in k} == moved[12] and not any("weight/" in k for k in state)


def test_importance_by_hand_is_of_the_gradient_after_the_step(tiny_model):
    """Every entry moves by +0.1, against gradients of -1: each tensor of n entries did good at its own step. After it
    the norms have gradients of -1 and I = 0.1 n > 0, all others of +1 and I < 0: rho 1 pays for all, norms train."""
    model, state = tiny_model(), {}
    method, params = GreenTrainer(rho=1.0), {n: p.detach() for n, p in model.named_parameters()}
    before = Past(0, 9, {}, 1e-3, model, {n: -torch.ones_like(p) for n, p in params.items()}, params)
    state.update(method.steer(before, state).state)
    norms = {n for n in params if "norm" in n}
    after = {n: torch.full_like(p, -1.0 if n in norms else 1.0) for n, p in params.items()}
    moved = {n: p + 0.1 for n, p in params.items()}
    said = method.steer(Past(1, 9, {}, 1e-3, model, after, moved), state)
    assert {k.removeprefix("chosen/") for k in said.state if k.startswith("chosen/")} == norms
    assert not any(re.search(p, n) for p in said.freeze for n in norms) and len(said.freeze) == len(params) - len(
        norms
    )


def test_small_steps_on_the_same_rows_all_help(tiny_model, tokenizer, rows):
    """All rows in every batch, and Adam is nearly SGD: the gradient after a small step is nearly that of the step, so
    every I is about lr |g|^2 > 0, and rho 1 chooses everything."""
    at, linear = (
        {},
        {"adam_epsilon": 1.0, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 0.0},
    )
    watch = lambda session, n: at.update({n: weights_of(session.model)})  # noqa: E731
    run([GreenTrainer(rho=1.0)], tiny_model(), tokenizer, rows, 3, watch=watch, batch_size=len(rows), **linear)
    assert changed(at[1], at[2]) == changed(at[2], at[3]) == set(at[1])


def test_a_step_without_learning_rate_is_not_measured(tiny_model, tokenizer, rows):
    """A schedule begins at 0: step 1 moves nothing, step 2 is measured, step 3 is of what was chosen."""
    at = {0: weights_of(tiny_model())}
    watch = lambda session, n: at.update({n: weights_of(session.model)})  # noqa: E731
    run([GreenTrainer(rho=0.5)], tiny_model(), tokenizer, rows, 4, watch=watch, warmup_steps=2)
    first, second, third = (changed(at[n - 1], at[n]) for n in (1, 2, 3))
    assert not first and second == set(at[0]) and third and third < second


@pytest.mark.parametrize(
    ("wrong", "words"), [({"rho": 0.3}, "a third"), ({"rho": 1.1}, "rho"), ({"epochs": 0}, "epochs")]
)
def test_values_that_make_no_sense(wrong, words, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=words):
        GreenTrainer(**wrong).check(Context(tiny_model(), tokenizer))


@pytest.mark.parametrize("tied", [True, False])
def test_a_backward_always_passes_through_the_head(tiny_model, tied):
    """(2 V D of table and head, or V D of both in one): to train the last norm alone costs the head's entries too."""
    model = tiny_model(tied=tied)
    head, count = model.get_output_embeddings().weight.numel(), sum(p.numel() for p in model.parameters())
    sizes, through = _costs(model)
    assert sizes.sum() == count and through[-1] == head and through.sum() == count - (0 if tied else head)
    assert through[0] == 0 and sizes[0] == head  # of the embeddings nothing passes on
    above = through.sum() - through.cumsum()
    assert above[[n for n, _ in _tensors(model)].index("model.norm.weight")] == head
