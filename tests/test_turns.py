"""Conversations of several answers: the targets are what the assistant said, behind what inference shows before."""

import json
from pathlib import Path

import numpy as np
import pytest

from holdfast.data.rows import read_rows
from holdfast.data.talk import Talk
from holdfast.data.tokens import tokenize_all
from holdfast.data.turns import marks
from holdfast.engine.pack import WEIGHT
from holdfast.errors import DataError
from tokenizers_made import MADE

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_ENDS = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
LAST_THINKS = CHATML.replace(
    "\n{{ m['content'] }}",
    "\n{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}",
)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str, **keys) -> dict:
    return {"role": "assistant", "content": text, **keys}


TALK = [user("Where is 1"), said("billing"), user("and 2"), said("a b"), user("and 3"), said("No.")]


@pytest.fixture
def read(tmp_path: Path):
    def go(tokenizer, *talks: list, **settings):
        (tmp_path / "t.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in talks))
        notes: list[str] = []
        return read_rows("t.jsonl", base_dir=tmp_path, tokenizer=tokenizer, notes=notes, **settings), notes

    return go


def tokenizer_of(name: str, template: str):
    tokenizer = MADE[name]()
    tokenizer.chat_template = template
    return tokenizer


def targets(tokenizer, row) -> list[str]:
    """The text of each unbroken stretch of targets."""
    out, ids = [], []
    for token, scored in [*zip(row.ids.tolist(), row.scored.tolist(), strict=True), (0, False)]:
        if scored:
            ids.append(token)
        elif ids:
            out.append(tokenizer.decode(ids))
            ids = []
    return out


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("name", [n for n in MADE if "word" not in n and n != "bytes, no eos"])
def test_every_answer_is_trained_as_one_row_of_its_own_would_be(name, template, read):
    """In one row; its targets are those of the prefixes, each read as a conversation that ends there."""
    tokenizer = tokenizer_of(name, template)
    (row,), notes = read(tokenizer, TALK)
    (packed,) = tokenize_all([row], tokenizer, None)
    assert notes == []
    alone = [tokenize_all(read(tokenizer, TALK[:n], train_on="last")[0], tokenizer, None)[0] for n in (2, 4, 6)]
    found, end = packed.scored.copy(), tokenizer.convert_tokens_to_ids("<|im_end|>")
    for one in alone:
        start = int(one.scored.argmax())
        assert packed.ids[:start].tolist() == one.ids[:start].tolist()
        answer = one.ids[start:].tolist()
        if one is not alone[-1] and end in answer:
            answer = answer[: answer.index(end) + 1]
        assert packed.ids[start : start + len(answer)].tolist() == answer
        assert found[start : start + len(answer)].all()
        found[start : start + len(answer)] = False
    assert template == MARKED or not found.any()


def test_targets_are_the_answers_and_the_tokens_that_end_them(read):
    tokenizer = tokenizer_of("bytes", CHATML)
    (row,), _ = read(tokenizer, TALK)
    (packed,) = tokenize_all([row], tokenizer, None, stops=[tokenizer.convert_tokens_to_ids("<|im_end|>")])
    assert targets(tokenizer, packed) == ["billing<|im_end|>", "a b<|im_end|>", "No.<|im_end|>"]
    assert (row.prompt, row.completion) == (row.prompt, "No.<|im_end|>\n") and row.prompt.endswith("assistant\n")


@pytest.mark.parametrize("key", ["train", "weight", "training", "trainable", "loss"])
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_key_leaves_answers_out(key, template, read):
    tokenizer = tokenizer_of("bytes", template)
    talk = [TALK[0], said("billing", **{key: False}), *TALK[2:5], said("No.", **{key: 0}), user("so?")]
    (row,), notes = read(tokenizer, [*talk, said("!", **{key: 0})])
    (packed,) = tokenize_all([row], tokenizer, None, stops=[tokenizer.convert_tokens_to_ids("<|im_end|>")])
    assert targets(tokenizer, packed) == ["a b<|im_end|>"]
    assert notes == ["1 conversation cut off behind the last answer that is trained on (first t.jsonl:1)"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_each_answer_has_the_weight_that_it_is_given(template, read):
    """Of all its tokens and of the one that ends it; without the key it is 1, and `train` only says yes."""
    tokenizer = tokenizer_of("bytes", template)
    talk = [TALK[0], said("billing", weight=0.25), *TALK[2:5], said("No.", weight=2.5, train=True)]
    (row,), notes = read(tokenizer, talk)
    (packed,) = tokenize_all([row], tokenizer, None, stops=[tokenizer.convert_tokens_to_ids("<|im_end|>")])
    found = {text: set(weights) for text, weights in zip(targets(tokenizer, packed), weights_of(packed), strict=True)}
    assert found == {"billing<|im_end|>": {0.25}, "a b<|im_end|>": {1.0}, "No.<|im_end|>": {2.5}}
    assert [note.split(" have")[0] for note in notes] == ["answers of 1 conversation"]
    (alone,), _ = read(tokenizer, talk, train_on="last")
    (last,) = tokenize_all([alone], tokenizer, None)
    assert [set(w) for w in weights_of(last)] == [{2.5}]


def weights_of(row) -> list[list[float]]:
    """The weights of each unbroken stretch of targets."""
    cuts = np.flatnonzero(np.diff(row.scored.astype(int))) + 1
    parts = zip(np.split(row.scored, cuts), np.split(row.numbers[WEIGHT], cuts), strict=True)
    return [weights.tolist() for scored, weights in parts if scored[0]]


def test_answers_in_rows_of_their_own_keep_their_weights(read):
    """Where tokens span two messages."""
    tokenizer = tokenizer_of("llama 3", NO_ENDS)
    (row,), _ = read(tokenizer, [user("Q:"), said("a", weight=0.5), user("\n\nuser"), said("b")])
    first, second = tokenize_all([row], tokenizer, None)
    assert weights_of(first) == [[0.5] * first.num_scored] and second.numbers == {}


def test_where_all_is_trained_on_no_message_weighs_less(read):
    with pytest.raises(DataError, match=r"message 2 \(assistant\) has the weight 0.5, and data.train_on is all"):
        read(tokenizer_of("bytes", CHATML), [TALK[0], said("a", weight=0.5), *TALK[2:]], train_on="all")
    read(tokenizer_of("bytes", CHATML), [TALK[0], said("a", weight=1, train=True), *TALK[2:]], train_on="all")


def test_all_answers_left_out_are_refused(read):
    with pytest.raises(DataError, match=r"t.jsonl:2: all answers are marked not to be trained on \(train False\)"):
        none = [*TALK[:1], said("a", train=False), user("b"), said("c", train=False)]
        read(tokenizer_of("bytes", CHATML), TALK, none)


def test_a_mark_on_a_question_is_said(read):
    _, notes = read(tokenizer_of("bytes", CHATML), [user("hi") | {"train": True}, said("yo")])
    assert notes == [
        "1 message marked to be trained that the assistant did not say, and only what it says is (first t.jsonl:1)"
    ]


def test_the_last_answer_alone(read):
    tokenizer = tokenizer_of("bytes", CHATML)
    (row,), notes = read(tokenizer, TALK, train_on="last")
    (packed,) = tokenize_all([row], tokenizer, None)
    assert [t.split("<|im_end|>")[0] for t in targets(tokenizer, packed)] == ["No."]
    assert notes == ["only the last answer of 1 conversation with several answers is trained on (first t.jsonl:1)"]


def test_a_template_that_does_not_only_append_is_refused_with_the_turn(read):
    tokenizer = tokenizer_of("bytes", LAST_THINKS)
    with pytest.raises(DataError) as caught:
        read(tokenizer, TALK[:2], TALK)
    told = str(caught.value)
    assert told.startswith("t.jsonl:2: ") and "does not only append at message 2 (assistant)" in told
    assert "<think></think>billing" in told and "train_on: last" in caught.value.cure
    (row,), _ = read(tokenizer, TALK, train_on="last")
    assert row.completion.startswith("<think></think>No.")


def test_marks_of_the_template_need_no_prefixes(read):
    """With {% generation %} the same template is read: the answers are where it says."""
    thinks = MARKED.replace("{% generation %}", "{% if loop.last %}<think></think>{% endif %}{% generation %}")
    tokenizer = tokenizer_of("bytes", thinks)
    (row,), _ = read(tokenizer, TALK)
    (packed,) = tokenize_all([row], tokenizer, None, stops=[tokenizer.convert_tokens_to_ids("<|im_end|>")])
    assert targets(tokenizer, packed) == ["billing<|im_end|>", "a b<|im_end|>", "No.<|im_end|>"]


def test_an_end_that_is_marked_apart_is_of_the_answer_before_it(read):
    apart = "{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}"
    tokenizer = tokenizer_of("bytes", MARKED.replace("<|im_end|>{% endgeneration %}", apart))
    (row,), _ = read(tokenizer, [TALK[0], said("billing", train=False), *TALK[2:4]])
    (packed,) = tokenize_all([row], tokenizer, None, stops=[tokenizer.convert_tokens_to_ids("<|im_end|>")])
    assert targets(tokenizer, packed) == ["a b<|im_end|>"]
    talk = [TALK[0], said("billing", weight=0.5), *TALK[2:4]]
    (row,), notes = read(tokenizer, talk)
    assert [turn.weight for turn in row.turns] == [0.5, 0.5, 1.0, 1.0] and "weights of their own" in notes[0]


def test_an_answer_whose_words_stand_before_it_keeps_its_mark(read):
    """The labels are named in the question; each mark is still that of its answer."""
    tokenizer = tokenizer_of("bytes", MARKED)
    talk = [user("Say billing or a b."), said("billing", train=False), user("And a b?"), said("a b")]
    (row,), _ = read(tokenizer, talk)
    (packed,) = tokenize_all([row], tokenizer, None, stops=[tokenizer.convert_tokens_to_ids("<|im_end|>")])
    assert targets(tokenizer, packed) == ["a b<|im_end|>"]
    apart = "{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}"
    tokenizer = tokenizer_of("bytes", MARKED.replace("<|im_end|>{% endgeneration %}", apart))
    (row,), _ = read(tokenizer, talk)
    (packed,) = tokenize_all([row], tokenizer, None, stops=[tokenizer.convert_tokens_to_ids("<|im_end|>")])
    assert targets(tokenizer, packed) == ["a b<|im_end|>"]


def test_marks_that_cannot_be_told_apart_are_refused(read):
    """The template writes other words than the conversation has, and marks each answer twice."""
    twice = MARKED.replace("{% endgeneration %}", "{% endgeneration %}{% generation %}!{% endgeneration %}")
    upper = twice.replace("{{ m['content'] }}<|im_end|>{% end", "{{ m['content'] | upper }}<|im_end|>{% end")
    talk = Talk([TALK[0], said("billing"), *TALK[2:4]], (1, 3), "t.jsonl:1", each=True)
    tokenizer = tokenizer_of("bytes", upper)
    whole = tokenizer.apply_chat_template(talk.messages, tokenize=False)
    with pytest.raises(DataError, match=r"t.jsonl:1: the chat template marks 4 stretches .* there are 2 answers"):
        marks(talk, whole, tokenizer)


def test_two_marks_of_one_answer_are_not_those_of_two(read):
    """As many stretches as answers, and all of the last answer."""
    last = MARKED.replace("m['role'] == 'assistant' %}", "m['role'] == 'assistant' and loop.last %}")
    apart = last.replace("<|im_end|>{% end", "{% endgeneration %}{% generation %}<|im_end|>{% end")
    talk = [user("Say a b or billing."), said("a b"), user("And?"), said("a b")]
    with pytest.raises(DataError, match=r"marks nothing of message 2 \(assistant\) with"):
        read(tokenizer_of("bytes", apart), talk)


def test_an_answer_without_a_mark_is_refused(read):
    """It would not be trained on, and nobody would know."""
    marked = "{% if m['role'] == 'assistant' %}"
    some = MARKED.replace(marked, "{% if m['role'] == 'assistant' and loop.index != 2 %}")
    with pytest.raises(DataError, match=r"marks nothing of message 2 \(assistant\) with"):
        read(tokenizer_of("bytes", some), TALK)


def test_an_empty_or_changed_earlier_answer_is_refused_like_the_last(read):
    with pytest.raises(DataError, match=r"the answer, message 2 \(assistant\), is empty"):
        read(tokenizer_of("bytes", CHATML), [user("a"), said(" "), user("b"), said("c")])
    upper = CHATML.replace("m['content'] }}<", "m['content'] | replace('billing', 'BILLING') }}<")
    with pytest.raises(DataError, match="changes the answer: the row has 'billing'"):
        read(tokenizer_of("bytes", upper), TALK)


def test_answers_that_share_a_token_with_a_question_get_rows_of_their_own(read):
    """Nothing ends a message but a line break, which some tokenizers join with the blank lines that follow."""
    tokenizer = tokenizer_of("llama 3", NO_ENDS)
    talk = [user("Q:"), said("a"), user("\n\nuser"), said("b")]
    (row,), _ = read(tokenizer, talk)
    notes: list[str] = []
    made = tokenize_all([row], tokenizer, None, notes=notes)
    alone = [read(tokenizer, talk[:n], train_on="last")[0][0] for n in (2, 4)]
    assert [r.key for r in made] == [r.key for r in tokenize_all(alone, tokenizer, None)] and len(made) == 2
    assert notes[0].startswith("1 conversation of which tokens span two messages")


def test_tool_calls_and_tools_of_several_answers(read):
    template = (
        "{% if tools %}<tools>{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"function": {"name": "weather", "arguments": {"city": "x"}}}
    talk = [user("hi"), {"role": "assistant", "tool_calls": [call], "content": ""}, {"role": "tool", "content": "18"}]
    tokenizer = tokenizer_of("bytes", template)
    (row,), _ = read(tokenizer, [*talk, said("18 C")])
    (packed,) = tokenize_all([row], tokenizer, None, stops=[tokenizer.convert_tokens_to_ids("<|im_end|>")])
    assert targets(tokenizer, packed) == ['<call>weather {"city": "x"}<|im_end|>', "18 C<|im_end|>"]
