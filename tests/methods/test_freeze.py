"""Freeze: frozen blocks stay the base's, and learning rates follow the formula."""

import pytest
import torch

from holdfast.errors import PlanError
from holdfast.method import layer_of
from holdfast.methods import Freeze
from holdfast.services import Context


def test_learning_rates_by_hand(tiny_model, start):
    # 2 blocks, decay 0.5, lr 0.8: block 2 of 2: 0.8; block 1: 0.4; embeddings 0.8 * 0.5^2 = 0.2; norm and head 0.8
    session = start([Freeze(layer_decay=0.5)], tiny_model(tied=False))
    rate = {id(p): g["lr"] for g in session.param_groups(0.8, 0.0) for p in g["params"]}
    expected = {"model.embed_tokens.weight": 0.2, "model.norm.weight": 0.8, "lm_head.weight": 0.8}
    for name, p in session.params.items():
        wanted = expected.get(name, {0: 0.4, 1: 0.8}.get(layer_of(name)))
        assert rate[id(p)] == pytest.approx(wanted), name


@pytest.mark.parametrize("layers", [2, 5])
def test_every_group_equals_the_formula(tiny_model, start, layers):
    session = start([Freeze(layer_decay=0.9)], tiny_model(tied=False, layers=layers))
    groups = session.param_groups(1e-3, 0.1)
    rates = {g["lr"] for g in groups}
    # block l of 1..L: lr * 0.9^(L - l); embeddings lr * 0.9^L; the last block shares lr with head and final norm
    assert rates == {1e-3 * 0.9 ** (layers - n) for n in range(1, layers + 1)} | {1e-3 * 0.9**layers}
    assert len({(g["lr"], g["weight_decay"]) for g in groups}) == len(groups)
    factors = [Freeze().lr_factor(f"model.layers.{n}.mlp.up_proj.weight", layers, {}) for n in range(layers)]
    assert factors == sorted(factors)
    assert factors[-1] == 1.0


@pytest.mark.parametrize("embeddings", [True, False])
def test_hidden_state_after_frozen_blocks_is_the_bases(tiny_model, start, token_rows, gradients, embeddings):
    base, session = tiny_model(tied=False, layers=3), None
    method = Freeze(layers=2, embeddings=embeddings)
    session = start([method], tiny_model(tied=False, layers=3))
    optimizer = torch.optim.AdamW(session.param_groups(1e-2, 0.1))
    for _ in range(3):
        gradients(session, token_rows)
        optimizer.step()
    ids = torch.arange(5, 25)[None]
    old, new = (m(input_ids=ids, output_hidden_states=True).hidden_states for m in (base, session.model))
    same = [torch.equal(a, b) for a, b in zip(old, new, strict=True)]
    assert same == ([True] * 3 if embeddings else [False] * 3) + [False]
    blocks = [p.equal(dict(base.named_parameters())[n]) for n, p in session.model.named_parameters()
              if layer_of(n) in (0, 1)]  # fmt: skip
    assert len(blocks) == 18
    assert all(blocks)


def test_frozen_embeddings_freeze_a_tied_head(tiny_model, start):
    session = start([Freeze(embeddings=True)], tiny_model(tied=True))
    assert not session.model.lm_head.weight.requires_grad
    loose = start([Freeze(embeddings=True)], tiny_model(tied=False))
    assert loose.model.lm_head.weight.requires_grad
    assert not loose.model.model.embed_tokens.weight.requires_grad


def test_patterns(tiny_model, start):
    session = start([Freeze(patterns=(r"mlp\.", r"norm"))], tiny_model())
    assert {n.split(".")[-2] for n in session.params} == {
        "embed_tokens",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }


def test_no_decay_and_nothing_frozen_is_off():
    assert Freeze(layer_decay=1).off()
    assert not Freeze(layer_decay=1, layers=1).off()
    assert Freeze(layer_decay=1).lr_factor("model.embed_tokens.weight", 4, {}) == 1.0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"layers": 3}, "the model has 2 blocks"),
        ({"patterns": ("nothing_like_this",)}, "matches no parameter"),
        ({"patterns": ("(",)}, "no regular expression"),
    ],
)
def test_what_cannot_work(tiny_model, tokenizer, wrong, words):
    with pytest.raises(PlanError, match=words):
        Freeze(**wrong).check(Context(tiny_model(), tokenizer))
