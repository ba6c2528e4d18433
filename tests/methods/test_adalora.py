"""AdaLoRA: importance, scores and budget by hand and against PEFT's; the ranks that are left are as many as said."""

import pytest
import torch

from cases import run
from holdfast.engine.forward import forward
from holdfast.errors import PlanError
from holdfast.method import Past, canonical
from holdfast.methods import AdaLoRA, L2ToInit, WiSEFT
from holdfast.plan import Plan
from holdfast.services import Context
from holdfast.sites.steering import Steering

SMALL = {"r": 4, "target_r": 2, "lora_alpha": 8}


def test_budget_by_hand():
    """Two maps of 12, 8 a map at the end, 10 steps, 2 to begin, 3 to end: from step 2 to 7 there are 5.
    Step 4: 8 + 4 (1 - 2/5)^3 = 8.864 a map, 17 of both; at step 7 16."""
    method = AdaLoRA(r=12, target_r=8, tinit=0.2, tfinal=0.3)
    assert [method.budget(t, 10, 2) for t in range(1, 11)] == [None, None, 20, 17, 16, 16, 16, 16, 16, 16]
    rare = AdaLoRA(r=12, target_r=8, tinit=0.2, tfinal=0.3, delta_t=3)
    assert [rare.budget(t, 10, 2) for t in range(1, 8)] == [None, None, 20, None, None, 16, 16]


def test_importance_and_choice_by_hand():
    """One map of r = 2, betas 0.5. p * gradient: E (4, 2), A rows (0, 0), (8, 0), B columns 0. I' = half of it, U half
    of |I - I'|, so s = I/2 * I/4 = I^2 / 8: E (2, 0.5), A row 2: (8, 0) of mean 4. S = (2, 4.5): the second stays."""
    method = AdaLoRA(r=2, target_r=1, tinit=0.0, tfinal=0.0, beta1=0.5, beta2=0.5)
    steering = Steering([method], {"AdaLoRA": {}})
    state = steering.state["AdaLoRA"]
    e, a, b = torch.tensor([[2.0], [1.0]]), torch.tensor([[0.0, 0.0], [4.0, 1.0]]), torch.zeros(3, 2)
    params = {"m.lora_E.default": e, "m.lora_A.default": a, "m.lora_B.default": b}
    grads = {
        "m.lora_E.default": torch.tensor([[2.0], [-2.0]]),
        "m.lora_A.default": torch.tensor([[5.0, 5.0], [-2.0, 0.0]]),
    }
    steering.ask(Past(0, 1, {}, 1e-3, grads=grads, params=params))
    assert state["importance/m.lora_E.default"].tolist() == [[2.0], [1.0]]
    assert state["unsure/m.lora_A.default"].tolist() == [[0.0, 0.0], [2.0, 0.0]]
    assert state["kept/m"].tolist() == [[False], [True]]
    step = torch.tensor([[0.5], [0.25]])
    assert (e + method.update("m.lora_E.default", step, e, state)).tolist() == [[0.0], [1.25]]


def test_a_masked_rank_comes_back():
    """E (0, 0.1), gradients (100, 0.01), lr 0.01: I = (1, 0.001), where |0 * 100| would be 0 for ever."""
    method = AdaLoRA(r=2, target_r=1, tinit=0.0, tfinal=0.0)
    steering = Steering([method], {"AdaLoRA": {}})
    state = steering.state["AdaLoRA"]
    e = torch.tensor([[0.0], [0.1]])
    params = {"m.lora_E.default": e, "m.lora_A.default": torch.ones(2, 2), "m.lora_B.default": torch.ones(2, 2)}
    grads = {"m.lora_E.default": torch.tensor([[100.0], [0.01]])}
    steering.ask(Past(0, 1, {}, 0.01, grads=grads, params=params))
    assert state["kept/m"].tolist() == [[True], [False]]
    torch.testing.assert_close(state["importance/m.lora_E.default"], torch.tensor([[0.15], [0.00015]]))


def test_the_same_ranks_as_peft(tiny_model, tokenizer):
    """Two steps of the same numbers through PEFT's own allocator."""
    model, method = tiny_model(), AdaLoRA(**SMALL, tinit=0.0, tfinal=0.0)
    wrapped = method.adapt(model, Context(model, tokenizer, total_steps=4), {})
    allocator, draw = wrapped.base_model.rankallocator, torch.Generator().manual_seed(0)
    steering = Steering([method], {"AdaLoRA": {}})
    params = {canonical(n): p for n, p in wrapped.named_parameters() if p.requires_grad}
    for step in range(2):
        for p in params.values():
            p.data.normal_(generator=draw)
            p.grad = torch.randn(p.shape, generator=draw)
        allocator.update_ipt(wrapped.base_model.model)
        grads, now = (
            {n: t.detach().clone() for n, t in ts.items()} for ts in ({n: p.grad for n, p in params.items()}, params)
        )
        steering.ask(Past(step, 4, {}, 1e-3, grads=grads, params=now))
    theirs = allocator.mask_to_budget(wrapped.base_model.model, method.budget(2, 4, 14))
    for name, kept in theirs.items():
        assert steering.state["AdaLoRA"][f"kept/{name.removesuffix('.lora_E.default')}"][:, 0].tolist() == kept


def test_penalty_by_hand(toy_view):
    """A = (1, 0), (0, 2): A A^T - I = diag(0, 3), norm 3; B = (1), (1): B^T B - 1 = 1. Half of the mean: 1."""
    found = {"A": torch.diag(torch.tensor([1.0, 2.0])), "B": torch.ones(2, 1), "E": torch.ones(1, 1)}
    params = {f"m.lora_{x}.default": torch.nn.Parameter(t) for x, t in found.items()}
    term = AdaLoRA().loss(toy_view(torch.zeros(1, 4), [2], params=params))
    assert term.owner is None and term.value.item() == pytest.approx(1.0)
    assert AdaLoRA(orth_reg_weight=0.0).loss(toy_view(torch.zeros(1, 4), [2], params=params)) is None


def test_the_start_is_the_base(tiny_model, start, token_rows):
    session = start([AdaLoRA(**SMALL)], tiny_model())
    assert {n.split(".")[-2] for n in session.params} == {"lora_A", "lora_B", "lora_E"}
    assert torch.equal(forward(session.model, token_rows)[1], forward(tiny_model(), token_rows)[1])


def test_all_ranks_may_stay(tiny_model, tokenizer, rows):
    """target_r = r, which PEFT's schedule refuses with an error from inside."""
    got = run([AdaLoRA(r=3, target_r=3)], tiny_model(), tokenizer, rows, 4)
    assert all(w.all() for n, w in got.weights.items() if ".lora_E." in n)


def test_masked_ranks_are_not_in_the_merged_weight(tiny_model, tokenizer, rows):
    got = run([AdaLoRA(**SMALL)], tiny_model(), tokenizer, rows, 8, learning_rate=1e-2)
    ranks = 0
    for name, e in got.weights.items():
        if name.endswith(".lora_E.default"):
            module = got.model.get_submodule(f"base_model.model.{name.removesuffix('.lora_E.default')}")
            ranks += int(torch.linalg.matrix_rank(module.get_delta_weight("default"), rtol=1e-5))
            assert (e != 0).sum() <= 4
    assert ranks == 2 * 14


def test_scaling_back_is_exact(tiny_model, tokenizer, rows):
    got = run([AdaLoRA(**SMALL), WiSEFT(alpha=0.0)], tiny_model(), tokenizer, rows, 3)
    assert all(not w.any() for n, w in got.weights.items() if ".lora_B." in n)
    with pytest.raises(PlanError, match="AdaLoRA and L2ToInit"):
        Plan([AdaLoRA(), L2ToInit()]).check_together()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"target_r": 13}, "target_r"),
        ({"tinit": 0.7}, "no time"),
        ({"beta1": 1.0}, "beta1"),
        ({"delta_t": 0}, "delta_t"),
    ],
)
def test_values_that_make_no_sense(wrong, words, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=words):
        AdaLoRA(**wrong).check(Context(tiny_model(), tokenizer))
