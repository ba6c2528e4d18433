"""A recipe checked on its real model and data, the cheap before the dear.

Nothing is written but the rows in the cache, and nothing is measured or trained.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from holdfast import models
from holdfast.data.mix import Order
from holdfast.data.sets import sets_of
from holdfast.data.task import TaskData, read_task
from holdfast.data.weights import weighted
from holdfast.errors import PlanError, RecipeError
from holdfast.hosts.compiled import check_compiled
from holdfast.hosts.course import check_course
from holdfast.hosts.eight_bits import check_eight_bits
from holdfast.hosts.plain import Training
from holdfast.measure.probe import Ask
from holdfast.measure.soft_prompt import check_export
from holdfast.measure.suites import check_suite
from holdfast.plan import Host, Plan
from holdfast.recipe import Recipe
from holdfast.runs.abilities import certain, measured_suites
from holdfast.runs.budget import why_none
from holdfast.runs.checks import (
    check_budget,
    check_looks,
    check_merge,
    check_metric,
    check_model,
    check_search,
    check_settings,
    check_source,
)
from holdfast.runs.handover import check_fits
from holdfast.runs.rate import ROWS, STEPS, Rate, auto
from holdfast.runs.run import Run
from holdfast.runs.work import Job
from holdfast.services import Context
from holdfast.session import Session
from holdfast.sites import replace


def default_plan() -> list[Any]:
    """What `holdfast tune` uses when the recipe names no plan; chosen in docs/leaderboard.md."""
    from holdfast.methods import ICLAnchor, LoRA

    return [LoRA(), ICLAnchor()]


def checked(run: Run) -> Job:
    """Check settings, plan, rows, prompts and weights, in this order.

    Raises:
        HoldfastError: one clear message for anything that a user can mend.
    """
    check_settings(run)
    plan = _plan(run.recipe)
    spec = run.recipe.model
    with run.timed("load"):
        run.tell("load", 0.0, spec.model_name_or_path)
        source = models.resolve(spec.model_name_or_path, spec.model_revision)
        check_source(source)
        check_fits(run.recipe, plan, source)
        tokenizer = models.load_tokenizer(source, spec.trust_remote_code)
        longest = models.context_length(source, spec.trust_remote_code)
        stops, tell = models.stop_tokens(source), lambda words: run.tell("load", 0.0, words)
        task = read_task(run.recipe, tokenizer, run.base_dir, longest, stops, tell)
        ask = _ask(run.recipe, tokenizer, task)
        for suite in certain(run.recipe):
            check_suite(suite, ask, longest)
        model = base_of(run, source)
        check_model(run, source, model, tokenizer, plan)
    session = _session(run, plan, model, tokenizer, task, longest)
    mix = session.mix(task.token_rows, order_of(run))
    session.ctx.total_steps = steps = _steps(run.recipe, session, mix)
    check_looks(run.recipe, task, session)
    check_budget(run.recipe, session)
    check_search(run.recipe, task, session)
    epoch = math.ceil(mix.num_rows(1.0) / _size(run.recipe))
    rate = _rate(run.recipe, session, steps, len(task.validation))
    training = _training(run, model, steps, epoch, rate)
    check_course(training)
    suites = measured_suites(run.recipe, task.token_rows, steps, ask, longest, task.chat)
    job = Job(run, source, model, tokenizer, task, session, training, rate, mix, suites)
    return dataclasses.replace(job, unheld=why_none(job))


def base_of(run: Run, source: models.ModelSource) -> Any:
    """The base of a run, to be changed at will: a copy of the one that its runs share, or loaded."""
    if run.bases:
        return run.bases.load(run.recipe, source, load)
    return load(run.recipe, source, merge_adapter=True)[0]


def load(recipe: Recipe, source: models.ModelSource, *, merge_adapter: bool) -> tuple[Any, Any]:
    """(model, tokenizer) of `source`, loaded as the recipe says."""
    spec = recipe.model
    plain = spec.dtype == "auto" and recipe.training.bf16 is False
    return replace.load(
        source,
        dtype="float32" if plain else spec.dtype,
        trust_remote_code=spec.trust_remote_code,
        attn_implementation=spec.attn_implementation,
        merge_adapter=merge_adapter,
        load_in_4bit=spec.load_in_4bit,
    )


def _plan(recipe: Recipe) -> Plan:
    """The plan, checked as far as that needs no model."""
    plan = Plan(default_plan()) if recipe.plan is None else Plan.from_recipe(recipe.plan)
    plan.check_together()
    check_merge(recipe, plan)
    check_eight_bits(recipe.training.optim, plan)
    check_compiled(recipe.training.torch_compile, plan)
    if recipe.model.load_in_4bit:
        plan.check_host(_host(recipe))
        models.may_load_in_4bit()
    return plan


def _host(recipe: Recipe) -> Host:
    return Host("holdfast tune", quantised=recipe.model.load_in_4bit)


def _ask(recipe: Recipe, tokenizer: Any, task: TaskData) -> Ask:
    return Ask(tokenizer, recipe.measure.num_fewshot, recipe.measure.limit, labels=task.names)


def _session(run: Run, plan: Plan, model: Any, tokenizer: Any, task: TaskData, longest: int) -> Session:
    """The plan on the real model, all of it checked."""
    t, most = run.recipe.training, min(run.recipe.data.max_length, longest)
    ctx = Context(model, tokenizer, t.seed, task.train, max_length=most, base_dir=run.base_dir)
    ctx.taught = run.bases.taught if run.bases else None
    if t.packing and any(m.trains_prompt for m in plan.active):
        plan.check(Host("training.packing: true", packing=True), ctx)
    plan.check(_host(run.recipe), ctx)
    for m in plan.active:
        if m.trains_prompt:
            check_metric(task, m.name)
            check_export(model, tokenizer, m.name, m.prefix)
    return Session(plan, model, ctx, compute_dtype=model.dtype, knows_rows=True, packing=t.packing is not False)


def _steps(recipe: Recipe, session: Session, mix: Any) -> int:
    """Optimizer steps of the whole run, at least one for each stage."""
    t = recipe.training
    steps = t.max_steps if t.max_steps > 0 else math.ceil(mix.num_rows(t.num_train_epochs) / _size(recipe))
    if steps < len(session.stages):
        owner = next(m.name for m in session.plan.active if "stages" in m.sites())
        raise PlanError(
            f"{owner} splits the run into {len(session.stages)} stages, but the run has {steps} step.",
            "Raise training.max_steps or num_train_epochs, or lower the batch size.",
        )
    return steps


def order_of(run: Run) -> Order | None:
    """The order that the weights of the training sets ask for, if there are any."""
    sets = sets_of(run.recipe.data, "train", run.base_dir)
    weights = {one.name: one.source.weight for one in sets if one.source.weight}
    return weighted(weights) if weights else None


def _size(recipe: Recipe) -> int:
    """Rows of a step."""
    return recipe.training.per_device_train_batch_size * recipe.training.gradient_accumulation_steps


def _rate(recipe: Recipe, session: Session, steps: int, rows: int) -> Rate:
    """The peak learning rate, given or found; for a search the one it begins at, and what it will cost."""
    given = recipe.training.learning_rate
    if not isinstance(given, str):
        return Rate(given, "the recipe says so")
    found = auto(session.plan, session.model)
    if given == "auto":
        return found
    cost = f"3 or 4 trials of {min(STEPS, steps)} steps before the {steps} of the run"
    why = f"search: around this, by {cost}, each judged by up to {min(ROWS, rows)} validation rows"
    return Rate(found.value, why)


def _training(run: Run, model: Any, steps: int, epoch: int, rate: Rate) -> Training:
    t = run.recipe.training
    if model.dtype == torch.float16 and not t.bf16:  # packed weights may bring it
        what = "The model computes in float16, and training in it needs its losses scaled, which is not done here."
        raise RecipeError(what, "Set training.bf16: true, or name a copy in bfloat16 or float32.")
    half = model.dtype if model.dtype == torch.bfloat16 else None
    return Training(
        num_steps=steps,
        batch_size=t.per_device_train_batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        learning_rate=rate.value,
        lr_scheduler_type=t.lr_scheduler_type,
        lr_scheduler_kwargs=t.lr_scheduler_kwargs,
        warmup_steps=t.warmup_steps,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        adam_beta1=t.adam_beta1,
        adam_beta2=t.adam_beta2,
        adam_epsilon=t.adam_epsilon,
        optim=t.optim,
        seed=t.seed if t.data_seed is None else t.data_seed,  # of the order of rows (and of dropout)
        autocast=torch.bfloat16 if t.bf16 else half,
        save_steps=t.save_steps if t.save_strategy == "steps" else epoch,
        logging_steps=t.logging_steps if model.device.type == "cuda" else 1,  # to read a loss on a CPU costs nothing
        folder=run.path,
        torch_compile=t.torch_compile,
    )
