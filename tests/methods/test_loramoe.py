"""LoRAMoE: experts and balance by hand, and what the balance is 0 for."""

import pytest
import torch
from torch import nn

import zoo
from cases import GENERAL, run
from cases import token_rows as tokenized
from holdfast import methods as hf
from holdfast.engine.counts import count_rows
from holdfast.engine.forward import forward, forward_states
from holdfast.engine.pack import pack, token_row
from holdfast.engine.replaced import collecting, replaced_in
from holdfast.errors import PlanError
from holdfast.hosts.hf_mix import mixed
from holdfast.methods.adapt.loramoe import Experts, imbalance
from holdfast.services import Context, View


def experts(**settings):
    """W = I of width 2, two experts of rank 1: A = ((1, 0), (0, 1)), B = ((1, 0), (0, 1)), no router's preference."""
    original = nn.Linear(2, 2, bias=False)
    made = Experts(original, hf.LoRAMoE(r=1, lora_alpha=3, experts=2, lora_dropout=0.0, **settings))
    with torch.no_grad():
        for p in (original.weight, made.a, made.b):
            p.copy_(torch.eye(2))
        made.router.weight.zero_()
    return made


X = torch.tensor([[[1.0, 2.0]]])


def test_experts_by_hand():
    """G x = (ln 3 * 1, 0): w = (3, 1) / 4. B_1 A_1 x = (1, 0), B_2 A_2 x = (0, 2); alpha / r = 3:
    y = (1, 2) + 3 (0.75 * 1, 0.25 * 2) = (3.25, 3.5)."""
    made = experts()
    torch.testing.assert_close(made(X), torch.tensor([[[2.5, 5.0]]]))  # w = 1 / 2
    with torch.no_grad():
        made.router.weight[0, 0] = torch.tensor(3.0).log()
    with collecting() as handed:
        y = made(X)
    torch.testing.assert_close(y, torch.tensor([[[3.25, 3.5]]]))
    torch.testing.assert_close(handed["routed"][0], torch.tensor([[[0.75, 0.25]]]))


def test_imbalance_by_hand():
    """Row 0 (knowledge), two positions: Q = (1.5, 0.5), delta 0.5: Z = (2.25, 0.25), mean 1.25, var 1: 1 / 1.5625.

    Row 1 (task), one position: Q = (0.75, 0.25), Z = (0.375, 0.375): balanced.
    """
    routed = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.75, 0.25]], requires_grad=True)
    value = imbalance(routed, torch.tensor([0, 0, 1]), torch.tensor([True, False]), 0.5)
    torch.testing.assert_close(value, torch.tensor([0.64, 0.0]))
    (grad,) = torch.autograd.grad(value.sum(), [routed])
    # Z_1 = 1.5 Q_1 and Z_2 = 0.5 Q_2: value = ((Z_1 - Z_2) / (Z_1 + Z_2))^2 = 0.8^2, and its slope in Z_1 is
    # 2 * 0.8 * 2 Z_2 / (Z_1 + Z_2)^2 = 1.6 * 0.5 / 6.25 = 0.128, in Z_2 -1.6 * 4.5 / 6.25 = -1.152
    torch.testing.assert_close(grad[0], torch.tensor([1.5 * 0.128, -0.5 * 1.152]))
    assert grad[2].abs().max() < 1e-6


@pytest.mark.parametrize("delta", [0.0, 0.1, 0.5])
def test_balanced_means_the_other_half_weighs_more(delta):
    """At 0 the experts of the row's kind weigh (1 - delta) / (1 + delta) of the others: the names only change."""
    share = torch.tensor([1 - delta, 1 - delta, 1 + delta, 1 + delta]) / 4
    for kind, routed in ((True, share), (False, share.flip(0))):
        value = imbalance(routed[None], torch.tensor([0]), torch.tensor([kind]), delta)
        torch.testing.assert_close(value, torch.zeros(1))
    if delta:
        assert imbalance(share[None], torch.tensor([0]), torch.tensor([False]), delta) > 0.01


def test_experts_within_a_half_are_alike():
    draw = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    of, kinds = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([True, False])
    torch.testing.assert_close(imbalance(draw[:, [1, 0, 3, 2]], of, kinds, 0.1), imbalance(draw, of, kinds, 0.1))
    assert not torch.allclose(imbalance(draw[:, [2, 1, 0, 3]], of, kinds, 0.1), imbalance(draw, of, kinds, 0.1))


def test_the_term_is_a_mean_over_rows_and_layers():
    """Two layers; a row of Replay and one of the task, of 1 and 2 scored positions."""
    rows = [token_row([5, 6], 1, source="Replay:text"), token_row([5, 6, 7], 1)]
    packed = pack(rows)
    tokens = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.75, 0.25], [0.75, 0.25], [0.5, 0.5]])  # read at 0, 2 and 3
    handed = {"routed": [tokens, torch.full((5, 2), 0.5)]}
    view = View(packed, torch.zeros(3, 9), 0, None, {}, None, "LoRAMoE", {}, {}, {}, handed=handed)
    term = hf.LoRAMoE(weight=2.0, delta=0.5).loss(view)
    # layer 1: 0.64 and 0; layer 2: Z = (0.75, 0.25) and (0.25, 0.75) for each position: (0.5 / 1)^2 = 0.25 both
    assert (term.owner, term.per) == ("task", "row")
    torch.testing.assert_close(term.value, 2.0 * torch.tensor([(0.64 + 0.25) / 2, 0.25 / 2]))


def test_kinds_of_rows():
    texts, own, one = (token_row([5, 6], 1, source=s) for s in ("Replay:text", "task", "task:a"))
    assert [hf.LoRAMoE().is_knowledge(r) for r in (texts, own, one)] == [True, False, False]
    assert [hf.LoRAMoE(knowledge=("task:a",)).is_knowledge(r) for r in (texts, own, one)] == [False, False, True]
    assert hf.LoRAMoE(knowledge=("Replay",)).is_knowledge(texts)


def test_step_0_is_the_base_and_the_count_is_as_said(tiny_model, start, token_rows):
    """32 by 64, N = 4, r = 2: 8 (32 + 64) and a router of 4 * 32, for down of 4 * 64; three maps in 2 layers."""
    base = forward(tiny_model(), token_rows)[1]
    session = start([hf.LoRAMoE(r=2, experts=4)], tiny_model())
    assert torch.equal(forward(session.model.eval(), token_rows)[1], base)
    assert {n.rsplit(".", 1)[-1] for n in replaced_in(session.model)} == {"gate_proj", "up_proj", "down_proj"}
    assert sum(p.numel() for p in session.params.values()) == 2 * (3 * 768 + 2 * 128 + 256)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["opt", "qwen2_moe"])
def test_maps_that_are_given_tokens_end_to_end(kind, packing, start, token_rows):
    """The router's weights at a token are those that the row has alone."""
    session = start([hf.LoRAMoE(r=2, experts=4)], zoo.build(kind).eval())
    model = session.model.eval()
    with torch.no_grad():
        packed, _, _, together = forward_states(model, token_rows, (), packing=packing)
        alone = [forward_states(model, [r], (), packing=packing)[3]["routed"] for r in token_rows]
    assert len(packed.rows) == 4 and len(together["routed"]) == len(replaced_in(model))
    for n, got in enumerate(together["routed"]):
        torch.testing.assert_close(got, torch.cat([a[n] for a in alone]), rtol=1e-3, atol=1e-4)


def test_lists_of_experts_are_refused(tiny_model, tokenizer):
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp = nn.ModuleDict({"experts": nn.ModuleList([layer.mlp])})
    with pytest.raises(PlanError, match=r"mlp\.experts\.0\.gate_proj is of one expert"):
        hf.LoRAMoE().check(Context(model, tokenizer))


def test_the_balance_falls(tiny_model, tokenizer, rows):
    plan = [hf.LoRAMoE(r=2, experts=4, weight=5.0), hf.Replay(share=0.5, sources=(GENERAL,), max_tokens=32)]
    losses = [p["LoRAMoE"] for _, p in run(plan, tiny_model(), tokenizer, rows, 12, learning_rate=5e-3).log.loss]
    assert losses[-1] < 0.5 * losses[0]


def test_a_row_counts_once_however_a_step_is_cut(tiny_model, start, token_rows):
    session = start([hf.LoRAMoE(r=2, experts=4, lora_dropout=0.0)], tiny_model())
    counts = count_rows(token_rows)
    whole = session.loss(session.model, token_rows, counts, 0)[1]["LoRAMoE"]
    parts = [session.loss(session.model, [r], counts, 0)[1]["LoRAMoE"] for r in token_rows]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"r": 0}, "r is 0"),
        ({"experts": 3}, "experts is 3"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"weight": -1.0}, "weight is -1.0"),
        ({"delta": 1.0}, "delta is 1.0"),
    ],
)
def test_values_without_meaning_are_refused(settings, words, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=words):
        hf.LoRAMoE(**settings).check(Context(tiny_model(), tokenizer))


@pytest.mark.parametrize(
    "names, wrong",
    [(("Replai",), "Replai"), (("task", "Replay:text"), "Replay:text"), (("Replay:instruction",), "Rep")],
)
def test_a_source_that_nobody_brings_is_refused_by_name(names, wrong, tiny_model, tokenizer, rows):
    plan = [hf.LoRAMoE(r=2, experts=4, knowledge=names), hf.Replay(share=0.5, sources=(GENERAL,), max_tokens=32)]
    with pytest.raises(PlanError, match=f"LoRAMoE.knowledge names '{wrong}.*task, Replay:instructions") as e:
        run(plan, tiny_model(), tokenizer, rows, 1)
    assert "Did you mean" in e.value.cure or "Known" in e.value.cure


@pytest.mark.parametrize("names", [("Replay",), ("Replay:instructions", "task")])
def test_sources_are_known_by_their_method_and_their_file(names, tiny_model, tokenizer, rows, start):
    plan = [hf.LoRAMoE(r=2, experts=4, knowledge=names), hf.Replay(share=0.5, sources=(GENERAL,), max_tokens=32)]
    session = start(plan, tiny_model(), rows=rows, enter=False)
    mix = session.mix(tokenized(rows, tokenizer))
    assert [plan[0].is_knowledge(s.rows[0]) for s in mix.sources] == [True]


def test_a_trainer_whose_plan_mixes_nothing_refuses_it_too(tiny_model, start):
    from datasets import Dataset

    data = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]]})
    session = start([hf.LoRAMoE(r=2, experts=4, knowledge=("Replay",))], tiny_model(), enter=False)
    with pytest.raises(PlanError, match=r"LoRAMoE\.knowledge names 'Replay', and the sources of the mix are task"):
        mixed(session, data, None, None, "Trainer", {})
    assert (
        mixed(start([hf.LoRAMoE(knowledge=("task",))], tiny_model(), enter=False), data, None, None, "Trainer", {})
        == {}
    )


def test_rows_of_one_kind_are_told(tiny_model, tokenizer, rows):
    """The term that shares experts out by kind knows one kind then."""
    mixed = [hf.LoRAMoE(), hf.Replay(share=0.5, sources=(GENERAL,), max_tokens=32)]
    for plan, told in (([hf.LoRAMoE()], True), ([hf.LoRAMoE(weight=0.0)], False), (mixed, False)):
        notes = run(plan, tiny_model(), tokenizer, rows, 4).session.ctx.notes
        assert any("LoRAMoE shares experts out" in n for n in notes) == told
