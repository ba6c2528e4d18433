"""The optimizer of a trainer, where a plan sets learning rates of its own or the user brought one."""

from __future__ import annotations

from typing import Any

import torch

from holdfast.errors import PlanError
from holdfast.hosts.eight_bits import keep_embeddings
from holdfast.session import Session


def has_rates(s: Session) -> bool:
    """Whether a method or the stage sets learning rates of its own."""
    factors = any(m.lr_factor(n, s.num_layers, s.state_of(m)) != 1 for m in s.methods for n in s.params)
    return factors or s.stage.learning_rate is not None


def grouped(trainer: Any, session: Session) -> Any:
    """The trainer's optimizer over the plan's groups, which have learning rates of their own."""
    kind, settings = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(
        trainer.args, trainer.model
    )
    if not (isinstance(kind, type) and {"params", "model", "optimizer_dict"}.isdisjoint(settings)):
        raise PlanError(
            f"A method of the plan sets learning rates, but optim={trainer.args.optim!r} makes its own groups.",
            "Use optim='adamw_torch'.",
        )
    if settings.get("optim_bits") == 8:  # as the trainer does for groups of its own
        keep_embeddings(trainer.model)
    settings = {k: v for k, v in settings.items() if k != "lr"}
    return kind(session.param_groups(trainer.args.learning_rate, trainer.args.weight_decay), **settings)


def check_holds(optimizer: torch.optim.Optimizer, session: Session) -> None:
    """Raise PlanError for an optimizer, made before the plan chose what trains, that holds the wrong weights."""
    if has_rates(session):
        raise PlanError(
            "A method of the plan sets learning rates of its own, but you passed a ready optimizer.",
            "Leave `optimizers` out and choose with args.optim or optimizer_cls_and_kwargs.",
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in session.params.items() if id(p) not in held]
    if missing:
        raise PlanError(
            f"The optimizer you passed lacks {len(missing)} weights the plan trains, such as {missing[0]}.",
            "Leave `optimizers` out and choose with args.optim or optimizer_cls_and_kwargs.",
        )
