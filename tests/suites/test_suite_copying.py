"""The copying suite: only the context answers its sequences, and its windows lie where they should."""

import math

import pytest
import torch

from holdfast.engine.tree import grow
from holdfast.measure.asking import score_suite
from holdfast.measure.probe import Ask
from holdfast.measure.scorer import Scorer
from holdfast.measure.suites.copying import (
    EARLY,
    GIVEN,
    HALF,
    LATE,
    LENGTH,
    LIMIT,
    WORDS,
    build_suite,
    copy_probes,
    icl_score,
    places,
    texts,
)


def induction(context: str) -> str:
    """What an induction head says: the word that followed the last word where it stood before."""
    words = context.split(" ")
    return f" {words[words.index(words[-1]) + 1]}"


def count(tokenizer, text):
    return len(tokenizer.encode(text, add_special_tokens=False))


def test_words_are_many_different_and_plain():
    assert len(WORDS) >= 200 and len(set(WORDS)) == len(WORDS)
    assert all(w.isascii() and w.islower() and w.isalpha() for w in WORDS)


def test_an_induction_head_is_always_right_and_a_constant_guesser_at_chance(tokenizer):
    suite = build_suite(Ask(tokenizer))
    probes = [p for p in suite.probes if p.task == "random sequence"]
    assert len(probes) == LIMIT * (LENGTH - GIVEN) and suite.groups[0].clustered
    assert all(induction(p.context) == p.answer for p in probes)
    for n in range(LIMIT):
        sequence = [p for p in probes if p.cluster == f"random sequence/{n}"]
        shown = sequence[0].context.split(" ")[:LENGTH]
        assert len(set(shown)) == LENGTH
        rates = [sum(p.answer == f" {w}" for p in sequence) / len(sequence) for w in shown]
        assert max(rates) == pytest.approx(suite.groups[0].chance)


def test_a_sequence_costs_one_pass(tokenizer, tiny_model):
    scorer = Scorer(tiny_model(), tokenizer)
    encoded = [scorer.encode((p.context, p.answer)) for p in copy_probes(0)]
    assert len(grow(encoded)) == max(len(ids) for ids, _ in encoded)  # the root stands for the unread last token


def test_texts_differ_in_theme_first_and_keep_their_passages():
    chosen = texts()
    themes = [theme for _, theme, _, _ in chosen]
    assert len(set(themes[:5])) == 5 and len(chosen) == 25
    assert len({ident for ident, _, _, _ in chosen}) == len({passage for _, _, passage, _ in chosen}) == 25
    for theme in set(themes):
        assert len({frozenset([passage, *before]) for _, t, passage, before in chosen if t == theme}) == 1
    for _, _, passage, before in chosen:  # enough for token LATE in any common vocabulary
        assert passage not in before and len(" ".join(before).split()) >= 370


def test_windows_are_the_same_words_at_the_tokens_they_are_named_after(tokenizer):
    long_word = 20  # of this tokenizer, in tokens
    for _, _, passage, before in texts()[:5]:
        early, late, answer = places(passage, before, tokenizer)
        assert passage.startswith(early + answer) and "\n\n".join([*before, early]).endswith(late)
        for at, context in ((EARLY, early), (LATE, late)):
            start, end = count(tokenizer, context), count(tokenizer, context + answer)
            assert abs(at - HALF - start) < long_word and start < at < end < at + HALF + long_word


def test_late_words_lie_as_far_in_as_the_tokenizer_reads(tokenizer):
    class Short:
        model_max_length = 301
        encode = staticmethod(tokenizer.encode)

    _, _, passage, before = texts()[0]
    early, late, answer = places(passage, before, Short)
    assert 265 < count(tokenizer, late + answer) + 1 < Short.model_max_length  # one for bos
    assert places(passage, [], tokenizer) == (early, early, answer)  # nothing to put before it


def test_a_smaller_limit_asks_a_subset_and_building_twice_gives_the_same(tokenizer):
    whole, some = build_suite(Ask(tokenizer)), build_suite(Ask(tokenizer, limit=3))
    assert whole == build_suite(Ask(tokenizer)) and set(some.probes) < set(whole.probes)
    sizes = [[sum(p.task == g.name for p in s.probes) for g in s.groups] for s in (whole, some)]
    assert sizes == [[LIMIT * (LENGTH - GIVEN), 4, 4], [3 * (LENGTH - GIVEN), 2, 2]]
    assert len({p.id for p in whole.probes}) == len(whole.probes)
    assert build_suite(Ask(tokenizer, seed=1)).probes[0] != whole.probes[0]


def test_a_model_that_ignores_its_context_has_no_icl_score(tiny_model, tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    scored = score_suite(model, tokenizer, build_suite(Ask(tokenizer, limit=2)))
    copied, early, late = (t["items"] for t in scored["tasks"])
    assert not any(i["correct"] for i in copied)
    assert early[0]["correct"] == pytest.approx(1 / model.config.vocab_size)
    assert icl_score(early, late) == pytest.approx(0, abs=1e-6)


def test_icl_score_of_a_hand_made_case():
    early = [{"logprob": -30.0, "num_tokens": 10}, {"logprob": -8.0, "num_tokens": 4}]
    late = [{"logprob": -20.0, "num_tokens": 10}, {"logprob": -3.0, "num_tokens": 3}]
    assert icl_score(early, late) == pytest.approx(-1.0)
    assert icl_score(early, early) == 0 and math.isclose(icl_score(late, early), 1.0)
    with pytest.raises(ValueError):
        icl_score(early, late[:1])
