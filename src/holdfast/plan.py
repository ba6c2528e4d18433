"""The plan: methods in order, checked against each other and the host before anything is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from holdfast.errors import PlanError, suggest
from holdfast.method import Method
from holdfast.services import Context
from holdfast.sites.merging import check_others

PHASES = ("mask", "rescale", "project")


@dataclass(frozen=True)
class Host:
    """What a training loop can do. The planner refuses what it cannot."""

    name: str
    packing: bool = False  # several examples share one row the model's own forward cannot tell apart
    hides_gradients: bool = False  # DeepSpeed ZeRO
    quantised: bool = False
    weight_decay: float = 0.0


class Plan:
    """An ordered list of methods.

    >>> from holdfast.methods import LoRA, ICLAnchor
    >>> Plan([LoRA(r=8), ICLAnchor()]).names
    ('LoRA', 'ICLAnchor')
    """

    def __init__(self, methods: Sequence[Method] = ()):
        for m in methods:
            if not isinstance(m, Method):
                raise PlanError(f"{m!r} in the plan is not a method.", "Give instances, such as LoRA(r=8).")
        self.methods = tuple(methods)
        twice = [n for n in self.names if self.names.count(n) > 1]
        if twice:
            raise PlanError(
                f"{twice[0]} stands twice in the plan, and nothing says which one counts.",
                f"Keep one {twice[0]}.",
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(m.name for m in self.methods)

    def __iter__(self) -> Iterator[Method]:
        return iter(self.methods)

    def __len__(self) -> int:
        return len(self.methods)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.methods == other.methods

    def __repr__(self) -> str:
        return f"Plan({list(self.methods)!r})"

    # ---- recipes

    @classmethod
    def from_recipe(cls, items: Sequence[Any]) -> Plan:
        """From a recipe's list: names, or {name: {field: value}}."""
        return cls([method_from(item) for item in items])

    def to_recipe(self) -> list[dict[str, dict[str, Any]]]:
        return [{m.name: {k: _plain(v) for k, v in m.settings().items()}} for m in self.methods]

    # ---- strength

    @property
    def has_strength(self) -> bool:
        """Whether some method says which of its fields are its strength, and they are not 0."""
        return any(getattr(m, field) for m in self.active for field in m.strengths)

    def stronger(self, factor: float) -> Plan:
        """The plan with the strength of each method times `factor` (`Method.stronger`)."""
        return Plan([m.stronger(factor) for m in self.methods])

    # ---- checks

    @property
    def active(self) -> tuple[Method, ...]:
        """The methods that are not switched off by their own values."""
        return tuple(m for m in self.methods if not m.off())

    @property
    def trains_new(self) -> bool:
        """Whether weights train that begin anew beside the base's, and none of its own, copies or scales of them."""
        return any(m.wraps and not m.copies for m in self.active)

    def check(self, host: Host, ctx: Context) -> None:
        """Raise PlanError for the first thing that cannot work, naming both parties and the cure."""
        for m in self.active:
            m.check(ctx)
        self.check_together()
        self.check_host(host)
        for m in self.active:
            check_others(m, ctx)

    def check_together(self) -> None:
        """The part of `check` that needs no model: ownership, order and meaning."""
        self._check_owners()
        self._check_writers()
        self._check_meaning()

    def _check_owners(self) -> None:
        for what, owners in (
            ("wrap the model's layers", [m for m in self.active if m.wraps]),
            ("split the run into stages", [m for m in self.active if "stages" in m.sites()]),
            ("change decoding", [m for m in self.active if "decode" in m.sites()]),
        ):
            if len(owners) > 1:
                raise PlanError(
                    f"{owners[0].name} and {owners[1].name} both want to {what}.",
                    "Keep one of them, or run them one after the other.",
                )
        ends = next((m for m in self.active if m.may_end), None)
        stages = next((m for m in self.active if "stages" in m.sites()), None)
        if ends and stages:
            what = f"{ends.name} may end the run, and {stages.name} splits it into stages: the rest would never come."
            raise PlanError(what, "Keep one of them.")
        wrapper = next((m for m in self.active if m.wraps), None)
        dense = next((m for m in self.active if "dense" in m.needs or m.restarts), None)
        compare = [m for m in self.active if "base_weights" in m.needs or "merge" in m.sites()]
        for replacer, compares in product([m for m in self.active if "replace" in m.sites()], compare):
            if replacer is compares:
                continue
            raise PlanError(
                f"{compares.name} compares tuned weights with the base's, but {replacer.name} trains modules of its "
                "own, which the base does not have.",
                f"Keep one of the two; beside {replacer.name} use KLToBase to stay near the base.",
            )
        if wrapper and dense:
            raise PlanError(
                f"{dense.name} works on the model's own weights, but {wrapper.name} freezes them and trains an "
                "adapter.",
                f"Keep {dense.name} and drop {wrapper.name}, or the other way round.",
            )
        choosing = [m for m in self.active if "entries" in m.sites()]
        stay, back = ([m for m in choosing if m.leaves == word] for word in ("stay", "return"))
        if stay and back:
            raise PlanError(
                f"Entries that {stay[0].name} does not choose any more stay as they are, those of {back[0].name} go "
                "back to the base.",
                "Keep one of them.",
            )

        self._check_prompt()

    def _check_prompt(self) -> None:
        """What would do nothing where nothing but a soft prompt trains."""
        owner = next((m for m in self.active if m.only_prompts), None)
        idle = next((m for m in self.active if owner and m.rests_beside_a_prompt), None)
        if owner and idle:
            raise PlanError(
                f"{owner.name} trains a soft prompt and no weight, and {idle.name} works on weights, or with rows of "
                "its own, that rest while a prompt trains.",
                f"Remove {idle.name}, or use ProMoT, which trains weights after the prompt.",
            )

    def _check_writers(self) -> None:
        """What one method alone decides about the rows."""
        writer: dict[str, Method] = {}
        for m in self.active:
            for what in sorted(m.writes):
                first = writer.setdefault(what, m)
                if first is not m:
                    words = "order the task's rows" if what == "order" else f"write {what!r} into the rows"
                    raise PlanError(f"{first.name} and {m.name} both {words}.", "Keep one of them.")

    def _check_meaning(self) -> None:
        for a in self.active:
            for b in self.active:
                if a is not b and b.name in a.refuses:
                    raise PlanError(f"{a.name} and {b.name} do not fit: {a.refuses[b.name]}", "Keep one of them.")
        for a, b in combinations(self.active, 2):
            if a.copies_rows and b.holds_out:
                raise PlanError(
                    f"{a.name} adds rows made of the task's, and {b.name} behind it keeps some of these out of "
                    "training.",
                    f"Put {b.name} before {a.name}.",
                )
        phases = [(PHASES.index(m.phase), m) for m in self.active if "grad" in m.sites()]
        for (i, a), (j, b) in pairwise(phases):
            if i > j:
                raise PlanError(
                    f"{a.name} ({a.phase}) stands before {b.name} ({b.phase}), but gradients are masked, then "
                    "rescaled, then projected.",
                    f"Put {b.name} before {a.name}.",
                )

    def check_host(self, host: Host) -> None:
        """The part of `check` that needs the host alone: what its loop, or a quantised base, cannot do."""
        for m in self.active:
            if host.packing and m.trains_prompt:
                raise PlanError(
                    f"{m.name} puts a soft prompt before every example, but {host.name} packs several examples into "
                    "one row, where only the first would get it.",
                    "Set packing=False and padding_free=False.",
                )
            if host.hides_gradients and {"grad", "entries", "steer", "update"} & set(m.sites()):
                raise PlanError(
                    f"{m.name} changes gradients or steps, but {host.name} under DeepSpeed does not show them.",
                    "Use DDP or FSDP2 with this method.",
                )
            if host.quantised and "replace" in m.sites():
                raise PlanError(
                    f"{m.name} puts modules made of the base's own in their place, but the base model is loaded in 4 "
                    "or 8 bits.",
                    f"Load it unquantised, or use LoRA instead of {m.name}.",
                )
            if host.quantised and "dense" in m.needs:
                raise PlanError(
                    f"{m.name} needs plain weights, but the base model is loaded in 4 or 8 bits.",
                    f"Load it unquantised, or use LoRA instead of {m.name}.",
                )
        if host.quantised and not any(m.wraps or m.only_prompts for m in self.active):
            trains = next((m.name for m in self.active if "base_weights" in m.needs), "A plan without an adapter")
            raise PlanError(
                f"{trains} trains the model's own weights, but the base model is loaded in 4 or 8 bits.",
                "Put LoRA into the plan, or load the model unquantised.",
            )

    # ---- words

    def explain(self) -> list[dict[str, Any]]:
        """One row per method: what it does where, its settings and its paper."""
        return [
            {
                "method": m.name,
                "settings": {k: _plain(v) for k, v in m.settings().items()},
                "sites": list(m.sites()),
                "does": m.does if not m.off() else "switched off by its values",
                "paper": {"title": m.paper.title, "arxiv": m.paper.arxiv} if m.paper else None,
            }
            for m in self.methods
        ]


def method_from(item: Any) -> Method:
    """Build one method from a recipe item; unknown names and fields are refused with a near miss."""
    from holdfast import methods

    name, fields = next(iter(item.items())) if isinstance(item, Mapping) else (item, None)
    known = methods.all_methods()
    if name not in known:
        raise PlanError(f"The plan names {name!r}, which is not a method.", suggest(str(name), tuple(known)))
    kind = known[name]
    allowed = {f.name: f for f in dataclasses.fields(kind)}
    for key in fields or {}:
        if key not in allowed:
            raise PlanError(f"{name} has no setting {key!r}.", suggest(str(key), tuple(allowed)))
    try:
        hints = get_type_hints(kind)
        return kind(**{k: _typed(f"{name}.{k}", hints[k], v) for k, v in (fields or {}).items()})
    except TypeError as e:
        raise PlanError(f"The settings of {name} do not fit: {e}.", f"See `holdfast methods {name}`.") from e


KINDS = {
    bool: ("a switch", "Write true or false."),
    int: ("a whole number", "Write it without quotes or a point."),
    float: ("a number", "Write it without quotes."),
    str: ("a word", "Write a name."),
    tuple: ("a list", "Write [a, b, c]."),
}


def _typed(where: str, hint: Any, value: Any) -> Any:
    """Lists become tuples; a value of the wrong kind is refused here and not deep in a run."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [get_origin(m) or m for m in members]
    if isinstance(value, list):
        value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
    if isinstance(value, str) and float in kinds and str not in kinds:
        with suppress(ValueError):
            value = float(value)  # YAML 1.1 reads 3e-4 as a word
    if isinstance(value, float) and value.is_integer() and int in kinds:
        return int(value)
    if type(value) in kinds or (type(value) is int and float in kinds) or not set(kinds) & set(KINDS):
        return value
    words = [KINDS[k] for k in kinds if k in KINDS]
    raise PlanError(f"{where} is {value!r}, but it is {' or '.join(w for w, _ in words)}.", words[0][1])


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value
