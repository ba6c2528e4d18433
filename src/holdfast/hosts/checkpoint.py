"""Checkpoints of the plain host: safetensors and JSON, written whole or not at all.

Data order and asides depend on the step alone, so weights, optimizer moments and the step are the whole state. It is
the same in every process; the first writes it and all read it, so a run goes on with any number of them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from holdfast.engine.processes import first
from holdfast.engine.ways import SOFT_PROMPT, inner
from holdfast.errors import TrainingError
from holdfast.hosts.processes import by_first, union


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn a failed write into a TrainingError; safetensors reports a full disk as an error of its own."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as e:
        raise TrainingError(
            f"{what} could not be written: {getattr(e, 'strerror', None) or e}.",
            "Free some disk space and start the same command again; it goes on from the last checkpoint.",
        ) from e


class Checkpoint:
    """The one latest checkpoint under `folder` (None: nothing is written), and the best weights of a stage."""

    def __init__(self, folder: Path | None):
        self.folder = folder / "checkpoint" if folder else None
        self._best: tuple[float, dict[str, torch.Tensor]] | None = None
        self._moved: dict[str, torch.nn.Parameter] = {}  # what trained in the stages so far

    def follow(self, session: Any) -> None:
        """The session has entered a stage: what trains there belongs into checkpoints from now on."""
        self._moved.update(session.params)

    def save(self, session: Any, optimizer: Any, schedule: Any, log: Any, done: int, step: int) -> None:
        """Write everything needed to go on at `step` of the stage that starts after `done` steps."""
        session.effects = union(session.effects)
        if self.folder:
            by_first(lambda: self._write(session, optimizer, log, done, step))

    def _write(self, session: Any, optimizer: Any, log: Any, done: int, step: int) -> None:
        from safetensors.torch import save_file

        assert self.folder
        bad = next((n for n, p in session.params.items() if not torch.isfinite(p).all()), None)
        if bad:  # a checkpoint to go on from must not hold the damage
            raise TrainingError(
                f"The weight {bad} is not finite after step {done + step}; the last good checkpoint is kept.",
                "Start again with a lower training.learning_rate in another training.output_dir.",
            )

        master = getattr(optimizer, "master", {})
        tensors = {f"param/{n}": master.get(p, p).detach() for n, p in self._moved.items()}
        soft = getattr(inner(session.model), SOFT_PROMPT, None)
        if soft is not None:
            tensors[f"param/{SOFT_PROMPT}"] = soft.detach()
        for i, p in enumerate(session.params.values()):
            for key, value in (optimizer.state.get(p, {}) if optimizer else {}).items():
                kind = "optimizer" if isinstance(value, torch.Tensor) else "count"
                tensors[f"{kind}/{i}/{key}"] = torch.as_tensor(value)
        for name, state in session.state.items():
            tensors |= {f"state/{name}/{k}": v for k, v in state.items()}
        if self._best:
            tensors |= {f"best/{n}": v for n, v in self._best[1].items()}
        tensors["rng"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng_cuda"] = torch.cuda.get_rng_state()
        meta = {
            "done": done,
            "step": step,
            "stage": session.stage.name,
            "loss": log.loss,
            "seconds": log.seconds,
            "tokens": log.tokens,
            "realised": log.realised,
            "effects": session.effects,
            "best": self._best[0] if self._best else None,
            "steering": session.steering.saved(),
            "looks": log.looks,
            "early": log.early.saved(),
        }
        fresh = self.folder.with_name("checkpoint.new")
        old = self.folder.with_name("checkpoint.old")
        with writing(f"The checkpoint of step {done + step} in {self.folder}"):
            try:
                shutil.rmtree(fresh, ignore_errors=True)
                fresh.mkdir(parents=True)
                save_file({k: v.contiguous().clone() for k, v in tensors.items()}, fresh / "state.safetensors")
                (fresh / "state.json").write_text(json.dumps(meta))
                shutil.rmtree(old, ignore_errors=True)
                if self.folder.exists():
                    os.replace(self.folder, old)
                os.replace(fresh, self.folder)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)

    def _read(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        if not self.folder:
            return None
        from safetensors.torch import load_file

        for folder in (
            self.folder,
            self.folder.with_name("checkpoint.old"),
        ):  # .old: killed between two renames
            if (folder / "state.json").is_file() and (folder / "state.safetensors").is_file():
                return json.loads((folder / "state.json").read_text()), load_file(folder / "state.safetensors")
        return None

    def clear(self) -> None:
        """Remove what is on disk: the run is trained and exported."""
        if self.folder and first():
            for name in ("checkpoint", "checkpoint.old", "checkpoint.new"):
                shutil.rmtree(self.folder.with_name(name), ignore_errors=True)

    def restore(self, session: Any, optimizer: Any, schedule: Any, log: Any, done: int, steps: int) -> int:
        """Load what belongs to this stage; returns the step to start at (`steps` when the stage is behind us)."""
        found = self._read()
        if not found:
            return 0
        meta, tensors = found
        if meta["done"] < done:
            return 0
        master = getattr(optimizer, "master", {})
        again = session.stage.restart and meta["done"] == done and not meta["step"]  # saved before it began again
        for name, p in self._moved.items():
            if f"param/{name}" in tensors and not (again and name in session.params):
                for held in (p.data, *([master[p]] if p in master else [])):
                    held.copy_(tensors[f"param/{name}"])
        soft = getattr(inner(session.model), SOFT_PROMPT, None)
        if soft is not None and f"param/{SOFT_PROMPT}" in tensors:
            soft.data.copy_(tensors[f"param/{SOFT_PROMPT}"])
        log.loss[:] = [(s, p) for s, p in meta["loss"]]
        log.seconds, log.tokens, log.realised = meta["seconds"], meta["tokens"], Counter(meta["realised"])
        log.looks[:] = [(s, r, f) for s, r, f in meta.get("looks", ())]
        log.early = type(log.early)(*meta.get("early", ()))
        session.effects = Counter(meta["effects"])
        session.steering.restore(meta["steering"])
        if meta["done"] > done:
            return steps
        _fill(session, optimizer, tensors)
        if meta["best"] is not None:
            best = {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")}
            self._best = (meta["best"], best)
        schedule.last_epoch = meta["step"]
        for group, lr, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = lr * factor(meta["step"])
        torch.set_rng_state(tensors["rng"])
        if "rng_cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng_cuda"])
        return int(meta["step"])

    def consider(self, session: Any, score: float) -> None:
        """Remember the trainable weights when `score` is the best of the stage so far (a tie goes to the later)."""
        if self._best is None or score >= self._best[0]:
            self.remember(session, score)

    def remember(self, session: Any, score: float) -> None:
        """Take the trainable weights as the best so far."""
        self._best = (score, {n: p.detach().clone() for n, p in session.params.items()})

    @torch.no_grad()
    def take_best(self, session: Any) -> None:
        """Go back to the best weights of the stage, if any were remembered."""
        if self._best is not None:
            for name, value in self._best[1].items():
                session.params[name].copy_(value)
        self._best = None


def _fill(session: Any, optimizer: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Put the methods' state and the optimizer's moments back, on the device of the weights."""
    params = list(session.params.values())
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "state":
            name, part = rest.split("/", 1)
            session.state.setdefault(name, {})[part] = value.to(params[0].device)
        elif kind in ("optimizer", "count"):
            index, part = rest.split("/", 1)
            p = params[int(index)]
            optimizer.state[p][part] = value.to(p.device) if kind == "optimizer" else value.item()
