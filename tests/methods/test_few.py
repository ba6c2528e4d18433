"""Few of many rows: drawn by the seed, from anywhere, and only these are read."""

from holdfast.methods.data._few import asked_about, few
from holdfast.services import Context


class Counted(list):
    """Rows that count which of them were read."""

    def __init__(self, rows):
        super().__init__(rows)
        self.read = []

    def __getitem__(self, n):
        self.read.append(n)
        return super().__getitem__(n)


def test_a_few_are_drawn_from_anywhere_and_no_other_is_read():
    rows = Counted(range(1000))
    got = few(rows, 10, "A", Context(None, None))
    assert len(got) == 10 and got == sorted(got) == rows.read and max(got) > 500
    assert got == few(rows, 10, "A", Context(None, None)) != few(rows, 10, "B", Context(None, None))
    assert got != few(rows, 10, "A", Context(None, None, seed=1))
    assert few(rows, None, "A", Context(None, None)) is rows is few(rows, 1000, "A", Context(None, None))


def test_a_cap_is_told():
    ctx = Context(None, None)
    assert len(asked_about(range(5), 2, "A", ctx, "the others stay")) == 2
    assert ctx.notes == ["A asks the base about 2 of 5 rows; the others stay"]
    assert asked_about(range(5), 5, "A", ctx, "") == range(5) and len(ctx.notes) == 1
