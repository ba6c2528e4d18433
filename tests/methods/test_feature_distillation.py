"""FeatureDistillation: distances by hand, which states they are of, and that it holds them."""

import pytest
import torch

from cases import run
from holdfast.engine.forward import forward_states
from holdfast.errors import PlanError
from holdfast.methods import FeatureDistillation, LoRA, ProMoT
from holdfast.plan import Plan
from holdfast.services import Context


def test_distances_by_hand():
    # h - h0 = (1, -2): 5; |h0|^2 = 9 + 16 = 25: 0.2, or 5 / 2 dimensions = 2.5
    tuned, base = torch.tensor([[4.0, 2.0]], requires_grad=True), torch.tensor([[3.0, 4.0]])
    got = FeatureDistillation().apart(tuned, base)
    assert got.tolist() == pytest.approx([0.2])
    assert FeatureDistillation(relative=False).apart(tuned, base).tolist() == [2.5]
    got.sum().backward()
    assert tuned.grad.tolist() == [pytest.approx([2 / 25, -4 / 25])]  # 2 (h - h0) / 25


@pytest.mark.parametrize("wrap", [[], [LoRA(r=3)]])
@pytest.mark.parametrize("layers", [(-1,), (0, 1)])
def test_it_is_the_distance_of_the_two_models(layers, wrap, tiny_model, start, token_rows):
    session = start([*wrap, FeatureDistillation(weight=2.0, layers=layers)], tiny_model(), teacher_rows=token_rows)
    with torch.no_grad():
        for p in session.params.values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        base, tuned = (forward_states(m, token_rows, layers)[2] for m in (tiny_model(), session.model))
    wanted = sum(((tuned[n] - base[n]).square().sum(-1) / base[n].square().sum(-1)).mean() for n in layers)
    counts = {"task": sum(r.num_scored for r in token_rows)}
    got = session.loss(session.model, token_rows, counts, 0)[1]["FeatureDistillation"]
    assert float(got) == pytest.approx(2 * float(wanted), rel=1e-4) and float(got) > 1e-3


def test_on_replayed_text_the_task_does_not_count(tiny_model, tokenizer, rows):
    method = FeatureDistillation(on="replay", weight=3.0, max_tokens=16)
    got = run([method], tiny_model(), tokenizer, rows, 4)
    assert got.log.realised["FeatureDistillation/examples"] == 8
    assert got.log.loss[0][1]["FeatureDistillation"] == pytest.approx(0, abs=1e-9)
    assert got.log.loss[-1][1]["FeatureDistillation"] > 0


def test_refuses_a_prompt_the_base_lacks():
    with pytest.raises(PlanError, match="soft prompt"):
        Plan([ProMoT(), FeatureDistillation()]).check_together()
    Plan([ProMoT(), FeatureDistillation(on="replay")]).check_together()


@pytest.mark.parametrize("wrong", [{"on": "text"}, {"weight": -1.0}, {"layers": (2,)}, {"layers": ()}])
def test_values_without_meaning_are_refused(wrong, tiny_model, tokenizer):
    with pytest.raises(PlanError, match="FeatureDistillation"):
        FeatureDistillation(**wrong).check(Context(tiny_model(), tokenizer))
