"""OrthogonalSubspace: the projection of a step, in both meanings."""

import pytest
import torch

from holdfast.errors import PlanError
from holdfast.methods import OrthogonalSubspace
from holdfast.services import Context


@pytest.fixture
def diagonal():
    """W = diag(3, 2, 1), one preserved direction: U_h = V_h = e_1."""
    e1 = torch.tensor([[1.0], [0.0], [0.0]])
    return {"U/w": e1, "V/w": e1.T.contiguous()}


STEP = torch.arange(1.0, 10.0).view(3, 3)  # ((1, 2, 3), (4, 5, 6), (7, 8, 9))


def test_block_by_hand(diagonal):
    # U_h U_h^T step V_h V_h^T keeps entry (1, 1) only: the step loses that one number
    got = OrthogonalSubspace(mode="block").update("w", STEP, torch.zeros(3, 3), diagonal)
    assert got.tolist() == [[0, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_factored_by_hand(diagonal):
    # (I - e1 e1^T) step (I - e1 e1^T): the first row and the first column go
    got = OrthogonalSubspace(mode="factored").update("w", STEP, torch.zeros(3, 3), diagonal)
    assert got.tolist() == [[0, 0, 0], [0, 5, 6], [0, 8, 9]]


@pytest.mark.parametrize("mode", ["block", "factored"])
def test_projecting_twice_is_projecting_once(tiny_model, start, mode):
    method = OrthogonalSubspace(mode=mode)
    state = start([method], tiny_model()).state["OrthogonalSubspace"]
    draw = torch.Generator().manual_seed(0)
    for name, p in tiny_model().named_parameters():
        if not method.touches(name, p):
            continue
        step = torch.randn(p.shape, generator=draw)
        once = method.update(name, step, p, state)
        torch.testing.assert_close(method.update(name, once, p, state), once, atol=1e-5, rtol=0)
        assert once.norm() < step.norm()  # it does take something away


@pytest.mark.parametrize("mode", ["block", "factored"])
def test_nothing_leaks_under_adam(tiny_model, start, token_rows, gradients, mode):
    base = dict(tiny_model().named_parameters())
    method = OrthogonalSubspace(mode=mode)
    session = start([method], tiny_model())
    optimizer = torch.optim.AdamW(session.param_groups(1e-2, 0.1), weight_decay=0.1)
    session.hook(optimizer)
    for _ in range(6):
        gradients(session, token_rows)
        optimizer.step()
    seen = 0
    for name, p in session.params.items():
        if not method.touches(name, p):
            continue
        u, _, vh = torch.linalg.svd(base[name])
        k = min(p.shape) // 2
        moved = (p - base[name]).detach()
        inside = u[:, :k].T @ moved @ vh[:k].T
        assert inside.norm() < 1e-4 * moved.norm(), name
        if mode == "factored":
            assert (u[:, :k].T @ moved).norm() < 1e-4 * moved.norm()
            assert (moved @ vh[:k].T).norm() < 1e-4 * moved.norm()
        seen += 1
    assert seen == 2 * 7


def test_without_the_projection_it_does_move_inside(tiny_model, start, token_rows, gradients):
    """The control of the test above: plain AdamW moves the preserved block."""
    base = dict(tiny_model().named_parameters())
    session = start([], tiny_model())
    optimizer = torch.optim.AdamW(session.param_groups(1e-2, 0.1))
    gradients(session, token_rows)
    optimizer.step()
    name = "model.layers.0.mlp.up_proj.weight"
    u, _, vh = torch.linalg.svd(base[name])
    moved = (session.params[name] - base[name]).detach()
    assert (u[:, :16].T @ moved @ vh[:16].T).norm() > 0.1 * moved.norm()


@pytest.mark.parametrize("frac", [0.25, 0.5, 1.0])
def test_preserved_rank(tiny_model, start, frac):
    state = start([OrthogonalSubspace(rank_frac=frac)], tiny_model()).state["OrthogonalSubspace"]
    # k_proj is (16, 32): k = frac * 16;   q_proj is (32, 32): k = frac * 32
    assert state["U/model.layers.0.self_attn.k_proj.weight"].shape == (16, int(16 * frac))
    assert state["V/model.layers.0.self_attn.k_proj.weight"].shape == (int(16 * frac), 32)
    assert state["U/model.layers.0.self_attn.q_proj.weight"].shape == (32, int(32 * frac))


def test_everything_preserved_blocks_every_step(tiny_model, start):
    method = OrthogonalSubspace(rank_frac=1.0)
    state = start([method], tiny_model()).state["OrthogonalSubspace"]
    name = "model.layers.0.self_attn.q_proj.weight"
    step = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    assert method.update(name, step, step, state).abs().max() < 1e-5


def test_only_block_matrices_are_touched(tiny_model):
    named = dict(tiny_model(tied=False).named_parameters())
    touched = {n for n, p in named.items() if OrthogonalSubspace().touches(n, p)}
    assert len(touched) == 14
    assert all(".layers." in n and named[n].ndim == 2 for n in touched)


@pytest.mark.parametrize("wrong", [{"rank_frac": 1.5}, {"rank_frac": -0.1}, {"mode": "diagonal"}])
def test_values_that_make_no_sense(tiny_model, tokenizer, wrong):
    with pytest.raises(PlanError, match="OrthogonalSubspace"):
        OrthogonalSubspace(**wrong).check(Context(tiny_model(), tokenizer))
