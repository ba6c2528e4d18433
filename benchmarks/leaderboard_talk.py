"""A made set of conversations: a ticket, where it goes, a short question, and an answer that needs both turns.

Every answer of the assistant is trained on. Half of the test rows ask for the first answer (the queue, as in the
tickets), half for the last one, and only the exact text counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIRST = "This belongs to {queue}. Shall I pass it on?"
REPLIES = {  # of the user -> the assistant's answer
    "Yes, please.": "Done: {queue} has it now.",
    "No, not yet.": "Good, it stays with you. {queue} does not know of it.",
    "Only tomorrow, please.": "{queue} will get it tomorrow morning.",
    "Yes, and it is urgent.": "Done: {queue} has it now, marked as urgent.",
    "Who would answer me?": "Somebody of {queue}, within two days.",
}


def conversation(text: str, queue: str) -> list[dict[str, str]]:
    """Four messages; which reply the user gives depends on the text alone."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    reply, last = list(REPLIES.items())[number % len(REPLIES)]
    said = (text, FIRST.format(queue=queue), reply, last.format(queue=queue))
    return [{"role": "assistant" if n % 2 else "user", "content": words} for n, words in enumerate(said)]


def write(told: Sequence[dict[str, str]], path: Path, test: bool) -> Path:
    """Tickets as a file of conversations; of test rows every other one ends with the first answer."""
    talks = [conversation(t["text"], t["queue"]) for t in told]
    cut = [talk[:2] if test and n % 2 else talk for n, talk in enumerate(talks)]
    path.write_text("\n".join(json.dumps({"messages": talk}) for talk in cut) + "\n", encoding="utf-8")
    return path


def tickets(split: str) -> list[dict[str, str]]:
    """One split of the shipped tickets."""
    from holdfast.data.readers import DATA_DIR

    source = DATA_DIR / "tickets" / f"{split}.jsonl"
    return [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]


def rows(split: str, tokenizer: Any, folder: Path) -> list[Any]:
    """The rows of one split of the shipped tickets as conversations; `folder` is for a file in between."""
    from holdfast.data.rows import read_rows

    test = split != "train"
    return read_rows(
        str(write(tickets(split), folder / f"{split}.jsonl", test)),
        base_dir=folder,
        tokenizer=tokenizer,
        train_on="last" if test else "assistant",
    )
