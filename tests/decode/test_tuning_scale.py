"""Scaling of what tuning added: its ends exactly, a linear net by hand, caches, how it leaves the line."""

import pytest
import torch
import transformers as hf

from holdfast.decode import load_scaled, scale_tuning, set_scale
from holdfast.decode.tuning_scale import Both
from holdfast.errors import ModelError
from holdfast.measure.scorer import Scorer
from tiny import build_model

IDS = torch.tensor([[0, 17, 42, 9, 77, 130, 5]])
GREEDY = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 2, "eos_token_id": None}


def tuned_from(base, noise=0.05, where=("layers",)):
    """A copy whose layers were moved at random."""
    import copy

    tuned = copy.deepcopy(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for n, p in tuned.named_parameters():
            if any(w in n for w in where):
                p.add_(noise * torch.randn_like(p))
    return tuned


@torch.no_grad()
def test_the_ends_are_the_two_models():
    base = build_model()
    tuned = tuned_from(base)
    at_0, at_1 = base(IDS).logits, tuned(IDS).logits
    both = scale_tuning(tuned, build_model(), 1.0)
    assert both is tuned and torch.equal(both(IDS).logits, at_1)
    set_scale(both, 0.0)
    assert torch.equal(both(IDS).logits, at_0)
    set_scale(both, 0.5)
    middle = both(IDS).logits
    assert not torch.allclose(middle, at_0, atol=1e-3) and not torch.allclose(middle, at_1, atol=1e-3)
    set_scale(both, 0.5 + 1e-4)  # continuous
    torch.testing.assert_close(both(IDS).logits, middle, atol=1e-3, rtol=1e-2)


@torch.no_grad()
def test_a_linear_layer_equals_the_line_between_the_weights():
    """Layers that add W x: x (W_0 + a (W - W_0)) added, by hand for a = 1.5."""

    class Linear(torch.nn.Module):
        def __init__(self, w):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(w))

        def forward(self, x):
            return x + x @ self.w

    both = Both(Linear([[2.0, 0.0], [0.0, 0.0]]), Linear([[0.0, 1.0], [0.0, 0.0]]), 0, 1, 1.5)
    # x = (1, 0): the base adds (0, 1), the tuned layer (2, 0); 1.5 steps: (0, 1) + 1.5 (2, -1) = (3, -0.5)
    assert both(torch.tensor([[1.0, 0.0]])).tolist() == [[4.0, -0.5]]


SMALL = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "gemma2": lambda: hf.Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=2, sliding_window=4),
    "gpt2": lambda: hf.GPT2Config(vocab_size=200, n_embd=32, n_layer=3, n_head=4, n_positions=64),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_with_a_cache_is_that_without(name):
    torch.manual_seed(0)
    base = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    tuned = tuned_from(base, 0.3, ("layers", ".h."))
    plain = tuned.generate(IDS, **GREEDY)
    both = scale_tuning(tuned, base, 0.6)
    got = both.generate(IDS, **GREEDY)
    assert torch.equal(got, both.generate(IDS, use_cache=False, **GREEDY)) and not torch.equal(got, plain)
    beams = both.generate(IDS, num_beams=2, **GREEDY)
    assert torch.equal(beams, both.generate(IDS, num_beams=2, use_cache=False, **GREEDY))


@torch.no_grad()
def test_each_layer_may_have_its_own(tokenizer):
    base = build_model()
    tuned = tuned_from(base)
    mixed = tuned_from(base)
    mixed.model.layers[1] = build_model().model.layers[1]  # layer 1 untuned
    wanted = mixed(IDS).logits
    both = scale_tuning(tuned, build_model(), [1.0, 0.0])
    torch.testing.assert_close(both(IDS).logits, wanted)
    pairs = [("Input: yes\nOutput:", " no"), ("Q: 12\nA:", " 3")]
    got, alone = (Scorer(m, tokenizer).score(pairs) for m in (both, mixed))
    assert [s.logprob for s in got] == pytest.approx([s.logprob for s in alone], abs=1e-4)


@torch.no_grad()
def test_it_leaves_the_line_between_the_weights_by_the_second_order():
    """Halve the change and the difference to interpolated weights falls to about a quarter."""
    apart = []
    for noise in (0.02, 0.01):
        base = build_model()
        tuned, line = tuned_from(base, noise), build_model()
        for p, t in zip(line.parameters(), tuned.parameters(), strict=True):
            p.lerp_(t, 0.5)
        apart.append(float((scale_tuning(tuned, base, 0.5)(IDS).logits - line(IDS).logits).abs().max()))
    assert 3 < apart[0] / apart[1] < 5


def test_from_folders(tokenizer, tmp_path):
    base = build_model()
    for name, model in (("base", base), ("tuned", tuned_from(base))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    both, _ = load_scaled(str(tmp_path / "tuned"), str(tmp_path / "base"), 0.0, dtype="float32", device="cpu")
    with torch.no_grad():
        assert torch.equal(both(IDS).logits, base(IDS).logits)


def test_what_is_refused():
    base = build_model()
    with pytest.raises(ModelError, match="same object"):
        scale_tuning(base, base)
    with pytest.raises(ModelError, match="not of the same shapes"):
        scale_tuning(base, build_model(layers=3))
    with pytest.raises(ModelError, match="2 scales for a model with 0 layers"):
        set_scale(base, [1.0, 1.0])
