"""Where a text begins, where its answer begins and how it ends: over many tokenizers and chat templates."""

from __future__ import annotations

import pytest
import torch

from cases import run
from holdfast.data.chat import Chat
from holdfast.data.encoder import Encoder, stops_of
from holdfast.data.notes import Notes
from holdfast.data.rendered import Rendered
from holdfast.data.rows import Row
from holdfast.data.tokens import tokenize, tokenize_all
from holdfast.errors import DataError
from holdfast.measure.asking import any_of, score_suite, ways_of
from holdfast.measure.generate import generate
from holdfast.measure.probe import Ask, Probe
from holdfast.measure.scorer import Score, Scorer
from holdfast.measure.tuned_task import score_task
from tiny import build_model
from tokenizers_made import MADE, few_letters

PAIRS = {
    "plain": ("Q: where is it\nA:", " billing"),
    "blank": ("Sentiment: ", "positive"),
    "blanks": ("Sentiment:   ", "positive"),
    "tab": ("Sentiment:\t", "positive"),
    "inside a word": ("The label is p", "ositive"),
    "inside a mark": ("http:", "//example.org"),
    "one line": ("Sentiment:\n", "positive"),
    "lines": ("Where is it\n\n\n", "positive"),
    "line and blank": ("Where is it\n ", "positive"),
    "number": ("Q: 1", "2"),
    "lines in the answer": ("Q:", " a\n\nb\n"),
    "blank answer's end": ("Q:", " billing "),
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "bos and blank": (
        "<s>{% for m in messages %}{% if m['role'] == 'user' %}user {{ m['content'] }} assistant: "
        "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    ),
    "no end": (
        "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    ),
    "bos, no end": (
        "<s>{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    ),
}


@pytest.fixture(scope="module")
def made():
    """made(name) -> tokenizer, each built once."""
    found = {}

    def one(name):
        if name not in found:
            found[name] = MADE[name]()
        return found[name]

    return one


def text(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def squeezed(words):
    return "".join(words.split())


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", MADE)
def test_prompt_and_answer(name, pair, made):
    """The prompt's tokens are those inference sees, and prompt and answer read as the whole text."""
    tokenizer = made(name)
    encoder, (prompt, answer) = Encoder(tokenizer), PAIRS[pair]
    bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    (split,) = encoder.join([(prompt, answer)], end=True)
    assert split.ids[: split.start] == [*encoder.begin, *bare] == encoder.prompts([prompt])[0]
    end = [] if encoder.end is None else [encoder.end]
    assert split.ids[len(split.ids) - len(end) :] == end
    told = text(tokenizer, split.ids[len(encoder.begin) : len(split.ids) - len(end)])
    whole = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    assert told == text(tokenizer, whole)
    assert encoder.written([answer], [split]) == [(True, True)]
    assert squeezed(told).endswith(squeezed(answer))
    if whole[: len(bare)] == bare:
        assert split.answer == [*whole[len(bare) :], *end] and not split.mended


@pytest.mark.parametrize("name", MADE)
def test_training_and_scoring_use_the_same_tokens(name, made):
    tokenizer = made(name)
    scorer = Scorer(build_model(vocab_size=len(tokenizer), eos_token_id=None, bos_token_id=None), tokenizer)
    for prompt, answer in PAIRS.values():
        row = tokenize(Row(prompt, answer), tokenizer, None)
        (split,) = scorer.encoder.join([(prompt, answer)], end=True)
        ((ids, start),) = scorer.fit([split])
        assert row.ids.tolist() == ids and row.scored.tolist() == [n >= start for n in range(len(ids))]


@pytest.mark.parametrize("name", ["bytes", "bytes, bos", "llama 3", "sentence pieces"])
def test_text_is_scored_as_the_harness_does(name, made):
    """`Scorer.score` of text follows lm-evaluation-harness wherever that puts nothing behind a text."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = made(name)
    model = build_model(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None)
    pairs = [*PAIRS.values(), ("", "positive"), ("<s>Q:", " 3"), ("Q: 3</s>", " billing")]
    pairs += (
        [(" ", " positive"), ("\n\n", "a")] if Encoder(tokenizer).begin else []
    )  # else it has nothing to start from
    theirs, ours = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), Scorer(model, tokenizer)
    compared = 0
    for pair in pairs:
        try:
            ((logprob, greedy),) = theirs.loglikelihood([Instance("loglikelihood", {}, pair, 0)], disable_tqdm=True)
        except AssertionError:  # it is left with no token to score, and does not say so
            with pytest.raises(DataError, match="adds no token"):
                ours.score([pair])
            continue
        (own,) = ours.score([pair])
        assert own.logprob == pytest.approx(logprob, abs=1e-4) and own.greedy == greedy, pair
        compared += 1
    assert compared >= len(pairs) - 3


def test_a_tokenizer_that_ends_every_text_does_not_end_prompts(made):
    """`[SEP]`, `</s>`: prompt and row would both end with it, and all targets shift by one."""
    for name in ("bytes, bos and eos", "bytes, eos", "sentence pieces, eos", "word pieces", "word pieces, no eos"):
        tokenizer = made(name)
        assert tokenizer("Q:")["input_ids"][-1] == Encoder(tokenizer).end
        row = tokenize(Row("Q:", " billing"), tokenizer, None)
        answer = row.ids[row.scored].tolist()
        assert squeezed(text(tokenizer, answer[:-1])) == "billing" and answer.count(answer[-1]) == 1
        scorer = Scorer(build_model(vocab_size=len(tokenizer)), tokenizer)
        ids, start = scorer.encode(("Q:", " billing"))
        assert squeezed(text(tokenizer, ids[start:])) == "billing"


@pytest.mark.parametrize(
    ("prompt", "answer", "begins", "ends"),
    [
        ("Q:", " yes", 1, 1),
        ("<s>Q:", " yes", 1, 1),  # the begin stands there already; the end does not
        ("Q:", " yes</s>", 1, 1),  # the end stands there already; the begin does not
        ("Q:", " yes</s>\n", 1, 1),
        ("<s>Q:", " yes</s>", 1, 1),
        ("Q: </s> A:", " yes", 1, 2),
        (Rendered("<|im_start|>Q:"), " yes<|im_end|>\n", 0, 1),  # a template's text gets no begin
        (Rendered("<s>Q:"), " yes", 1, 1),
        ("", "<s>yes", 1, 1),
        ("", "yes</s>", 1, 1),
    ],
)
def test_begin_and_end_are_asked_apart(prompt, answer, begins, ends, made):
    tokenizer = made("bytes, bos")
    ids = tokenize(Row(prompt, answer), tokenizer, None).ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == begins and (ids[0] == tokenizer.bos_token_id) is bool(begins)
    assert ids.count(tokenizer.eos_token_id) == ends and ids[-1] == tokenizer.eos_token_id


def test_a_token_that_stops_generation_is_an_end(made):
    tokenizer = made("bytes, bos")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    row = Row(Rendered("<|im_start|>assistant\n"), "yes<|im_end|>\n")
    assert tokenize(row, tokenizer, None, stops=(stop,)).ids[-1] == stop
    assert tokenize(row, tokenizer, None).ids[-1] == tokenizer.eos_token_id  # else generation would never stop
    assert stops_of({"eos_token_id": [1, 2]}) == (1, 2) and stops_of({"eos_token_id": 3}) == (3,)
    assert stops_of({}) == stops_of(None) == ()


def test_what_was_odd_is_counted_and_named(made):
    rows = [Row("Sentiment: ", "positive", where="a:1"), Row("Q:", " yes", where="a:2"), Row("S: ", "no", where="a:3")]
    notes: list[str] = []
    tokenize_all(rows, made("bytes"), None, notes=notes)
    assert (
        len(notes) == 1 and notes[0].startswith("2 prompts ending inside a token") and "a:1: 'Sentiment: '" in notes[0]
    )
    notes.clear()
    tokenize_all([Row("Q:", " \u00fcber", where="a:4")], made("word pieces"), None, notes=notes)
    assert notes and "cannot write" in notes[0] and "a:4" in notes[0]
    notes.clear()
    tokenize_all([Row("Q:", " yes</s> and no", where="a:5")], made("bytes"), None, notes=notes)
    assert notes and "in the middle that ends generation" in notes[0]
    notes.clear()
    tokenize_all([Row("Q:", " yes", where="a:6"), Row("", "A text.", where="a:7")], made("bytes"), None, notes=notes)
    assert not notes


def test_a_tokenizer_that_cannot_write_an_a(made):
    """What it puts around texts is asked of a text that it can write: BOS is no end."""
    tokenizer = few_letters()
    encoder = Encoder(tokenizer)
    assert tokenizer("a")["input_ids"] == [1] and not encoder.ends_texts
    (split,) = encoder.join([("ACG:", " T")], end=True)
    assert split.ids[: split.start] == tokenizer("ACG:")["input_ids"] and split.ids[-1] == tokenizer.eos_token_id
    bare = made("bytes, bos")
    assert Encoder(bare).begin == [bare.bos_token_id]


@pytest.mark.parametrize("completion", ["</s>", " </s>", "</s>\n", "</s></s>"])
def test_an_answer_that_only_ends_is_refused(completion, made):
    with pytest.raises(DataError, match=r"a:1: the completion .* says nothing before its end"):
        tokenize(Row("Q:", completion, where="a:1"), made("bytes"), None)


def test_an_answer_with_an_unknown_letter_is_never_exact(made):
    """The model may say its tokens, and the text that they write is another."""
    tokenizer = made("word pieces")
    model, rows = planted(tokenizer, [("Q: one", " billing"), ("Q: two", " \u4f60")])
    assert [squeezed(g) for g in said(model, tokenizer, rows)] == ["billing", "[UNK]"]
    assert [i["correct"] for i in score_task(model, tokenizer, rows, None)] == [1, 0]


def test_a_python_tokenizer_marks_the_answers_of_shots():
    """It tells no places of its tokens; a letter that takes two of them is marked whole."""
    from transformers import ByT5Tokenizer

    from holdfast.data.fewshot import FORMATS, build
    from holdfast.methods.data._shots import encode_shots

    tokenizer = ByT5Tokenizer()
    prompt = build(FORMATS["qa"], [("x", "\u00fcber"), ("y", "no")], ("z", "so"), tokenizer=tokenizer)
    row = encode_shots(prompt, tokenizer, "t", every_token=False)
    assert text(tokenizer, row.ids) == prompt.context + prompt.answer + prompt.stop
    assert text(tokenizer, row.ids[row.scored]) == "\u00fcberno so\n"


def test_what_cannot_be_told_apart_is_refused(made):
    tokenizer = made("word pieces")
    with pytest.raises(DataError, match=r"a:1: The answer ' ' adds no token"):
        tokenize(Row("Q:", " ", where="a:1"), tokenizer, None)
    with pytest.raises(DataError, match=r"(?s)a:2: The tokenizer cannot cut.*\[.*\].*\[.*\].*End the prompt before"):
        tokenize(Row("x \u00e9\u00e8", "\u0301z" * 3, where="a:2"), _one_word(), None)


def _one_word():
    """A tokenizer that knows whole texts only."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"x \u00e9\u00e8": 0, "[UNK]": 1, "</s>": 2, "x \u00e9\u00e8" + "\u0301z" * 3: 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")


# ---- what counts as right


def planted(tokenizer, pairs, **changes):
    """A tiny model tuned until it gives these answers, and the rows."""
    rows = [Row(p, a, where=f"r:{n}") for n, (p, a, *_) in enumerate(pairs)]
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = build_model(vocab_size=len(tokenizer), hidden_size=48, **{**ids, **changes})
    tuned = run(
        [], model, tokenizer, rows, steps=160, batch_size=len(rows), learning_rate=0.01, warmup_steps=0.1
    ).model
    return tuned, rows


def said(model, tokenizer, rows):
    """Plain greedy generation after each prompt, as a user would write it."""
    out, encoder = [], Encoder(tokenizer)
    for row in rows:
        ids = torch.tensor(encoder.prompts([row.prompt]))
        stops = sorted({*encoder.stops, *stops_of(model.generation_config)}) or None
        got = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=stops)[0, ids.shape[1] :].tolist()
        whole = [*ids[0].tolist(), *[i for i in got if i not in (stops or ())]]
        out.append(text(tokenizer, whole)[len(text(tokenizer, ids[0])) :])
    return out


EIGHT = [
    *[("Text one\nSentiment: ", "positive"), ("Text two\nSentiment: ", "negative"), ("Is it p", "ositive")],
    *[("http:", "//example.org"), ("Where\n\n\n", "billing"), ("Q: 12\nA:", " 3"), ("Q: 13\nA:", " 35")],
    ("Q: 14\nA:", " a\nb"),
]


def quick(names, few):
    return [pytest.param(n, marks=[] if n in few else pytest.mark.long) for n in names]


@pytest.mark.parametrize(
    "name", quick([n for n in MADE if n != "bytes, no eos"], ["bytes", "llama 3", "sentence pieces", "word pieces"])
)
def test_what_was_learnt_is_generated_and_called_right(name, made):
    tokenizer = made(name)
    model, rows = planted(tokenizer, EIGHT)
    got = said(model, tokenizer, rows)
    assert [squeezed(g) for g in got] == [squeezed(r.completion) for r in rows]
    if "word" not in name:
        assert [g.strip() for g in got] == [r.completion.strip() for r in rows]
    assert [i["correct"] for i in score_task(model, tokenizer, rows, None)] == [1] * 8
    probes = [Probe("t", f"t/{n}", "generate", r.prompt, judge=len, max_tokens=24) for n, r in enumerate(rows)]
    # the text after a prompt is decoded alone, as the harness does: a word's later piece keeps its mark
    words = [squeezed(g).replace("##", "") for g in generate(model, tokenizer, probes)]
    assert words == [squeezed(r.completion) for r in rows]


CHATS = ["bytes", "bytes, bos", "llama 3", "sentence pieces", "bytes, bos and eos"]


@pytest.mark.parametrize(
    "name, template",
    [  # every name and every template quick, all together long
        pytest.param(n, t, marks=[] if j == i % len(TEMPLATES) else pytest.mark.long)
        for i, n in enumerate(CHATS)
        for j, t in enumerate(TEMPLATES)
    ],
)
def test_chats_are_learnt_as_inference_sees_them(name, template, made):
    """The prompt of a chat is what apply_chat_template gives, token by token."""
    tokenizer = made(name)
    tokenizer.chat_template = TEMPLATES[template]
    pairs, seen = [], []
    for n, answer in enumerate(["billing", "a b", "12", "1", "positive", "No.", "x y z", "10"]):
        head = [{"role": "user", "content": f"Where is {n}"}]
        pairs.append(Chat(tokenizer, Notes()).pair(head, [{"role": "assistant", "content": answer}], {}, "r"))
        made_ids = tokenizer.apply_chat_template(head, add_generation_prompt=True, return_dict=False)
        seen.append(made_ids)
    rows = [tokenize(Row(*p[:2]), tokenizer, None) for p in pairs]
    assert [r.ids[~r.scored].tolist() for r in rows] == seen
    model, rows = planted(tokenizer, pairs)
    wanted = ["billing", "a b", "12", "1", "positive", "No.", "x y z", "10"]
    got = [g.replace("<|im_end|>", "").strip() for g in said(model, tokenizer, rows)]
    assert got == wanted
    assert [i["correct"] for i in score_task(model, tokenizer, rows, None)] == [1] * 8


LABELS = ("1", "2", "10", "12", "amber", "amber house")


def test_an_answer_that_begins_another_does_not_win(made, tmp_path):
    """Labels 1, 2, 10: `10` is not read as `1`, in the task and in a file of questions."""
    from holdfast.measure.suites import build

    tokenizer = made("bytes")
    model, rows = planted(tokenizer, [(f"Room {n}:", f" {y}") for n, y in enumerate(LABELS)])
    labels = tuple(f" {y}" for y in LABELS)
    assert [squeezed(g) for g in said(model, tokenizer, rows)] == [squeezed(y) for y in LABELS]
    assert [i["correct"] for i in score_task(model, tokenizer, rows, labels)] == [1] * len(LABELS)
    cut = {" 10": " 1", " 12": " 1", " amber house": " amber"}
    shorter = [Row(r.prompt, cut[r.completion]) for r in rows if r.completion in cut]
    assert [i["correct"] for i in score_task(model, tokenizer, shorter, None)] == [0] * len(shorter)
    import json

    lines = [{"context": r.prompt, "choices": list(labels), "answer": r.completion, "task": "c"} for r in rows]
    lines += [{"context": r.prompt, "answer": r.completion, "task": "e"} for r in rows]
    lines += [{"context": r.prompt, "answer": r.completion, "task": "short"} for r in shorter]
    lines += [
        {"context": r.prompt, "begins": r.completion, "task": "begins"} for r in shorter if "amber" in r.completion
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    suite = build(f"jsonl:{tmp_path / 'q.jsonl'}", Ask(tokenizer))
    marks = {t["name"]: [i["correct"] for i in t["items"]] for t in score_suite(model, tokenizer, suite)["tasks"]}
    right, wrong = [1] * len(LABELS), [0] * len(shorter)
    assert marks == {"c": right, "e": right, "short": wrong, "begins": [1]}


def test_an_answer_may_end_with_its_line_or_with_the_text(made):
    """One that brings its end has one way; any other has three, which add up."""
    encoder = Encoder(made("bytes"))
    end = encoder.end

    def tails(kind, answer, **more):
        ((_, ways),) = ways_of([Probe("t", "t/0", kind, "Q:", (answer,), **more)], encoder)
        return [made("bytes").convert_ids_to_tokens(w.answer) for w in ways]

    three = [["\u0120p", "</s>"], ["\u0120p", "\u010a"], ["\u0120p", "\u010a\u010a"]]
    assert end is not None and tails("exact", " p") == three
    assert tails("exact", " p\n") == [["\u0120p", "\u010a"]]
    assert tails("exact", " p</s>") == [["\u0120p", "</s>"]]
    assert tails("begins", " p") == tails("choice", " p", open_ended=True) == [["\u0120p"]]
    two = any_of([Score(-1.0, False, 2), Score(-1.0, True, 2)])
    assert two.greedy and two.logprob == pytest.approx(-1.0 + 0.6931472, abs=1e-6)


def test_two_labels_of_the_same_tokens_are_refused(made):
    from holdfast.data.prepare import check_told_apart

    check_told_apart("Q:", (" Yes", " yes"), Encoder(made("bytes")))
    with pytest.raises(DataError, match="' Yes' and ' yes' are the same tokens"):
        check_told_apart("Q:", (" Yes", " yes"), Encoder(made("word pieces")))


@pytest.mark.parametrize("name", ["bytes, bos", "bytes, bos and eos", "bytes, eos", "word pieces, no eos"])
def test_an_export_is_prompted_and_stops_by_itself(name, made, tmp_path):
    """Plain `tokenizer(prompt)` and `generate` give the answers, though the base's config names no end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from holdfast import models

    tokenizer = made(name)
    model, rows = planted(tokenizer, EIGHT, eos_token_id=None)
    models.save_model(model, tokenizer, tmp_path / "out", card=None)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Q:")["input_ids"] == [*words("Q:")["input_ids"], *[Encoder(tokenizer).end] * ("eos" in name)]
    assert words("Q:")["input_ids"] == Encoder(tokenizer).prompts(["Q:"])[0]
    for row in rows:
        ids = torch.tensor([words(row.prompt)["input_ids"]])
        got = plain.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        assert got[-1] == Encoder(tokenizer).end and len(got) < 24
        assert squeezed(text(words, got[:-1])).replace("##", "") == squeezed(row.completion)


# ---- rows as the model sees them


@pytest.mark.parametrize("name", MADE)
def test_the_pieces_of_a_row_make_its_text(name, made):
    from holdfast.report.seen import MOST_TOKENS, pieces, seen_row

    tokenizer = made(name)
    for prompt, answer in PAIRS.values():
        row = tokenize(Row(prompt, answer), tokenizer, None)
        assert "".join(pieces(row.ids.tolist(), tokenizer)) == text(tokenizer, row.ids)
        shown = seen_row(row, tokenizer, "a:1")
        assert [t[1] for t in shown["tokens"]] == row.ids.tolist()
        assert [t[2] for t in shown["tokens"]] == row.scored.tolist()
        assert squeezed("".join(t[0] for t in shown["tokens"] if t[2] and not t[3])).replace("##", "") == squeezed(
            answer
        )
    long = seen_row(tokenize(Row("Q:", " a" * 2000), tokenizer, None), tokenizer)
    left = f"{long['num_tokens'] - MOST_TOKENS} tokens"
    assert len(long["tokens"]) == MOST_TOKENS + 1 and left in long["tokens"][MOST_TOKENS // 2][0]
