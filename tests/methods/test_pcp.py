"""PCP: pseudo-labels by the model's own forward, and which rows each stage sees."""

import json

import pytest
import torch

from cases import run, token_rows
from holdfast.data.mix import Mix
from holdfast.data.rows import Row
from holdfast.data.tokens import tokenize
from holdfast.errors import PlanError
from holdfast.methods import PCP, Replay
from holdfast.methods.stages.pcp import pseudo_labels
from holdfast.services import Context


def test_pseudo_labels_are_the_likeliest_answers(tiny_model, tokenizer, rows):
    model, task = tiny_model(), token_rows(rows, tokenizer)[:4]
    answers = sorted({tuple(r.ids[r.scored].tolist()) for r in task})
    prompts = [tuple(r.ids[~r.scored].tolist()) for r in task]
    got = pseudo_labels(Context(model, tokenizer), prompts, answers)
    for prompt, chosen in zip(prompts, got, strict=True):
        scores = []
        for answer in answers:
            with torch.no_grad():
                logp = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            scores.append(logp[range(len(answer)), list(answer)].sum().item())
        assert chosen == answers[scores.index(max(scores))]


def test_every_line_is_the_prompt_and_a_label_and_all_of_it_is_trained_on(tiny_model, tokenizer, rows):
    ctx, task = Context(tiny_model(), tokenizer), token_rows(rows, tokenizer)
    mix = PCP().data(Mix(task), ctx)
    assert mix.task is task  # given answers stay
    texts = [tokenizer.decode(r.ids, skip_special_tokens=True) for r in mix.sources[0].rows]
    labels = {r.completion for r in rows}
    assert len(texts) == 24 and {t.split("\nQueue:")[0] + "\nQueue:" for t in texts} == {r.prompt for r in rows}
    assert all(t.split("\nQueue:")[1] in labels for t in texts)
    assert all(r.scored[1:].all() for r in mix.sources[0].rows)
    assert ctx.notes[0].startswith("PCP labels 24 texts by the base: ")


def test_unlabelled_texts_of_a_file(tiny_model, tokenizer, rows, tmp_path):
    path = tmp_path / "more.jsonl"
    path.write_text(json.dumps({"prompt": "Ticket: Where is it?\nQueue:", "completion": " nobody knows"}) + "\n")
    mix = PCP(sources=(str(path),)).data(Mix(token_rows(rows, tokenizer)), Context(tiny_model(), tokenizer))
    (row,) = mix.sources[0].rows
    text = tokenizer.decode(row.ids, skip_special_tokens=True)
    assert text.startswith("Ticket: Where is it?\nQueue:") and "nobody" not in text


def test_texts_are_not_the_first_of_a_file(tiny_model, tokenizer, rows):
    task = token_rows(rows, tokenizer)
    mix = PCP(texts=6).data(Mix(task), Context(tiny_model(), tokenizer))
    texts = [tokenizer.decode(r.ids, skip_special_tokens=True).split("\nQueue:")[0] for r in mix.sources[0].rows]
    assert len(texts) == 6 and {f"{t}\nQueue:" for t in texts} != {r.prompt for r in rows[:6]}


def test_each_stage_sees_its_own_rows(tiny_model, tokenizer, rows):
    seen = []

    def watch(session, step):
        seen.append((step, session.stage.name))

    got = run([Replay(share=0.25, max_tokens=32), PCP(share=0.3)], tiny_model(), tokenizer, rows, 10, watch=watch)
    real = got.log.realised
    assert [name for _, name in seen] == ["further pre-training"] * 3 + ["tune"] * 7
    replayed = real["Replay:instructions/examples"] + real["Replay:text/examples"]
    assert real["PCP/examples"] == pytest.approx(12 * 0.3 / 0.55, abs=1)  # Replay has a part of the first stage too
    assert real["PCP/examples"] + real["task/examples"] + replayed == 40
    assert real["task/examples"] == pytest.approx(28 * 0.45 / 0.7, abs=1)  # shares keep their proportions


def test_free_answers_are_refused(tiny_model, tokenizer):
    task = [tokenize(Row("Say it:", " one"), tokenizer, 64)] * 2
    with pytest.raises(PlanError, match="it has 1 different ones"):
        PCP().data(Mix(task), Context(tiny_model(), tokenizer))


@pytest.mark.parametrize("wrong", [{"share": 1.0}, {"texts": 0}, {"labels": 1}])
def test_values_without_meaning_are_refused(wrong):
    with pytest.raises(PlanError, match="PCP"):
        PCP(**wrong).check(None)
