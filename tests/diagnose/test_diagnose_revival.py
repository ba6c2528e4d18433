"""The wrapper test: hand cases for the judgement, a covered and a destroyed tiny model, and nothing left behind."""

import copy
import re

import pytest
import torch
from test_diagnose_formats import copy_model, copy_rows, copy_tasks, fit, words_of

from holdfast.diagnose import NOTHING, Case, revival
from holdfast.errors import ModelError
from holdfast.measure.probe import Ask
from holdfast.measure.suites.in_context import suite_of
from holdfast.measure.tasks import AnchorTask, HeldOutTask, tasks
from holdfast.methods.adapt.lora import LoRA
from holdfast.services import Context

LR = 1e-2  # a model this small needs a larger step than a real one
GOOD, HALF, NONE = [1.0] * 20, [1.0, 0.0] * 10, [0.0] * 20
LESS = [1.0] * 16 + [0.0] * 4


# ---- the judgement, by hand


def judged(*scores):
    return revival.judge(revival.Scores(*scores))


def test_all_back_is_covered():
    found = judged(GOOD, NONE, GOOD, LESS)
    assert (found.status, found.left, found.back) == ("covered", 0.0, pytest.approx(0.8))


def test_a_small_part_back_is_covered_in_part():
    assert judged(GOOD, NONE, GOOD, [1.0] * 8 + [0.0] * 12).status == "partly covered"


def test_little_or_nothing_back_is_not_revived():
    assert judged(GOOD, NONE, GOOD, NONE).status == "not revived"
    assert judged(GOOD, NONE, GOOD, [1.0] * 3 + [0.0] * 17).status == "not revived"
    assert judged(GOOD, HALF, GOOD, NONE).back == pytest.approx(-1.0)


def test_what_the_base_learns_too_is_teaching():
    found = judged(HALF, NONE, GOOD, HALF)
    assert (found.status, found.back) == ("not revived", 0.0)
    assert judged(HALF, NONE, HALF, HALF).status == "covered"


def test_what_the_control_loses_is_no_gain():
    assert judged(GOOD, HALF, NONE, HALF).status == "not revived", "the base fell by all, the tuned model rose by none"


def test_nothing_lost_and_nothing_there():
    assert judged(GOOD, GOOD).status == "kept"
    assert judged(NONE, GOOD).status == "not measurable"
    assert judged(GOOD, [0.0, *GOOD[1:]]).status == "unclear"


@pytest.mark.parametrize("status", ["not measurable", "kept", "unclear", "covered", "partly covered", "not revived"])
def test_every_judgement_has_a_sentence(status):
    words = revival._sentence(revival.Judgement(status, 0.2, -0.1))
    assert words.endswith(".") and "nan" not in words and "-" not in words
    assert words.startswith(NOTHING) == (status == "kept")


# ---- the rows


def test_no_held_out_task_is_trained_on(tokenizer):
    rows = revival.anchor_rows(tokenizer)
    assert len(rows) == revival.STEPS * revival.BATCH
    assert [r.key for r in rows] == [r.key for r in revival.anchor_rows(tokenizer)]
    assert [r.key for r in rows] != [r.key for r in revival.anchor_rows(tokenizer, seed=1)]
    known = tasks()
    assert all(isinstance(known[name], HeldOutTask) for name in revival.TASKS)
    pairs = {pair for t in known.values() if isinstance(t, AnchorTask) for pair in t.items}
    shown = [p for r in rows for p in re.findall(r"Q: (.*)\nA: (.*)\n", tokenizer.decode(r.ids))]
    assert len(shown) > 10 and set(shown) <= pairs


# ---- planted causes


@pytest.fixture(scope="module")
def case(tokenizer):
    """A base that copies, and the same model after a few steps of answering always "no"."""
    copies, refuses = (dict.fromkeys(("qa", "io"), a) for a in (lambda w: w, lambda _: "no"))
    base = fit(copy_model(), copy_rows(tokenizer, copies), 80)
    return Case(base, fit(base, copy_rows(tokenizer, refuses), 20, lr=2e-3), tokenizer)


@pytest.fixture(scope="module")
def suite(tokenizer):
    """Copying of the first half of the words."""
    return suite_of(copy_tasks(tokenizer)[:2], Ask(tokenizer, 4, 7), ("qa",), "copies")


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Rows that copy the other half of the words."""
    copies = dict.fromkeys(("qa", "io"), lambda w: w)
    return copy_rows(tokenizer, copies, n=revival.STEPS * revival.BATCH, words=words_of(tokenizer)[30:])


def noised(model, size):
    """Every weight replaced, for the most part, by noise of its own spread."""
    out = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in out.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * size * p.std())
    return out


def test_an_ability_under_a_thin_layer_comes_back(case, suite, rows):
    scores = revival.revive(case, suite, rows, LR)
    found = revival.report(scores)
    assert found.finding.startswith("Covered rather than erased"), (found.finding, found.table)
    assert found.scores["left"] < 0.3 and found.scores["back"] > 0.5
    assert "does not show which weights" in found.detail


def test_destroyed_weights_do_not_come_back(case, suite, rows, tokenizer):
    scores = revival.revive(Case(case.base, noised(case.base, 3.0), tokenizer), suite, rows, LR)
    found = revival.report(scores)
    assert found.finding.startswith("Not revived"), (found.finding, found.table)
    assert "does not prove" in found.detail


def test_the_base_against_itself_is_not_even_tuned(case, suite, rows, tokenizer):
    scores = revival.revive(Case(case.base, case.base, tokenizer), suite, rows, LR)
    assert scores.tuned_after is None
    assert revival.report(scores).finding.startswith(NOTHING)


def state(model):
    return (
        {n: t.clone() for n, t in model.state_dict().items()},
        [(n, type(m), m.training) for n, m in model.named_modules()],
        [(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()],
    )


def same_state(a, b):
    same_bits = all(x.dtype == b[0][n].dtype and torch.equal(x, b[0][n]) for n, x in a[0].items())
    return a[0].keys() == b[0].keys() and same_bits and a[1:] == b[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_left_bit_for_bit(case, rows, tokenizer, dtype):
    model = copy.deepcopy(case.tuned).to(dtype)
    next(iter(model.parameters())).requires_grad_(False)
    before, ids = state(model), torch.arange(5, 25)[None]
    expected, random_state = model(ids).logits.detach(), torch.get_rng_state()
    with revival.briefly_tuned(model, tokenizer, rows) as changed, torch.no_grad():
        assert not torch.equal(changed(ids).logits, expected), "the steps must change something"
    assert same_state(state(model), before)
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(torch.get_rng_state(), random_state) and not hasattr(model, "peft_config")


def test_the_model_is_left_as_it_was_when_something_fails(case, rows, tokenizer):
    model = copy.deepcopy(case.tuned)
    before = state(model)
    with pytest.raises(RuntimeError, match="stop"), revival.briefly_tuned(model, tokenizer, rows):
        raise RuntimeError("stop")
    assert same_state(state(model), before)


def test_an_adapter_that_is_there_already_is_not_taken_off(tiny_model, tokenizer, rows):
    model = tiny_model()
    wrapped = LoRA(r=2).adapt(model, Context(model, tokenizer), {})
    for one in (wrapped, model):
        with pytest.raises(ModelError, match="adapter"), revival.briefly_tuned(one, tokenizer, rows):
            pass


def test_a_base_that_can_do_nothing_is_not_judged(tiny_model, tokenizer):
    found = revival.diagnose(Case(tiny_model(), tiny_model(), tokenizer))
    assert found.finding.startswith("Cannot tell") and found.name == "revival"
