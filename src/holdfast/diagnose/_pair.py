"""What the diagnoses share: weights of two models side by side, their decoder layers, and held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from holdfast.diagnose import Case
from holdfast.errors import ModelError
from holdfast.measure.scorer import Scorer
from holdfast.measure.suites.in_context import items_of, shuffled
from holdfast.measure.tasks import held_out_tasks

CHUNK = 1 << 22  # entries turned into fp32 at a time: no second copy of a large embedding
STANDOUT = 3.0  # ours: a place stands out if it has this many times the median of the others

Place = int | str  # a decoder layer (0-based), "embeddings", or "norm and head"


@dataclass(frozen=True)
class Pair:
    """One parameter of both models. `module` is its path inside its layer, or its full path outside the layers."""

    name: str
    place: Place
    module: str
    base: torch.Tensor
    tuned: torch.Tensor

    def squares(self) -> tuple[float, float]:
        """(sum of squares of the change, sum of squares of the base)."""
        diff = base = 0.0
        flat = (self.base.detach().flatten(), self.tuned.detach().flatten())
        for b, t in zip(*(w.split(CHUNK) for w in flat), strict=True):
            b = b.float()
            base += float(torch.linalg.vector_norm(b)) ** 2
            diff += float(torch.linalg.vector_norm(t.to(b.device).float() - b)) ** 2
        return diff, base

    def change(self) -> torch.Tensor:
        """tuned - base in fp32, on the base's device."""
        return self.tuned.detach().to(self.base.device).float() - self.base.detach().float()


def is_turned(model: Any, name: str) -> bool:
    """Whether the weight of this name is stored (in, out), as in GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)


def blocks(model: Any) -> tuple[str, torch.nn.ModuleList]:
    """The decoder layers and their path: the outermost ModuleList with one entry per hidden layer.

    Raises:
        ModelError: the model has no such list.
    """
    config = getattr(model.config, "text_config", None) or model.config
    depth = getattr(config, "num_hidden_layers", None)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth]
    if not found:
        raise ModelError(
            f"The decoder layers of a {type(model).__name__} were not found: no module list of {depth} entries.",
            "Leave this diagnosis out for this architecture.",
        )
    return min(found, key=lambda nm: nm[0].count("."))


def pairs(case: Case) -> Iterator[Pair]:
    """Every parameter of base and tuned, tied ones once.

    Raises:
        ModelError: the two models do not have the same parameters.
    """
    base = dict(case.base.named_parameters(remove_duplicate=False))
    tuned = dict(case.tuned.named_parameters(remove_duplicate=False))
    prefix, _ = blocks(case.base)
    seen: set[tuple[int, int]] = set()
    for name in (*base, *(n for n in tuned if n not in base)):
        b, t = base.get(name), tuned.get(name)
        if b is None or t is None or b.shape != t.shape:
            raise ModelError(
                f"Base and tuned model differ in the parameter {name!r}: "
                f"{'none' if b is None else tuple(b.shape)} and {'none' if t is None else tuple(t.shape)}.",
                "Compare models of the same architecture, adapters merged.",
            )
        if (id(b), id(t)) not in seen:
            seen.add((id(b), id(t)))
            place, module = _place(case.base, prefix, name)
            yield Pair(name, place, module, b, t)


def _place(model: Any, prefix: str, name: str) -> tuple[Place, str]:
    module, _, leaf = name.rpartition(".")
    if name.startswith(prefix + "."):
        layer, _, inside = name[len(prefix) + 1 :].partition(".")
        return int(layer), inside.rpartition(".")[0] or inside
    embeds = isinstance(model.get_submodule(module), torch.nn.Embedding)
    return "embeddings" if embeds else "norm and head", module or leaf


def label(place: Place) -> str:
    """'layer 3', 'embeddings' or 'norm and head'."""
    return f"layer {place}" if isinstance(place, int) else place


def relative(squares: Sequence[float]) -> float:
    """||change|| / ||base|| of (sum of squares of the change, of the base); a change of nothing is infinite."""
    diff, base = squares
    return math.sqrt(diff / base) if base else math.inf if diff else 0.0


def standout(values: Mapping[Place, float]) -> tuple[Place, float]:
    """The place of the largest value, and how many times the median of the other places it is."""
    place = max(values, key=lambda p: values[p])
    rest = [v for p, v in values.items() if p != place]
    middle = median(rest) if rest else values[place]
    return place, values[place] / middle if middle else math.inf if values[place] else 1.0


def times(ratio: float) -> str:
    """A ratio of `standout` in words."""
    return "where most others did not change" if math.isinf(ratio) else f"{ratio:.1f} times the median of the others"


def share(x: float) -> str:
    """A fraction in percent, small ones too: '12.3 %', '0.004 %'."""
    return f"{100 * x:.1f} %" if abs(x) >= 1e-3 or x == 0 else f"{100 * x:.1g} %"


@contextmanager
def watching(layers: Iterable[torch.nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Call hook(n, args, kwargs, output) after decoder layer n, for the duration; what it returns, if anything, is the
    output."""
    handles = [
        layer.register_forward_hook(lambda _m, args, kw, out, n=n: hook(n, args, kw, out), with_kwargs=True)
        for n, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def state_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The (B, T, D) residual state a decoder layer was called with."""
    return args[0] if args else kwargs["hidden_states"]


def state_out(output: Any) -> torch.Tensor:
    """The (B, T, D) residual state a decoder layer returned."""
    return output[0] if isinstance(output, tuple) else output


def held_out_prompts(case: Case, number: int, num_fewshot: int = 4) -> list[torch.Tensor]:
    """`number` few-shot prompts (1, T) of as many held-out tasks, never trained on; drawn by the case's seed.

    Prompts stay apart, so nothing is padded; one longer than the model reads loses its beginning.
    """
    scorer = Scorer(case.tuned, case.tokenizer)
    drawn = shuffled(f"diagnose/{case.seed}", held_out_tasks())[:number]
    items = [
        i
        for task in drawn
        for i in items_of(task, tokenizer=case.tokenizer, num_fewshot=num_fewshot, limit=1, seed=case.seed)
    ]
    ids = scorer.encoder.prompts([i.prompt.context for i in items])
    return [torch.tensor(tokens[-scorer.max_length :])[None] for tokens in ids]


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Eval mode without gradients for the duration."""
    was = [m.training for m in models]
    try:
        for m in models:
            m.eval()
        with torch.no_grad():
            yield
    finally:
        for m, training in zip(models, was, strict=True):
            m.train(training)
