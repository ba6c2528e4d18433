"""CPOPenalty: the price by hand, what is protected, and that it stays where it is."""

import pytest
import torch

from cases import run
from holdfast.errors import PlanError
from holdfast.methods import CPOPenalty, LoRA
from holdfast.methods.loss.cpo_penalty import largest
from holdfast.services import Context


def test_hand_value_and_gradient(toy_view):
    # moved by (0.5, -1, 0, 2), protected are 1, 2 and 3: 6 * (1 + 0 + 2) / 3 = 6; gradient 6 / 3 * sign, 0 at 0
    base = torch.tensor([[1.0, 8.0], [-9.0, 7.0]])
    p = torch.nn.Parameter(base + torch.tensor([[0.5, -1.0], [0.0, 2.0]]))
    view = toy_view(torch.zeros(1, 3), [0], params={"w": p}, base_weights={"w": base}, model=torch.nn.Module())
    view.state = {"protected/w": torch.tensor([[False, True], [True, True]])}
    term = CPOPenalty(weight=6.0).loss(view)
    assert term.owner is None and term.value.item() == 6.0
    term.value.backward()
    assert p.grad.tolist() == [[0.0, -2.0], [0.0, 2.0]]


def test_the_largest_entries_are_protected():
    weight = torch.tensor([[0.1, -5.0, 2.0], [4.0, 0.0, -3.0]])
    assert largest(weight, 0.5).tolist() == [[False, True, False], [True, False, True]]
    assert int(largest(weight, 0.01).sum()) == 1


def distances(result, base, share):
    """Mean movement of protected and of other entries of the blocks' matrices."""
    inside, outside = [], []
    for n, w in base.items():
        if w.ndim == 2 and "layers." in n:
            mask, far = largest(w, share), (result.weights[n] - w).abs()
            inside.append(far[mask])
            outside.append(far[~mask])
    return torch.cat(inside).mean().item(), torch.cat(outside).mean().item()


def test_protected_entries_hardly_move_and_the_rest_does(tiny_model, tokenizer, rows):
    base = {n: p.detach().clone() for n, p in tiny_model().named_parameters()}
    free, priced = (run(plan, tiny_model(), tokenizer, rows, 12) for plan in ([], [CPOPenalty(weight=1e5)]))
    (a, b), (c, d) = distances(free, base, 0.1), distances(priced, base, 0.1)
    assert c < 0.1 * a and d > 0.5 * b


def test_an_adapter_is_multiplied_out(tiny_model, start, token_rows):
    session = start([LoRA(r=3), CPOPenalty(weight=2.0)], tiny_model())
    with torch.no_grad():
        for p in session.params.values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    total, count = 0.0, 0
    for name, module in session.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            mask = session.state["CPOPenalty"][f"protected/{name.removeprefix('base_model.model.')}.weight"]
            total += module.get_delta_weight("default").abs()[mask].sum().item()
            count += int(mask.sum())
    counts = {"task": sum(r.num_scored for r in token_rows)}
    got = session.loss(session.model, token_rows, counts, 0)[1]["CPOPenalty"]
    assert float(got) == pytest.approx(2 * total / count, rel=1e-4) and total > 0.1


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"share": 0.0}, {"share": 1.5}])
def test_values_without_meaning_are_refused(wrong, tiny_model, tokenizer):
    with pytest.raises(PlanError, match="CPOPenalty"):
        CPOPenalty(**wrong).check(Context(tiny_model(), tokenizer))
