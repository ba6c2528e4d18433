"""What `steer`, `entries` and `stages` promise beside what their methods' own tests show."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from cases import HOST, run, start, token_rows
from holdfast import methods as hf
from holdfast.data.mix import Mix, Source, is_held
from holdfast.engine.forward import forward
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.hosts.plain import Training, train
from holdfast.method import Method, Past, Stage, State, Steer
from holdfast.plan import Plan
from holdfast.services import Context
from holdfast.session import Session
from holdfast.sites.entries import Entries
from holdfast.sites.held_out import HeldOut
from holdfast.sites.steering import Steering

STEP = {"warmup_steps": 0, "lr_scheduler_type": "constant"}


class Killed(Exception):
    """Stands for a lost process."""


def killed_and_resumed(methods: list[Method], at: int, folder: Any, *world: Any, **settings: Any) -> Any:
    """Die in step `at` of a run that saves every 2 steps, and go on with fresh objects."""
    fresh, *rest = world
    settings = {"steps": 8, "save_steps": 2, "folder": folder, **settings}

    def die(_session: Session, step: int) -> None:
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        run(methods, fresh(), *rest, watch=die, **settings)
    return run(methods, fresh(), *rest, **settings)


def equal(a: Any, b: Any) -> None:
    assert a.log.loss == b.log.loss
    assert all(torch.equal(a.weights[n], w) for n, w in b.weights.items())


# ---- what was asked for the next step


@dataclass(frozen=True, kw_only=True)
class Halves(Method):
    """Weighs the task's rows by half at every second step, and holds a layer still at the others."""

    def steer(self, past: Past, state: State) -> Steer:
        if past.step % 2:
            return Steer(source_weight={"task": 0.5})
        return Steer(freeze_next=(r"layers\.0\.",))


@pytest.mark.parametrize("at", [3, 4, 5, 6])
def test_what_was_asked_for_the_next_step_is_in_the_checkpoint(at, tmp_path, tiny_model, tokenizer, rows):
    world = (tiny_model, tokenizer, rows)
    settings = {"save_steps": 1}
    again = killed_and_resumed([Halves()], at, tmp_path, *world, **settings)
    equal(again, run([Halves()], tiny_model(), tokenizer, rows, 8))


def test_what_holds_still_gets_no_gradient_and_late_it_is_the_same(tiny_model, tokenizer, rows, monkeypatch):
    made: list[set[str]] = []
    honest = Steering.drop

    def drop(self: Steering, params: Any) -> None:
        made.append({n for n, p in params.items() if p.grad is not None})
        honest(self, params)

    monkeypatch.setattr(Steering, "drop", drop)
    early = run([Halves()], tiny_model(), tokenizer, rows, 4, weight_decay=0.3)
    layer = {n for n in made[0] if "layers.0." in n}
    assert layer and made[0] == made[2] and made[1] == made[3] == made[0] - layer
    made.clear()
    hold = Steering.hold
    monkeypatch.setattr(Steering, "hold", lambda self, params: (setattr(self, "late", True), hold(self, params))[1])
    late = run([Halves()], tiny_model(), tokenizer, rows, 4, weight_decay=0.3)
    assert made[0] == made[1]
    equal(early, late)


def test_a_penalty_on_what_holds_still_is_no_fault(tiny_model, tokenizer, rows):
    plan = [hf.L2ToInit(alpha=1.0, patterns=(r"layers\.0\.",)), Halves()]
    assert len(run(plan, tiny_model(), tokenizer, rows, 4).log.loss) == 4


def test_a_weight_that_is_steered_is_in_the_checkpoint(tmp_path, tiny_model, tokenizer, rows):
    plan, world = [hf.ICLAnchor(pool=4, every=2, hold=1e-3, hold_over=2)], (tiny_model, tokenizer, rows)
    again, whole = killed_and_resumed(plan, 7, tmp_path, *world), run(plan, tiny_model(), tokenizer, rows, 8)
    equal(again, whole)
    state = whole.session.state["ICLAnchor"]
    assert all(torch.equal(again.session.state["ICLAnchor"][n], t) for n, t in state.items())
    assert len({p["ICLAnchor/weight"] for _, p in again.log.loss if "ICLAnchor/weight" in p}) > 3


# ---- gradients, parameters, losses by source


@dataclass(frozen=True, kw_only=True)
class Sees(Method):
    """Keeps what it is shown; trains a few entries only, so that masked gradients would show."""

    needs: ClassVar = frozenset({"gradients", "base_weights", "dense"})
    seen: ClassVar[list[dict[str, Any]]] = []

    def data(self, mix: Mix, ctx: Any) -> Mix:
        return mix.add(Source("more", [TokenRow(r.ids, r.scored, source="more") for r in mix.task[:5]], 0.4))

    def entries(self, name: str, param: torch.Tensor, state: State, step: int) -> torch.Tensor:
        return torch.zeros(param.shape, dtype=torch.bool) if "embed" in name else torch.arange(param.numel()).view_as(
            param) % 2 == 0  # fmt: skip

    def grad(self, name: str, grad: torch.Tensor, state: State) -> torch.Tensor:
        return grad * 0.5

    def steer(self, past: Past, state: State) -> Steer:
        kept = {k: {n: t.clone() for n, t in getattr(past, k).items()} for k in ("grads", "params", "base")}
        self.seen.append({**kept, "loss": dict(past.loss), "total": past.total})
        return Steer()


@dataclass(frozen=True, kw_only=True)
class SeesLittle(Sees):
    needs: ClassVar = frozenset()


def seen_by(method: Method, model: Any, *world: Any, **settings: Any) -> list[dict[str, Any]]:
    Sees.seen.clear()
    run([method], model, *world, 3, max_grad_norm=1e-3, **STEP, **settings)
    return list(Sees.seen)


def test_gradients_are_whole_and_not_yet_changed(tiny_model, tokenizer, rows):
    """They are those of the mean loss over the step's targets, by autograd alone."""
    first = seen_by(Sees(), tiny_model(), tokenizer, rows, batch_size=8)[0]
    model = tiny_model()
    mix = Sees().data(Mix(token_rows(rows, tokenizer)), None)
    order = mix.draw(0)
    packed, logits = forward(model, [next(order) for _ in range(8)])
    each = torch.nn.functional.cross_entropy(logits, packed.target, reduction="none")
    each.mean().backward()
    wanted = {n: p.grad for n, p in model.named_parameters()}
    assert first["grads"].keys() == wanted.keys() and first["total"] == 3
    for name, grad in wanted.items():
        torch.testing.assert_close(first["grads"][name], grad, rtol=1e-4, atol=1e-7)
        assert torch.equal(first["params"][name], model.get_parameter(name)) and torch.equal(
            first["base"][name], first["params"][name])  # fmt: skip
    sources = [packed.rows[i].source for i in packed.row]
    for source in ("task", "more"):
        part = each[[s == source for s in sources]].sum().item() / len(each)
        assert first["loss"][f"task/{source}"] == pytest.approx(part, rel=1e-5) and part > 0


def test_micro_batches_are_summed(tiny_model, tokenizer, rows):
    one = seen_by(Sees(), tiny_model(), tokenizer, rows, batch_size=8)
    four = seen_by(Sees(), tiny_model(), tokenizer, rows, batch_size=2, gradient_accumulation_steps=4)
    for name, grad in one[0]["grads"].items():
        torch.testing.assert_close(four[0]["grads"][name], grad, rtol=1e-4, atol=1e-7)
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["loss"]["task"] == pytest.approx(a["loss"]["task/task"] + a["loss"]["task/more"], rel=1e-6)


def test_gradients_and_base_are_for_those_who_say_so(tiny_model, tokenizer, rows):
    first = seen_by(SeesLittle(), tiny_model(), tokenizer, rows)[0]
    assert not first["grads"] and not first["base"] and first["params"]


# ---- entries that return


class Drawn(Method):
    """Draws what the test says."""

    leaves = "return"
    needs = frozenset({"base_weights", "dense"})

    def __init__(self, masks: list[Any]):
        object.__setattr__(self, "masks", iter(masks))

    def entries(self, name: str, param: torch.Tensor, state: State, step: int) -> torch.Tensor:
        return torch.tensor(next(self.masks))

    def redraws(self, step: int) -> bool:
        return True


def test_what_leaves_returns_and_what_stays_goes_on():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    base = {"w": p.detach().clone()}
    entries = Entries([Drawn([[True, True, False], [True, False, True]])], {"Drawn": {}})
    with torch.no_grad():
        entries.draw(0, {"w": p}, None, base=base)
        assert p.tolist() == [1, 2, 3]
        p.copy_(torch.tensor([1.5, 2.5, 3.0]))
        entries.draw(1, {"w": p}, None, base=base)
    assert p.tolist() == [1.5, 2, 3]


def test_two_that_treat_what_leaves_differently_are_refused():
    with pytest.raises(PlanError, match=r"LIFT does not choose any more stay.*SpIEL go back"):
        Plan([hf.SpIEL(), hf.LIFT()]).check_together()


def test_entries_are_drawn_where_a_stage_begins(tiny_model, tokenizer, rows):
    """Behind a prompt stage the run's first step is long past."""
    plan = [hf.ProMoT(num_virtual_tokens=2), hf.LIFT(lora_rank=1)]
    got, base = run(plan, tiny_model(), tokenizer, rows, 6), dict(tiny_model().named_parameters())
    moved = {n: int((w != base[n]).sum()) for n, w in got.weights.items()}
    assert {n: m for n, m in moved.items() if m} == {n: min(sum(w.shape), w.numel()) for n, w in base.items()
                                                     if w.ndim == 2 and "layers." in n}  # fmt: skip


# ---- stages


@dataclass(frozen=True, kw_only=True)
class Rounds(Method):
    """Two stages; the second starts again, for what it trains."""

    trains: tuple[str, ...] = (r"layers\.1\.",)
    sources: tuple[str, ...] | None = ("more",)
    restart: bool = True

    def data(self, mix: Mix, ctx: Any) -> Mix:
        return mix.add(Source("more", [TokenRow(r.ids, r.scored, source="more") for r in mix.task[:5]], 0.4))

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage("all", 0.5),
            Stage("some", 0.5, self.trains, sources=self.sources, restart=self.restart),
        )


def test_a_stage_trains_what_it_names_from_where_it_says(tiny_model, tokenizer, rows):
    middle: dict[str, torch.Tensor] = {}

    def watch(session: Session, step: int) -> None:
        if step == 4:
            middle.update({n: p.detach().clone() for n, p in session.model.named_parameters()})

    got = run([Rounds()], tiny_model(), tokenizer, rows, 8, watch=watch, **STEP)
    base = dict(tiny_model().named_parameters())
    for name, w in got.weights.items():
        assert torch.equal(w, middle[name]) == ("layers.1." not in name)
        assert not torch.equal(w, base[name]) and not torch.equal(middle[name], base[name])
    # the second stage alone, from the base, with the first stage's other weights in place
    again = tiny_model()
    with torch.no_grad():
        for name, p in again.named_parameters():
            p.copy_(base[name] if "layers.1." in name else middle[name])
    session = Session(Plan([]), again, Context(again, tokenizer))
    session.prepare()
    for name, p in again.named_parameters():
        p.requires_grad_("layers.1." in name)
    session._wrapped = frozenset(n for n, p in again.named_parameters() if p.requires_grad)
    mix = Rounds().data(Mix(token_rows(rows, tokenizer)), None).only(("more",))

    class Later:
        def only(self, *names: Any) -> Any:
            return self

        def draw(self, seed: int) -> Any:
            order = mix.draw(seed)
            for _ in range(16):
                next(order)
            return order

        def num_rows(self, epochs: float) -> int:
            return mix.num_rows(epochs)

    train(session, Later(), Training(4, batch_size=4, learning_rate=1e-3, save_steps=0, **STEP))
    for name, p in again.named_parameters():
        torch.testing.assert_close(p.detach(), got.weights[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("at", [3, 5, 7])
@pytest.mark.parametrize("method", [Rounds(), Rounds(restart=False, trains=("mlp",)), hf.LTSFT()], ids=repr)
def test_stages_go_on_after_a_restart(method, at, tmp_path, tiny_model, tokenizer, rows):
    """Inside of the first stage, between the two (the checkpoint of step 4), and inside of the second."""
    again = killed_and_resumed([method], at, tmp_path, tiny_model, tokenizer, rows)
    equal(again, run([method], tiny_model(), tokenizer, rows, 8))


def test_the_rows_of_a_stage_are_those_of_its_sources(tiny_model, tokenizer, rows):
    got = run([Rounds(sources=("task",))], tiny_model(), tokenizer, rows, 8)
    assert got.log.realised["more/examples"] + got.log.realised["task/examples"] == 32
    alone = run([Rounds(sources=None)], tiny_model(), tokenizer, rows, 8).log.realised["more/examples"]
    assert 6 <= got.log.realised["more/examples"] <= 7 and alone > 11


def test_a_source_that_nobody_brings_is_named(tiny_model, tokenizer, rows):
    with pytest.raises(PlanError, match="'mroe', which is no source"):
        run([Rounds(sources=("mroe",))], tiny_model(), tokenizer, rows, 8)


def test_shares_of_what_is_left_keep_their_proportions():
    mix = Mix([]).add(Source("a", [row(1)], 0.1)).add(Source("b", [row(2)], 0.3))
    order = mix.only(("a", "b")).draw(0)
    assert Counter(int(next(order).ids[0]) for _ in range(40)) == {1: 10, 2: 30}


def test_beside_an_adapter_nothing_starts_again(tiny_model, tokenizer):
    with pytest.raises(PlanError, match=r"Rounds works on the model's own weights, but LoRA"):
        Plan([hf.LoRA(), Rounds()]).check(HOST, Context(tiny_model(), tokenizer))


# ---- held-out rows


def row(n: int, source: str = "task") -> TokenRow:
    import numpy as np

    return TokenRow(np.array([n, n + 1, n + 2]), np.array([False, True, True]), source=source)


def test_what_is_held_out_depends_on_content_alone_and_never_trains():
    many = [row(n) for n in range(400)]
    small, large = ({r.key for r in many if is_held(r, s)} for s in (0.1, 0.3))
    assert small < large and 20 < len(small) < 60 < 90 < len(large) < 150
    mix = Mix(many[::-1]).hold_out(0.1).hold_out(0.3).hold_out(0.2)
    order = mix.draw(0)
    drawn = {next(order).key for _ in range(2000)}
    assert not drawn & large and len(drawn) == 400 - len(large) == mix.num_rows(1)
    assert {r.key for r in mix.held_out()["task"]} == large


@dataclass(frozen=True, kw_only=True)
class Looks(Method):
    """Keeps the held-out losses it is shown."""

    seen: ClassVar[list[Any]] = []

    def data(self, mix: Mix, ctx: Any) -> Mix:
        return mix.hold_out(0.4)

    def held_out(self, mix: Mix, ctx: Any) -> Any:
        return mix.held_out()

    def looks(self, step: int) -> bool:
        return step % 2 == 0

    def steer(self, past: Past, state: State) -> Steer:
        self.seen.append(dict(past.held_out))
        return Steer()


@dataclass(frozen=True, kw_only=True)
class LooksToo(Looks):
    pass


def test_held_out_losses_are_means_over_tokens_and_scored_once(tiny_model, tokenizer, rows, monkeypatch):
    Looks.seen.clear()
    plan, model = Plan([hf.LoRA(r=2, lora_dropout=0.5), Looks(), LooksToo()]), tiny_model()
    settings = Training(4, batch_size=4, save_steps=0)
    session, mix = start(plan, model, tokenizer, rows, settings)
    scored: list[int] = []
    look = session._look
    monkeypatch.setattr(session, "_look", lambda rows: scored.append(len(rows)) or look(rows))
    train(session, mix, settings)
    held = mix.held_out()["task"]
    assert 3 < len(held) < 20 and scored == [len(held)] * 2
    packed, logits = forward(tiny_model(), held)
    wanted = torch.nn.functional.cross_entropy(logits, packed.target).item()
    first, too, *rest = Looks.seen
    assert first == too == {"task": pytest.approx(wanted, rel=1e-5)}
    assert rest[0] == rest[1] == {} and rest[2] == rest[3] != first


def test_a_look_does_not_change_the_run(tiny_model, tokenizer, rows):
    """No dice are rolled and no gradient is left: dropout of later steps is what it would have been."""
    lora = hf.LoRA(r=4, lora_dropout=0.5)
    quiet = run([lora, Looks(), Never()], tiny_model(), tokenizer, rows, 4)
    equal(quiet, run([lora, Looks(), LooksToo()], tiny_model(), tokenizer, rows, 4))


@dataclass(frozen=True, kw_only=True)
class Never(Looks):
    def looks(self, step: int) -> bool:
        return False


def test_rows_of_two_methods_are_scored_once_and_means_are_their_own():
    class Some(Looks):
        def held_out(self, mix: Mix, ctx: Any) -> Any:
            return {"a": [row(1), row(2)]}

    class More(Looks):
        def held_out(self, mix: Mix, ctx: Any) -> Any:
            return {"b": [row(2), row(3)], "c": [row(1)]}

    asked: list[int] = []

    def score(rows: Any) -> Any:
        asked.extend(int(r.ids[0]) for r in rows)
        return [torch.tensor([-1.0, -float(r.ids[0])]) for r in rows]

    pools = HeldOut([Some(), More()])
    pools.cut(Mix([]), None)  # type: ignore[arg-type]
    got = pools.losses(0, torch.nn.Linear(1, 1), score)
    assert sorted(asked) == [1, 2, 3] and got == {"Some": {"a": 1.25}, "More": {"b": 1.75, "c": 1.0}}
    assert pools.losses(1, torch.nn.Linear(1, 1), score) == {}
