"""What is looked at before any long work, so that nothing fails after hours that could have been told at once."""

from __future__ import annotations

from typing import Any

import torch

from holdfast import models
from holdfast.data.metric import metric_of
from holdfast.data.task import TaskData
from holdfast.errors import ModelError, PlanError, RecipeError
from holdfast.method import Method
from holdfast.plan import Host
from holdfast.recipe import Recipe
from holdfast.runs.abilities import certain
from holdfast.runs.handover import check_asked
from holdfast.runs.run import Run
from holdfast.runs.tracking import check_trackers
from holdfast.session import Session


def check_settings(run: Run) -> None:
    """Refuse settings that `holdfast tune` cannot follow: they are never skipped.

    Raises:
        HoldfastError: a setting cannot be followed, or contradicts another.
    """
    recipe, t = run.recipe, run.recipe.training
    _check_floors(recipe)
    check_trackers(t.report_to)
    check_asked(recipe)
    if t.save_total_limit != 1:
        raise RecipeError(
            f"training.save_total_limit is {t.save_total_limit}, but holdfast tune keeps one checkpoint.",
            "Remove training.save_total_limit.",
        )
    if recipe.export.merge and recipe.model.load_in_4bit:
        raise RecipeError(
            "export.merge is true, but model.load_in_4bit would round the merged weights to 4 bits again.",
            "Remove export.merge; merge the adapter into the unquantised base afterwards.",
        )
    if recipe.model.dtype == "float16" and not t.bf16:
        what = "model.dtype is float16, and training in it needs its losses scaled, which is not done here."
        raise RecipeError(what, "Write model.dtype: float32 (or auto), or training.bf16: true.")
    if t.bf16 is False and recipe.model.dtype == "bfloat16":
        raise RecipeError("training.bf16 is false, but model.dtype is bfloat16.", "Remove one of the two.")
    if recipe.export.folder and not (run.path / "training.json").is_file():
        models.may_replace(None, run.export.expanduser().resolve())


def _check_floors(recipe: Recipe) -> None:
    """Raise HoldfastError for an unknown suite, and for a share to keep of what is none: it would hold nothing."""
    names = certain(recipe)
    unknown = next((k for k in recipe.measure.floors if k not in names), None)
    if unknown is not None:
        what = f"measure.keep (--keep) names {unknown!r}, but only {', '.join(names)} is measured."
        raise RecipeError(what, "Name single suites, and those that are measured.")


def check_merge(recipe: Any, plan: Any) -> None:
    """Raise RecipeError where export.merge asks for what the plan's replaced modules cannot become."""
    for m in plan.active:
        if recipe.export.merge and "replace" in m.sites() and type(m).merged is Method.merged:
            raise RecipeError(
                f"export.merge is true, but what {m.name} trains cannot be folded into the weights of the base.",
                "Remove export.merge; the export is loaded by holdfast.load.",
            )
        if recipe.export.dtype != "auto" and "replace" in m.sites() and not recipe.export.merge:
            raise RecipeError(
                f"export.dtype is {recipe.export.dtype}, but what {m.name} trains is kept in the type of the base.",
                "Remove export.dtype, or write model.dtype.",
            )


def check_source(source: Any) -> None:
    """Raise ModelError for a model that nothing can be trained on."""
    below = source
    while below is not None:
        if below.kind == "replaced":
            what = f"{below.label} holds replaced modules, on which nothing can be trained further."
            raise ModelError(what, "Tune its base, or a model that was exported whole.")
        below = below.base


def check_model(run: Run, source: Any, model: Any, tokenizer: Any, plan: Any) -> None:
    """Raise HoldfastError for a model that `plan` cannot train, that computes nothing, or that cannot be saved."""
    _may_train(run, source, model, plan)
    bad = not_finite(model)
    if bad:
        what = f"The weight {bad} of {source.name} is not finite, so the model can give no probabilities."
        raise ModelError(what, "Copy or download the model again.")
    check_saving(model, tokenizer, source.name)


def check_metric(task: TaskData, owner: str) -> None:
    """Raise PlanError for a metric of written text beside a soft prompt, which generation does not read."""
    if metric_of(task.metric).asked == "text":
        what = f"{owner} learns a soft prompt, but text for data.metric {task.metric} is written without it."
        raise PlanError(what, f"Write data.metric: loss, or remove {owner}.")


def check_budget(recipe: Recipe, session: Session) -> None:
    """Raise PlanError for a change that cannot be taken back in part."""
    owner = next((m.name for m in session.methods if "replace" in m.sites()), None)
    if recipe.measure.budget and owner:
        what = f"measure.budget takes back a part of the change, and {owner} puts new modules in the model's place."
        raise PlanError(what, f"Remove measure.budget (--keep), or {owner}.")


def check_looks(recipe: Recipe, task: TaskData, session: Session) -> None:
    """Refuse looks during training that see nothing, mix up the stages of a plan, or choose what is undone.

    Raises:
        HoldfastError: no validation rows, no look before the end, a plan of several stages, or an average beside the
            best look's weights.
    """
    every, steps = recipe.training.eval_steps, session.ctx.total_steps
    if every is None:
        return
    if every > steps:
        what = f"training.eval_steps looks every {every} steps, and the run has {steps}: there would be no look."
        raise RecipeError(what, "Lower eval_steps, or train longer.")
    if not task.validation:
        what = "training.eval_steps asks for looks at validation rows, and there are none."
        raise RecipeError(what, "Give data.validation or data.validation_size.")
    if len(session.stages) > 1:
        owner = next(m.name for m in session.plan.active if "stages" in m.sites())
        what = f"training.eval_steps compares looks over the whole run, but {owner} splits it into stages."
        raise PlanError(what, f"Remove training.eval_steps, or {owner}.")
    owner = next((m.name for m in session.methods if type(m).settled is not Method.settled), None)
    if owner and recipe.training.load_best_model_at_end:
        what = "training.load_best_model_at_end keeps the weights of the best look, but"
        raise PlanError(f"{what} {owner} ends with an average along training.", "Keep one of them.")


def check_search(recipe: Recipe, task: TaskData, session: Session) -> None:
    """Refuse a search of the learning rate that cannot judge, or that one rate does not answer.

    Raises:
        HoldfastError: no validation rows, or a plan of several stages.
    """
    if recipe.training.learning_rate != "search":
        return
    if not task.validation:
        what = "training.learning_rate: search judges rates by validation rows, and there are none."
        raise RecipeError(what, "Give data.validation or data.validation_size, or write auto.")
    if len(session.stages) > 1 or session.stage.learning_rate is not None:
        owner = next(m.name for m in session.plan.active if "stages" in m.sites())
        what = f"training.learning_rate: search tries one rate for the whole run, but {owner} splits it into stages."
        raise PlanError(what, f"Write a number or auto, or remove {owner}.")


def _may_train(run: Run, source: Any, model: Any, plan: Any) -> None:
    """Packed weights cannot be trained themselves, nor take up an adapter."""
    if hasattr(model, "peft_config"):
        what = f"{source.label} is an adapter on quantised weights, which cannot take it up to be tuned further."
        raise ModelError(what, "Name the unquantised model as the base of the adapter.")
    if not models.is_packed(model):
        return
    kept = models.precision(model)
    if not getattr(getattr(model, "hf_quantizer", None), "is_trainable", True):
        what = f"{source.label} keeps its weights as {kept}, which nothing can be trained on."
        raise ModelError(what, "Tune the unquantised model.")
    plan.check_host(Host("holdfast tune", quantised=True))
    if run.recipe.export.merge:
        what = f"export.merge is true, but {source.name} keeps its weights in a few bits ({kept})."
        raise ModelError(what, "Remove export.merge, or tune the unquantised model.")


def not_finite(model: Any) -> str | None:
    """The first weight that holds NaN or infinity: every number computed from it would too."""
    return next((name for name, p in model.named_parameters() if not torch.isfinite(p).all()), None)


def check_saving(model: Any, tokenizer: Any, name: str) -> None:
    """Save everything but the weights to a folder that is thrown away: better now than after the training.

    Raises:
        ModelError: the configuration or the tokenizer cannot be saved.
    """
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="holdfast-") as folder:
        for what, part in (("configuration", model.config), ("tokenizer", tokenizer)):
            try:
                part.save_pretrained(folder)
            except OSError:  # no room in this folder says nothing about the one of the export
                return
            except Exception as e:  # values that JSON cannot hold, checks of transformers, custom code
                words = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
                raise ModelError(
                    f"The {what} of {name} cannot be saved ({words}), so the tuned model could not be exported.",
                    "Load and save it once with plain transformers, mend what fails there, and tune that.",
                ) from e
