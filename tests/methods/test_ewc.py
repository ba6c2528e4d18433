"""EWC: the Fisher information of a model small enough to know it, the penalty, and adapters multiplied out."""

import pytest
import torch

from cases import token_rows
from holdfast.errors import PlanError
from holdfast.methods import EWC, L2ToInit, LoRA
from holdfast.methods.loss import ewc
from holdfast.methods.loss.ewc import squared_gradients
from holdfast.services import Context


def test_hand_value_and_gradient(toy_view):
    # theta = (1, 2), theta0 = (0, 4), F = (3, 0.5), alpha = 2: 3 * 1 + 0.5 * 4 = 5; gradient 2 * (3 * 1, 0.5 * -2)
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    base = {"w": torch.tensor([0.0, 4.0])}
    view = toy_view(torch.zeros(1, 3), [0], params={"w": p}, base_weights=base, model=torch.nn.Module())
    view.state = {"fisher/w": torch.tensor([3.0, 0.5])}
    term = EWC(alpha=2.0).loss(view)
    assert term.owner is None and term.value.item() == 5.0
    term.value.backward()
    assert p.grad.tolist() == [6.0, -2.0]


def test_squared_gradients_are_those_of_each_row_alone(tiny_model, tokenizer, rows):
    """Against autograd on the model's own forward, and not the square of a sum."""
    model, some = tiny_model(), token_rows(rows, tokenizer)[:2]
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    wanted = torch.zeros_like(weight)
    for row in some:
        ids = torch.as_tensor(row.ids)[None]
        logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        (g,) = torch.autograd.grad(logp[torch.as_tensor(row.scored)[1:]].sum(), [weight])
        wanted += g.square() / 2
    got = squared_gradients(model, {name: weight}, some, None)[name]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-7)
    assert weight.requires_grad and weight.grad is None


def test_tokens_drawn_from_the_model_give_the_fisher_information(tiny_model, tokenizer, rows):
    """For the head's row of token v it is p_v (1 - p_v) |h|^2; the text's own token puts nearly all on one row."""
    model, row = tiny_model(tied=False), token_rows(rows, tokenizer)[0]
    row = row.cut(int(row.scored.argmax()) + 1)  # one target
    ids = torch.as_tensor(row.ids)[None]
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        p, h = out.logits[0, -2].softmax(-1), out.hidden_states[-1][0, -2]
    exact = (p * (1 - p)) * h.square().sum()
    drawn, own = (
        squared_gradients(model, {"head": model.lm_head.weight}, [row] * n, seed)["head"].sum(1)
        for n, seed in ((150, 0), (1, None))
    )
    gold = int(row.ids[-1])
    assert drawn.sum() == pytest.approx(exact.sum().item(), rel=0.02)
    assert own[gold] > 0.9 * own.sum() and drawn[gold] < 0.1 * drawn.sum()
    assert (drawn[:200].sum() / drawn.sum()).item() == pytest.approx(
        (exact[:200].sum() / exact.sum()).item(), abs=0.15
    )


def moved(session):
    with torch.no_grad():
        for p in session.params.values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return session


def value(session, name, rows):
    return float(session.loss(session.model, rows, {"task": sum(r.num_scored for r in rows)}, 0)[1][name])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("wrap", [[], [LoRA(r=3)], [LoRA(r=3, target_modules=("embed_tokens", "q_proj"))]])
def test_a_fisher_of_1_is_l2(wrap, tiny_model, start, token_rows):
    session = moved(start([*wrap, EWC(alpha=2.0, rows=2), L2ToInit(alpha=2.0)], tiny_model()))
    for f in session.state["EWC"].values():
        f.fill_(1.0)
    assert value(session, "EWC", token_rows) == pytest.approx(value(session, "L2ToInit", token_rows), rel=1e-4)
    assert value(session, "EWC", token_rows) > 1e-3


def test_an_adapter_is_weighed_entry_by_entry(tiny_model, start, token_rows):
    session = moved(start([LoRA(r=3), EWC(alpha=2.0, rows=2)], tiny_model()))
    wanted = 0.0
    for name, module in session.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            f = session.state["EWC"][f"fisher/{name.removeprefix('base_model.model.')}.weight"]
            wanted += (f * module.get_delta_weight("default").square()).sum().item()
    assert value(session, "EWC", token_rows) == pytest.approx(wanted, rel=1e-4) and wanted > 1e-3


def test_the_mean_is_1_and_peaks_are_cut(tiny_model, tokenizer):
    ctx = Context(tiny_model(), tokenizer)
    free, cut = (EWC(rows=2, most=most).prepare(ctx) for most in (1e12, 5.0))
    entries = torch.cat([f.flatten() for f in free.values()])
    assert entries.mean() == pytest.approx(1.0, rel=1e-3) and entries.min() >= 0 and entries.max() > 5
    assert all(torch.equal(f.clamp(max=5.0), cut[n]) for n, f in free.items())


def test_the_fisher_takes_no_second_copy(tiny_model, tokenizer, monkeypatch):
    found, plain = {}, ewc.squared_gradients
    monkeypatch.setattr(ewc, "squared_gradients", lambda *a: found.update(plain(*a)) or found)
    state = EWC(rows=2).prepare(Context(tiny_model(), tokenizer))
    assert all(state[f"fisher/{n}"] is f for n, f in found.items())


@pytest.mark.parametrize("wrong", [{"alpha": -1.0}, {"labels": "gold"}, {"most": 0.5}, {"rows": 0}])
def test_values_without_meaning_are_refused(wrong, tiny_model, tokenizer):
    with pytest.raises(PlanError, match="EWC"):
        EWC(**wrong).check(Context(tiny_model(), tokenizer))
