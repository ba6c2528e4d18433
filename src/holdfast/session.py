"""A plan at work on one model: what both hosts call, so that they cannot differ.

Order of a step: batch -> rollouts -> forward -> token weights and terms -> backward -> grad -> clip -> optimizer ->
update.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from holdfast.data.mix import Mix, Order
from holdfast.engine.base import as_base, has_adapter
from holdfast.engine.counts import Counts, count_rows
from holdfast.engine.forward import forward
from holdfast.engine.pack import Packed, TokenRow
from holdfast.engine.passing import stay
from holdfast.engine.replaced import replaced_in
from holdfast.engine.shards import cut_like, whole
from holdfast.engine.ways import SOFT_PROMPT, inner
from holdfast.errors import NoEffect, PlanError, TrainingError
from holdfast.method import Method, Past, Stage, State, canonical
from holdfast.plan import PHASES, Plan
from holdfast.services import BaseWeights, Context, Look, Teacher, View
from holdfast.sites import replace
from holdfast.sites.entries import Entries
from holdfast.sites.held_out import HeldOut
from holdfast.sites.merging import Merging
from holdfast.sites.rollouts import Rolling
from holdfast.sites.steering import Steering, Wholes
from holdfast.sites.total import Seen, Step, Total

LORA_B = re.compile(r"\.lora_(?:embedding_)?B\.")


class Session:
    """Holds the state of a plan during one run.

    Args:
        plan: the checked plan.
        model: the untouched base.
        ctx: what the run knows.
        compute_dtype: what frozen weights are kept in; what trains is kept in fp32. None leaves dtypes alone.
        knows_rows: the host will give all rows to `learn` before training (then no copy of the base is needed).
        packing: lay rows end to end (exact); False pads them instead.
        sharded: weights will be cut over processes after `prepare` (FSDP2); then the host calls `see_shards`.
    """

    def __init__(
        self,
        plan: Plan,
        model: Any,
        ctx: Context,
        *,
        compute_dtype: torch.dtype | None = None,
        knows_rows: bool = False,
        packing: bool = True,
        sharded: bool = False,
    ):
        self.plan, self.model, self.ctx = plan, model, ctx
        self.methods = plan.active
        self.compute_dtype, self.knows_rows, self.packing = compute_dtype, knows_rows, packing
        self.sharded = sharded
        self._exact = _kept_exact(model)
        self.state: dict[str, State] = {}
        self.asides: dict[str, Sequence[TokenRow]] = {}
        self.effects: Counter[str] = Counter()
        self.teacher: Teacher | None = None
        self.base_weights: Mapping[str, torch.Tensor] = {}
        self.num_layers = int(getattr(inner(model).config.get_text_config(), "num_hidden_layers", 1))
        self.stage = self.stages[0]
        self.realised: Counter[str] = Counter()
        self.left_out: dict[str, float] = {}  # share of the task's rows that each method with a filter drops
        self.layers = tuple(
            dict.fromkeys(n for m in self.methods for n in m.hidden_layers())
        )  # whose states some method reads
        self.chosen, self.steering = Entries(self.methods, self.state), Steering(self.methods, self.state)
        self.merging = Merging(self.methods, self.state, ctx.base_dir, self.num_layers)
        self.held_out = HeldOut(self.methods)
        self.first, self.total = 0, 0  # the stage's first step, and how many the run has; hosts set both
        self.epoch_steps = 0.0  # of one pass over the task's rows; 0: unknown; hosts set it
        self.rolling, self.total_loss = Rolling(self), Total(self)
        self._source_of: dict[str, str] = {}  # label of a row -> the method whose source it came from
        self.params: dict[str, torch.nn.Parameter] = {}
        self._wrapped: frozenset[str] | None = None  # what an adapter trains, once it is on the model

    def state_of(self, method: Method) -> State:
        """What a method has measured and remembered, to be read or filled."""
        return self.state.setdefault(method.name, {})

    # ---- before training

    def prepare(self, teacher_rows: Iterable[TokenRow] = (), progress: Callable[[float], None] | None = None) -> None:
        """Run `prepare` and gather asides on the untouched base, then the teacher's answers.

        A method that prepares something may look at any weight, so for it the whole base comes to the device.
        """
        for m in self.methods:
            if m.name not in self.state:
                if type(m).prepare is not Method.prepare:
                    stay(self.model, whole=True)
                self.state[m.name] = m.prepare(self.ctx)
            rows = m.asides(self.ctx)
            if rows:
                self.asides[m.name] = rows
        asks = {"base_logits", "base_hidden"}
        if any(asks & m.needs for m in self.methods):
            self.teacher = Teacher(
                self.model, [n for m in self.methods if "base_hidden" in m.needs for n in m.hidden_layers()]
            )
            used = [r for m in self.methods if asks & m.needs for r in self._used_asides(m)]
            apart = {*self.asides, *(m.name for m in self.rolling.methods)}  # these do not ask about the task's rows
            on_task = any(asks & m.needs and m.name not in apart for m in self.methods)
            known = [*used, *(teacher_rows if on_task and not self._rewrites else ())]
            self.teacher.learn(self.model, known, progress=progress, taught=self.ctx.taught)
            # a cut model answers only when all processes ask at once, so there nothing is asked of it
            in_place = any(m.wraps for m in self.methods) and not self.sharded
            unknown = on_task and (self._rewrites or not (self.knows_rows and self.teacher.exact_head))
            unknown = unknown or any(asks & m.needs for m in self.rolling.methods)
            if unknown and not in_place:
                stay(self.model, whole=True)  # a frozen copy answers at every step
            self.teacher.freeze_base(self.model, head_trains=not in_place, needs_copy=unknown and not in_place)
        # beside an adapter nothing of the base trains, so there is nothing to compare it with or go back to
        goes_back = any("base_weights" in m.needs for m in self.methods) or any(s.restart for s in self.stages)
        if goes_back and not any(m.wraps for m in self.methods):
            named = {canonical(n): p.detach() for n, p in self.model.named_parameters()}
            # those that will be cut are copied when they are (`see_shards`): until then only names and kinds are kept
            copied = {n: p.to("meta") if self.sharded else p.clone() for n, p in named.items()}
            self.base_weights = BaseWeights(copied)
        self.merging.open(self.model)

    @property
    def _rewrites(self) -> bool:
        """Whether rows change after they are drawn, so that nobody knows beforehand what will be read."""
        return any("batch" in m.sites() and "ids" in m.writes for m in self.methods)

    def _used_asides(self, m: Method) -> list[TokenRow]:
        pool = self.asides.get(m.name, ())
        if not pool or not self.ctx.total_steps:
            return list(pool)
        wanted = sorted(
            {i for s in range(self.ctx.total_steps) for i in m.asides_at(s, len(pool), self.ctx.total_steps)}
        )
        return [pool[i] for i in wanted]

    def mix(self, task: Sequence[TokenRow], order: Order | None = None) -> Mix:
        """The training mix with every method's sources. A source takes effect when a row of it is trained on.

        order: of the task's rows, where no method may decide it.

        Raises:
            PlanError: the filters of the plan leave no row of the task, or a method and `order` both order them.
        """
        if order and (owner := next((m.name for m in self.methods if "order" in m.writes), None)):
            what = f"{owner} orders the rows of the task, and the weights in data.train say how often each set comes."
            raise PlanError(what, f"Remove the weights, or {owner}.")
        mix = Mix(task, order=order)
        for m in self.methods:
            before = mix
            with as_base(self.model):
                mix = m.data(mix, self.ctx)
            self.effects[m.name] += mix.maps != before.maps or mix.order is not before.order
            for s in mix.sources[len(before.sources) :]:
                labels = set() if callable(s.rows) else {r.source for r in s.rows}
                if not labels or "task" in labels:  # its rows cannot be told apart later
                    self.effects[m.name] += 1
                self._source_of |= dict.fromkeys(labels - {"task"}, m.name)
        self.left_out = mix.left_out if mix.kept else {}
        self.effects.update(name for name, share in self.left_out.items() if share)
        for stage in self.stages:
            mix.only(*stage.draws)  # raises for a name that nobody brings
        for m in self.methods:
            m.check_mix(mix, self.ctx)
        self.held_out.cut(mix, self.ctx)
        return mix

    # ---- stages

    @property
    def stages(self) -> tuple[Stage, ...]:
        return next((m.stages() for m in self.methods if "stages" in m.sites()), (Stage("tune"),))

    def enter(self, stage: Stage) -> Any:
        """Set up what trains in `stage`; returns the model (wrapped by an adapter, perhaps)."""
        self.stage, self.ctx.stage = stage, stage.name
        soft = getattr(inner(self.model), SOFT_PROMPT, None)
        if stage.trains == "prompt":
            owner = next(m for m in self.methods if "stages" in m.sites())
            self.model.requires_grad_(False)
            if soft is None:
                inner(self.model).register_parameter(
                    SOFT_PROMPT, torch.nn.Parameter(self.state[owner.name]["init"].clone())
                )
                self.effects[owner.name] += 1
            inner(self.model).get_parameter(SOFT_PROMPT).requires_grad_(True)
        else:
            for name, p in self.model.named_parameters():
                p.requires_grad_(is_plain(p) and (self._wrapped is None or name in self._wrapped))
            for m in sorted(self.methods, key=lambda m: not m.wraps):
                before = _trainable(self.model)
                if "replace" in m.sites() and not self._wrapped:
                    replace.replace(self.model, m, self.ctx, self.state_of(m))
                if not (m.wraps and self._wrapped):
                    self.model = m.adapt(self.model, self.ctx, self.state_of(m))
                if m.wraps and not self._wrapped:
                    self._wrapped = _trainable(self.model)
                self.effects[m.name] += _trainable(self.model) != before
            if soft is not None:
                inner(self.model).get_parameter(SOFT_PROMPT).requires_grad_(False)
            self._narrow(stage.trains)
        for module in replaced_in(self.model).values():
            module.off = stage.trains == "prompt"
        self._set_dtypes()
        self.params = {canonical(n): p for n, p in self.model.named_parameters() if p.requires_grad}
        if not self.params:
            raise NoEffect("The plan freezes every weight, so nothing would train.", "Freeze less.")
        if stage.restart:
            self._restart()
        return self.model

    def _narrow(self, trains: str | tuple[str, ...]) -> None:
        """Freeze what a stage that names patterns does not name."""
        if not isinstance(trains, str):
            for name, p in self.model.named_parameters():
                if not any(re.search(pattern, canonical(name)) for pattern in trains):
                    p.requires_grad_(False)

    @torch.no_grad()
    def end_stage(self) -> None:
        """A stage is over and another will follow: its owner may remember what it came to."""
        for m in (m for m in self.methods if "stages" in m.sites()):
            kept = m.stage_ends(self.stage, Wholes(self.params), Wholes(self.base_weights), self.state_of(m))
            self.state_of(m).update(kept)

    @torch.no_grad()
    def _restart(self) -> None:
        """What trains begins again from the base's weights."""
        for name, p in self.params.items():
            p.copy_(self.base_weights[name])

    def _set_dtypes(self) -> None:
        if self.compute_dtype is None:
            return
        for p in self.model.parameters():
            if is_plain(p):
                wanted = torch.float32 if p.requires_grad or id(p) in self._exact else self.compute_dtype
                if p.dtype != wanted:
                    p.data = p.data.to(wanted)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups of the stage, one per learning-rate factor; norms and biases do not decay."""
        lr = self.stage.learning_rate or lr
        groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
        for name, p in self.params.items():
            factor = 1.0
            for m in self.methods:
                one = m.lr_factor(name, self.num_layers, self.state_of(m))
                self.effects[m.name] += one != 1.0
                factor *= one
            groups.setdefault((factor, p.ndim >= 2), []).append(p)
        return [
            {"params": ps, "lr": lr * factor, "weight_decay": weight_decay if decays else 0.0}
            for (factor, decays), ps in groups.items()
        ]

    def see_shards(self) -> None:
        """The weights were cut over processes, and nothing has changed them: hold the new parameters, and copy the
        base's weights from them."""
        named = {canonical(n): p for n, p in self.model.named_parameters()}
        self.params = {n: named[n] for n in self.params}
        self.base_weights = BaseWeights(
            {n: named[n].detach().clone().to(w.dtype) for n, w in self.base_weights.items()}
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """What trains and what `prepare` gave, by name: equal in every process of a run."""
        state = {f"{m}/{k}": v for m, state in self.state.items() for k, v in state.items()}
        return {n: t.detach() for n, t in {**self.params, **state}.items()}

    # ---- a step

    @property
    def _steps(self) -> int:
        """Of the whole run; 0 while nobody knows."""
        return self.total or self.ctx.total_steps

    def rows_of(self, step: int) -> list[TokenRow]:
        """The aside rows that join step `step`; none while a prompt stage trains no weight they could protect."""
        if self.stage.trains == "prompt":
            return []
        return [
            self.asides[m.name][i]
            for m in self.methods
            if m.name in self.asides
            for i in m.asides_at(step, len(self.asides[m.name]), self._steps)
        ]

    def pick(self, rows: Sequence[TokenRow], step: int) -> Sequence[TokenRow]:
        """The batch site."""
        for m in self.methods:
            before = rows
            rows = m.batch(rows, step, Look(self.ctx, self.state_of(m), self._look))
            self.effects[m.name] += rows is not before
        return rows

    @torch.no_grad()
    def _look(self, rows: Sequence[TokenRow]) -> tuple[Packed, torch.Tensor]:
        """Packing and logits of the model so far; dice of the step are not rolled for it."""
        with self.between_steps():
            return forward(self.model, rows, packing=self.packing)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """The model so far as something to ask: dropout off, under autocast where its own weights have few bits."""
        was_training, device = self.model.training, next(self.model.parameters()).device.type
        half = self.compute_dtype in (torch.bfloat16, torch.float16)
        self.model.eval()
        with torch.autocast(device, self.compute_dtype if half else torch.bfloat16, enabled=half):
            yield
        self.model.train(was_training)

    def roll(self, rows: Sequence[TokenRow], step: int) -> tuple[Sequence[TokenRow], list[TokenRow]]:
        """The rollouts site, on all rows of a step: those that are run, and answered ones to run beside them."""
        return self.rolling.roll(rows, step) if self.rolling.methods else (rows, [])

    def loss(
        self, model: Any, rows: Sequence[TokenRow], counts: Counts, step: int, share: float = 1.0
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of one micro-batch.

        Args:
            rows: task rows and asides of this micro-batch.
            counts: `count_rows` of the whole optimizer step (all micro-batches and processes).
            share: this micro-batch's part of a scalar penalty (1 / accumulation steps).

        Returns: (loss, its parts without gradient). Nobody waits for them here; see `hosts.losses`.
        """
        self.effects.update(self._source_of[r.source] for r in rows if r.source in self._source_of)
        loss, parts = self.total_loss.loss(Step(model, counts, step, share), rows)
        if self.stage.trains == "prompt" and torch.is_grad_enabled() and not loss.requires_grad:
            loss = loss + 0 * self.params[SOFT_PROMPT].sum()  # none of these rows is read with the prompt
        return loss, parts

    def view(self, m: Method | None, step: Step, seen: Seen) -> View:
        """What method `m` may see of a forward or a piece of it; None: what nobody in particular may."""
        name = m.name if m else "task"
        return View(
            seen.packed, seen.logits, step.number, step.model, self.state.get(name, {}), self.teacher, name,
            self.params, self.base_weights, seen.shared, seen.states, step.counts, seen.handed,
            self.rolling.teacher_logp, seen.asked, self._steps,
        )  # fmt: skip

    @torch.no_grad()
    def change_gradients(self) -> None:
        """Entries and the grad site, once per optimizer step and before clipping: mask, rescale, project."""
        self.chosen.mask_gradients(self.params)
        chain = sorted((m for m in self.methods if "grad" in m.sites()), key=lambda m: PHASES.index(m.phase))
        for m in chain:
            for name, p in self.params.items():
                if p.grad is not None:
                    p.grad = cut_like(m.grad(name, whole(p.grad), self.state[m.name]), p)
            self.effects[m.name] += 1

    def begin_step(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Before the rows of step `step` (0-based) of the run: the entries site, and what holds still at this step."""
        if self.stage.trains == "prompt":
            return
        self.steering.hold(self.params)
        begins = step == self.first
        if self.chosen.methods and self.chosen.draw(
            step, self.params, optimizer, begins=begins, base=self.base_weights
        ):
            for m in self.chosen.methods:
                self.effects[m.name] += any(not bool(whole(mask).all()) for mask in self.chosen.masks.values())

    @torch.no_grad()
    def steer(self, step: int, parts: Mapping[str, float], learning_rate: float) -> None:
        """The steer site, between the losses of a step and the optimizer.

        Args:
            step: 0-based, of the run; parts: of the loss, summed over micro-batches and processes; learning_rate: the
                schedule's at this step.
        """
        if not self.steering.methods or self.stage.trains == "prompt":
            return
        self.steering.drop(self.params)
        past = Past(
            step,
            self._steps,
            {**parts, **self.steering.losses()},
            learning_rate,
            self.model,
            Wholes({n: p.grad for n, p in self.params.items() if p.grad is not None}),
            Wholes(self.params),
            Wholes(self.base_weights),
            epochs=int((step + 1) / self.epoch_steps + 1e-9) if self.epoch_steps else 0,
            parts=self.held_out.parts,
        )
        score = Look(self.ctx, {}, self._look).token_logp
        self.effects.update(self.steering.ask(past, self.held_out.losses(step, self.model, score)))
        self.steering.freeze(self.params)

    def hook(self, optimizer: torch.optim.Optimizer) -> None:
        """Put steering, entries and the update site around `optimizer.step`."""
        if self.stage.trains == "prompt":
            return

        @torch.no_grad()
        def before_step(*_: Any) -> None:
            self.steering.scale(optimizer)
            self.chosen.keep(self.params)

        @torch.no_grad()
        def after_step(*_: Any) -> None:
            self.chosen.put_back(self.params)
            self.steering.unscale()

        if self.steering.methods or self.chosen.methods:
            optimizer.register_step_pre_hook(before_step)
        self._hook_updates(optimizer)
        if self.steering.methods or self.chosen.methods:
            optimizer.register_step_post_hook(after_step)  # last: an update may not leave the chosen entries

    def _hook_updates(self, optimizer: torch.optim.Optimizer) -> None:
        chain = [m for m in self.methods if "update" in m.sites()]
        if not chain:
            return
        touched = {n: [m for m in chain if m.touches(n, p)] for n, p in self.params.items()}
        touched = {n: ms for n, ms in touched.items() if ms}
        before: dict[str, torch.Tensor] = {}

        @torch.no_grad()
        def keep(*_: Any) -> None:
            for name in touched:
                before[name] = self.params[name].detach().clone()

        @torch.no_grad()
        def change(*_: Any) -> None:
            for name, methods in touched.items():
                p, start = self.params[name], whole(before.pop(name))  # not kept through the next forward
                step = whole(p.detach()) - start
                for m in methods:
                    step = m.update(name, step, start, self.state[m.name])
                    self.effects[m.name] += 1
                p.copy_(cut_like(start + step, p))

        optimizer.register_step_pre_hook(keep)
        optimizer.register_step_post_hook(change)

    # ---- after training

    @torch.no_grad()
    def _settle(self) -> None:
        """What trained becomes what the update site says of it, in plan order, the chosen entries alone."""
        for m in (m for m in self.methods if type(m).settled is not Method.settled):
            for name, p in self.params.items():
                new = cut_like(m.settled(name, whole(p.detach()).float(), self.state_of(m)).to(p), p)
                mask = self.chosen.masks.get(name)
                p.copy_(new if mask is None else torch.where(mask, new, p.detach()))
            self.effects[m.name] += 1

    def merge(self) -> None:
        """What trained is settled; then the merge site: on dense weights in place, on a LoRA adapter by scaling its B,
        which is exact."""
        self._settle()
        lora = [(n, p) for n, p in self.model.named_parameters() if LORA_B.search(n)]
        if lora:
            self.merging.scale_adapter([(LORA_B.split(canonical(n))[0] + ".weight", p) for n, p in lora])
        else:
            self.merging.merge(self.model, self.base_weights)
        self.effects.update(m.name for m in self.merging.methods)

    def soft_prompt(self) -> torch.Tensor | None:
        """(p, D) prompt of the task's own format, or None."""
        soft = getattr(inner(self.model), SOFT_PROMPT, None)
        return None if soft is None else soft.detach()

    def finished_model(self, dtype: torch.dtype) -> tuple[Any, torch.Tensor | None]:
        """The model as it is exported: dense weights back in the base's dtype, the soft prompt beside it."""
        soft = self.soft_prompt()
        if soft is not None:
            soft = soft.clone()
            delattr(inner(self.model), SOFT_PROMPT)
        if not has_adapter(self.model):  # PEFT keeps what it trains in fp32
            for p in self.model.parameters():  # not model.to(dtype): that would round buffers such as inv_freq
                p.data = p.data.to(torch.float32 if id(p) in self._exact else dtype)
        self.model.requires_grad_(False)
        return self.model.eval(), soft

    def finish(self) -> None:
        """Raise NoEffect for the first method that changed nothing in the whole run."""
        for m in self.methods:
            if not self.effects[m.name]:
                raise NoEffect(
                    f"{m.name} is in the plan but changed nothing in this run.",
                    "Check its settings (targets, shares, schedules), or take it out of the plan.",
                )

    def probe(self, rows: Sequence[TokenRow], autocast: torch.dtype | None = None) -> dict[str, float]:
        """One forward and backward on a few rows before training: finite, and gradients reach what trains.

        Rows must be among those given to `prepare` when it was given any. What happens here is no effect of a method.
        """
        effects = self.effects.copy()
        rows, answered = self.roll(rows, 0)
        rows = [*rows, *self.rows_of(0), *answered]
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
            loss, parts = self.loss(self.model, rows, count_rows(rows), step=0)
        self.steering.losses()
        self.effects = effects
        found = {name: value.item() for name, value in parts.items()}
        if not torch.isfinite(loss):
            raise TrainingError(
                f"The probe step gave a loss of {loss.item()} ({_words(found)}).",
                "Check the data for empty targets and the model's dtype; nothing was trained yet.",
            )
        loss.backward()
        reached = sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in self.params.values())
        for p in self.params.values():
            p.grad = None
        if not reached:
            raise NoEffect("No gradient reaches any trainable weight.", "Check what the plan freezes and wraps.")
        return found


def _kept_exact(model: Any) -> set[int]:
    """ids of the parameters that transformers keeps in fp32 in a model of another type, such as routers."""
    if getattr(model, "dtype", torch.float32) == torch.float32:
        return set()
    return {id(p) for p in model.parameters() if p.dtype == torch.float32}


def is_plain(p: torch.Tensor) -> bool:
    """False for packed weights of few bits: bitsandbytes may keep them under a floating dtype."""
    return p.is_floating_point() and getattr(p, "quant_state", None) is None


def _trainable(model: Any) -> frozenset[str]:
    return frozenset(n for n, p in model.named_parameters() if p.requires_grad)


def _words(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in parts.items())
