"""S3FT: own answer, paraphrase or given answer, against hand-written answers of a base."""

import math

import pytest
import torch

from holdfast.data.mix import Mix, Source
from holdfast.data.rows import Row
from holdfast.data.tokens import tokenize
from holdfast.engine.forward import forward
from holdfast.engine.pack import pack
from holdfast.errors import NoEffect, PlanError
from holdfast.methods import S3FT
from holdfast.methods.data.s3ft import GOLD, PARAPHRASE, SELF
from holdfast.services import Context, View

ROWS = (
    Row("Q: 2 + 2?\nA:", " 4"),
    Row("Q: 3 + 3?\nA:", " 6"),
    Row("Q: 4 + 4?\nA:", " 8"),
    Row("Q: 2 + 2?\nA:", " 4"),
)
SAID = {  # prompt -> what the base goes on with
    "Q: 2 + 2?\nA:": " It is 4\nQ: and",
    "Q: 3 + 3?\nA:": " It is 5\nQ: and",
    "Q: 4 + 4?\nA:": " Nine\nQ: and",
    "Q: 3 + 3?\nA: 6\n\nQ: 3 + 3?\nA:": " six, or 6\n",
    "Q: 4 + 4?\nA: 8\n\nQ: 4 + 4?\nA:": " 9\n",
}


class Says(Context):
    """A context whose base says what is written down."""

    def answers(self, prompts, **settings):
        texts = self.tokenizer.batch_decode(prompts, skip_special_tokens=True)
        self.notes += [f"asked {len(texts)}"] * bool(texts)
        return [[self.tokenizer.encode(SAID.get(text, " no\n"), add_special_tokens=False)] for text in texts]


@pytest.fixture
def ctx(tokenizer, tiny_model):
    return Says(tiny_model(), tokenizer)


def drawn(mix, count, tokenizer):
    """The answers that are trained on, by prompt."""
    order = mix.draw(0)
    texts = [tokenizer.decode(next(order).ids) for _ in range(count)]
    return {tuple(t.removeprefix("<|bos|>").rsplit("\nA:", 1)) for t in texts}


def test_each_row_gets_its_target(ctx, tokenizer):
    """2 + 2: its own answer holds the 4. 3 + 3: 5 is wrong, the paraphrase holds the 6. 4 + 4: both are wrong."""
    task = [tokenize(r, tokenizer, 512) for r in ROWS]
    mix = S3FT(verifier="number").data(Mix(task), ctx)
    assert ctx.notes == []  # nothing is asked before a row is drawn
    assert drawn(mix, 4, tokenizer) == {
        ("Q: 2 + 2?", " It is 4<|eos|>"),
        ("Q: 3 + 3?", " six, or 6<|eos|>"),
        ("Q: 4 + 4?", " 8<|eos|>"),
    }
    said = f"2 {SELF}, 1 {PARAPHRASE}, 1 {GOLD} for 4 rows"
    assert ctx.notes == ["asked 3", "asked 2", f"S3FT trains on {said} (verifier number)"]


def test_the_loss_is_that_of_the_chosen_target(tokenizer):
    """Uniform over 400 tokens: every target token costs log 400, and moves its logit by (1/400 - 1) / count."""
    row = tokenize(Row(ROWS[0].prompt, " It is 4"), tokenizer, 512)
    logits = torch.zeros(row.num_scored, 400, requires_grad=True)
    view = View(pack([row]), logits, 0, None, {}, None, "task", {}, {}, {})
    loss = -view.token_logp.mean()
    loss.backward()
    assert loss.item() == pytest.approx(math.log(400))
    assert logits.grad[0, row.ids[row.scored][0]].item() == pytest.approx((1 / 400 - 1) / row.num_scored)


def test_a_judge_that_takes_all_gives_own_answers(ctx, tokenizer, tmp_path):
    (tmp_path / "judge.py").write_text("def yes(a, r, row):\n    return 1\ndef no(a, r, row):\n    return 0\n")
    ctx.base_dir = tmp_path
    task = [tokenize(r, tokenizer, 512) for r in ROWS]
    got = drawn(S3FT(verifier="judge:yes").data(Mix(task), ctx), 4, tokenizer)
    assert got == {("Q: 2 + 2?", " It is 4<|eos|>"), ("Q: 3 + 3?", " It is 5<|eos|>"), ("Q: 4 + 4?", " Nine<|eos|>")}
    with pytest.raises(NoEffect, match=f"0 {SELF}, 0 {PARAPHRASE}, 4 {GOLD}"):  # pure fine-tuning: say so
        drawn(S3FT(verifier="judge:no").data(Mix(task), ctx), 4, tokenizer)


def test_the_same_answer_changes_nothing(ctx, tokenizer, monkeypatch):
    task = [tokenize(ROWS[0], tokenizer, 512)]
    monkeypatch.setitem(SAID, ROWS[0].prompt, " 4\n")
    with pytest.raises(NoEffect, match=f"1 {SELF}"):
        drawn(S3FT(verifier="exact").data(Mix(task), ctx), 1, tokenizer)


def test_only_the_tasks_own_rows_are_exchanged(ctx, tokenizer):
    """As earlier maps leave them; rows of other sources stay, even with the same text."""
    task = [tokenize(r, tokenizer, 512) for r in ROWS]
    other = [tokenize(ROWS[0], tokenizer, 512, source="other")]
    mix = Mix([tokenize(Row("Q: none?\nA:", " 1"), tokenizer, 512)], (Source("other", other, 0.5),))
    mix = S3FT(verifier="number").data(mix.map(lambda r: r if r.source == "other" else task[0]), ctx)
    order = mix.draw(0)
    rows = {r.source: r for r in (next(order) for _ in range(4))}
    assert rows["other"] is other[0] and rows["task"].owner == "task"
    assert "It is 4" in tokenizer.decode(rows["task"].ids)


@torch.no_grad()
def test_greedy_answers_are_likely(tiny_model, tokenizer, rows, tmp_path, monkeypatch):
    """With the real base: the mean log-probability of targets rises where its own answers are taken."""
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path))
    (tmp_path / "judge.py").write_text("def yes(answer, reference, row):\n    return True\n")
    model = tiny_model()
    ctx = Context(model, tokenizer, rows=rows, base_dir=tmp_path)
    task = [tokenize(r, tokenizer, 512) for r in rows]
    mix = S3FT(verifier="judge:yes", max_new_tokens=3, ended=False).data(Mix(task), ctx)
    order = mix.draw(0)
    chosen = [next(order) for _ in task]

    def mean(rows):
        packed, logits = forward(model, rows)
        return logits.log_softmax(-1).gather(1, packed.target[:, None]).mean().item()

    assert mean(chosen) > mean(task)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"verifier": "perfect"}, "no verifier 'perfect'"),
        ({"max_new_tokens": 0}, "max_new_tokens of at least 1"),
        ({"least": 0.0}, "least above 0"),
        ({"rewrite": "{prompt}"}, "does not show the answer"),
    ],
)
def test_values_without_meaning(settings, words, ctx):
    with pytest.raises(PlanError, match=words) as caught:
        S3FT(**settings).check(ctx)
    assert caught.value.cure


def test_rewriting_alone(ctx, tokenizer):
    """Without own answers only 3 + 3 changes: its paraphrase holds the 6."""
    task = [tokenize(r, tokenizer, 512) for r in ROWS]
    mix = S3FT(verifier="number", own=False).data(Mix(task), ctx)
    said = {prompt: answer for prompt, answer in drawn(mix, 4, tokenizer)}
    assert said["Q: 3 + 3?"].startswith(" six, or 6") and said["Q: 2 + 2?"] == " 4<|eos|>"
    assert ctx.notes[-1] == "S3FT trains on 0 own answers, 1 paraphrases, 3 given answers for 4 rows (verifier number)"
