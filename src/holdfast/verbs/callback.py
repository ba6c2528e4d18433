"""Watch what a model forgets while any Hugging Face or TRL trainer trains it.

    from holdfast import RetentionCallback
    watch = RetentionCallback("in-context", every=100).attach(trainer)
    trainer.train()
    print(watch.report()["verdict"]["sentence"])

The base is the model in memory when training begins, with its adapter switched off; then the same model is measured
as it trains, without a copy. Training goes on as if nobody had looked: the weights are the same to the last bit. Under
several processes each answers a share of the questions (`engine.processes`).

Looking often is testing often: with many looks and no loss at all, one of them says "lost" more often than the 5 % of
a single one. The verdict that counts is that of the end.
"""

from __future__ import annotations

import json
import math
import random
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from holdfast.engine import processes
from holdfast.engine.replaced import replaced_in, switched_off
from holdfast.engine.ways import inner
from holdfast.errors import HoldfastError, ModelError
from holdfast.measure.compare import abilities, verdict
from holdfast.measure.suites import measure_suite, names_of
from holdfast.report.comparison import comparison

FILE = "retention.json"  # in a checkpoint: the base's measurements, because a resumed run has no base to measure
REWRITES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # adapters whose start changes the weights below them


class RetentionCallback(TrainerCallback):
    """Measures abilities before, during and after training; works in `Trainer` and in TRL's trainers.

    Args:
        suite: what to measure, one name or several (`measure.suites`).
        every: steps between two measurements, or below 1 a share of all steps; the end is always measured.
        keep: share of each ability that must be left, between 0 and 1.
        limit: items of each task; None is the suite's own default. Fewer are faster and prove less.
        stop_when_lost: end the training at the first measurement whose verdict is "lost".
        tokenizer: of the model; None takes the trainer's `processing_class`.
        labels: the answers of the tuned task, where a suite looks for them in other answers.

    Attributes:
        history: one dict for each ability and measurement, the base's first: "step", "epoch", "suite", "score",
            "retention", "low" (shares of the base), "status", "seconds" (of the whole measurement).

    `trainer.state.log_history` gets one row an ability, such as {"retention/in-context": 0.97,
    "retention/in-context_low": 0.94, "step": 100}; an ability without a measurable task has none.

    Raises:
        HoldfastError: an unknown suite, or a number out of its range.
    """

    def __init__(
        self,
        suite: str | Sequence[str] = "in-context",
        *,
        every: int | float = 0.25,
        keep: float = 0.95,
        limit: int | None = None,
        stop_when_lost: bool = False,
        tokenizer: Any = None,
        labels: Sequence[str] = (),
    ):
        if not (0 < every < 1 or (every >= 1 and every == int(every))):
            raise HoldfastError(f"RetentionCallback(every={every!r}) is no number of steps.", "Give 100, or 0.25.")
        if not 0 < keep < 1:
            raise HoldfastError(f"RetentionCallback(keep={keep!r}) does not lie between 0 and 1.", "Give 0.95.")
        self.suites = names_of([suite] if isinstance(suite, str) else suite)
        self.every, self.keep, self.limit = every, keep, limit
        self.stop_when_lost, self.tokenizer, self.labels = stop_when_lost, tokenizer, tuple(labels)
        self.history: list[dict[str, Any]] = []
        self._trainer: Any = None
        self._forget()

    def _forget(self) -> None:
        self.history.clear()
        self._before: list[dict[str, Any]] = []
        self._after: list[dict[str, Any]] = []
        self._shown: list[dict[str, str]] = []
        self._model: Any = lambda: None
        self._last = -1  # step of the last measurement of this training

    def attach(self, trainer: Any) -> RetentionCallback:
        """Join `trainer` and report through its `log`, so that TensorBoard, W&B and the bar see the rows too."""
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._trainer = trainer
        return self

    # ---- what the trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure the base, or take it from the checkpoint that is resumed."""
        self.tokenizer = self.tokenizer or _tokenizer(kwargs.get("processing_class"))
        _refuse(model)
        if self._model() is not inner(model):
            self._forget()
            self._model = weakref.ref(inner(model))
        self._last = -1
        if self._before:  # a later stage of the same training: its base is the first one's
            return
        if state.global_step and self._restore(args, state):
            return
        self._before, seconds = self._measure(model, _base(model, state.global_step))
        judged = abilities(self._before, self._before, {}, self.keep)
        self._note(state, judged, seconds, base=True)
        blind = [p["name"] for p in judged if p["status"] == "not measurable"]
        if blind and processes.first():
            warnings.warn(f"RetentionCallback: {', '.join(blind)} is not measurable with this model.", stacklevel=2)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure every so many steps."""
        every = math.ceil(self.every * state.max_steps) if self.every < 1 else int(self.every)
        if state.global_step % every == 0 and state.global_step < state.max_steps:
            self._look(state, control, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure what came out; the best model's weights may just have been loaded."""
        if self._last != state.global_step or args.load_best_model_at_end:
            self._look(state, control, model)
        from holdfast.report.examples import examples

        with untouched(model):
            self._shown = examples(lambda: model, self.tokenizer, self._before, self._after)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the base's measurements into the checkpoint."""
        folder = _checkpoint(args, state)
        if state.is_world_process_zero and folder.is_dir():
            from holdfast.files import write_json

            write_json(folder / FILE, {"before": self._before, "history": self.history})

    # ---- measuring

    def _look(self, state: Any, control: Any, model: Any) -> None:
        self._after, seconds = self._measure(model, nullcontext())
        self._last = state.global_step
        judged = abilities(self._before, self._after, {}, self.keep)
        self._note(state, judged, seconds)
        for part in judged:
            self._log(state, control, part)
        if self.stop_when_lost and verdict(judged, None)["status"] == "lost":
            control.should_training_stop = True

    def _measure(self, model: Any, switched: Any) -> tuple[list[dict[str, Any]], float]:
        """The measurements of every suite, and the seconds they took."""
        started = time.perf_counter()
        with untouched(model), switched:
            out = [
                measure_suite(name, lambda: model, self.tokenizer, limit=self.limit, labels=self.labels)
                for name in self.suites
            ]
        return out, time.perf_counter() - started

    def _note(self, state: Any, judged: Sequence[dict[str, Any]], seconds: float, base: bool = False) -> None:
        for part in judged:
            ratio = part["retention"] if part["retention"] and not base else {}
            row = {"step": state.global_step, "epoch": state.epoch, "suite": part["name"]}
            row["score"] = part["after"]["value"] if part["after"] else None
            row |= {"retention": ratio.get("value"), "low": ratio.get("low")}
            self.history.append({**row, "status": "base" if base else part["status"], "seconds": seconds})

    def _log(self, state: Any, control: Any, part: dict[str, Any]) -> None:
        """One row an ability, through the trainer where it is known."""
        name, ratio = f"retention/{part['name']}", part["retention"] or {}
        row = {name: ratio.get("value"), f"{name}_low": ratio.get("low")}
        row = {key: value for key, value in row.items() if value is not None}
        if not row:
            return
        if self._trainer is None:
            state.log_history.append({**row, "epoch": state.epoch, "step": state.global_step})
            return
        wanted = control.should_log  # log() clears it, and the trainer's own row of this step would be missing
        Trainer.log(self._trainer, row)  # not TRL's: that would empty its running means into this row
        control.should_log = wanted

    def _restore(self, args: Any, state: Any) -> bool:
        """Take base and history from the checkpoint, if it has those of the same suites."""
        kept = processes.told(lambda: _read(_checkpoint(args, state) / FILE))
        if not kept or tuple(m["suite"] for m in kept["before"]) != self.suites:
            return False
        self._before, self.history[:] = kept["before"], kept["history"]
        return True

    # ---- the result

    def report(self) -> dict[str, Any]:
        """The last measurement against the base, in the shape of `check.check` (`report.schema`).

        Write it with `holdfast.check.write(report, Path("report.html"))`; it has examples once training has
        ended.

        Raises:
            HoldfastError: nothing was measured yet, or the model is gone.
        """
        model = self._model()
        if not self._after or model is None:
            raise HoldfastError(
                "RetentionCallback.report() has no measurement of a model that trained and is still in memory.",
                "Call it after trainer.train(), while the trainer is there.",
            )
        name = model.config._name_or_path or type(model).__name__
        return comparison(
            {"name": name, "revision": None, "sha": None, "dtype": str(model.dtype).removeprefix("torch.")},
            {"name": f"{name} after step {self.history[-1]['step']}", "path": "", "sha": None},
            abilities(self._before, self._after, {}, self.keep),
            self._after,
            self.tokenizer,
            shown=self._shown,
        )


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Measure inside; after it the model and every generator are as before, so that training does not notice.

    Kept: train mode of each module, requires_grad, use_cache, and the random states of Python, NumPy and torch.
    Inside, use_cache is on: gradient checkpointing turns it off, and text is slow without it.
    """
    modes = [(m, m.training) for m in model.modules()]
    grads = [(p, p.requires_grad) for p in model.parameters()]
    caches = [(c, c.use_cache) for c in _configs(model)]
    python, numbers = random.getstate(), np.random.get_state()
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            for config, _ in caches:
                config.use_cache = True
            yield
    finally:
        torch.clear_autocast_cache()  # weights cast under no_grad would carry no gradient
        random.setstate(python)
        np.random.set_state(numbers)
        for config, value in caches:
            config.use_cache = value
        for p, wanted in grads:  # switching an adapter on again makes all of it trainable
            p.requires_grad_(wanted)
        for module, training in modes:
            module.training = training


def _configs(model: Any) -> list[Any]:
    config = model.config
    every = (config, config.get_text_config(), getattr(model, "generation_config", None))
    return list({id(c): c for c in every if hasattr(c, "use_cache")}.values())


def _tokenizer(given: Any) -> Any:
    """The trainer's processing_class, or the tokenizer inside a processor."""
    found = getattr(given, "tokenizer", given)
    if found is None:
        raise HoldfastError(
            "RetentionCallback has no tokenizer: the trainer was built without processing_class.",
            "Give it one: RetentionCallback(tokenizer=...).",
        )
    return found


def _refuse(model: Any) -> None:
    """What cannot be measured in memory."""
    cure = "Leave RetentionCallback out, save the model, and run: holdfast check BASE TUNED."
    if processes.world()[1] > 1 and not processes.is_whole(model):
        raise ModelError("RetentionCallback cannot measure a model split by FSDP, ZeRO-3 or tensors.", cure)
    if any(getattr(c, "is_prompt_learning", False) for c in getattr(model, "peft_config", {}).values()):
        raise ModelError("RetentionCallback cannot measure a PEFT model that learns a prompt or prefix.", cure)


def _base(model: Any, step: int) -> Any:
    """A context in which `model` is the base.

    Raises:
        ModelError: training is under way, and the base is not in memory.
    """
    configs = getattr(model, "peft_config", {}).values()
    starts = [str(getattr(c, "init_lora_weights", "")).lower() for c in configs]
    if configs and not any(s.startswith(REWRITES) for s in starts):
        return model.disable_adapter()
    if replaced_in(model):
        return switched_off(model)
    if step:
        raise ModelError(
            f"The model resumed at step {step} is no base any more, and its checkpoint has no {FILE} of these suites.",
            "Resume a checkpoint in output_dir made with RetentionCallback and the same suites, or start anew.",
        )
    return nullcontext()


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a checkpoint made without the callback
        return None
