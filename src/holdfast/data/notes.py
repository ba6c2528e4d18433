"""What a reader must say although it is no error: each kind once, with its count and its first place."""

import re

BOOKKEEPING = {"id", "idx", "index", "source", "url", "meta", "metadata", "title", "date", "timestamp", "language"}
COUNT = re.compile(r"\{n (\w+)\}")


class Notes:
    """Collects notes while data is read. A note is a text with a count in it: "... of {n answer} ..."."""

    def __init__(self) -> None:
        self._count: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, text: str, place: str, example: str = "") -> None:
        """Count one more of `text`; the place and example of the first are shown."""
        self._count[text] = self._count.get(text, 0) + 1
        self._first.setdefault(text, f"{place}: {example}" if example else place)

    def lines(self) -> list[str]:
        """One sentence for each kind, in order of first appearance."""
        return [_line(text, n, self._first[text]) for text, n in self._count.items()]


def _line(text: str, n: int, first: str) -> str:
    counted = COUNT.sub(lambda found: f"{n} {found[1]}{'' if n == 1 else 's'}", text, count=1)
    return f"{counted[:-1]}, first {first})" if counted.endswith(")") else f"{counted} (first {first})"
