"""Task data: every schema and file kind read right, every bad row refused by file and line."""

import json
from pathlib import Path

import pytest

from holdfast.data import readers
from holdfast.data.rows import Row, cap, check_labels, labels_of, leaks, read_rows, split
from holdfast.errors import DataError
from holdfast.recipe import Source

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """A real tokenizer of four words; only its chat template matters here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["a", "b", "c", "[UNK]"])}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")))
    made.chat_template = CHATML
    return made


def write(folder: Path, name: str, content: object) -> str:
    """Lists become JSON lines; text and bytes are written as they are."""
    if isinstance(content, list):
        content = "".join(json.dumps(value) + "\n" for value in content)
    (folder / name).write_bytes(content if isinstance(content, bytes) else str(content).encode())
    return name


def read(folder: Path, name: str, content: object, **options) -> list[Row]:
    options.setdefault("notes", [])  # without a list, what is noted becomes a warning, and warnings are errors here
    return read_rows(write(folder, name, content), base_dir=folder, **options)


def pairs(found: list[Row]) -> list[tuple[str, str]]:
    return [(row.prompt, row.completion) for row in found]


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
ASKED, ANSWERED = "<user>hi</s>\n<assistant>", "yo</s>\n"
SYSTEM = {"role": "system", "content": "be brief"}

GOOD = {  # name: (first row, the pair)
    "text": ({"text": "once", "id": 3}, ("", "once")),
    "strings": ({"prompt": "2+2=", "completion": " 4", "level": 1}, ("2+2=", " 4")),
    "message lists": ({"prompt": [USER], "completion": [ANSWER]}, (ASKED, ANSWERED)),
    "messages": ({"messages": [USER, ANSWER]}, (ASKED, ANSWERED)),
    "messages with nulls": ({"messages": [USER, ANSWER | {"tool_calls": None}]}, (ASKED, ANSWERED)),
    "two turns": (
        {"messages": [USER, ANSWER, USER, ANSWER]},
        ("<user>hi</s>\n<assistant>yo</s>\n" + ASKED, ANSWERED),
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "be brief"},
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "yo"},
            ]
        },
        ("<system>be brief</s>\n" + ASKED, ANSWERED),
    ),
    "alpaca": ({"instruction": "hi", "input": "", "output": "yo"}, (ASKED, ANSWERED)),
    "alpaca input": (
        {"instruction": "add", "input": "1 2", "output": "3"},
        ("<user>add\n1 2</s>\n<assistant>", "3</s>\n"),
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_each_schema_is_detected(name, tmp_path, tokenizer):
    row, pair = GOOD[name]
    (found,) = read(tmp_path, "train.jsonl", [row], tokenizer=tokenizer)
    assert (found.prompt, found.completion) == pair
    assert (found.source, found.where) == ("task", "train.jsonl:1")


def test_alpaca_without_a_chat_template(tmp_path):
    row = {"instruction": "add", "input": "1 2", "output": "3"}
    (found,) = read(tmp_path, "a.jsonl", [row])
    assert found.prompt == "### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n" and found.completion == "3"


KINDS = {  # each holds the same two rows; the lines differ
    "a.jsonl": ('{"t": "x\u2028y", "q": 1}\n\n{"t": "b", "q": 2}\n', ["a.jsonl:1", "a.jsonl:3"]),
    "a.json": ('[\n{"t": "x\u2028y",\n "q": 1},\n{"t": "b", "q": 2}\n]', ["a.json:2", "a.json:4"]),
    "b.json": (
        '{"version": {"a": [1]},\n"data": [{"t": "x\u2028y", "q": 1},\n{"t": "b", "q": 2}], "n": 2}',
        ["b.json:2", "b.json:3"],
    ),
    "a.csv": ("\ufefft,q\nx\u2028y,1\n\nb,2\n", ["a.csv:2", "a.csv:4"]),
    "a.tsv": ('t\tq\n"x\u2028y"\t1\nb\t2\n', ["a.tsv:2", "a.tsv:3"]),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_file_kind_is_read_with_its_lines(name, tmp_path):
    text, places = KINDS[name]
    found = read(tmp_path, name, text, prompt="{t} ->", completion=" {q}", source="mine")
    assert pairs(found) == [("x\u2028y ->", " 1"), ("b ->", " 2")]
    assert [row.where for row in found] == places and found[0].source == "mine"


def test_csv_cell_over_two_lines_keeps_the_first_line(tmp_path):
    found = read(tmp_path, "a.csv", 't,q\n"x\ny",1\nb,2\n', prompt="{t}", completion="{q}")
    assert pairs(found) == [("x\ny", "1"), ("b", "2")]
    assert [row.where for row in found] == ["a.csv:2", "a.csv:4"]


def test_a_csv_cell_may_be_a_document(tmp_path):
    """Longer than csv takes unless it is told; and a quote that is never closed is told by where its row begins."""
    text = "word " * 40_000
    (row,) = read(tmp_path, "a.csv", f't,q\n"{text}",1\n', prompt="{q}", completion="{t}")
    assert row.completion == text
    for breaks in ("\n", "\r\n", "\r"):
        lines = ["t,q", "a,1", '"b', 'c",2', '"d,3', *["e,4"] * 9]
        with pytest.raises(DataError, match=r"a\.csv:5: not valid CSV"):
            read(tmp_path, "a.csv", breaks.join(lines), prompt="{t}", completion="{q}")


def test_a_csv_is_read_row_by_row(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"t,q\r\na,1\r\nb,2\r\n\xff,3\r\n")
    records = iter(readers.records_of(Source(path="a.csv"), tmp_path)[0])
    assert [next(records), next(records)] == [("a.csv:2", {"t": "a", "q": "1"}), ("a.csv:3", {"t": "b", "q": "2"})]
    with pytest.raises(DataError, match=r"a\.csv:4: not UTF-8 text"):
        next(records)


def test_parquet(tmp_path, tokenizer):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([{"messages": [SYSTEM, USER, ANSWER]}, {"messages": [USER, ANSWER]}])
    parquet.write_table(table, tmp_path / "a.parquet")
    found = read_rows("a.parquet", base_dir=tmp_path, tokenizer=tokenizer)
    assert pairs(found)[1] == (ASKED, ANSWERED) and found[1].where == "a.parquet:2"
    with pytest.raises(DataError, match=r"b\.parquet: not valid parquet"):
        read(tmp_path, "b.parquet", "no")


def test_templates_take_numbers_odd_names_and_braces(tmp_path):
    row = {"Ticket text": "a{b}", "0": 1.5, "yes": True, "note": ""}
    (found,) = read(tmp_path, "a.jsonl", [row], prompt="{{{Ticket text}}}{note} {0}", completion="{yes}")
    assert (found.prompt, found.completion) == ("{a{b}} 1.5", "true")


SPELLINGS = ["1e3", "1.0", "1.10", "-0", "-0.0", "1E+2", "0.30000000000000004", "7", "123456789012345678901", "true"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_number_is_written_as_in_the_file(name, tmp_path):
    lines = [f'{{"t": "a", "n": {spelling}}}' for spelling in SPELLINGS]
    text = "\n".join(lines) if name == "a.jsonl" else "[" + ",\n".join(lines) + "]"
    found = read(tmp_path, name, text, prompt="{t} {n}", completion=" {n}")
    assert [row.completion for row in found] == [f" {spelling}" for spelling in SPELLINGS]
    assert found[0].prompt == "a 1e3"


def test_numbers_and_truths_of_tables_are_noted(tmp_path):
    import pyarrow
    from pyarrow import parquet

    notes: list[str] = []
    rows = [{"t": "a", "x": 1.0, "yes": True, "n": 3}, {"t": "b", "x": 2.5, "yes": False, "n": 4}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    asked = {"prompt": "{t} {n}", "completion": "{x} {yes}", "base_dir": tmp_path}
    assert pairs(read_rows("a.parquet", **asked, notes=notes)) == [("a 3", "1.0 true"), ("b 4", "2.5 false")]
    assert notes == [
        "column 'x' holds binary numbers, written in Python's way (2 times, first a.parquet:1: 1.0)",
        "column 'yes' holds true or false, written so, in small letters (2 times, first a.parquet:1)",
    ]
    for bad, word in ((float("inf"), "holds inf"), (float("-inf"), "holds -inf"), (float("nan"), "has no value")):
        parquet.write_table(pyarrow.Table.from_pylist([*rows, rows[0] | {"x": bad}]), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=rf"a\.parquet:3: column 'x' {word}"):
            read_rows("a.parquet", **asked)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
@pytest.mark.parametrize("word", ["Infinity", "-Infinity", "NaN", "1e999"])
def test_what_is_no_number_is_refused_by_line_and_column(name, word, tmp_path):
    lines = ['{"text": "a", "queue": 1}', f'{{"text": "b", "queue": {word}}}']
    text = "\n".join(lines) if name == "t.jsonl" else "[" + ",\n".join(lines) + "]"
    told = "has no value" if word == "NaN" else f"holds {word}, which is not a finite number"
    with pytest.raises(DataError, match=rf"{name}:2: column 'queue' {told}"):
        read(tmp_path, name, text, **TEMPLATES)
    assert read(tmp_path, name, text, prompt="{text}", completion="{text}")  # a column that nobody reads may hold it


def test_inf_in_csv_is_text(tmp_path):
    assert pairs(read(tmp_path, "a.csv", "text,queue\na,inf\n", **TEMPLATES)) == [("a\nQueue:", " inf")]


def test_a_key_given_twice_is_refused(tmp_path):
    for name, text, line in (
        ("t.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', 2),
        ("t.json", '[{"text": "a"},\n\n{"text": "b", "text": "c"}]', 3),
        ("t.jsonl", '{"text": "a", "meta": {"text": 1, "text": 1}}', 1),
        ("t.json", '{"text": [], "text": [{"text": "a"}]}', 1),
    ):
        with pytest.raises(DataError, match=rf"{name}:{line}: the key 'text' is given twice"):
            read(tmp_path, name, text)


def test_blanks_around_a_column_name_are_named(tmp_path):
    with pytest.raises(DataError, match=r"(?s)no column 'queue'.*The column is called ' queue', with its blanks"):
        read(tmp_path, "t.csv", "text, queue\na,b\n", **TEMPLATES)


@pytest.mark.parametrize("answer", ["\u200b", "\ufeff", "\u00a0\u200d", "\u200e \n"])
def test_an_answer_that_nobody_sees_is_empty(answer, tmp_path):
    rows = [{"prompt": "q", "completion": "\u200bok"}, {"prompt": "q", "completion": answer}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"t\.jsonl:2: the completion is empty but for '.*', which nobody sees"):
        read_rows("t.jsonl", base_dir=tmp_path)


def test_a_blank_alpaca_input_is_none(tmp_path):
    rows = [{"instruction": "Add.", "input": given, "output": "2"} for given in ("", " ", "\n", None)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert {r.prompt for r in read_rows("t.jsonl", base_dir=tmp_path)} == {"### Instruction:\nAdd.\n\n### Response:\n"}


def test_odd_characters_of_an_answer_are_noted(tmp_path):
    notes: list[str] = []
    row = {"text": "caf\ufffd", "queue": "a\r\nb"}
    assert read(tmp_path, "t.jsonl", [row, {"text": "x\r\ny", "queue": "z"}], notes=notes, **TEMPLATES)
    assert [note.split(",")[0] for note in notes] == [
        "1 text with U+FFFD",
        "1 answer with a carriage return (a line break of Windows)",
    ]


def test_without_a_list_the_notes_are_a_warning(tmp_path):
    name = write(tmp_path, "t.jsonl", [FINE | {"level": 1}, FINE, FINE | {"level": 2}])
    with pytest.warns(UserWarning, match=r"t\.jsonl: column 'level' is not used \(2 rows, first t\.jsonl:1\)"):
        read_rows(name, base_dir=tmp_path)


TEMPLATES = {"prompt": "{text}\nQueue:", "completion": " {queue}"}
BAD_TEMPLATED = {  # the second row is bad
    "missing": (
        {"text": "b", "queu": "y"},
        ["t.jsonl:2", "no column 'queue'", "text, queu", "'queu'"],
    ),
    "null": ({"text": None, "queue": "y"}, ["t.jsonl:2", "'text' has no value"]),
    "nan": ({"text": float("nan"), "queue": "y"}, ["t.jsonl:2", "'text' has no value"]),
    "list": ({"text": ["b"], "queue": "y"}, ["t.jsonl:2", "'text' holds a list"]),
    "object": ({"text": {"b": 1}, "queue": "y"}, ["t.jsonl:2", "'text' holds an object"]),
    "empty prompt": ({"text": " ", "queue": "y"}, ["t.jsonl:2", "the prompt is empty"]),
    "empty completion": ({"text": "b", "queue": ""}, ["t.jsonl:2", "the completion is empty"]),
    "half a character": ({"text": "b\ud800", "queue": "y"}, ["t.jsonl:2", "half a character"]),
    "nul": ({"text": "b\0c", "queue": "y"}, ["t.jsonl:2", "a NUL character"]),
}


@pytest.mark.parametrize("name", BAD_TEMPLATED)
def test_a_row_that_does_not_fit_the_templates_is_refused(name, tmp_path):
    row, fragments = BAD_TEMPLATED[name]
    with pytest.raises(DataError) as caught:
        read(tmp_path, "t.jsonl", [{"text": "a", "queue": "x"}, row], **TEMPLATES)
    for fragment in fragments:
        assert fragment in str(caught.value)


FINE = {"prompt": "a", "completion": "b"}
DOG = {"from": "dog", "value": "woof"}
BAD = {  # name: (file, content, fragments)
    "broken json": (
        "t.jsonl",
        '{"text": "a"}\n{"text": \n',
        ["t.jsonl:2: not valid JSON (Expecting value at column"],
    ),
    "not an object": ("t.jsonl", '{"text": "a"}\n3\n', ["t.jsonl:2: a number, not an object"]),
    "not utf-8": ("t.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ["t.jsonl:2: not UTF-8"]),
    "utf-16": ("t.jsonl", '{"text": "a"}'.encode("utf-16"), ["t.jsonl:1: UTF-16 text", "Save the file as UTF-8"]),
    "long number": ("t.jsonl", '{"text": "a"}\n{"text": ' + "1" * 5000 + "}", ["t.jsonl:2: a number of 5000 digits"]),
    "too deep": ("t.jsonl", "[" * 100000, ["t.jsonl:1: not valid JSON"]),
    "empty": ("t.jsonl", "\n", ["t.jsonl: holds no rows"]),
    "empty csv": ("t.csv", "a,b\n", ["t.csv: holds no rows"]),
    "empty json": ("t.json", "", ["t.json: holds no rows"]),
    "json lines as json": (
        "t.json",
        '{"text": "a"}\n{"text": "b"}',
        ["t.json:2: not valid JSON", "name the file .jsonl"],
    ),
    "json row": ("t.json", '[{"text": "a"},\n\n"b"]', ["t.json:3: text, not an object"]),
    "json two lists": ("t.json", '{"a": [], "b": []}', ["t.json:1: lists under a, b"]),
    "json no list": ("t.json", '{"a": 1}', ["t.json:1: no list"]),
    "json number": ("t.json", "7", ["t.json:1: no list"]),
    "csv cells": ("t.csv", "text\na\nb,c\n", ["t.csv:3: 2 cells under 1 columns"]),
    "csv quote": ("t.csv", 'text\n"a"b\n', ["t.csv:2: not valid CSV"]),
    "csv header": ("t.csv", "a,a\n1,2\n", ["t.csv:1: a column name is empty or given twice"]),
    "kind": ("t.xlsx", "x", ["kind .xlsx cannot be read", ".parquet"]),
    "preference": (
        "t.jsonl",
        [{"prompt": "a", "chosen": "b", "rejected": "c"}],
        ["t.jsonl:1: preference data", "prompt and completion"],
    ),
    "unpaired preference": ("t.jsonl", [FINE | {"label": True}], ["preference data"]),
    "unknown": (
        "t.jsonl",
        [{"question": "a", "answer": "b"}],
        ["question, answer fit no schema", "alpaca (instr"],
    ),
    "text and label": ("t.jsonl", [{"text": "a", "label": 1}], ["text, label fit no schema", "data.prompt: '' and"]),
    "ambiguous": ("t.jsonl", [FINE | {"messages": []}], ["prompt/completion and messages"]),
    "later row": (
        "t.jsonl",
        [FINE, {"prompt": "a", "completions": "b"}],
        ["t.jsonl:2: no column 'completion'", "'compl"],
    ),
    "empty side": (
        "t.jsonl",
        [FINE, {"prompt": "a", "completion": " "}],
        ["t.jsonl:2: column 'completion' is empty"],
    ),
    "number": (
        "t.jsonl",
        [FINE, {"prompt": "a", "completion": 4}],
        ["t.jsonl:2: column 'completion' holds a number"],
    ),
    "mixed": (
        "t.jsonl",
        [FINE, {"prompt": [USER], "completion": "b"}],
        ["t.jsonl:2: column 'prompt' holds a list"],
    ),
    "no answer": ("t.jsonl", [{"messages": [USER]}], ["t.jsonl:1: the messages do not end with an answer"]),
    "only answer": (
        "t.jsonl",
        [{"messages": [ANSWER]}],
        ["t.jsonl:1: the messages do not end with an answer"],
    ),
    "no messages": ("t.jsonl", [{"messages": "hi"}], ["t.jsonl:1: messages is not a list"]),
    "role": (
        "t.jsonl",
        [{"messages": [USER | {"role": "boss"}, ANSWER]}],
        ["t.jsonl:1: messages has the role 'boss'"],
    ),
    "image": (
        "t.jsonl",
        [{"messages": [USER | {"content": [{}]}, ANSWER]}],
        ["content is a list", "Only text"],
    ),
    "empty answer": ("t.jsonl", [{"messages": [USER, ANSWER | {"content": None}]}], ["content is null"]),
    "blank answer": (
        "t.jsonl",
        [{"messages": [USER, ANSWER | {"content": " \n"}]}],
        ["the answer, message 2", "empty"],
    ),
    "answer of the user": (
        "t.jsonl",
        [{"prompt": [USER], "completion": [USER]}],
        ["t.jsonl:1: the completion is not"],
    ),
    "two answers": (
        "t.jsonl",
        [{"prompt": [USER], "completion": [ANSWER, USER, ANSWER]}],
        ["t.jsonl:1: the completion is not one message of the assistant"],
    ),
    "two parts": (
        "t.jsonl",
        [{"messages": [USER | {"content": [{"type": "text", "text": "a"}] * 2}, ANSWER]}],
        ["content is a list", "Write the parts as one text"],
    ),
    "tools beside text": ("t.jsonl", [FINE | {"tools": [{}]}], ["t.jsonl:1: column 'tools' is filled"]),
    "system beside text": ("t.jsonl", [FINE | {"system": "x"}], ["t.jsonl:1: column 'system' is filled"]),
    "weight of a row": ("t.jsonl", [FINE | {"weight": 1}, FINE | {"weight": 0.5}], ["t.jsonl:2: column 'weight'"]),
    "images": ("t.jsonl", [{"messages": [USER, ANSWER], "images": ["a"]}], ["column 'images' is filled"]),
    "speaker of no name": ("t.jsonl", [{"conversations": [{"from": []}]}], ["unknown speaker []"]),
    "speaker": ("t.jsonl", [{"conversations": [DOG]}], ["t.jsonl:1: unknown speaker 'dog'", "human"]),
    "history": (
        "t.jsonl",
        [{"instruction": "a", "output": "b", "history": [["c", "d"]]}],
        ["'history' is filled"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused_by_place(name, tmp_path, tokenizer):
    file, content, fragments = BAD[name]
    with pytest.raises(DataError) as caught:
        read(tmp_path, file, content, tokenizer=tokenizer)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_chat_data_needs_a_chat_template_that_only_appends(tmp_path, tokenizer):
    data = [{"messages": [USER, ANSWER]}]
    with pytest.raises(DataError, match=r"(?s)t\.jsonl:1: chat data.*no chat template.*data\.prompt"):
        read(tmp_path, "t.jsonl", data)
    templates = {
        "{{ messages | length }}{% if add_generation_prompt %}:{% endif %}": "renders the prompt differently",
        "{{ raise_exception('roles must alternate') }}": "refuses the row .roles must alternate",
    }
    try:
        for template, message in templates.items():
            tokenizer.chat_template = template
            with pytest.raises(DataError, match=rf"t\.jsonl:1: .*{message}"):
                read(tmp_path, "t.jsonl", data, tokenizer=tokenizer)
    finally:
        tokenizer.chat_template = CHATML


def test_one_template_alone_is_refused(tmp_path):
    with pytest.raises(DataError, match="Give both"):
        read(tmp_path, "t.jsonl", [FINE], prompt="{prompt}")


def test_a_missing_file_names_the_places_and_a_near_miss(tmp_path):
    write(tmp_path, "train.jsonl", [FINE])
    with pytest.raises(DataError) as caught:
        read_rows("trian.jsonl", base_dir=tmp_path)
    assert "trian.jsonl: no such file" in str(caught.value) and "'train.jsonl'" in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        read_rows("./no/where/at/all", base_dir=tmp_path)


def test_settings_of_the_hub_mean_nothing_for_a_file(tmp_path):
    name = write(tmp_path, "t.jsonl", [FINE])
    with pytest.raises(DataError, match=r"(?s)split 'test' has no meaning.*Remove split"):
        read_rows({"path": name, "split": "test"}, base_dir=tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("Once upon a time.", encoding="utf-8")
    with pytest.raises(DataError, match=r"(?s)a folder of texts, and revision 'main' has no meaning.*Remove revision"):
        read_rows({"path": "texts", "revision": "main"}, base_dir=tmp_path)


def test_shipped_data_stays_inside_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "DATA_DIR", tmp_path / "data")
    (tmp_path / "data" / "tickets").mkdir(parents=True)
    write(tmp_path / "data" / "tickets", "train.jsonl", [FINE])
    write(tmp_path, "secret.jsonl", [FINE])
    (row,) = read_rows("holdfast:tickets/train.jsonl", base_dir=".")
    assert (row.prompt, row.completion) == ("a", "b")
    for name in ("../secret.jsonl", "tickets/trian.jsonl", "tickets"):
        with pytest.raises(DataError, match="does not come with the package"):
            read_rows(f"holdfast:{name}", base_dir=".")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The real loader, offline, with a cache of its own."""
    import datasets

    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return tmp_path


def test_a_hub_set_that_cannot_be_reached(hub):
    with pytest.raises(DataError, match=r"(?s)nobody/nothing: the hub data set.*cannot be read.*HF_TOKEN"):
        read_rows("nobody/nothing", base_dir=hub)


def test_a_folder_is_read_by_split(hub):
    (hub / "mine").mkdir()
    write(hub / "mine", "train.jsonl", [FINE, FINE])
    write(hub / "mine", "test.jsonl", [{"prompt": "c", "completion": "d"}])
    found = read_rows(Source(path="mine", split="test"), base_dir=hub)
    assert found == [Row("c", "d", "task", "mine[test]:1")]
    with pytest.raises(DataError, match=r"has the splits train, test.*\n.*split: \.\.\."):
        read_rows("mine", base_dir=hub)
    with pytest.raises(DataError, match="cannot be read"):
        read_rows({"path": "mine", "split": "tset"}, base_dir=hub)


def some(count: int, labels: int = 2) -> list[Row]:
    return [Row(f"p{i}", f"l{i % labels}", where=f"t:{i}") for i in range(count)]


@pytest.mark.parametrize(("size", "cut"), [(0.1, 10), (0.001, 1), (25, 25), (25.0, 25), (0, 0)])
def test_split_cuts_what_was_asked(size, cut):
    rest, part = split(some(100), size, seed=3)
    assert len(part) == cut and sorted(rest + part) == list(range(100))
    assert (rest, part) == split(some(100), size, seed=3)


def test_split_depends_on_the_seed_and_keeps_order():
    (_, one), (_, two) = split(some(100), 10, seed=1), split(some(100), 10, seed=2)
    assert one != two and one == sorted(one)


def test_split_never_puts_a_duplicate_on_both_sides():
    data = [Row(f"p{i % 7}", "x") for i in range(70)]
    for seed in range(20):
        rest, cut = split(data, 0.3, seed)
        assert len(cut) == 20 and not {data[n].prompt for n in rest} & {data[n].prompt for n in cut}


def test_split_refuses_to_empty_a_side():
    for data, size in ((some(5), 5), (some(1), 0.5), ([Row("p", "x")] * 10, 3)):
        with pytest.raises(DataError, match="leave rows on both sides"):
            split(data, size, 0)


def test_cap_is_a_stable_sample():
    assert cap(some(50), 30, 7)[:10] == cap(some(50), 10, 7) != some(50)[:10]
    assert cap(some(5), None, 7) == some(5) and len(cap(some(5), 99, 7)) == 5


def test_labels_are_found_or_the_task_is_free_form():
    assert labels_of(some(6)) == ("l0", "l1")
    assert labels_of(some(5)) is None and labels_of([]) is None
    assert labels_of(some(300, 51)) is None and labels_of(some(300, 51), most=51) is not None


def test_an_unseen_label_is_refused_by_place():
    check_labels((" refund", " other"), [Row("p", " refund")])
    check_labels(None, [Row("p", "anything")])
    with pytest.raises(DataError) as caught:
        check_labels((" refund", " other"), [Row("p", " refund"), Row("q", " refnd", where="test.csv:9")])
    message = str(caught.value)
    assert "test.csv:9: the label ' refnd'" in message and "Did you mean ' refund'" in message
    assert "Known: ' refund', ' other'." in message


def test_leaks_counts_test_rows_seen_in_training():
    assert leaks(some(10), [Row("p3", "other"), Row("p3", "l1"), Row("new", "l0")]) == 2
    assert leaks([Row("", "one text")], [Row("", "one text"), Row("", "another")]) == 1


def test_classes_of_a_table_are_written_by_name(tmp_path):
    """A ClassLabel column holds numbers; what the user means by {label} is the name. Files and folders alike."""
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    (tmp_path / "set").mkdir()
    made.to_parquet(tmp_path / "set" / "train.parquet")
    templates = {"prompt": "{text}", "completion": " {label}", "base_dir": tmp_path}
    for spec in ("set/train.parquet", {"path": "set", "split": "train"}):
        notes: list[str] = []
        rows = read_rows(spec, **templates, notes=notes)
        assert [r.completion for r in rows] == [" good", " bad", " good"]
        assert (
            len(notes) == 1 and "class numbers" in notes[0] and "(3 times," in notes[0] and "1 is 'good'" in notes[0]
        )
    bare = datasets.Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
    bare.to_parquet(tmp_path / "bare.parquet")
    with pytest.raises(DataError, match=r"bare.parquet:1: column 'label' holds the class -1.*names 2 classes"):
        read_rows("bare.parquet", **templates)
