"""GS-LoRA: the group lasso and the bound by hand, and blocks that become exactly 0."""

import json

import pytest
import torch

from cases import GENERAL, run
from holdfast import methods as hf
from holdfast.engine.counts import count_rows
from holdfast.engine.pack import pack, token_row
from holdfast.errors import PlanError
from holdfast.method import Past
from holdfast.methods.adapt.gs_lora import means, norms
from holdfast.plan import Plan
from holdfast.services import Context, View

A, B = "model.layers.0.mlp.up_proj.lora_A.default.weight", "model.layers.0.mlp.up_proj.lora_B.default.weight"
C = "model.layers.1.mlp.up_proj.lora_A.default.weight"


def params():
    """Block 0: (3, 0) and 4, so its norm is 5; block 1: zeros."""
    values = {A: [[3.0, 0.0]], B: [[4.0]], C: [[0.0, 0.0]]}
    return {n: torch.tensor(v, requires_grad=True) for n, v in values.items()}


def test_group_lasso_by_hand():
    """weight 2: 2 (5 + 0) = 10; its gradient is 2 g / ||g||: of length 2, but for a block of zeros."""
    own = params()
    term, *_ = hf.GSLoRA(weight=2.0).loss(view(own))
    grads = torch.autograd.grad(term.value, [own[A], own[B], own[C]])
    assert term.owner is None and term.value.item() == pytest.approx(10, rel=1e-5)
    torch.testing.assert_close(grads[0], torch.tensor([[1.2, 0.0]]))
    torch.testing.assert_close(grads[1], torch.tensor([[1.6]]))
    assert not grads[2].any()


def view(own, rows=(), logits=None):
    packed = pack([token_row([5, 6], 1), *rows])
    logits = torch.zeros(len(packed.target), 9) if logits is None else logits
    counts = count_rows(packed.rows)
    return View(packed, logits, 0, None, {}, None, "GSLoRA", own, {}, {}, counts=counts)


def test_unlearning_by_hand():
    """Logits of 0 over 9 tokens: every loss is ln 9 = 2.197. bound 3, weight 2: 2 (3 - 2.197) for each row."""
    rows = [token_row([5, 6, 7], 1, "GSLoRA"), token_row([5, 8], 1, "GSLoRA")]
    logits = torch.zeros(4, 9, requires_grad=True)
    _, term = hf.GSLoRA(forget_weight=2.0, bound=3.0).loss(view(params(), rows, logits))
    assert (term.owner, term.per) == ("GSLoRA", "row")
    torch.testing.assert_close(term.value, torch.full((2,), 2 * (3 - torch.tensor(9.0).log().item())))
    (grad,) = torch.autograd.grad(term.value.sum(), [logits])
    # d log p(target) / d logit of the target is 1 - 1 / 9; the first row is a mean of two
    assert grad[1, 6].item() == pytest.approx(2 * (8 / 9) / 2) and grad[3, 8].item() == pytest.approx(2 * 8 / 9)
    assert not grad[0].any()


def test_a_row_beyond_the_bound_pushes_no_further():
    logits = torch.zeros(2, 9, requires_grad=True)
    _, term = hf.GSLoRA(bound=2.0).loss(view(params(), [token_row([5, 6], 1, "GSLoRA")], logits))
    (grad,) = torch.autograd.grad(term.value.sum(), [logits])
    assert term.value.item() == 0 and not grad.any()


def test_means_by_hand():
    assert means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])).tolist() == [2.0, 5.0]


def test_the_proximal_step_by_hand():
    """Norm 5, lr 0.5, weight 2: factor 1 - 1 / 5 = 0.8. (3 - 1) * 0.8 = 1.6, so the step is 1.6 - 3 = -1.4."""
    method, own = hf.GSLoRA(weight=2.0, proximal=True), {n: p.detach() for n, p in params().items()}
    assert method.loss(view(own)) == ()
    state = method.steer(Past(0, 4, {}, 0.5, params=own), {}).state
    assert state["factor/0"].item() == pytest.approx(0.8) and state["factor/1"].item() == 0
    step = method.update(A, torch.tensor([[-1.0, 0.0]]), own[A], state)
    torch.testing.assert_close(step, torch.tensor([[-1.4, 0.0]]))
    gone = method.update(C, torch.tensor([[7.0, 0.1]]), own[C], state)
    assert not (own[C] + gone).any()


def test_proximal_blocks_become_exactly_zero_and_a_lasso_in_the_loss_does_not(tiny_model, tokenizer, rows):
    """A of rank 2 has some 8 * 2 / 3 in squares: a pull of 0.5 a step takes it away within eight steps."""
    how = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0.0}
    exact, soft = (
        run([hf.GSLoRA(r=2, weight=500.0, proximal=p)], tiny_model(), tokenizer, rows, 8, **how).weights
        for p in (True, False)
    )
    own = [n for n in exact if ".lora_" in n]
    assert len(own) == 12 and not any(exact[n].any() for n in own)
    assert all(soft[n].any() for n in own)


def test_without_files_there_are_no_rows(tokenizer, tiny_model):
    ctx = Context(tiny_model(), tokenizer)
    assert hf.GSLoRA().asides(ctx) == () and len(hf.GSLoRA(forget=(GENERAL,)).asides(ctx)) > 20
    assert hf.GSLoRA(rows_per_step=2).asides_at(3, 5, 10) == [1, 2]


def test_rows_that_lose_their_answer_are_told(tmp_path, tokenizer, tiny_model):
    """Prompts of 1 and of 60 letters; the first 8 tokens hold the answer of the short one alone."""
    path = tmp_path / "forget.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "a" * n, "completion": " b"}) for n in (1, 60)))
    ctx = Context(tiny_model(), tokenizer)
    assert len(hf.GSLoRA(forget=(str(path),), max_tokens=8).asides(ctx)) == 1
    assert ctx.notes == ["GSLoRA does not unlearn 1 of 2 rows: their answers begin behind 8 tokens"]
    with pytest.raises(PlanError, match="none of its 2 rows"):
        hf.GSLoRA(forget=(str(path),), max_tokens=1).asides(ctx)


def test_a_block_of_zeros_stays_one_under_a_small_pull():
    """lr * weight = 1e-8, below the 1e-6 that stands for the norm of zeros."""
    method, own = hf.GSLoRA(weight=1.0, proximal=True), {n: p.detach() for n, p in params().items()}
    state = method.steer(Past(0, 4, {}, 1e-8, params=own), {}).state
    assert state["factor/1"].item() == 0 and state["factor/0"].item() == pytest.approx(1)


def test_sites():
    assert {"steer", "update"} <= {*hf.GSLoRA(proximal=True).sites()}
    assert not {"steer", "update"} & {*hf.GSLoRA().sites()}


def test_norms_are_by_block():
    assert {b: round(n.item(), 4) for b, n in norms(params()).items()} == {0: 5.0, 1: 0.0}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"r": 0}, "r is 0"),
        ({"weight": -1.0}, "not negative"),
        ({"bound": -1.0}, "not negative"),
        ({"rows_per_step": 0}, "at least 1"),
    ],
)
def test_values_without_meaning_are_refused(settings, words, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=words):
        hf.GSLoRA(**settings).check(Context(tiny_model(), tokenizer))


def test_it_is_the_plans_adapter():
    with pytest.raises(PlanError, match=r"GSLoRA and LoRA both want to wrap|LoRA and GSLoRA both want to wrap"):
        Plan([hf.GSLoRA(), hf.LoRA()]).check_together()
