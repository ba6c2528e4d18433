"""InContextMix: few-shot rows with gold answers, their share and their supervision."""

from itertools import islice

import pytest

from holdfast.data.mix import Mix
from holdfast.data.rows import Row
from holdfast.engine.pack import token_row
from holdfast.errors import HoldfastError, PlanError
from holdfast.measure.tasks import anchor_tasks
from holdfast.methods import InContextMix
from holdfast.services import Context


@pytest.fixture
def ctx(tiny_model, tokenizer, rows):
    return Context(tiny_model(), tokenizer, rows=rows)


def runs(row):
    """The runs of scored tokens, as lists of ids."""
    out, before = [], False
    for token, flag in zip(row.ids.tolist(), row.scored.tolist(), strict=True):
        if flag and not before:
            out.append([])
        if flag:
            out[-1].append(token)
        before = flag
    return out


def test_share_by_hand(ctx):
    # share 0.2 of all, n_task = 16 task rows an epoch: N = 16 / (1 - 0.2) = 20, of which 4 are few-shot rows
    task = [token_row([n + 5, n + 6], 1) for n in range(16)]
    mix = InContextMix(share=0.2, pool=8).data(Mix(task), ctx)
    assert mix.num_rows(1) == 20
    drawn = list(islice(mix.draw(0), 20))
    assert sum(r.source == "InContextMix" for r in drawn) == 4
    assert {r.key for r in drawn if r.source == "task"} == {r.key for r in task}  # each seen once


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.7])
def test_realised_share_is_within_one_row_at_every_step(ctx, share):
    mix = InContextMix(share=share, pool=8).data(Mix([token_row([5, 6], 1)] * 10), ctx)
    got = 0
    for n, row in enumerate(islice(mix.draw(3), 200), start=1):
        got += row.source == "InContextMix"
        assert abs(got - share * n) <= 1


def test_share_of_tokens(ctx):
    mix = InContextMix(share=0.3, unit="tokens", pool=16).data(Mix([token_row(range(5, 15), 1)] * 10), ctx)
    drawn = list(islice(mix.draw(0), 400))
    mine = sum(len(r.ids) for r in drawn if r.source == "InContextMix")
    longest = max(len(r.ids) for r in drawn)
    assert abs(mine - 0.3 * sum(len(r.ids) for r in drawn)) <= longest


def test_rows_carry_the_tasks_cross_entropy_and_depend_on_the_seed(ctx):
    one, same, other = InContextMix(), InContextMix(), InContextMix(seed=1)
    for n in range(10):
        row = one.row(n, ctx)
        assert row.owner == "task"
        assert row.source == "InContextMix"
        assert row.key == same.row(n, ctx).key
    assert [one.row(n, ctx).key for n in range(10)] != [other.row(n, ctx).key for n in range(10)]


def test_anchor_query_is_never_among_its_demonstrations(ctx, tokenizer):
    """All four shown pairs of a 3-shot prompt of one task differ."""
    method = InContextMix(shots=(3, 3), tasks=("capitalize",), supervision="all")
    for n in range(30):
        answers = [tokenizer.decode(r).strip() for r in runs(method.row(n, ctx))]
        assert len(set(answers)) == len(answers) == 4


def test_task_query_is_never_among_its_demonstrations_even_when_rows_repeat(ctx, rows, tokenizer):
    ctx.rows = [*rows[:4]] * 6  # four tickets, each six times
    method = InContextMix(source="task", shots=(3, 3))
    method.check(ctx)
    for n in range(40):
        text = tokenizer.decode(method.row(n, ctx).ids)
        query = text[text.rindex("Ticket:") :].split("\n")[0]
        assert text.count("Ticket:") == 4
        assert text.count(query) == 1


def test_too_few_different_rows_are_refused(ctx, rows):
    ctx.rows = [*rows[:4]] * 6
    with pytest.raises(PlanError, match="only 4 different prompts"):
        InContextMix(source="both", shots=(1, 4)).check(ctx)


def test_final_supervision_masks_earlier_answers(ctx, tokenizer):
    for n in range(30):
        last, every = (InContextMix(shots=(2, 2), supervision=s).row(n, ctx) for s in ("final", "all"))
        assert (last.ids == every.ids).all()
        assert len(runs(every)) == 3
        assert runs(last) == runs(every)[-1:]
        assert last.scored.nonzero()[0][-1] == every.scored.nonzero()[0][-1]


def test_final_supervision_of_task_rows(ctx, tokenizer):
    """Two shots and a query: only the last queue name is a target."""
    row = InContextMix(source="task", shots=(2, 2)).row(0, ctx)
    text = tokenizer.decode(row.ids)
    assert [tokenizer.decode(r) for r in runs(row)] == [text[text.rindex("Queue:") + 6 :]]
    assert len(runs(InContextMix(source="task", shots=(2, 2), supervision="all").row(0, ctx))) == 3


@pytest.mark.parametrize("name", [t.name for t in anchor_tasks()])
def test_scored_tokens_are_the_answer_in_every_format(ctx, tokenizer, name):
    """The answer stands at the end of the prompt; a label such as 'A' also stands in 'A:', which is no target."""
    outputs = {y for t in anchor_tasks((name,)) for _, y in t.items}
    for n in range(12):
        row = InContextMix(tasks=(name,), shots=(2, 3)).row(n, ctx)
        (answer,) = runs(row)
        assert tokenizer.decode(answer).strip().removesuffix("<|im_end|>") in outputs
        assert row.scored[-1]  # the newline or end of turn after the answer is learnt with it


def test_both_takes_half_of_each(ctx, tokenizer):
    texts = [tokenizer.decode(InContextMix(source="both").row(n, ctx).ids) for n in range(20)]
    assert sum("Ticket:" in t for t in texts) == 10


def test_long_task_rows_lose_shots_from_the_left(ctx, tokenizer):
    whole = InContextMix(source="task", shots=(4, 4)).row(0, ctx)
    ctx.max_length = len(whole.ids) - 1
    short = InContextMix(source="task", shots=(4, 4)).row(0, ctx)
    assert len(short.ids) <= ctx.max_length
    a, b = (tokenizer.decode(r.ids, skip_special_tokens=True) for r in (whole, short))
    assert (a.count("Ticket:"), b.count("Ticket:")) == (5, 4)
    assert a.endswith(b.strip())  # the query and the shots next to it stay


def test_held_out_tasks_are_refused(ctx):
    with pytest.raises(HoldfastError, match="held-out"):
        InContextMix(tasks=("antonym",)).check(ctx)
    with pytest.raises(HoldfastError, match="held-out"):
        InContextMix(tasks=("antonym",)).row(0, ctx)


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": "x"},
        {"supervision": "x"},
        {"share": 1.0},
        {"share": -0.1},
        {"shots": (0, 2)},
        {"shots": (3, 1)},
    ],
)
def test_values_that_make_no_sense(ctx, wrong):
    with pytest.raises(PlanError, match="InContextMix"):
        InContextMix(**wrong).check(ctx)


def test_task_source_needs_text(ctx):
    ctx.rows = [Row("a", "b")]
    with pytest.raises(PlanError, match="only 1 different"):
        InContextMix(source="task").check(ctx)
