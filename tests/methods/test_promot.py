"""ProMoT: a soft prompt first, the model second, and the bare model for everything else."""

import pytest
import torch

from cases import run
from holdfast.engine.forward import forward
from holdfast.engine.pack import TokenRow, pack
from holdfast.engine.ways import SOFT_PROMPT
from holdfast.errors import PlanError
from holdfast.methods import ICLAnchor, InContextMix, LoRA, ProMoT
from holdfast.plan import Host, Plan
from holdfast.services import Context

SMALL = ProMoT(num_virtual_tokens=3)


def prompt_of(session):
    return session.ctx.model.get_parameter(SOFT_PROMPT)


def optimise(session, rows, gradients, steps=3):
    optimizer = torch.optim.AdamW(session.param_groups(1e-2, 0.1))
    for _ in range(steps):
        gradients(session, rows)
        optimizer.step()


def bare(model, rows):
    """Logits of the same rows read without the prompt (they belong to somebody else)."""
    return forward(model, [TokenRow(r.ids, r.scored, "other", "other") for r in rows])[1]


def test_two_stages_by_hand(tiny_model):
    prompt, model = ProMoT(prompt_share=0.25, prompt_learning_rate=0.3).stages()
    assert (prompt.trains, prompt.share, prompt.learning_rate, prompt.keep_best) == (
        "prompt",
        0.25,
        0.3,
        True,
    )
    assert (model.trains, model.share, model.learning_rate) == ("rest", 0.75, None)


def test_positions_shift_by_the_prompt_and_it_is_never_scored(token_rows):
    """Card: 5 virtual tokens before 16 give 21 positions; the targets are the row's own, all behind the prompt."""
    row = TokenRow(torch.arange(5, 21).numpy(), (torch.arange(16) >= 1).numpy())
    packed = pack([row], prompts=[5])
    assert packed.ids.shape == (1, 21)
    assert packed.positions[0].tolist() == list(range(21))
    assert packed.where.tolist() == list(range(5, 20))  # position 5 reads the first token and predicts the second
    assert packed.target.tolist() == list(range(6, 21))


def test_first_stage_trains_the_prompt_alone(tiny_model, start, token_rows, gradients):
    base = dict(tiny_model().named_parameters())
    session = start([SMALL], tiny_model())
    before = prompt_of(session).detach().clone()
    assert list(session.params) == [SOFT_PROMPT]
    assert session.param_groups(1e-3, 0.0)[0]["lr"] == SMALL.prompt_learning_rate
    logits = bare(session.model, token_rows)
    optimise(session, token_rows, gradients)
    assert not torch.equal(prompt_of(session), before)
    for name, p in session.model.named_parameters():
        assert name == SOFT_PROMPT or torch.equal(p, base[name])
    assert torch.equal(bare(session.model, token_rows), logits)  # without P it is the base, exactly
    assert torch.equal(logits, forward(tiny_model(), token_rows)[1])
    assert (forward(session.model, token_rows)[1] - logits).abs().max() > 1e-3  # with P it is not


@pytest.mark.parametrize("methods", [[SMALL], [LoRA(r=2), SMALL]])
def test_second_stage_trains_the_rest_and_keeps_the_prompt(tiny_model, start, token_rows, gradients, methods):
    session = start(methods, tiny_model())
    optimise(session, token_rows, gradients)
    frozen = prompt_of(session).detach().clone()
    base = forward(tiny_model(), token_rows)[1]
    session.enter(session.stages[1])
    assert torch.equal(bare(session.model, token_rows), base)
    assert SOFT_PROMPT not in session.params
    optimise(session, token_rows, gradients)
    assert torch.equal(session.ctx.model.get_parameter(SOFT_PROMPT), frozen)
    assert (bare(session.model, token_rows) - base).abs().max() > 1e-3
    assert torch.equal(SMALL.decode(session.model)["soft_prompt"], frozen)


def test_the_prompt_starts_from_ordinary_words(tiny_model, tokenizer):
    ctx = Context(tiny_model(), tokenizer)
    table = ctx.model.get_input_embeddings().weight
    init = ProMoT(num_virtual_tokens=7).prepare(ctx)["init"]
    ids = [int((table == row).all(1).nonzero()[0]) for row in init]
    assert len(set(ids)) == 7
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert torch.equal(ProMoT(num_virtual_tokens=7).prepare(ctx)["init"], init)
    assert not torch.equal(ProMoT(num_virtual_tokens=7, seed=1).prepare(ctx)["init"], init)


def test_asides_wait_for_the_second_stage_and_go_without_the_prompt(tiny_model, start, token_rows):
    session = start([ICLAnchor(pool=3, shots=(1, 1)), SMALL], tiny_model())
    assert session.rows_of(0) == []
    session.enter(session.stages[1])
    (aside,) = session.rows_of(0)
    packed, _ = forward(session.model, [token_rows[0], aside])
    assert packed.ids.shape[1] == 3 + len(token_rows[0].ids) + len(aside.ids)  # one prompt, before the task's row


def test_packing_hosts_are_refused(tiny_model, tokenizer):
    with pytest.raises(PlanError, match="ProMoT puts a soft prompt"):
        Plan([ProMoT()]).check(Host("trl", packing=True), Context(tiny_model(), tokenizer))


@pytest.mark.parametrize("wrong", [{"num_virtual_tokens": 0}, {"prompt_share": 0.0}, {"prompt_share": 1.0}])
def test_values_that_make_no_sense(tiny_model, tokenizer, wrong):
    with pytest.raises(PlanError, match="ProMoT"):
        ProMoT(**wrong).check(Context(tiny_model(), tokenizer))


def test_a_micro_batch_without_rows_of_the_task_is_no_error(tiny_model, tokenizer, rows):
    """Rows of other sources are read without the prompt, so that nothing of such a micro-batch has a gradient."""
    plan = [ProMoT(num_virtual_tokens=2), InContextMix(share=0.6, pool=8)]
    one, many = (
        run(plan, tiny_model(), tokenizer, rows, 4, batch_size=size, gradient_accumulation_steps=4 // size)
        for size in (4, 1)
    )
    torch.testing.assert_close(many.soft, one.soft, rtol=1e-3, atol=1e-4)
