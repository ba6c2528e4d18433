"""A method: one frozen dataclass whose fields are its hyper-parameters and which overrides some of the sites below.

Site functions take values and return values; state is a dict of plain tensors returned by `prepare` and saved by the
plan. How two methods combine at a site is fixed (docs/design.md): sums, products, intersections, declared chains, or
one owner. A method never sees another one, nor the scale of the loss, nor the host.

Legend: N scored positions of a step, V vocabulary, T tokens of a row, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch

from holdfast.data.mix import Mix
from holdfast.engine.pack import TokenRow
from holdfast.engine.replaced import ORIGINAL, Replaced
from holdfast.services import Context, Look, State, View

SITES = (
    "prepare",
    "replace",
    "adapt",
    "entries",
    "data",
    "batch",
    "rollouts",
    "token_weight",
    "loss",
    "grad",
    "steer",
    "update",
    "merge",
    "decode",
    "stages",
)


@dataclass(frozen=True)
class Paper:
    """Where a method comes from. `arxiv` is the bare id."""

    title: str
    arxiv: str = ""
    note: str = ""  # what was not verified, in words


@dataclass(frozen=True)
class Term:
    """One addend of the loss.

    value: (M,) one number per position, summed and divided by the step's count of `owner` positions; or a scalar
    penalty on weights, counted once a step however the step is split.
    owner: whose positions `value` runs over ("task" or the method's own asides); None for a penalty.
    per: "position" as above; "row": `value` is (R,), one number for each of the owner's rows that are scored
    somewhere, divided by their number in the step; "source": `value` is (M,), and the means over each source's
    positions in the step are averaged over the sources that stand in it.
    shown: name -> what else is to be known of the same positions, shaped and divided as `value`, without gradient and
    no part of the loss: `Past.loss` and the log of losses have it as "<method>/<name>". Of terms with an owner alone.
    """

    value: torch.Tensor
    owner: str | None = None
    per: str = "position"
    shown: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Past:
    """What a method that steers is shown, before the optimizer's step.

    step: of the run, from 0; total: steps of the run, 0 when unknown; loss: parts of the loss of this step, summed
    over micro-batches and processes ("task", and each method's term by its name), and what each source brings to
    "task" ("task/<source>", which add up to it), and what terms show beside (`Term.shown`); learning_rate: the
    schedule's, of the first group; model: as it is before the step; to be looked at only, the same in every process.
    grads: of the step, by canonical name, summed over micro-batches and processes, before masks of `entries`, the
    `grad` chain and clipping; none of what no row reached. params: what trains, before the step. base: the base's
    weights. All three whole, each gathered when it is asked for; grads only for methods whose `needs` has
    "gradients", base only for those that have "base_weights".
    held_out: source -> mean loss per token of the method's held-out rows, at the steps that `looks` names.
    epochs: whole passes over the task's rows that are done with this step; 0 where nobody knows how many rows it has.
    parts: source -> the part of the task's scored positions that the whole mix has from it on average; {} where nobody
    knows, or no method of the plan has held-out rows.
    """

    step: int
    total: int
    loss: Mapping[str, float]
    learning_rate: float
    model: Any = None
    grads: Mapping[str, torch.Tensor] = field(default_factory=dict)
    params: Mapping[str, torch.Tensor] = field(default_factory=dict)
    base: Mapping[str, torch.Tensor] = field(default_factory=dict)
    held_out: Mapping[str, float] = field(default_factory=dict)
    epochs: int = 0
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Steer:
    """What a method that steers asks for; what is not said stays as it is.

    lr_factor: of this step's learning rate. source_weight: source of rows -> weight of its token losses at the next
    step. freeze: patterns of parameter names that do not train at this step, whose gradients exist already.
    freeze_next: the same for the next step; their gradients are not even computed there (several processes of a
    trainer compute and drop them). What holds longer is said again at every step. end: why the run should end after
    this step, in words. state: what the method remembers.
    """

    lr_factor: float = 1.0
    source_weight: Mapping[str, float] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    freeze_next: tuple[str, ...] = ()
    end: str = ""
    state: State = field(default_factory=dict)


@dataclass(frozen=True)
class Rollouts:
    """Prompts that the model so far answers at a step, and what a teacher reads before the same answers.

    prompts, teacher_prompts: tokens, one teacher's prompt for each prompt. teacher: "base", "live" (the model so far),
    "ema" (a moving average of what trains: of rate `ema_rate` the latest, since the first step with rollouts), or the
    path or id of another model with the same tokenizer. temperature 0 takes the likeliest token. stop: texts that
    end an answer too. instead: the task's rows of this step are not run.
    """

    prompts: Sequence[Sequence[int]]
    teacher_prompts: Sequence[Sequence[int]]
    teacher: str = "base"
    ema_rate: float = 0.05
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    instead: bool = False


@dataclass(frozen=True)
class Stage:
    """One training of a run, with an optimizer and a schedule of its own.

    trains: "prompt", "rest" (whatever the plan's other methods leave trainable), or patterns of names within the rest.
    sources: names of the sources of the mix that it draws from ("task" is one); None: all. without: those of them
    that it leaves to other stages.
    restart: what trains begins again from the base's weights; the state of methods stays.
    """

    name: str
    share: float = 1.0  # of the run's steps
    trains: str | tuple[str, ...] = "rest"
    learning_rate: float | None = None  # None: the run's
    keep_best: bool = False
    sources: tuple[str, ...] | None = None
    restart: bool = False
    without: tuple[str, ...] = ()

    @property
    def draws(self) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
        """What `Mix.only` is told."""
        return self.sources, self.without


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method. Subclasses are frozen dataclasses with defaults for all fields."""

    paper: ClassVar[Paper | None] = None
    does: ClassVar[str] = ""  # one plain line for tables
    # "base_weights", "base_logits", "base_hidden", "live_logits", "gradients" (at `steer`), "dense"
    needs: ClassVar[frozenset[str]] = frozenset()
    may_end: ClassVar[bool] = False  # `steer` may end the run
    skips_steps: ClassVar[bool] = False  # `steer` may hold all weights still at a step
    confined: ClassVar[bool] = False  # promises which weights or directions stay as they are, so nothing heals it
    wraps: ClassVar[bool] = False  # replaces modules: at most one per plan
    copies: ClassVar[bool] = False  # `replace` trains copies or scales of the base's weights, at the rates of these
    refuses: ClassVar[Mapping[str, str]] = {}  # method name -> why the two mean different things
    phase: ClassVar[str] = "rescale"  # of `grad`: mask, rescale, project
    writes: ClassVar[frozenset[str]] = frozenset()  # what of rows: "ids", "targets", "order", names of numbers
    whole_rows: ClassVar[bool] = False  # `loss` or `token_weight` reads rows as wholes: a long one is not cut for it
    leaves: ClassVar[str] = "stay"  # what `entries` does not choose any more: "stay" or "return" (to the base)
    prefix: ClassVar[bool] = False  # its soft prompt is keys and values of every layer (`engine.prefix`)
    # `data` brings rows made of the task's that train; of those that are held out so far it makes none
    copies_rows: ClassVar[bool] = False
    scales_update: ClassVar[bool] = False  # `merge` only scales tuned - base, so it is exact on a LoRA adapter too
    strengths: ClassVar[tuple[str, ...]] = ()  # fields that say how strongly it acts
    odds: ClassVar[tuple[str, ...]] = ()  # those of them that are a part of a whole and stay below 1

    # ---- the sites

    def prepare(self, ctx: Context) -> State:
        """Measure the untouched base once. The result is saved and handed to the other sites."""
        return {}

    def replace(self, name: str, module: torch.nn.Module, ctx: Context, state: State) -> Replaced | None:
        """The module that stands in the place of `module` from now on, made of it; None: it stays.

        Asked once, when what trains is set up, for every module by canonical name in the model's own order, but for
        those inside a replaced one. Parameters of the answers train, but for the originals' inside; all else is
        frozen. Asked again when an export is loaded, on the untouched base: the answer may depend on settings, `state`
        and the model, and not on rows; what it drew is overwritten by what was trained. A method with this site sets
        `wraps`.
        """
        return None

    def merged(self, name: str, module: Replaced) -> torch.nn.Module | None:
        """A plain module that computes what a trained one of `replace` does (part of that site), for `export.merge`.

        Its parameters have the names of the original's. Left out where the mathematics do not allow it.
        """
        return None

    def adapt(self, model: Any, ctx: Context, state: State) -> Any:
        """Choose what trains (set requires_grad to False, never to True) or wrap modules. Returns the model.

        Asked at the beginning of every stage, whose name is `ctx.stage`; a method that wraps, once. `state` is what
        `prepare` measured, in a resumed run too.
        """
        return model

    def lr_factor(self, name: str, num_layers: int, state: State) -> float:
        """Learning-rate factor of one parameter (part of `adapt`); factors of several methods multiply."""
        return 1.0

    def entries(self, name: str, param: torch.Tensor, state: State, step: int) -> torch.Tensor | None:
        """Which entries of one parameter train, as a bool tensor of its shape; None: all of them.

        Asked before the first step, before every step that `redraws` names and at the beginning of every stage. The
        chosen entries of several methods are intersected; all others stay as they are to the last bit, or have the
        base's value where `leaves` is "return" (then `needs` has "base_weights" and "dense").
        """
        return None

    def redraws(self, step: int) -> bool:
        """Whether `entries` is asked before step `step` (0-based) of the run."""
        return step == 0

    def steer(self, past: Past, state: State) -> Steer | None:
        """Look at the losses of a step, before the optimizer takes it: scale it, weight sources, freeze, or end."""
        return None

    def held_out(self, mix: Mix, ctx: Context) -> Mapping[str, Sequence[TokenRow]]:
        """Rows for choosing (part of `steer`): a label -> rows, scored for `Past.held_out`; asked once.

        They are to come from what trains: `data` cuts off a part (`Mix.hold_out`), `mix.held_out()` has it here, with
        the sources of all methods. Rows that several methods ask for are scored once, in eval mode, without gradient.
        """
        return {}

    def looks(self, step: int) -> bool:
        """Whether the held-out rows are scored before `steer` of step `step` (0-based)."""
        return False

    def data(self, mix: Mix, ctx: Context) -> Mix:
        """Add sources to the training mix, maps, filters or an order of the task's rows, or hold out a part of it.

        `ctx.model` answers as the untouched base. What a map writes into rows, and an order, is named in `writes`.
        """
        return mix

    def check_mix(self, mix: Mix, ctx: Context) -> None:
        """Raise for what does not fit the mix when all methods have had their turn at it (part of `data`).

        A trainer whose plan mixes nothing shows one row in the place of its own: look at sources, not at rows.
        """

    def asides(self, ctx: Context) -> Sequence[TokenRow]:
        """A fixed pool of extra rows for this method's own loss term (part of `data`); owner = the method's name."""
        return ()

    def asides_at(self, step: int, pool: int, total: int) -> Sequence[int]:
        """Which rows of the pool join step `step` (0-based) of a run of `total` steps (0: unknown)."""
        return ()

    def batch(self, rows: Sequence[TokenRow], step: int, look: Look) -> Sequence[TokenRow]:
        """Pick or change the rows of a drawn batch; `look.state` may be filled.

        In a trainer of several processes each one picks among its own rows, and so remembers what it picked itself.
        """
        return rows

    def rollouts(self, rows: Sequence[TokenRow], step: int, ctx: Context, state: State) -> Rollouts | None:
        """Prompts that the model so far is to answer, asked once a step with the task's rows of the whole step.

        The answers become rows of this method, scored on the answer and its end; `loss` finds them at
        `view.positions(self.name)`, and their teacher's view at `view.teacher_logp(self.name)`. A method whose teacher
        is "base" has `base_logits` in its `needs`.
        """
        return None

    def hidden_layers(self) -> tuple[int, ...]:
        """Whose states `view.hidden` gives to `loss` and `token_weight`: blocks from 0, or -1, before the head."""
        return ()

    def token_weight(self, view: View) -> torch.Tensor | None:
        """(N,) weights of the task's token losses, without gradient; positions of other owners are ignored."""
        return None

    def loss(self, view: View) -> Term | tuple[Term, ...] | None:
        """One addend of the loss, or several of different kinds, or None when there is nothing to add at this step.

        Under FSDP2 `view.params` and `view.base_weights` are cut over processes: what is done element by element, and
        sums, come out right; before a product of matrices take `engine.shards.whole(p)`.
        """
        return None

    def grad(self, name: str, grad: torch.Tensor, state: State) -> torch.Tensor:
        """Change the gradient of one parameter before clipping."""
        return grad

    def touches(self, name: str, param: torch.Tensor) -> bool:
        """Whether `update` wants this parameter."""
        return False

    def update(self, name: str, step: torch.Tensor, param: torch.Tensor, state: State) -> torch.Tensor:
        """Change the optimizer's step of one parameter (after - before, weight decay included)."""
        return step

    def settled(self, name: str, param: torch.Tensor, state: State) -> torch.Tensor:
        """What one parameter that trained becomes when the run is over (part of `update`), in fp32.

        Asked once, after the last step and before `merge`, of an adapter's parameters too. Entries that `entries` does
        not choose stay as they are.
        """
        return param

    def merge(self, name: str, weights: Mapping[str, torch.Tensor], state: State, num_layers: int) -> torch.Tensor:
        """Combine one tensor after training, in fp32.

        Args:
            weights: by role: "base", "tuned" (what the method before made), and the roles of `others`.

        A method that does more than scale tuned - base must say so: `scales_update` False, and "dense" in `needs`.
        """
        return weights["tuned"]

    def entrywise(self) -> bool:
        """Whether `merge` works entry by entry, so that it may be shown a tensor in flat pieces (part of `merge`)."""
        return self.scales_update

    def others(self) -> Mapping[str, str]:
        """Other models for `merge`: role -> hub id, folder or adapter of a model that descends from the base."""
        return {}

    def survey(self, name: str, weights: Mapping[str, torch.Tensor], state: State, num_layers: int) -> State | None:
        """See one tensor before any is merged, for what ranks over the whole model (part of `merge`).

        Returns what to put into the state, which the next call finds there. None ends the pass: nothing to learn.
        """
        return None

    def decode(self, model: Any) -> Mapping[str, Any]:
        """What inference on the tuned task's own format needs beside the weights."""
        return {}

    def stages(self) -> tuple[Stage, ...]:
        """Split the run into several trainings; () leaves it whole."""
        return ()

    def stage_ends(
        self, stage: Stage, params: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], state: State
    ) -> State:
        """What the owner of the stages remembers when one of them is over (part of `stages`), the last one excepted.

        params: what trained in it, after its last step; base: the base's weights, for `needs` with "base_weights".
        """
        return {}

    # ---- what the planner asks

    def check(self, ctx: Context) -> None:
        """Raise for values that make no sense, before any work."""

    def off(self) -> bool:
        """True when the field values switch the method off (then it is skipped, bit for bit)."""
        return False

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def trains_prompt(self) -> bool:
        """Whether one of its stages trains a soft prompt."""
        return any(s.trains == "prompt" for s in self.stages() or ())

    @property
    def only_prompts(self) -> bool:
        """Whether it leaves the whole run to a soft prompt, so that no weight trains."""
        return self.trains_prompt and all(s.trains == "prompt" for s in self.stages())

    @property
    def rests_beside_a_prompt(self) -> bool:
        """Whether it does nothing while a soft prompt trains: it works on weights, or with rows that rest then."""
        idle = {"replace", "adapt", "entries", "rollouts", "steer", "update", "merge"} & set(self.sites())
        return bool(idle) or "base_weights" in self.needs or type(self).asides is not Method.asides

    @property
    def restarts(self) -> bool:
        """Whether one of its stages begins again from the base."""
        return any(s.restart for s in self.stages() or ())

    @property
    def holds_out(self) -> bool:
        """Whether it asks for the losses of held-out rows."""
        return type(self).held_out is not Method.held_out

    def sites(self) -> tuple[str, ...]:
        """The sites this method overrides; helpers count for the site they belong to."""
        helpers = {"lr_factor": "adapt", "asides": "data", "redraws": "entries", "others": "merge", "survey": "merge"}
        helpers |= {
            "held_out": "steer",
            "looks": "steer",
            "stage_ends": "stages",
            "merged": "replace",
            "settled": "update",
        }
        own = {helpers.get(s, s) for s in (*SITES, *helpers) if getattr(type(self), s) is not getattr(Method, s)}
        return tuple(s for s in SITES if s in own)

    def stronger(self, factor: float) -> Method:
        """The same with every field of `strengths` times `factor`; of a part of a whole p its odds p / (1 - p)."""

        def scaled(name: str) -> float:
            value = getattr(self, name)
            return factor * value / (1 - value + factor * value) if name in self.odds else factor * value

        return dataclasses.replace(self, **{n: scaled(n) for n in self.strengths if getattr(self, n)})

    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def layer_of(name: str) -> int | None:
    """Decoder-block index in a parameter name, or None outside the blocks. Other numbers (experts) do not count."""
    parts = name.split(".")
    for before, number in pairwise(parts):
        if before in ("layers", "h", "block", "blocks") and number.isdigit():
            return int(number)
    return None


def canonical(name: str) -> str:
    """A parameter's name in the plain model: decorations of PEFT, DDP, FSDP and replaced modules removed."""
    for part in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_model.model.", ORIGINAL):
        name = name.replace(part, "")
    return name.replace("_orig_mod.", "").removeprefix("module.")
