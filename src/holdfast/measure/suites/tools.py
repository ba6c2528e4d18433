"""The tools suite: does the model call the right function with the right arguments, and none where none fits?

The prompt gives JSON schemas of functions and a request. Where the chat template writes `tools`, it does so in its own
way (thinking is turned off if it has a switch); else the schemas stand in the request, with the form of a call. Two
calls in three requests fit one function; the third fits none, and the right answer is in words.

    one function         the one that fits, or comes close, is all there is
    several functions    it stands among two others, in a drawn order

An item is right when the answer holds one call of the right function with exactly the arguments that the request
states (measure/calls.py says which ways of writing a call are read; optional ones may be left out or be the default),
or words and no call where none fits. A model that never calls is right in a third of the items, so that is the chance:
it, and a model that always calls and wrongly, are "not measurable". The shares of valid calls (readable, of offered
functions), right functions, right arguments and abstentions are figures beside the score. Thinking that a template
cannot turn off must end within the 160 tokens of an answer.

300 items, 200 of them with a call; 120 were written by hand, the others with templates (tools/make_items.py).
Simulated (benchmarks/suite_power.py, 200 checks, base right in 0.9, a tenth of the marks change): a true loss of 5
points of the score is called "lost" with probability 0.81, none with 0.04. No public model that calls functions has
been measured yet: the tests plant the answers. SmolLM2-135M-Instruct called nothing (8 items).
"""

from __future__ import annotations

import contextlib
import json
from functools import partial
from typing import Any

from holdfast.measure.calls import read_calls, same_arguments
from holdfast.measure.probe import Ask, Group, Probe, Suite
from holdfast.measure.suites.in_context import shuffled
from holdfast.measure.suites.instructions import MADE, in_turn, read_data
from holdfast.measure.thoughts import heard, rendered, switch_of

LIMIT = 100  # requests with a call of each task; half as many without one
MAX_TOKENS = 160
OTHERS = 2  # functions beside the one that fits
# which of a function's requests a task asks: those with a call, and those without one
ASKS = {"one function": ((0, 1), (0,)), "several functions": ((2, 3), (1,))}
MADE_ASKS = {"one function": ((0, 1, 2), (0, 1)), "several functions": ((3, 4, 5), (2, 3))}
Function = dict[str, Any]
Asked = tuple[Function, str, str, dict[str, Any] | None]  # the function, which request, its text, its arguments


def schema_of(function: Function) -> dict[str, Any]:
    """The JSON schema of the parameters: those without a default are required."""
    properties = function["parameters"]
    required = [name for name, one in properties.items() if "default" not in one]
    return {"type": "object", "properties": properties, "required": required}


def tool_of(function: Function) -> dict[str, Any]:
    """A function as chat templates want it."""
    about = {"name": function["name"], "description": function["description"]}
    return {"type": "function", "function": {**about, "parameters": schema_of(function)}}


def prompt_of(ask: Ask, functions: list[Function], request: str, options: dict[str, Any]) -> str:
    """The prompt: by the template's own tools where it writes every schema, else by ours.

    options: variables of the template, such as that for thinking.
    """
    tools = [tool_of(f) for f in functions]
    with contextlib.suppress(Exception):  # no template, or one that raises what it likes
        text = rendered(ask.tokenizer, [{"role": "user", "content": request}], {"tools": tools, **options})
        if request in text and all(f["name"] in text and f["description"] in text for f in functions):
            return text
    listed = "\n".join(json.dumps(tool["function"]) for tool in tools)
    form = '{"name": "the function", "arguments": {"the parameter": "its value"}}'
    ours = (
        f"You can call these functions:\n{listed}\nIf one of them fits the request, answer only with the call: "
        f"{form}\nIf none fits, answer in words.\nRequest: {request}"
    )
    return rendered(ask.tokenizer, [{"role": "user", "content": ours}], options) if options else ask.chat(ours)


def marks(output: str, functions: list[Function], wanted: dict[str, Any] | None) -> dict[str, float]:
    """What is right about an output; `wanted` is {"name", "arguments"}, or None where no function fits."""
    schemas = {f["name"]: schema_of(f) for f in functions}
    said = read_calls(output, schemas)
    if wanted is None:
        return {"abstained": float(not said.tried and any(c.isalnum() for c in heard(output).answer))}
    valid = bool(said.calls) and all(call.name in schemas for call in said.calls)
    named = valid and len(said.calls) == 1 and said.calls[0].name == wanted["name"]
    right = named and same_arguments(said.calls[0].arguments, wanted["arguments"], schemas[wanted["name"]])
    return {"valid call": float(valid), "right function": float(named), "right arguments": float(right)}


def judge(output: str, functions: list[Function], wanted: dict[str, Any] | None) -> float:
    """1 for the right call, or for none where none fits, else 0."""
    found = marks(output, functions, wanted)
    return found["abstained"] if wanted is None else found["right arguments"]


def build_suite(ask: Ask) -> Suite:
    """Two tasks, each of `limit` requests with a call and half as many without."""
    data = read_data("tools")
    limit, functions, switch = ask.limit or LIMIT, data["functions"], switch_of(ask.tokenizer)
    options = {switch: False} if switch else {}
    probes, groups = [], []
    for task, places in ASKS.items():
        written = [_asked(f, f, places) for f in functions]
        made = [_asked(f, data[MADE][f["name"]], MADE_ASKS[task], MADE) for f in functions]
        calls, none = ([[one for some in part for one in some[k]] for part in (written, made)] for k in (0, 1))
        asked = in_turn(f"{task}/{ask.seed}", *calls)[:limit]
        asked += in_turn(f"{task}/none/{ask.seed}", *none)[: max(1, limit // 2)]
        probes += [_probe(ask, task, functions, options, *one) for one in asked]
        never = sum(arguments is None for *_, arguments in asked) / len(asked)
        groups.append(Group(task, data["version"], round(never, 4), "right"))
    settings = {"limit": limit, "seed": ask.seed, "data_version": data["version"]}
    return Suite("tools", tuple(groups), tuple(probes), settings)


def _asked(
    function: Function, kept: dict[str, Any], places: tuple[tuple[int, ...], tuple[int, ...]], kind: str = ""
) -> tuple[list[Asked], list[Asked]]:
    """The requests of a function at some places: with a call, and without one."""
    calls = [(function, f"{kind}{k}", kept["calls"][k]["request"], kept["calls"][k]["arguments"]) for k in places[0]]
    return calls, [(function, f"none{kind}{k}", kept["none"][k], None) for k in places[1]]


def _probe(
    ask: Ask,
    task: str,
    functions: list[Function],
    options: dict[str, Any],
    fits: Function,
    place: str,
    request: str,
    arguments: dict[str, Any] | None,
) -> Probe:
    """One request; `fits` is the function that fits or, without arguments, comes close."""
    others = shuffled(request, [f for f in functions if f is not fits])
    some = [fits, *others[: OTHERS if task == "several functions" else 0]]
    offered = shuffled(f"order/{request}", some)
    wanted = None if arguments is None else {"name": fits["name"], "arguments": arguments}
    return Probe(
        task,
        f"{task}/{fits['name']}/{place}",
        "generate",
        prompt_of(ask, offered, request, options),
        judge=partial(judge, functions=offered, wanted=wanted),
        marks=partial(marks, functions=offered, wanted=wanted),
        expected="words and no call" if wanted is None else json.dumps(wanted),
        max_tokens=MAX_TOKENS,
        with_special=True,
    )
