"""What a row holds beside tokens, filters and orders of the task's rows, and what a step is counted by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from cases import HOST, run, same, start
from holdfast import methods as hf
from holdfast.data.mix import Mix, Source
from holdfast.data.tokens import tokenize
from holdfast.engine.base import token_logp
from holdfast.engine.counts import add_counts, count_rows
from holdfast.engine.forward import forward
from holdfast.engine.pack import WEIGHT, TokenRow, pack, token_row
from holdfast.errors import PlanError
from holdfast.hosts.plain import Training
from holdfast.hosts.processes import deal, dealt
from holdfast.method import Method, Term
from holdfast.plan import Plan
from holdfast.services import Context, View
from holdfast.session import Session

LINEAR = {"adam_epsilon": 1.0, "learning_rate": 0.1, "max_grad_norm": 0.0, "warmup_steps": 0.0}


# ---- a row


def whole_row() -> TokenRow:
    return TokenRow(
        np.array([5, 6, 7, 8]),
        np.array([False, False, True, True]),
        gold=np.array([False, False, True, False]),
        targets=np.array([5, 6, 70, 80]),
        numbers={"w": np.array([0.0, 1.0, 2.0, 3.0])},
    )


def test_targets_are_predicted_and_ids_are_read(tiny_model):
    """Both rows read 5 6 7; the second is asked for 70 at its last position: the same logits, another loss."""
    model = tiny_model()
    read = TokenRow(np.array([5, 6, 7]), np.array([False, False, True]))
    other = replace(read, targets=np.array([5, 6, 70]))
    packed, logits = forward(model, [read, other])
    assert packed.target.tolist() == [7, 70] and torch.equal(logits[0], logits[1])
    a, b = (x.item() for x in token_logp(model, [read, other]))
    logp = logits[0].log_softmax(-1)
    assert a == pytest.approx(logp[7].item()) and b == pytest.approx(logp[70].item())
    assert read.key == other.key  # a teacher is asked about what is read


def test_the_datas_own_weights_multiply_losses_and_the_count_stays(tiny_model):
    """(0.5 l1 + 0.5 l2 + 3 l3 + l4 + l5) / 5, however the step is split; l: minus log-probability of a target."""
    model = tiny_model()
    weights = np.array([9.0, 0.5, 0.5, 3.0], dtype=np.float32)
    first, second = replace(token_row([5, 6, 7, 8], 1), numbers={WEIGHT: weights}), token_row([9, 10, 11], 1)
    ctx = Context(model, None, 0, total_steps=1)
    session = Session(Plan([]), model, ctx)
    session.enter(session.stages[0])
    counts = count_rows([first, second])
    logp = token_logp(model, [first, second])
    wanted = -(logp[0] @ weights[1:] + logp[1].sum()) / 5
    together, parts = session.loss(model, [first, second], counts, 0)
    apart = [session.loss(model, [row], counts, 0, 0.5)[0] for row in (first, second)]
    same = pytest.approx(float(wanted), rel=1e-5)
    assert (together.item(), parts["task"].item(), sum(apart).item()) == (same, same, same)
    plain = session.loss(model, [replace(first, numbers={}), second], counts, 0)[0]
    assert abs(plain.item() - together.item()) > 0.01


def test_a_cut_row_keeps_all_that_belongs_to_its_tokens():
    row = whole_row()
    cut = row.cut(3)
    assert row.cut(4) is row and cut.predicted.tolist() == [5, 6, 70] and cut.gold.tolist() == [False, False, True]
    assert cut.numbers["w"].tolist() == [0, 1, 2] and cut.num_scored == 1


def test_numbers_stand_at_the_scored_positions():
    rows = [whole_row(), token_row([3, 4], 1), token_row([3, 4], 1, "Other")]
    view = View(pack(rows), torch.zeros(4, 9), 0, None, {}, None, "Mine", {}, {}, {}, counts=count_rows(rows))
    assert view.number("w").tolist() == [2, 3, 1, 1]
    assert view.number("w", missing=0.5).tolist() == [2, 3, 0.5, 0.5]
    assert view.total("w") == 6 and view.total("w", missing=0.5) == 5.5 and view.total("x") == view.count() == 3


# ---- writers and owners


@dataclass(frozen=True, kw_only=True)
class Reversed(Method):
    """The task's rows from the last to the first, in every round."""

    writes: ClassVar = frozenset({"order"})

    def data(self, mix: Mix, ctx: Context) -> Mix:
        return mix.with_order(lambda rows, _seed, _turn: range(len(rows))[::-1])


@dataclass(frozen=True, kw_only=True)
class Repaired(Method):
    """Changes what is read."""

    writes: ClassVar = frozenset({"ids"})


@dataclass(frozen=True, kw_only=True)
class Short(Method):
    """Keeps the rows of at most so many tokens."""

    most: int = 20

    def data(self, mix: Mix, ctx: Context) -> Mix:
        return mix.with_filter(self.name, lambda r: len(r.ids) <= self.most)


@dataclass(frozen=True, kw_only=True)
class Unlikely(Method):
    """Keeps the rows that the base finds hardest, by the median."""

    def data(self, mix: Mix, ctx: Context) -> Mix:
        means = {r.key: x.mean() for r, x in zip(mix.task, token_logp(ctx.model, mix.task), strict=True)}
        return mix.with_filter(self.name, lambda r: means[r.key] <= np.median(list(means.values())))


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ([hf.Curriculum(), Reversed()], "Curriculum and Reversed both order the task's rows"),
        ([hf.MaskedThought(), Repaired()], "MaskedThought and Repaired both write 'ids' into the rows"),
    ],
)
def test_two_writers_of_one_thing_are_refused(methods, words):
    with pytest.raises(PlanError, match=words):
        Plan(methods).check(HOST, Context(None, None))


# ---- left out, and in order


def sized(*lengths: int) -> list[TokenRow]:
    return [token_row(range(n), 1) for n in lengths]


def test_a_row_stays_when_all_filters_keep_it():
    mix = Mix(sized(2, 3, 4, 5)).with_filter("A", lambda r: len(r.ids) > 2).with_filter("B", lambda r: len(r.ids) < 5)
    assert [len(r.ids) for r in mix.kept] == [3, 4] and mix.left_out == {"A": 0.25, "B": 0.25}
    assert mix.num_rows(3) == 6 and {len(r.ids) for r in islice(mix.draw(0), 6)} == {3, 4}


def scoring(length: int, scored: int, source: str) -> TokenRow:
    return token_row(range(length), length - scored, source=source)


def test_parts_of_the_scored_positions_by_hand():
    """Task: rows of 10 tokens, 4 scored. A: a quarter of the rows, 2 scored. B: 30 % of the tokens, rows of 20, 20 and
    20, of which 10 each are scored, two of them labelled B:x. An average row of L tokens: B has 0.3 L / 20 of the
    rows, A 0.25 with 6 tokens, the task 0.75 - 0.015 L with 10. L = 1.5 + 0.3 L + 7.5 - 0.15 L, so L = 9 / 0.85.
    Rows: B 0.1588, A 0.25, task 0.5912. Scored: 1.588 (2/3 of it B:x), 0.5, 2.3647, of 4.4529."""
    many = [scoring(20, 10, "B:x"), scoring(20, 10, "B:x"), scoring(20, 10, "B:y")]
    a, b = Source("A", [scoring(6, 2, "A")], 0.25), Source("B", many, 0.3, unit="tokens")
    mix = Mix([scoring(10, 4, "task")] * 4, (a, b))
    wanted = {"task": 0.53105, "A": 0.11229, "B:x": 0.23778, "B:y": 0.11889}
    assert mix.parts() == {n: pytest.approx(x, abs=1e-4) for n, x in wanted.items()}
    counted = Counter[str]()
    for row in islice(mix.draw(0), 2000):
        counted[row.source] += row.num_scored
    assert {n: x / counted.total() for n, x in counted.items()} == {
        n: pytest.approx(x, abs=3e-3) for n, x in wanted.items()
    }
    assert Mix(mix.task, (Source("C", lambda: iter(many), 0.5),)).parts() == {}


def test_an_empty_rest_names_the_methods():
    mix = Mix(sized(2, 3)).with_filter("A", lambda r: len(r.ids) > 2).with_filter("B", lambda r: len(r.ids) < 3)
    with pytest.raises(PlanError, match="A 50%, B 50%"):
        mix.num_rows(1)


def test_an_order_decides_every_round_and_knows_what_stays():
    def order(rows: Sequence[TokenRow], seed: int, turn: int) -> list[int]:
        return [(n + turn) % len(rows) for n in range(len(rows))]

    mix = Mix(sized(2, 3, 9, 4)).with_filter("A", lambda r: len(r.ids) < 9).with_order(order)
    assert [len(r.ids) for r in islice(mix.draw(5), 9)] == [2, 3, 4, 3, 4, 2, 4, 2, 3]


def test_what_was_left_out_is_told(tiny_model, tokenizer, rows):
    result = run([Short(most=20), Unlikely()], tiny_model(), tokenizer, rows, 8)
    left = result.session.left_out
    assert set(left) == {"Short", "Unlikely"} and 0 < left["Short"] < 1 and left["Unlikely"] == pytest.approx(0.5)
    with pytest.raises(PlanError, match="No row of the task is left: of 24 rows the filters leave out Short 100%"):
        run([Short(most=2)], tiny_model(), tokenizer, rows)


def test_the_data_site_sees_the_base_beside_an_adapter(tiny_model, tokenizer, rows):
    """A trainer asks for the mix when the adapter is on the model already: here one that changes every answer."""
    _, mix = start(Plan([Unlikely()]), tiny_model(), tokenizer, rows, Training(2, 4))
    wanted = [r.key for r in mix.kept]
    session, _ = start(Plan([hf.LoRA(r=4, lora_dropout=0.5), Unlikely()]), tiny_model(), tokenizer, rows, Training(2))
    torch.manual_seed(0)
    for name, p in session.params.items():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    trains = {n for n, p in session.model.named_parameters() if p.requires_grad}
    far = [x.mean() for x in token_logp(session.model.eval(), mix.task)]
    session.model.train()
    assert [r.key for r, x in zip(mix.task, far, strict=True) if x <= np.median(far)] != wanted
    assert [r.key for r in session.mix(mix.task).kept] == wanted and len(wanted) == 12
    assert session.model.training and trains == {n for n, p in session.model.named_parameters() if p.requires_grad}


# ---- counts


def of(source: str, scored: int, owner: str = "task", group: str | None = None) -> TokenRow:
    return replace(token_row(range(scored + 1), 1, owner, source), group=group)


def test_counts_of_parts_add_up_to_those_of_the_whole():
    rows = [of("a", 2), of("b", 5), of("a", 1), of("x", 3, "Other"), whole_row()]
    whole = count_rows(rows)
    assert add_counts(count_rows(rows[:2]), count_rows(rows[2:])) == whole
    assert whole["task"] == 10 and whole["task/rows"] == 4 and whole["task/of/a"] == 3 and whole["task/of/a/rows"] == 2
    assert whole["Other"] == 3 and whole["task/sum/w"] == 5 and whole["task/with/w"] == 2


@dataclass(frozen=True, kw_only=True)
class Averaged(Method):
    """Penalises the target's log-probability on rows of its own, averaged as `per` says."""

    per: str = "row"
    sizes: tuple[int, ...] = (3, 4, 11, 6)  # tokens of the rows; the sources take turns
    grouped: bool = False

    def asides(self, ctx: Context) -> Sequence[TokenRow]:
        made = [token_row(range(7, 7 + n), 1, self.name, "ab"[i % 2]) for i, n in enumerate(self.sizes)]
        return [replace(r, group=str(i // 2)) if self.grouped else r for i, r in enumerate(made)]

    def asides_at(self, step: int, pool: int, total: int) -> Sequence[int]:
        return range(pool)

    def loss(self, view: Any) -> Term | None:
        at = view.positions(self.name)
        if not len(at):
            return None
        value = view.token_logp[at]
        if self.per == "row":
            row = view.rows(self.name)
            value = torch.zeros(int(row.max()) + 1).index_add(0, row, value) / torch.bincount(row)
        if self.grouped:  # a pair must see both of its rows
            assert all(n == 2 for n in Counter(r.group for r in view.packed.rows if r.group).values())
        return Term(value, self.name, self.per)


@torch.no_grad()
def test_a_term_by_row_and_by_source_is_the_mean_it_says(tiny_model, tokenizer, rows):
    """Rows of 2, 3, 10 and 5 targets from a, b, a, b. By position: the mean of 20 numbers. By row: of the four rows'
    means. By source: (sum over a's 12 / 12 + sum over b's 8 / 8) / 2."""
    model = tiny_model()
    each = [x.astype(float) for x in token_logp(model, Averaged().asides(Context(None, None)))]
    assert [len(x) for x in each] == [2, 3, 10, 5]
    a, b = np.concatenate(each[::2]), np.concatenate(each[1::2])
    wanted = {
        "position": np.concatenate(each).mean(),
        "row": np.mean([x.mean() for x in each]),
        "source": (a.sum() / 12 + b.sum() / 8) / 2,
    }
    assert len({round(v, 6) for v in wanted.values()}) == 3
    for per, value in wanted.items():
        with torch.enable_grad():
            first = run([Averaged(per=per)], tiny_model(), tokenizer, rows, 1).log.loss[0][1]
        assert math.isclose(first["Averaged"], value, rel_tol=1e-5), per


PLANS = {
    "row": [Averaged(per="row")],
    "source": [Averaged(per="source")],
    "pairs": [Averaged(grouped=True)],
    "balanced": [hf.Replay(share=0.5), hf.MFTCoder()],
    "balanced samples": [hf.Replay(share=0.5), hf.MFTCoder(inside="samples", weights=(("task", 3.0),))],
    "filtered": [Short(most=20), Unlikely(), Reversed()],
    "read otherwise": [hf.MaskedThought(warmup=0.0), hf.TLTraining()],
}


@pytest.mark.parametrize("name", PLANS)
def test_one_batch_of_8_equals_4_of_2(name, tiny_model, tokenizer, rows):
    one = run(PLANS[name], tiny_model(), tokenizer, rows, batch_size=8, **LINEAR)
    many = run(PLANS[name], tiny_model(), tokenizer, rows, batch_size=2, gradient_accumulation_steps=4, **LINEAR)
    for n, value in one.weights.items():
        torch.testing.assert_close(many.weights[n], value, rtol=1e-5, atol=1e-6)
    assert [p.keys() for _, p in one.log.loss] == [p.keys() for _, p in many.log.loss]


@pytest.mark.parametrize("name", ["filtered", "balanced", "read otherwise"])
def test_a_resumed_run_goes_on_in_order(name, tmp_path, tiny_model, tokenizer, rows):
    class Killed(Exception):
        pass

    def die(_session: Any, step: int) -> None:
        if step == 5:
            raise Killed

    settings = {"steps": 8, "save_steps": 2, "folder": tmp_path}
    with pytest.raises(Killed):
        run(PLANS[name], tiny_model(), tokenizer, rows, watch=die, **settings)
    same(
        run(PLANS[name], tiny_model(), tokenizer, rows, **settings), run(PLANS[name], tiny_model(), tokenizer, rows, 8)
    )


# ---- groups


def test_rows_of_a_group_are_dealt_together():
    rows = [of("a", n + 1, "M", group) for n, group in enumerate(["x", None, "y", "x", None, "y"])]
    parts = [[r.num_scored for r in part] for part in dealt(rows, 3)]
    assert parts == [[1, 4, 5], [2], [3, 6]]  # x, single, y, single: four units in turn over three
    assert dealt(rows[1:2], 3) == [[rows[1]], [], []]


def test_a_group_stays_in_one_micro_batch_of_a_step():
    batch, pairs = [of("task", n) for n in (4, 5, 6)], [of("p", n, "M", str(n % 4)) for n in range(1, 9)]
    micros, share = deal(batch, pairs, 4)
    assert share == 1 / 4 and sorted(r.num_scored for m in micros for r in m if r.owner == "M") == list(range(1, 9))
    for group in "0123":
        assert sum(any(r.group == group for r in m) for m in micros) == 1


# ---- rows that are held out, and rows made of the task's

COPIES = [hf.DART(), hf.ManyICL(source="task"), hf.InContextMix(source="both"), hf.PCP()]


@pytest.mark.parametrize("first", COPIES, ids=lambda m: m.name)
def test_rows_are_held_out_before_others_are_made_of_them(first):
    with pytest.raises(PlanError, match=f"{first.name} adds rows made of the task's, and CoBa behind it") as e:
        Plan([first, hf.CoBa()]).check_together()
    assert f"Put CoBa before {first.name}" in e.value.cure
    Plan([hf.CoBa(), first]).check_together()


@pytest.mark.parametrize("other", [hf.ManyICL(), hf.InContextMix(), hf.PCP(sources=("text.jsonl",))])
def test_rows_of_other_tasks_may_come_first(other):
    Plan([other, hf.SkillIt()]).check_together()


@pytest.mark.parametrize("method", [hf.InContextMix(source="task", pool=32), hf.ManyICL(source="task", pool=8)])
def test_no_example_is_made_of_a_held_out_row(method, tiny_model, tokenizer, rows):
    ctx = Context(tiny_model(), tokenizer, rows=rows)
    task = [tokenize(r, tokenizer, 512) for r in rows]
    mix = method.data(Mix(task).hold_out(0.4), ctx)
    held = [tokenizer.decode(r.ids, skip_special_tokens=True).split("\nQueue:")[0] for r in mix.held_out()["task"]]
    texts = [tokenizer.decode(r.ids, skip_special_tokens=True) for r in mix.sources[0].rows]
    assert 3 < len(held) < len(rows) and not [h for h in held for t in texts if h in t]
    every = [tokenizer.decode(r.ids) for r in method.data(Mix(task), ctx).sources[0].rows]
    assert any(h in t for h in held for t in every)


def test_methods_that_look_at_all_rows_are_refused_beside_held_out_ones():
    for other in (hf.CoBa(), hf.SkillIt()):
        with pytest.raises(PlanError, match="MORepair"):
            Plan([other, hf.MORepair()]).check_together()
        Plan([other, hf.MORepair(sources=("why.jsonl",))]).check_together()
    with pytest.raises(PlanError, match="which DART's answers to the same would lack"):
        Plan([hf.ProMoT(), hf.DART()]).check_together()
