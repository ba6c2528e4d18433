"""How a model may be run is tried, not believed: what is not causal is refused, what differs goes the plain way."""

import copy
import logging
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import GPT2LMHeadModel, LlamaForCausalLM, Trainer, TrainingArguments

import zoo
from holdfast import Plan, models, with_plan
from holdfast.engine import trial
from holdfast.engine.attention import ATTENTION, packed_attention
from holdfast.engine.forward import attention, can_pack, forward
from holdfast.engine.layout import Layout
from holdfast.engine.pack import token_row
from holdfast.engine.tree import TREE_ATTENTION
from holdfast.errors import ModelError, PlanError
from holdfast.measure.generate import GREEDY, go_on
from holdfast.measure.scorer import Scorer, supports_tree
from tiny import build_model
from zoo import build


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Generation mutters that some models take no positions."""
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.CRITICAL)


def make_rows(lengths=(5, 37, 9, 20, 20), seed=1):
    draw = np.random.default_rng(seed)
    return [token_row(draw.integers(3, 390, n), max(1, n // 2)) for n in lengths]


def plain(model, row, cut=0):
    ids = torch.tensor(row.ids[: len(row.ids) - cut])[None]
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0][np.flatnonzero(row.scored) - 1]


def check_forward(model, rows):
    """forward() and the scorer give what the plain model says of each row alone, packed if may be or not."""
    expected = torch.cat([plain(model, r) for r in rows])
    for packing in (True, False):
        with torch.no_grad():
            got = forward(model, rows, packing=packing)[1]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    scores = Scorer(model, None).score_tokens([(r.ids.tolist(), int(r.scored.argmax())) for r in rows])
    for row, score in zip(rows, scores, strict=True):
        logp = plain(model, row, cut=1).log_softmax(-1)
        own = logp.gather(1, torch.tensor(row.ids[row.scored])[:, None]).sum().item()
        assert score.logprob == pytest.approx(own, abs=1e-5 * row.num_scored)


class Crowd(LlamaForCausalLM):
    """Rows see those beside them."""

    _supports_attention_backend = False

    def forward(self, **inputs):
        out = super().forward(**inputs)
        out.logits = out.logits + 0.1 * out.logits.mean(0, keepdim=True)
        return out


class Edge(LlamaForCausalLM):
    """A row sees how wide its batch is."""

    _supports_attention_backend = False

    def forward(self, **inputs):
        out = super().forward(**inputs)
        if len(out.logits) > 1:
            out.logits = out.logits + 0.1 * (inputs["input_ids"].roll(1, 0) != inputs["input_ids"]).any(0).sum()
            out.logits[..., 7] *= 2
        return out


class Deaf(GPT2LMHeadModel):
    """Takes a custom attention and ignores the positions it is given."""

    def forward(self, position_ids=None, **inputs):
        return super().forward(**inputs)


class Ahead(LlamaForCausalLM):
    """A token sees the one behind it, a little."""

    def forward(self, **inputs):
        out = super().forward(**inputs)
        out.logits[:, :-1] = out.logits[:, :-1] + 0.05 * out.logits[:, 1:]
        return out


def odd(kind):
    base = build_model(vocab_size=400)
    model = kind(base.config).eval()
    model.load_state_dict(base.state_dict())
    return model


# ---- refused


REFUSED = {"bert": "is_decoder=true", "roberta": "is_decoder=true", "roformer": "is_decoder=true",
           "electra": "is_decoder=true", "xlm": "causal=true", "xlnet": "Use a causal", "prophetnet": "Use a causal",
           "cpmant": "Use a causal"}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", REFUSED)
def test_encoders_are_refused_by_name(kind, dtype):
    model = build(kind).to(dtype)
    for use in (lambda: forward(model, make_rows()), lambda: Scorer(model, None), lambda: can_pack(model)):
        with pytest.raises(ModelError, match=type(model).__name__) as caught:
            use()
        assert "not causal" in caught.value.what and REFUSED[kind] in caught.value.cure


def test_a_model_that_peeks_or_was_switched_is_refused():
    with pytest.raises(ModelError, match="Ahead is not causal"):
        trial.packs(odd(Ahead))
    model = build_model(vocab_size=400)
    assert can_pack(model)
    model.config.is_causal = False
    with pytest.raises(ModelError, match="LlamaForCausalLM is not causal") as caught:
        can_pack(model)
    assert "is_causal=true" in caught.value.cure


def test_what_needs_more_than_token_ids_is_refused():
    with pytest.raises(
        ModelError, match=r"XmodForCausalLM cannot read a row of token ids alone.*set_default_language"
    ):
        Scorer(build("xmod", default_language=None), None)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_refused_at_load_and_in_trainers(kind, tokenizer, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{type(model).__name__} is not causal"):
        models.load(str(tmp_path))
    decoder = build(kind, is_decoder=True)
    decoder.save_pretrained(tmp_path)
    loaded, _ = models.load(str(tmp_path), dtype="float32")
    check_forward(loaded, make_rows())
    args = TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True)
    data = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    with pytest.raises(ModelError, match=f"{type(model).__name__} is not causal"):
        with_plan(Trainer)(model=model, args=args, train_dataset=data, plan=Plan([]))


# ---- the plain way


@pytest.mark.parametrize("kind", ["roberta", "camembert", "xlm-roberta-xl", "data2vec-text", "xmod"])
def test_positions_that_do_not_start_at_0(kind):
    model = build(kind, is_decoder=True)
    assert not can_pack(model) and trial.pads_right(model)
    check_forward(model, make_rows())
    assert Scorer(model, None).max_length == 128 - model.config.pad_token_id - 1
    longest = token_row(np.full(Scorer(model, None).max_length, 7), 100)
    assert len(forward(model, [longest])[1]) == longest.num_scored


@pytest.mark.parametrize("kind", ["bert", "roformer", "xlm"])
def test_encoders_set_up_as_decoders_work(kind):
    check_forward(build(kind, **({"causal": True} if kind == "xlm" else {"is_decoder": True})), make_rows())


@pytest.mark.parametrize("kind", ["nemotron", "opt", "xglm", "qwen2_moe", "gpt_oss", "mllama", "doge", "deepseek_v32"])
def test_what_is_not_what_it_seems(kind):
    """Arguments not passed on, offsets, experts, sinks, a cache of its own, masks of its own, chosen tokens."""
    model = build(kind)
    check_forward(model, make_rows())
    assert supports_tree(model) is (kind in ("opt", "qwen2_moe"))


def test_nemotron_trains(tokenizer):
    model, rows = build("nemotron"), make_rows()
    forward(model.train(), rows)[1].logsumexp(-1).sum().backward()
    own = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    sum(
        model(torch.tensor(r.ids)[None]).logits[0, np.flatnonzero(r.scored) - 1].logsumexp(-1).sum() for r in rows
    ).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(own[name], p.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [Crowd, Edge])
def test_rows_that_depend_on_their_neighbours_go_alone(kind, tokenizer):
    model = odd(kind)
    assert not trial.pads_right(model) and not can_pack(model)
    check_forward(model, make_rows())
    hidden = forward(model, make_rows(), hidden=True)[1]
    assert hidden.shape == (sum(r.num_scored for r in make_rows()), 32)
    prompts = [(r.ids.tolist(), 4) for r in make_rows()]
    assert go_on(model, tokenizer, prompts, **GREEDY) == [go_on(model, tokenizer, [p], **GREEDY)[0] for p in prompts]


def test_a_model_that_ignores_positions_is_not_packed():
    model = Deaf(build("gpt2").config).eval()
    assert not can_pack(model) and trial.pads_right(model)
    check_forward(model, make_rows())


def test_cut_weights_never_go_one_by_one():
    """Processes would not ask for the same number of forwards."""
    model = odd(Crowd)
    next(model.parameters()).ds_id = 0
    with pytest.raises(ModelError, match="Crowd must see its rows one by one"):
        forward(model, make_rows())
    forward(model, make_rows((5,)))
    host = SimpleNamespace(_loss_is_ours=True, _kind=Trainer)
    for whole in (odd(Crowd), build_model()):
        with_plan(Trainer)._try(host, whole, sharded=type(whole) is not Crowd)
    with pytest.raises(PlanError, match=r"Trainer with FSDP runs several rows at once.*Crowd"):
        with_plan(Trainer)._try(host, odd(Crowd), sharded=True)


ROPES = {
    "longrope": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4,
                 "original_max_position_embeddings": 16},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_a_long_row_does_not_move_the_positions_of_others(kind, tokenizer):
    settings = {"rope_parameters": ROPES[kind], "max_position_embeddings": 128 if kind == "longrope" else 16}
    model = (
        build("phi3", original_max_position_embeddings=16, **settings)
        if kind == "longrope"
        else build("llama", **settings)
    )
    assert can_pack(model) and trial.together(model) == 16
    rows = make_rows((40, 5, 9, 20))  # dynamic scaling forgets a long row when a short one comes
    expected = [plain(model, r) for r in rows]
    torch.testing.assert_close(forward(model, rows)[1], torch.cat(expected), atol=1e-5, rtol=1e-5)
    short = forward(model, rows[1:3])[1]
    torch.testing.assert_close(short, torch.cat(expected[1:3]), atol=1e-5, rtol=1e-5)
    wide = forward(model, [rows[1], token_row(rows[0].ids[:17], 1)])[1]
    torch.testing.assert_close(wide[: len(expected[1])], expected[1], atol=1e-5, rtol=1e-5)
    prompts = [(r.ids.tolist(), 4) for r in rows]
    if kind == "longrope":
        check_forward(model, rows)
        alone = [go_on(model, tokenizer, [p], **GREEDY)[0] for p in prompts]
        assert go_on(model, tokenizer, prompts, **GREEDY) == alone


@pytest.mark.parametrize("kind", ["mamba", "rwkv", "recurrent_gemma", "bart", "falcon_mamba", "llama", "roberta"])
def test_batches_of_prompts_say_what_each_says_alone(kind, tokenizer):
    model = build(kind, **({"is_decoder": True} if kind == "roberta" else {}))
    prompts = [(r.ids.tolist(), 6) for r in make_rows((5, 12, 9, 20, 20, 31, 12, 12))]
    alone = [go_on(model, tokenizer, [p], **GREEDY)[0] for p in prompts]
    assert go_on(model, tokenizer, prompts, **GREEDY) == alone
    padded = trial.continues(model, tokenizer.pad_token_id, padded=True)
    assert padded is (kind not in ("rwkv", "recurrent_gemma", "bart"))
    assert trial.continues(model, tokenizer.pad_token_id, padded=False) is (kind != "rwkv")


def test_attention_that_asks_for_more_than_ours_is_not_taken_for_it():
    x = torch.randn(1, 2, 6, 4)
    settings = {"attention_mask": None, "packed_layout": Layout([4, 2])}
    expected = packed_attention(None, x, x, x, **settings)[0]
    harmless = {
        "position_ids": x,
        "use_cache": True,
        "is_causal": True,
        "softcap": None,
        "output_router_logits": False,
    }
    assert torch.equal(packed_attention(None, x, x, x, **settings, **harmless)[0], expected)
    for more in ({"is_causal": False}, {"position_bias": x}, {"anything": 1}):
        with pytest.raises(RuntimeError, match=f"knows no {next(iter(more))}"):
            packed_attention(None, x, x, x, **settings, **more)
    with pytest.raises(RuntimeError, match="knows no mask"):
        packed_attention(None, x, x, x, **(settings | {"attention_mask": x}))


# ---- PEFT


def test_prompt_adapters(tokenizer):
    """Virtual tokens give logits that are nobody's: refused. Virtual keys are read, but not by our attention."""
    shape = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    tuned = get_peft_model(build_model(vocab_size=400), PromptTuningConfig(**shape)).eval()
    with pytest.raises(ModelError, match=r"gives logits of shape \(1, 8, 400\) for 1 x 5"):
        Scorer(tuned, tokenizer)
    base = build_model(vocab_size=400)
    assert can_pack(base)
    prefixed = get_peft_model(base, PrefixTuningConfig(**shape)).eval()
    assert not can_pack(prefixed)
    check_forward(prefixed, make_rows())


def test_what_was_found_stays_with_the_model(tmp_path):
    model, seen = build_model(vocab_size=400), []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    assert can_pack(model) and supports_tree(model) and trial.pads_right(model)
    tried = len(seen)
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    for one in (model, wrapped, wrapped.merge_and_unload()):
        assert can_pack(one) and supports_tree(one) and trial.pads_right(one)
    assert len(seen) == tried == 3 + 1 + 3 + 4  # alone twice, changed, packed; a tree in slices, alone; padding
    twin = copy.deepcopy(model)
    assert twin.__dict__[trial.KEPT] == model.__dict__[trial.KEPT]
    model._forward_pre_hooks.clear()
    assert pickle.loads(pickle.dumps(model)).__dict__[trial.KEPT]
    assert "holdfast" not in repr(model.config.to_dict()) + repr(list(model.state_dict()))
    model.save_pretrained(tmp_path)
    assert "holdfast" not in (tmp_path / "config.json").read_text()


def test_nothing_else_stays():
    model = build_model(vocab_size=400).train()
    model.model.layers[0].eval()
    model.model.embed_tokens.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    modes = [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    before = model.config._attn_implementation
    dice = torch.random.get_rng_state()
    assert can_pack(model) and supports_tree(model) and trial.pads_right(model) and trial.beside(model)
    assert trial.continues(model, 2, True)
    assert torch.equal(torch.random.get_rng_state(), dice)
    assert modes == [m.training for m in model.modules()]
    assert grads == [p.requires_grad for p in model.parameters()]
    assert model.config._attn_implementation == before and all(p.grad is None for p in model.parameters())


def test_the_first_step_under_autocast_has_gradients():
    """The trial of a model that needs autocast casts its weights without gradients, and autocast keeps casts."""
    rows, grads = make_rows(), []
    for tried in (True, False):
        model = build_model(vocab_size=400).train()
        model.model.layers[0].mlp.to(torch.bfloat16).requires_grad_(False)
        if tried:
            with torch.autocast("cpu", torch.bfloat16):
                assert can_pack(model)
        with torch.autocast("cpu", torch.bfloat16):
            forward(model, rows)[1].float().logsumexp(-1).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]) and grad.abs().sum() > 0


def test_a_switched_attention_is_tried_before():
    model = build_model(vocab_size=400)
    with attention(model, TREE_ATTENTION), attention(model, ATTENTION):
        assert can_pack(model)
        forward(model, make_rows())


@pytest.mark.parametrize("vocab", [2, 3, 12])
def test_a_tiny_vocabulary(vocab):
    config = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = build_model(vocab_size=vocab, **config)
    assert can_pack(model) and supports_tree(model)
    with pytest.raises(ModelError, match="not causal"):
        can_pack(build("bert", vocab_size=vocab, **config))


def test_numbers_that_tell_nothing_change_nothing():
    model = build_model(vocab_size=400)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    assert can_pack(model) and supports_tree(model) and trial.pads_right(model)


def test_every_kind_of_the_table_is_a_kind():
    assert set(zoo.OWN) - set(zoo.KINDS) == {"blt_local_decoder", "blt_local_encoder", "blt_global_transformer"}
