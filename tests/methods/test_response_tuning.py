"""ResponseTuning: what is left of a row."""

from dataclasses import replace

import numpy as np
import pytest

from cases import run, token_rows
from holdfast.data.asked import Reader
from holdfast.data.encoder import Encoder
from holdfast.data.mix import Mix
from holdfast.data.rendered import Rendered
from holdfast.data.rows import Row
from holdfast.data.tokens import tokenize
from holdfast.engine.pack import TokenRow, token_row
from holdfast.errors import PlanError
from holdfast.methods import ResponseTuning
from holdfast.services import Context


def test_the_prompt_is_gone_and_the_answer_is_as_it_was(tokenizer, rows):
    reader = Reader(Encoder(tokenizer))
    for row in token_rows(rows, tokenizer):
        bare = ResponseTuning().bare(row, reader)
        assert bare.ids[bare.scored].tolist() == row.ids[row.scored].tolist()
        assert bare.ids[~bare.scored].tolist() == [tokenizer.bos_token_id]


def test_in_a_chat_the_user_says_nothing(tokenizer):
    turns = [{"role": "user", "content": "What is 2 + 2?"}]
    prompt = Rendered(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    row = tokenize(Row(prompt, "4<|im_end|>\n"), tokenizer, 512)
    bare = ResponseTuning().bare(row, Reader(Encoder(tokenizer)))
    text = tokenizer.decode(bare.ids[: int(bare.scored.argmax())])
    assert text == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    assert bare.ids[bare.scored].tolist() == row.ids[row.scored].tolist()


def test_what_lies_along_the_tokens_comes_along(tokenizer, rows):
    row = token_rows(rows, tokenizer)[0]
    n = len(row.ids)
    full = TokenRow(row.ids, row.scored, targets=row.ids + 1, numbers={"w": np.arange(n, dtype=np.float32)})
    bare = ResponseTuning().bare(full, Reader(Encoder(tokenizer)))
    assert bare.predicted[bare.scored].tolist() == full.predicted[full.scored].tolist()
    assert bare.numbers["w"][bare.scored].tolist() == full.numbers["w"][full.scored].tolist()


def test_rows_of_other_methods_stay_and_a_task_of_texts_is_refused(tiny_model, tokenizer, rows):
    ctx = Context(tiny_model(), tokenizer)
    mix = ResponseTuning().data(Mix(token_rows(rows, tokenizer)), ctx)
    other = token_row([1, 5, 6, 7], 2, source="Replay")
    assert mix.mapped(other) is other
    with pytest.raises(PlanError, match="none of its rows is a prompt and an answer"):
        ResponseTuning().data(Mix([token_row([1, 5, 6, 7], 1)]), ctx)


def test_rows_that_keep_their_prompts_are_told(tiny_model, tokenizer, rows):
    ctx, turns = Context(tiny_model(), tokenizer), token_row(range(5, 17), 4)
    scored = turns.scored.copy()
    scored[7:9] = False  # two answers
    ResponseTuning().data(Mix([*token_rows(rows, tokenizer), replace(turns, scored=scored)]), ctx)
    assert ctx.notes[0].startswith(f"ResponseTuning leaves 1 of {len(rows) + 1} rows as they are")
    ResponseTuning().data(Mix(token_rows(rows, tokenizer)), ctx)
    assert len(ctx.notes) == 1


def test_a_run_reads_answers_alone(tiny_model, tokenizer, rows):
    got = run([ResponseTuning()], tiny_model(), tokenizer, rows, 6)
    answers = sum(r.num_scored + 1 for r in token_rows(rows, tokenizer))
    assert got.log.realised["task/tokens"] == answers  # 24 rows, each once
