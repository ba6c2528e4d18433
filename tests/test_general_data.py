"""The shipped replay data: sizes, columns, no duplicates, and the lengths its README promises."""

import json
import re
from importlib.resources import files
from statistics import median

import pytest

FOLDER = files("holdfast") / "data" / "shipped" / "general"


def read(name: str) -> list[dict[str, str]]:
    """All rows of one shipped file."""
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="ascii").splitlines()]


def words(text: str) -> int:
    return len(text.split())


def normal(text: str) -> str:
    """Lower case with everything but letters and digits squeezed, so near-copies meet."""
    return re.sub(r"\W+", " ", text.lower()).strip()


@pytest.fixture(scope="module")
def instructions() -> list[dict[str, str]]:
    return read("instructions.jsonl")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rows = read("text.jsonl")
    assert all(set(row) == {"text"} for row in rows)
    return [row["text"] for row in rows]


def test_sizes(instructions, texts):
    assert len(instructions) >= 320 and len(texts) >= 160


def test_instruction_columns(instructions):
    assert {frozenset(row) for row in instructions} == {
        frozenset({"instruction", "output"}),
        frozenset({"instruction", "input", "output"}),
    }


def test_every_value_is_stripped_text(instructions, texts):
    values = [value for row in instructions for value in row.values()] + texts
    assert all(isinstance(value, str) and value and value == value.strip() for value in values)


def test_no_duplicates(instructions, texts):
    asked = [normal(row["instruction"] + " " + row.get("input", "")) for row in instructions]
    assert len(set(asked)) == len(asked)
    assert len({normal(text) for text in texts}) == len(texts)


def test_no_long_passage_is_shared(instructions, texts):
    """Eight words in a row that stand in two rows would mean a template."""
    seen: dict[tuple[str, ...], int] = {}
    for row, text in enumerate([r["output"] for r in instructions] + texts):
        tokens = text.lower().split()
        for start in range(len(tokens) - 7):
            assert seen.setdefault(tuple(tokens[start : start + 8]), row) == row, tokens[start : start + 8]


def test_answer_lengths(instructions):
    lengths = [words(row["output"]) for row in instructions]
    assert 1 <= min(lengths) <= 3 and max(lengths) <= 90
    assert 15 <= median(lengths) <= 45


def test_text_lengths(texts):
    lengths = [words(text) for text in texts]
    assert min(lengths) >= 60 and max(lengths) <= 160
    assert 75 <= median(lengths) <= 110


def test_kinds_of_text_are_present(texts):
    """At least four rows of each language and of code, so that replay is not only English prose."""
    marks = {
        "French": r"\b(est|les|une)\b",
        "German": r"\b(und|nicht|der)\b",
        "Spanish": r"\b(el|los|una|que)\b",
    }
    for language, pattern in marks.items():
        assert sum(len(re.findall(pattern, text)) >= 3 for text in texts) >= 4, language
    assert sum("def " in text for text in texts) >= 4
    assert sum("SELECT" in text for text in texts) >= 4


def test_python_answers_compile(instructions):
    blocks = [code for row in instructions for code in re.findall(r"```python\n(.*?)```", row["output"], re.S)]
    assert len(blocks) >= 6
    for code in blocks:
        compile(code, "answer", "exec")


def test_readme_states_the_sizes(instructions, texts):
    readme = (FOLDER / "README.md").read_text(encoding="ascii")
    inputs = sum("input" in row for row in instructions)
    assert f"| {len(instructions)} | `instruction`, `output`, and `input` in {inputs} rows |" in readme
    assert f"| `text.jsonl` | {len(texts)} | `text` |" in readme
