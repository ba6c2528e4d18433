"""LIFT: principal entries, their drawing, and what happens to moments and to everything else."""

import pytest
import torch

from cases import run
from holdfast.errors import PlanError
from holdfast.methods import LIFT, Freeze, HalfFineTune
from holdfast.methods.adapt.lift import principal
from holdfast.sites.entries import PREFIX, Entries


def test_principal_entries_by_hand():
    """W = diag(3, 2) plus 1 in the corner. Singular values of [[3, 1], [0, 2]]: W W^T = [[10, 2], [2, 4]] has the
    eigenvalues 7 +- sqrt(13), so s_1^2 = 10.6056 with u_1 ~ (2, 0.6056) / |.| = (0.95709, 0.28979).
    W_1 = u_1 (u_1^T W):  u_1^T W = (2.87127, 1.53667);  W_1 = [[2.74806, 1.47074], [0.83207, 0.44531]].
    With lora_rank 1 there is room for (2 + 2) * 1 = 4 of 4 entries; so rank 1 of a 4 x 4 with this corner, 8 of 16."""
    weight = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(s[0] ** 2, torch.tensor(7 + 13**0.5))
    low = s[0] * torch.outer(u[:, 0], vh[0])
    torch.testing.assert_close(low, torch.tensor([[2.74806, 1.47074], [0.83207, 0.44531]]), atol=1e-4, rtol=0)
    assert principal(weight, 1, 1).all()  # min((m + n) r, m n)
    # a 1 x 3 matrix: W_1 is W itself; (1 + 3) * 1 = 4 >= 3 takes all, so cut by hand with a wider one
    wide = torch.tensor([[5.0, -4.0, 3.0, 0.5, 0.1, -2.0, 0.2, 1.0]] * 2)  # rank 1, so W_1 = W
    chosen = principal(wide, 1, 1)  # (2 + 8) * 1 = 10 of 16: the five largest columns
    assert chosen.sum() == 10 and chosen[0].tolist() == [True, True, True, False, False, True, False, True]


def test_full_rank_is_plain_magnitude():
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    chosen = principal(weight, 12, 2)
    largest = weight.abs().flatten().topk(64).values.min()
    assert chosen.sum() == 64 and torch.equal(chosen, weight.abs() >= largest)


def test_moments_of_entries_that_stay_are_kept_and_the_others_start_anew():
    p = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.1)
    drawn = [torch.tensor([[True, True, False], [False, False, False]])]

    class Drawn(LIFT):
        def entries(self, name, param, state, step):
            return drawn[-1]

        def redraws(self, step):
            return True

    method = Drawn()
    entries = Entries([method], {method.name: {}})
    for step in range(3):
        if step == 2:
            before = {k: v.clone() for k, v in optimizer.state[p].items()}
            drawn.append(torch.tensor([[True, False, True], [False, False, False]]))
        entries.draw(step, {"w": p}, optimizer)
        if step == 2:
            for key in ("exp_avg", "exp_avg_sq"):
                now = optimizer.state[p][key]
                assert now[0, 0] == before[key][0, 0] != 0  # stays
                assert now[0, 1] == 0 and now[0, 2] == 0  # left; joins
        p.grad = torch.ones_like(p)
        entries.mask_gradients({"w": p})
        with torch.no_grad():
            entries.keep({"w": p})
            optimizer.step()
            entries.put_back({"w": p})
    assert (p[1] == 1).all() and p[0, 0] < p[0, 1] < 1 and p[0, 2] < 1
    assert entries.state[method.name][PREFIX + "w"].tolist() == drawn[-1].tolist()


def test_masks_of_two_methods_intersect(tiny_model, tokenizer, rows):
    """Half fine-tuning freezes whole matrices, LIFT entries of the others; two element masks multiply."""
    result = run([HalfFineTune(), LIFT(lora_rank=1, filter_rank=2)], tiny_model(), tokenizer, rows, steps=2)
    base = dict(tiny_model().named_parameters())
    trained = {n for n, w in result.weights.items() if not torch.equal(w, base[n])}
    assert trained and all("_proj" in n for n in trained) and len(trained) < 14

    class Left(LIFT):
        def entries(self, name, param, state, step):
            return torch.arange(param.numel()).view_as(param) % 2 == 0

    both = Entries([one := LIFT(lora_rank=1, filter_rank=2), two := Left()], {m: {} for m in ("LIFT", "Left")})
    w = torch.randn(8, 8)
    both.draw(0, {"layers.0.w": torch.nn.Parameter(w)}, None)
    wanted = one.entries("layers.0.w", w, {}, 0) & two.entries("layers.0.w", w, {}, 0)
    assert torch.equal(both.masks["layers.0.w"], wanted) and 0 < both.share < 1


def test_redrawn_entries_go_on_after_a_restart(tiny_model, tokenizer, rows, tmp_path):
    """Killed between two drawings, a run ends with the same weights."""
    plan = [LIFT(lora_rank=1, filter_rank=2, interval=3)]
    settings = {"steps": 8, "weight_decay": 0.1, "save_steps": 4}
    whole = run(plan, tiny_model(), tokenizer, rows, **settings)

    def stop(_session, step):
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, tiny_model(), tokenizer, rows, **settings, folder=tmp_path, watch=stop)
    again = run(plan, tiny_model(), tokenizer, rows, **settings, folder=tmp_path)
    assert all(torch.equal(again.weights[n], w) for n, w in whole.weights.items())


def test_one_more_rank_trains_more_and_decay_moves_nothing_else(tiny_model, tokenizer, rows):
    base = dict(tiny_model().named_parameters())
    counts = []
    for rank in (1, 2):
        got = run([LIFT(lora_rank=rank)], tiny_model(), tokenizer, rows, steps=3, weight_decay=0.5)
        counts.append(sum(int((w != base[n]).sum()) for n, w in got.weights.items()))
    wanted = [sum(min(sum(p.shape) * r, p.numel()) for n, p in base.items() if p.ndim == 2 and "layers." in n)
              for r in (1, 2)]  # fmt: skip
    assert counts == wanted


@pytest.mark.parametrize("wrong", [{"lora_rank": -1}, {"filter_rank": 0}, {"interval": -1}])
def test_values_that_make_no_sense(wrong):
    with pytest.raises(PlanError, match="LIFT"):
        LIFT(**wrong).check(None)


def test_a_frozen_layer_stays_frozen(tiny_model, tokenizer, rows):
    got = run([Freeze(layers=1), LIFT(lora_rank=1)], tiny_model(), tokenizer, rows, steps=2)
    base = dict(tiny_model().named_parameters())
    assert all(torch.equal(w, base[n]) for n, w in got.weights.items() if "layers.0." in n)
