"""The reference loop: what a plan means, on one screen. `hosts/hf.py` must give the same weights.

It is also the fast one: rows packed without padding, logits only where something is scored, what trains in fp32 and
what is frozen in the compute dtype. Several processes share the rows of a step and take the steps of one
(`hosts/processes.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting

from holdfast.engine.counts import count_rows
from holdfast.engine.forward import through_backward
from holdfast.engine.pack import TokenRow
from holdfast.hosts import processes
from holdfast.hosts.checkpoint import Checkpoint
from holdfast.hosts.compiled import Compiled
from holdfast.hosts.course import course
from holdfast.hosts.early import STEPS, Early, norm_of
from holdfast.hosts.eight_bits import NAMES, eight_bits
from holdfast.hosts.losses import Losses, Parts, numbers
from holdfast.hosts.master import MasterAdamW, linear_weights, may_hold
from holdfast.hosts.watching import Watch
from holdfast.method import Stage
from holdfast.session import Session


@dataclass
class Training:
    """The settings of a run, under their Hugging Face names; `num_steps` is decided by the caller."""

    num_steps: int
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 3e-4
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: Mapping[str, Any] = field(default_factory=dict)
    warmup_steps: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    optim: str = "adamw_torch_fused"
    seed: int = 0
    autocast: torch.dtype | None = None
    save_steps: int = 50
    logging_steps: int = 1  # losses are read, and looked at, every so many steps: to read is to wait for the device
    folder: Path | None = None
    watch: Watch | None = None
    torch_compile: bool = False

    @property
    def keep_best(self) -> bool:
        """Whether the best weights of the run are kept beside the latest."""
        return self.watch is not None and self.watch.keep_best


@dataclass
class Log:
    """What happened: per-step loss parts, and totals."""

    loss: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    realised: Counter[str] = field(default_factory=Counter)
    ended: str = ""  # why the run ended early
    looks: list[tuple[int, float | None, dict[str, float]]] = field(default_factory=list)  # step, rank, finding
    rate: float = 0.0  # learning rate of the latest step
    norm: torch.Tensor | None = None  # of its gradients, where they are clipped
    early: Early = field(default_factory=Early)


def train(
    session: Session,
    mix: Any,
    settings: Training,
    *,
    on_step: Callable[[int, int, dict[str, float]], None] | None = None,
    evaluate: Callable[[Any], float] | None = None,
    log: Log | None = None,
) -> Log:
    """Train `session.model` on `mix`, stage after stage; resumes from `settings.folder` when it holds a checkpoint.

    on_step is called with (step, steps of the run, loss parts) of every step, when its loss is read; evaluate with the
    model, higher is better, for stages that keep their best checkpoint. `log` is filled as the run goes, for who looks
    on.
    """
    loop = _Loop(session, mix, settings, log or Log(), Checkpoint(settings.folder), on_step, evaluate)
    torch.manual_seed(settings.seed)  # dropout: the same whatever ran before
    for stage, steps in split_steps(session.stages, settings.num_steps):
        loop.stage(stage, steps)
        if loop.log.ended:
            break
    session.effects = processes.union(session.effects)
    session.model.eval()
    return loop.log


@dataclass
class _Loop:
    """The parts of one run, and how many steps the stages so far had."""

    session: Session
    mix: Any
    settings: Training
    log: Log
    checkpoint: Checkpoint
    on_step: Callable[[int, int, dict[str, float]], None] | None
    evaluate: Callable[[Any], float] | None
    losses: Losses = field(default_factory=Losses)
    done: int = 0
    compiled: Compiled | None = None  # the blocks of the stage's model

    def stage(self, stage: Stage, steps: int) -> None:
        """Train one stage, from its beginning or from where the checkpoint stands in it."""
        session, settings, log, checkpoint, done = self.session, self.settings, self.log, self.checkpoint, self.done
        optimizer, schedule, first = self._begin(stage, steps)
        size = settings.batch_size * settings.gradient_accumulation_steps
        stream = islice(self.mix.only(*stage.draws).draw(settings.seed), (done + first) * size, None)
        if settings.watch:
            settings.watch.begin(session, checkpoint, log)
        start = time.perf_counter()
        for step in range(first, steps):
            session.begin_step(done + step, optimizer)
            batch = session.pick(list(islice(stream, size)), done + step)
            with self.compiled.on() if self.compiled else nullcontext():
                parts = _step(session, optimizer, batch, done + step, settings, log)
            self.losses.add(done + step, parts)
            schedule.step()
            rates = bool(stage.keep_best and self.evaluate) and (step + 1) % max(1, steps // 4) == 0
            saves = settings.save_steps > 0 and (step + 1) % settings.save_steps == 0 and step + 1 < steps
            self._read(done + step + 1, rates or saves or step + 1 == steps)
            if settings.watch:
                settings.watch.after(done + step + 1, settings.num_steps, session, checkpoint, log)
            log.ended = session.steering.ended or log.ended
            if log.ended:
                break
            if rates and self.evaluate:
                checkpoint.consider(session, self.evaluate(session.model))
                session.model.train()
            if saves:
                log.seconds, start = log.seconds + time.perf_counter() - start, time.perf_counter()
                checkpoint.save(session, optimizer, schedule, log, done, step + 1)
        if isinstance(optimizer, MasterAdamW):
            optimizer.release()
        checkpoint.take_best(session)
        log.seconds += time.perf_counter() - start
        self.done += steps
        if not log.ended and self.done < settings.num_steps and first < steps:
            session.end_stage()
            checkpoint.save(session, None, None, log, self.done, 0)

    def _begin(self, stage: Stage, steps: int) -> tuple[torch.optim.Optimizer, Any, int]:
        """Optimizer, schedule and the stage's first step that is still to do."""
        session, settings = self.session, self.settings
        model = session.enter(stage)
        session.first, session.total = self.done, settings.num_steps
        session.epoch_steps = self.mix.num_rows(1) / (settings.batch_size * settings.gradient_accumulation_steps)
        self.checkpoint.follow(session)
        optimizer = _optimizer(session, settings, stage)
        session.hook(optimizer)
        schedule = course(optimizer, steps, settings)
        first = self.checkpoint.restore(session, optimizer, schedule, self.log, self.done, steps)
        processes.agree(self.done + first, settings.folder)
        processes.same_start(session.tensors())
        session.chosen.combine(session.params)
        model.train()
        self.compiled = Compiled(model) if settings.torch_compile else None
        return optimizer, schedule, first

    def _read(self, now: int, must: bool) -> None:
        """Read and tell the losses up to step `now` of the run, when it is time to or somebody needs them."""
        settings = self.settings
        looks = settings.watch is not None and now % settings.watch.every == 0
        if not (must or looks or self.session.steering.ended or now % settings.logging_steps == 0):
            return
        for at, parts in self.losses.read():
            self.log.loss.append((at, parts))
            if self.on_step:
                self.on_step(at + 1, settings.num_steps, parts)


def _optimizer(session: Session, settings: Training, stage: Stage) -> torch.optim.Optimizer:
    groups = session.param_groups(settings.learning_rate, settings.weight_decay)
    peak = stage.learning_rate or settings.learning_rate  # what some schedules end at is a part of it
    settled: Any = {"lr": peak, "betas": (settings.adam_beta1, settings.adam_beta2), "eps": settings.adam_epsilon}
    if may_hold(session, settings, stage):
        return MasterAdamW(groups, linear_weights(session.model), **settled)
    if settings.optim in NAMES:
        return eight_bits(session.model, groups, settings.optim, **settled)
    return torch.optim.AdamW(groups, fused=settings.optim == "adamw_torch_fused", **settled)


def _step(
    session: Session, optimizer: Any, batch: Sequence[TokenRow], step: int, settings: Training, log: Log
) -> Sequence[Parts]:
    """One optimizer step: micro-batches, gradients, clipping, update. Returns the parts of each micro-batch's loss."""
    batch, answered = session.roll(batch, step)
    asides, params = [*session.rows_of(step), *answered], list(session.params.values())
    counts = count_rows((*batch, *asides))
    for row in (*batch, *asides):
        log.realised[f"{row.source}/examples"] += 1
        log.realised[f"{row.source}/tokens"] += len(row.ids)
        log.tokens += len(row.ids)
    found: list[Parts] = []
    processes.seed(settings.seed, step)
    autocast = settings.autocast is not None
    # PEFT would widen every input to the adapter's fp32, and autocast narrow it again: same numbers, two copies less
    with disable_input_dtype_casting(session.model, active=autocast):
        micros, share = processes.deal(batch, asides, settings.gradient_accumulation_steps)
        for rows in micros:
            device = next(session.model.parameters()).device.type
            with ExitStack() as kept:
                with torch.autocast(device, settings.autocast or torch.bfloat16, enabled=autocast):
                    kept.enter_context(through_backward(session.model, rows, session.packing))
                    loss, here = session.loss(session.model, rows, counts, step, share)
                loss.backward()
            found.append(here)
    parts = processes.add_up(params, found)
    log.rate = optimizer.param_groups[0]["lr"]
    if session.steering.methods:
        session.steer(step, numbers(parts), log.rate)
    session.change_gradients()
    if settings.max_grad_norm and isinstance(optimizer, MasterAdamW):
        log.norm = optimizer.clip(params, settings.max_grad_norm)
    elif settings.max_grad_norm:
        log.norm = torch.nn.utils.clip_grad_norm_(params, settings.max_grad_norm, foreach=True)
    if step < STEPS:
        log.early.add(step, norm_of(params) if log.norm is None else log.norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return parts


def rows_of_run(session: Session, mix: Any, settings: Training) -> Iterator[TokenRow]:
    """The rows that a run draws, in order, stage after stage."""
    size, done = settings.batch_size * settings.gradient_accumulation_steps, 0
    for stage, steps in split_steps(session.stages, settings.num_steps):
        yield from islice(mix.only(*stage.draws).draw(settings.seed), done * size, (done + steps) * size)
        done += steps


def split_steps(stages: Sequence[Stage], total: int) -> list[tuple[Stage, int]]:
    """Give each stage its share of the steps, at least one while there are any; the last takes the rest."""
    whole, out, left = sum(s.share for s in stages), [], total
    for n, stage in enumerate(stages):
        later = len(stages) - 1 - n
        steps = max(1, min(round(total * stage.share / whole), left - later)) if later else left
        out.append((stage, min(steps, left)))
        left -= out[-1][1]
    return out
