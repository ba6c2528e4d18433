"""SCALE: prompts by hand, the ordinary prompt without drafts, the same specialist everywhere, a real one."""

import copy

import pytest
import torch

from holdfast.data.fewshot import FORMATS, build
from holdfast.decode import copy_rate, drafts_of, specialist_hint
from holdfast.errors import HoldfastError
from tiny import build_model

SHOTS = [("one", "un"), ("two", "deux"), ("three", "trois"), ("four", "quatre")]
QUERIES = [("five", "cinq"), ("six", "six")]


def upper(inputs):
    return [[x.upper()] for x in inputs]


def nothing(inputs):
    return [[] for _ in inputs]


def test_a_prompt_by_hand():
    (made,) = specialist_hint(upper, SHOTS[:1], QUERIES[:1], form=FORMATS["qa"])
    assert made.prompt.context == "Q: one\nDraft: ONE\nA: un\n\nQ: five\nDraft: FIVE\nA:"
    assert made.prompt.answer == " cinq" and made.drafts == ("FIVE",)
    said = made.prompt.context + made.prompt.answer
    assert [said[a:b] for a, b in made.prompt.spans] == ["un", "cinq"]


def test_several_drafts_keep_their_order():
    (made,) = specialist_hint(lambda xs: [["b", "a", "b"]] * len(xs), [], QUERIES[:1])
    assert made.prompt.context == "Input: five\nDraft 1: b\nDraft 2: a\nDraft 3: b\nOutput:"
    assert made.drafts == ("b", "a", "b")


@pytest.mark.parametrize("form", [f for f in FORMATS if f != "chat"])
def test_without_drafts_it_is_the_ordinary_prompt(form):
    for empty in (nothing, lambda xs: [["", " "] for _ in xs]):
        made = specialist_hint(empty, SHOTS, QUERIES, seed=3, form=FORMATS[form], instruction="Translate.")
        shown = [SHOTS[n] for n in made[0].order]
        assert [m.prompt for m in made] == [build(FORMATS[form], shown, q, instruction="Translate.") for q in QUERIES]


def test_the_chat_format_too(tokenizer):
    (made,) = specialist_hint(upper, SHOTS[:1], QUERIES[:1], form=FORMATS["chat"], tokenizer=tokenizer)
    assert "one\nDraft: ONE<|im_end|>" in made.prompt.context and "five\nDraft: FIVE<|im_end|>" in made.prompt.context


def test_one_specialist_drafts_for_all_and_sees_no_answer():
    asked = []

    def listening(inputs):
        asked.append(list(inputs))
        return upper(inputs)

    made = specialist_hint(listening, SHOTS, QUERIES)
    assert asked == [[x for x, _ in (*SHOTS, *QUERIES)]]
    other = specialist_hint(upper, [(x, f"{y}!") for x, y in SHOTS], [(x, "?") for x, _ in QUERIES])
    assert [m.prompt.context.replace("!", "") for m in other] == [m.prompt.context for m in made]


def test_the_seed_gives_the_order_and_is_recorded():
    made = {n: specialist_hint(upper, SHOTS, QUERIES, seed=n) for n in range(6)}
    assert made[1] == specialist_hint(upper, SHOTS, QUERIES, seed=1)
    assert len({m[0].order for m in made.values()}) > 1
    for seed, (one, two) in made.items():
        assert one.seed == seed and one.order == two.order and sorted(one.order) == [0, 1, 2, 3]
        at = [one.prompt.context.index(f"Input: {SHOTS[n][0]}\n") for n in one.order]
        assert at == sorted(at)


def test_a_model_as_specialist_keeps_its_weights(tokenizer):
    model = build_model()
    before = copy.deepcopy(model.state_dict())
    draft = drafts_of(model, tokenizer, "Ticket: {x}\nQueue:", max_tokens=4)
    found = draft(["a {y} b", "c"])
    assert len(found) == 2 and all(len(own) <= 1 for own in found) and draft(["a {y} b", "c"]) == found
    ids = tokenizer("Ticket: c\nQueue:", return_tensors="pt")["input_ids"]
    new = model.generate(ids, do_sample=False, max_new_tokens=4)[0, ids.shape[1] :]
    assert found[1] == tokenizer.decode(new, skip_special_tokens=True).strip().splitlines()[:1]
    specialist_hint(draft, SHOTS, QUERIES)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())


def test_copies_are_counted():
    made = specialist_hint(upper, SHOTS, QUERIES)
    assert copy_rate([" FIVE", "six"], made) == 0.5
    with pytest.raises(HoldfastError, match="1 answers to 2 prompts"):
        copy_rate(["FIVE"], made)


def test_what_is_refused():
    with pytest.raises(HoldfastError, match="drafts for 1 of 6 inputs"):
        specialist_hint(lambda xs: [["a"]], SHOTS, QUERIES)
    with pytest.raises(HoldfastError, match="more than one line"):
        specialist_hint(lambda xs: [["a\nb"]] * len(xs), SHOTS, QUERIES)
