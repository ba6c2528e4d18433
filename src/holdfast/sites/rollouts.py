"""Rollouts: answers of the model so far become rows, each paired with what a teacher reads before the same answer.

Every answer has a seed of its own, made of the run's seed, the step and the prompt, so a step gives the same rows in
every process, after a resume, and however it is cut into micro-batches. A moving average is kept in the state of its
method, which checkpoints hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from holdfast.engine.forward import forward
from holdfast.engine.pack import TokenRow, token_row
from holdfast.engine.ways import inner
from holdfast.errors import PlanError
from holdfast.measure.answers import Sampling, respond, room_of, seed_of
from holdfast.method import Method, Rollouts

PREFIX = "ema/"  # of a moving average in the state of its method


@dataclass(frozen=True, eq=False)
class Paired(TokenRow):
    """A row that a teacher reads behind another prompt.

    teacher_row: its scored tokens are those of the row, in order; teacher: as in `Rollouts`.
    """

    teacher_row: TokenRow | None = None
    teacher: str = "base"


def is_task(row: TokenRow) -> bool:
    """Whether a row is the task's own, not one that a method mixed in."""
    return row.of_task


def said_row(row: TokenRow) -> list[Any]:
    """A row as plain data, for other processes."""
    return [row.ids.tolist(), row.scored.tolist(), row.predicted.tolist(), row.owner, row.source]


def unsaid(said: Sequence[Any]) -> TokenRow:
    """The row that `said_row` told."""
    ids, scored, targets, owner, source = said
    read, predicted = (np.asarray(a, dtype=np.int64) for a in (ids, targets))
    return TokenRow(read, np.asarray(scored, dtype=bool), owner, source, targets=predicted)


class Rolling:
    """The rollouts of one run, of a `session.Session`."""

    def __init__(self, session: Any):
        self.session = session
        self.methods = [m for m in session.methods if "rollouts" in m.sites()]
        self._outside: dict[str, Any] = {}

    def roll(self, rows: Sequence[TokenRow], step: int) -> tuple[Sequence[TokenRow], list[TokenRow]]:
        """The rows of a whole step that are still run, and those that the model so far answers beside them."""
        session, made, dropped = self.session, [], False
        if session.stage.trains == "prompt":
            return rows, made
        task = [r for r in rows if is_task(r)]
        for m in self.methods:
            state = session.state_of(m)
            self._move(m)
            said = m.rollouts(task, step, session.ctx, state)
            if said is None:
                continue
            if said.teacher == "ema":
                self._start(m, said.ema_rate)
            made += self._rows(m, said, step)
            dropped = dropped or said.instead
        return ([r for r in rows if not is_task(r)] if dropped else rows), made

    def _rows(self, m: Method, said: Rollouts, step: int) -> list[TokenRow]:
        """The answered rows of one method."""
        pairs = sorted(zip(map(_plain, said.prompts), map(_plain, said.teacher_prompts), strict=True))
        room = room_of(self.session.model)
        assert all(p and t for p, t in pairs), f"{m.name} asks behind an empty prompt"
        asked = [(p, min(said.max_new_tokens, room - max(len(p), len(t)))) for p, t in pairs]
        if any(most < 1 for _, most in asked):
            raise PlanError(
                f"{m.name} has a prompt at step {step + 1} that leaves no room for an answer in {room} tokens.",
                "Drop long rows, or use a model that reads more.",
            )
        run, seen = f"{self.session.ctx.seed}/{m.name}/{step}", Counter[tuple[int, ...]]()
        seeds = []
        for p, _ in pairs:  # sorted: equal prompts draw one after the other, in an order that no process decides
            seeds.append(seed_of(run, p, seen[tuple(p)]))
            seen[tuple(p)] += 1
        sampling = Sampling(said.max_new_tokens, said.temperature, said.top_p, said.stop)
        with self.session.between_steps():
            answers = respond(self.session.model, self.session.ctx.tokenizer, asked, seeds, sampling)
        found = zip(pairs, answers, strict=True)
        return [_paired(p, t, answer, m.name, said.teacher) for (p, t), answer in found]

    # ---- teachers

    @torch.no_grad()
    def teacher_logp(self, rows: Sequence[TokenRow]) -> torch.Tensor:
        """(M, V) fp32 log-probabilities of the teacher at the scored positions of `rows`, all of one method."""
        pairs = [r for r in rows if isinstance(r, Paired) and r.teacher_row is not None]
        assert len(pairs) == len(rows), "these rows have no teacher"
        session = self.session
        if not pairs:
            width = inner(session.model).get_output_embeddings().weight.shape[0]
            return torch.zeros(0, width, device=next(session.model.parameters()).device)
        asked, kind = [r.teacher_row for r in pairs if r.teacher_row is not None], pairs[0].teacher
        if kind == "base":
            assert session.teacher is not None, "a method with a base as teacher needs base_logits"
            return session.teacher.logp(session.model, asked)
        if kind == "ema":
            with self._averaged(pairs[0].owner):
                return self._live(asked)
        return self._live(asked) if kind == "live" else _logp(self._other(kind), asked, session.packing)

    def _live(self, rows: Sequence[TokenRow]) -> torch.Tensor:
        """The model as its weights are now; dropout off: a teacher that rolls dice is no teacher."""
        model, was_training = self.session.model, self.session.model.training
        model.eval()
        found = _logp(model, rows, self.session.packing)
        model.train(was_training)
        return found

    def _other(self, name: str) -> Any:
        """A model from elsewhere, loaded once."""
        if name not in self._outside:
            from holdfast import models

            model, tokenizer = models.load(name, dtype=str(self.session.model.dtype).removeprefix("torch."))
            if tokenizer.get_vocab() != self.session.ctx.tokenizer.get_vocab():
                raise PlanError(
                    f"The teacher {name} has another tokenizer than the model that is tuned.",
                    "Use a teacher of the same family.",
                )
            device = next(self.session.model.parameters()).device
            self._outside[name] = model.eval().requires_grad_(False).to(device)
        return self._outside[name]

    # ---- moving averages

    def _start(self, m: Method, rate: float) -> None:
        """A moving average begins where training is when it is first asked for."""
        state = self.session.state_of(m)
        for name, p in self.session.params.items():
            state.setdefault(PREFIX + name, p.detach().float().clone())
        state["ema_rate"] = torch.tensor(rate, dtype=torch.float64)

    @torch.no_grad()
    def _move(self, m: Method) -> None:
        """Before each step: what the last one did enters the average."""
        state = self.session.state_of(m)
        if "ema_rate" not in state:
            return
        rate = float(state["ema_rate"])
        for name, p in self.session.params.items():
            if PREFIX + name in state:
                state[PREFIX + name].lerp_(p.detach().float(), rate)

    @contextmanager
    def _averaged(self, owner: str) -> Iterator[None]:
        """The model with a moving average in place of what trains."""
        state, params = self.session.state[owner], self.session.params
        held = {name: p.data for name, p in params.items() if PREFIX + name in state}
        device = next(iter(params.values())).device.type
        for name, data in held.items():
            params[name].data = state[PREFIX + name].to(data.dtype)
        try:
            # autocast remembers what it made of a weight by the weight, not by what it holds
            with torch.autocast(device, **_autocast(device), cache_enabled=False):
                yield
        finally:
            for name, data in held.items():
                params[name].data = data


def _autocast(device: str) -> Mapping[str, Any]:
    return {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}


def _plain(ids: Sequence[int]) -> list[int]:
    return [int(i) for i in ids]


def _paired(prompt: list[int], shown: list[int], answer: list[int], owner: str, teacher: str) -> Paired:
    row, read = (token_row([*p, *answer], len(p), owner, owner) for p in (prompt, shown))
    return Paired(row.ids, row.scored, owner, owner, teacher_row=read, teacher=teacher)


@torch.no_grad()
def _logp(model: Any, rows: Sequence[TokenRow], packing: bool) -> torch.Tensor:
    return forward(model, rows, packing=packing)[1].float().log_softmax(-1)
