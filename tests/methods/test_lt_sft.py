"""LT-SFT: the entries that moved most, by hand, and what the second stage starts from."""

import pytest
import torch

from cases import run
from holdfast.errors import PlanError
from holdfast.methods import LTSFT, HalfFineTune
from holdfast.methods.stages.lt_sft import most_moved


@pytest.mark.parametrize(
    "k, a, b",
    [
        # a moved by 3, 1, 0 and b by 2, 1, 0, 1
        (1, [0], []),
        (2, [0], [0]),
        (3, [0, 1], [0]),  # three moved by 1; the first in the order of the tensors is a's
        (4, [0, 1], [0, 1]),
        (6, [0, 1], [0, 1, 3]),  # five moved at all
        (9, [0, 1], [0, 1, 3]),
    ],
)
def test_the_entries_that_moved_most_by_hand(k, a, b):
    now = {"a": torch.tensor([3.5, -0.5, 0.5]), "b": torch.tensor([[2.0, 1.0], [0.0, -1.0]])}
    base = {"a": torch.full((3,), 0.5), "b": torch.zeros(2, 2)}
    assert {n: w.tolist() for n, w in most_moved(now, base, k).items()} == {"a": a, "b": b}


def test_the_second_stage_starts_at_the_base_with_what_moved_most(tiny_model, tokenizer, rows):
    """A rate of 0 in the second stage shows where it starts; the mask is the top k of what the first one changed."""
    base, at = dict(tiny_model(tied=False).named_parameters()), {}

    def watch(session, step):
        at[step] = {n: p.detach().clone() for n, p in session.model.named_parameters()}

    method = LTSFT(density=0.1)
    got = run([method], tiny_model(tied=False), tokenizer, rows, 8, watch=watch, warmup_steps=1, weight_decay=0.3)
    assert all(torch.equal(w, base[n]) for n, w in at[5].items())  # its first step has the rate 0
    moved = {n: (w - base[n]).abs() for n, w in at[4].items() if not torch.equal(w, base[n])}
    assert set(moved) == {n for n, w in base.items() if w.ndim == 2 and "lm_head" not in n}
    k = round(0.1 * sum(m.numel() for m in moved.values()))
    edge = torch.cat([m.flatten() for m in moved.values()]).sort(descending=True).values[k - 1]
    changed = {n: got.weights[n] != base[n] for n in base}
    masks = got.session.state["LTSFT"]
    assert sum(int(masks[f"entries/{n}"].sum()) for n in moved) == k
    for name, m in moved.items():
        assert ((m > edge) <= masks[f"entries/{name}"]).all() and (masks[f"entries/{name}"] <= (m >= edge)).all()
        assert not changed[name][~masks[f"entries/{name}"]].any()
    assert 0.9 * k < sum(int(c.sum()) for c in changed.values()) <= k


def test_what_another_method_freezes_is_not_counted(tiny_model, tokenizer, rows):
    got = run([HalfFineTune(), LTSFT(density=0.5)], tiny_model(), tokenizer, rows, 6)
    base = dict(tiny_model().named_parameters())
    moved = {n: int((w != base[n]).sum()) for n, w in got.weights.items() if not torch.equal(w, base[n])}
    size = sum(base[n].numel() for n in got.session.params)
    assert set(moved) <= set(got.session.params) and 0.9 * 0.5 * size < sum(moved.values()) <= 0.5 * size


@pytest.mark.parametrize("wrong", [{"density": 0.0}, {"density": 1.5}, {"full_share": 1.0}])
def test_values_that_make_no_sense(wrong):
    with pytest.raises(PlanError, match="LTSFT"):
        LTSFT(**wrong).check(None)
