"""O-LoRA: the penalty by hand; in hard mode nothing that earlier adapters read goes through the new one."""

import pytest
import torch

from cases import run, same
from holdfast.errors import PlanError
from holdfast.methods import LoRA, OrthogonalLoRA
from holdfast.methods.adapt._adapter import layers
from holdfast.methods.adapt.orthogonal_lora import basis, outside
from holdfast.models import load, save_model
from holdfast.services import Context

NAME = "layers.0.q_proj"


def test_penalty_and_gradient_by_hand(toy_view):
    """A_prev = (1, 0, 2), (0, 1, 0); A = (3, -4, 1): products 5 and -4, so 0.5 (5 + 4) = 4.5.
    d/dA = 0.5 (1 * (1, 0, 2) - (0, 1, 0)) = (0.5, -0.5, 1)."""
    p = torch.nn.Parameter(torch.tensor([[3.0, -4.0, 1.0]]))
    other = torch.nn.Parameter(torch.ones(3, 1))
    view = toy_view(torch.zeros(1, 4), [2], params={f"{NAME}.lora_A.default.weight": p, f"{NAME}.lora_B.x": other})
    view.state[f"A/{NAME}"] = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    term = OrthogonalLoRA(principal=1).loss(view)
    assert term.owner is None and term.value.item() == 4.5
    term.value.backward()
    assert p.grad.tolist() == [[0.5, -0.5, 1.0]] and other.grad is None
    assert OrthogonalLoRA(principal=1, hard=True).loss(view) is None


def test_projection_by_hand():
    """Q = (0.6, 0.8, 0): of (1, 2, 3) it holds 2.2, so 2.2 Q = (1.32, 1.76, 0) goes. The rows (3, 4, 0) and (6, 8, 0)
    have rank 1."""
    q = basis(torch.tensor([[3.0, 4.0, 0.0], [6.0, 8.0, 0.0]]))
    torch.testing.assert_close(q.abs(), torch.tensor([[0.6, 0.8, 0.0]]))
    torch.testing.assert_close(outside(torch.tensor([[1.0, 2.0, 3.0]]), q), torch.tensor([[-0.32, 0.24, 3.0]]))


@pytest.fixture(scope="module")
def first(tiny_model, tokenizer, rows, tmp_path_factory):
    """The folder of a first task's adapter and its A by map."""
    place = tmp_path_factory.mktemp("first")
    base, _ = load(str(save_model(tiny_model(), tokenizer, place / "base", card=None)), dtype="float32", device="cpu")
    got = run([LoRA(r=4)], base, tokenizer, rows, 4)
    folder = save_model(got.model, tokenizer, place / "model", card=None)
    return str(folder), {n: m.lora_A["default"].weight.detach().clone() for n, m in layers(got.model).items()}


def overlap(model, before):
    return max((before[n] @ m.lora_A["default"].weight.T).abs().max().item() for n, m in layers(model).items())


def test_hard_leaves_what_the_first_task_reads(first, tiny_model, tokenizer, rows):
    """After each of 12 steps of AdamW with weight decay; inputs of earlier directions go through as in the base."""
    folder, before = first
    plan = [OrthogonalLoRA(r=4, earlier=(folder,), hard=True)]
    seen = []
    settings = {
        "weight_decay": 0.1,
        "learning_rate": 1e-2,
        "watch": lambda s, _: seen.append(overlap(s.model, before)),
    }
    got = run(plan, tiny_model(), tokenizer, rows, 12, **settings)
    assert len(seen) == 12 and max(seen) < 1e-6
    for name, module in layers(got.model).items():
        delta = module.get_delta_weight("default")
        assert delta.norm() > 1e-3 and (delta @ before[name].T).norm() < 1e-5 * delta.norm(), name


def test_soft_overlaps_less_than_lora(first, tiny_model, tokenizer, rows):
    folder, before = first
    settings = {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    soft = run([OrthogonalLoRA(r=4, lora_alpha=8, earlier=(folder,))], tiny_model(), tokenizer, rows, 30, **settings)
    plain = run([LoRA(r=4, lora_alpha=8)], tiny_model(), tokenizer, rows, 30, **settings)
    assert overlap(soft.model, before) < 0.3 * overlap(plain.model, before)
    terms = [p["OrthogonalLoRA"] for _, p in soft.log.loss]
    assert terms[-1] < 0.2 * terms[0]


def test_a_weight_of_0_is_lora(first, tiny_model, tokenizer, rows):
    one = run([OrthogonalLoRA(r=4, earlier=first[:1], weight=0.0)], tiny_model(), tokenizer, rows, 3)
    same(one, run([LoRA(r=4, lora_alpha=16)], tiny_model(), tokenizer, rows, 3))


def test_principal_directions_of_the_base(tiny_model, start):
    """Three rows a map, the first right singular vectors; A begins outside of them."""
    model = tiny_model()
    session = start([OrthogonalLoRA(r=4, principal=3, hard=True)], model)
    for name, module in layers(session.model).items():
        values = torch.linalg.svdvals(module.base_layer.weight @ session.state["OrthogonalLoRA"][f"A/{name}"].T)
        torch.testing.assert_close(values, torch.linalg.svdvals(module.base_layer.weight)[:3])
    assert overlap(session.model, {n: session.state["OrthogonalLoRA"][f"A/{n}"] for n in layers(session.model)}) < 1e-6


def test_what_cannot_work(first, tiny_model, tokenizer, tmp_path):
    ctx = Context(tiny_model(), tokenizer)
    for method, words in (
        (OrthogonalLoRA(), "without earlier adapters it is LoRA"),
        (OrthogonalLoRA(earlier=(str(tmp_path),)), "no adapter_model.safetensors"),
        (OrthogonalLoRA(principal=1, weight=-1.0), "at least 0"),
        (OrthogonalLoRA(earlier=first[:1], target_modules=("lm_head",)), "no A of a map"),
    ):
        with pytest.raises(PlanError, match=words):
            method.check(ctx)
    with pytest.raises(PlanError, match="fill all of its 32 inputs"):
        OrthogonalLoRA(principal=32, hard=True, target_modules=("k_proj", "gate_proj")).prepare(ctx)
    wide = Context(tiny_model(), tokenizer)
    wide.model.model.layers[0].self_attn.q_proj = torch.nn.Linear(40, 32)
    with pytest.raises(PlanError, match="has 32 inputs, the map has 40"):
        OrthogonalLoRA(earlier=first[:1]).check(wide)
