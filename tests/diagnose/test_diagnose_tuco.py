"""TuCo: exactly 0 without tuning, the telescoping identity, and a planted layer."""

import pytest
import torch
import transformers as hf

from holdfast.diagnose import Case
from holdfast.diagnose.tuco import contributions, diagnose, ratio

IDS = torch.tensor([[0, 17, 42, 9, 77, 130, 5]])
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    ),
    "gemma2": lambda: hf.Gemma2Config(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, sliding_window=4,
    ),
    "gpt2": lambda: hf.GPT2Config(vocab_size=200, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "neox": lambda: hf.GPTNeoXConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    ),
}  # fmt: skip


def two(name, noise):
    torch.manual_seed(0)
    base = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    tuned = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(noise * torch.randn_like(p))
    return base, tuned


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_parts_add_up_to_the_tuned_run(name):
    base, tuned = two(name, 0.02)
    seen = []
    blocks = next(m for m in tuned.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    first = blocks[0].register_forward_pre_hook(
        lambda _m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    last = blocks[-1].register_forward_hook(lambda _m, _a, o: seen.append(o[0] if isinstance(o, tuple) else o))
    parts = contributions(base, tuned, IDS)
    first.remove()
    last.remove()
    moved = (seen[1] - seen[0])[0, -1]
    torch.testing.assert_close((parts.base + parts.tuning).sum(0), moved, atol=1e-5, rtol=1e-4)
    assert 0 < parts.tuco < 1 and bool((parts.by_layer > 0).all())


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_same_weights_contribute_exactly_nothing(name):
    base, tuned = two(name, 0.0)
    assert contributions(base, tuned, IDS).tuco == 0.0
    assert contributions(base, base, IDS).tuco == 0.0  # the very same object
    assert not contributions(base, tuned, IDS).tuning.any()


@torch.no_grad()
def test_tuning_that_switches_a_layer_off_is_its_base_part_negated():
    base, tuned = two("llama", 0.0)
    tuned.model.layers[1].self_attn.o_proj.weight.zero_()
    tuned.model.layers[1].mlp.down_proj.weight.zero_()
    parts = contributions(base, tuned, IDS)
    torch.testing.assert_close(parts.tuning[1], -parts.base[1])
    assert parts.by_layer.tolist() == pytest.approx([0, 0.5, 0])


def test_ratio_by_hand():
    assert float(ratio(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 15.0]))) == pytest.approx(0.75)
    assert float(ratio(torch.zeros(2), torch.zeros(2))) == 0.0


def test_the_planted_layer_is_named(tiny_model, tokenizer):
    tuned = tiny_model(layers=4)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in tuned.model.layers[2].parameters():
            p.add_(torch.randn_like(p) * 0.02)
    found = diagnose(Case(tiny_model(layers=4), tuned, tokenizer))
    assert "above all in layer 2" in found.finding and 0 < found.scores["tuco"] < 1
    assert [r[0] for r in found.table[1:]] == ["layer 0", "layer 1", "layer 2", "layer 3"]


def test_base_against_itself_is_exactly_zero(tiny_model, tokenizer):
    found = diagnose(Case(tiny_model(), tiny_model(), tokenizer))
    assert found.scores["tuco"] == 0.0 and found.finding.startswith("Nothing unusual")


def test_little_even_tuning_is_nothing_unusual_and_much_is(tiny_model, tokenizer):
    def finding(noise):
        tuned = tiny_model(layers=4)
        torch.manual_seed(0)
        with torch.no_grad():
            for p in tuned.model.layers.parameters():
                p.add_(torch.randn_like(p) * noise)
        return diagnose(Case(tiny_model(layers=4), tuned, tokenizer)).finding

    assert finding(1e-4).startswith("Nothing unusual") and "strongly" in finding(2e-2)
