"""Skill-It: the weights by hand from a graph and losses, and where they come from in a run."""

import json
import math

import pytest

from cases import run, token_rows
from holdfast.data.mix import Mix
from holdfast.errors import PlanError
from holdfast.method import Past
from holdfast.methods import ProMoT, Replay, SkillIt
from holdfast.services import Context
from holdfast.sites.steering import Steering


def ask(method, *looks):
    """The weights after looks with these losses, the first of which is at step 0."""
    steering = Steering([method], {"SkillIt": {}})
    for n, losses in enumerate(looks):
        steering.ask(Past(n * method.every, 100, {}, 1e-3), {"SkillIt": losses})
        assert steering.source_weight == (steering.source_weight or None)
    return steering.source_weight


def softmax(**scores):
    whole = sum(math.exp(s) for s in scores.values())
    return {n: pytest.approx(len(scores) * math.exp(s) / whole, rel=1e-9) for n, s in scores.items()}


START = {"a": 9.0, "b": 9.0, "c": 9.0}


def test_the_update_by_hand():
    """A: a helps b by 0.5, beside 1 on the diagonal; eta = 0.5. Losses 2, 4, 1:
    a: 0.5 (2 + 0.5 * 4) = 2, b: 0.5 * 4 = 2, c: 0.5 * 1 = 0.5."""
    method = SkillIt(eta=0.5, graph=(("a", "b", 0.5),))
    assert ask(method, START, {"a": 2.0, "b": 4.0, "c": 1.0}) == softmax(a=2.0, b=2.0, c=0.5)


def test_before_the_first_look_the_graph_alone_counts():
    """exp(eta A 1): a: 0.5 * 1.5, b and c: 0.5; whatever the losses are."""
    assert ask(SkillIt(eta=0.5, graph=(("a", "b", 0.5),)), START) == softmax(a=0.75, b=0.5, c=0.5)


def test_a_window_adds_up_the_last_looks():
    """Window 2: a: 0.1 (3 + 5), b: 0.1 (2 + 1); the look before them is forgotten."""
    looks = [{"a": 1.0, "b": 1.0}, {"a": 90.0, "b": 0.0}, {"a": 3.0, "b": 2.0}, {"a": 5.0, "b": 1.0}]
    assert ask(SkillIt(eta=0.1, window=2), *looks) == softmax(a=0.8, b=0.3)


def test_only_targets_count():
    """b is the target: a: eta * 0.5 * L_b, b: eta * L_b, c: 0, though c is worst."""
    method = SkillIt(eta=1.0, graph=(("a", "b", 0.5),), targets=("b",))
    assert ask(method, START, {"a": 7.0, "b": 2.0, "c": 50.0}) == softmax(a=1.0, b=2.0, c=0.0)


def test_targets_count_by_the_mean_of_the_looks():
    """b is the target, losses 2 and 4: their mean is 3, so a: 1 * 0.5 * 3, b: 1 * 3."""
    method = SkillIt(eta=1.0, graph=(("a", "b", 0.5),), targets=("b",))
    looks = [START, {"a": 7.0, "b": 2.0, "c": 1.0}, {"a": 0.0, "b": 4.0, "c": 9.0}]
    assert ask(method, *looks) == softmax(a=1.5, b=3.0, c=0.0)


def test_equal_losses_and_no_edges_are_uniform():
    assert ask(SkillIt(), START, START) == softmax(a=0.0, b=0.0, c=0.0)


def test_weights_stay_between_two_looks():
    method = SkillIt(every=2, eta=1.0)
    assert [s for s in range(5) if method.looks(s)] == [0, 2, 4]
    steering = Steering([method], {"SkillIt": {}})
    for step, losses in enumerate([{"a": 1.0, "b": 1.0}, {}, {"a": 1.0, "b": 3.0}, {}]):
        steering.ask(Past(step, 100, {}, 1e-3), {"SkillIt": losses})
    assert steering.source_weight == softmax(a=1.0, b=3.0)


def test_sources_of_other_methods_are_skills(tiny_model, tokenizer, rows):
    graph = (("Replay:text", "task", 0.5),)
    plan = [Replay(share=0.3, max_tokens=32), SkillIt(cut=0.25, every=2, graph=graph)]
    got = run(plan, tiny_model(), tokenizer, rows, 6)
    weights = got.session.steering.source_weight
    assert set(weights) == {"task", "Replay:instructions", "Replay:text"}
    assert weights["Replay:text"] > 1 > weights["task"]


def test_a_run_that_does_not_look_at_its_beginning(tiny_model, tokenizer, rows):
    """ProMoT's prompt stage steers nothing: the first look comes later, and its losses count."""
    plan = [ProMoT(num_virtual_tokens=2), Replay(share=0.3, max_tokens=32), SkillIt(cut=0.25, every=3)]
    got = run(plan, tiny_model(), tokenizer, rows, 8)
    assert got.session.state["SkillIt"]["losses"].shape == (3, 1)  # at step 6; the stage of the model begins at 4
    assert set(got.session.steering.source_weight) == {"task", "Replay:instructions", "Replay:text"}


def test_a_token_of_the_mix_weighs_one_on_average():
    """The task has 3 of 4 tokens. eta 1, losses ln 1 and ln 5: e = 1 and 5, so sum part e = 0.75 * 1 + 0.25 * 5 = 2:
    the weights are 0.5 and 2.5, and 0.75 * 0.5 + 0.25 * 2.5 = 1."""
    steering = Steering([SkillIt(eta=1.0)], {"SkillIt": {}})
    past = Past(100, 200, {}, 1e-3, parts={"task": 0.75, "text": 0.25})
    steering.ask(past, {"SkillIt": {"task": 0.0, "text": math.log(5)}})
    assert steering.source_weight == {"task": pytest.approx(0.5), "text": pytest.approx(2.5)}


def test_the_whole_loss_keeps_its_size_in_a_run(tiny_model, tokenizer, rows):
    graph = (("Replay:text", "task", 0.5),)
    plan = [Replay(share=0.3, max_tokens=32), SkillIt(cut=0.25, every=2, graph=graph)]
    got = run(plan, tiny_model(), tokenizer, rows, 6)
    weights, parts = got.session.steering.source_weight, got.session.held_out.parts
    assert math.isclose(sum(parts[n] * w for n, w in weights.items()), 1) and math.isclose(sum(parts.values()), 1)
    assert max(parts.values()) > 2 * min(parts.values()) and not math.isclose(sum(weights.values()), 3, rel_tol=1e-2)


def test_what_cannot_work_is_refused(tiny_model, tokenizer, rows):
    with pytest.raises(PlanError, match="rows to look at of task alone"):
        run([SkillIt(every=1)], tiny_model(), tokenizer, rows, 4)
    with pytest.raises(PlanError, match="SkillIt names 'text'"):
        run([SkillIt(every=1, share=0.3, cut=0.3, targets=("text",))], tiny_model(), tokenizer, rows, 4)
    with pytest.raises(PlanError, match="in a run of 100 it never would"):
        SkillIt().prepare(Context(None, None, total_steps=100))


@pytest.mark.parametrize("wrong", [{"eta": -1.0}, {"window": 0}, {"cut": 0.0}, {"graph": (("a", "b"),)}])
def test_values_that_make_no_sense(wrong):
    with pytest.raises(PlanError, match="SkillIt"):
        SkillIt(**wrong).check(None)


def test_rows_that_are_looked_at_are_no_first_ones_and_own_text_is_cut(tiny_model, tokenizer, rows, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": f"The {n}th day was long. " * 20}) + "\n" for n in range(12)))
    ctx, method = (
        Context(tiny_model(), tokenizer, max_length=32),
        SkillIt(share=0.5, cut=0.6, rows=3, sources=(str(path),)),
    )
    mix = method.data(Mix(token_rows(rows, tokenizer)), ctx)
    assert all(len(r.ids) <= 32 for r in mix.sources[0].rows)
    held, found = mix.held_out(), method.held_out(mix, ctx)
    assert all(len(found[n]) == 3 < len(held[n]) for n in held)
    assert any([r.key for r in found[n]] != [r.key for r in held[n][:3]] for n in held)
