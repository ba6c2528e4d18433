"""OnPolicyKL: the divergence at the model's own answers, by both models' own forwards."""

import pytest
import torch

from cases import run, token_rows
from holdfast.engine.counts import count_rows
from holdfast.errors import PlanError
from holdfast.measure.answers import Sampling, respond, seed_of
from holdfast.methods import LoRA, OnPolicyKL, ProMoT
from holdfast.plan import Plan
from holdfast.services import Context


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("wrap", [[], [LoRA(r=3)]])
def test_the_term_by_the_models_own_forwards(wrap, direction, tiny_model, tokenizer, start, rows):
    method = OnPolicyKL(weight=2.0, direction=direction, max_new_tokens=5, prompts=3)
    session = start([*wrap, method], tiny_model())
    with torch.no_grad():
        for p in session.params.values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    task = token_rows(rows, tokenizer)[:4]
    kept, answered = session.roll(task, 7)
    assert kept == task and len(answered) == 3
    total = count = 0.0
    for row in task[:3]:
        ids = row.ids[~row.scored].tolist()
        sampling = Sampling(5, 1.0, 1.0, ("\n",))
        (said,) = respond(session.model, tokenizer, [(ids, 5)], [seed_of("0/OnPolicyKL/7", ids, 0)], sampling)
        with torch.no_grad():
            a, b = (
                m(torch.tensor([[*ids, *said]])).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
                for m in (session.model, tiny_model())
            )
        first, second = (a, b) if direction == "reverse" else (b, a)
        total += (first.exp() * (first - second)).sum().item()
        count += len(said)
    both = [*kept, *answered]
    got = float(session.loss(session.model, both, count_rows(both), 7)[1]["OnPolicyKL"])
    assert got == pytest.approx(2 * total / count, rel=1e-3) and got > 1e-3


def test_some_steps_answer_and_the_task_is_learnt_as_ever(tiny_model, tokenizer, rows):
    got = run([OnPolicyKL(every=2, prompts=1, max_new_tokens=3)], tiny_model(), tokenizer, rows, 4)
    assert got.log.realised["OnPolicyKL/examples"] == 2 and got.log.realised["task/examples"] == 16
    assert ["OnPolicyKL" in parts for _, parts in got.log.loss] == [True, False, True, False]


def test_refuses_a_prompt_the_base_lacks():
    with pytest.raises(PlanError, match="soft prompt"):
        Plan([ProMoT(), OnPolicyKL()]).check_together()


@pytest.mark.parametrize("wrong", [{"direction": "both"}, {"weight": -1.0}, {"every": 0}, {"temperature": -1.0}])
def test_values_without_meaning_are_refused(wrong, tiny_model, tokenizer):
    with pytest.raises(PlanError, match="OnPolicyKL"):
        OnPolicyKL(**wrong).check(Context(tiny_model(), tokenizer))
