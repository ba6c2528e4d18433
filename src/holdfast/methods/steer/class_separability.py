"""ClassSeparability: end the run when the classes of unlabelled texts stop drawing apart.

    E: mean of the last hidden states of each of n fixed texts, centred, scaled to length 1
    d: edge lengths of the minimum spanning tree of E (the H0 lifetimes of its Vietoris-Rips filtration)
    S = 1 - H(p) / log(n - 1),   p = d / sum(d),   H the entropy: 0 for equal edges, larger as clusters separate
    every `every` steps; end when S did not rise by more than `least` for `patience` looks

No labels are used: a few long edges among many short ones mean separated clusters. What stops early moves less.
Not verified: the paper's own statistic could not be read. The tree and its lifetimes are theirs, the entropy of the
edges is ours.
The run ends with its last weights, not with those of the best look.
Cost: one forward of `texts` prompts every `every` steps. Combine with: everything; meant for classification.
"""

import math
import random
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Past, State, Steer
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class ClassSeparability(Method):
    """Stopping by persistent homology (Ghalyan et al., TMLR 2024), arXiv 2305.15016."""

    texts: int = 64  # ours; the paper 500 to 1000
    every: int = 50  # steps between two looks; the paper's experiments
    patience: int = 3  # looks without a rise
    least: float = 0.01  # a rise that counts, as a part of the best score
    seed: int = 0

    paper: ClassVar = Paper("Estimating class separability of text embeddings with persistent homology", "2305.15016",
                            "the score of the edges is ours")  # fmt: skip
    does: ClassVar = "ends the run when the classes stop drawing apart"
    may_end: ClassVar = True

    def off(self) -> bool:
        return self.patience == 0

    def check(self, ctx: Context) -> None:
        if self.texts < 4 or self.every < 1 or self.patience < 0 or self.least < 0:
            what = "ClassSeparability needs 4 texts or more, every of at least 1, patience and least of at least 0."
            raise PlanError(what, "Mend them.")
        if len({r.prompt for r in ctx.rows}) < 4:
            raise PlanError(
                "ClassSeparability looks at the prompts of the task, but fewer than 4 different ones are known.",
                "Give prompt/completion rows, or take ClassSeparability out of the plan.",
            )

    def prepare(self, ctx: Context) -> State:
        """The fixed texts as tokens: joined, with their lengths."""
        from holdfast.data.encoder import Encoder

        if 0 < ctx.total_steps <= self.every:
            raise PlanError(
                f"ClassSeparability looks every {self.every} steps; in a run of {ctx.total_steps} it never would.",
                "Lower ClassSeparability.every, or take it out of the plan.",
            )
        prompts = sorted({r.prompt for r in ctx.rows})
        random.Random(f"ClassSeparability/{self.seed}").shuffle(prompts)
        ids = [i[-ctx.max_length :] for i in Encoder(ctx.tokenizer).prompts(prompts[: self.texts])]
        return {
            "ids": torch.tensor([t for i in ids for t in i]),
            "lengths": torch.tensor([len(i) for i in ids]),
            "best": torch.tensor(-1.0, dtype=torch.float64),
            "waited": torch.tensor(0),
        }

    def steer(self, past: Past, state: State) -> Steer | None:
        if not past.step or past.step % self.every:
            return None
        rows = torch.split(state["ids"].cpu(), state["lengths"].tolist())
        score = separability(embed(past.model, rows))
        better = score > float(state["best"]) * (1 + self.least)
        waited = 0 if better else int(state["waited"]) + 1
        kept: State = {"waited": torch.tensor(waited)}
        if better:
            kept["best"] = torch.tensor(score, dtype=torch.float64)
        why = f"the separability of classes did not rise above {float(state['best']):.3f} for {waited} looks"
        return Steer(end=why if waited >= self.patience else "", state=kept)


@torch.no_grad()
def embed(model: Any, rows: Any) -> np.ndarray:
    """(n, D) means of the last hidden states of token rows (T,)."""
    from holdfast.engine.forward import forward
    from holdfast.engine.pack import token_row

    was_training = model.training
    model.eval()
    try:
        doubled = [torch.cat([r, r[-1:]]) for r in rows]  # a target behind the last token, so that its state is seen
        states = [forward(model, [token_row(r.tolist(), 1)], hidden=True)[1].float().mean(0) for r in doubled]
    finally:
        model.train(was_training)
    return torch.stack(states).cpu().numpy()


def separability(embeddings: np.ndarray) -> float:
    """1 - normalised entropy of the edges of the minimum spanning tree; 0 where all are equal, or all points are."""
    lengths = lifetimes(embeddings)
    if not lengths.sum() or len(lengths) < 2:
        return 0.0
    p = lengths / lengths.sum()
    p = p[p > 0]
    return float(1 + (p * np.log(p)).sum() / math.log(len(lengths)))


def lifetimes(embeddings: np.ndarray) -> np.ndarray:
    """(n - 1,) ascending edge lengths of the Euclidean minimum spanning tree of centred points of length 1."""
    from scipy.cluster.hierarchy import linkage

    points = embeddings - embeddings.mean(0)
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    return linkage(points, "single")[:, 2]  # single linkage merges along that tree; duplicates give edges of 0
