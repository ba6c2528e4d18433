"""The checks that judge an answer by code: what each lets pass and what it does not."""

import pytest

from holdfast.errors import HoldfastError
from holdfast.measure.verify import CHECKS, CONSTANTS, floor, in_words, judge_of, language_of, obeys, reply

PASS_AND_FAIL = {
    "words_at_most": [
        ((3,), ["one two three", "a well-known 3.5", " yes. "], ["one two three four", "...", "red,green,blue,pink"])
    ],
    "words_exactly": [((2,), ["It's 1,000!", "a\nb"], ["one", "a b c"])],
    "sentences": [
        ((1,), ["Dr. Low has 3.5 cats.", "no end", 'He said "go!"'], ["One. Two.", "One.\nTwo", "?!"]),
        ((2,), ["One. Two.", "One! two", "1. Snow falls.\n2. It melts."], ["One.", "One. Two. Thr"]),
    ],
    "bullets": [((2,), ["- a\n- b", "Here:\n* a\n* b", "\u2022 a\n+ b"], ["- a", "- a\n- b\n- c", "a - b", "- a\n-"])],
    "numbered": [
        ((2,), ["1. a\n2. b", "List:\n1) a\n2) b"], ["1. a", "1. a\n3. b", "2. a\n1. b", "1. a\n2. b\n3. c"])
    ],
    "lines": [((2,), ["a\nb", "a\n\nb\n"], ["a", "a\nb\nc", "a\n--"])],
    "json_keys": [
        (
            ("a", "b"),
            [
                '{"a": 1, "b": null}',
                '```json\n{"b": 1, "a": 2}\n```',
                '\n {"a":1,"b":2}\n```',
                '```{"a": 1, "b": 2}```',
                '```json\n{"a": 1, "b": 2}\n```\nThis is JSON.',
            ],
            ['{"a": 1}', '{"a": 1, "b": 2, "c": 3}', '["a", "b"]', '{"a": NaN, "b": 1}', '{"a": 1, "b": 2} so', "a b"],
        )
    ],
    "json_list": [((2,), ["[1, 2]", "```\n[[], {}]\n```"], ["[1]", '{"a": 1, "b": 2}', "1, 2", "[" * 4000])],
    "contains": [(("sea", "old man"), ["The old MAN and the Sea"], ["seas, old man", "old sea man", "sea"])],
    "times": [(("yes", 2), ["Yes, yes!", "yes\nYes"], ["yes", "yes yes yes", "yes and yes"])],
    "lacks": [(("car",), ["carpet", "a bus"], ["My Car."])],
    "in_order": [
        (
            ("a1", "b2", "c3"),
            ["a1 b2, c3", "A1 then B2 then C3 then a1"],
            ["b2 a1 b2 c3", "a1 b2", "c3 b2 a1", "b2 c3"],
        )
    ],
    "lower": [((), ["all small, 3", "h\u00f6he"], ["One capital", "12"])],
    "upper": [((), ["ALL BIG, 3!"], ["ALL BiG", "12"])],
    "title": [((), ["The Old 7 Houses", '"Old Town"'], ["The old House", "OLD", "12"])],
    "starts": [(("Every",), ["every day", '"Every" one', "**Every**"], ["Everyone", "An Every", ""])],
    "ends": [(("home",), ["go Home.", 'the "home"!', "home"], ["homes", "home again", "gohome"])],
    "comma_list": [
        (
            (3,),
            ["red, green, blue", "red, light green, and blue."],
            ["red, green", "a, b, c, d", "red,\ngreen, blue", "Well, this is a long one, ok", "a,,b"],
        )
    ],
    "one_word": [((), ["Yes.", '"well-known"', "**puppy**"], ["two words", "7", "yes,no", "..."])],
    "number": [((), ["7", "1,000", "-3.5", " 12. ", "**4**"], ["7 days", "seven", "1,00", "1 2", '"7"'])],
    "numbers": [
        (
            (1, 2, 3),
            ["1, 2, 3", "one is 1; 2 and 3.", "1. one\n2. two\n3. three", "1. 1\n2. 2\n3. 3"],
            ["1, 2", "1, 2, 3, 4", "3 2 1", "123"],
        )
    ],
    "quoted": [
        ((), ['"Hello, you."', "\u201cHello\u201d", '"Hello".'], ["Hello", 'He said "Hello"', '""', '"A" or "B"'])
    ],
    "no_commas": [((), ["bread and milk"], ["bread, milk"])],
    "language": [
        (
            ("German",),
            ["Der Hund ist im Garten.", "Ich trinke Kaffee.", "Stra\u00dfe"],
            ["The dog is in the garden.", "Le chien est dans le jardin.", "Hund", "xyz"],
        ),
        (
            ("French",),
            ["Le livre est sur la table.", "C'est la maison de mon p\u00e8re."],
            ["El libro es de la casa."],
        ),
        (("Spanish",), ["El agua est\u00e1 fr\u00eda.", "La casa es muy grande y el perro no."], ["Das ist es."]),
        (("English",), ["It means house and was in the book."], ["Das Haus ist gut.", "maison"]),
    ],
}
CASES = [
    (name, args, text, want)
    for name, rows in PASS_AND_FAIL.items()
    for args, good, bad in rows
    for want, texts in ((True, good), (False, bad))
    for text in texts
]


def test_every_check_has_cases():
    assert set(PASS_AND_FAIL) == set(CHECKS)


@pytest.mark.parametrize(("name", "args", "text", "want"), CASES)
def test_a_check_decides(name, args, text, want):
    assert CHECKS[name].test(text, *args) is want


@pytest.mark.parametrize("name", sorted(CHECKS))
@pytest.mark.parametrize("empty", ["", " \n ", "```\n```", "\nQuestion: What else?\nAnswer: Yes"])
def test_an_empty_answer_keeps_no_form(name, empty):
    args = PASS_AND_FAIL[name][0][0]
    assert CHECKS[name].test(empty, *args) is False


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_white_space_around_an_answer_and_a_next_question_do_not_matter(name):
    args, good, bad = PASS_AND_FAIL[name][0]
    for text in good + bad:
        want = CHECKS[name].test(text, *args)
        assert CHECKS[name].test(f"\n  {text}\n\n", *args) is want
        assert CHECKS[name].test(f"{text}\nQuestion: Where, then?\nAnswer: HERE 9", *args) is want


def test_the_reply_inside_an_output():
    assert reply("Rome.\n\nQuestion: And Spain?\nAnswer: Madrid") == "Rome."
    assert reply("```json\n{}\n```") == "{}"
    assert reply("```hello```") == "hello"
    assert reply("see ```x``` there") == "see ```x``` there"
    assert reply("The Question: why?") == "The Question: why?"


def test_how_sure_the_language_is():
    assert language_of("Der") == ("German", 0.5)
    assert language_of("der die das ein und") == ("German", pytest.approx(5 / 6))
    assert language_of("the der") == (None, 0.0)
    assert language_of("") == (None, 0.0)
    name, sure = language_of("The word le is French and so is la.")
    assert name == "English" and sure < language_of("The word is French and so is that.")[1]


def test_a_judge_wants_all_checks_and_no_echo():
    checks = [["words_at_most", 5], ["contains", "sea"]]
    judge = judge_of(checks, "Use the word sea.")
    assert judge("The sea is deep.") == 1.0
    assert judge("The lake is deep.") == 0.0
    assert judge("The sea is deep and wide.") == 0.0
    assert judge("use the word sea.") == 0.0
    assert judge_of(checks)("Use the word sea.") == 1.0
    assert in_words(checks) == "at most 5 words; with the words sea"


def test_an_unknown_check_is_named():
    with pytest.raises(HoldfastError, match="words_at_mots") as error:
        judge_of([["words_at_mots", 3]])
    assert "words_at_most" in error.value.cure
    with pytest.raises(HoldfastError, match="nothing_like_it"):
        obeys("x", [["nothing_like_it"]])


def test_the_floor_is_the_best_constant():
    assert "7" in CONSTANTS
    assert floor([[["number"]], [["number"]], [["lower"]], [["contains", "heron"]]]) == 0.5
    assert floor([[["contains", "heron"]]]) == 0.0
