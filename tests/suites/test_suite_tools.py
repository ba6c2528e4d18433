"""The tools suite: its data, the ways of writing a call, and what planted models score."""

import copy
import json

import pytest

from holdfast.measure import compare
from holdfast.measure.asking import score_suite
from holdfast.measure.calls import Call, name_ends, read_calls, same_arguments
from holdfast.measure.facts import facts_of
from holdfast.measure.probe import Ask
from holdfast.measure.suites.instructions import MADE, read_data
from holdfast.measure.suites.tools import ASKS, LIMIT, build_suite, schema_of
from planted import plant

DATA = read_data("tools")
FUNCTIONS = [
    {**f, **{kind: [*f[kind], *DATA[MADE][f["name"]][kind]] for kind in ("calls", "none")}} for f in DATA["functions"]
]
SCHEMAS = {f["name"]: schema_of(f) for f in FUNCTIONS}
TEMPLATE = (  # as Hermes and Qwen write tools
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["[TOOL_CALLS]", "<|python_tag|>", "<|tool_call_start|>", "<|tool_call_end|>"]


def python(name, arguments):
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


def tags(name, arguments):
    fields = "".join(
        f"<parameter={k}>\n{v if isinstance(v, str) else json.dumps(v)}\n</parameter>\n" for k, v in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{fields}</function>\n</tool_call>"


WAYS = {
    "hermes": lambda n, a: f"<tool_call>\n{json.dumps({'name': n, 'arguments': a})}\n</tool_call>",
    "hermes, prose around": lambda n, a: f"Sure!\n{WAYS['hermes'](n, a)}\nDone.",
    "json": lambda n, a: json.dumps({"name": n, "arguments": a}),
    "json in a fence": lambda n, a: f"```json\n{json.dumps({'name': n, 'arguments': a}, indent=1)}\n```",
    "json, arguments as text": lambda n, a: json.dumps({"name": n, "arguments": json.dumps(a)}),
    "openai": lambda n, a: json.dumps([{"type": "function", "function": {"name": n, "arguments": a}}]),
    "llama": lambda n, a: json.dumps({"name": n, "parameters": a}),
    "llama, tag": lambda n, a: f"<|python_tag|>{json.dumps({'type': 'function', 'name': n, 'parameters': a})}",
    "mistral": lambda n, a: f"[TOOL_CALLS] {json.dumps([{'name': n, 'arguments': a}])}",
    "mistral, name first": lambda n, a: f"[TOOL_CALLS]{n}{json.dumps(a)}",
    "mistral, marks": lambda n, a: f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}",
    "granite": lambda n, a: f"<|tool_call|>[{json.dumps({'name': n, 'arguments': a})}]",
    "cohere": lambda n, a: f"<|START_ACTION|>[{json.dumps({'tool_name': n, 'parameters': a})}]<|END_ACTION|>",
    "pythonic": lambda n, a: f"[{python(n, a)}]",
    "pythonic, bare": python,
    "lfm": lambda n, a: f"<|tool_call_start|>[{python(n, a)}]<|tool_call_end|>",
    "tool_code": lambda n, a: f"```tool_code\n{python(n, a)}\n```",
    "function tag": lambda n, a: f"<function={n}>{json.dumps(a)}</function>",
    "parameter tags": tags,
}
PROSE = (
    "Snow falls on the hill.",
    "I have no function for that, such as get_weather, but I can tell you.",
    '{"name": "Anna", "age": 3}',
    "The formula is f(x) = 2 * x.",
    "[1] See the manual.",
)
BROKEN = (
    '<tool_call>{"name": "roll_dice", "arguments": {"sides": 6}',
    "<tool_call>roll the dice</tool_call>",
    '{"name": "roll_dice", "arguments": {"sides": 6}',
    "[TOOL_CALLS] roll_dice",
    "[roll_dice(sides=6]",
    "roll_dice(6)",
    "roll_dice(sides=many)",
)


@pytest.fixture
def chatty(tokenizer):
    """The tiny tokenizer, with a template that writes tools and the marks of some models as special tokens."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *SPECIAL]})
    own.chat_template = TEMPLATE
    return own


def test_the_data_is_sound():
    assert len(FUNCTIONS) == len(SCHEMAS) == 20
    requests = [c["request"] for f in FUNCTIONS for c in f["calls"]] + [r for f in FUNCTIONS for r in f["none"]]
    assert len(set(requests)) == len(requests) == 320 and all(r.isascii() and r == r.strip() for r in requests)
    assert {len(f["calls"]) for f in FUNCTIONS} == {10} and {len(f["none"]) for f in FUNCTIONS} == {6}
    kinds = {p["type"] for f in FUNCTIONS for p in f["parameters"].values()}
    assert kinds == {"string", "integer", "number", "boolean", "array", "object"}


def test_arguments_keep_their_schema_and_stand_in_the_request():
    types = {"string": str, "integer": int, "number": int | float, "boolean": bool, "array": list, "object": dict}
    for f in FUNCTIONS:
        for call in f["calls"]:
            known = f["parameters"]
            assert set(SCHEMAS[f["name"]]["required"]) <= set(call["arguments"]) <= set(known)
            assert all(isinstance(v, types[known[k]["type"]]) for k, v in call["arguments"].items()), call
            assert all(v in known[k].get("enum", [v]) for k, v in call["arguments"].items()), call
            for value in call["arguments"].values():
                free = [value] if isinstance(value, str) else value if isinstance(value, list) else []
                said = call["request"].casefold()
                assert all(v[:3].casefold() in said for v in free), call
                assert isinstance(value, bool | str | list | dict) or str(value) in said or value == 1, call


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_every_call_is_read(way):
    for f in FUNCTIONS:
        for call in f["calls"]:
            said = read_calls(WAYS[way](f["name"], call["arguments"]), SCHEMAS)
            assert said.calls == (Call(f["name"], call["arguments"]),) and said.tried


@pytest.mark.parametrize("text", PROSE)
def test_prose_and_plain_json_are_no_call(text):
    assert read_calls(text, SCHEMAS) == read_calls("", SCHEMAS)
    assert not read_calls(text, SCHEMAS).tried


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_call_is_tried_and_not_read(text):
    said = read_calls(text, SCHEMAS)
    assert said.calls == () and said.tried


def test_two_calls_are_two_and_a_broken_one_spoils_both():
    one = WAYS["hermes"]("roll_dice", {"sides": 6})
    assert len(read_calls(one + one, SCHEMAS).calls) == 2
    assert len(read_calls('{"name": "a", "parameters": {}}; {"name": "b", "parameters": {}}', SCHEMAS).calls) == 2
    assert read_calls(one + "<tool_call>no</tool_call>", SCHEMAS).calls == ()


def test_a_call_inside_thoughts_is_none():
    inside = f"<think>I could say {WAYS['hermes']('roll_dice', {'sides': 6})}</think>No, I will not."
    assert not read_calls(inside, SCHEMAS).tried
    assert not read_calls(inside.partition("</think>")[0], SCHEMAS).tried
    assert read_calls("<think>Well.</think>" + WAYS["json"]("roll_dice", {"sides": 6}), SCHEMAS).calls


@pytest.mark.parametrize("way", WAYS)
def test_the_end_of_the_called_name(way):
    """Behind thoughts and prose that say the name too; a call of a tool called "name" is no riddle either."""
    for name, arguments in [("get_weather", {"city": "get_weather_now", "days": 3}), ("name", {"name": "x"})]:
        call = WAYS[way](name, arguments)
        at = name_ends(call)
        assert at and call[:at].endswith(name) and call[at] in "\"'({[>"
        assert "days" not in call[:at] and "city" not in call[:at]
        assert '"name": "name' in call[:at] or '"name": "name' not in call
        assert name_ends(f"<think>{name}?</think>\n{call}") == at + len(f"<think>{name}?</think>\n")


@pytest.mark.parametrize("text", ["billing", "print('x')", "f(x=1) is a call", '{"name": "Ann", "age": 3}', "", "[]"])
def test_what_calls_nothing_has_no_name(text):
    assert name_ends(text) is None


def test_arguments_are_compared_by_the_schema():
    dice, light, circle = (SCHEMAS[name] for name in ("roll_dice", "switch_light", "draw_circle"))
    six = {"sides": 6}
    assert same_arguments({"sides": 6.0, "count": 1}, six, dice) and same_arguments({**six, "count": None}, six, dice)
    for wrong in ({"sides": "6"}, {"sides": 7}, {}, {**six, "count": 2}, {**six, "colour": "red"}, {"sides": True}):
        assert not same_arguments(wrong, six, dice)
    on = {"room": "hall", "on": True}
    assert same_arguments({"room": " Hall.", "on": True}, on, light)
    assert not same_arguments({"room": "hall", "on": 1}, on, light)
    at = {"center": {"x": 1, "y": 2}, "radius": 3}
    assert same_arguments({"radius": 3, "center": {"y": 2, "x": 1}}, at, circle)
    assert not same_arguments({"radius": 3, "center": {"x": 2, "y": 1}}, at, circle)
    assert not same_arguments({"radius": 3, "center": [1, 2]}, at, circle)
    text = SCHEMAS["translate_text"]
    polish = {"text": "Good morning", "language": "Polish"}
    assert same_arguments({**polish, "text": "good morning."}, polish, text)
    assert not same_arguments({**polish, "language": "polish"}, polish, text)


def test_sizes_chance_and_settings(chatty):
    suite = build_suite(Ask(chatty))
    assert [(g.name, g.chance) for g in suite.groups] == [(task, round(1 / 3, 4)) for task in ASKS]
    assert len(suite.probes) == len({p.id for p in suite.probes}) == 3 * LIMIT
    asked = [p.context.count('"type": "function"') for p in suite.probes]
    assert asked == [1] * 150 + [3] * 150
    assert [p.context for p in suite.probes] == [p.context for p in build_suite(Ask(chatty)).probes]
    few = build_suite(Ask(chatty, limit=4))
    assert {(p.id, p.context) for p in few.probes} < {(p.id, p.context) for p in suite.probes}
    assert {p.id for p in few.probes} != {p.id for p in build_suite(Ask(chatty, limit=4, seed=1)).probes}


def test_without_tools_in_the_template_the_schemas_stand_in_the_request(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    for own, begin in ((tokenizer, "<|im_start|>user\nYou can call"), (plain, "Question: You can call")):
        suite = build_suite(Ask(own, limit=2))
        for p in suite.probes:
            assert p.context.startswith(begin) and '"arguments"' in p.context


# one way of plain text and one with special tokens; every way is read in a test above
LONG = ("hermes", "llama, tag", "mistral", "parameter tags")


@pytest.mark.parametrize("way", ["json", "lfm", *(pytest.param(way, marks=pytest.mark.long) for way in LONG)])
def test_a_planted_model_that_calls_right_has_all(chatty, way):
    """Through real generation: marks that are special tokens must reach the judge."""
    suite = build_suite(Ask(chatty, limit=1))

    def answer(p):
        wanted = json.loads(p.expected) if p.expected.startswith("{") else None
        return WAYS[way](wanted["name"], wanted["arguments"]) if wanted else "I can only say it in words."

    out = score_suite(plant(chatty, suite, answer), chatty, suite)
    assert [i["correct"] for t in out["tasks"] for i in t["items"]] == [1.0] * 4
    names = ("valid call", "right function", "right arguments", "abstained")
    assert facts_of(out) == dict.fromkeys(names, 1.0)


WRONG = {  # always this answer: marks of requests with a call (valid, function, arguments), and abstained
    "never calls": (lambda p: "No.", (0, 0, 0, 1)),
    "says nothing": (lambda p: "", (0, 0, 0, 0)),
    "malformed": (lambda p: '<tool_call>{"name": </tool_call>', (0, 0, 0, 0)),
    "unknown function": (lambda p: '{"name": "go", "arguments": {}}', (0, 0, 0, 0)),
    "wrong arguments": (lambda p: WAYS["json"](p.id.split("/")[1], {"zq": 1}), (1, 1, 0, 0)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_planted_model_that_is_wrong_is_not_measurable(chatty, kind):
    answer, expected = WRONG[kind]
    suite = build_suite(Ask(chatty, limit=2))
    out = score_suite(plant(chatty, suite, answer), chatty, suite)
    assert tuple(facts_of(out).values()) == expected
    assert compare.ability(out, None, 0.95)["status"] == "not measurable"


def test_thinking_is_turned_off_where_the_template_can(chatty):
    begin = TEMPLATE.replace("{% if add_", "{% if enable_thinking is false %}<quiet>{% endif %}{% if add_")
    for template in (begin, begin.replace("tools", "other")):  # by its own tools, and by ours
        chatty.chat_template = template
        assert all("<quiet>" in p.context for p in build_suite(Ask(chatty, limit=1)).probes)


def test_judges_tell_a_wrong_function_and_twice_the_right_one(chatty):
    suite = build_suite(Ask(chatty))
    p = next(p for p in suite.probes if p.id == "several functions/roll_dice/2")
    right = json.loads(p.expected)["arguments"]
    call = WAYS["json"]("roll_dice", right)
    assert (p.judge(call), p.judge(f"{call}\n{call}")) == (1.0, 0.0)
    other = next(name for name in SCHEMAS if name != "roll_dice" and f'"{name}"' in p.context)
    assert p.marks(WAYS["json"](other, right)) == {"valid call": 1.0, "right function": 0.0, "right arguments": 0.0}


def test_a_loss_of_calling_is_found(chatty):
    """A tuned model that has stopped to call is lost, one that answers as before is not."""
    suite = build_suite(Ask(chatty))
    right = [{"id": p.id, "cluster": "", "correct": 1.0, "marks": {}} for p in suite.probes]
    silent = [{**i, "correct": p.judge("In words.")} for i, p in zip(right, suite.probes, strict=True)]

    def measured(items):
        parts = {
            g.name: [i for i, p in zip(items, suite.probes, strict=True) if p.task == g.name] for g in suite.groups
        }
        told = {"version": 1, "chance": 1 / 3, "metric": "right", "clustered": False}
        return {
            "suite": "tools",
            **suite.settings,
            "tasks": [{"name": n, "items": x, **told} for n, x in parts.items()],
        }

    assert compare.ability(measured(right), measured(silent), 0.95)["status"] == "lost"
    assert compare.ability(measured(right), measured(right), 0.95)["status"] == "kept"
