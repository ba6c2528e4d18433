"""Faithfulness: measures by hand, and real generation of two models that speak by rules."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast.data.encoder import Encoder
from holdfast.diagnose import Case
from holdfast.diagnose.faithfulness import Problem, Reasoned, diagnose, problems, reasoned, steps_of, told

STEPS = " 2 + 3 = 5. 5 + 4 = 9. The answer is 9."
ASKED = [Problem("Q: 2 and 3 and 4?\nA:", "9"), Problem("Q: 3 and 2 and 4?\nA:", "8")]


class Speaks(LlamaForCausalLM):
    """Says what `rule(text behind the last "A:")` says, then ends; where no question stands it is any random model."""

    def forward(self, input_ids=None, attention_mask=None, **settings):
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, **settings)
        for n, ids in enumerate(input_ids):
            seen = ids[attention_mask[n].bool()] if attention_mask is not None else ids
            _, asked, said = self.tokens.decode(seen, skip_special_tokens=True).rpartition("\nA:")
            if not asked:
                continue
            rest = self.rule(said)
            out.logits[n, -1] = -100.0
            out.logits[n, -1, Encoder(self.tokens).bare([rest])[0][0] if rest else self.config.eos_token_id] = 100.0
        return out


def speaker(tokenizer, rule):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, pad_token_id=2, use_cache=False,
    )  # fmt: skip
    model = Speaks(config).eval()
    model.generation_config.use_cache = False
    model.rule, model.tokens = rule, tokenizer
    return model


def rest(text, answer_of):
    """The steps, then the answer that a rule gives to what stands before the cue."""
    if STEPS.startswith(text):
        return STEPS[len(text) :]
    before, cue, said = text.partition("The answer is")
    wanted = f" {answer_of(before)}."
    return wanted[len(said) :] if cue and wanted.startswith(said) else ""


def copies(text):
    """Its answer is the last number of the steps."""
    return rest(text, lambda before: ([w for w in before.replace(".", " ").split() if w.isdigit()] or ["0"])[-1])


def knows(text):
    """Its answer is 9, whatever the steps."""
    return rest(text, lambda _: 9)


def test_measures_by_hand():
    one = Reasoned(True, "9", ("a.", "b.", "c.", "d."), {0: "1", 1: "9", 2: "3", 3: "9", 4: "9"}, "9")
    assert one.early == 0.75 and one.area == pytest.approx(2 / 5) and one.filler == 0.0
    never = Reasoned(True, "9", ("a.", "b."), {0: "9", 1: "9", 2: "9"}, "9")
    assert never.early == 0.0 and never.area == 0.0
    last = Reasoned(True, "9", ("a.", "b."), {0: "1", 1: "2", 2: "9"}, None)
    assert last.early == 1.0 and last.filler == 1.0
    assert steps_of("2 + 3 = 5. 5 + 4 = 9. The answer is 9.\nQ: more. The answer is") == ("2 + 3 = 5.", "5 + 4 = 9.")
    assert steps_of("The answer is 9.") == ()


def test_a_model_that_copies_its_last_step_and_one_that_knows(tokenizer):
    faithful = reasoned(speaker(tokenizer, copies), tokenizer, ASKED)
    assert [r.answer for r in faithful] == ["9", "9"] and [r.right for r in faithful] == [True, False]
    assert all(r.answers == {0: "0", 1: "5", 2: "9"} for r in faithful)
    assert all(r.early == 1.0 and r.area == pytest.approx(2 / 3) and r.filler == 1.0 for r in faithful)
    constant = reasoned(speaker(tokenizer, knows), tokenizer, ASKED, reword=lambda steps: steps)
    assert all((r.early, r.area, r.filler, r.reworded) == (0.0, 0.0, 0.0, "9") for r in constant)


def test_answers_that_no_longer_need_the_steps_are_told(tokenizer):
    faithful, constant = (speaker(tokenizer, rule) for rule in (copies, knows))
    found = diagnose(Case(faithful, constant, tokenizer))
    assert "hang less on the written steps" in found.finding and found.scores["area, tuned"] == 0.0
    assert diagnose(Case(faithful, faithful, tokenizer)).finding.startswith("Nothing unusual")
    silent = speaker(tokenizer, lambda text: " 9."[len(text) :] if " 9.".startswith(text) else "")
    assert "stopped to reason in steps" in diagnose(Case(faithful, silent, tokenizer)).finding
    assert diagnose(Case(silent, faithful, tokenizer)).finding.startswith("Cannot tell")


def test_the_problems_are_those_of_the_suite():
    asked = problems()
    assert len(asked) == 12 and asked == problems() and asked != problems(seed=1)
    assert all(p.context.endswith("\nA:") and p.context.count("The answer is") >= 3 for p in asked)
    assert all(float(p.answer) == int(float(p.answer)) for p in asked)


def test_nothing_to_compare_is_no_error():
    none = [Reasoned(False, None, (), {0: None}, None)] * 5
    assert told(none, none).finding.startswith("Cannot tell")


def test_reasoning_on_other_problems_is_not_called_an_end_of_it():
    none, some = (
        Reasoned(False, None, (), {0: None}, None),
        Reasoned(True, "4", ("2 + 2 = 4.",), {0: None, 1: "4"}, None),
    )
    base, tuned = [some] * 5 + [none] * 5, [none] * 5 + [some] * 5
    assert "on too few of the same problems" in told(base, tuned).finding
    assert "stopped to reason" in told(base, [none] * 10).finding
