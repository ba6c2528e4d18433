"""A plan inside a Hugging Face trainer: two lines of a script change, the import and the class.

    from holdfast import Plan, with_plan
    trainer = with_plan(SFTTrainer)(
        model=model, args=SFTConfig("out"), train_dataset=data, processing_class=tokenizer, plan=plan
    )
    trainer.train()

Every batch, padded or packed, becomes token rows (one per document), and `Session.loss` gives the loss, so the
weights equal those of `hosts/plain.py` for the same rows in the same order.

What the plan takes over: which weights train (LoRA belongs into the plan, not into `peft_config`), the training loss
and its scale, and, when a method has a `data` site, the order of the rows (`Mix.draw(args.data_seed or args.seed)`,
epoch after epoch). The user's own `requires_grad=False` is kept. The optimizer, its schedule, clipping, logging,
evaluation and checkpoints stay the trainer's; evaluation is the trainer's own loss, without the plan's terms.
SFTTrainer's entropy and token accuracy are not logged in training, because nothing computes them there.

What looks at the shape of a batch means what it means without a plan (`hf_noise`: NEFTune; `_count`: what a loss is
divided by), or is refused (`hf_refuse`, `hf_batches`). Before the first step both answer two rows (`hf_agree`).

Several processes (DDP): the rows a method asks for beside the task are the same for the whole step and are dealt over
its micro-batches and processes; a choice of rows (the batch site) is made on each process among its own.
FSDP2: the plan is prepared before the trainer cuts the weights, while the base lies on the host, memory-mapped, and
its blocks pass through each device one at a time (`engine/passing.py`); a method that looks at weights itself has the
whole base on the device. Then penalties work on the shards, and methods that need a whole matrix get it gathered, one
at a time.
Trainers with a loss of their own (DPO, GRPO): the plan may only freeze, wrap, change gradients or steps, and merge.
Resuming: build the trainer with the untouched base model again and call `train(resume_from_checkpoint=...)`; what the
plan knows of the base comes from there, the trained weights and the plan's state from the checkpoint.
Stages (ProMoT, LTSFT): one `train` of the trainer each, with its own optimizer and schedule; a stage ends with its
last weights, not its best. Where the plan mixes rows, a stage goes on in the mix; else the trainer's own sampler
begins each stage with the same first rows of its data, as it begins every `train`.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from holdfast.engine.counts import Counts, add_counts, count_rows, scaled
from holdfast.engine.forward import can_pack, forward, through_backward
from holdfast.engine.pack import TokenRow
from holdfast.engine.passing import stay
from holdfast.engine.processes import gather
from holdfast.engine.replaced import replaced_in
from holdfast.engine.trial import pads_right
from holdfast.engine.ways import SOFT_PROMPT, inner
from holdfast.errors import NoEffect, PlanError
from holdfast.hosts import hf_checkpoint
from holdfast.hosts.hf_agree import (
    Answer,
    asks_logits,
    bare_forward,
    plans_answer,
    refuse_other,
    some_of,
    trainers_answer,
    works_in_fp32,
)
from holdfast.hosts.hf_batches import placed_rows, rows_of
from holdfast.hosts.hf_mix import InOrder, mixed
from holdfast.hosts.hf_noise import Noise, Places
from holdfast.hosts.hf_optimizer import check_holds, grouped, has_rates
from holdfast.hosts.hf_refuse import refuse, refuse_built, refuse_optimizer
from holdfast.hosts.hf_setup import (
    by_name,
    context_of,
    default_args,
    fingerprint,
    host_of,
    load_named,
    place,
    rows_a_step,
    settle_tokenizer,
    stage_folder,
    steps_of,
)
from holdfast.hosts.hf_weights import refuse_lost, refuse_relabelled, take_weights
from holdfast.hosts.losses import Losses, numbers
from holdfast.hosts.plain import split_steps
from holdfast.hosts.processes import dealt
from holdfast.method import Stage
from holdfast.models.saving import save_replaced
from holdfast.plan import Plan
from holdfast.session import Session
from holdfast.sites.rollouts import is_task, said_row, unsaid

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

CARRIED = "holdfast"  # the key under which a batch carries its Micro to compute_loss
LOSSES = ("transformers.trainer", "trl.trainer.sft_trainer")  # whose compute_loss is plain cross-entropy


@cache
def with_plan(trainer: type) -> Any:
    """The trainer class with one more keyword argument, `plan`. Everything else is as in `trainer`.

    Args:
        trainer: transformers.Trainer, trl.SFTTrainer, or a subclass that keeps their loss; others with limits.

    Raises (when the trainer is built):
        PlanError: the plan, the trainer and its arguments cannot work together.
        ModelError: the model is not causal.
    """
    from transformers import Trainer

    if not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise PlanError(f"with_plan was given {trainer!r}, which is no trainer class.", "Try SFTTrainer.")
    owner = next(c for c in trainer.__mro__ if "compute_loss" in vars(c))
    ours = owner.__module__ in LOSSES
    body = {
        "__module__": trainer.__module__,
        "__doc__": trainer.__doc__,
        "_loss_is_ours": ours,
        "_kind": trainer,
    }
    if ours:
        body["loss_is_scaled_for_ga"] = True  # Session.loss divides by the whole step's tokens
    return type(trainer.__name__ + "WithPlan", (PlannedTrainer, trainer), body)


@dataclass(frozen=True)
class Micro:
    """One micro-batch: its rows, what each owner's loss is divided by, the step, its part of a penalty, its noise."""

    rows: Sequence[TokenRow]
    counts: Counts
    step: int
    share: float
    places: Places | None = None


def _idle(micro: Sequence[Sequence[TokenRow]]) -> list[TokenRow]:
    """A row without a target: every process takes part in every backward."""
    row = next(r for rows in micro for r in rows)
    return [TokenRow(row.ids, np.zeros_like(row.scored))]


class PlannedTrainer(_Base):
    """What `with_plan` puts before a trainer class. `session` holds the plan at work."""

    _loss_is_ours: bool
    _kind: type
    session: Session

    def __init__(self, *args: Any, plan: Plan, **kwargs: Any):
        given = by_name(self._kind, args, kwargs)
        given["args"] = options = given.get("args") or default_args(self._kind, given.get("model"))
        load_named(self._kind, given)
        self._weighed = take_weights(given)
        settle_tokenizer(given)
        model = given["model"]
        sharded = refuse(self._kind, plan, given, self._loss_is_ours)
        ctx = context_of(self._kind, plan, given)
        plan.check(host_of(self._kind, options, model), ctx)
        place(model, options, sharded)
        self._try(model, sharded)
        self.session = Session(plan, model, ctx, sharded=sharded)
        self._base = fingerprint(model)
        self._frozen = [p for p in model.parameters() if not p.requires_grad]
        self._own_optimizer = (given.get("optimizers") or (None,))[0] is not None
        self._losses, self._parts = Losses(), Counter[str]()  # not read yet; read since the last line of the log
        self._step, self._of_step = 0, Counter[str]()  # the step at hand and the parts of its loss
        self._known: Mapping[bytes, TokenRow] = self._weighed
        self._steps_in_parts = self._done = self._rows_an_epoch = 0
        self._total = 0  # steps of all stages; 0: of the only one
        self._hooked, self._changed, self._trained, self._sees_shards = None, False, False, False
        self._noise: Noise | None = None
        self._compared = False
        self.session.prepare()
        given["model"] = self._enter(self.session.stages[0])
        super().__init__(**given)
        refuse_built(self, self.session, self._kind.__name__, self._loss_is_ours)
        self.session.steering.late = self.accelerator.num_processes > 1
        kind = self._kind.__name__
        refuse_lost(self._weighed, self.train_dataset, kind)
        refuse_relabelled(self._weighed, self.train_dataset, self.data_collator)
        self._mixed = mixed(self.session, self.train_dataset, self.args, self.data_collator, kind, self._weighed)
        self._draw_from(self.session.stage)

    def _try(self, model: Any, sharded: bool) -> None:
        """Find out how the model may be run while its weights are whole in every process."""
        if sharded and self._loss_is_ours and not pads_right(model):
            raise PlanError(
                f"{self._kind.__name__} with FSDP runs several rows at once, but the results of a row of "
                f"{type(inner(model)).__name__} depend on its neighbours or on padding.",
                "Use DDP, which leaves the weights whole: then rows go one by one.",
            )
        can_pack(model)

    def _draw_from(self, stage: Stage) -> None:
        """The rows of a stage, where the plan mixes them."""
        mix = self._mixed.get(stage.draws)
        if mix:
            self.train_dataset, self._known, self._rows_an_epoch = mix.dataset, mix.known, mix.rows_an_epoch

    # ---- what trains

    def _enter(self, stage: Stage) -> Any:
        """Session.enter, and what the user froze stays frozen."""
        session = self.session
        model = session.enter(stage)
        for p in self._frozen:
            p.requires_grad_(False)
        session.params = {n: p for n, p in session.params.items() if p.requires_grad}
        if not session.params:
            raise NoEffect(
                "Every weight is frozen, by requires_grad=False or by the plan, so nothing would train.",
                "Freeze less.",
            )
        return model

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """The trainer's, without vectors that it does not know by name: the plan's own decay as little as norms do."""
        return [n for n in super().get_decay_parameter_names(model) if model.get_parameter(n).ndim >= 2]

    def create_optimizer(self, *args: Any) -> Any:
        if self.optimizer is None and has_rates(self.session):
            self.optimizer = grouped(self, self.session)
        optimizer = super().create_optimizer(*args)
        refuse_optimizer(optimizer, self.session.plan, self.is_deepspeed_enabled)
        if self._hooked is not optimizer and isinstance(optimizer, torch.optim.Optimizer):
            if self._own_optimizer:
                check_holds(optimizer, self.session)
            optimizer.register_step_pre_hook(self._before_step)  # first: it steers, and the session's hook obeys
            self.session.hook(optimizer)
            self._hooked = optimizer
        return optimizer

    # ---- a step

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The trainer's batches of one optimizer step, each carrying its rows."""
        self._see_shards()
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step, self._of_step = self._done + self.state.global_step, Counter()
        self.session.first, self.session.total = self._done, self._total or self.state.max_steps
        rows = self._rows_an_epoch or (len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else 0)
        self.session.epoch_steps = steps_of(self.args, rows) if rows else 0
        self.session.begin_step(self._step, self.optimizer)
        if not self._loss_is_ours or not batches:
            return batches, items
        self._compare(batches)
        self._carry(batches, items, self._step)
        self._steps_in_parts += 1
        return batches, items

    def _see_shards(self) -> None:
        """Once the weights are cut, and before a checkpoint or a step changes them."""
        if self.session.sharded and not self._sees_shards:
            self._reshard()
            self.session.see_shards()
            self._sees_shards = True

    def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer will cut the weights now, if it does at all: nothing of the base passes through any more."""
        if self.session.sharded:
            stay(self.session.model)
        return super()._wrap_model(model, *args, **kwargs)

    def _carry(self, batches: Sequence[Any], items: Any, step: int) -> None:
        """Give each batch of a step its Micro."""
        parsed = [placed_rows(b, self._known) for b in batches]
        drawn = [[row for row, _ in rows] for rows in parsed]
        rows, answered = self._roll(self._deal(drawn, step), step)
        asides = [*self.session.rows_of(step), *answered]
        counts = self._count(rows, asides, items if rows is drawn else None)
        first, ranks = self.accelerator.process_index, self.accelerator.num_processes
        every = len(batches) * ranks
        parts = dealt(asides, every)
        for n, batch in enumerate(batches):
            mine, at = parts[n * ranks + first], [at for _, at in parsed[n]]
            places = Places(tuple(batch["input_ids"].shape), at, [len(r.ids) for r in mine]) if rows is drawn else None
            batch[CARRIED] = Micro((*rows[n], *mine), counts[n], step, 1 / every, places)
            self._realise(batch[CARRIED].rows)

    def _compare(self, batches: Sequence[Any]) -> None:
        """Once, before the first step: what the trainer and the plan make of two rows must be the same."""
        if self._compared:
            return
        self._compared, model, was_training = True, self.model, self.model.training
        some, mixed = some_of(batches), self.accelerator.mixed_precision != "no"
        rounds = mixed and (self.is_fsdp_enabled or self.is_deepspeed_enabled or not works_in_fp32(inner(model)))
        model.eval()
        with torch.no_grad(), nullcontext() if rounds else bare_forward(model):
            own = self._own_answer(model, some)
            with self.accelerator.autocast() if rounds else nullcontext():
                plans = plans_answer(model, some)
        model.train(was_training)
        self._reshard()
        refuse_other(self._kind.__name__, own, plans, inner(model), rounds, some)

    def _own_answer(self, model: Any, batch: Mapping[str, Any]) -> Answer:
        """What the trainer without a plan makes of a batch."""
        inputs, asked = dict(self._prepare_inputs(dict(batch))), asks_logits(inner(model), batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # SFTTrainer's, about asking for logits
            out: Any = super().compute_loss(model, inputs, return_outputs=asked)
        getattr(self, "_metrics", {"eval": {}})["eval"].clear()  # SFTTrainer noted what it saw
        return trainers_answer(out[0], out[1], batch) if asked else Answer(out.item(), None)

    def _deal(self, micro: list[list[TokenRow]], step: int) -> Sequence[Sequence[TokenRow]]:
        """The batch site, on all rows of the step; what it picks is dealt over the micro-batches again."""
        drawn = [r for rows in micro for r in rows]
        picked = self.session.pick(drawn, step)
        if picked is drawn:
            return micro
        return [rows or _idle(micro) for rows in dealt(picked, len(micro))]

    def _roll(
        self, micro: Sequence[Sequence[TokenRow]], step: int
    ) -> tuple[Sequence[Sequence[TokenRow]], list[TokenRow]]:
        """The rollouts site, on the rows of all processes: those that are run, and the answered ones of the step."""
        if not self.session.rolling.methods:
            return micro, []
        own = [r for rows in micro for r in rows]
        every = [unsaid(said) for theirs in gather([said_row(r) for r in own]) for said in theirs]
        kept, answered = self.session.roll(every, step)
        if kept is every:
            return micro, answered
        task = [[r for r in rows if not is_task(r)] for rows in micro]
        return [rows or _idle(micro) for rows in task], answered

    def _count(self, micro: Sequence[Sequence[TokenRow]], asides: Sequence[TokenRow], items: Any) -> list[Counts]:
        """What the loss of each owner is divided by in each micro-batch: counts of the whole step.

        The task's positions are `items`, what the trainer counted, unless its rows were exchanged. Models that take no
        count get the mean of their micro-batches' means, as without a plan.
        """
        beside, own, ranks = count_rows(asides), [count_rows(rows) for rows in micro], self.accelerator.num_processes
        if not self.model_accepts_loss_kwargs:
            return [add_counts(beside, scaled(c, len(micro) * ranks)) for c in own]
        whole, shared = add_counts(*own), ranks > 1 and self.args.average_tokens_across_devices
        if shared:
            whole = add_counts(*gather(whole))
        if items is not None:
            whole["task"] = int(items)
        if ranks > 1 and not shared:
            whole = scaled(whole, ranks)  # the user wants the mean of each process's own mean
        return [add_counts(beside, whole)] * len(micro)

    def _realise(self, rows: Iterable[TokenRow]) -> None:
        for row in rows:
            self.session.realised[f"{row.source}/examples"] += 1
            self.session.realised[f"{row.source}/tokens"] += len(row.ids)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Gradient checkpointing runs layers again in the backward, which must find the attention of the forward."""
        micro = inputs.get(CARRIED) if self._loss_is_ours else None
        with through_backward(model, micro.rows) if micro else nullcontext():
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The plan's loss in training; in evaluation the trainer's own."""
        micro = inputs.pop(CARRIED, None)
        if micro is None or not model.training:
            if self._loss_is_ours and not model.training and hasattr(inner(model), SOFT_PROMPT):
                return self._prompted_loss(model, inputs, bool(kwargs.get("return_outputs") or args[:1] == (True,)))
            return super().compute_loss(model, inputs, *args, **kwargs)
        self._note_tokens(inputs)
        if self._noise:
            self._noise.expect(micro.places)
        with self.accelerator.autocast():  # the terms and the teacher too, as in the plain host
            loss, parts = self.session.loss(model, micro.rows, micro.counts, micro.step, micro.share)
        self._losses.add(micro.step, [parts])
        if self.session.steering.methods:
            self._of_step.update(numbers([parts]))
        return loss * self.accelerator.num_processes  # DDP averages gradients, the loss is a sum over processes

    def _note_tokens(self, inputs: Mapping[str, Any]) -> None:
        """SFTTrainer's num_tokens, which its own loss would count."""
        if hasattr(self, "_total_train_tokens") and "train" in getattr(self, "_metrics", {}):
            seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum()
            self._total_train_tokens += int(self._summed(seen))
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        if self._loss_is_ours and not prediction_loss_only and hasattr(inner(model), SOFT_PROMPT):
            raise PlanError(
                f"{self._kind.__name__} cannot predict with a soft prompt, which its own forward leaves out.",
                "Call evaluate(), which gives the loss with the prompt.",
            )
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def _prompted_loss(self, model: Any, inputs: Any, outputs: bool) -> Any:
        """Mean loss of an evaluation batch read with the soft prompt, which the trainer's own forward leaves out."""
        packed, logits = forward(model, rows_of(inputs))
        loss = torch.nn.functional.cross_entropy(logits.float(), packed.target)
        return (loss, {}) if outputs else loss

    def _clip_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self._change_gradients()
        return super()._clip_grad_norm(*args, **kwargs)

    def _before_step(self, *_: Any) -> None:
        if not self._changed:  # nothing was clipped
            self._change_gradients()
        self._changed = False

    def _change_gradients(self) -> None:
        if self.session.steering.methods:
            self._steer()
        self.session.change_gradients()
        self._changed = True

    def _steer(self) -> None:
        parts: Counter[str] = Counter()
        for own in gather(dict(self._of_step)):
            parts.update(own)
        optimizer: Any = self.optimizer
        self.session.steer(self._step, parts, optimizer.param_groups[0]["lr"])
        if self.session.steering.ended:
            self.control.should_training_stop = True

    # ---- data

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if not self._rows_an_epoch:
            return super()._get_train_sampler(*args, **kwargs)
        return InOrder(self._rows_an_epoch, self._first_row, len(self.train_dataset))

    def _first_row(self) -> int:
        """Where the epoch that starts (or is resumed) now begins in the mix, after the rows of earlier stages."""
        epoch = self.state.global_step // steps_of(self.args, self._rows_an_epoch)
        return self._done * rows_a_step(self.args) + epoch * self._rows_an_epoch

    # ---- the run

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train stage after stage, merge, and check that every method did something."""
        if self._trained:
            raise PlanError(
                "This trainer has trained its plan already; its base is gone.",
                "Build a new one from the base model.",
            )
        stages = self.session.stages
        folder = hf_checkpoint.wanted(resume_from_checkpoint, str(self.args.output_dir), stages)
        at = self._restore(folder) if folder else stages[0].name
        with self._noisy():
            if len(stages) == 1:
                out = self._train_from(folder, *args, **kwargs)
            else:
                out = self._train_stages(stages, at, folder)
        self._read_losses()
        self._trained = True
        self._reshard()
        self.session.merge()
        self._sum_effects()
        self.session.finish()
        return out

    @contextmanager
    def _noisy(self) -> Iterator[None]:
        """NEFTune by our own hook: transformers' looks at the shape of the forward, which is packed here."""
        alpha = self.neftune_noise_alpha
        if not self._loss_is_ours or alpha is None:
            yield
            return
        self.neftune_noise_alpha = None
        self._noise = Noise(self.session.model, alpha, self.args.torch_compile)
        try:
            yield
        finally:
            self._noise.remove()
            self._noise, self.neftune_noise_alpha = None, alpha

    def _reshard(self) -> None:
        """An evaluation may have left gathered weights in the model, but only the shards are kept."""
        if self.session.sharded:
            from torch.distributed.fsdp import FSDPModule

            for module in self.session.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _train_from(self, folder: str | None, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own `train`, but not one step more when the checkpoint is the last (the trainer takes one)."""
        from transformers.trainer_utils import TrainOutput

        if folder:
            done = json.loads((Path(folder) / "trainer_state.json").read_text())["global_step"]
            if done >= (self.args.max_steps if self.args.max_steps > 0 else self._whole_steps()):
                self._load_from_checkpoint(folder)
                return TrainOutput(done, 0.0, {})
        return super().train(folder, *args, **kwargs)

    def _train_stages(self, stages: Sequence[Stage], at: str, folder: str | None) -> Any:
        """One `train` per stage; checkpoints of all but the last go to stage-<name>."""
        wanted, place, out = self.args.max_steps, self.args.output_dir, None
        self._total = total = wanted if wanted > 0 else self._whole_steps()
        names = [s.name for s in stages]
        try:
            for stage, steps in split_steps(stages, total):
                if names.index(stage.name) >= names.index(at):
                    self._begin(stage)
                    self.args.max_steps, self.args.output_dir = steps, stage_folder(str(place), stage, stages)
                    out = self._train_from(folder if stage.name == at else None)
                    if stage != stages[-1]:
                        self.session.end_stage()
                self._done += steps
        finally:
            self.args.max_steps, self.args.output_dir = wanted, place
        return out

    def _begin(self, stage: Stage) -> None:
        if stage != self.session.stage:
            self.model = self.model_wrapped = self._enter(stage)
            self._draw_from(stage)
            self.optimizer = self.lr_scheduler = None
            self._read_losses()
            self._parts.clear()
            self._steps_in_parts = 0

    def _whole_steps(self) -> int:
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _summed(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over processes."""
        out: Any = self.accelerator.reduce(value, "sum")
        return out

    def _sum_effects(self) -> None:
        """A method may have worked on other processes only."""
        if self.accelerator.num_processes > 1:
            names = [m.name for m in self.session.methods]
            own = torch.tensor([self.session.effects[n] for n in names], device=self.args.device)
            self.session.effects = Counter(dict(zip(names, self._summed(own).tolist(), strict=True)))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._read_losses()
        if "loss" in logs and self._parts:
            names = sorted(n for n in self._parts if "/" not in n)  # what terms show is no mean over all steps
            steps = max(1, self._steps_in_parts)
            names = names if self.accelerator.num_processes == 1 else ["task", *(m.name for m in self.session.methods)]
            values = torch.tensor([self._parts[n] for n in names], device=self.args.device)
            values = self._summed(values) / steps
            logs.update({f"loss/{n}": v for n, v in zip(names, values.tolist(), strict=True)})
            self._parts.clear()
            self._steps_in_parts = 0
        super().log(logs, *args, **kwargs)

    # ---- checkpoints

    def _read_losses(self) -> None:
        """Look at the losses since the last time: at every line of the log, and before anything is kept."""
        for _, parts in self._losses.read(finite=not self.args.fp16):
            self._parts.update(parts)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._read_losses()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            hf_checkpoint.write(folder, self.session, self._base)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """With replaced modules a folder for `holdfast.load`: the trainer's own would load as something else."""
        if not replaced_in(inner(self.session.model)):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_replaced(inner(self.session.model), folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        self._see_shards()
        if replaced_in(inner(self.session.model)):
            hf_checkpoint.fill_replaced(Path(resume_from_checkpoint), self.session)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_best_model(self) -> None:
        if replaced_in(inner(self.session.model)):
            hf_checkpoint.fill_replaced(Path(str(self.state.best_model_checkpoint)), self.session)
        else:
            super()._load_best_model()

    def _restore(self, folder: str) -> str:
        """Load the plan's part of a checkpoint; returns the name of its stage."""
        meta = hf_checkpoint.read(Path(folder), self.session, self._base)
        self._begin(next(s for s in self.session.stages if s.name == meta["stage"]))
        hf_checkpoint.fill(Path(folder), self.session, meta, self.args.device)
        return meta["stage"]
