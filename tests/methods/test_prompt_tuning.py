"""Prompt tuning: the model behind vectors, by its own forward, and a base that nothing reaches."""

import pytest
import torch

from cases import run
from holdfast import methods as hf
from holdfast import models
from holdfast.engine.forward import forward
from holdfast.engine.pack import TokenRow
from holdfast.engine.ways import SOFT_PROMPT
from holdfast.errors import PlanError
from holdfast.measure.soft_prompt import save as save_prompt
from holdfast.plan import Host, Plan
from holdfast.services import Context

SMALL = hf.PromptTuning(num_virtual_tokens=3)


def test_loss_and_gradient_are_those_of_vectors_before_the_embeddings(tiny_model, start, token_rows, gradients):
    """Row by row by the model's own forward: model([P; E(x)]), and only P has a gradient."""
    model = tiny_model()
    session = start([SMALL], model)
    loss, grads = gradients(session, token_rows)
    prompt = session.state["PromptTuning"]["init"].clone().requires_grad_()
    total = count = 0
    for row in token_rows:
        ids = torch.as_tensor(row.ids)
        logits = model(inputs_embeds=torch.cat([prompt, model.get_input_embeddings()(ids)])[None]).logits[0]
        at = torch.as_tensor(row.scored).nonzero()[:, 0]
        total = total + torch.nn.functional.cross_entropy(logits[at + 2], ids[at], reduction="sum")
        count += len(at)
    (wanted,) = torch.autograd.grad(total / count, [prompt])
    assert loss == pytest.approx((total / count).item(), rel=1e-5)
    assert list(grads) == list(session.params) == [SOFT_PROMPT]
    torch.testing.assert_close(grads[SOFT_PROMPT], wanted, rtol=1e-4, atol=1e-6)


def test_rows_of_nobody_see_the_base(tiny_model, tokenizer, rows, token_rows):
    held = []

    def watch(session, step):
        if step == 4:
            bare = [TokenRow(r.ids, r.scored, "other", "other") for r in token_rows]
            held.append([forward(session.model.eval(), rs)[1] for rs in (bare, token_rows)])

    run([SMALL], tiny_model(), tokenizer, rows, 4, watch=watch)
    base = forward(tiny_model(), token_rows)[1]
    bare, prompted = held[0]
    assert torch.equal(bare, base) and (prompted - base).abs().max() > 1e-3


def test_the_rate_is_its_own_or_the_runs(tiny_model, start):
    for rate, wanted in ((0.3, 0.3), (None, 1e-3)):
        session = start([hf.PromptTuning(num_virtual_tokens=2, learning_rate=rate)], tiny_model())
        (group,) = session.param_groups(1e-3, 0.0)
        assert group["lr"] == wanted and [p.numel() for p in group["params"]] == [2 * 32]


def test_the_export_is_the_base_with_a_peft_prompt(tiny_model, tokenizer, rows, token_rows, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = run([SMALL], tiny_model(), tokenizer, rows, 6)
    folder = models.save_model(result.model, tokenizer, tmp_path / "model", card=None)
    save_prompt(result.model, result.soft, tmp_path / "prompt", folder)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "prompt").eval()
    ids = torch.as_tensor(token_rows[0].ids)
    table = tiny_model().get_input_embeddings().weight
    with torch.no_grad():
        theirs = loaded(ids[None]).logits[0]
        ours = tiny_model()(inputs_embeds=torch.cat([result.soft, table[ids]])[None]).logits[0]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "other", [hf.LoRA(), hf.Freeze(), hf.ICLAnchor(), hf.WiSEFT(), hf.L2ToInit(), hf.CoBa(), hf.SDFT(), hf.Replay()]
)
def test_what_would_do_nothing_is_refused(other):
    for plan in ([SMALL, other], [other, SMALL]):
        with pytest.raises(PlanError, match=rf"(?s)PromptTuning.*{other.name}"):
            Plan(plan).check_together()
    Plan([SMALL, hf.Curriculum(), hf.DFT(), hf.UDS()]).check_together()


@pytest.mark.parametrize("kind", [hf.PromptTuning, hf.PrefixTuning])
@pytest.mark.parametrize(
    "settings, words", [({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"), ({"learning_rate": 0.0}, "is 0.0")]
)
def test_values_without_meaning_are_refused(settings, words, kind, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=f"{kind.__name__}.*{words}"):
        kind(**settings).check(Context(tiny_model(), tokenizer))


def test_a_setting_of_that_name_is_no_soft_prompt():
    """OnPolicyKL has a setting `prompts`."""
    assert [m.trains_prompt for m in (SMALL, hf.ProMoT(), hf.OnPolicyKL(), hf.LTSFT())] == [True, True, False, False]
    assert [m.only_prompts for m in (SMALL, hf.ProMoT(), hf.OnPolicyKL())] == [True, False, False]
    Plan([hf.OnPolicyKL()]).check_host(Host("SFTTrainer", packing=True))


def test_packed_rows_of_a_trainer_are_refused():
    with pytest.raises(PlanError, match="PromptTuning puts a soft prompt"):
        Plan([SMALL]).check_host(Host("SFTTrainer", packing=True))
