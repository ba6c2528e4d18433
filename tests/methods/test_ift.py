"""IFT by hand: the sums of later losses, the weights, what is read, the loss and its gradient."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from holdfast.engine.forward import forward
from holdfast.engine.pack import pack, token_row
from holdfast.errors import PlanError
from holdfast.methods import IFT, SDFT
from holdfast.methods.batch.ift import BLOCK, discounted
from holdfast.plan import Plan
from holdfast.services import Context, Look


def test_sums_of_later_losses_by_hand():
    """Losses 1, 2, 4 at gamma 1/2: 1 + 2/2 + 4/4 = 3,  2 + 4/2 = 4,  4."""
    losses = torch.tensor([1.0, 2.0, 4.0])
    assert discounted(losses, 0.5).tolist() == [3.0, 4.0, 4.0]
    assert discounted(losses, 1.0).tolist() == [7.0, 6.0, 4.0] and discounted(losses, 0.0).tolist() == [1.0, 2.0, 4.0]


def test_sums_over_several_blocks_are_those_of_one_loop():
    losses = torch.rand(2 * BLOCK + 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted, after = [], 0.0
    for loss in reversed(losses.tolist()):
        after = loss + 0.95 * after
        wanted.insert(0, after)
    torch.testing.assert_close(discounted(losses, 0.95), torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("detach", [False, True])
def test_loss_and_gradient_by_hand(detach, toy_view):
    """Two tokens of probabilities 1/2 and 1/4: losses a = log 2 and b = 2 a. At gamma 1/2: S = (a + b / 2, b) = (2 a,
    2 a), so W = (1, 1) and the loss is the plain one, 3 a / 2. With gradient, W_1 = 2 S_1 / (S_1 + S_2), and the loss
    L = (W_1 a + W_2 b) / 2 has dL/da = (W_1 + (a - b) dW_1/da) / 2, where W_2 = 2 - W_1 and
    dW_1/da = 2 S_2 / (S_1 + S_2)^2 = 1 / (4 a), dW_1/db = 2 (S_2 / 2 - S_1) / (S_1 + S_2)^2 = -1 / (8 a):
    dL/da = (1 - 1/4) / 2 = 3/8 and dL/db = (1 + 1/8) / 2 = 9/16; detached both are 1/2."""
    logits = torch.tensor([[0.5, 0.5, 1e-9], [0.25, 0.375, 0.375]]).log().requires_grad_()
    view = toy_view(logits, [0, 0])
    method = IFT(gamma=0.5, detach=detach)
    losses = -view.token_logp
    weight, term = method.token_weight(view), method.loss(view)
    assert (weight is None) != detach and (term is None) == detach
    total = (losses * (1.0 if weight is None else weight)).mean() + (0 if term is None else term.value.mean())
    a = np.log(2)
    assert total.item() == pytest.approx(1.5 * a, rel=1e-5)
    grads = (-torch.autograd.grad(total, view.token_logp)[0]).tolist()
    assert grads == pytest.approx([0.5, 0.5] if detach else [3 / 8, 9 / 16], rel=1e-5)


def test_weights_of_a_row_average_one_and_rows_of_others_have_none(toy_view):
    """Rows of different sums: each averages 1 by itself; what a method brought beside the task weighs 1."""
    rows = [token_row([5, 6, 7, 8], 1), token_row([5, 6, 7], 1), token_row([5, 6, 7], 1, source="Replay")]
    view = replace(toy_view(torch.zeros(7, 9), [0] * 7), packed=pack(rows))
    weights = IFT(gamma=0.5).weights(view, torch.tensor([1.0, 2.0, 4.0, 10.0, 0.0, 3.0, 1.0]))
    assert weights[:3].tolist() == pytest.approx([9 / 11, 12 / 11, 12 / 11])
    assert weights[3:].tolist() == pytest.approx([2.0, 0.0, 1.0, 1.0])


def test_what_is_read_is_a_mixture_of_the_row_and_its_guesses(tiny_model, tokenizer):
    """5 6 | 7 8: guesses replace 7 and 8 in the second reading; the model reads 0.7 of one and 0.3 of the other."""
    model, row = tiny_model(), token_row([5, 6, 7, 8], 2)
    logits = forward(model, [row])[1]
    look = Look(Context(model, tokenizer), {}, lambda rows: forward(model, rows))
    (made,) = IFT(lam=0.3).batch([row], 0, look)
    guesses = logits.argmax(-1).tolist()
    assert made.blend.tolist() == [5, 6, *guesses] and made.ids.tolist() == [5, 6, 7, 8] and made.key == row.key
    table = model.get_input_embeddings()
    mixed = 0.7 * table(torch.tensor([5, 6, 7, 8])) + 0.3 * table(torch.tensor([5, 6, *guesses]))
    with torch.no_grad():
        wanted = model(inputs_embeds=mixed[None]).logits[0, 1:3]
        other = token_row([9, 10, 11], 1)
        packed, got = forward(model, [other, made])
        padded = forward(model, [other, made], packing=False)[1]
    assert packed.target.tolist() == [10, 11, 7, 8]
    torch.testing.assert_close(got[2:], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded, got, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[:2], forward(model, [other])[1], rtol=1e-4, atol=1e-5)


def test_a_cut_row_keeps_its_second_reading():
    row = IFT(lam=0.5).blended(token_row([5, 6, 7, 8], 2), np.array([1, 2]))
    assert row.cut(3).blend.tolist() == [5, 6, 1] and row.cut(3).blend_share == 0.5


def test_weights_alone_read_the_row_as_it_is(tiny_model, tokenizer):
    look = Look(Context(tiny_model(), tokenizer), {}, lambda _rows: pytest.fail("nobody asks"))
    rows = [token_row([5, 6, 7], 2)]
    assert IFT(lam=0.0).batch(rows, 0, look) is rows
    assert IFT(lam=0.0, gamma=0.0).off() and not IFT(lam=0.0).off()


def test_an_answer_of_one_token_weighs_one(toy_view):
    assert IFT(gamma=0.9).weights(toy_view(torch.zeros(1, 9), [3]), torch.tensor([0.7])).tolist() == [1.0]
    assert IFT(gamma=0.9).weights(toy_view(torch.zeros(2, 9), [3, 3]), torch.zeros(2)).tolist() == [1.0, 1.0]


def test_another_reading_is_refused_by_name(tiny_model, tokenizer):
    class TwiceRead(LlamaForCausalLM):
        def forward(self, input_ids=None, inputs_embeds=None, **more):
            if input_ids is not None:
                inputs_embeds = 1.5 * self.get_input_embeddings()(input_ids).flip(-1)
            return super().forward(inputs_embeds=inputs_embeds, **more)

    model = tiny_model()
    model.__class__ = TwiceRead
    with pytest.raises(PlanError, match="IFT mixes embeddings of two tokens, which TwiceRead does not read"):
        IFT().check(Context(model, tokenizer))


@pytest.mark.parametrize("settings", [{"lam": 1.0}, {"lam": -0.1}, {"gamma": 1.5}])
def test_values_without_meaning_are_refused(settings, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=r"IFT\.lam is"):
        IFT(**settings).check(Context(tiny_model(), tokenizer))
    with pytest.raises(PlanError, match="IFT"):
        Plan([IFT(), SDFT()]).check_together()


def test_a_row_without_a_target_has_no_weights():
    """A trainer's idle rows are the task's and have none."""
    assert discounted(torch.zeros(0), 0.95).shape == (0,)
