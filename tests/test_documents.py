"""Plain text: nothing of a document is lost between its rows, and what is measured together is the text."""

import numpy as np
import pytest

from holdfast.data.documents import text_parts
from holdfast.data.encoder import Encoder
from holdfast.data.lengths import Limit
from holdfast.data.notes import Notes
from holdfast.data.rows import Row, read_rows
from holdfast.data.tokens import tokenize_each
from holdfast.errors import DataError
from tokenizers_made import MADE

TEXT = "The parcel has not arrived.\n\nWhere is order 1042 now? " * 20


@pytest.mark.parametrize("name", list(MADE))
def test_every_token_of_a_document_is_a_target_once(name):
    """The first one too, and the end; neighbours share the stride."""
    encoder = Encoder(MADE[name]())
    ((whole,),) = tokenize_each([Row("", TEXT)], encoder, Limit(), Notes(), documents=True)
    (parts,) = tokenize_each([Row("", TEXT)], encoder, Limit(50, None, 10), Notes(), documents=True)
    front = 1 if encoder.first else 0
    assert whole.num_scored == len(whole.ids) - max(1, front) and max(len(p.ids) for p in parts) <= 50
    assert np.concatenate([p.ids[p.scored] for p in parts]).tolist() == whole.ids[whole.scored].tolist()
    assert all(int(p.scored.argmax()) == 10 for p in parts[1:])
    assert whole.ids[front:].tolist()[: len(encoder.bare([TEXT])[0])] == encoder.bare([TEXT])[0]


@pytest.mark.parametrize("name", list(MADE))
def test_a_measured_document_is_cut_between_tokens(name):
    encoder = Encoder(MADE[name]())
    parts = list(text_parts(Row("", TEXT.strip(), where="d:1"), encoder, 60))
    assert len(parts) > 3 and "".join(p.completion for p in parts) == TEXT.strip()
    assert [p.where for p in parts[:2]] == ["d:1 (part 1)", "d:1 (part 2)"]
    assert all(len(s.ids) <= 60 for s in encoder.join([("", p.completion) for p in parts], end=True))
    assert [p.ends for p in parts] == [False] * (len(parts) - 1) + [True]
    splits = encoder.join([("", p.completion) for p in parts], end=[p.ends for p in parts])
    ended = encoder.join([("", p.completion) for p in parts], end=True)
    assert splits[-1] == ended[-1]
    if encoder.end is not None:  # the document goes on: no end is asked for
        assert all(e.ids == [*s.ids, encoder.end] for s, e in zip(splits[:-1], ended[:-1], strict=True))
    assert list(text_parts(Row("", "short", where="d:1"), encoder, 60)) == [Row("", "short", where="d:1")]


def test_files_of_text_are_documents(tmp_path):
    (tmp_path / "docs" / "in").mkdir(parents=True)
    (tmp_path / "docs" / "b.md").write_text("# Title\n\ntext \u00fc", encoding="utf-8")
    (tmp_path / "docs" / "in" / "a.txt").write_text("another", encoding="utf-8")
    rows = read_rows("docs", base_dir=tmp_path, notes=[])
    assert [(r.prompt, r.completion, r.where) for r in rows] == [
        ("", "# Title\n\ntext \u00fc", "b.md:1"),
        ("", "another", "in/a.txt:1"),
    ]
    assert read_rows("docs/b.md", base_dir=tmp_path, notes=[])[0].completion == "# Title\n\ntext \u00fc"
    (tmp_path / "docs" / "c.txt").write_bytes(b"bad \xff")
    with pytest.raises(DataError, match=r"c\.txt:1: not UTF-8 text"):
        read_rows("docs/c.txt", base_dir=tmp_path, notes=[])
