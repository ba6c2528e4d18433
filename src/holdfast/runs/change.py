"""What a run has trained as a change of its base that can be scaled, and whether that leads back to the base."""

from __future__ import annotations

from typing import Any

import torch

from holdfast.method import canonical
from holdfast.models.source import ModelSource
from holdfast.models.tensors import Stacked
from holdfast.runs.work import Job
from holdfast.session import LORA_B, Session

LORA = (".lora_A.", ".lora_B.", ".lora_E.", ".lora_embedding_")  # E: between both, of AdaLoRA


class Change:
    """What a job has trained, kept in fp32 as a change of the base that can be scaled.

    straight: whether scaling it leads to the base; the lengths of DoRA, say, and a soft prompt are more than a scale.
    """

    @torch.no_grad()
    def __init__(self, job: Job):
        params = {canonical(n): p for n, p in job.session.model.named_parameters()}
        self.straight, self._base = is_straight(job.session), base_tensors(job.source, job.session)
        own = params.items() if self.straight else ()
        self._tuned = {n: p.detach().float().clone() for n, p in own if self._moved(n, p)}

    def _moved(self, name: str, p: torch.Tensor) -> bool:
        if self._base is None:
            return bool(LORA_B.search(name))
        return not torch.equal(self._base.read(name, p), p.float())

    @torch.no_grad()
    def scale(self, model: Any, share: float) -> None:
        """Set the finished model to base + share * change, in place; 1 is what was trained, exactly."""
        params = {canonical(n): p for n, p in model.named_parameters()}
        for name, tuned in self._tuned.items():
            if share == 1:
                params[name].copy_(tuned)
            elif self._base is None:
                params[name].copy_(share * tuned)
            else:
                params[name].copy_(torch.lerp(self._base.read(name, tuned), tuned, share))


def _has_factors(session: Session) -> bool:
    return any(LORA_B.search(canonical(n)) for n, _ in session.model.named_parameters())


def is_straight(session: Session) -> bool:
    """Whether scaling what is trained leads to the base."""
    lora = all(any(part in n for part in LORA) for n in session.params)
    return not any(m.trains_prompt for m in session.plan.active) and (lora or not _has_factors(session))


def base_tensors(source: ModelSource, session: Session) -> Stacked | None:
    """The base's own tensors, which a dense change walks back to; None where none are needed.

    Raises:
        ModelError: its files do not give them by name.
    """
    wrapped = _has_factors(session) or any(m.wraps for m in session.methods)  # before a stage begins none is there yet
    return Stacked(source, session.model) if is_straight(session) and not wrapped else None
