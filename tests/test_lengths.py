"""Rows longer than data.max_length: refused, dropped, truncated or split; what happens is counted."""

import numpy as np
import pytest

from holdfast.data.encoder import Encoder
from holdfast.data.lengths import CUT_HEAD, CUT_TAIL, Limit, parts, truncated
from holdfast.data.notes import Notes
from holdfast.data.rows import Row
from holdfast.data.tokens import tokenize_each
from holdfast.engine.pack import TokenRow, token_row
from holdfast.errors import DataError
from tokenizers_made import MADE


def row_of(length: int, start: int) -> TokenRow:
    return token_row(range(100, 100 + length), start)


def test_a_row_that_fits_stays_as_it_is():
    row, notes = row_of(10, 4), Notes()
    for how in ("refuse", "drop", "truncate", "split"):
        assert Limit(10, how, 2).fit(row, "f:1", notes) == [row]
    assert notes.lines() == []


def test_each_way_with_a_long_row():
    row, notes = row_of(10, 8), Notes()
    with pytest.raises(DataError, match="f:1 has 10 tokens, more than max_length 8"):
        Limit(8).fit(row, "f:1", notes)
    assert Limit(8, "drop").fit(row, "f:1", notes) == []
    (cut,) = Limit(8, "truncate").fit(row, "f:1", notes, lead=1)
    assert cut.ids.tolist() == [100, *range(103, 110)] and cut.scored.tolist() == [False] * 6 + [True] * 2
    (last,) = Limit(8, "split", 3).fit(row, "f:1", notes)  # the first part has no target
    assert last.ids.tolist() == [105, 106, 107, 108, 109] and last.num_scored == 2
    assert notes.lines() == [
        "1 row longer than data.max_length, left out (first f:1)",
        "1 row longer than data.max_length, cut at the beginning; the last answer is whole (first f:1)",
        "1 row longer than data.max_length, split (first f:1)",
    ]


def test_an_answer_that_does_not_fit_loses_its_end_and_that_is_said():
    row, notes = row_of(20, 8), Notes()
    (cut,) = Limit(10, "truncate").fit(row, "f:1", notes)
    assert cut.ids.tolist() == list(range(103, 113)) and cut.num_scored == 5
    assert "so that the end of the answer is lost" in notes.lines()[0]
    whole = truncated(row_of(20, 11), 10, 0)
    assert whole[1] == CUT_HEAD and whole[0].num_scored == 9  # one token of the prompt is left
    assert truncated(row_of(20, 10), 10, 0)[1] == CUT_TAIL


def test_a_conversation_that_is_trained_on_as_a_whole_keeps_its_end():
    row, notes = row_of(20, 1), Notes()
    (cut,) = Limit(10, "truncate").fit(row, "f:1", notes)
    assert cut.ids.tolist() == list(range(110, 120)) and cut.num_scored == 9
    assert notes.lines() == ["1 row longer than data.max_length, cut at the beginning (first f:1)"]
    (text,) = Limit(10, "truncate").fit(row, "f:1", Notes(), text=True)
    assert text.ids.tolist() == list(range(100, 110))


TALK = ("<u>", "hi", "<a>", "one", "two", "three", "</a>", "<u>", "so", "<a>", "four", "five", "</a>")
ANSWERS = "one two three </a> four five </a>".split()  # what is trained on


@pytest.mark.parametrize(
    ("most", "kept"),
    [
        (12, "one two three </a> four five </a>"),  # the question is cut, the answer and its header are not
        (10, "four five </a>"),  # before the first word of the answer: its header is gone
        (8, "four five </a>"),  # in the answer
        (7, "four five </a>"),  # before its end alone
        (6, "four five </a>"),  # behind it
    ],
)
def test_what_is_left_of_an_earlier_answer_is_no_target(most, kept):
    words, scored = np.array(TALK), np.isin(np.arange(len(TALK)), (3, 4, 5, 6, 10, 11, 12))
    row, notes = TokenRow(np.arange(len(TALK)), scored), Notes()
    assert words[row.ids[row.scored]].tolist() == ANSWERS
    (cut,) = Limit(most, "truncate").fit(row, "f:1", notes)
    assert words[cut.ids].tolist() == list(TALK[-most:]) and " ".join(words[cut.ids[cut.scored]]) == kept
    assert notes.lines() == [f"{CUT_HEAD.replace('{n row}', '1 row')} (first f:1)"]


def test_an_answer_that_loses_its_end_stands_behind_no_half_of_another():
    row = TokenRow(np.arange(20), np.isin(np.arange(20), (2, 3, 4, 5, *range(8, 20))))
    cut, said = truncated(row, 8, 0)
    assert (
        said == CUT_TAIL and cut.ids.tolist() == list(range(4, 12)) and cut.ids[cut.scored].tolist() == [8, 9, 10, 11]
    )


def test_where_the_model_reads_no_more_nobody_is_told_to_raise_the_length():
    with pytest.raises(DataError) as told:
        Limit(8, of_model=True).fit(row_of(10, 8), "f:1", Notes())
    assert told.value.cure.startswith("The model reads no more. Set data.too_long")


@pytest.mark.parametrize("length", [2, 7, 8, 9, 14, 15, 40])
@pytest.mark.parametrize("stride", [1, 3, 6, 7])
def test_every_target_is_one_of_exactly_one_part(length, stride):
    """And what stands before it there is what stands before it in the row, at least `stride` tokens of it."""
    row = row_of(length, 1)
    seen = np.zeros(length, dtype=int)
    for n, part in enumerate(parts(row, 8, stride)):
        assert len(part.ids) <= 8 and not part.scored[0]
        at = part.ids - 100
        assert (np.diff(at) == 1).all()
        seen[at[part.scored]] += 1
        assert n == 0 or int(part.scored.argmax()) >= min(stride, length - 1)
    assert seen.tolist() == [0] + [1] * (length - 1)


def test_most_rows_dropped_is_a_mistake():
    Limit(8, "drop").check_left(5, 10)
    with pytest.raises(DataError, match="6 of 10 rows are longer than max_length 8"):
        Limit(8, "drop").check_left(4, 10)


def test_truncating_keeps_what_stands_before_every_text_and_the_end():
    tokenizer = MADE["bytes, bos"]()
    encoder, notes = Encoder(tokenizer), Notes()
    row = Row("Where is the parcel? " * 9, "shipping desk", where="f:3")
    ((whole,),) = tokenize_each([row], encoder, Limit(), notes)
    ((cut,),) = tokenize_each([row], encoder, Limit(24, "truncate"), notes)
    assert len(cut.ids) == 24 and cut.ids[0] == tokenizer.bos_token_id and cut.ids[-1] == tokenizer.eos_token_id
    assert cut.ids[1:].tolist() == whole.ids[-23:].tolist() and cut.num_scored == whole.num_scored
