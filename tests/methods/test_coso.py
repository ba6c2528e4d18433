"""CoSO: frequent directions and P by hand; nothing moves inside M, and little else than P at a time."""

import pytest
import torch

from cases import run, weights_of
from holdfast.engine.forward import forward
from holdfast.errors import PlanError
from holdfast.method import Past
from holdfast.methods import CoSO
from holdfast.methods.adapt._inputs import general_rows
from holdfast.methods.update.coso import appended, leading, singular
from holdfast.services import Context
from holdfast.sites.steering import Steering

NAME = "layers.0.w"
SMALL = {"rank": 2, "every": 3, "sketch": 6, "samples": 4, "max_tokens": 16, "rows_per_gradient": 2}


def test_frequent_directions_by_hand():
    """Sketch of 2: diag(3, 2, 1) has squares 9, 4, 1; lowered by 4: (5, 0). One more column 2 e2: of 5 e1 e1^T +
    4 e2 e2^T the squares are 5 and 4, lowered by 4 where a third column was dropped, and here none was: 0 + 5, 4."""
    s = appended(torch.zeros(3, 0), torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
    torch.testing.assert_close(s @ s.T, torch.diag(torch.tensor([5.0, 0.0, 0.0])))
    more = appended(s[:, :1], torch.tensor([[0.0], [2.0], [0.0]]), 2)
    torch.testing.assert_close(more @ more.T, torch.diag(torch.tensor([5.0, 4.0, 0.0])))


@pytest.mark.parametrize(("energy", "count"), [(0.5, 1), (0.9, 2), (0.95, 2), (0.96, 3), (1.0, 3)])
def test_directions_that_hold_enough(energy, count):
    """Squares 16, 3, 1 of 20: 0.8, 0.95, 1."""
    m = leading(torch.diag(torch.tensor([1.0, 3**0.5, 4.0])), energy)
    torch.testing.assert_close(m.abs(), torch.eye(3)[:, [2, 1, 0]][:, :count])


def test_large_matrices_give_the_same_directions():
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(300, 3, generator=draw) @ torch.randn(3, 400, generator=draw)
    u, s = singular(a, 3)
    exact = torch.linalg.svd(a, full_matrices=False)
    torch.testing.assert_close(s, exact.S[:3], rtol=1e-4, atol=0)
    torch.testing.assert_close(u @ u.T, exact.U[:, :3] @ exact.U[:, :3].T, rtol=0, atol=1e-3)


def test_p_by_hand():
    """M = e1; G = (5, 5), (3, 0), (0, 1): without M's row its left singular vectors are e2 (3) and e3 (1). With rank 1
    P = e2: of a gradient and of a step only that row is left. After `every` steps it is chosen anew: e3."""
    method = CoSO(rank=1, every=2)
    steering = Steering([method], {"CoSO": {f"M/{NAME}": torch.tensor([[1.0], [0.0], [0.0]])}})
    state = steering.state["CoSO"]

    def step(n, *grad):
        steering.ask(Past(n, 10, {}, 1e-3, grads={NAME: torch.tensor(grad)}))
        return method.grad(NAME, torch.ones(3, 2), state), method.update(
            NAME, torch.ones(3, 2), torch.zeros(3, 2), state
        )

    second, third = torch.zeros(3, 2), torch.zeros(3, 2)
    second[1], third[2] = 1, 1
    for n, grad, wanted in (
        (0, ((5.0, 5.0), (3.0, 0.0), (0.0, 1.0)), second),
        (1, ((0.0, 0.0), (0.0, 0.0), (0.0, 9.0)), second),
        (2, ((7.0, 0.0), (0.0, 0.0), (0.0, 9.0)), third),
    ):
        for got in step(n, *grad):
            torch.testing.assert_close(got, wanted)
    for got in step(4, (7.0, 1.0), (0.0, 0.0), (0.0, 0.0)):  # all of it lies in M: nothing moves
        assert got.abs().max() < 1e-6


def test_m_holds_the_gradients_of_general_text(tiny_model, tokenizer):
    """With room for all of them, M has 98 % of each matrix's squared gradients, and one direction fewer has not."""
    model = tiny_model()
    ctx = Context(model, tokenizer)
    method = CoSO(**{**SMALL, "sketch": 64})
    state = method.prepare(ctx)
    assert all(p.grad is None for p in model.parameters())
    rows = general_rows(ctx, "CoSO", method.sources, 4, 16)
    name = "model.layers.0.mlp.up_proj.weight"
    total = 0
    for part in (rows[:2], rows[2:]):
        packed, logits = forward(model, part)
        loss = torch.nn.functional.cross_entropy(logits, packed.target)
        (g,) = torch.autograd.grad(loss, [model.get_parameter(name)])
        total = total + g @ g.T
    m = state[f"M/{name}"]
    torch.testing.assert_close(m.T @ m, torch.eye(m.shape[1]), rtol=0, atol=1e-5)
    held = [(u := m[:, : m.shape[1] - n]).T @ total @ u for n in (0, 1)]
    assert held[0].trace() > 0.979 * total.trace() > held[1].trace() * 0.979 / 0.981


def test_nothing_moves_inside_m_under_adam(tiny_model, tokenizer, rows):
    """20 steps of AdamW with decay and clipping. Between two choices of P the change has its rank."""
    at = {}

    def watch(session, step):
        if step in (3, 6):
            at[step] = weights_of(session.model)

    settings = {"weight_decay": 0.1, "max_grad_norm": 1.0, "learning_rate": 2e-3, "watch": watch}
    got, base = run([CoSO(**SMALL)], tiny_model(), tokenizer, rows, 20, **settings), weights_of(tiny_model())
    free = run([], tiny_model(), tokenizer, rows, 20, **{**settings, "watch": None}).weights
    for key, m in got.session.state["CoSO"].items():
        if key.startswith("M/"):
            name = key[2:]
            moved, loose = got.weights[name] - base[name], free[name] - base[name]
            assert (m.T @ moved).norm() < 1e-5 * moved.norm() and moved.norm() > 1e-3, name
            assert (m.T @ loose).norm() > 0.1 * loose.norm(), name
            values = torch.linalg.svdvals(at[6][name] - at[3][name])
            assert values[2] < 1e-4 * values[0] < 1e-2 * values[1], name


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rank": 0}, "sizes"),
        ({"energy": 1.1}, "energy"),
        ({"patterns": ("no such",)}, "no such"),
        ({"sources": ()}, "sources"),
    ],
)
def test_values_that_make_no_sense(wrong, words, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=words):
        CoSO(**wrong).check(Context(tiny_model(), tokenizer))
