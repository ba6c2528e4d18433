"""A closed-form head on frozen states that learns and forgets rows exactly (analytic continual unlearning, ACU).

    W = (P^T P + g I)^-1 P^T Y,   kept: W (D, C) and R = (P^T P + g I)^-1 (D, D), fp64;   P (N, D), Y (N, C)
    learn    R <- R - R P^T (I + P R P^T)^-1 P R,   then W <- W + R P^T (Y - P W) with the new R
    forget   R <- R + R P^T (I - P R P^T)^-1 P R,   then W <- W - R P^T (Y - P W) with the new R
    a class  forget its rows, then drop its column

Tang et al. 2025 (arXiv 2505.12239; from its abstract: the equations are recursive least squares as we derived them,
the paper's numbers were not verified). After forgetting, the head is the one that the other rows alone would have
given, in whatever order requests came; rounding gathers over thousands of them, so fit anew at times. P is what you
make of a frozen model: `runs.head_states` has its states, and random features of them.

For classifiers, rewards and guards that must be able to delete, not for a model that writes. The frozen model below
still holds what it learnt, and whoever asks for deletion must bring the rows with their labels, as they were learnt.
There is no intercept: a column of ones in P is one, and is shrunk like the others.

Cost: a request of b rows takes O(D^2 b + b^3), in pieces of at most 1024 rows; memory D^2.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from holdfast.errors import HoldfastError

PIECE = 1024
GRID = (1e-2, 1e-1, 1.0, 1e1, 1e2)
NEAR = 1e-4  # how far rounding may carry R beyond I / g
Targets = torch.Tensor | Sequence[str]


@dataclass
class RidgeHead:
    """A head over `labels`, one column each. weights: W; inverse: R; ridge: g; rows: how many it holds."""

    labels: list[str]
    ridge: float
    weights: torch.Tensor
    inverse: torch.Tensor
    rows: int = 0

    @classmethod
    def empty(cls, width: int, labels: Sequence[str], ridge: float = 1.0) -> RidgeHead:
        """A head for states of `width` that holds nothing: W = 0, R = I / g.

        Raises:
            HoldfastError: no width, no or repeated labels, a ridge of 0 or below.
        """
        if width < 1 or not labels or len(set(labels)) < len(labels) or not ridge > 0:
            what = f"A head was asked for with a width of {width}, labels {list(labels)} and a ridge of {ridge}."
            raise HoldfastError(what, "Use a width of at least 1, labels that differ, and a ridge above 0.")
        double = {"dtype": torch.float64}
        return cls(list(labels), ridge, torch.zeros(width, len(labels), **double), torch.eye(width, **double) / ridge)

    def learn(self, states: torch.Tensor, targets: Targets) -> None:
        """Take rows in. states: (N, D); targets: N labels, or (N, C) numbers.

        Raises:
            HoldfastError: shapes or labels that do not fit, numbers that are not finite.
        """
        self._take(*self._given(states, targets), 1)

    def forget(self, states: torch.Tensor, targets: Targets) -> None:
        """Take rows out that were learnt, with their targets.

        Where they cannot have been, that is refused and nothing changes. Not seen are other targets than then, and
        rows never learnt that lie inside what others span: I - P R P^T is positive definite for them too.

        Raises:
            HoldfastError: as `learn`; rows that the head does not hold.
        """
        self._take(*self._given(states, targets), -1)

    def forget_class(self, label: str, states: torch.Tensor) -> None:
        """Take all rows of a label out, and its column.

        Raises:
            HoldfastError: as `forget`; the last label.
        """
        if len(self.labels) == 1:
            raise HoldfastError(f"{label!r} is the head's only label.", "Make an empty head instead.")
        self.forget(states, [label] * len(states))
        at = self.labels.index(label)
        kept = [n for n in range(len(self.labels)) if n != at]
        self.weights, self.labels = self.weights[:, kept].contiguous(), [self.labels[n] for n in kept]

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        """(N, C) fp64, P W."""
        return states.detach().cpu().double() @ self.weights

    def predict(self, states: torch.Tensor) -> list[str]:
        """The label with the highest score of each row."""
        return [self.labels[n] for n in self.scores(states).argmax(1).tolist()]

    def save(self, file: str | Path) -> None:
        """Write it as safetensors."""
        from safetensors.torch import save_file

        said = {"labels": json.dumps(self.labels), "ridge": repr(self.ridge), "rows": str(self.rows)}
        save_file({"weights": self.weights.contiguous(), "inverse": self.inverse.contiguous()}, file, metadata=said)

    @classmethod
    def load(cls, file: str | Path) -> RidgeHead:
        """Read it again, the same to the last bit.

        Raises:
            HoldfastError: the file is not a head.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                said = opened.metadata() or {}
                tensors = opened.get_tensor("weights"), opened.get_tensor("inverse")
            return cls(json.loads(said["labels"]), float(said["ridge"]), *tensors, int(said["rows"]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise HoldfastError(f"{file} is not a head: {error}.", "Give a file that RidgeHead.save wrote.") from error

    def _given(self, states: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
        p = states.detach().cpu().double()
        if isinstance(targets, torch.Tensor):
            y = torch.as_tensor(targets, dtype=torch.float64).detach().cpu()
        else:
            unknown = next((t for t in targets if t not in self.labels), None)
            if unknown is not None:
                raise HoldfastError(f"The head has no label {unknown!r}.", f"Its labels are {', '.join(self.labels)}.")
            y = torch.zeros(len(targets), len(self.labels), dtype=torch.float64)
            y[range(len(targets)), [self.labels.index(t) for t in targets]] = 1
        wanted = (len(p), self.weights.shape[0]), (len(p), self.weights.shape[1])
        if (tuple(p.shape), tuple(y.shape)) != wanted or not (p.isfinite().all() and y.isfinite().all()):
            what = f"States {tuple(p.shape)} and targets {tuple(y.shape)} do not fit a head of {self.weights.shape}."
            raise HoldfastError(what, "Give (N, D) states and N labels or (N, C) targets, all finite.")
        return p, y

    def _take(self, states: torch.Tensor, targets: torch.Tensor, sign: int) -> None:
        r, w = self.inverse, self.weights
        for p, y in zip(states.split(PIECE), targets.split(PIECE), strict=True):
            r, w = _moved(r, w, p, y, sign)
        left = self.rows + sign * len(states)
        if left < 0 or bool((r.diagonal() * self.ridge > 1 + NEAR).any()):
            raise _unknown()
        self.inverse, self.weights, self.rows = r, w, left


def _moved(
    r: torch.Tensor, w: torch.Tensor, p: torch.Tensor, y: torch.Tensor, sign: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """R and W with rows taken in (sign 1) or out (-1)."""
    pr = p @ r
    inner = torch.eye(len(p), dtype=p.dtype) + sign * pr @ p.T
    factor, failed = torch.linalg.cholesky_ex(inner)
    if failed:
        raise _unknown()
    r = r - sign * pr.T @ torch.cholesky_solve(pr, factor)
    r = (r + r.T) / 2
    return r, w + sign * r @ p.T @ (y - p @ w)


def _unknown() -> HoldfastError:
    return HoldfastError("The head does not hold these rows.", "Forget rows as they were learnt, each once.")


def best_ridge(
    learnt: tuple[torch.Tensor, Sequence[str]],
    held: tuple[torch.Tensor, Sequence[str]],
    labels: Sequence[str],
    grid: Sequence[float] = GRID,
) -> float:
    """The g of the grid with the smallest squared error on held-out rows, all as (states, labels)."""

    def error(ridge: float) -> float:
        head = RidgeHead.empty(learnt[0].shape[1], labels, ridge)
        head.learn(*learnt)
        wanted = torch.tensor([[float(y == label) for label in labels] for y in held[1]], dtype=torch.float64)
        return float((head.scores(held[0]) - wanted).square().sum())

    return min(grid, key=error)
