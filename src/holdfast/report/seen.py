"""Rows as the model sees them: every token with its text, its id, and whether it is prompt or target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text

STYLES = {"prompt": "dim", "target": "bold green", "special": "reverse"}
MOST_TOKENS = 600  # of a row that is shown


def seen_rows(job: Any, count: int) -> list[dict[str, Any]]:
    """The first rows that training draws, and the first that each method asks for beside them.

    Args:
        job: a checked recipe (`runs.job.Job`).
        count: rows of the draw.

    Returns: {"where", "source", "num_tokens", "num_targets", "tokens": [[text, id, target, special]]}.
    """
    drawn = list(islice(job.mix.draw(job.training.seed), count))
    asides = [a for m in job.session.methods for a in m.asides(job.session.ctx)[:1]]
    return [seen_row(r, job.tokenizer, job.task.place(r)) for r in (*drawn, *asides)]


def seen_row(row: Any, tokenizer: Any, where: str = "") -> dict[str, Any]:
    """One row (`engine.pack.TokenRow`); a long one is cut in the middle, and its tokens say so."""
    special, ids = set(tokenizer.all_special_ids), row.ids.tolist()
    tokens = [
        [text, token, bool(target), token in special]
        for text, token, target in zip(pieces(ids, tokenizer), ids, row.scored.tolist(), strict=True)
    ]
    if len(tokens) > MOST_TOKENS:
        half = MOST_TOKENS // 2
        left = f" [... {len(tokens) - 2 * half} tokens ...] "
        tokens = [*tokens[:half], [left, -1, False, False], *tokens[-half:]]
    numbers = {"num_tokens": len(ids), "num_targets": row.num_scored}
    return {"where": where, "source": row.source, **numbers, "tokens": tokens}


def pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text; the vocabulary's own name for one that adds no whole character."""

    def text(tokens: Sequence[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    out, start = [], 0  # the text before `start` stays as it is, so that it need not be decoded again and again
    for n in range(len(ids)):
        before, after = text(ids[start:n]), text(ids[start : n + 1])
        whole = after.startswith(before) and len(after) > len(before) and "\ufffd" not in after[len(before) :]
        out.append(after[len(before) :] if whole else str(tokenizer.convert_ids_to_tokens(ids[n])))
        if n - start > 16 and whole:
            start = n
    return out


def kind_of(token: Sequence[Any]) -> str:
    """How a token is shown: "prompt" or "target", and "special" beside it."""
    return ("target" if token[2] else "prompt") + (" special" if token[3] else "")


def show_rows(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print rows, as text and as ids; targets are bold and green, special tokens on a ground of their own."""
    legend = Text("Rows as the model sees them: ")
    for word, style in STYLES.items():
        legend.append(word, style=style).append("  ")
    console.print(legend)
    for row in rows:
        head = f"{row['where'] or row['source']}: {row['num_tokens']} tokens, {row['num_targets']} targets"
        console.print(Text(f"\n{head}", style="bold"))
        words, numbers = Text(), Text()
        for token in row["tokens"]:
            style = " ".join(STYLES[kind] for kind in kind_of(token).split())
            words.append(_visible(token[0]), style=style)
            numbers.append("..." if token[1] < 0 else str(token[1]), style=style).append(" ")
        console.print(words, soft_wrap=True)
        console.print(numbers, soft_wrap=True)


def _visible(text: str) -> str:
    """A newline is shown and made; control characters are spelled out."""
    from holdfast.report.schema import clean

    return clean(text.replace("\r", "\\r")).replace("\n", "\\n\n").replace("\t", "\\t")
