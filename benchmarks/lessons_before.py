"""The same advice on runs that the leaderboard had measured before: two tasks, mostly two seeds, no KL."""

from __future__ import annotations

from leaderboard_cells import BASE, Board
from leaderboard_plans import FOLDER
from leaderboard_table import NAMES, Row, grouped

FULL, LORA, BEST = ("full", 2e-5), ("lora", 3e-4), ("lora", 1e-3)
Setting = tuple[str, float]  # a method of the leaderboard and its rate
ADVICE: tuple[tuple[str, Setting, Setting], ...] = (  # words, the setting that follows them, the one that does not
    ("LoRA in place of full tuning, best rates", BEST, FULL),
    ("LoRA in place of full tuning, a lower rate", LORA, FULL),
    ("Half the rate", ("full", 1e-5), FULL),
    ("10 % general data (texts and instructions)", ("lora + replay", 3e-4), LORA),
    ("20 % few-shot rows of other tasks", ("in-context mix", 2e-5), FULL),
    ("The anchor term", ("anchor (weight 1), full", 2e-5), FULL),
    ("The anchor term", ("anchor (weight 1), lora", 3e-4), LORA),
    ("KL to the base on the task's answers", ("kl to base (task)", 2e-5), FULL),
    ("The base's own right answers (S3FT)", ("s3ft", 2e-5), FULL),
    ("The model's own answers, on policy (SDFT)", ("sdft", 3e-4), LORA),
)
TASKS = ("sst2", "tickets")
WORDS = (
    "Runs of an earlier version of the leaderboard: as many steps and rows a step, drawn from all training rows; 300 "
    "test rows of SST-2 and 180 of the tickets, the same few-shot tasks with 24 and 30 items. Their files are in "
    "`benchmarks/results/leaderboard/before`."
)


def pairs(board: Board | None = None) -> list[tuple[str, str, Row, Row]]:
    """(task, words, the setting that follows an advice, the one that does not) where both were measured."""
    runs = grouped((board or Board(FOLDER, {})).records(before=True))
    out = []
    for task in TASKS:
        base = runs.get((task, BASE, None), [None])[0]
        for words, new, old in ADVICE:
            found = [runs.get((task, *setting)) for setting in (new, old)]
            if base and all(found):
                rows = (Row(task, *setting, own or [], base) for setting, own in zip((new, old), found, strict=True))
                out.append((NAMES[task], words, *rows))
    return out


def named(row: Row) -> str:
    return f"{row.method} at {row.rate:g}"
