"""The registry, the order of a run, and what the diagnoses share."""

import pytest
import torch

from holdfast.diagnose import DIAGNOSES, Case, Finding, _pair, run
from holdfast.errors import HoldfastError, ModelError

OURS = ("layer drift", "intruder dimensions", "tuco", "parameter sensitivity")


@pytest.fixture
def same(tiny_model, tokenizer):
    model = tiny_model()
    return Case(model, model, tokenizer)  # one object twice: nothing may watch itself


def test_base_against_itself_says_nothing_unusual(same):
    heard = []
    findings = run(same, OURS, lambda *told: heard.append(told))
    assert [f.name for f in findings] == list(OURS)
    assert all(f.finding.startswith("Nothing unusual") for f in findings)
    assert [h[2] for h in heard] == [*OURS, ""] and heard[-1][1] == 1.0


def test_runs_in_the_order_of_the_registry(same):
    assert [f.name for f in run(same, ["tuco", "layer drift"])] == ["layer drift", "tuco"]
    assert run(same, []) == []


def test_an_unknown_name_is_refused_with_a_suggestion(same):
    with pytest.raises(HoldfastError, match="layer drift"):
        run(same, ["layer drft"])


def test_part_is_what_the_report_holds():
    found = Finding("tuco", "Layer 1.", "How.", [["a"], [1]], {"x": 1.0})
    assert found.part() == {"name": "tuco", "finding": "Layer 1.", "detail": "How.", "table": [["a"], [1]]}
    assert all(len(target.split(":")) == 2 for target in DIAGNOSES.values())


def test_a_diagnosis_that_cannot_be_made_says_why(tiny_model, tokenizer):
    case = Case(tiny_model(layers=2), tiny_model(layers=3), tokenizer)
    with pytest.raises(ModelError, match=r"layers\.2"):
        list(_pair.pairs(case))
    (found,) = run(case, ["layer drift"])
    assert found.finding.startswith("Not made") and "layers.2" in found.finding and found.detail


@pytest.mark.parametrize("tied", [(True, True), (False, False), (True, False), (False, True)])
def test_every_weight_is_seen_once(tiny_model, tokenizer, tied):
    base, tuned = (tiny_model(tied=t) for t in tied)
    seen = list(_pair.pairs(Case(base, tuned, tokenizer)))
    assert len(seen) == max(len(list(m.parameters())) for m in (base, tuned))
    assert {p.place for p in seen} == {0, 1, "embeddings", "norm and head"}
    assert sum(p.module == "self_attn.q_proj" for p in seen) == 2


def test_squares_are_the_norms_whatever_the_chunk(tiny_model, tokenizer, monkeypatch):
    base, tuned = tiny_model(), tiny_model()
    w = tuned.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        w.add_(torch.randn_like(w))
    monkeypatch.setattr(_pair, "CHUNK", 7)
    pair = next(p for p in _pair.pairs(Case(base, tuned, tokenizer)) if p.tuned is w)
    expected = float(((w - pair.base).norm() / pair.base.norm()).detach())
    assert _pair.relative(pair.squares()) == pytest.approx(expected, rel=1e-5)


def test_standout_compares_with_the_median_of_the_others():
    assert _pair.standout({0: 1.0, 1: 6.0, 2: 2.0, 3: 3.0}) == (1, 3.0)
    assert _pair.standout({0: 0.0, 1: 1.0, 2: 0.0}) == (1, float("inf"))
    assert _pair.standout({0: 0.0, 1: 0.0})[1] == 1.0


def test_prompts_are_few_shot_and_drawn_by_the_seed(tiny_model, tokenizer):
    def texts(seed):
        case = Case(tiny_model(), tiny_model(), tokenizer, seed=seed)
        return [tokenizer.decode(ids[0]) for ids in _pair.held_out_prompts(case, 5)]

    assert len(set(texts(0))) == 5 and texts(0) == texts(0) != texts(1)
