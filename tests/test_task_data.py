"""The task's rows on disk: the same as one by one in memory, prepared once for the same content, or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest

from holdfast.data import prepare, task
from holdfast.data.encoder import Encoder
from holdfast.data.mix import Mix
from holdfast.data.rendered import Rendered
from holdfast.data.rows import read_rows
from holdfast.data.task import read_task
from holdfast.data.tokens import tokenize
from holdfast.engine.pack import WEIGHT
from holdfast.errors import DataError
from holdfast.recipe import recipe_from
from tokenizers_made import MADE

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def tokenizer_of(name: str):
    tokenizer = MADE[name]()
    tokenizer.chat_template = CHATML
    return tokenizer


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def talk(n: int) -> dict:
    turns = [{"role": "user", "content": f"Where is {n} \u00fc"}, {"role": "assistant", "content": f" billing {n}\n"}]
    return {"messages": turns * (1 + n % 3)}


def data_of(path: Path, tokenizer, longest: int = 4096, **data):
    recipe = recipe_from({"model": {"model_name_or_path": "x"}, "data": {"train": str(path), **data}})
    return read_task(recipe, tokenizer, path.parent, longest)


@pytest.mark.parametrize("name", [n for n in MADE if "word" not in n])
def test_rows_on_disk_are_the_rows_one_by_one(name, tmp_path, monkeypatch):
    """Text and tokens, over batches that end inside the file."""
    monkeypatch.setattr(prepare, "BATCH", 7)
    tokenizer = tokenizer_of(name)
    path = write(tmp_path / "t.jsonl", [talk(n) for n in range(40)])
    found = data_of(path, tokenizer, validation_size=4, max_length=400)
    rows = {r.where: r for r in read_rows(path, base_dir=tmp_path, tokenizer=tokenizer, notes=[])}
    assert len(found.train) == len(found.token_rows) == 36 and len(found.validation) == 4
    for row, made in zip(found.train, found.token_rows, strict=True):
        plain = rows[row.where]
        assert (row.prompt, row.completion) == (plain.prompt, plain.completion)
        assert isinstance(row.prompt, Rendered) and found.place(made) == row.where
        alone = tokenize(plain, tokenizer, None)
        assert made.key == alone.key and made.ids.dtype == alone.ids.dtype and made.scored.dtype == alone.scored.dtype


@pytest.mark.parametrize("name", list(MADE))
def test_beginnings_are_tokenised_as_they_would_be_alone(name):
    """`heads` takes tokens of the whole up to the last special token; a beginning alone has the same."""
    encoder = Encoder(tokenizer_of(name))
    texts = [
        "<|im_start|>user\nhi  <|im_end|>\n<|im_start|>assistant\nYes, it is.<|im_end|>\n",
        "<|im_start|>user\n<|im_start|><|im_end|> <|im_end|>\n\n\n<|im_start|>assistant\n 12<|im_end|>",
        "no marks at all, http://example.org",
        "<s><|im_start|>a <|im_en d|> </s><|im_end|>",
        "\u00fc\u4f60<|im_end|>\u00fc\u4f60",
    ]
    for text in texts:
        begins = [text[:n] for n in range(len(text) + 1)]
        whole = encoder.bare([text])[0]
        assert encoder.heads(begins, [whole] * len(begins)) == [encoder.bare([b])[0] if b else [] for b in begins]
    assert bool(encoder._marks) == ("word" not in name and "letters" not in name)


def test_a_second_start_reads_nothing(tmp_path, monkeypatch):
    tokenizer = tokenizer_of("bytes")
    path = write(tmp_path / "t.jsonl", [talk(n) for n in range(40)])
    first = data_of(path, tokenizer)
    monkeypatch.setattr(task, "prepare", None)
    again = data_of(path, tokenizer)
    assert [r.key for r in again.token_rows] == [r.key for r in first.token_rows]
    assert (again.validation, again.test, again.note, again.key) == (
        first.validation,
        first.test,
        first.note,
        first.key,
    )


CHANGES = {
    "content": lambda t, p: write(p, [talk(n) for n in range(1, 41)]),
    "template": lambda t, p: setattr(t, "chat_template", CHATML.replace("\n", " ")),
    "tokenizer": lambda t, p: t.add_tokens(["billing"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_the_rows_makes_them_anew(change, tmp_path, monkeypatch):
    tokenizer = tokenizer_of("bytes")
    path = write(tmp_path / "t.jsonl", [talk(n) for n in range(40)])
    data_of(path, tokenizer)
    CHANGES[change](tokenizer, path)
    monkeypatch.setattr(task, "prepare", None)
    with pytest.raises(TypeError):
        data_of(path, tokenizer)


def test_settings_make_them_anew_and_the_name_of_the_task_does_not(tmp_path, monkeypatch):
    tokenizer, path = tokenizer_of("bytes"), write(tmp_path / "t.jsonl", [talk(n) for n in range(40)])
    data_of(path, tokenizer)
    monkeypatch.setattr(task, "prepare", None)
    assert data_of(path, tokenizer, name="other").name == "other"
    for changed in ({"max_length": 512}, {"train_on": "last"}, {"train_size": 5}, {"longest": 256}):
        with pytest.raises(TypeError):
            data_of(path, tokenizer, **changed)


def test_a_fault_leaves_nothing_behind(tmp_path, home):
    path = write(tmp_path / "t.jsonl", [talk(n) for n in range(40)])
    path.write_text(path.read_text() + "{\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"t\.jsonl:41: not valid JSON"):
        data_of(path, tokenizer_of("bytes"))
    assert list((home / "rows").iterdir()) == []


def test_old_rows_go(tmp_path, home, monkeypatch):
    monkeypatch.setattr(task, "MOST_KEPT", 2)
    path = write(tmp_path / "t.jsonl", [talk(n) for n in range(40)])
    for seed in (100, 101, 102):
        data_of(path, tokenizer_of("bytes"), max_length=seed)
    assert len(list((home / "rows").iterdir())) == 2


def test_measured_rows_are_drawn(tmp_path):
    tokenizer = tokenizer_of("bytes")
    train = write(tmp_path / "t.jsonl", [talk(n) for n in range(60)])
    test = write(tmp_path / "test.jsonl", [talk(n) for n in range(100, 130)])
    found = data_of(train, tokenizer, test=str(test), test_size=10)
    assert (len(found.test), len(found.validation), len(found.train)) == (10, 6, 54)
    assert "10 of 30 test rows are drawn (data.test_size)" in found.note
    assert len(data_of(train, tokenizer, test=str(test), test_size=None).test) == 30
    assert len(data_of(train, tokenizer, test_size=3).train) == 57  # no more than are measured are cut off


def test_an_empty_prompt_makes_documents_of_rows_with_more_columns(tmp_path):
    """As a column `text` alone does, to the token; without it the columns are refused, with the way out."""
    tokenizer, texts = tokenizer_of("bytes"), [f"Once {n} upon a time. " * 20 for n in range(20)]
    plain = write(tmp_path / "plain.jsonl", [{"text": text} for text in texts])
    more = write(tmp_path / "more.jsonl", [{"text": text, "dump": "CC", "token_count": 9} for text in texts])
    settings = {"max_length": 50, "validation_size": 3}
    one = data_of(plain, tokenizer, **settings)
    two = data_of(more, tokenizer, prompt="", completion="{text}", **settings)
    assert two.metric == one.metric == "loss_per_byte" and len(two.token_rows) == len(one.token_rows) > 17
    assert [row.key for row in two.token_rows] == [row.key for row in one.token_rows]
    assert [row.completion for row in two.test] == [row.completion for row in one.test]
    with pytest.raises(DataError, match="fit no schema") as told:
        data_of(more, tokenizer, **settings)
    assert "data.prompt: '' and data.completion: '{text}'" in told.value.cure


def test_the_first_rows_that_are_measured_are_of_all_kinds(tmp_path):
    """A file that is sorted by its label: what chooses weights or a rate looks at the first rows alone."""
    tokenizer = tokenizer_of("bytes")
    train, test = ([{"prompt": f"Say {n}.", "completion": "ab"[2 * n // count]} for n in range(count)]
                   for count in (120, 100))  # fmt: skip
    paths = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("t", train), ("test", test))]
    found = data_of(paths[0], tokenizer, test=str(paths[1]), validation=str(paths[1]), test_size=None)
    for rows in (found.test, found.validation):
        assert len(rows) == 100 and {row.completion for row in rows[:20]} == {"a", "b"}
    again = data_of(paths[0], tokenizer, test=str(paths[1]), validation=str(paths[1]), test_size=None)
    assert [row.where for row in again.test] == [row.where for row in found.test]
    texts = write(tmp_path / "d.jsonl", [{"text": f"Once {n} upon a time. " * 40} for n in range(4)])
    parts = data_of(paths[0], tokenizer, longest=100, test=str(texts), metric="loss").test
    assert len(parts) > 20 and len({row.where.split(" ")[0] for row in parts[:6]}) > 1


def test_long_rows_of_training_alone_are_counted(tmp_path):
    tokenizer = tokenizer_of("bytes")
    long = {"prompt": "x " * 300, "completion": "y"}
    rows = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(30)]
    test = write(tmp_path / "test.jsonl", [*rows[:3], long])
    found = data_of(write(tmp_path / "t.jsonl", [*rows, long]), tokenizer, max_length=100, test=str(test))
    assert len(found.train) <= 27 + 3 and all(len(r.ids) <= 100 for r in found.token_rows)
    assert "1 of 4 test rows are longer than 100 tokens, left out" in found.note
    kept = data_of(tmp_path / "t.jsonl", tokenizer, max_length=100, test=str(test), too_long="truncate")
    assert len(kept.test) == 4 and all(len(r.ids) <= 100 for r in kept.token_rows)


def test_a_length_that_the_model_does_not_read_is_said(tmp_path):
    path = write(tmp_path / "t.jsonl", [talk(n) for n in range(40)])
    found = data_of(path, tokenizer_of("bytes"), longest=90, max_length=200)
    assert "data.max_length is 200, and the model reads 90 tokens at most" in found.note
    assert "the model reads" not in data_of(path, tokenizer_of("bytes"), longest=90).note  # nobody asked for more
    with pytest.raises(DataError, match=r"data.stride is 100, but the model reads 90"):
        data_of(path, tokenizer_of("bytes"), longest=90, max_length=200, stride=100, too_long="split")


def test_the_labels_of_conversations_have_names_without_their_end(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "ab"[n % 2]}]}
            for n in range(40)]  # fmt: skip
    found = data_of(write(tmp_path / "t.jsonl", rows), tokenizer_of("bytes"))
    assert sorted(found.names) == ["a", "b"] and all(len(label) > 1 for label in found.labels)


def test_a_drawn_training_set_is_tokenised_alone(tmp_path):
    tokenizer, path = tokenizer_of("bytes"), write(tmp_path / "t.jsonl", [talk(n) for n in range(40)])
    found = data_of(path, tokenizer, train_size=5, validation_size=4)
    assert len(found.train) == len(found.token_rows) == 5
    assert [found.place(r) for r in found.token_rows] == [r.where for r in found.train]


def test_a_drawn_conversation_is_trained_on_in_all_its_answers(tmp_path):
    """With a training set that is drawn first and tokenised then, as without."""
    tokenizer, path = tokenizer_of("bytes"), write(tmp_path / "t.jsonl", [talk(n) for n in range(40)])
    whole = {r.where: t for r, t in zip(*_both(data_of(path, tokenizer, validation_size=4)), strict=True)}
    drawn = data_of(path, tokenizer, validation_size=4, train_size=20)
    assert max(len(r.turns) for r in drawn.train) == 3
    assert all(row.key == whole[text.where].key for text, row in zip(*_both(drawn), strict=True))


def _both(found):
    return found.train, found.token_rows


def weighted(n: int) -> dict:
    turns = talk(2)["messages"]
    return {"messages": [{**turn, "weight": 0.5 * i + n / 100} for i, turn in enumerate(turns)]}


def test_weights_of_messages_are_kept(tmp_path, monkeypatch):
    """Written, found again, drawn, cut and split: each target has the weight of its answer."""
    tokenizer = tokenizer_of("bytes")
    path = write(tmp_path / "t.jsonl", [weighted(n) if n % 2 else talk(n) for n in range(20)])
    rows = {r.where: r for r in read_rows(path, base_dir=tmp_path, tokenizer=tokenizer, notes=[])}
    wanted = {where: tokenize(row, tokenizer, None) for where, row in rows.items()}
    for settings in ({}, {}, {"train_size": 8}):  # made, found, drawn
        found = data_of(path, tokenizer, validation_size=4, **settings)
        for row, made in zip(*_both(found), strict=True):
            same = wanted[row.where]
            assert made.key == same.key and made.numbers.keys() == same.numbers.keys()
            assert all(np.array_equal(made.numbers[n], same.numbers[n]) for n in same.numbers)
    assert sum(bool(r.numbers) for r in wanted.values()) == 10
    for how in ("truncate", "split"):
        cut = data_of(path, tokenizer, validation_size=4, max_length=90, too_long=how)
        parts = [r for r in cut.token_rows if r.numbers]
        assert len(parts) >= 8 and all(len(r.ids) <= 90 for r in parts)
        for part in parts:
            weights = {(w, i) for r in wanted.values() if r.numbers for w, i in _targets(r)}
            assert set(_targets(part)) <= weights


def _targets(row):
    """(weight, token) of each target."""
    return list(zip(row.numbers[WEIGHT][row.scored].tolist(), row.ids[row.scored].tolist(), strict=True))


def test_other_weights_are_other_data(tmp_path):
    tokenizer = tokenizer_of("bytes")
    keys = set()
    for weight in (1, 0.5, 0):
        rows = [talk(2) for _ in range(20)]
        rows[3]["messages"] = [{**m, "weight": weight} for m in rows[3]["messages"][:2]] + rows[3]["messages"][2:]
        keys.add(data_of(write(tmp_path / "t.jsonl", rows), tokenizer, validation="t.jsonl").key)
    assert len(keys) == 3


def test_the_mix_reads_rows_in_the_order_it_did(tmp_path):
    """From disk as from a list."""
    rows = data_of(write(tmp_path / "t.jsonl", [talk(n) for n in range(40)]), tokenizer_of("bytes")).token_rows
    lazy, plain = Mix(rows).draw(3), Mix(list(rows)).draw(3)
    assert [next(lazy).key for _ in range(90)] == [next(plain).key for _ in range(90)]
