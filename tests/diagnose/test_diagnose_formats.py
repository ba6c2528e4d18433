"""Format or ability: hand cases for the judgement, and tiny models in which the cause was planted."""

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F

from holdfast.data.fewshot import FORMATS, build
from holdfast.diagnose import NOTHING, Case, formats
from holdfast.engine.forward import forward
from holdfast.measure.tasks import HeldOutTask, held_out_tasks
from holdfast.methods.data._shots import encode_shots

GOOD, HALF, NONE = [1.0] * 20, [1.0, 0.0] * 10, [0.0] * 20
USUAL = ("a", "b", "c")


# ---- the judgement, by hand


def judged(base, tuned):
    return formats.judge(base, tuned, USUAL)


def test_a_frame_that_keeps_all_names_itself():
    base = {f: GOOD for f in "abcx"}
    found = judged(base, {"a": NONE, "b": NONE, "c": NONE, "x": GOOD})
    assert (found.status, found.frame, found.usual, found.back) == ("hidden", "x", 0.0, 1.0)
    assert found.extra.value == 1.0


def test_a_usual_format_can_bring_it_back_too():
    base = {f: GOOD for f in "abcx"}
    found = judged(base, {"a": NONE, "b": GOOD, "c": NONE, "x": NONE})
    assert (found.status, found.frame) == ("hidden", "b")
    assert found.usual == pytest.approx(1 / 3)


def test_all_low_is_gone_and_says_how_far_the_best_frame_gets():
    base = {f: GOOD for f in "abcx"}
    little = [1.0, 1.0] + [0.0] * 18
    found = judged(base, {"a": NONE, "b": NONE, "c": NONE, "x": little})
    assert (found.status, found.frame, found.back) == ("gone", "x", pytest.approx(0.1))


def test_an_even_loss_is_weaker_and_not_hidden():
    base = {f: GOOD for f in "abcx"}
    some = [1.0] * 13 + [0.0] * 7
    assert judged(base, {f: some for f in "abcx"}).status == "weaker"


def test_a_few_items_more_in_one_frame_are_noise():
    base = {f: GOOD for f in "abcx"}
    some, others = [1.0] * 6 + [0.0] * 14, [0.0] * 6 + [1.0] * 11 + [0.0] * 3  # 30 % and 55 %, of different items
    assert judged(base, {"a": some, "b": some, "c": some, "x": others}).status == "weaker"
    assert judged(base, {"a": NONE, "b": NONE, "c": NONE, "x": others}).status == "hidden"
    assert judged(base, {"a": NONE, "b": NONE, "c": NONE, "x": some}).status == "partly hidden"


def test_a_frame_the_base_cannot_do_brings_nothing_back():
    few = [1.0] * 5 + [0.0] * 15
    base = {"a": GOOD, "b": GOOD, "c": GOOD, "x": few, "y": NONE}
    found = judged(base, {"a": NONE, "b": NONE, "c": NONE, "x": few, "y": GOOD})
    assert found.status == "gone", "x keeps all, but that is a quarter of the base; y is no ability of the base"
    assert (found.frame, found.back) == ("x", pytest.approx(0.25))


def test_a_frame_that_is_easier_for_the_base_too_is_no_sign():
    base = {"a": HALF, "b": HALF, "c": HALF, "x": GOOD}
    quarter, most = [1.0, 0.0, 0.0, 0.0] * 5, [1.0, 1.0, 1.0, 0.0] * 5  # a quarter of the points is lost everywhere
    assert judged(base, {"a": quarter, "b": quarter, "c": quarter, "x": most}).status == "weaker"


def test_nothing_lost_and_nothing_there():
    base = {f: HALF for f in "abcx"}
    assert judged(base, base).status == "kept"
    assert judged({f: NONE for f in "abcx"}, base).status == "not measurable"
    one_less = [0.0, *HALF[1:]]
    assert judged(base, {**base, "a": one_less, "b": one_less, "c": one_less}).status == "unclear"


@pytest.mark.parametrize("status", ["not measurable", "kept", "unclear", "hidden", "partly hidden", "gone", "weaker"])
def test_every_judgement_has_a_sentence(status):
    words = formats._sentence(formats.Judgement(status, 0.2, "json", 0.8), 11)
    assert words.endswith(".") and "nan" not in words
    assert words.startswith(NOTHING) == (status == "kept")


# ---- the frames


def test_the_frames_hold_the_same_items_in_one_order(tokenizer):
    tasks = held_out_tasks(formats.TASKS)
    frames = formats.frames_for(tokenizer)
    suite = formats.build_suite(tasks, frames, tokenizer)
    assert set(frames) == set(FORMATS) | set(formats.CONJUGATE) and set(formats.WORDS) == set(formats.CONJUGATE)
    ids = {f: [p.id.removeprefix(f"{f}/") for p in suite.probes if p.task == f] for f in frames}
    assert all(one == ids["qa"] for one in ids.values()) and len(ids["qa"]) == len(tasks) * formats.ITEMS
    assert all(t.labels is None for t in tasks), "an answer set would need a chance level"
    assert suite == formats.build_suite(tasks, frames, tokenizer)
    assert suite != formats.build_suite(tasks, frames, tokenizer, seed=1)


def test_a_frame_keeps_the_words_of_the_task(tokenizer):
    task = held_out_tasks(("plural",))
    suite = formats.build_suite(task, formats.frames_for(tokenizer), tokenizer)
    first = {p.task: p for p in suite.probes if p.id.endswith("/0")}
    known = dict(task[0].items)
    query = first["qa"].context.removesuffix("\nA:").rpartition("Q: ")[2]
    assert first["german"].context.endswith(f"Frage: {query}\nAntwort:")
    assert first["german"].answers == (f" {known[query]}\n",)
    assert first["json"].context.endswith(f'{{"input": "{query}", "output":')
    assert first["json"].answers == (f' "{known[query]}"}}\n',)
    assert first["turn"].context.startswith("<|im_start|>user") and first["turn"].context.endswith("Output:")


def test_without_a_chat_template_no_chat_is_asked(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert {"chat", "turn"}.isdisjoint(formats.frames_for(plain))


def test_an_answer_in_a_turn_ends_as_the_tokenizer_writes_it():
    """A vocabulary with a blank line as one token never says a single newline there."""
    from tokenizers_made import LLAMA3, byte_level

    tokenizer = byte_level(pattern=LLAMA3)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    frames = {"io": FORMATS["io"], "turn": formats.frames_for(tokenizer)["turn"]}
    probes = formats.build_suite(held_out_tasks()[:1], frames, tokenizer, 0).probes
    assert {p.task: p.answers[0][-2:] for p in probes} == {"io": "\n\n", "turn": "\n\n"}


# ---- planted causes


def words_of(tokenizer) -> list[str]:
    """Words that are one token after a blank."""
    texts = (tokenizer.decode([i]) for i in range(5, len(tokenizer)))
    return sorted({t[1:] for t in texts if t.startswith(" ") and t[1:].isalpha()})


def copy_model():
    """One layer that learns to copy within a few dozen steps."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.1,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def copy_rows(tokenizer, answers, n=300, words=None):
    """Few-shot rows; answers: frame -> what the right answer to a word is."""
    out, forms = [], FORMATS | formats.CONJUGATE
    for i in range(n):
        draw = random.Random(i)
        frame = sorted(answers)[i % len(answers)]
        pairs = [(w, answers[frame](w)) for w in draw.sample(words or words_of(tokenizer), 5)]
        prompt = build(forms[frame], pairs[:-1], pairs[-1])
        out.append(encode_shots(prompt, tokenizer, "task", every_token=False))
    return out


def fit(model, rows, steps, lr=1e-2, batch=16):
    """Full tuning of a copy of the model."""
    model = copy.deepcopy(model).train()
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=lr), random.Random(0)
    for _ in range(steps):
        packed, logits = forward(model, draw.sample(rows, batch))
        F.cross_entropy(logits, packed.target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def copy_tasks(tokenizer):
    """Four copying tasks of fifteen words each."""
    words = words_of(tokenizer)
    return [
        HeldOutTask(f"copy{n}", 1, "letters", "Copy.", "In", "Out", None, tuple((w, w) for w in words[n : n + 15]))
        for n in range(0, 60, 15)
    ]


@pytest.fixture(scope="module")
def copier(tokenizer):
    """A model that copies in three frames."""
    same = dict.fromkeys(("qa", "io", "german"), lambda w: w)
    return fit(copy_model(), copy_rows(tokenizer, same), 80)


def test_what_only_the_usual_formats_lost_is_hidden(copier, tokenizer):
    answers = {"qa": lambda _: "no", "io": lambda _: "no", "german": lambda w: w}
    tuned = fit(copier, copy_rows(tokenizer, answers), 60, lr=3e-3)
    found = formats.compare_frames(Case(copier, tuned, tokenizer), copy_tasks(tokenizer))
    assert found.finding.startswith("Hidden, not gone: asked between German words"), (found.finding, found.table)
    assert found.scores["best"] > 0.8 and found.scores["usual"] < 0.2
    assert found.table[0] == ["format", "kind", "base", "tuned", "left"] and len(found.table) == 12


def test_what_no_frame_has_left_is_gone(copier, tokenizer):
    answers = dict.fromkeys(("qa", "io", "german"), lambda _: "no")
    tuned = fit(copier, copy_rows(tokenizer, answers), 40, lr=1e-2)
    found = formats.compare_frames(Case(copier, tuned, tokenizer), copy_tasks(tokenizer))
    assert found.finding.startswith("Gone"), (found.finding, found.table)


def test_the_base_against_itself_lost_nothing(copier, tokenizer):
    found = formats.compare_frames(Case(copier, copier, tokenizer), copy_tasks(tokenizer))
    assert found.finding.startswith(NOTHING) and found.scores["usual"] == 1.0


def test_a_base_that_can_do_nothing_is_not_judged(tiny_model, tokenizer):
    model = tiny_model()
    found = formats.diagnose(Case(model, model, tokenizer))
    assert found.finding.startswith("Cannot tell") and found.name == "format or ability"
    assert not any(math.isnan(x) for x in found.scores.values())
