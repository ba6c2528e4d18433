"""ManyICL: what is in a row, what of it is trained on, and that answers depend on what stands before them alone."""

import copy

import numpy as np
import pytest
import torch

from cases import losses_of, run, token_rows
from holdfast.data.encoder import stops_of
from holdfast.data.mix import Mix
from holdfast.data.rendered import Rendered
from holdfast.data.rows import Row
from holdfast.data.tokens import tokenize_all
from holdfast.engine.pack import token_row
from holdfast.errors import PlanError
from holdfast.measure.tasks import anchor_tasks
from holdfast.methods import ManyICL
from holdfast.methods.data._shots import fitting, task_examples, task_shots
from holdfast.services import Context


def runs(row):
    """The runs of targets, as lists of ids."""
    return [
        part[1:].tolist()
        for part in np.split(np.where(row.scored, row.ids, -1), np.flatnonzero(~row.scored))
        if len(part) > 1
    ]


def answers(row, tokenizer):
    """The texts of the runs of targets, and all the text."""
    said, run_of = [], []
    for token, scored in zip(row.ids.tolist(), [*row.scored.tolist()], strict=True):
        if scored:
            run_of.append(token)
        elif run_of:
            said.append(tokenizer.decode(run_of, skip_special_tokens=True).strip())
            run_of = []
    last = tokenizer.decode(run_of, skip_special_tokens=True).strip()
    return [*said, last], tokenizer.decode(row.ids, skip_special_tokens=True)


def test_every_answer_of_one_task_is_trained_on_and_no_input(tiny_model, tokenizer):
    ctx, task = Context(tiny_model(), tokenizer), next(t for t in anchor_tasks() if t.name == "capitalize")
    for n in range(3):
        row = ManyICL(tasks=("capitalize",)).row(n, ctx, 400)
        said, text = answers(row, tokenizer)
        pairs = {y: x for x, y in task.items}
        assert len(said) > 10 and 300 < len(row.ids) <= 400
        assert len(set(said)) == len(said) and set(said) <= set(pairs)  # no example twice
        assert all(pairs[y] in text for y in said)


def test_rows_of_the_task_itself(tiny_model, tokenizer, rows):
    ctx = Context(tiny_model(), tokenizer, rows=rows)
    said, text = answers(ManyICL(source="task").row(0, ctx, 10_000, rows), tokenizer)
    assert sorted(said) == sorted(r.completion.strip() for r in rows)
    assert all(text.count(r.prompt) == 1 for r in rows)
    one = ManyICL(source="task", shots=1).row(0, ctx, 10_000, rows)
    assert len(answers(one, tokenizer)[0]) == 1  # one example is a plain row


def test_examples_of_the_task_are_rows_that_train(tiny_model, tokenizer, rows):
    ctx, mix = Context(tiny_model(), tokenizer, rows=rows), Mix(token_rows(rows, tokenizer)).hold_out(0.3)
    (source,) = ManyICL(source="task", pool=4).data(mix, ctx).sources
    texts = " ".join(tokenizer.decode(r.ids, skip_special_tokens=True) for r in source.rows)
    held = [tokenizer.decode(r.ids[~r.scored], skip_special_tokens=True) for r in mix.held_out()["task"]]
    assert 0 < len(held) < len(rows) and {r.prompt for r in rows if r.prompt in texts} == {
        r.prompt for r in rows
    } - set(held)


def chat_rows(tokenizer, system=None):
    """Tickets as the template writes them."""
    out = []
    for text, queue in [("Hi there", "other"), ("No parcel", "shipping"), ("Charged twice", "billing")]:
        turns = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": queue}], tokenize=False)
        out.append(Row(Rendered(prompt), whole[len(prompt) :]))
    return out


@pytest.mark.parametrize("kind", ["plain", "chat"])
@pytest.mark.parametrize("ends", ["eos", "turn", "stop"])
def test_one_example_is_the_row_as_it_trains(tiny_model, tokenizer, rows, kind, ends):
    """ends: the end of a turn is the end of texts too, or generation stops at it, or it is another token."""
    model, tokenizer = tiny_model(), copy.deepcopy(tokenizer)
    if ends == "eos":
        tokenizer.eos_token = "<|im_end|>"
    if ends == "stop":
        model.generation_config.eos_token_id = [1, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    task = rows[:3] if kind == "plain" else chat_rows(tokenizer)
    trained = tokenize_all(task, tokenizer, None, stops=stops_of(model.generation_config))
    known = task_examples(Mix(trained), Context(model, tokenizer), "ManyICL")
    for row, example in zip(trained, known, strict=True):
        made = task_shots([example], Context(model, tokenizer), "ManyICL")
        assert made.ids.tolist() == row.ids.tolist() and made.scored.tolist() == row.scored.tolist()
    last = task_shots(known, Context(model, tokenizer), "ManyICL")
    assert last.ids[-1] == trained[-1].ids[-1] and last.scored[-1]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("read", [False, True])
def test_chat_examples_are_the_turns_of_one_conversation(tiny_model, tokenizer, system, read):
    """As the template writes it, every answer closed by <|im_end|>, which is trained; the system speaks once."""
    ctx, task = Context(tiny_model(), tokenizer), chat_rows(tokenizer, system)
    known = task_examples(Mix(tokenize_all(task, tokenizer, None)), ctx, "ManyICL") if read else task
    row = task_shots(known, ctx, "ManyICL")
    turns = [{"role": "system", "content": system}] if system else []
    for text, queue in [("Hi there", "other"), ("No parcel", "shipping"), ("Charged twice", "billing")]:
        turns += [{"role": "user", "content": text}, {"role": "assistant", "content": queue}]
    assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(turns, tokenize=False) + "<|eos|>"
    said = [tokenizer.decode(run_of) for run_of in runs(row)]
    assert said == ["other<|im_end|>", "shipping<|im_end|>", "billing<|im_end|>\n<|eos|>"]


def test_chat_examples_without_a_template_are_closed_by_the_end_of_texts(tiny_model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    known = [Row(Rendered(f"<|bos|>[ASK] {x} [SAY]"), y) for x, y in [("one", " 1"), ("two", " 2")]]
    row = task_shots(known, Context(tiny_model(), bare), "ManyICL")
    assert bare.decode(row.ids) == "<|bos|>[ASK] one [SAY] 1<|eos|>[ASK] two [SAY] 2<|eos|>"
    assert [bare.decode(run_of) for run_of in runs(row)] == [" 1<|eos|>", " 2<|eos|>"]


def test_plain_examples_stand_a_blank_line_apart_and_the_last_is_ended(tiny_model, tokenizer, rows):
    row = task_shots(rows[:3], Context(tiny_model(), tokenizer), "ManyICL")
    texts = [r.prompt + r.completion for r in rows[:3]]
    assert tokenizer.decode(row.ids) == "<|bos|>" + "\n\n".join(texts) + "<|eos|>"
    assert [tokenizer.decode(run_of) for run_of in runs(row)] == [
        *(r.completion for r in rows[:2]),
        rows[2].completion + "<|eos|>",
    ]


def test_a_later_example_does_not_change_an_earlier_answer(tiny_model, tokenizer, rows):
    ctx, model = Context(tiny_model(), tokenizer, rows=rows), tiny_model()
    whole = ManyICL(source="task").row(0, ctx, 10_000, rows)
    short = ManyICL(source="task", shots=24).row(0, ctx, len(whole.ids) // 2, rows)
    with torch.no_grad():
        a, b = losses_of(model, whole), losses_of(model, short)
    shared = short.num_scored - 4  # the last answer of each stands elsewhere
    assert 10 < shared < whole.num_scored
    torch.testing.assert_close(a[:shared], b[:shared], rtol=1e-4, atol=1e-5)


def test_as_many_examples_as_fit():
    asked = []

    def write(k):
        asked.append(k)
        return token_row([0] * (3 * k + 1), 1)

    assert len(fitting(write, 50, 100).ids) == 100
    assert len(fitting(write, 20, 100).ids) == 61
    assert len(fitting(write, 50, 2).ids) == 4  # one, though it does not fit
    assert len(asked) < 20


def test_share_counts_tokens(tiny_model, tokenizer, rows):
    method = ManyICL(share=0.4, max_tokens=96, pool=8)
    mix = method.data(Mix([]), Context(tiny_model(), tokenizer, max_length=512))
    assert mix.sources[0].unit == "tokens" and all(64 < len(r.ids) <= 96 for r in mix.sources[0].rows)
    real = run([method], tiny_model(), tokenizer, rows, 12).log.realised
    share = real["ManyICL/tokens"] / sum(n for k, n in real.items() if k.endswith("/tokens"))
    assert share == pytest.approx(0.4, abs=0.06)


@pytest.mark.parametrize(
    "wrong", [{"source": "text"}, {"share": 1.0}, {"unit": "rows"}, {"shots": 0}, {"source": "task"}]
)
def test_values_without_meaning_are_refused(wrong, tiny_model, tokenizer):
    with pytest.raises(PlanError, match="ManyICL"):
        ManyICL(**wrong).check(Context(tiny_model(), tokenizer))
