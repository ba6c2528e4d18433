"""Soft prompts for phrasing: prompts said otherwise, the term by hand, a base that nothing reaches, and the probe."""

import pytest
import torch

from holdfast.data.phrasing import reworded, reworded_rows
from holdfast.data.rendered import Rendered
from holdfast.data.rows import Row
from holdfast.data.tokens import tokenize
from holdfast.engine.ways import SOFT_PROMPT
from holdfast.errors import DataError, PlanError
from holdfast.measure.phrasing import SEEN, Spread, spread
from holdfast.methods import LoRA, PhrasingPrompt, Replay
from holdfast.methods.stages.phrasing_prompt import SAID
from holdfast.plan import Plan
from holdfast.services import Context, Look

SMALL = PhrasingPrompt(num_virtual_tokens=3, phrasings=("Say which:",))


def test_prompts_are_said_otherwise():
    assert reworded("Sort: a b", "Sort:", "Put in order:") == "Put in order: a b"
    assert reworded("Sort: a b", "", "Please.") == "Please.\nSort: a b"
    assert reworded("a b", "Sort:", "Order:") is None and reworded(Rendered("<u>a"), "", "Please.") is None
    said = reworded(Rendered("<u>Sort: a"), "Sort:", "Order:")
    assert said == "<u>Order: a" and isinstance(said, Rendered)
    (row,) = reworded_rows([Row("Sort: a", " b"), Row("c", " d")], "Sort:", "Order:")
    assert (row.prompt, row.completion) == ("Order: a", " b")


@pytest.fixture
def looked(tiny_model, tokenizer, start, rows):
    """looked(method): (session with a prompt, drawn rows, the same rows as the method has them read)."""

    def go(method):
        model = tiny_model()
        session = start([method], model)
        drawn = [tokenize(r, tokenizer, 512) for r in rows[:4]]
        return session, drawn, session.pick(drawn, 0)

    return go


def test_answers_are_the_same_tokens_behind_other_words(looked, tokenizer, rows):
    _, drawn, made = looked(SMALL)
    for row, old, new in zip(rows, drawn, made, strict=False):
        assert tokenizer.decode(new.ids).replace("Say which:\n", "") == tokenizer.decode(old.ids)
        assert new.ids[new.scored].tolist() == old.ids[old.scored].tolist() and len(new.ids) > len(old.ids)
        assert new.of_task and row.prompt in tokenizer.decode(new.ids)


def test_loss_and_gradient_by_hand(looked, gradients, tiny_model):
    """Row by row by the model's own forward: CE + 2 KL(base on the row as it is || behind the prompt, other words)."""
    session, drawn, made = looked(PhrasingPrompt(num_virtual_tokens=3, phrasings=("Say which:",), weight=2.0))
    loss, grads = gradients(session, made)
    model, prompt = tiny_model(), session.state["PhrasingPrompt"]["init"].clone().requires_grad_()
    total = count = 0
    for old, new in zip(drawn, made, strict=True):
        aim = model(input_ids=torch.as_tensor(old.ids)[None]).logits[0].detach().log_softmax(-1)
        embedded = model.get_input_embeddings()(torch.as_tensor(new.ids))
        mine = model(inputs_embeds=torch.cat([prompt, embedded])[None]).logits[0].log_softmax(-1)
        before, after = (torch.as_tensor(r.scored).nonzero()[:, 0] - 1 for r in (old, new))
        aim, mine, ids = aim[before], mine[after + 3], torch.as_tensor(new.ids)[after + 1]
        total = total - mine.gather(1, ids[:, None]).sum() + 2 * (aim.exp() * (aim - mine)).sum()
        count += len(ids)
    (wanted,) = torch.autograd.grad(total / count, [prompt])
    assert loss == pytest.approx((total / count).item(), rel=1e-4)
    assert list(grads) == [SOFT_PROMPT]
    torch.testing.assert_close(grads[SOFT_PROMPT], wanted, rtol=1e-3, atol=1e-6)


def test_what_the_base_says_is_kept_for_one_step(looked, tokenizer):
    session, drawn, made = looked(SMALL)
    state = session.state["PhrasingPrompt"]
    assert {n for n in state if n.startswith(SAID)} == {SAID + r.key.hex() for r in made}
    session.pick(drawn[:1], 1)
    assert sum(n.startswith(SAID) for n in state) == 1
    assert not [n for n in looked(PhrasingPrompt(weight=0.0))[0].state["PhrasingPrompt"] if n.startswith(SAID)]


def test_rows_that_cannot_be_said_so_stay(tiny_model, tokenizer, rows):
    method = PhrasingPrompt(instruction="no such words", phrasings=("others",))
    drawn = [tokenize(r, tokenizer, 512) for r in rows[:2]]
    look = Look(Context(tiny_model(), tokenizer), {}, lambda _rows: pytest.fail("nobody asks"))
    assert method.batch(drawn, 0, look) is drawn
    with pytest.raises(PlanError, match="No row of the task can be said otherwise"):
        method.check(Context(tiny_model(), tokenizer, rows=rows))


def test_phrasings_are_drawn_anew(tiny_model, tokenizer, rows, start):
    session = start([PhrasingPrompt(num_virtual_tokens=2, weight=0.0)], tiny_model())
    (row,) = [tokenize(r, tokenizer, 512) for r in rows[:1]]
    said = {session.pick([row], step)[0].key for step in range(12)}
    assert 2 < len(said) <= 4


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"phrasings": ()}, "phrasings are missing"),
        ({"num_virtual_tokens": 0}, "at least 1"),
        ({"weight": -1.0}, "weight of 0 or more"),
        ({"learning_rate": -0.1}, "rate above 0"),
    ],
)
def test_values_without_meaning_are_refused(settings, words, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=words):
        PhrasingPrompt(**settings).check(Context(tiny_model(), tokenizer))
    for other in (LoRA(), Replay()):
        with pytest.raises(PlanError, match="PhrasingPrompt"):
            Plan([SMALL, other]).check_together()


# ---- the probe


def test_the_spread_by_hand():
    """Means 1, 1/2 and 0: mean 1/2, deviation sqrt(1/6), worst 0, and a drop of 1 - 1/4."""
    found = Spread({SEEN: [1.0, 1.0], "a": [1.0, 0.0], "b": [0.0, 0.0]})
    assert found.by == {SEEN: 1.0, "a": 0.5, "b": 0.0}
    assert (found.mean, found.worst, found.drop) == (0.5, 0.0, 0.75)
    assert found.deviation == pytest.approx((1 / 6) ** 0.5)


def test_the_spread_of_a_model(tiny_model, tokenizer, rows):
    labels = sorted({r.completion for r in rows})
    found = spread(tiny_model(), tokenizer, rows[:4], ("Say which:", "Please."), labels=labels)
    assert list(found.by) == [SEEN, "Say which:", "Please."] and all(len(x) == 4 for x in found.items.values())
    with pytest.raises(DataError, match="Not every row can be said as"):
        spread(tiny_model(), tokenizer, rows[:4], ("x",), instruction="no such words")
    with pytest.raises(DataError, match="no phrasings"):
        spread(tiny_model(), tokenizer, rows[:4], ())
