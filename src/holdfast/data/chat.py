"""Conversations through a tokenizer's chat template, and a check that nothing of them is lost on the way.

A template is somebody's program: it may leave out a message, a key or the tools, change the answer, or fill in text
of its own, all without a word. So the rendered text is compared with the row. That every text stands in it is looked
up in each row; what a key changes is tried once for each kind of message, by rendering without it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast.data.calls import MARK, arguments, check_link, functions, in_json, other_calls, respelled, told_by
from holdfast.data.direct import Renderer
from holdfast.data.jsontext import parsed, sound
from holdfast.data.messages import TEMPLATES_CURE, THINKING, Message, from_text, without_nulls
from holdfast.data.notes import BOOKKEEPING, Notes
from holdfast.data.rendered import Pair, Rendered, Turn
from holdfast.data.talk import Talk, all_but, keys_of, kinds_of
from holdfast.data.texts import find, find_answer, leaves, not_appending, short, stands
from holdfast.data.turns import CUT, WEIGHED, flag_of, marks, prefixes, trained, weighed
from holdfast.errors import DataError

OPTIONS = ("tools", "documents", "chat_template_kwargs")  # columns that go to the template
LINKS = {"tool_call_id"}  # says which call a tool answers; the order says it too
AS_TEXT = "Or give prompt and completion as text: that is trained as it stands."

LAST_ONLY = "only the last answer of {n conversation} with several answers is trained on"
FLAGGED = "{n message} before the last answer marked to be trained, and only the last answer is"
OTHERS = "{n message} marked to be trained that the assistant did not say, and only what it says is"
EMPTY = "{n message} without content in the prompts"
THOUGHTS = "the chat template leaves out the thinking of {n answer} before the last one"
REWRITTEN = "the chat template does not write {n message} of the prompts as they stand"
TRIMMED = "the chat template changes the blanks and line breaks around {n answer}"
AS_OBJECTS = "tool call arguments given as JSON text are passed on as objects, as the chat template wants ({n row})"
AS_JSON = "tool call arguments are passed on as JSON text, as the chat template wants ({n row})"
FILLING = "nulls inside tools and tool calls are taken for the filling of a table, and left out ({n row})"


class Chat:
    """Renders the conversations of one data set.

    Args:
        tokenizer: has the chat template; None is refused at the first conversation.
        notes: what is no error and must be said is counted here.
        arrow: the rows come from a table (parquet, hub), which fills missing keys with null.
        train_on: assistant (all its answers), last (its last one, whatever the others are marked), or all (every
            token; then no message can be marked otherwise).
    """

    def __init__(self, tokenizer: Any, notes: Notes, arrow: bool = False, train_on: str = "assistant"):
        self.tokenizer, self.notes, self.arrow, self.train_on = tokenizer, notes, arrow, train_on
        name = str(getattr(tokenizer, "name_or_path", "") or "")
        name = Path(name).name if name.count("/") > 1 else name
        self.template = f"the chat template of {name}" if name else "the tokenizer's chat template"
        self._write, self._end = Renderer(tokenizer), getattr(tokenizer, "eos_token", None) or "\0"
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._gone: dict[tuple, set[str]] = {}  # kind of message: its keys that leave no trace
        self._seen: dict[tuple[str, str], bool] = {}  # option and value: leaves a trace

    def conversation(self, messages: list[Message], row: dict[str, Any], place: str) -> Pair:
        """A whole conversation: all its answers are trained on, but those that are marked not to be.

        What stands behind the last trained answer is cut off: nothing of it is context of a target.
        """
        self._check_unmarked(messages, place)
        if self.train_on == "last":
            if sum(message["role"] == "assistant" for message in messages) > 1:
                self.notes.add(LAST_ONLY, place)
            return self.pair(messages[:-1], messages[-1:], row, place)
        answers = trained(messages, place)
        if answers[-1] < len(messages) - 1:
            self.notes.add(CUT, place)
        last = answers[-1]
        return self.pair(messages[:last], messages[last : last + 1], row, place, answers[:-1])

    def pair(
        self,
        head: list[Message],
        tail: list[Message],
        row: dict[str, Any],
        place: str,
        earlier: Sequence[int] | None = None,
    ) -> Pair:
        """Render so that prompt + completion is exactly the whole conversation.

        Args:
            head: the messages before the answer.
            tail: the answer, one message of the assistant.
            row: the columns; tools, documents and chat_template_kwargs are passed on.
            earlier: which of `head` are answers that are trained on too; None: the completion is, whatever the
                template marks.

        Raises:
            DataError: the template refuses the conversation, loses a part of it or changes the answer.
        """
        if not self.has_template:
            what = f"{place}: chat data, and the tokenizer has no chat template."
            raise DataError(what, f"Use a model with a chat template. Or: {TEMPLATES_CURE}")
        if [m["role"] for m in tail] != ["assistant"]:
            what = f"{place}: the completion is not one message of the assistant, and all of it would be trained on."
            raise DataError(what, "Put what comes before the answer into the prompt; make a row of each answer.")
        self._check_unmarked([*head, *tail], place)
        talk = Talk(
            [self._plain(m, place) for m in head + tail],
            (*(earlier or ()), len(head)),
            place,
            each=earlier is not None,
        )
        talk = replace(talk, options=self._options(row, place))
        self._check_flags(talk)
        self._check_blank(talk)
        talk, prompt, whole = self._texts(talk)
        if not whole.startswith(prompt):
            raise DataError(*not_appending(place, prompt, whole))
        turns = self._turns(talk, prompt, whole)
        self._check_options(talk, prompt, whole)
        said = [whole[turn.start : turn.end] for turn in turns]
        said = said if len(said) == len(talk.answers) else [whole] * len(talk.answers)
        self._check_messages(talk, prompt, whole, said)
        if any(turn.weight != 1 for turn in turns):
            self.notes.add(WEIGHED, place)
        one = len(turns) == 1 and turns[0] == Turn(len(prompt), turns[0].end)
        return Pair(Rendered(prompt), whole[len(prompt) :], () if one else tuple(turns))

    def _turns(self, talk: Talk, prompt: str, whole: str) -> list[Turn]:
        """Where each trained answer stands, with its weight: as the template marks it, else found by its prefixes."""
        if not talk.each:
            return weighed(talk, [Turn(len(prompt), len(whole))])
        marked = marks(talk, whole, self.tokenizer)
        if marked is not None:
            return marked
        return weighed(
            talk, prefixes(talk, whole, lambda count, next_: self._render(talk, count, next_), self.template)
        )

    # What is passed on.

    def _plain(self, message: Message, place: str) -> Message:
        """Tool calls as a list of objects, whatever form the file gives them."""
        calls = message.get("tool_calls")
        if calls is None:
            return message
        where = f"{place}: tool_calls"
        calls = self._dense(parsed(calls, where) if isinstance(calls, str) else calls, place)
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise DataError(f"{where} is not a list of objects.", 'Write [{"function": {"name", "arguments"}}].')
        sound(calls, where)
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        return {**rest, "tool_calls": calls} if calls else rest

    def _options(self, row: dict[str, Any], place: str) -> dict[str, Any]:
        given = {}
        for name in ("tools", "documents"):
            value = self._dense(from_text(row.get(name), f"{place}: column {name!r}"), place)
            if not value:
                continue
            if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
                raise DataError(f"{place}: column {name!r} is not a list of objects.", "Write [{...}, ...].")
            sound(value, f"{place}: column {name!r}")
            given[name] = value
        return given | self._switches(row.get("chat_template_kwargs"), place)

    def _switches(self, value: Any, place: str) -> dict[str, Any]:
        """The template's own variables, such as enable_thinking."""
        where = f"{place}: column 'chat_template_kwargs'"
        value = from_text(value, where)
        if not value:
            return {}
        if not isinstance(value, dict):
            raise DataError(f"{where} is not an object.", 'Write {"variable of the template": value}.')
        sound(value, where)
        taken = set(inspect.signature(self.tokenizer.apply_chat_template).parameters) | {"messages"}
        if wrong := sorted(taken & set(value)):
            raise DataError(f"{where} sets {wrong[0]!r}, which is no variable of a template.", "Remove it there.")
        return {key: item for key, item in value.items() if item is not None}

    def _dense(self, value: Any, place: str) -> Any:
        if not self.arrow:
            return value
        dense, found = without_nulls(value)
        if found:
            self.notes.add(FILLING, place)
        return dense

    # Marks and empty messages.

    def _check_unmarked(self, messages: list[Message], place: str) -> None:
        """Where every token is trained on, no message can say that it is not, or less."""
        flags = [flag_of(message, i, place) for i, message in enumerate(messages)] if self.train_on == "all" else []
        for i, flag in enumerate(flags):
            if flag and flag[1] != 1:
                name = f"message {i + 1} ({messages[i]['role']})"
                what = f"{place}: {name} has the {flag[0]} {flag[1]!r}, and data.train_on is all."
                raise DataError(what, "Remove the key, or set data.train_on: assistant.")

    def _check_flags(self, talk: Talk) -> None:
        for i, message in enumerate(talk.messages):
            flag = flag_of(message, i, talk.place)
            if flag and flag[1] and i not in talk.answers:
                self.notes.add(FLAGGED if message["role"] == "assistant" else OTHERS, talk.place)
            if flag and not flag[1] and i in talk.answers:
                what = f"{talk.place}: the answer is marked not to be trained on ({flag[0]} {flag[1]})."
                raise DataError(what, f"Remove the row, or the key {flag[0]!r} if the answer is to be trained on.")

    def _check_blank(self, talk: Talk) -> None:
        """An empty answer trains the model to stop at once."""
        for i, message in enumerate(talk.messages):
            if message.get("content", "").replace(self._end, "").strip() or message.get("tool_calls"):
                continue
            if i in talk.answers:
                what = f"{talk.place}: the answer, {talk.name(i)}, is empty: the model would learn to say nothing."
                raise DataError(what, "Remove the row or fill it in.")
            self.notes.add(EMPTY, talk.place)

    # Rendering.

    def _render(self, talk: Talk, count: int | None = None, answer_next: bool = False) -> str:
        return self._write(talk.messages[:count], answer_next, talk.options)

    def _both(self, talk: Talk) -> tuple[str, str]:
        return self._render(talk, talk.cut, answer_next=True), self._render(talk)

    def _texts(self, talk: Talk) -> tuple[Talk, str, str]:
        """The conversation in the spelling that the template takes, its prompt, and its whole text."""
        try:
            prompt, whole = self._both(talk)
        except Exception as error:  # a template is somebody's program and raises what it likes
            return self._otherwise(talk, error)
        if texts := arguments(talk, str):
            return self._as_objects(talk, prompt, whole, texts)
        return talk, prompt, whole

    def _as_objects(self, talk: Talk, prompt: str, whole: str, texts: list[str]) -> tuple[Talk, str, str]:
        """Arguments given as JSON text, as objects where the template would not write that text as it stands.

        Most templates turn arguments into JSON themselves, and text into JSON is quoted once more.
        """
        try:
            objects = respelled(talk, lambda text: parsed(text, talk.place), str)
            other = self._both(objects)
        except Exception:  # no JSON, or a template that wants text
            return talk, prompt, whole
        plain = whole
        for text in texts:
            plain = plain.replace(text, sound(parsed(text, talk.place), talk.place))
        if plain == other[1]:
            return talk, prompt, whole
        self.notes.add(AS_OBJECTS, talk.place)
        return objects, *other

    def _otherwise(self, talk: Talk, error: Exception) -> tuple[Talk, str, str]:
        """Try other spellings of the same: "" for no content beside tool calls, arguments as JSON text or objects."""
        filled = replace(talk, messages=[{"content": "", **m} for m in talk.messages])
        for kind, note in ((None, ""), (dict, AS_JSON), (str, AS_OBJECTS)):
            try:
                other = respelled(filled, in_json(kind, talk.place), kind) if kind else filled
                texts = self._both(other)
            except Exception:  # the first error is about what the user wrote
                continue
            if note:
                self.notes.add(note, talk.place)
            return other, *texts
        raise self._refusal(talk, error) from None

    def _refusal(self, talk: Talk, error: Exception) -> DataError:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        at = self._culprit(talk, str(error) or type(error).__name__)
        where = "" if at is None else f", at {talk.name(at)}"
        what = f"{talk.place}: the tokenizer's chat template refuses the row ({said}){where}."
        if "alternate" in said.lower():
            return DataError(what, "Check the order of the roles.")
        if at is not None and talk.messages[at]["role"] in ("system", "developer") and "system" in said.lower():
            return DataError(what, "Put that text into the first message of the user, or use another model.")
        cure = "The words in brackets are the template's own: change the row to what it takes, or use another model."
        return DataError(what, cure)

    def _culprit(self, talk: Talk, said: str) -> int | None:
        """The message that brings the error: a growing conversation is fine until it, or fine again without it."""
        errors = [self._error(replace(talk, messages=talk.messages[: n + 1])) for n in range(len(talk.messages))]
        if said in errors and not any(errors[: errors.index(said)]):
            return errors.index(said)
        without = [self._error(replace(talk, messages=all_but(talk.messages, n))) for n in range(len(talk.messages))]
        return without.index("") if without.count("") == 1 else None

    def _error(self, talk: Talk) -> str:
        try:
            self._render(talk)
        except Exception as error:
            return str(error) or type(error).__name__
        return ""

    # Traces.

    def _same(self, talk: Talk, text: str) -> bool:
        try:
            return self._render(talk) == text
        except Exception:  # what makes the template complain is read by it
            return False

    def _check_options(self, talk: Talk, prompt: str, whole: str) -> None:
        for name, value in talk.options.items():
            if not self._option_shows(talk, name, prompt, whole):
                what = f"{talk.place}: {self.template} writes nothing of {name!r}, which the row gives."
                if name not in OPTIONS and not value:
                    self.notes.add(f"{self.template} does not know {name!r} of chat_template_kwargs ({{n row}})",
                                   talk.place)  # fmt: skip
                    continue
                raise DataError(what, "Use a model whose template writes it, or remove it from the data.")

    def _option_shows(self, talk: Talk, name: str, prompt: str, whole: str) -> bool:
        value = talk.options[name]
        if name in OPTIONS:
            texts = list(leaves([item.get("function", item).get("name") if name == "tools" else item
                                  for item in value if isinstance(item.get("function", item), dict)]))  # fmt: skip
            if self._seen.get((name, "")) and texts and all(stands(text, prompt) for text in texts):
                return True
            rest: list[Any] = [all_but(value, k) or None for k in range(len(value))]
            shows = all(self._other(talk, name, fewer, prompt, whole) for fewer in rest)
            self._seen[name, ""] = shows
            return shows
        key = (name, repr(value))
        if not self._seen.get(key):
            others = [not value] if isinstance(value, bool) else [None, f"{value}{MARK}"]
            self._seen[key] = any(self._other(talk, name, other, prompt, whole) for other in others)
        return self._seen[key]

    def _other(self, talk: Talk, name: str, value: Any, prompt: str, whole: str) -> bool:
        """Whether another value of an option (None: without it) gives another text."""
        options = {key: item for key, item in {**talk.options, name: value}.items() if item is not None}
        try:
            return self._both(replace(talk, options=options)) != (prompt, whole)
        except Exception:
            return True

    def _check_messages(self, talk: Talk, prompt: str, whole: str, said: list[str]) -> None:
        """said: the text that is trained on, of each of the talk's answers."""
        at = 0  # contents stand in the order of the messages, so the search goes on behind the last one
        said_by = dict(zip(talk.answers, said, strict=True))
        filled = [keys_of(message) for message in talk.messages]
        for i, (message, keys, kind) in enumerate(zip(talk.messages, filled, kinds_of(talk, filled), strict=True)):
            if kind not in self._gone:
                self._gone[kind] = {key for key in keys if self._vanishes(talk, i, key, whole)}
                self._check_role(talk, i, whole)
            for key in keys:
                gone = key in self._gone[kind]
                if key != "content":
                    self._check_key(talk, i, key, whole, gone)
                    continue
                last = i == talk.cut
                how, end = find_answer(message, whole, at, prompt) if last else find(message["content"], whole, at)
                if gone or not how:
                    self._check_lost(talk, i, whole)
                at = end
                if i in said_by:
                    self._check_answer(talk, i, how, said_by[i])
                else:
                    self._note_change(talk, how)
        for i, text in said_by.items():
            self._note_thinking(talk, i, text)

    def _check_role(self, talk: Talk, i: int, whole: str) -> None:
        """A message of the system or a tool must not look like one of the assistant."""
        role = talk.messages[i]["role"]
        if role not in ("user", "assistant") and self._same(talk.having(i, role="assistant"), whole):
            what = f"{talk.place}: {self.template} writes {talk.name(i)} as if the assistant had said it."
            raise DataError(what, f"Use a model whose template knows the role {role!r}, or change the role.")

    def _check_key(self, talk: Talk, i: int, key: str, whole: str, gone: bool) -> None:
        value, soft = talk.messages[i][key], self._is_soft(talk, i, key)
        shown = all(stands(text, whole) for text in leaves(told_by(key, value)))
        if gone and soft:
            lost = not shown or key not in THINKING
        else:
            lost = (gone or not shown) and self._vanishes(talk, i, key, whole)
        if not lost:
            return
        if key in LINKS:
            check_link(talk, i)
        if not soft:
            what = f"{talk.place}: {self.template} writes nothing, or not all, of {key!r} of {talk.name(i)}."
            raise DataError(what, f"Use a model whose template writes it, or remove it from the data. {AS_TEXT}")
        text = THOUGHTS if key in THINKING else f"the chat template writes nothing of the key {key!r} ({{n message}})"
        self.notes.add(text, talk.place)

    def _is_soft(self, talk: Talk, i: int, key: str) -> bool:
        """What may leave no trace, with a note."""
        if key in THINKING:
            return i not in talk.answers  # most templates leave earlier thinking out on purpose
        return key in BOOKKEEPING | LINKS or (key == "name" and talk.messages[i]["role"] == "tool")

    def _vanishes(self, talk: Talk, i: int, key: str, whole: str) -> bool:
        """Whether some part of a key can be changed without any change of the text."""
        value = talk.messages[i][key]
        if key == "content":
            ends = (value + MARK, *([] if "</think>" in value else [MARK + value]))  # earlier thinking may go
            return any(self._same(talk.having(i, content=other), whole) for other in ends)
        if key == "tool_calls":
            return any(self._same(talk.having(i, tool_calls=calls), whole) for calls in other_calls(value))
        without: dict[str, Any] = dict.fromkeys(THINKING if key in THINKING else (key,))
        others = [without, {key: value + MARK}] if isinstance(value, str) and key not in THINKING else [without]
        return all(self._same(talk.having(i, **other), whole) for other in others)

    def _check_lost(self, talk: Talk, i: int, whole: str) -> None:
        """Refuse a content that leaves no trace, or the end of which leaves none."""
        content = talk.messages[i]["content"]
        if i not in talk.answers and "</think>" in content and not content.split("</think>")[-1].strip():
            return
        if self._vanishes(talk, i, "content", whole):
            what = f"{talk.place}: {self.template} writes nothing, or not all, of {talk.name(i)}: {short(content)}."
            raise DataError(what, "Use a model whose template writes it, or move its text into another message.")

    def _note_change(self, talk: Talk, how: str) -> None:
        if how in ("rest", ""):
            self.notes.add(THOUGHTS if how else REWRITTEN, talk.place)

    def _check_answer(self, talk: Talk, i: int, how: str, completion: str) -> None:
        """An answer must be trained as the row has it; blanks around it and around thinking may change."""
        content = talk.messages[i]["content"]
        if how == "rest":
            what = f"{talk.place}: {self.template} leaves the thinking out of the answer that is trained on."
            raise DataError(what, f"Use a model whose template keeps it, or remove the thinking. {AS_TEXT}")
        if how not in ("whole", "parts"):
            what = f"{talk.place}: {self.template} changes the answer: the row has {short(content)}, "
            raise DataError(what + f"and {short(completion)} would be trained on.", f"Use another model. {AS_TEXT}")
        if content not in completion and not (content.startswith("<think>") and how == "whole"):
            self.notes.add(TRIMMED, talk.place)

    def _note_thinking(self, talk: Talk, i: int, completion: str) -> None:
        """Some templates put empty thinking before an answer that has none, and so train not to think."""
        message = talk.messages[i]
        content = message.get("content", "").strip()
        names = [f.get("name") for f in functions(message.get("tool_calls", ()))]
        before = completion.partition(content or str(names[0] if names else ""))[0]
        thought = re.search(r"(<think>\s*)?</think>", before)
        if thought and "</think>" not in content and not any(message.get(key) for key in THINKING):
            text = f"the chat template puts {thought[0]!r} before {{n answer}}, and it is trained on"
            self.notes.add(text, talk.place)
