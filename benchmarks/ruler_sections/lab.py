"""What every section of the ruler works with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent
OUT, RESULTS, PAGE = HERE / "results" / "ruler", HERE / "results" / "leaderboard", HERE.parent / "docs" / "ruler.md"
KEEP, ALPHA = 0.95, 0.05
Data = dict[str, Any]


@dataclass(frozen=True)
class Lab:
    """What a section works with: a model, and whether all sizes are tiny."""

    model: str = "smollm2-135m"
    smoke: bool = False
    results: Path = RESULTS

    def load(self, dtype: str = "auto") -> tuple[Any, Any]:
        from holdfast import models

        return models.load(self.model, dtype=dtype)

    def size(self, full: Any, tiny: Any) -> Any:
        return tiny if self.smoke else full


def suite_of(name: str, tokenizer: Any, limit: int | None = None, shots: int = 8) -> Any:
    from holdfast.measure.probe import Ask
    from holdfast.measure.suites import build

    return build(name, Ask(tokenizer, num_fewshot=shots, limit=limit))


def measured(model: Any, tokenizer: Any, name: str, limit: int | None, shots: int = 8) -> Data:
    """A measurement made now: no cache."""
    from holdfast.measure.asking import score_suite

    return score_suite(model, tokenizer, suite_of(name, tokenizer, limit, shots))


def judged(before: Data, after: Data) -> Data:
    """The verdict on one ability, short."""
    from holdfast.measure.compare import abilities

    (part,) = abilities([before], [after], {}, KEEP)
    pair = {f"{side}_score": part[side] and part[side]["value"] for side in ("before", "after")}
    return {"status": part["status"], "kept": part["retention"], "p_loss": part["p_loss"], **pair}


def items_of(measurement: Data) -> list[Data]:
    return [i for t in measurement["tasks"] for i in t["items"]]
