"""What docs/lessons.md compares: settings of a run on SST-2, in the order in which they tell most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from leaderboard_plans import OUT, Size

FOLDER = OUT / "lessons"
TASK = "sst2"
ROWS, FEW = 480, 48  # rows of a run: each once; of a homogeneous one: each ten times
RATES = {"full": 2e-5, "lora": 1e-3}  # the best known by task score (docs/leaderboard.md)
LOW = {"full": 1e-5, "lora": 3e-4}
SHARES = (0.05, 0.1, 0.2, 0.5)
KINDS = {  # of general data
    "few-shot": "few-shot rows of other tasks",
    "instructions": "instructions with answers",
    "text": "plain text",
}
LONGEST = 96  # tokens of a general row
PHRASINGS = (  # of the task's prompt; the first is the one that is tested
    "{sentence}\nLabel:",
    "{sentence}\nSentiment:",
    "{sentence}\nOpinion:",
    "Film review. {sentence}\nVerdict:",
    "Is this good or bad? {sentence}\nAnswer:",
    "{sentence}\nDid the writer like it? Good or Bad:",
    "Rate the text as Good or Bad. {sentence}\nRating:",
    "{sentence}\nThe critic says:",
)
# Less than the leaderboard asks: a run is to cost little more than its training
SIZE = Size(
    test={TASK: 200},
    divergence=60,
    suites={"in-context": 24, "language": 3, "knowledge": 24, "copying": 8, "recognition": 8},
    more={},
    shared=20,
)


@dataclass(frozen=True)
class Setting:
    """One way to tune. rows: "plain", "few" (a tenth of them, ten times) or "phrasings" (each in one of eight)."""

    name: str
    kind: str  # "full" or "lora"
    rate: float
    methods: Callable[[], Sequence[Any]]
    rows: str = "plain"

    @property
    def words(self) -> str:
        """What decides its results, for the record."""
        return f"{list(self.methods())} on {self.rows} rows"


def general(kind: str, share: float) -> Any:
    """The method that mixes general data of a kind in."""
    from holdfast import methods as M
    from holdfast.methods.data.replay import GENERAL

    if kind == "few-shot":
        return M.InContextMix(share=share)
    source = GENERAL[0] if kind == "instructions" else GENERAL[1]
    return M.Replay(share=share, sources=(source,), max_tokens=LONGEST)


def mixed(kind: str, share: float) -> str:
    """The name of general data in a setting."""
    return f"{100 * share:g} % {kind}"


def settings() -> list[Setting]:
    """All settings, those first that tell most."""
    from holdfast import methods as M

    def both(name: str, methods: Callable[[], Sequence[Any]], rows: str = "plain") -> list[Setting]:
        return [_setting(f"{kind}{name}", kind, methods, rows) for kind in RATES]

    def mix(share: float) -> list[Setting]:
        return [s for kind in KINDS for s in both(f" + {mixed(kind, share)}", lambda k=kind: [general(k, share)])]

    return [
        *both("", list),
        *mix(0.2),
        *both(" + anchor", lambda: [M.ICLAnchor(weight=1.0, gold=0.0)]),
        _setting("full, s3ft", "full", lambda: [M.S3FT(max_new_tokens=16)]),
        _setting("lora, sdft", "lora", lambda: [M.SDFT(max_completion_length=8)]),
        _setting("lora, kl on own answers", "lora", lambda: [M.OnPolicyKL(max_new_tokens=16)]),
        *both(", homogeneous rows", list, "few"),
        *both(", eight phrasings", list, "phrasings"),
        *both(" + 20 % own few-shot", lambda: [M.InContextMix(share=0.2, source="task")]),
        *mix(0.5),
        *(_setting(f"{kind} at {LOW[kind]:g}", kind, list, rate=LOW[kind]) for kind in LOW),
        _setting("lora, s3ft", "lora", lambda: [M.S3FT(max_new_tokens=16)]),
        _setting(
            f"lora, sdft at {LOW['lora']:g}", "lora", lambda: [M.SDFT(max_completion_length=8)], rate=LOW["lora"]
        ),
        *both(", kl on the task", lambda: [M.KLToBase()]),
        *mix(0.05),
        *mix(0.1),
    ]


def _setting(
    name: str, kind: str, methods: Callable[[], Sequence[Any]], rows: str = "plain", rate: float | None = None
) -> Setting:
    from holdfast import methods as M

    def plan() -> Sequence[Any]:
        return [*([M.LoRA()] if kind == "lora" else []), *methods()]

    return Setting(name, kind, RATES[kind] if rate is None else rate, plan, rows)
