"""The language suite: its passages are sound, and its scores are what the docstring says."""

import ast
import math
import sqlite3
from itertools import pairwise

import pytest
import torch

from holdfast.measure.asking import score_suite
from holdfast.measure.probe import Ask
from holdfast.measure.suites.language import LIMIT, build_suite, read_data, summary

TASKS = read_data()[1]


def test_every_task_has_enough_passages_of_the_right_length_and_none_twice():
    assert list(TASKS) == ["English prose", "code", "dialogue", "German", "French"]
    texts = [p.text for passages in TASKS.values() for p in passages]
    assert len({" ".join(t.split()) for t in texts}) == len(texts)
    for task, passages in TASKS.items():
        assert len(passages) >= 24
        for p in passages:
            size, least, most = (len(p.text.splitlines()), 8, 20) if task == "code" else (len(p.text.split()), 60, 110)
            assert least <= size <= most, (task, p.theme, size)
            assert p.text == p.text.strip() and "\t" not in p.text and p.theme
            assert p.text.isascii() or task in ("German", "French"), (task, p.theme)


def test_code_is_code():
    languages = [p.theme for p in TASKS["code"]]
    assert languages.count("Python") > len(languages) / 2 and set(languages) == {"Python", "SQL", "JavaScript"}
    for p in TASKS["code"]:
        if p.theme == "Python":
            ast.parse(p.text)
        elif p.theme == "SQL":
            sqlite3.connect(":memory:").executescript(p.text)
        else:
            assert all(p.text.count(a) == p.text.count(b) for a, b in ("()", "[]", "{}"))


def test_dialogue_is_two_people_taking_turns():
    for p in TASKS["dialogue"]:
        speakers = [line.split(": ")[0] for line in p.text.splitlines()]
        assert len(set(speakers)) == 2
        assert all(a != b for a, b in pairwise(speakers)), p.theme


def test_german_and_french_are_told_apart_by_their_small_words():
    german, french = {"der", "die", "und", "nicht", "das"}, {"le", "la", "et", "les", "une"}
    for task, own, other in (("German", german, french), ("French", french, german)):
        for p in TASKS[task]:
            words = [w.strip(".,;:!?").lower() for w in p.text.split()]
            assert sum(w in own for w in words) > 4 * sum(w in other for w in words), p.theme


def test_a_smaller_limit_asks_a_subset_and_building_twice_gives_the_same(tokenizer):
    whole, some = build_suite(Ask(tokenizer)), build_suite(Ask(tokenizer, limit=3))
    assert whole == build_suite(Ask(tokenizer)) and len(whole.probes) == LIMIT * len(TASKS)
    assert set(some.probes) < set(whole.probes) and len(some.probes) == 3 * len(TASKS)
    assert len({p.id for p in whole.probes}) == len(whole.probes)
    other = build_suite(Ask(tokenizer, seed=1))
    assert {p.id for p in other.probes} != {p.id for p in whole.probes}
    texts = {p.id: p.answer for p in whole.probes}
    assert all(texts.get(p.id, p.answer) == p.answer for p in other.probes)  # an id names one passage


def test_a_uniform_guesser_scores_one_in_the_vocabulary(tiny_model, tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    scored = score_suite(model, tokenizer, build_suite(Ask(tokenizer, limit=1)))
    size = model.config.vocab_size
    for task in scored["tasks"]:
        (item,) = task["items"]
        assert item["correct"] == pytest.approx(1 / size)
        assert summary([item])["nats_per_token"] == pytest.approx(math.log(size))
        assert item["num_bytes"] == len(TASKS[task["name"]][int(item["id"].split("/")[1])].text.encode())


def test_summary_of_a_hand_made_case_weighs_tokens_and_bytes():
    items = [
        {"logprob": -1.0, "num_tokens": 1, "num_bytes": 2},
        {"logprob": -3.0, "num_tokens": 7, "num_bytes": 30},
    ]
    out = summary(items)
    assert out["nats_per_token"] == 0.5
    assert out["bits_per_byte"] == pytest.approx(4 / math.log(2) / 32)
    assert out["perplexity"] == pytest.approx(math.sqrt(math.e))


def test_a_certain_model_has_perplexity_one():
    out = summary([{"logprob": 0.0, "num_tokens": 9, "num_bytes": 40}])
    assert out == {"nats_per_token": 0.0, "bits_per_byte": 0.0, "perplexity": 1.0}
