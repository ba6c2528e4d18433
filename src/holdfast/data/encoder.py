"""From text to tokens: the one place that decides how a text begins, where its answer begins, and how it ends.

Training, scoring and generation all ask the same `Encoder`, so what is trained is what is scored and what inference
sees. Three questions, asked apart:

    begin     a text gets what the tokenizer puts before every text (BOS), unless its tokens begin with it already; one
              that a chat template wrote (`Rendered`) holds its own special tokens and gets nothing.
    boundary  the prompt's tokens are those of the prompt alone, as inference will see them. The answer's are what
              prompt + answer adds to them. Where a token would span both, the answer is tokenised apart, so that
              prompt and answer still read as the whole text.
    end       an answer ends with the end-of-text token, unless it ends with a token that stops generation already. A
              prompt never does, whatever the tokenizer appends to texts by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise
from typing import Any

from holdfast.data.direct import Direct, Tokens
from holdfast.data.rendered import Rendered
from holdfast.errors import DataError

SAMPLES, MOST_SAMPLES = ("a", "0", "A", "."), 64
SHOWN = 12  # tokens of a prompt's end that a message shows


@dataclass(frozen=True)
class Split:
    """Prompt and answer in one token sequence.

    ids: all tokens; start: how many of them are the prompt's; mended: the answer was tokenised apart from the prompt.
    """

    ids: Tokens
    start: int
    mended: bool = False

    @property
    def answer(self) -> Tokens:
        return self.ids[self.start :]


class Encoder:
    """One tokenizer's rules.

    Args:
        tokenizer: a Hugging Face tokenizer.
        stops: further tokens that end a generation (`stops_of` a model's generation config).

    Attributes:
        begin: tokens put before a text.
        end: the token that ends an answer, or None where the tokenizer has none.
        stops: every token that ends a generation.
        ends_texts: the tokenizer by itself ends every text, prompts too.
    """

    def __init__(self, tokenizer: Any, stops: Iterable[int] = ()):
        self.tokenizer, self._direct = tokenizer, Direct(tokenizer)
        full, bare = self._sample()
        at = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), len(full))
        after = full[at + len(bare) :]
        self.begin: Tokens = full[:at] if at < len(full) else []
        self.ends_texts = bool(after)
        eos = tokenizer.eos_token_id
        self.end: int | None = eos if eos is not None else (after[-1] if after else None)
        self.stops = frozenset({*stops, self.end} - {None})

    @cached_property
    def _bos(self) -> int | None:
        return self.tokenizer.bos_token_id  # a tokenizer looks it up anew each time

    def _sample(self) -> tuple[Tokens, Tokens]:
        """Tokens of a short text, with all that the tokenizer adds and without; a text that it can write at all."""
        for text in chain(SAMPLES, self._own_words()):
            if bare := self.bare([text])[0]:  # a vocabulary of other letters may write nothing of an "a"
                return self.tokenizer(text)["input_ids"], bare
        return [], []

    def _own_words(self) -> Iterator[str]:
        """The first words of the vocabulary; looked up only when asked for, since sorting it takes long."""
        special = set(self.tokenizer.all_special_tokens)
        yield from islice((w for w in sorted(self.tokenizer.get_vocab()) if w not in special), MOST_SAMPLES)

    # ---- whole texts

    def bare(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of each text, without any that the tokenizer adds."""
        return self._direct.encode(texts) if texts else []

    def prompts(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of each text as a model sees it that is to go on with it."""
        return [[*self._lead(text, ids), *ids] for text, ids in zip(texts, self._each(texts), strict=True)]

    def marked(self, text: str, cuts: Iterable[int] = ()) -> tuple[Tokens, list[tuple[int, int]]]:
        """As `prompts`, with the characters (start, end) of each token; (0, 0) for what was put before.

        A tokenizer written in Python tells no places: of its tokens only those between two `cuts` are told apart.
        """
        if not self.tokenizer.is_fast:
            ids = self.bare([text])[0]
            places = self._between(text, ids, sorted({0, *cuts, len(text)}))
        else:
            got = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
            ids, places = got["input_ids"], list(map(tuple, got["offset_mapping"]))
        lead = self._lead(text, ids)
        return [*lead, *ids], [*[(0, 0)] * len(lead), *places]

    def _between(self, text: str, ids: Tokens, cuts: Sequence[int]) -> list[tuple[int, int]]:
        """The stretch between two cuts in which each token stands: a text up to a cut begins with the same tokens."""
        places: list[tuple[int, int]] = []
        for (start, end), head in zip(pairwise(cuts), self.bare([text[:cut] for cut in cuts[1:]]), strict=True):
            same = next(
                (n for n, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), min(len(head), len(ids))
            )
            places += [(start, end)] * ((same if end < len(text) else len(ids)) - len(places))
        return places

    def _each(self, texts: Sequence[str]) -> list[Tokens]:
        """`bare`, every distinct text once."""
        some = list(dict.fromkeys(map(str, texts)))
        found = dict(zip(some, self.bare(some), strict=True))
        return [found[str(text)] for text in texts]

    def heads(self, texts: Sequence[str], wholes: Sequence[Tokens]) -> list[Tokens]:
        """`bare` of texts, each the beginning of one whose tokens are known.

        A special token parts a text: tokenizers look for these first, and go through what stands between them piece
        by piece. So a beginning has the tokens of the whole up to its last special token, and those that its rest has
        behind that token; in chats that rest is the same in every row.
        """
        parted = [self._parted(text, whole) for text, whole in zip(texts, wholes, strict=True)]
        rests = dict.fromkeys(mark + rest for known in parted if known for mark, rest, _ in [known])
        asked = [str(text) for text, known in zip(texts, parted, strict=True) if known is None]
        found = dict(zip([*rests, *dict.fromkeys(asked)], self.bare([*rests, *dict.fromkeys(asked)]), strict=True))
        out = []
        for text, known in zip(texts, parted, strict=True):
            if known is None:
                out.append(found[str(text)])
                continue
            mark, rest, before = known
            tail = found[mark + rest]
            whole_again = tail[:1] != [self._marks[mark]]
            out.append(self.bare([str(text)])[0] if whole_again else [*before, *tail[1:]])
        return out

    def _parted(self, text: str, whole: Tokens) -> tuple[str, str, Tokens] | None:
        """The last special token of a text, what follows it, and the tokens up to and with it; None without one."""
        ends = [(text.rfind(mark), mark) for mark in self._marks]
        at, mark = max(ends, default=(-1, ""))
        if at < 0:
            return None
        token, place = self._marks[mark], -1
        for _ in range(text.count(mark)):
            try:
                place = whole.index(token, place + 1)
            except ValueError:
                return None
        return mark, text[at + len(mark) :], whole[: place + 1]

    @cached_property
    def _marks(self) -> dict[str, int]:
        """Special tokens of the chat template that no other token can hide, and their numbers."""
        template = str(getattr(self.tokenizer, "chat_template", None) or "")
        if not self.tokenizer.is_fast or getattr(self.tokenizer, "split_special_tokens", False):
            return {}
        added = self.tokenizer.added_tokens_decoder
        plain = {
            token.content: n
            for n, token in added.items()
            if token.special and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        }
        others = [token.content for token in added.values()]
        return {
            mark: n
            for mark, n in plain.items()
            if mark in template and not any(_meet(mark, o) for o in others if o != mark)
        }

    def _lead(self, text: str, ids: Tokens) -> Tokens:
        """What stands before the tokens of a text: nothing where they begin with it."""
        written = bool(ids) and (ids[0] == self._bos or ids[: len(self.begin)] == self.begin)
        return [] if isinstance(text, Rendered) or written else self.begin

    @property
    def first(self) -> Tokens:
        """What a text without a prompt is read after: BOS, else end-of-text (lm-evaluation-harness's rule)."""
        return self.begin or ([self._bos] if self._bos is not None else [self.end] if self.end is not None else [])

    # ---- prompt and answer

    def join(
        self, pairs: Sequence[tuple[str, str]], *, end: bool | Sequence[bool], wheres: Sequence[str] = ()
    ) -> list[Split]:
        """Tokens of each (prompt, answer); every distinct text is tokenised once, and all of them in one batch.

        Args:
            pairs: a prompt may be empty.
            end: end every answer as training does, or which of them. Blanks after a token that stops generation are
                then left out: it is never asked to write them.
            wheres: file:line of each pair, for messages.

        Raises:
            DataError: an answer adds no token, or cannot be told from its prompt in tokens.
        """
        wholes = self._each([p + a for p, a in pairs])
        prompts = self.heads([p for p, _ in pairs], wholes)
        out = []
        for n, ((prompt, answer), head, whole) in enumerate(zip(pairs, prompts, wholes, strict=True)):
            where = wheres[n] if wheres else ""
            mended = whole[: len(head)] != head or (len(whole) == len(head) and bool(answer.strip()))
            tail = self._apart(prompt, answer, head, whole, where) if mended else whole[len(head) :]
            ended = end if isinstance(end, bool) else end[n]
            if not tail:
                what = f"{where + ': ' if where else ''}The answer {answer!r} adds no token to its prompt."
                raise DataError(what, "Fill it in, or remove the row.")
            lead = self._lead(prompt, whole)
            out.append(Split([*lead, *head, *(self._ended(tail) if ended else tail)], len(lead) + len(head), mended))
        return out

    def _apart(self, prompt: str, answer: str, head: Tokens, whole: Tokens, where: str) -> Tokens:
        """The answer's tokens behind those of the prompt, so that both read as the whole text.

        Many tokenizers put a blank before a text, or write a word's beginning otherwise than its middle; behind some
        other character, which is cut off again, the answer stands as inside a text. Nothing where it writes nothing.
        """
        if whole == head and not self.bare([answer])[0]:
            return []
        text = self._text(whole)
        for before in ("", prompt[-1:], "\n", "a", "."):
            lead, both = self.bare([before, before + answer]) if before else ([], self.bare([answer])[0])
            tail = both[len(lead) :]
            if tail and both[: len(lead)] == lead and self._text([*head, *tail]) == text:
                return tail
        what = (
            f"{where + ': ' if where else ''}The tokenizer cannot cut between the prompt and its answer {answer!r}. "
            f"The prompt ends in the tokens {self._names(head)}, prompt and answer in {self._names(whole)}."
        )
        raise DataError(
            what, "End the prompt before the blank or word in which they meet; let the answer begin there."
        )

    def _ended(self, tail: Tokens) -> Tokens:
        last = len(tail)
        while last and self._is_blank(tail[last - 1]):
            last -= 1
        if last and tail[last - 1] in self.stops:
            return tail[:last]
        return tail if self.end is None else [*tail, self.end]

    def end_of(self, ids: Sequence[int], start: int, end: int) -> int:
        """Where the turn ids[start:end] ends: behind the token that ends it, without blanks that follow that one.

        Of some models that token opens the next message.
        """
        last = end
        while last > start and self._is_blank(ids[last - 1]):
            last -= 1
        if last > start and (ids[last - 1] in self.stops or ids[last - 1] in self._added):
            return last
        return end + 1 if end < len(ids) and ids[end] in self.stops else end

    def is_ended(self, answer: str, split: Split) -> bool:
        """Whether an answer brings its own end: a newline, or a token such as those that end a turn."""
        return answer.endswith("\n") or split.ids[-1] in self.stops or split.ids[-1] in self._special

    def without_end(self, answer: str) -> str:
        """What an answer says: without the token that a chat template ends it with, and the blanks behind that."""
        text = answer.rstrip()
        end = next((name for name in self._end_names if text.endswith(name)), "")
        bare = text.removesuffix(end)
        return bare if end and bare.strip() else answer

    @cached_property
    def _end_names(self) -> list[str]:
        """The texts of special tokens, the longest first."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        names = {str(t) for t in added if getattr(t, "special", False)} | set(self.tokenizer.all_special_tokens)
        names |= {str(t) for t in self.tokenizer.convert_ids_to_tokens(sorted(self.stops))}
        return sorted({n for n in names if n.strip()}, key=len, reverse=True)

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(getattr(self.tokenizer, "added_tokens_decoder", ())) | self._special

    def _is_blank(self, token: int) -> bool:
        if token not in self._blanks:
            self._blanks[token] = token not in self.stops and not self._text([token]).strip()
        return self._blanks[token]

    @cached_property
    def _blanks(self) -> dict[int, bool]:
        return {}

    def _text(self, ids: Tokens) -> str:
        return self._direct.decode([ids])[0]

    def _names(self, ids: Tokens) -> str:
        return "[" + ", ".join(map(repr, map(str, self.tokenizer.convert_ids_to_tokens(ids[-SHOWN:])))) + "]"

    def lacks(self, answer: Sequence[int]) -> bool:
        """Whether some part of an answer was lost: its tokens hold the one for what the vocabulary lacks."""
        unknown = self.tokenizer.unk_token_id
        return unknown is not None and unknown not in self.stops and unknown in answer  # GPT-2's is its end

    def says(self, answer: Sequence[int]) -> bool:
        """Whether an answer holds more than blanks and its end."""
        return bool(self._text([token for token in answer if token not in self.stops]).strip())

    def written(self, answers: Sequence[str], splits: Sequence[Split]) -> list[tuple[bool, bool]]:
        """Of each answer whether its tokens say anything, and whether they read as the answer, blanks and end apart.

        Both are seen at once where an answer reads as itself and holds no token that ends a generation but its last;
        the others are looked at one by one.
        """
        wanted = [_squeezed(answer) for answer in answers]
        bodies = [split.answer[: self._ends_at(split)] for split in splits]
        out = []
        for answer, split, want, body, text in zip(
            answers, splits, wanted, bodies, map(_squeezed, self._direct.decode(bodies)), strict=True
        ):
            same = text and want in (text, text + self._name_of(split.ids[-1])) and self.stops.isdisjoint(body)
            out.append((True, True) if same else (self.says(split.answer), self._writes(answer, split)))
        return out

    def _ends_at(self, split: Split) -> int:
        """How many tokens of an answer stand before its end."""
        return len(split.ids) - split.start - (split.ids[-1] in self.stops)

    def _writes(self, answer: str, split: Split) -> bool:
        end, wanted = split.start + self._ends_at(split), _squeezed(answer)
        return (
            _squeezed(self._text(split.ids[split.start : end])) == wanted
            or _squeezed(self._text(split.answer)) == wanted  # a chat template wrote the end too
            or _squeezed(self._text(split.ids[:end])).endswith(wanted)  # "##er" alone does not read as "er"
        )

    def _name_of(self, token: int) -> str:
        """The text of a token that ends an answer, without blanks; "" for another token."""
        if token not in self._names_of_stops:
            self._names_of_stops[token] = _squeezed(self._text([token])) if token in self.stops else ""
        return self._names_of_stops[token]

    @cached_property
    def _names_of_stops(self) -> dict[int, str]:
        return {}


def _meet(mark: str, other: str) -> bool:
    """Whether two tokens can share characters of a text."""
    short = min(len(mark), len(other))
    return (
        mark in other
        or other in mark
        or any(mark.endswith(other[:n]) or other.endswith(mark[:n]) for n in range(1, short))
    )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def encoder_of(model: Any, tokenizer: Any) -> Encoder:
    """The rules of a tokenizer, with the tokens that end the model's generation."""
    return Encoder(tokenizer, stops_of(getattr(model, "generation_config", None)))


def stops_of(config: Any) -> tuple[int, ...]:
    """The tokens that end a generation, of a model's generation config (or any object or dict with eos_token_id)."""
    ends = config.get("eos_token_id") if isinstance(config, dict) else getattr(config, "eos_token_id", None)
    return tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,)


def ends_to_set(config: Any, tokenizer: Any) -> int | list[int] | None:
    """The eos_token_id with which a generation config (or a dict) stops where answers end; None where it does so."""
    end, stops = Encoder(tokenizer).end, stops_of(config)
    if end is None or end in stops:
        return None
    return [*stops, end] if stops else end
