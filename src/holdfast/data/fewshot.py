"""Few-shot prompts: shots, formats, separators. One place, so that training and measuring write the same text.

A prompt is `header + shot + sep + shot + sep + ... + query`, the answer follows, and what the tokenizer writes first
of a separator ends it: a newline with GPT-2's pattern, which cuts a blank line before a "Q" in two; all of it with
Llama 3's and Qwen's, where a blank line is one token and a model that ends its answer never says a single newline.
Formats vary because a model anchored on one format keeps that format best (measured: 0.90 to 1.03 of base).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.data.rendered import Rendered

Pair = tuple[str, str]


@dataclass(frozen=True)
class Format:
    """How one demonstration is written. `{x}` input, `{y}` output, `{i}`/`{o}` the task's names for them."""

    name: str
    query: str
    answer: str = " {y}"
    sep: str = "\n\n"
    header: str = ""  # may use {instruction}


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("qa", "Q: {x}\nA:"),
        Format("arrow", "{x} ->", sep="\n"),
        Format("io", "Input: {x}\nOutput:"),
        Format("named", "{i}: {x}\n{o}:"),
        Format("instruction", "{x} =", sep="\n", header="{instruction}\n\n"),
        Format("chat", "", answer="{y}"),  # rendered by the tokenizer's own chat template
    )
}


@dataclass(frozen=True)
class Prompt:
    """A finished prompt: the model reads `context` and should go on with `answer` and then `stop`.

    spans: (start, end) characters in context + answer of every shown answer and, last, of the query's.
    """

    context: str
    answer: str
    stop: str
    spans: tuple[tuple[int, int], ...] = ()


def build(
    form: Format,
    shots: Sequence[Pair],
    query: Pair,
    *,
    instruction: str = "",
    names: tuple[str, str] = ("Input", "Output"),
    tokenizer: Any = None,
) -> Prompt:
    """Write `shots` and the query of one task in one format.

    Args:
        form: the format; "chat" needs a tokenizer with a chat template.
        tokenizer: decides what ends an answer; without one it is a newline.
        shots: (input, output) pairs, first shown first.
        query: (input, output); the output is the answer and never stands in the context.
    """
    if form.name == "chat":
        return _chat(shots, query, instruction, tokenizer)
    fill = {"i": names[0], "o": names[1]}
    text, spans = form.header.format(instruction=instruction), []
    lead = form.answer.index("{y}")
    for n, (x, y) in enumerate([*shots, query]):
        text += form.query.format(x=x, **fill)
        spans.append((len(text) + lead, len(text) + lead + len(y)))
        if n < len(shots):
            text += form.answer.format(y=y) + form.sep
    return Prompt(text, form.answer.format(y=query[1]), stop_of(form, tokenizer), tuple(spans))


def stop_of(form: Format, tokenizer: Any) -> str:
    """What ends an answer in a format: a newline, or the whole separator where a newline is no piece of it."""
    if tokenizer is None or form.sep == "\n":
        return "\n"
    line, shot = (tokenizer(f"a{text}", add_special_tokens=False)["input_ids"] for text in ("\n", f"{form.sep}Q"))
    return "\n" if shot[: len(line)] == line else form.sep


def _chat(shots: Sequence[Pair], query: Pair, instruction: str, tokenizer: Any) -> Prompt:
    turns: list[dict[str, str]] = []
    for n, (x, y) in enumerate([*shots, query]):
        turns.append({"role": "user", "content": f"{instruction}\n{x}" if n == 0 else x})
        turns.append({"role": "assistant", "content": y})
    context = Rendered(tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True))
    rest = tokenizer.apply_chat_template(turns, tokenize=False).removeprefix(context)
    lead, _, stop = rest.partition(query[1])  # Llama 2 and Mistral put a blank before an answer
    if lead.strip() or not rest.startswith(lead + query[1]):  # it rewrites turns: its answer cannot be scored
        lead = stop = ""
    start = len(context) + len(lead)
    spans = (*_chat_spans(turns[:-1], context, tokenizer), (start, start + len(query[1])))
    return Prompt(context, lead + query[1], stop.rstrip(), spans)


def _chat_spans(turns: list[dict[str, str]], context: str, tokenizer: Any) -> tuple[tuple[int, int], ...]:
    """Where the shown answers stand: rendered once more with a mark for each; () if the template rewrites them."""
    answers = [t["content"] for t in turns if t["role"] == "assistant"]
    marked = [{**t, "content": "\0"} if t["role"] == "assistant" else t for t in turns]
    parts = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True).split("\0")
    if len(parts) != len(answers) + 1:
        return ()
    text, spans = parts[0], []
    for answer, part in zip(answers, parts[1:], strict=True):
        spans.append((len(text), len(text) + len(answer)))
        text += answer + part
    return tuple(spans) if text == context else ()


def can_chat(tokenizer: Any, shots: int = 1) -> bool:
    """Whether the tokenizer has a chat template that writes a question of plain text, behind so many answered ones.

    Templates for images drop or refuse plain text, and some need an end that the tokenizer lacks.
    """
    if not getattr(tokenizer, "chat_template", None):
        return False
    said = [f"zq{n}" for n in range(2 * shots + 1)]
    turns = [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(said)]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template is somebody's program and raises what it likes
        return False
    return all(part in text for part in said)


def formats_for(tokenizer: Any, names: Sequence[str] | None = None) -> list[Format]:
    """The formats a tokenizer can write: all of them, less "chat" when it has no chat template for plain text."""
    chosen = [FORMATS[n] for n in (names or FORMATS)]
    return [f for f in chosen if f.name != "chat" or can_chat(tokenizer)]
