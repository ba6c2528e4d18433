"""Emulated tuning: values by hand, its limits, and real generation with three models."""

import math
from itertools import pairwise

import pytest
import torch

from holdfast.decode import EmulatedTuning, load_emulated
from holdfast.decode.beside import Beside
from holdfast.decode.emulated import emulated, nucleus
from holdfast.errors import HoldfastError, ModelError
from tiny import build_model

PROMPT = torch.tensor([[0, 17, 42, 9, 77, 130, 5]])
GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 2, "eos_token_id": None}


def logs(*p):
    return torch.tensor(p).log()


def some(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def three():
    """A larger model, and a small one tuned and not."""
    return build_model(seed=1, hidden_size=48), build_model(seed=2), build_model(seed=3)


def test_hand_value():
    # large (.5, .3, .2); the small tuned one doubled the second token's odds against its base: (.25, .5, .25) over
    # (1/3, 1/3, 1/3) is (.75, 1.5, .75). Products (.375, .45, .15), sum .975.
    large, tuned, base = logs(0.5, 0.3, 0.2), logs(0.25, 0.5, 0.25), logs(1 / 3, 1 / 3, 1 / 3)
    got = emulated(large, [tuned], base).exp()
    assert got.tolist() == pytest.approx([0.375 / 0.975, 0.45 / 0.975, 0.15 / 0.975])
    # beta 2: the ratios' square roots
    by = [0.5 * math.sqrt(0.75), 0.3 * math.sqrt(1.5), 0.2 * math.sqrt(0.75)]
    got = emulated(large, [tuned], base, strength=0.5).exp()
    assert got.tolist() == pytest.approx([x / sum(by) for x in by])


def test_limits_and_invariances():
    large, tuned, base = some(3, 4, 50)
    torch.testing.assert_close(emulated(large, [base], base), large.log_softmax(-1))  # nothing was tuned
    torch.testing.assert_close(emulated(base, [tuned], base), tuned.log_softmax(-1))  # the large one is the small one
    torch.testing.assert_close(emulated(large, [tuned], base, strength=0.0), large.log_softmax(-1))  # beta infinite
    got = emulated(large, [tuned], base)
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(4))
    torch.testing.assert_close(emulated(large + 3, [tuned - 5], base + 7), got, atol=1e-4, rtol=1e-4)
    twice = emulated(large, [tuned, tuned], base, weights=[0.25, 0.75])  # two of the same share the weight
    torch.testing.assert_close(twice, got)


def test_only_the_nucleus_is_weighted():
    large, tuned, base = logs(0.6, 0.3, 0.1), logs(0.1, 0.2, 0.7), logs(1 / 3, 1 / 3, 1 / 3)
    assert nucleus(large, 0.8).tolist() == [True, True, False] and nucleus(large, 0.5).tolist() == [True, False, False]
    # .6 * .3 = .18, .3 * .6 = .18, and .1 stays: sum .46
    assert emulated(large, [tuned], base, top_p=0.8).exp().tolist() == pytest.approx([18 / 46, 18 / 46, 10 / 46])
    masked = torch.tensor([0.0, -torch.inf, 0.0])  # another processor forbade a token
    got = emulated(masked, [tuned], base, top_p=0.9)
    assert got[1] == -torch.inf and not got.isnan().any()


def test_rows_of_a_larger_table_are_never_chosen():
    got = emulated(torch.zeros(1, 5), [torch.zeros(1, 3)], torch.zeros(1, 4))
    assert got.shape == (1, 5) and got.exp()[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0])


@torch.no_grad()
def test_generates_what_teacher_forcing_says(three):
    large, tuned, base = three
    got = large.generate(PROMPT, logits_processor=[EmulatedTuning(tuned, base, beta=0.5)], **GREEDY)
    small = [m(got).logits for m in (tuned, base)]
    wanted = emulated(large(got).logits, small[:1], small[1], strength=2.0).argmax(-1)
    assert got[0, 7:].tolist() == wanted[0, 6:-1].tolist()
    alone = large.generate(PROMPT, **GREEDY)
    assert not torch.equal(got, alone)
    assert torch.equal(large.generate(PROMPT, logits_processor=[EmulatedTuning(base, base)], **GREEDY), alone)


@torch.no_grad()
def test_a_draft_of_the_small_model_changes_nothing(three):
    large, tuned, base = three
    wanted = large.generate(PROMPT, logits_processor=[EmulatedTuning(tuned, base, beta=1.5)], **GREEDY)
    process, draft = EmulatedTuning(tuned, base, beta=1.5), build_model(seed=2)
    draft.generation_config.update(assistant_confidence_threshold=0.0, num_assistant_tokens=5)
    asked = []
    process.base.logits = lambda ids, read=process.base.logits: asked.append(ids.shape[1]) or read(ids)
    got = large.generate(PROMPT, logits_processor=[process], assistant_model=draft, **GREEDY)
    assert torch.equal(got, wanted)
    assert any(now < was for was, now in pairwise(asked))  # it went back behind a draft


@torch.no_grad()
def test_beams_and_several_sequences_score_as_without_a_cache(three):
    large, tuned, base = three

    class Fresh(EmulatedTuning):
        """Reads everything again at each token."""

        def __call__(self, input_ids, scores):
            for m in (self.base, *self.tuned):
                m._seen = None
            return super().__call__(input_ids, scores)

    settings = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    got, wanted = (
        large.generate(PROMPT, logits_processor=[k(tuned, base)], **settings) for k in (EmulatedTuning, Fresh)
    )
    assert torch.equal(got, wanted)


@torch.no_grad()
def test_padded_prompts_read_as_alone(three):
    large, tuned, base = three
    short = PROMPT[:, :4]
    ids = torch.cat([torch.nn.functional.pad(short, (3, 0), value=2), PROMPT])
    mask = (ids != 2).long()
    process = EmulatedTuning(tuned, base, attention_mask=mask)
    got = large.generate(ids, attention_mask=mask, logits_processor=[process], **GREEDY)
    for row, prompt in zip(got, (short, PROMPT), strict=True):
        alone = large.generate(prompt, logits_processor=[EmulatedTuning(tuned, base)], **GREEDY)
        assert row[7:].tolist() == alone[0, prompt.shape[1] :].tolist()
    with pytest.raises(ModelError, match="different numbers of padding tokens"):
        large.generate(ids, attention_mask=mask, logits_processor=[EmulatedTuning(tuned, base)], **GREEDY)
    with pytest.raises(ModelError, match=r"mask has shape \(2, 7\)"):
        process(PROMPT[:, :3], some(1, 400))


@torch.no_grad()
def test_going_back_and_changing_rows_gives_the_same_logits(three):
    model = three[1]
    beside = Beside(model)
    other = PROMPT.clone()
    other[0, 4] = 99
    for ids in (PROMPT, PROMPT[:, :5], other, other, torch.cat([other, PROMPT]), torch.cat([PROMPT, other])):
        torch.testing.assert_close(beside.logits(ids), model(ids).logits[:, -1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "words"), [({"beta": 0.0}, "beta"), ({"weights": (1.0, 2.0)}, "2 weights"), ({"top_p": 0.0}, "top_p")]
)
def test_values_that_make_no_sense(three, wrong, words):
    with pytest.raises(HoldfastError, match=words):
        EmulatedTuning(three[1], three[2], **wrong)


def test_from_folders(three, tokenizer, tmp_path):
    for name, model in zip(("tuned", "base"), three[1:], strict=True):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    places = str(tmp_path / "tuned"), str(tmp_path / "base")
    process = load_emulated(*places, tokenizer, settings={"beta": 2.0}, dtype="float32", device="cpu")
    torch.testing.assert_close(process.tuned[0].logits(PROMPT), three[1](PROMPT).logits[:, -1].detach())
    assert process.beta == 2.0
    import copy

    other = copy.deepcopy(tokenizer)
    other.add_tokens(["strange"])
    with pytest.raises(ModelError, match="another vocabulary"):
        load_emulated(*places, other, dtype="float32", device="cpu")
