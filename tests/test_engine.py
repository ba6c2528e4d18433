"""One forward for everything: packed, padded and prompted rows give what the plain model gives row by row."""

import numpy as np
import pytest
import torch

from holdfast.engine.attention import ATTENTION
from holdfast.engine.forward import attention, can_pack, forward
from holdfast.engine.pack import pack, token_row
from holdfast.engine.ways import SOFT_PROMPT, run_padded

LENGTHS = (17, 3, 40, 2, 16, 5, 41)


def make_rows(lengths=LENGTHS, seed=0):
    draw = np.random.default_rng(seed)
    return [token_row(draw.integers(5, 300, n), max(1, n // 3)) for n in lengths]


def one_by_one(model, rows, prompt=None):
    """(N, V) logits of plain forwards of single rows, the prompt's embeddings written before each."""
    out = []
    for row in rows:
        ids = torch.tensor(row.ids)[None]
        if prompt is None:
            logits = model(input_ids=ids, use_cache=False).logits[0]
        else:
            embedded = torch.cat([prompt, model.get_input_embeddings()(ids)[0]])[None]
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0, len(prompt) :]
        out.append(logits[np.flatnonzero(row.scored) - 1])
    return torch.cat(out)


def summed_loss(logits, rows):
    targets = torch.tensor(np.concatenate([r.ids[r.scored] for r in rows]))
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def grads(model, logits, rows):
    model.zero_grad()
    summed_loss(logits, rows).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def build(family, **extra):
    """A tiny random model of another family, fp32."""
    import transformers

    settings = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if family == "GPT2":
        settings = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
                    "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, family + "Config")(**settings | extra)
        head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
        return getattr(transformers, family + head)(config).eval()


PLAIN = [("GPT2", {}), ("Qwen2", {}), ("Qwen3", {}), ("Gemma", {})]
WINDOWED = [("Mistral", {"sliding_window": 4}), ("Gemma2", {"sliding_window": 4}),
            ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0})]  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_packed_is_one_by_one(tiny_model, tied):
    model, rows = tiny_model(tied), make_rows()
    assert can_pack(model)
    packed, got = forward(model, rows)
    expected = one_by_one(model, rows)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert packed.target.tolist() == np.concatenate([r.ids[r.scored] for r in rows]).tolist()
    assert packed.row.tolist() == [n for n, r in enumerate(rows) for _ in range(r.num_scored)]
    one, two = grads(model, got, rows), grads(model, one_by_one(model, rows), rows)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5 * (1 + two[name].abs().max()), rtol=0)


def test_padded_is_packed(tiny_model):
    model, rows = tiny_model(), make_rows()
    packed, expected = forward(model, rows)
    got = run_padded(model, packed, [0] * len(rows), None, ())[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    one, two = grads(model, got, rows), grads(model, forward(model, rows)[1], rows)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5 * (1 + two[name].abs().max()), rtol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_soft_prompt_is_concatenation(tiny_model, padded):
    """Task rows read the prompt, rows of another owner do not; gradients reach the prompt."""
    model = tiny_model()
    task = make_rows((7, 20, 3))
    other = [token_row([9, 8, 7, 6, 5], 1, "Other")]
    soft = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    model.register_parameter(SOFT_PROMPT, torch.nn.Parameter(soft.detach().clone()))
    rows = [task[0], other[0], *task[1:]]
    packed, got = forward(model, rows)
    if padded:
        got = run_padded(model, packed, [4, 0, 4, 4], model.get_parameter(SOFT_PROMPT), ())[0]
    parts = [one_by_one(model, [r], soft if r.owner == "task" else None) for r in rows]
    torch.testing.assert_close(got, torch.cat(parts), atol=1e-5, rtol=0)
    summed_loss(got, rows).backward()
    summed_loss(torch.cat(parts), rows).backward()
    given = model.get_parameter(SOFT_PROMPT).grad
    torch.testing.assert_close(given, soft.grad, atol=1e-4, rtol=1e-4)
    assert given.abs().max() > 1e-3


@pytest.mark.parametrize(("family", "extra"), PLAIN)
def test_other_plain_families_pack_too(family, extra):
    model, rows = build(family, **extra), make_rows()
    assert can_pack(model)
    torch.testing.assert_close(forward(model, rows)[1], one_by_one(model, rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "extra"), WINDOWED)
def test_sliding_windows_pack_too(family, extra):
    model, rows = build(family, **extra), make_rows()
    assert can_pack(model)
    got, expected = forward(model, rows)[1], one_by_one(model, rows)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    wide = build(family, **extra | {"sliding_window": 128})
    assert (one_by_one(wide, rows) - expected).abs().max() > 1e-4  # the window is at work in this test


def test_a_row_cannot_see_another(tiny_model):
    model, rows = tiny_model(), make_rows((12, 30, 9))
    changed = [rows[0], token_row(rows[1].ids[::-1].copy(), 10), rows[2]]
    keep = [n for n, owner in enumerate(pack(rows).row) if owner != 1]
    one, two = forward(model, rows)[1][keep], forward(model, changed)[1][keep]
    assert torch.equal(one, two)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tiny_model, reentrant):
    """Layers run a second time in the backward, outside the forward's switch of attention."""
    rows, model, other = make_rows(), tiny_model().train(), tiny_model().train()
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        other.enable_input_require_grads()
    one = grads(model, forward(model, rows)[1], rows)
    two = grads(other, forward(other, rows)[1], rows)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5 * (1 + one[name].abs().max()), rtol=0)


def test_a_host_may_keep_the_attention_through_the_backward(tiny_model):
    """Then rows are packed under gradient checkpointing too."""
    rows, model, other = make_rows(), tiny_model().train(), tiny_model().train()
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    one = grads(model, forward(model, rows)[1], rows)
    with attention(other, ATTENTION):
        two = grads(other, forward(other, rows)[1], rows)
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_hidden_states_are_what_the_head_reads(tiny_model):
    for model in (tiny_model(), build("Mistral", sliding_window=4)):
        rows = make_rows((6, 9))
        hidden = forward(model, rows, hidden=True)[1]
        logits = forward(model, rows)[1]
        assert hidden.shape == (len(logits), 32)
        torch.testing.assert_close(model.get_output_embeddings()(hidden), logits, atol=1e-6, rtol=0)


def test_a_row_without_targets_does_no_harm(tiny_model):
    rows = make_rows((6, 9))
    silent = token_row([5, 6, 7], 3)
    assert silent.num_scored == 0
    got = forward(tiny_model(), [rows[0], silent, rows[1]])[1]
    torch.testing.assert_close(got, forward(tiny_model(), rows)[1], atol=1e-6, rtol=0)


def test_the_first_token_is_never_a_target():
    assert token_row([5, 6, 7], 0).scored.tolist() == [False, True, True]


def test_the_models_own_attention_comes_back(tiny_model):
    model = tiny_model()
    before = model.config._attn_implementation
    forward(model, make_rows((4,)))
    assert model.config._attn_implementation == before
    with pytest.raises(RuntimeError, match="packed_layout"), attention(model, ATTENTION):
        model(input_ids=torch.tensor([[5, 6]]))
    assert model.config._attn_implementation == before


def test_a_lora_model_packs(tiny_model):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(p.numel()))
    rows = make_rows()
    assert can_pack(model)
    torch.testing.assert_close(forward(model, rows)[1], one_by_one(model, rows), atol=1e-5, rtol=0)
