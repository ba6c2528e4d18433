"""measure.suites: auto. In-context always; all default suites where the training is long enough to make them cheap."""

import json
from types import SimpleNamespace

import pytest

from holdfast.errors import HoldfastError
from holdfast.measure.names import DEFAULT
from holdfast.measure.probe import Ask
from holdfast.measure.suites import build
from holdfast.recipe import recipe_from
from holdfast.runs import abilities
from holdfast.runs.abilities import certain, cost, measured_suites, words
from holdfast.runs.job import checked
from holdfast.runs.run import Run
from tiny_run import recipe_data

ROWS = [SimpleNamespace(ids=[0] * 100)] * 4


def asked(world, tmp_path, **measure):
    return recipe_from(recipe_data(world, tmp_path / "run", measure={"limit": 48, **measure}))


def test_the_bound_by_hand(world, tmp_path, tokenizer, monkeypatch):
    """4 rows of 100 tokens a step, three forwards each: 2 * 80,000 is a tenth of the training from 1,334 steps on."""
    monkeypatch.setattr(abilities, "cost", lambda ask: 80_000)
    recipe, ask = asked(world, tmp_path), Ask(tokenizer, 1, 2)
    short, long = (measured_suites(recipe, ROWS, steps, ask, 4096) for steps in (1333, 1334))
    assert short == ("in-context",) and set(long) == set(DEFAULT)
    assert "not measured" in words(recipe, short) and "format" in words(recipe, short)
    assert "all default suites" in words(recipe, long)


def test_the_cost_is_that_of_the_suites_as_they_are_asked(tokenizer):
    """All texts of the suites by four characters a token, each once, and eight for each token that may be written."""
    few, more = (cost(Ask(tokenizer, 1, limit)) for limit in (2, 12))
    by_hand = 0.0
    for name in DEFAULT:
        seen = set()
        for p in build(name, Ask(tokenizer, 1, 2)).probes:
            by_hand += 0 if p.context in seen else len(p.context) / 4
            by_hand += sum(map(len, p.answers)) / 4 + (8 * p.max_tokens if p.kind == "generate" else 0)
            seen.add(p.context)
    assert few < more / 3 and few == pytest.approx(by_hand, rel=0.02)  # two suites may ask the same


def test_what_has_a_floor_is_measured(world, tmp_path, tokenizer):
    recipe = asked(world, tmp_path, keep={"language": 0.9})
    assert measured_suites(recipe, ROWS, 1, Ask(tokenizer, 1, 2), 4096) == ("in-context", "language")


def test_what_goes_through_the_template_is_asked_for_instructions(world, tmp_path, tokenizer):
    """On conversations in-context learning can stay whole while every instruction is lost."""
    ask, auto, named = (
        Ask(tokenizer, 1, 2),
        asked(world, tmp_path),
        asked(world, tmp_path, suites=["language"], keep={}),
    )
    assert measured_suites(auto, ROWS, 1, ask, 4096, chat=True) == ("in-context", "instructions")
    assert "instructions" not in words(auto, ("in-context", "instructions")).partition(":")[2]
    assert measured_suites(named, ROWS, 1, ask, 4096, chat=True) == ("language",)
    assert measured_suites(auto, ROWS, 1, ask, 60, chat=True) == ("in-context",)  # longer than the model can read


@pytest.mark.parametrize("chat", [False, True])
def test_a_run_knows_whether_its_rows_are_chat(world, tmp_path, chat):
    row = {"messages": [{"role": "user", "content": "Hi {n}"}, {"role": "assistant", "content": "Yes"}]}
    file = tmp_path / "rows.jsonl"
    told = json.dumps(row if chat else {"prompt": "{n}:", "completion": " yes"})
    file.write_text("".join(told.replace("{n}", str(n)) + "\n" for n in range(40)))
    recipe = recipe_from(recipe_data(world, tmp_path / "run") | {"data": {"train": str(file), "validation_size": 6}})
    job = checked(Run(recipe, tmp_path))
    assert job.task.chat is chat and ("instructions" in job.suites) is chat


def test_what_the_model_cannot_read_is_left_out(world, tmp_path, tokenizer):
    ask = Ask(tokenizer, 1, 2)
    found = measured_suites(asked(world, tmp_path), ROWS, 10**6, ask, 200)
    assert "in-context" in found and set(found) < set(DEFAULT)


def test_named_suites_are_taken_as_they_are(world, tmp_path, tokenizer):
    recipe = asked(world, tmp_path, suites=["language"], keep={})
    assert measured_suites(recipe, ROWS, 10**6, Ask(tokenizer, 1, 2), 4096) == ("language",)
    assert words(recipe, ("language",)) == ""


def test_a_floor_of_no_suite_is_refused(world, tmp_path):
    with pytest.raises(HoldfastError, match="no suite 'langauge'"):
        certain(asked(world, tmp_path, keep={"langauge": 0.9}))


def test_a_run_measures_them(world, tmp_path, monkeypatch):
    monkeypatch.setattr(abilities, "cost", lambda ask: 0)
    recipe = recipe_from(recipe_data(world, tmp_path / "run"))
    assert set(checked(Run(recipe, tmp_path)).suites) == set(DEFAULT)
