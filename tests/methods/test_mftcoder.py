"""MFTCoder by hand: three rows of two sources, every mode, value and gradient."""

from dataclasses import replace

import pytest
import torch

from holdfast.data.mix import Mix, Source
from holdfast.engine.counts import count_rows
from holdfast.engine.pack import pack, token_row
from holdfast.errors import PlanError
from holdfast.methods import MFTCoder
from holdfast.services import Context, View

ROWS = [token_row(range(3), 1), token_row(range(5), 1), token_row(range(2), 1, source="Replay")]  # 2, 4 and 1 targets
LOSSES = torch.tensor([1.0, 3.0, 2.0, 4.0, 6.0, 8.0, 10.0])


def view_of(rows, step_rows=None, logits=None):
    packed = pack(rows)
    logits = torch.zeros(len(packed.row), 9) if logits is None else logits
    return View(packed, logits, 0, None, {}, None, "MFTCoder", {}, {}, {}, counts=count_rows(step_rows or rows))


def weighted(method, rows=ROWS, losses=LOSSES, step_rows=None):
    """What the host makes of it: the sum of weighted losses by all targets of the step."""
    weight = method.token_weight(view_of(rows, step_rows))
    return (weight * losses).sum().item() / sum(r.num_scored for r in step_rows or rows)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        # task: (1 + 3 + 2 + 4 + 6 + 8) / 6 = 4; Replay: 10; their mean
        ({}, 7.0),
        # weights 3 and 1: (3 * 4 + 10) / 4
        ({"weights": (("task", 3.0),)}, 5.5),
        # means of the task's rows: 2 and 5, their mean 3.5; Replay: 10; the mean of both
        ({"inside": "samples"}, 6.75),
        # means of the three rows: 2, 5, 10
        ({"inside": "samples", "across": False}, 17 / 3),
    ],
    ids=str,
)
def test_every_mode_by_hand(settings, wanted):
    method = MFTCoder(**settings)
    assert weighted(method) == pytest.approx(wanted)
    parts = [(ROWS[:1], LOSSES[:2]), (ROWS[1:], LOSSES[2:])]
    assert sum(weighted(method, rows, losses, ROWS) for rows, losses in parts) == pytest.approx(wanted)


def test_gradient_by_hand():
    """Nine tokens alike: p = 1/9, so d loss / d logit of the target is w / N * (1/9 - 1). Of the one token of Replay
    w / N is 1/2, of each of the task's six it is 1/12."""
    logits = torch.zeros(7, 9, requires_grad=True)
    view = view_of(ROWS, logits=logits)
    (MFTCoder().token_weight(view) * -view.token_logp).sum().div(7).backward()
    at = logits.grad[torch.arange(7), view.packed.target]
    torch.testing.assert_close(at, -8 / 9 * torch.tensor([1 / 12] * 6 + [1 / 2]))


def test_what_must_be_equal_is():
    """Rows of one length: by samples is by tokens. One source: nothing to balance. Names do not matter."""
    even = [token_row(range(3), 1), token_row(range(3), 1)]
    by_rows = weighted(MFTCoder(inside="samples", across=False), even, LOSSES[:4])
    assert by_rows == pytest.approx(LOSSES[:4].mean().item())
    assert MFTCoder().token_weight(view_of(ROWS[:2])) is None
    swapped = [replace(r, source="a" if r.source == "task" else "task") for r in ROWS]
    assert weighted(MFTCoder(), swapped) == pytest.approx(7.0)


def test_rows_of_other_owners_do_not_count():
    aside = token_row(range(4), 1, "Anchor")
    assert MFTCoder().token_weight(view_of([*ROWS, aside])).tolist() == pytest.approx([7 / 12] * 6 + [3.5] + [0.0] * 3)


def test_it_looks_whether_there_is_something_to_balance():
    mix, ctx = Mix(ROWS[:2]), Context(None, None)
    more = mix.add(Source("Replay", ROWS[2:], 0.5))
    assert MFTCoder(weights=(("Replay", 2.0),)).data(more, ctx) is more
    assert MFTCoder(across=False, inside="samples").data(mix, ctx) is mix
    with pytest.raises(PlanError, match="no method before it adds one"):
        MFTCoder().data(mix, ctx)
    with pytest.raises(PlanError, match=r"'Reply'.*Replay"):
        MFTCoder(weights=(("Reply", 2.0),)).data(more, ctx)


@pytest.mark.parametrize(
    "wrong",
    [
        {"inside": "rows"},
        {"weights": (("task", 0.0),)},
        {"weights": ("ab",)},
        {"weights": (("task", 2.0),), "across": False},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(PlanError, match="MFTCoder"):
        MFTCoder(**wrong).check(Context(None, None))
