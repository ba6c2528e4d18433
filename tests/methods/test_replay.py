"""Replay: general rows in the task's mix, in stated shares."""

import json
from collections import Counter
from itertools import islice

import pytest

from holdfast.data import tokens
from holdfast.data.mix import Mix
from holdfast.engine.pack import token_row
from holdfast.errors import PlanError
from holdfast.methods import Replay
from holdfast.methods.data.replay import read_sources
from holdfast.services import Context


@pytest.fixture
def ctx(tiny_model, tokenizer, tmp_path):
    for name, rows in (
        ("ask", [{"prompt": f"Say {n}:", "completion": f" number {n}"} for n in range(6)]),
        ("prose", [{"text": f"The {n}th day was long, and nobody came. " * 4} for n in range(5)]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Context(tiny_model(), tokenizer, base_dir=tmp_path)


BOTH = ("ask.jsonl", "prose.jsonl")
TASK = [token_row(range(n, n + 12), 8) for n in range(5, 45)]


def test_share_and_weights_by_hand(ctx):
    # 80 rows, share 0.25: 20 replayed; weights 3 and 1: 15 of "ask", 5 of "prose"; 60 task rows
    mix = Replay(share=0.25, sources=BOTH, weights=(3, 1)).data(Mix(TASK), ctx)
    got = Counter(r.source for r in islice(mix.draw(0), 80))
    assert abs(got["Replay:ask"] - 15) <= 1
    assert abs(got["Replay:prose"] - 5) <= 1
    assert abs(got["task"] - 60) <= 1


def test_equal_weights_without_any(ctx):
    mix = Replay(share=0.5, sources=BOTH).data(Mix(TASK), ctx)
    got = Counter(r.source for r in islice(mix.draw(0), 100))
    assert abs(got["Replay:ask"] - 25) <= 1
    assert abs(got["Replay:prose"] - 25) <= 1


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_share_in_tokens(ctx, share):
    mix = Replay(share=share, sources=BOTH, unit="tokens").data(Mix(TASK), ctx)
    drawn = list(islice(mix.draw(0), 300))
    mine = sum(len(r.ids) for r in drawn if r.source != "task")
    assert abs(mine - share * sum(len(r.ids) for r in drawn)) <= 2 * max(len(r.ids) for r in drawn)
    assert sum(r.source != "task" for r in drawn) / 300 != pytest.approx(share, abs=0.02)  # rows are not tokens


def test_a_weight_of_zero_leaves_a_source_out(ctx):
    mix = Replay(share=0.5, sources=BOTH, weights=(1, 0)).data(Mix(TASK), ctx)
    assert {r.source for r in islice(mix.draw(0), 60)} == {"task", "Replay:ask"}


def test_what_is_scored(ctx, tokenizer):
    mix = Replay(share=0.5, sources=BOTH).data(Mix(TASK), ctx)
    for row in islice(mix.draw(0), 60):
        if row.source == "Replay:prose":
            assert row.num_scored == len(row.ids) - 1  # all of the text
        if row.source == "Replay:ask":
            said = tokenizer.decode(row.ids[row.scored], skip_special_tokens=True)
            assert said.startswith(" number")
        assert row.owner == "task"


def test_long_rows_are_cut_and_rows_without_target_dropped(ctx):
    mix = Replay(share=0.5, sources=BOTH, max_tokens=5).data(Mix(TASK), ctx)
    prose = [r for r in mix.sources[1].rows]
    assert len(prose) == 5
    assert {len(r.ids) for r in prose} == {5}
    assert all(r.scored.any() for s in mix.sources for r in s.rows)


def test_a_small_source_repeats_and_every_round_shows_all_of_it(ctx):
    mix = Replay(share=0.5, sources=("prose.jsonl",)).data(Mix(TASK), ctx)
    keys = [r.key for r in islice(mix.draw(0), 40) if r.source != "task"]
    assert len(keys) == 20
    for turn in range(4):
        assert len(set(keys[5 * turn : 5 * turn + 5])) == 5


@pytest.mark.parametrize(
    "wrong",
    [{"share": 1.0}, {"share": -0.1}, {"weights": (1.0,)}, {"weights": (0.0, 0.0)}, {"unit": "pages"}],
)
def test_values_that_make_no_sense(ctx, wrong):
    with pytest.raises(PlanError, match="Replay"):
        Replay(sources=BOTH, **wrong).check(ctx)


def test_only_what_is_needed_is_tokenised(ctx, monkeypatch):
    seen, plain = [], tokens.tokenize_all
    monkeypatch.setattr(tokens, "tokenize_all", lambda rows, *a, **k: seen.append(len(rows)) or plain(rows, *a, **k))
    few, whole = (read_sources(BOTH, ctx, owner="task", most=most) for most in (3, None))
    assert seen == [3, 11] and [r.key for r in few] == [r.key for r in whole[:3]]


def test_shares_that_leave_nothing_for_the_task(ctx):
    full = Replay(share=0.6, sources=("ask.jsonl",)).data(Mix(TASK), ctx)
    with pytest.raises(PlanError, match="leave nothing for the task"):
        Replay(share=0.5, sources=("prose.jsonl",)).data(full, ctx)


def test_a_seed_of_its_own_draws_another_order(tokenizer, tmp_path, tiny_model):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(30)))
    ctx = Context(tiny_model(), tokenizer, base_dir=tmp_path)
    found = [
        [r.ids.tolist() for r in Replay(seed=seed, sources=(str(path),)).data(Mix(TASK), ctx).sources[-1].rows]
        for seed in (0, 0, 5)
    ]
    assert found[0] == found[1] != found[2] and sorted(found[0]) == sorted(found[2])


def test_what_is_cut_of_answers_is_said(tokenizer, tmp_path, tiny_model):
    """Text is cut as it must be; an answer that loses its end, or begins too late, is told."""
    ask, long = "word " * 40, "said " * 40
    pairs = ((ask, " x"), ("q", f" {long}"), ("q", " y"))
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    path, text = tmp_path / "own.jsonl", tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    text.write_text(json.dumps({"text": long}) + "\n")
    ctx = Context(tiny_model(), tokenizer, base_dir=tmp_path)
    mix = Replay(sources=(str(path), str(text)), max_tokens=20).data(Mix(TASK), ctx)
    assert [len(s.rows) for s in mix.sources] == [2, 1]
    (note,) = ctx.notes
    assert note == (
        "Replay, own.jsonl: of 3 rows 1 left out, as their answers begin behind 20 tokens "
        "and 1 cut to 20 tokens, within the answer"
    )
