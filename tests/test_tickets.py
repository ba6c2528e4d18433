"""The ticket data keeps what its README promises: sizes, labels, no leaks, not solved by counting words."""

import json
from collections import Counter
from functools import cache
from importlib.resources import files

import pytest

QUEUES = {"billing", "shipping", "returns", "account", "technical", "sales"}
SIZES = {"train": 720, "validation": 180, "test": 360}


@cache
def rows(split: str) -> list[dict[str, str]]:
    path = files("holdfast") / "data" / "shipped" / "tickets" / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(split: str) -> list[str]:
    return [row["text"] for row in rows(split)]


def queues(split: str) -> list[str]:
    return [row["queue"] for row in rows(split)]


@pytest.mark.parametrize("split", SIZES)
def test_size_columns_and_balance(split):
    assert len(rows(split)) == SIZES[split]
    assert all(set(row) == {"text", "queue"} for row in rows(split))
    counts = Counter(queues(split))
    assert set(counts) == QUEUES
    assert min(counts.values()) >= 0.8 * max(counts.values())


@pytest.mark.parametrize("split", SIZES)
def test_text_is_one_clean_paragraph(split):
    for text in texts(split):
        assert text == " ".join(text.split()), text
        assert 5 <= len(text.split()) <= 90, text
        assert not set("{}|@") & set(text), text  # marks of an unfilled pattern


def test_lengths_vary():
    lengths = sorted(len(text.split()) for split in SIZES for text in texts(split))
    assert lengths[len(lengths) // 10] <= 20
    assert lengths[-len(lengths) // 10] >= 55


def test_no_exact_duplicates():
    every = [" ".join(text.lower().split()) for split in SIZES for text in texts(split)]
    assert len(every) == len(set(every))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_no_near_duplicate_of_a_train_ticket(split):
    """Character 5-gram Jaccard of every pair, |a & b| / |a | b|, from one sparse product."""
    text_module = pytest.importorskip("sklearn.feature_extraction.text")
    counter = text_module.CountVectorizer(analyzer="char", ngram_range=(5, 5), binary=True, dtype="int32")
    counter.fit(texts("train") + texts(split))
    train, other = counter.transform(texts("train")), counter.transform(texts(split))
    shared = (other @ train.T).toarray()  # (tickets, train tickets)
    union = other.sum(axis=1).reshape(-1, 1) + train.sum(axis=1).reshape(1, -1) - shared
    assert (shared / union).max() < 0.5


def test_bag_of_words_is_neither_lost_nor_enough():
    """Above 0.4 the labels can be learned from the text; below 0.9 there is something left to read."""
    text_module = pytest.importorskip("sklearn.feature_extraction.text")
    linear_model = pytest.importorskip("sklearn.linear_model")
    tfidf = text_module.TfidfVectorizer(ngram_range=(1, 2))
    train, test = tfidf.fit_transform(texts("train")), tfidf.transform(texts("test"))
    for strength in (0.3, 1.0, 3.0, 10.0):
        model = linear_model.LogisticRegression(C=strength, max_iter=500).fit(train, queues("train"))
        assert 0.4 < model.score(test, queues("test")) < 0.9, f"C={strength}"
