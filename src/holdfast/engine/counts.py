"""What the rows of an optimizer step are counted by, so that a sum over any part of the step becomes a mean over it.

Counts are plain numbers under words, so that processes can tell each other and micro-batches can be added up:

    owner                     scored positions
    owner/rows                rows with a scored position
    owner/of/source           scored positions of one source; owner/of/source/rows: its rows
    owner/sum/name            sum of a named array of the rows over scored positions; owner/with/name: their number
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from holdfast.engine.pack import TokenRow

Counts = Mapping[str, float]


def count_rows(rows: Iterable[TokenRow]) -> dict[str, float]:
    """The counts of some rows."""
    out: dict[str, float] = {}
    for row in (r for r in rows if r.num_scored):
        source = f"{row.owner}/of/{row.source}"
        own: dict[str, float] = {row.owner: row.num_scored, f"{row.owner}/rows": 1}
        own |= {source: row.num_scored, f"{source}/rows": 1}
        for name, values in row.numbers.items():
            own[f"{row.owner}/sum/{name}"] = float(values[row.scored].sum())
            own[f"{row.owner}/with/{name}"] = row.num_scored
        out = add_counts(out, own)
    return out


def add_counts(*parts: Counts) -> dict[str, float]:
    """The counts of several parts of a step together."""
    out: dict[str, float] = {}
    for part in parts:
        for key, number in part.items():
            out[key] = out.get(key, 0) + number
    return out


def scaled(counts: Counts, factor: float) -> dict[str, float]:
    return {key: number * factor for key, number in counts.items()}


def count_of(counts: Counts, owner: str, source: str | None = None, per: str = "position") -> float:
    """Scored positions, or rows for `per` "row", of an owner (and one of its sources); 0 where there is none."""
    key = owner if source is None else f"{owner}/of/{source}"
    return counts.get(f"{key}/rows" if per == "row" else key, 0)


def sources_of(counts: Counts, owner: str) -> list[str]:
    """The sources that an owner's rows come from, in the order of their names."""
    begin, end = f"{owner}/of/", "/rows"
    return sorted(k.removeprefix(begin).removesuffix(end) for k in counts if k.startswith(begin) and k.endswith(end))


def sum_of(counts: Counts, owner: str, name: str, missing: float) -> float:
    """Sum of a named array over an owner's scored positions; rows without it count as `missing` everywhere."""
    without = counts.get(owner, 0) - counts.get(f"{owner}/with/{name}", 0)
    return counts.get(f"{owner}/sum/{name}", 0.0) + missing * without
