"""Prefix tuning: attention over the prefix by hand, its numbers, a base that nothing reaches, and PEFT's reading."""

import json
import math

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cases import run
from holdfast import methods as hf
from holdfast import models
from holdfast.engine.forward import forward
from holdfast.engine.pack import TokenRow
from holdfast.engine.prefix import cache_of, is_prefix, prefix_of
from holdfast.engine.ways import SOFT_PROMPT, inner
from holdfast.errors import ModelError, PlanError
from holdfast.measure.scorer import Scorer
from holdfast.measure.soft_prompt import check_export
from holdfast.measure.soft_prompt import save as save_prompt
from holdfast.plan import Plan
from holdfast.services import Context
from holdfast.verbs.tune import tune
from tiny_run import recipe_data, write_recipe
from zoo import build

SMALL = hf.PrefixTuning(num_virtual_tokens=3)


def attended(q, k, v, keys, values):
    """(T, d) of one head: softmax(q [K; k]^T / sqrt(d)) [V; v], where a token sees all of the prefix and its past."""
    k, v, p = torch.cat([keys, k]), torch.cat([values, v]), len(keys)
    scores = q @ k.T / math.sqrt(q.shape[1])
    hidden = torch.ones_like(scores).triu(p + 1).bool()
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


def test_attention_reads_the_prefix_by_hand(tiny_model, start, token_rows):
    """What the first layer's attention gives for one row, from the layer's own maps: 4 heads, 2 heads of keys."""
    model = tiny_model()
    session = start([SMALL], model)
    layer, row = model.model.layers[0], token_rows[0]
    seen = {}
    handles = [
        layer.input_layernorm.register_forward_hook(lambda _m, _a, out: seen.__setitem__("in", out[0])),
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: seen.__setitem__("out", args[0][0])),
    ]
    with torch.no_grad():
        forward(model, [row])
        for handle in handles:
            handle.remove()
        x, places = seen["in"], torch.arange(3, 3 + len(row.ids))[None]  # behind 3 positions
        cos, sin = model.model.rotary_emb(x[None], places)
        q, k, v = (
            getattr(layer.self_attn, f"{n}_proj")(x)[None].unflatten(-1, (-1, 8)).transpose(1, 2) for n in "qkv"
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        prefix = session.params[SOFT_PROMPT]  # (3, 2 layers * 2, 2, 8)
        heads = [attended(q[0, h], k[0, h // 2], v[0, h // 2], prefix[:, 0, h // 2], prefix[:, 1, h // 2])
                 for h in range(4)]  # fmt: skip
    torch.testing.assert_close(seen["out"], torch.cat(heads, dim=-1), rtol=1e-4, atol=1e-5)


def test_loss_and_gradient_are_those_of_a_cache(tiny_model, start, token_rows, gradients):
    """Row by row by the model's own forward behind a filled cache, and only the prefix has a gradient."""
    model = tiny_model()
    session = start([SMALL], model)
    loss, grads = gradients(session, token_rows)
    prefix = session.state["PrefixTuning"]["init"].clone().requires_grad_()
    total = count = 0
    for row in token_rows:
        ids = torch.as_tensor(row.ids)
        layers = prefix.permute(1, 2, 0, 3)[:, None]
        cache = DynamicCache(list(zip(layers[0::2], layers[1::2], strict=True)))
        logits = model(input_ids=ids[None], cache=cache).logits[0]
        at = torch.as_tensor(row.scored).nonzero()[:, 0]
        total = total + torch.nn.functional.cross_entropy(logits[at - 1], ids[at], reduction="sum")
        count += len(at)
    (wanted,) = torch.autograd.grad(total / count, [prefix])
    assert loss == pytest.approx((total / count).item(), rel=1e-5)
    assert list(grads) == list(session.params) == [SOFT_PROMPT]
    torch.testing.assert_close(grads[SOFT_PROMPT], wanted, rtol=1e-4, atol=1e-6)


def test_it_has_so_many_numbers(tiny_model, start):
    """2 L p heads width = 2 * 2 * 3 * 2 * 8 under grouped-query attention, and a rate of its own."""
    session = start([SMALL], tiny_model())
    (group,) = session.param_groups(1e-3, 0.0)
    assert group["lr"] == 5e-3 and [p.numel() for p in group["params"]] == [192] and is_prefix(session.soft_prompt())


def test_a_prefix_of_tokens_does_what_they_do(tiny_model, tokenizer):
    model, ids = tiny_model(), [20, 50, 90, 130, 200]
    prefix = prefix_of(model, ids[:2])
    with torch.no_grad():
        whole = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = Scorer(model, tokenizer, soft_prompt=prefix).score_tokens([(ids[2:4], 1), (ids[2:], 1)])
    alone = Scorer(model, tokenizer, soft_prompt=prefix, invariant=True).score_tokens([(ids[2:], 1)])
    wanted = [whole[2, ids[3]], whole[2, ids[3]] + whole[3, ids[4]]]
    assert [s.logprob for s in found] == pytest.approx([w.item() for w in wanted], rel=1e-5)
    assert alone[0].logprob == pytest.approx(wanted[1].item(), rel=1e-5)


def test_rows_of_nobody_see_the_base_beside_rows_behind_the_prefix(tiny_model, start, token_rows):
    model = tiny_model()
    start([SMALL], model)
    bare = [TokenRow(r.ids, r.scored, "other", "other") for r in token_rows]
    with torch.no_grad():
        base = forward(tiny_model(), token_rows)[1]
        alone, behind = forward(model, bare)[1], forward(model, token_rows)[1]
        beside = forward(model, [*bare, *token_rows])[1]
    assert torch.equal(alone, base) and (behind - base).abs().max() > 1e-3
    torch.testing.assert_close(beside, torch.cat([base, behind]), rtol=1e-4, atol=1e-5)


def test_the_export_is_the_base_with_a_peft_prefix(tiny_model, tokenizer, rows, token_rows, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = run([SMALL], tiny_model(), tokenizer, rows, 6)
    folder = models.save_model(result.model, tokenizer, tmp_path / "model", card=None)
    save_prompt(result.model, result.soft, tmp_path / "prompt", folder)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "prompt").eval()
    ids = torch.as_tensor(token_rows[0].ids)
    layers = result.soft.permute(1, 2, 0, 3)[:, None]
    with torch.no_grad():
        theirs = loaded(ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0]
        cache = DynamicCache(list(zip(layers[0::2], layers[1::2], strict=True)))
        ours = tiny_model()(ids[None], cache=cache).logits[0]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_a_whole_run_measures_and_exports_it(world, tmp_path):
    """The report is about the task behind the prefix, and what is exported generates behind it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plan = [{"PrefixTuning": {"num_virtual_tokens": 3, "learning_rate": 0.1}}]
    data = recipe_data(world, tmp_path / "run", plan=plan, training={"max_steps": 8},
                       measure={"suites": ["format"], "limit": 2})  # fmt: skip
    tune(write_recipe(tmp_path / "r.yaml", data))
    assert json.loads((tmp_path / "run" / "report.json").read_text())["kind"] == "tune"
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    prompted = PeftModel.from_pretrained(tuned, tmp_path / "run" / "prompt").eval()
    soft = prompted.prompt_encoder["default"].embedding.weight.detach().view(3, 4, 2, 8)
    ids, how = (
        torch.tensor([[20, 50, 90, 130, 200]]),
        {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 399, "use_cache": False},
    )
    said = prompted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=2, **how)
    greedy = ids
    with torch.no_grad():
        for _ in range(4):
            logits = tuned(greedy, cache=cache_of(soft, 1, torch.float32)).logits
            greedy = torch.cat([greedy, logits[:, -1:].argmax(-1)], 1)
    assert said.tolist() == greedy.tolist()


def test_gradient_checkpointing_is_refused(tiny_model, start, token_rows):
    model = tiny_model()
    start([SMALL], model)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="gradient checkpointing drops"):
        forward(model, token_rows)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3_text"])
def test_other_models_read_one(name, tokenizer):
    model = build(name).eval()
    SMALL.check(Context(model, tokenizer))
    check_export(model, tokenizer, "PrefixTuning", prefix=True)


@pytest.mark.parametrize("name", ["mamba", "rwkv"])
def test_models_without_keys_and_values_are_refused(name, tokenizer):
    with pytest.raises(PlanError, match="PrefixTuning"):
        SMALL.check(Context(build(name).eval(), tokenizer))


@pytest.mark.parametrize("other", [hf.LoRA(), hf.ICLAnchor(), hf.L2ToInit(), hf.Replay(), hf.PromptTuning()])
def test_what_would_do_nothing_is_refused(other):
    for plan in ([SMALL, other], [other, SMALL]):
        with pytest.raises(PlanError, match=rf"(?s)PrefixTuning.*{other.name}|{other.name}.*PrefixTuning"):
            Plan(plan).check_together()
    Plan([SMALL, hf.Curriculum(), hf.DFT(), hf.UDS()]).check_together()


def test_the_tiny_model_has_fewer_heads_of_keys(tiny_model):
    assert inner(tiny_model()).config.num_key_value_heads == 2
