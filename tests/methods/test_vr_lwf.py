"""VRLwF: what the made-up rows are, and the divergence on them by the models' own forwards."""

import pytest
import torch

from cases import run
from holdfast.errors import PlanError
from holdfast.methods import VRLwF
from holdfast.services import Context


@pytest.fixture
def ctx(tiny_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path))
    return Context(tiny_model(), tokenizer, 0)


def test_rows_are_written_by_the_base_from_nothing(ctx, tokenizer):
    rows = VRLwF(rows=6, max_tokens=8).asides(ctx)
    again = VRLwF(rows=6, max_tokens=8).asides(ctx)
    assert [r.key for r in rows] == [r.key for r in again] and len({r.key for r in rows}) > 3
    for row in rows:
        assert row.ids[0] == tokenizer.bos_token_id and len(row.ids) <= 9
        assert row.owner == "VRLwF" and row.scored[1:].all() and not row.scored[0]
    others = VRLwF(rows=6, max_tokens=8).asides(Context(ctx.model, tokenizer, 1))
    assert {r.key for r in rows} != {r.key for r in others}


def test_the_base_writes_what_it_finds_likely(ctx):
    """At a low temperature the greedy text; the mean log-probability is that of a text of its own."""
    (row, other, *_) = VRLwF(rows=3, max_tokens=6, temperature=1e-4).asides(ctx)
    assert row.key == other.key
    for n in range(1, len(row.ids)):
        assert int(ctx.model(torch.as_tensor(row.ids[:n])[None]).logits[0, -1].argmax()) == row.ids[n]


def test_rows_of_random_tokens(ctx, tokenizer):
    rows = VRLwF(words="tokens", rows=40, max_tokens=10).asides(ctx)
    drawn = torch.cat([torch.as_tensor(r.ids[1:]) for r in rows])
    assert len(drawn) == 400 and not set(drawn.tolist()) & set(tokenizer.all_special_ids)
    assert len(set(drawn.tolist())) > 150


def test_a_chat_begins_with_an_empty_turn(ctx, tokenizer):
    (row,) = VRLwF(rows=1, max_tokens=4, start="chat").asides(ctx)
    text = tokenizer.decode(row.ids[: int(row.scored.argmax())])
    assert text == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("words", ["texts", "tokens"])
def test_the_divergence_by_the_models_own_forwards(words, tiny_model, tokenizer, rows):
    method = VRLwF(weight=2.0, words=words, rows=3, max_tokens=8, rows_per_step=3)
    got = run([method], tiny_model(), tokenizer, rows, 6)
    made, total, count = got.session.asides["VRLwF"], 0.0, 0
    with torch.no_grad():
        for row in made:
            ids = torch.as_tensor(row.ids)[None]
            base, tuned = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (tiny_model(), got.model))
            total += (base.exp() * (base - tuned)).sum().item()
            count += len(row.ids) - 1
    session = got.session
    got.model.requires_grad_(True)  # a finished model holds still
    last = session.loss(got.model, made, {"VRLwF": count}, 6)[1]["VRLwF"]
    assert float(last) == pytest.approx(2 * total / count, rel=1e-3) and total > 1e-4
    assert got.log.loss[0][1]["VRLwF"] == pytest.approx(0, abs=1e-6)
    assert got.log.realised["VRLwF/examples"] == 18


@pytest.mark.parametrize("wrong", [{"words": "none"}, {"start": "end"}, {"rows": 0}, {"temperature": 0.0}])
def test_values_without_meaning_are_refused(wrong, ctx):
    with pytest.raises(PlanError, match="VRLwF"):
        VRLwF(**wrong).check(ctx)
