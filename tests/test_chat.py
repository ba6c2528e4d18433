"""Conversations through chat templates: nothing of a row is lost or changed without a refusal or a counted note."""

import json
import math
from pathlib import Path

import pytest

from holdfast.data.rows import Row, read_rows
from holdfast.errors import DataError

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = (  # tools, tool calls and tool answers as Qwen2.5 writes them
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</s>\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "</s>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
THINKING = (  # as Qwen3: thinking only after the last question, empty thinking where there is none
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1].strip()"
    " if '</think>' in m.content else '') %}{% set said = m.content.split('</think>')[-1].strip() %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
NO_SYSTEM = CHATML.replace("<{{ m.role }}>", "{% if m.role in ('user', 'assistant') %}<{{ m.role }}>").replace(
    "</s>\n", "</s>\n{% endif %}"
)

USER, ANSWER = {"role": "user", "content": "hi there"}, {"role": "assistant", "content": "Yo man"}
SYSTEM = {"role": "system", "content": "be brief"}
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]
CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
SAID = {"role": "tool", "content": "18 C", "tool_call_id": "c1"}


@pytest.fixture(scope="module")
def plain():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["a", "[UNK]", "<s>", "</s>"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def read(plain, tmp_path: Path):
    """read(template, row, ...): the rows and notes of a file of these rows under that template."""

    def go(template: str, *rows: dict, train_on: str = "assistant") -> tuple[list[Row], list[str]]:
        plain.chat_template = template
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        notes: list[str] = []
        return read_rows("t.jsonl", base_dir=tmp_path, tokenizer=plain, notes=notes, train_on=train_on), notes

    return go


def talk(*messages: dict, **columns) -> dict:
    return {"messages": list(messages), **columns}


# What is refused: name: (template, row, words of the message).
REFUSED = {
    "tools": (CHATML, talk(USER, ANSWER, tools=WEATHER), ["writes nothing of 'tools'", "Use a model"]),
    "documents": (TOOLS, talk(USER, ANSWER, documents=[{"text": "x1"}]), ["writes nothing of 'documents'"]),
    "tool calls": (CHATML, talk(USER, CALLING), ["'tool_calls' of message 2 (assistant)"]),
    "tool calls, null content": (CHATML, talk(USER, CALLING | {"content": None}), ["'tool_calls' of message 2"]),
    "tool calls, added content": (
        CHATML.replace("{{ m.content }}", "{{ '' + m.content }}"),
        talk(USER, CALLING | {"content": None}),
        ["'tool_calls' of message 2"],
    ),
    "names of calls only": (
        TOOLS.replace(" {{ c.function.arguments | tojson }}", ""),
        talk(USER, CALLING),
        ["'tool_calls' of message 2 (assistant)"],
    ),
    "first call only": (
        TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
        talk(USER, CALLING | {"tool_calls": [CALL, CALL | {"id": "c2"}]}),
        ["'tool_calls' of message 2"],
    ),
    "content beside a call": (
        TOOLS.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}"),
        talk(USER, CALLING | {"content": "Let me look."}),
        ["writes nothing, or not all, of message 2 (assistant): 'Let me look.'"],
    ),
    "calls out of turn": (
        TOOLS,
        talk(USER, CALLING | {"tool_calls": [CALL, CALL | {"id": "c2"}]}, SAID | {"tool_call_id": "c2"}, SAID, ANSWER),
        ["message 3 (tool) answers call 'c2' out of turn", "in the order of the calls"],
    ),
    "reasoning": (CHATML, talk(USER, ANSWER | {"reasoning_content": "I muse"}), ["'reasoning_content' of message 2"]),
    "thinking": (CHATML, talk(USER, ANSWER | {"thinking": "I muse"}), ["'thinking' of message 2"]),
    "two thoughts": (
        THINKING,
        talk(USER, ANSWER | {"thinking": "I muse", "reasoning": "I do not"}),
        ["thinking and reasoning", "differ here"],
    ),
    "thinking in the answer": (
        CHATML.replace("m.content", "m.content.split('</think>')[-1]"),
        talk(USER, ANSWER | {"content": "<think>I muse</think>Yo man"}),
        ["leaves the thinking out of the answer", "prompt and completion as text"],
    ),
    "name": (
        CHATML,
        talk(USER | {"name": "Bob"}, ANSWER),
        ["writes nothing, or not all, of 'name' of message 1 (user)"],
    ),
    "prefix": (
        CHATML,
        talk(USER, ANSWER | {"prefix": True}),
        ["writes nothing, or not all, of 'prefix' of message 2"],
    ),
    "an unknown key": (
        CHATML,
        talk(USER | {"mood": 3}, ANSWER),
        ["writes nothing, or not all, of 'mood' of message 1"],
    ),
    "system": (
        NO_SYSTEM,
        talk(SYSTEM, USER, ANSWER),
        ["writes nothing, or not all, of message 1 (system): 'be brief'"],
    ),
    "a long system": (
        CHATML.replace("m.content", "m.content[:60]"),
        talk(SYSTEM | {"content": "x " * 99 + "end"}, USER, ANSWER),
        ["writes nothing, or not all, of message 1 (system): "],
    ),
    "a system of one letter": (NO_SYSTEM, talk(SYSTEM | {"content": "s"}, USER, ANSWER), ["message 1 (system): 's'"]),
    "developer": (NO_SYSTEM, talk(SYSTEM | {"role": "developer"}, USER, ANSWER), ["of message 1 (developer)"]),
    "tool": (NO_SYSTEM, talk(USER, SAID, ANSWER), ["writes nothing, or not all, of message 2 (tool): '18 C'"]),
    "column system": (
        NO_SYSTEM,
        talk(USER, ANSWER, system="be brief"),
        ["writes nothing, or not all, of message 1 (system)"],
    ),
    "two systems": (CHATML, talk(SYSTEM, USER, ANSWER, system="x"), ["a column 'system' and a message"]),
    "system as assistant": (
        CHATML.replace("<{{ m.role }}>", "{% if m.role == 'user' %}<user>{% else %}<assistant>{% endif %}"),
        talk(SYSTEM, USER, ANSWER),
        ["writes message 1 (system) as if the assistant had said it"],
    ),
    "weight 0": (CHATML, talk(USER, ANSWER | {"weight": 0}), ["not to be trained on (weight 0)", "Remove the row"]),
    "train false": (CHATML, talk(USER, ANSWER | {"train": False}), ["not to be trained on (train False)"]),
    "weight below 0": (
        CHATML,
        talk(USER, ANSWER | {"weight": -0.5}),
        ["message 2 (assistant) has the weight -0.5; a weight is a number, 0 or more", "Remove the key"],
    ),
    "weight as text": (CHATML, talk(USER, ANSWER | {"weight": "0.5"}), ["has the weight '0.5'; a weight is a number"]),
    "no number": (CHATML, talk(USER, ANSWER | {"weight": math.nan}), ["has the weight nan; a weight is a number"]),
    "no end": (CHATML, talk(USER, ANSWER | {"weight": math.inf}), ["has the weight inf; a weight is a number"]),
    "train in part": (CHATML, talk(USER, ANSWER | {"train": 0.5}), ["has the train 0.5; known are 0, 1"]),
    "weight of the user": (CHATML, talk(USER | {"weight": -2}, ANSWER), ["message 1 (user) has the weight -2"]),
    "train as text": (CHATML, talk(USER, ANSWER | {"train": "false"}), ["has the train 'false'"]),
    "sharegpt weight": (
        CHATML,
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo", "weight": 0}]},
        ["not to be trained on (weight 0)"],
    ),
    "lower case": (
        CHATML.replace("m.content", "m.content | lower"),
        talk(USER, ANSWER),
        ["changes the answer: ", "yo"],
    ),
    "replaced": (
        CHATML.replace("m.content", "m.content | replace('a', 'e')"),
        talk(USER, ANSWER),
        ["changes the answer: the row has 'Yo man', and 'Yo men"],
    ),
    "joined lines": (
        CHATML.replace("m.content", "m.content.split() | join(' ')"),
        talk(USER, ANSWER | {"content": "def f():\n    pass"}),
        ["changes the answer"],
    ),
    "only the end text": (CHATML, talk(USER, ANSWER | {"content": "</s>"}), ["message 2 (assistant), is empty"]),
    "tools as bad text": (TOOLS, talk(USER, ANSWER, tools="[{"), ["'tools' is text, and not valid JSON"]),
    "tools as a word": (TOOLS, talk(USER, ANSWER, tools='"weather"'), ["'tools' is not a list of objects"]),
    "tools as an object": (TOOLS, talk(USER, ANSWER, tools=WEATHER[0]), ["'tools' is not a list of objects"]),
    "calls as a word": (TOOLS, talk(USER, CALLING | {"tool_calls": "7"}), ["tool_calls is not a list of objects"]),
    "nan in a call": (
        TOOLS,
        talk(USER, CALLING | {"tool_calls": [{"function": {"name": "f", "arguments": {"x": float("inf")}}}]}),
        ["tool_calls holds a number that is not finite"],
    ),
    "a switch": (
        CHATML,
        talk(USER, ANSWER, chat_template_kwargs={"enable_thinking": True}),
        ["writes nothing of 'enable_thinking'"],
    ),
    "a switch of ours": (
        CHATML,
        talk(USER, ANSWER, chat_template_kwargs={"add_generation_prompt": True}),
        ["sets 'add_generation_prompt'", "no variable of a template"],
    ),
    "switches as a list": (CHATML, talk(USER, ANSWER, chat_template_kwargs=[1]), ["is not an object"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_template_loses_is_refused(name, read):
    template, row, words = REFUSED[name]
    with pytest.raises(DataError) as caught:
        read(template, row)
    told = str(caught.value)
    assert told.startswith("t.jsonl:1: ") and [word for word in words if word not in told] == []
    assert caught.value.cure and "order of the roles" not in told


# What is trained: name: (template, row, prompt or None, completion, notes).
KEPT = {
    "tools": (TOOLS, talk(USER, CALLING, tools=WEATHER), None, '<call>weather {"city": "Paris"}</s>\n', []),
    "tools as text": (
        TOOLS,
        talk(USER, CALLING, tools=json.dumps(WEATHER)),
        f"<tools>{json.dumps(WEATHER[0])}</s>\n<user>hi there</s>\n<assistant>",
        '<call>weather {"city": "Paris"}</s>\n',
        [],
    ),
    "each tool as text": (
        TOOLS,
        talk(USER, ANSWER, tools=[json.dumps(WEATHER[0])]),
        f"<tools>{json.dumps(WEATHER[0])}</s>\n<user>hi there</s>\n<assistant>",
        "Yo man</s>\n",
        [],
    ),
    "no tools": (CHATML, talk(USER, ANSWER, tools=[], documents=None), None, "Yo man</s>\n", []),
    "null content": (
        TOOLS.replace("{{ m.content }}", "{{ '' + m.content }}"),
        talk(USER, CALLING | {"content": None}),
        None,
        '<call>weather {"city": "Paris"}</s>\n',
        [],
    ),
    "arguments as text": (
        TOOLS,
        talk(USER, CALLING | {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": "b"}'}}]}),
        None,
        '<call>f {"a": "b"}</s>\n',
        ["tool call arguments given as JSON text are passed on as objects, "
         "as the chat template wants (1 row, first t.jsonl:1)"],
    ),
    "no arguments as text": (
        TOOLS,
        talk(USER, CALLING | {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}),
        None,
        "<call>f {}</s>\n",
        ["tool call arguments given as JSON text are passed on as objects, "
         "as the chat template wants (1 row, first t.jsonl:1)"],
    ),
    "arguments as text, as the template wants": (
        TOOLS.replace("c.function.arguments | tojson", "'' + c.function.arguments"),
        talk(USER, CALLING | {"tool_calls": [{"function": {"name": "f", "arguments": '{"a":"b"}'}}]}),
        None,
        '<call>f {"a":"b"}</s>\n',
        [],
    ),
    "arguments as objects where text is wanted": (
        TOOLS.replace("c.function.arguments | tojson", "'' + c.function.arguments"),
        talk(USER, CALLING),
        None,
        '<call>weather {"city": "Paris"}</s>\n',
        ["tool call arguments are passed on as JSON text, as the chat template wants (1 row, first t.jsonl:1)"],
    ),
    "arguments as text where objects are wanted": (
        TOOLS.replace("c.function.arguments | tojson", "c.function.arguments | items | list"),
        talk(USER, CALLING | {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": "b"}'}}]}),
        None,
        "<call>f [('a', 'b')]</s>\n",
        ["tool call arguments given as JSON text are passed on as objects, "
         "as the chat template wants (1 row, first t.jsonl:1)"],
    ),
    "ids of calls": (
        TOOLS,
        talk(USER, CALLING, SAID | {"name": "weather"}, ANSWER),
        None,
        "Yo man</s>\n",
        [
            "the chat template writes nothing of the key 'tool_call_id' (1 message, first t.jsonl:1)",
            "the chat template writes nothing of the key 'name' (1 message, first t.jsonl:1)",
        ],
    ),
    "bookkeeping": (
        CHATML,
        talk(USER | {"id": "u1"}, ANSWER, source="web", level=2),
        None,
        "Yo man</s>\n",
        [
            "the chat template writes nothing of the key 'id' (1 message, first t.jsonl:1)",
            "column 'source' is not used (1 row, first t.jsonl:1)",
            "column 'level' is not used (1 row, first t.jsonl:1)",
        ],
    ),
    "reasoning": (
        THINKING,
        talk(USER, ANSWER | {"reasoning": "I muse"}),
        None,
        "<think>\nI muse\n</think>\n\nYo man</s>\n",
        [],
    ),
    "thinking in the answer": (
        THINKING,
        talk(USER, ANSWER | {"content": "<think>I muse</think>Yo man"}),
        None,
        "<think>\nI muse\n</think>\n\nYo man</s>\n",
        ["the chat template changes the blanks and line breaks around 1 answer (first t.jsonl:1)"],
    ),
    "no thinking": (
        THINKING,
        talk(USER, ANSWER),
        None,
        "<think>\n\n</think>\n\nYo man</s>\n",
        [r"the chat template puts '<think>\n\n</think>' before 1 answer, and it is trained on (first t.jsonl:1)"],
    ),
    "thinking opened by the prompt": (
        THINKING.split("{% if enable_thinking")[0] + "<think>\n{% endif %}",
        talk(USER, ANSWER | {"content": "<think>\nI muse\n</think>\n\nYo man"}),
        "<user>hi there</s>\n<assistant><think>\n",
        "I muse\n</think>\n\nYo man</s>\n",
        [],
    ),
    "earlier thinking": (
        THINKING,
        talk(USER, ANSWER | {"content": "<think>I muse</think>Yo man"}, USER, ANSWER | {"reasoning_content": "m"},
             USER, ANSWER | {"reasoning_content": "I do"}),
        None,
        "<think>\nI do\n</think>\n\nYo man</s>\n",
        [
            "only the last answer of 1 conversation with several answers is trained on (first t.jsonl:1)",
            "the chat template leaves out the thinking of 1 answer before the last one (first t.jsonl:1)",
        ],
    ),
    "a switch": (
        THINKING,
        talk(USER, ANSWER, chat_template_kwargs='{"enable_thinking": false}'),
        "<user>hi there</s>\n<assistant><think>\n\n</think>\n\n",
        "Yo man</s>\n",
        [],
    ),
    "a switch at its default": (
        THINKING,
        talk(USER, ANSWER | {"thinking": "I muse"}, chat_template_kwargs={"enable_thinking": True}),
        None,
        "<think>\nI muse\n</think>\n\nYo man</s>\n",
        [],
    ),
    "a switch that is off and unknown": (
        CHATML,
        talk(USER, ANSWER, chat_template_kwargs={"enable_thinking": False}),
        None,
        "Yo man</s>\n",
        ["the tokenizer's chat template does not know 'enable_thinking' of chat_template_kwargs "
         "(1 row, first t.jsonl:1)"],
    ),
    "trimmed": (
        CHATML.replace("m.content", "m.content | trim"),
        talk(USER, ANSWER | {"content": " Yo man\n"}),
        None,
        "Yo man</s>\n",
        ["the chat template changes the blanks and line breaks around 1 answer (first t.jsonl:1)"],
    ),
    "rewritten prompt": (
        CHATML.replace("m.content", "(m.content | upper if m.role == 'user' else m.content)"),
        talk(USER, ANSWER),
        "<user>HI THERE</s>\n<assistant>",
        "Yo man</s>\n",
        ["the chat template does not write 1 message of the prompts as they stand (first t.jsonl:1)"],
    ),
    "escaped prompt": (
        CHATML.replace("m.content", "(m.content | tojson if m.role == 'tool' else m.content)"),
        talk(USER, {"role": "tool", "content": 'a "b"\n'}, ANSWER),
        '<user>hi there</s>\n<tool>"a \\"b\\"\\n"</s>\n<assistant>',
        "Yo man</s>\n",
        [],
    ),
    "weights": (
        CHATML,
        talk(USER | {"weight": 0}, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1, "train": True}),
        None,
        "Yo man</s>\n",
        [],
    ),
    "an earlier answer to be trained on": (
        CHATML,
        talk(USER, ANSWER | {"train": True}, USER, ANSWER),
        None,
        "Yo man</s>\n",
        [
            "only the last answer of 1 conversation with several answers is trained on (first t.jsonl:1)",
            "1 message before the last answer marked to be trained, and only the last answer is (first t.jsonl:1)",
        ],
    ),
    "an empty system": (
        CHATML,
        talk(SYSTEM | {"content": ""}, USER, ANSWER),
        "<system></s>\n<user>hi there</s>\n<assistant>",
        "Yo man</s>\n",
        ["1 message without content in the prompts (first t.jsonl:1)"],
    ),
    "column system": (
        CHATML,
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "system": "be brief"},
        "<system>be brief</s>\n<user>hi</s>\n<assistant>",
        "yo</s>\n",
        [],
    ),
    "a part": (
        CHATML,
        talk(USER | {"content": [{"type": "text", "text": "hi"}]}, ANSWER),
        "<user>hi</s>\n<assistant>",
        "Yo man</s>\n",
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_stays_is_trained_and_what_changes_is_noted(name, read):
    template, row, prompt, completion, notes = KEPT[name]
    last = any("only the last answer" in note for note in notes)
    (found,), told = read(template, row, train_on="last" if last else "assistant")
    assert prompt is None or found.prompt == prompt
    assert found.completion == completion
    assert told == notes


def test_notes_are_counted_over_the_rows(read):
    rows = [talk(USER, ANSWER)] * 3 + [talk(USER, ANSWER, USER, ANSWER)] * 5
    _, told = read(CHATML, *rows, train_on="last")
    assert told == ["only the last answer of 5 conversations with several answers is trained on (first t.jsonl:4)"]


def test_a_loss_in_one_row_alone_is_found(read):
    """The kind of message is fine, and this row's text is dropped for what it says."""
    template = CHATML.replace("{{ m.content }}", "{% if 'secret' not in m.content %}{{ m.content }}{% endif %}")
    rows = [talk(SYSTEM, USER, ANSWER)] * 2 + [talk(SYSTEM | {"content": "secret"}, USER, ANSWER)]
    with pytest.raises(
        DataError, match=r"t\.jsonl:3: .* writes nothing, or not all, of message 1 \(system\): 'secret'"
    ):
        read(template, *rows)


def test_tools_of_each_row_are_looked_for(read):
    other = [{"type": "function", "function": {"name": "clock"}}]
    template = TOOLS.replace("for t in tools", "for t in tools if t.function.name != 'clock'")
    with pytest.raises(DataError, match=r"t\.jsonl:2: .* writes nothing of 'tools'"):
        read(template, talk(USER, ANSWER, tools=WEATHER), talk(USER, ANSWER, tools=WEATHER + other))


@pytest.mark.parametrize(
    ("raising", "row", "what", "cure"),
    [
        (
            "{{ raise_exception('roles must alternate') if (m.role == 'user') != (loop.index0 % 2 == 0) }}",
            talk(USER, ANSWER, ANSWER),
            "(roles must alternate), at message 3 (assistant)",
            "Check the order of the roles.",
        ),
        (
            "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
            talk(SYSTEM, USER, ANSWER),
            "(System role not supported), at message 1 (system)",
            "Put that text into the first message of the user, or use another model.",
        ),
        (
            "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}",
            talk(USER, CALLING, SAID, ANSWER),
            "(no tools here), at message 3 (tool)",
            "The words in brackets are the template's own",
        ),
        ("{{ m.content + 3 }}", talk(USER, ANSWER), "(can only concatenate str", "The words in brackets"),
        ("{{ 1 / 0 }}", talk(USER, ANSWER), "(division by zero), at message 1 (user)", "The words in brackets"),
        ("{{ m.nothing.more }}", talk(USER, ANSWER), "has no attribute 'nothing'", "The words in brackets"),
    ],
)  # fmt: skip
def test_a_complaint_of_the_template_names_the_message(raising, row, what, cure, read):
    with pytest.raises(DataError) as caught:
        read(CHATML.replace("<{{ m.role }}>", f"<{{{{ m.role }}}}>{raising}"), row)
    assert what in caught.value.what and caught.value.cure.startswith(cure)


def test_a_template_that_does_not_only_append_shows_where(read):
    template = CHATML.replace("<assistant>", "<assistant><think>\n")
    with pytest.raises(
        DataError, match=r"'assistant><think>\\n' before the answer, 'assistant>Yo man</s>\\n' with it"
    ):
        read(template, talk(USER, ANSWER))


def test_the_filling_of_a_table_is_left_out(plain, tmp_path):
    import pyarrow
    from pyarrow import parquet

    plain.chat_template = TOOLS
    more = {"function": {"name": "clock", "arguments": {"zone": "CET"}}}
    rows = [talk(USER, CALLING), talk(USER, CALLING | {"tool_calls": [more]})]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    notes: list[str] = []
    found = read_rows("t.parquet", base_dir=tmp_path, tokenizer=plain, notes=notes)
    assert [row.completion for row in found] == [
        '<call>weather {"city": "Paris"}</s>\n', '<call>clock {"zone": "CET"}</s>\n',
    ]  # fmt: skip
    assert notes == ["nulls inside tools and tool calls are taken for the filling of a table, and left out "
                     "(2 rows, first t.parquet:1)"]  # fmt: skip


def test_a_null_of_json_is_an_argument(read):
    call = {"function": {"name": "f", "arguments": {"x": None}}}
    (row,), _ = read(TOOLS, talk(USER, CALLING | {"tool_calls": [call]}))
    assert row.completion == '<call>f {"x": null}</s>\n'


def test_templates_of_many_families(read):
    """The templates that TRL ships: each plain conversation is trained in full, or refused for a reason."""
    trl = pytest.importorskip("trl")
    kept = 0
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        if path.stem.startswith(("idefics", "llava", "smolvlm")):
            continue  # for images: no plain text at all
        try:
            (row,), _ = read(path.read_text(encoding="utf-8"), talk(USER, ANSWER))
        except DataError as error:
            assert "renders the prompt differently" in error.what, path.name
            continue
        kept += 1
        assert "hi there" in row.prompt and "Yo man" in row.completion, path.name
    assert kept > 20


def test_several_answers_under_templates_of_many_families(read):
    """Each answer is trained where the template writes it, or the template is refused for changing what it wrote."""
    trl = pytest.importorskip("trl")
    kept, refused = [], []
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        if path.stem.startswith(("idefics", "llava", "smolvlm")):
            continue
        try:
            messages = (USER, ANSWER, USER, ANSWER | {"content": "No sir"})
            (row,), _ = read(path.read_text(encoding="utf-8"), talk(*messages))
        except DataError as error:
            assert "renders the prompt differently" in error.what or "does not only append at message 2" in error.what
            refused.append(path.stem)
            continue
        whole = row.prompt + row.completion
        said = "".join(whole[turn.start : turn.end] for turn in row.turns)
        assert said.index("Yo man") < said.index("No sir") and "hi there" not in said, path.name
        kept.append(path.stem)
    assert {"qwen2_5", "llama3", "gemma3", "qwen3_training"} <= set(kept) and "qwen3" in refused
