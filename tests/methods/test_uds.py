"""UDS: nuclear norms and distances to what was chosen last, against hand-computed values."""

import dataclasses
import math

import pytest
import torch

from holdfast.engine.pack import pack, token_row
from holdfast.errors import PlanError
from holdfast.methods import UDS
from holdfast.methods.batch.uds import nuclear_norm
from holdfast.services import Context, Look


def row(n: int):
    return token_row([1, 2, 3, 4 + n], 2)


def look(answers, state, **settings):
    """A look at rows whose logits are written down: `answers[i]` (L, V) for the row that ends with 4 + i."""

    def forward(rows):
        return pack(rows), torch.cat([answers[int(r.ids[-1]) - 4] for r in rows])

    return Look(Context(None, None, max_length=8, **settings), state, forward)


def test_nuclear_norm_is_the_sum_of_singular_values():
    # [[3, 0], [4, 5]]: the singular values are sqrt(45) and sqrt(5): their squares sum to 50, their product is det 15
    z = torch.tensor([[3.0, 0.0], [4.0, 5.0]])
    assert nuclear_norm(z).item() == pytest.approx(math.sqrt(45) + math.sqrt(5))
    wide = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    assert nuclear_norm(wide).item() == pytest.approx(torch.linalg.svdvals(wide).sum().item(), rel=1e-5)
    assert nuclear_norm(wide.T).item() == pytest.approx(nuclear_norm(wide).item())


def test_the_largest_answers_are_trained_on():
    # diagonals (a, a): nuclear norms 2a; half of four rows are those with a = 5 and a = 3, in the order of the batch
    eye, sizes = torch.eye(2, 6), (3.0, 1.0, 5.0, 2.0)
    state = {}
    kept = UDS(keep=0.5).batch([row(i) for i in range(4)], 0, look([a * eye for a in sizes], state))
    assert [int(r.ids[-1]) - 4 for r in kept] == [0, 2]
    assert state["queue"].shape == (2, 6 * 8)  # a vocabulary of 6 has no 128 entries to choose among


def test_diversity_is_the_mean_distance_to_the_queue():
    # both rows have nuclear norm 2; what lies in the queue is row 0's own projection, at distance 0 from it
    a, b = torch.eye(2, 6), torch.eye(2, 6).roll(2, 1)
    method = UDS(keep=0.5, alpha=1.0)
    before = look([a, b], {})
    own, other = method.project(a, before.ctx), method.project(b, before.ctx)
    assert torch.dist(own, other) > 0.1
    state = {"queue": own[None]}
    kept = method.batch([row(0), row(1)], 1, look([a, b], state))
    assert [int(r.ids[-1]) - 4 for r in kept] == [1]
    torch.testing.assert_close(state["queue"], torch.stack([own, other]))


def test_distances_have_the_scale_of_the_released_code():
    """One token apart in one entry, by hand: |Re FFT| of it is |cos| of some angle at every frequency. With all 8
    entries of each side kept nothing is left to chance but these: the mean of cos^2 over 8 angles that turn k / 8 of a
    circle is 1/2 (1 where the entry is the 0th or the 4th). So a distance of 1 becomes sqrt(8/2) * sqrt(8/2) = 4."""
    method, ctx = UDS(dims=(8, 8)), Context(None, None, max_length=8)
    grid = torch.zeros(3, 8)
    grid[1, 3] = 1.0
    assert method.project(grid, ctx).norm().item() == pytest.approx(4.0, rel=1e-5)


def test_distances_grow_by_half_the_root_of_the_grid_on_average():
    """V 60, max_length 16: sqrt(60 / 2) sqrt(16 / 2) = 15.49 times the true distance, and a little more, since at the
    frequencies 0 and m / 2 all of an FFT is real: m (1/2 + 1/m) is 31 and 9, so sqrt(31 * 9) = 16.70."""
    method, squares = UDS(dims=(12, 4)), []
    for seed in range(400):
        a, b = torch.randn(2, 7, 60, generator=torch.Generator().manual_seed(seed)).unbind()
        ctx = Context(None, None, max_length=16, seed=seed)
        squares.append((torch.dist(method.project(a, ctx), method.project(b, ctx)) / torch.dist(a, b)).item() ** 2)
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(math.sqrt(31 * 9), rel=0.02)


def test_the_queue_forgets_the_oldest():
    answers, state = [torch.eye(2, 6) * (i + 1) for i in range(4)], {}
    for step in range(3):
        UDS(keep=0.5, queue=3).batch([row(i) for i in range(4)], step, look(answers, state))
    assert len(state["queue"]) == 3


def test_order_and_neighbours_do_not_matter():
    answers = [torch.randn(2, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    method, rows = UDS(keep=0.5), [row(i) for i in range(4)]
    kept = {int(r.ids[-1]) for r in method.batch(rows, 0, look(answers, {}))}
    turned = {int(r.ids[-1]) for r in method.batch(rows[::-1], 0, look(answers, {}))}
    assert kept == turned and len(kept) == 2


def test_rows_of_others_pass():
    own = dataclasses.replace(row(3), owner="Replay")
    rows = [row(0), own, row(1), row(2)]
    kept = UDS(keep=0.3).batch(rows, 0, look([torch.eye(2, 6) * (i + 1) for i in range(3)], {}))
    assert own in kept and len(kept) == 2


@pytest.mark.parametrize("method", [UDS(keep=0.0), UDS(keep=1.5), UDS(alpha=-1.0), UDS(queue=0), UDS(dims=(3,))])
def test_values_without_meaning_are_refused(method, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=r"UDS\."):
        method.check(Context(tiny_model(), tokenizer))
