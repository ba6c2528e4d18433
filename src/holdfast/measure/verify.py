"""Checks of an answer by code: does a text keep the form that was asked for?

A check is a pure function (text, *arguments) -> bool, found by its name in `CHECKS`; data files name it as
`["words_at_most", 8]`. An empty text keeps no form. White space and a code fence around the whole text never
matter, nor does the shape of quotation marks. What follows an invented next question is not part of the answer: a
model without a chat template goes on asking itself.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from holdfast.errors import HoldfastError, suggest

Judge = Callable[[str], float]


@dataclass(frozen=True)
class Check:
    """`test` of a text, and in words what it asks for; {} stands for the arguments."""

    test: Callable[..., bool]
    words: str


CHECKS: dict[str, Check] = {}

_QUOTES = str.maketrans({"\u201c": '"', "\u201d": '"', "\u201e": '"', "\u2018": "'", "\u2019": "'"})
_FENCE = re.compile(r"```(?:json\b|\w*(?=\n))?(.*?)(?:```|\Z)\s*", re.DOTALL)
_FENCE_OPENS = re.compile(r"\A```(?:json\b)?\s*")
_WORD = re.compile(r"\w+(?:['.:-]\w+|,\d{3}(?!\d))*")
_SENTENCE_END = re.compile(r"""[.!?]+["')]*(?=\s|$)|\n""")
_ABBREVIATION = re.compile(r"\b(Mr|Mrs|Ms|Dr|St|e\.g|i\.e|vs)\.", re.IGNORECASE)
_BULLET = re.compile(r"^\s*[-*+\u2022]\s+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^\s*(\d+)[.)]\s+\S", re.MULTILINE)
_LIST_MARK = re.compile(r"^\s*(?:[-*+\u2022]|\d+[.)])\s+", re.MULTILINE)
_NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?")


def reply(output: str) -> str:
    """The answer inside an output: up to the next invented turn, without a fence around it, quotes made straight."""
    text = re.split(r"\n\s*Question:", "\n" + output)[0].strip()
    fenced = _FENCE.fullmatch(text)
    return unicodedata.normalize("NFC", (fenced[1] if fenced else text).strip()).translate(_QUOTES)


def check(words: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Enter a function into `CHECKS` under its own name; it gets `reply(text)`, and never an empty text."""

    def enter(test: Callable[..., bool]) -> Callable[..., bool]:
        def whole(text: str, *args: Any) -> bool:
            answer = reply(text)
            return bool(answer) and test(answer, *args)

        whole.__name__, whole.__doc__ = test.__name__, test.__doc__
        CHECKS[test.__name__] = Check(whole, words)
        return whole

    return enter


def _has(text: str, phrase: str) -> int:
    """Where `phrase` first stands as whole words, whatever its case; -1 if nowhere."""
    found = re.search(rf"(?<!\w){re.escape(phrase.casefold())}(?!\w)", text.casefold())
    return found.start() if found else -1


def _bare(text: str) -> str:
    return text.strip(" \t\n\"'`*_.,;:!?()")


@check("at most {} words")
def words_at_most(text: str, most: int) -> bool:
    """One word at least; "well-known" and "3.5" are one word each."""
    return 1 <= len(_WORD.findall(text)) <= most


@check("exactly {} words")
def words_exactly(text: str, count: int) -> bool:
    """Words as in `words_at_most`."""
    return len(_WORD.findall(text)) == count


@check("exactly {} sentences")
def sentences(text: str, count: int) -> bool:
    """A sentence ends in . ! ? or with its line; an unfinished last one counts, decimals and "Dr." end none."""
    plain = _ABBREVIATION.sub(lambda m: m[0].replace(".", ""), _LIST_MARK.sub("", text))
    return sum(bool(_WORD.search(part)) for part in _SENTENCE_END.split(plain)) == count


@check("exactly {} bullet points")
def bullets(text: str, count: int) -> bool:
    """Lines that begin with - * + or a bullet; other lines, such as a heading, may stand around them."""
    return len(_BULLET.findall(text)) == count


@check("a list numbered 1 to {}")
def numbered(text: str, count: int) -> bool:
    """Lines that begin with "1." or "1)", in order and none more."""
    return [int(n) for n in _NUMBERED.findall(text)] == list(range(1, count + 1))


@check("exactly {} lines")
def lines(text: str, count: int) -> bool:
    """Lines with words on them."""
    return sum(bool(_WORD.search(line)) for line in text.splitlines()) == count


def _json(text: str) -> Any:
    """The value, or None when the text is not JSON (NaN and infinity are not); a remark behind a closing fence is."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    body = _FENCE_OPENS.sub("", text)
    try:
        value, end = json.JSONDecoder(parse_constant=refuse).raw_decode(body)
    except (ValueError, RecursionError):
        return None
    rest = body[end:].strip()
    return value if not rest or rest.startswith("```") else None


@check("a JSON object with the keys {}")
def json_keys(text: str, *keys: str) -> bool:
    """One JSON object with exactly these keys, whatever their values; nothing before it, only a fence behind it."""
    value = _json(text)
    return isinstance(value, dict) and set(value) == set(keys)


@check("a JSON list of {}")
def json_list(text: str, count: int) -> bool:
    """One JSON list of so many elements."""
    value = _json(text)
    return isinstance(value, list) and len(value) == count


@check("with the words {}")
def contains(text: str, *phrases: str) -> bool:
    """Every phrase stands there as whole words; case is free."""
    return all(_has(text, p) >= 0 for p in phrases)


@check("the word {} times over")
def times(text: str, word: str, count: int) -> bool:
    """The whole answer is this word, so many times; case and punctuation are free."""
    return [w.casefold() for w in re.findall(r"\w+", text)] == [word.casefold()] * count


@check("without {}")
def lacks(text: str, *phrases: str) -> bool:
    """No phrase stands there as whole words, in no case."""
    return all(_has(text, p) < 0 for p in phrases)


@check("the words {} in this order")
def in_order(text: str, *phrases: str) -> bool:
    """The first places of the phrases rise: naming one too early is not in order."""
    places = [_has(text, p) for p in phrases]
    return places[0] >= 0 and all(a < b for a, b in pairwise(places))


@check("all lower case")
def lower(text: str) -> bool:
    """There are letters, and none is a capital."""
    return text.islower()


@check("all upper case")
def upper(text: str) -> bool:
    """There are letters, and none is small."""
    return text.isupper()


@check("every word with a capital letter")
def title(text: str) -> bool:
    """No word begins with a small letter, some word has a small one: "Old Town Hall", not "OLD TOWN HALL"."""
    found = _WORD.findall(text)
    return bool(found) and not any(w[0].islower() for w in found) and any(c.islower() for c in text)


@check("begins with {!r}")
def starts(text: str, phrase: str) -> bool:
    """The phrase as whole words, after quotation marks at most; case is free."""
    return _has(_bare(text), phrase) == 0


@check("ends with {!r}")
def ends(text: str, phrase: str) -> bool:
    """The phrase as whole words, before punctuation at most; case is free."""
    return re.search(rf"(?<!\w){re.escape(phrase.casefold())}$", _bare(text).casefold()) is not None


@check("a list of {} separated by commas")
def comma_list(text: str, count: int) -> bool:
    """One line; each part has one to three words, so that a sentence with commas is no list."""
    parts = text.rstrip(".").split(",")
    return "\n" not in text and len(parts) == count and all(1 <= len(_WORD.findall(p)) <= 3 for p in parts)


@check("a single word")
def one_word(text: str) -> bool:
    """One word with letters, with punctuation around it at most."""
    word = _WORD.fullmatch(_bare(text))
    return word is not None and not word[0].isdigit()


@check("a number only")
def number(text: str) -> bool:
    """Digits, with a sign, thousands commas, decimals or a full stop at most; no unit and no word."""
    return _NUMBER.fullmatch(text.strip("* ").removesuffix(".")) is not None


@check("the numbers {} and no other")
def numbers(text: str, *wanted: int) -> bool:
    """The whole numbers in the text, in this order; the marks of a numbered list count when they are all there is."""
    found = [int(n) for n in re.findall(r"\d+", text)]
    inside = [int(n) for n in re.findall(r"\d+", _LIST_MARK.sub("", text))]
    return list(wanted) in (found, inside)


@check("between double quotation marks")
def quoted(text: str) -> bool:
    """The whole answer is quoted, a full stop behind it is allowed."""
    body = text.removesuffix(".")
    return len(body) > 2 and body[0] == body[-1] == '"' and '"' not in body[1:-1]


@check("no commas")
def no_commas(text: str) -> bool:
    """Not one comma."""
    return "," not in text


@check("in {}")
def language(text: str, name: str) -> bool:
    """The language by `language_of`, and more sure than not."""
    guess, sure = language_of(text)
    return guess == name and sure >= 0.5


_COMMON = {
    "English": "the a an and is are was were of to in it that this with for on at by from he she they we you i my "
    "have has had be not or as but his her their there very can will would which when all one",
    "German": "der die das ein eine einen einem einer und ist sind war waren von zu in es dass mit auf im am dem den "
    "des er sie wir ich du mein meine hat haben nicht oder als aber sehr kann wird auch nach bei aus wie wenn zum zur "
    "um sein ihr viele gibt man vom noch heute ins",
    "French": "le la les un une et est sont de du des en il elle que qui ce cette dans avec pour sur au aux nous vous "
    "je tu mon ma mes son sa ses ont a ne pas ou mais plus par se on ils elles y sont l d c j qu n s tres leur fait "
    "aussi comme bien",
    "Spanish": "el la los las un una y es son de del en que con por para al se su sus lo mi mis tu yo nosotros muy no "
    "o pero como esta este hay ha he fue ser soy nos le les cuando todos todo donde tiene hace bien",
}
_SHARED = {w for w, n in Counter(" ".join(_COMMON.values()).split()).items() if n > 1}
_COMMON_WORDS = {name: frozenset(text.split()) - _SHARED for name, text in _COMMON.items()}
_LETTERS = {"German": "\u00e4\u00f6\u00fc\u00df", "French": "\u00e0\u00e2\u00e7\u00e8\u00ea\u00ee\u0153\u00f9\u00fb"}
_LETTERS["Spanish"] = "\u00f1\u00bf\u00a1\u00f3\u00ed\u00fa\u00e1"


def language_of(text: str) -> tuple[str | None, float]:
    """The likeliest of English, German, French and Spanish, and how sure that is, 0 to 1.

    Counts the commonest words of each language, and letters only one of them has; a word that is common in two of
    the languages speaks for neither. Sure is (best - second) / (best + second + 1): one lone word gives 0.5, five
    give 0.83, a tie 0. A small test for whole sentences: it cannot tell other languages, nor phrases without any
    common word.
    """
    found = re.findall(r"[^\W\d_]+", text.lower())  # casefold would lose the sharp s
    hits = {
        name: sum(w in common for w in found) + sum(any(c in _LETTERS.get(name, "") for c in w) for w in found)
        for name, common in _COMMON_WORDS.items()
    }
    (name, best), (_, second) = sorted(hits.items(), key=lambda pair: -pair[1])[:2]
    return (name, (best - second) / (best + second + 1)) if best > second else (None, 0.0)


def find(name: str) -> Check:
    """The check of that name.

    Raises:
        HoldfastError: there is none.
    """
    if name not in CHECKS:
        raise HoldfastError(f"There is no check {name!r} of an answer.", suggest(name, tuple(CHECKS)))
    return CHECKS[name]


def obeys(output: str, checks: Sequence[Sequence[Any]]) -> bool:
    """Whether `output` passes all of `checks`, each [name, *arguments].

    Raises:
        HoldfastError: a check is unknown.
    """
    return all(find(name).test(output, *args) for name, *args in checks)


def judge_of(checks: Sequence[Sequence[Any]], request: str = "") -> Judge:
    """A judge: 1.0 if all checks hold, else 0.0; an answer that only says the request again obeys nothing.

    Raises:
        HoldfastError: a check is unknown.
    """
    for name, *_ in checks:
        find(name)
    said = request.casefold().strip()

    def judge(output: str) -> float:
        again = bool(said) and said in reply(output).casefold()
        return float(not again and obeys(output, checks))

    return judge


def in_words(checks: Sequence[Sequence[Any]]) -> str:
    """What the checks ask for, for showing: "at most 8 words; with the words 'sea'"."""
    return "; ".join(_describe(find(name).words, args) for name, *args in checks)


def _describe(words: str, args: Sequence[Any]) -> str:
    return words.format(args[0] if len(args) == 1 else ", ".join(map(str, args)))


CONSTANTS = (
    "Yes", "yes", "YES", "7", '"Yes"', '"7"', "{}", "[]", '["a", "b", "c"]', "red, green, blue",
    "red, green, blue, black", "1, 2, 3, 4, 5", "1\n2\n3", "- red\n- green", "- red\n- green\n- blue",
    "- red\n- green\n- blue\n- black", "1. red\n2. green\n3. blue", "1. red\n2. green\n3. blue\n4. black",
    "I do not know.", "It is good. I like it.", "Ich bin nicht sicher, aber es ist gut.",
    "Je ne suis pas dans la maison.", "El perro no es muy grande.",
)  # fmt: skip


def floor(tasks_checks: Sequence[Sequence[Sequence[Any]]]) -> float:
    """The share of requests (given as their checks) that the best one of `CONSTANTS` obeys without reading any."""
    obeyed = [sum(obeys(c, checks) for checks in tasks_checks) for c in CONSTANTS]
    return max(obeyed) / len(tasks_checks)
