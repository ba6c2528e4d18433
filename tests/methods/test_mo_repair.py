"""MORepair: the two objectives by hand, and where explanations come from."""

import json

import pytest
import torch

from cases import run
from holdfast.data.rows import Row
from holdfast.engine.counts import count_rows
from holdfast.engine.forward import forward
from holdfast.errors import NoEffect, PlanError
from holdfast.methods import MORepair
from holdfast.services import Context

WHY = {"Q: 2 + 2?\nA: 4\n\nExplain in one sentence why this answer is right:": " two twos"}


class Says(Context):
    """A context whose base explains what is written down."""

    def answers(self, prompts, **settings):
        texts = self.tokenizer.batch_decode(prompts, skip_special_tokens=True)
        return [[self.tokenizer.encode(WHY.get(t, ""), add_special_tokens=False)] for t in texts]


def test_the_base_explains_and_the_prompt_does_not_show_the_answer(tiny_model, tokenizer):
    ctx = Says(tiny_model(), tokenizer, rows=[Row("Q: 2 + 2?\nA:", " 4"), Row("Q: 3 + 3?\nA:", " 6")])
    (row,) = MORepair().asides(ctx)  # of the other row it says nothing
    start = int(row.scored.argmax())
    wanted = "Q: 2 + 2?\nA:\n\nExplain in one sentence what is right here and why:"
    assert tokenizer.decode(row.ids[:start], skip_special_tokens=True) == wanted
    assert tokenizer.decode(row.ids[start:], skip_special_tokens=True) == " two twos"
    assert row.owner == "MORepair" and row.scored[start:].all()


def test_explained_rows_are_not_the_first(tiny_model, tokenizer, rows):
    asked = []

    class Asked(Context):
        def answers(self, prompts, **settings):
            asked.extend(self.tokenizer.batch_decode(prompts, skip_special_tokens=True))
            return [[[9]]] * len(prompts)

    MORepair(rows=6).asides(Asked(tiny_model(), tokenizer, rows=rows))
    about = [any(text.startswith(r.prompt) for text in asked) for r in rows]
    assert sum(about) == 6 and not all(about[:6])


def test_explanations_of_a_file_are_cut_and_keep_targets(tiny_model, tokenizer, tmp_path):
    path = tmp_path / "why.jsonl"
    lines = [{"prompt": "Why? " * n, "completion": " Because two and two are four." * 9} for n in (1, 40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = MORepair(sources=(str(path),)).asides(Context(tiny_model(), tokenizer, max_length=48))
    assert len(row.ids) == 48 and row.scored.any()


def test_both_objectives_by_hand(tiny_model, start, token_rows, tokenizer, tmp_path):
    """L_answer and L_why are means over their own tokens: (L_answer + 3 L_why) / 4."""
    path = tmp_path / "why.jsonl"
    path.write_text(json.dumps({"prompt": "Why 4?", "completion": " Because two and two are four."}))
    model = tiny_model()
    session = start([MORepair(weight=3.0, sources=(str(path),), rows_per_step=1)], model)
    why = session.rows_of(0)
    assert len(why) == 1
    with torch.no_grad():
        losses = []
        for part in (token_rows, why):
            packed, logits = forward(model, part)
            losses.append(torch.nn.functional.cross_entropy(logits, packed.target).item())
    both = [*token_rows, *why]
    total, parts = session.loss(model, both, count_rows(both), 0)
    assert total.item() == pytest.approx((losses[0] + 3 * losses[1]) / 4, rel=1e-5)
    assert float(parts["MORepair"]) == pytest.approx(0.75 * losses[1], rel=1e-5)


def test_explanations_take_turns(tiny_model, tokenizer, rows):
    got = run([MORepair(max_new_tokens=4, rows=6, rows_per_step=4)], tiny_model(), tokenizer, rows, 3)
    assert got.log.realised["MORepair/examples"] == 12 and len(got.session.asides["MORepair"]) == 6
    assert [MORepair(rows_per_step=4).asides_at(n, 6, 3) for n in (0, 1)] == [[0, 1, 2, 3], [4, 5, 0, 1]]


def test_what_cannot_work_is_refused(tiny_model, tokenizer, rows):
    with pytest.raises(NoEffect, match="no explanation of any of 1 rows"):
        MORepair().asides(Says(tiny_model(), tokenizer, rows=[Row("Q: 5 + 5?\nA:", " 10")]))
    with pytest.raises(PlanError, match="not known as prompts and answers"):
        MORepair().check(Context(tiny_model(), tokenizer))


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"rows": 0}, {"ask": "{prompt}"}, {"prompt": "{prompt}{answer}"}])
def test_values_without_meaning_are_refused(wrong, tiny_model, tokenizer, rows):
    with pytest.raises(PlanError, match="MORepair"):
        MORepair(**wrong).check(Context(tiny_model(), tokenizer, rows=rows))
