"""Runs of one process share the base: it is loaded once, and each begins with it as if it were alone."""

import json

import pytest
import torch
from safetensors.torch import load_file

from holdfast.methods import LoRA
from holdfast.recipe import recipe_from
from holdfast.runs import bases, job
from holdfast.runs.run import Run
from holdfast.services import Context, Teacher
from holdfast.verbs.tune import tune, tune_seeds
from tiny_run import recipe_data

PLANS = {"plain": [], "LoRA": [{"LoRA": {"r": 2}}], "modules": ["ControlLLM"], "teacher": ["LoRA", "KLToBase"]}


def asked(world, out, plan="LoRA", **training):
    measure = {"suites": ["language"], "limit": 2, "num_fewshot": 0, "keep": {"language": 0.9}}
    training = {"max_steps": 2, "learning_rate": 0.003, **training}
    return recipe_from(recipe_data(world, out, measure=measure, training=training, plan=PLANS[plan]))


def numbers(model):
    """Every weight and buffer, those too that no file holds."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def test_a_copy_is_a_fresh_load_whatever_was_done_to_the_one_before(world, tmp_path):
    recipe = asked(world, tmp_path)
    source = job.models.resolve(str(world.base))
    shared, (fresh, _) = bases.Bases(), job.load(recipe, source, merge_adapter=True)
    first = shared.load(recipe, source, job.load)
    LoRA().adapt(first, Context(first, None), {})
    with torch.no_grad():
        for p in first.parameters():
            p.add_(1.0)
    first.config.use_cache = not first.config.use_cache
    second = shared.load(recipe, source, job.load)
    assert [n for n, _ in second.named_modules()] == [n for n, _ in fresh.named_modules()]
    mine, theirs = numbers(second), numbers(fresh)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert all(mine[k].requires_grad == theirs[k].requires_grad for k in mine)
    assert second.config.to_dict() == fresh.config.to_dict()
    assert second.generation_config.to_dict() == fresh.generation_config.to_dict() and not second.training
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (second, fresh)]
    assert tied[0] == tied[1]


@pytest.mark.parametrize("plan", PLANS)
def test_seeds_train_what_they_train_alone(world, tmp_path, monkeypatch, plan):
    """Each run of `tune --seeds` gives the weights of the same run by itself, to the last bit, from one load."""
    loads, real = [], job.load
    monkeypatch.setattr(job, "load", lambda *a, **k: loads.append(1) or real(*a, **k))
    tune_seeds(asked(world, tmp_path / "all", plan), 2)
    assert len(loads) == 1
    alone = asked(world, tmp_path / "alone", plan, seed=1)
    tune(alone.model_copy(update={"data": alone.data.model_copy(update={"seed": 0})}))
    one, other = (next((tmp_path / p / "model").glob("*.safetensors")) for p in ("all/seed-1", "alone"))
    mine, theirs = load_file(one), load_file(other)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    said = [json.loads((tmp_path / p / "training.json").read_text())["loss"] for p in ("all/seed-1", "alone")]
    assert said[0] == said[1]


def test_another_base_is_loaded(world, tmp_path, tiny_model, tokenizer):
    other = tmp_path / "other"
    job.models.save_model(tiny_model(layers=1), tokenizer, other, card=None)
    shared, recipe = bases.Bases(), asked(world, tmp_path)
    layers = [
        shared.load(recipe, job.models.resolve(str(p)), job.load).config.num_hidden_layers for p in (world.base, other)
    ]
    assert layers == [2, 1]


def test_without_room_each_run_loads(world, tmp_path, monkeypatch):
    loads, real = [], job.load
    monkeypatch.setattr(job, "load", lambda *a, **k: loads.append(1) or real(*a, **k))
    monkeypatch.setattr(bases, "free_memory", lambda: 1000.0)
    shared, recipe = bases.Bases(), asked(world, tmp_path)
    models = [shared.load(recipe, job.models.resolve(str(world.base)), job.load) for _ in range(2)]
    assert len(loads) == 2 and models[0] is not models[1]


def test_answers_to_the_same_rows_are_taken_and_others_are_not(tiny_model, tokenizer, rows):
    from holdfast.data.tokens import tokenize_all

    model, taught = tiny_model(), {}
    some = tokenize_all(rows[:6], tokenizer, 64)
    forwards = []
    for asked_rows in (some, some, some[:3]):
        teacher = Teacher(model)
        teacher.learn(model, asked_rows, taught=taught)
        forwards.append(teacher.num_forwards)
        alone = Teacher(model)
        alone.learn(model, asked_rows)
        assert torch.equal(teacher.logp(model, asked_rows), alone.logp(model, asked_rows))
    assert forwards[0] > 0 and forwards[1] == 0 and forwards[2] > 0


def test_runs_of_other_rates_share_what_the_teacher_said(world, tmp_path, monkeypatch):
    asked_for, real = [], Teacher._learnt
    monkeypatch.setattr(Teacher, "_learnt", lambda *a: asked_for.append(1) or real(*a))
    shared = bases.Bases()
    for rate in (0.001, 0.01):
        one = job.checked(Run(asked(world, tmp_path, "teacher", learning_rate=rate), tmp_path, bases=shared))
        one.session.prepare(one.task.token_rows[:4])
    assert len(asked_for) == 1
