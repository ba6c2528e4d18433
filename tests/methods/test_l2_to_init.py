"""L2ToInit: the penalty, its gradient, and the Gram formula for adapters."""

import pytest
import torch

from holdfast.errors import PlanError
from holdfast.methods import L2ToInit, LoRA
from holdfast.services import Context


def test_hand_value_and_gradient(toy_view):
    # theta = (1, 2), theta0 = (0, 4), alpha = 0.5: 0.5/2 * (1 + 4) = 1.25; gradient 0.5 * (1, -2) = (0.5, -1)
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    view = toy_view(
        torch.zeros(1, 3),
        [0],
        params={"w": p},
        base_weights={"w": torch.tensor([0.0, 4.0])},
        model=torch.nn.Module(),
    )
    term = L2ToInit(alpha=0.5).loss(view)
    assert term.owner is None  # counted once a step
    assert term.value.item() == 1.25
    term.value.backward()
    assert p.grad.tolist() == [0.5, -1.0]


def shifted(session, size=0.1):
    with torch.no_grad():
        for p in session.params.values():
            p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return session


def penalty(session, rows, step=0):
    owners = {"task": sum(r.num_scored for r in rows)}
    return session.loss(session.model, rows, owners, step)[1]["L2ToInit"]


def test_zero_with_zero_gradient_at_the_start(tiny_model, start, token_rows, gradients):
    for methods in ([], [LoRA(r=2)]):
        one = gradients(start([*methods, L2ToInit(alpha=100.0)], tiny_model()), token_rows)
        two = gradients(start(methods, tiny_model()), token_rows)
        assert one[0] == two[0]
        for name in two[1]:
            torch.testing.assert_close(one[1][name], two[1][name], atol=1e-7, rtol=0)


def test_dense_penalty_counts_tied_weights_once(tiny_model, start, token_rows):
    base = dict(tiny_model().named_parameters())
    session = shifted(start([L2ToInit(alpha=2.0)], tiny_model()))
    expected = sum((p - base[n]).square().sum() for n, p in session.model.named_parameters())
    assert penalty(session, token_rows) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    "extra", [{}, {"use_rslora": True}, {"lora_alpha": 0.5}, {"target_modules": ("embed_tokens", "q_proj")}]
)
def test_gram_formula_is_the_dense_norm(tiny_model, start, token_rows, extra):
    session = shifted(start([LoRA(r=3, **extra), L2ToInit(alpha=2.0)], tiny_model()))
    dense = 0.0
    for module in session.model.modules():
        if hasattr(module, "get_delta_weight") and "default" in module.scaling:
            dense += module.get_delta_weight("default").square().sum().item()  # ||s B A||^2, built by PEFT
    assert dense > 1e-3
    assert penalty(session, token_rows) == pytest.approx(dense, rel=1e-4)


def test_patterns_narrow_it(tiny_model, start, token_rows):
    base = dict(tiny_model().named_parameters())
    session = shifted(start([L2ToInit(alpha=2.0, patterns=(r"layers\.1\.mlp",))], tiny_model()))
    named = {n: p for n, p in session.model.named_parameters() if "layers.1.mlp" in n}
    assert len(named) == 3
    expected = sum((p - base[n]).square().sum() for n, p in named.items())
    assert penalty(session, token_rows) == pytest.approx(expected.item(), rel=1e-5)


def test_shares_of_micro_batches_add_up_to_one_penalty(tiny_model, start, token_rows):
    session = shifted(start([L2ToInit(alpha=2.0)], tiny_model()))
    counts = {"task": sum(r.num_scored for r in token_rows)}
    halves = [session.loss(session.model, token_rows[i::2], counts, 0, share=0.5)[1]["L2ToInit"] for i in (0, 1)]
    assert sum(halves).item() == pytest.approx(float(penalty(session, token_rows)), rel=1e-6)


def test_negative_pull_is_refused(tiny_model, tokenizer):
    with pytest.raises(PlanError, match=r"L2ToInit\.alpha"):
        L2ToInit(alpha=-1.0).check(Context(tiny_model(), tokenizer))
