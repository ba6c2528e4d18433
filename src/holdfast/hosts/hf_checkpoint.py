"""The plan's part of a trainer's checkpoint: state.safetensors has its tensors, plan.json everything else."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from holdfast.engine.replaced import own_tensors
from holdfast.engine.ways import SOFT_PROMPT, inner
from holdfast.errors import PlanError, TrainingError
from holdfast.hosts.hf_setup import stage_folder
from holdfast.method import Stage
from holdfast.models.identity import REPLACED_WEIGHTS
from holdfast.session import Session

FOLDER = "holdfast"  # in a checkpoint


def write(checkpoint: Path, session: Session, base: str) -> None:
    """Write tensors of `prepare`, the soft prompt and the counters; `base` is the base's fingerprint."""
    from safetensors.torch import save_file

    tensors = {f"state/{m}/{k}": v for m, state in session.state.items() for k, v in state.items()}
    soft = getattr(inner(session.model), SOFT_PROMPT, None)
    if soft is not None:
        tensors["soft_prompt"] = soft.detach()
    meta = {
        "plan": session.plan.to_recipe(),
        "stage": session.stage.name,
        "effects": session.effects,
        "realised": session.realised,
        "base": base,
        "steering": session.steering.saved(),
    }
    folder = checkpoint / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "state.safetensors")
    (folder / "plan.json").write_text(json.dumps(meta))


def wanted(asked: Any, output: str, stages: Sequence[Stage]) -> str | None:
    """The checkpoint to go on from; True means the newest in `output`, of the latest stage that has one."""
    from transformers.trainer_utils import get_last_checkpoint

    if not asked or not isinstance(asked, bool):
        return str(asked) if asked else None
    for stage in reversed(stages):
        place = stage_folder(output, stage, stages)
        found = get_last_checkpoint(place) if os.path.isdir(place) else None
        if found:
            return found
    raise TrainingError(
        f"There is no checkpoint in {output} to go on from.",
        "Start without resume_from_checkpoint.",
    )


def read(checkpoint: Path, session: Session, base: str) -> dict[str, Any]:
    """What plan.json says.

    Raises:
        TrainingError, PlanError: it is not there, or of another plan or base.
    """
    try:
        meta = json.loads((checkpoint / FOLDER / "plan.json").read_text())
    except OSError as e:
        raise TrainingError(
            f"The checkpoint {checkpoint} holds no plan ({e.strerror}), so it is not from a run with this plan.",
            "Start without resume_from_checkpoint, or train it on without a plan.",
        ) from e
    if meta["plan"] != json.loads(json.dumps(session.plan.to_recipe())):
        raise PlanError(
            f"The checkpoint {checkpoint} was made with another plan, or other settings, than this trainer has.",
            f"Its plan: {json.dumps(meta['plan'])}",
        )
    if meta["base"] != base:
        raise PlanError(
            f"The checkpoint {checkpoint} grew from another base model than the one given to this trainer.",
            "Give the untouched base model again; the trained weights come from the checkpoint.",
        )
    return meta


def fill(checkpoint: Path, session: Session, meta: dict[str, Any], on: Any) -> None:
    """Put the tensors and counters into a session that has entered the checkpoint's stage, on the device `on`."""
    from safetensors.torch import load_file

    # "cpu:0" in several processes on CPU, a name the file format does not know
    tensors = load_file(checkpoint / FOLDER / "state.safetensors", device="cpu" if on.type == "cpu" else str(on))
    for key, value in tensors.items():
        if key.startswith("state/"):
            _, name, part = key.split("/", 2)
            session.state[name][part] = value
        else:
            inner(session.model).get_parameter(SOFT_PROMPT).data.copy_(value)
    session.chosen.combine(session.params)
    session.effects, session.realised = Counter(meta["effects"]), Counter(meta["realised"])
    session.steering.restore(meta["steering"])


@torch.no_grad()
def fill_replaced(checkpoint: Path, session: Session) -> None:
    """Give the replaced modules what a checkpoint holds of them."""
    from safetensors.torch import load_file

    tensors = load_file(checkpoint / REPLACED_WEIGHTS)
    for name, value in own_tensors(inner(session.model)).items():
        value.copy_(tensors[name])
