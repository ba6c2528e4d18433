"""heal: a short training that pulls a tuned model back towards its base, as a candidate of a repair.

A LoRA adapter is trained on the tuned model, which stays as it is below:

    task prompts, with the tuned model's own greedy answers:   - log p(answer)  +  0.5 KL(p_tuned || p)
    few-shot prompts of anchor tasks:                          the terms of ICLAnchor, with the base as teacher

It is the plan LoRA + KLToBase(on="task") + ICLAnchor on the tuned model: the "base" of a plan is the model that its
training begins with. Only ICLAnchor must ask another model, the real base, whose states on the few prompts it needs
are stored before (`_Anchor`). No label of the task is read. Afterwards the adapter is one more change of the weights
(`Healed`), so it is written, looked at and merged like the other candidates; shares of it are candidates too, as the
whole often gives back more than a bound asks, and the task pays for it. The setting is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from holdfast.engine.pack import TokenRow, token_row
from holdfast.errors import DataError
from holdfast.hosts.plain import Training, train
from holdfast.measure.closeness import Tokens, greedy_answers
from holdfast.method import Method, Paper, State, Term
from holdfast.methods import ICLAnchor, KLToBase, LoRA
from holdfast.plan import Host, Plan
from holdfast.runs.joined import lora_layers
from holdfast.runs.rate import WIDTH, width_of
from holdfast.services import Context, Teacher, View
from holdfast.session import Session

STEPS, BATCH, RATE, PROMPTS, FEWEST, SEED = 48, 8, 1e-3, 200, 8, 0  # ours
SHARES = (0.85, 0.7, 0.55)  # ours: of the change, where the whole gives back more than the bound asks


@dataclass(frozen=True, kw_only=True)
class Healed(Method):
    """What `heal` trained, or a share of it, added to the tuned weights: W + share s B A for each linear map."""

    file: str  # of `write_change`
    share: float = 1.0
    on: str = "tuned"  # "base": an adapter's pruned factors on its base

    does: ClassVar = "adds what a short training changed"
    paper: ClassVar = Paper("", note="ours")
    needs: ClassVar = frozenset({"base_weights", "dense"})

    def merge(self, name: str, weights: Mapping[str, torch.Tensor], state: State, num_layers: int) -> torch.Tensor:
        change = _changes(self.file, Path(self.file).stat().st_mtime_ns)
        below = weights[self.on]
        if f"{name}.A" not in change:
            return below
        new = change[f"{name}.B"] @ change[f"{name}.A"]
        return below + self.share * new.to(below.device)


@lru_cache(maxsize=1)  # of one repair; another one may write another file to the same place
def _changes(file: str, written: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


@dataclass(frozen=True, kw_only=True)
class _Anchor(ICLAnchor):
    """ICLAnchor whose teacher is another model than the one that training begins with; it knows all prompts."""

    teacher: Teacher

    needs: ClassVar = frozenset()  # nothing of that one

    def loss(self, view: View) -> Term | None:
        return super().loss(replace(view, teacher=self.teacher))


def check_prompts(prompts: Sequence[Tokens]) -> None:
    """Raise DataError for too few prompts."""
    if len(prompts) < FEWEST:
        what = f"heal has {len(prompts)} prompts to train on: those of the report are not used."
        raise DataError(what, f"Give {2 * FEWEST} prompts or rows, or more.")


def heal(
    base: Callable[[], Any],
    tuned: Callable[[], Any],
    tokenizer: Any,
    prompts: Sequence[Tokens],
    *,
    steps: int,
    tell: Callable[[float, str], None],
) -> Session:
    """`healing` on the tuned model's own answers to prompts of the task, as tokens."""
    asked = list(prompts)[:PROMPTS]

    def rows(model: Any) -> list[TokenRow]:
        answers = greedy_answers(model, tokenizer, asked)
        return [token_row([*p, *a], len(p)) for p, a in zip(asked, answers, strict=True) if a]

    return healing(base, tuned, tokenizer, rows, steps=steps, tell=tell)


def healing(
    base: Callable[[], Any],
    tuned: Callable[[], Any],
    tokenizer: Any,
    rows: Callable[[Any], Sequence[TokenRow]],
    *,
    steps: int,
    tell: Callable[[float, str], None],
    seed: int = SEED,
    at_once: int = BATCH,
    targets: str | tuple[str, ...] = "all-linear",
    texts: Sequence[Any] = (),
) -> Session:
    """Train; returns the session, whose model is the tuned one with the change as an adapter.

    Args:
        base, tuned: give the models, plain; the second is wrapped for good. Both may be the same one in memory.
        rows: gives rows of the task, of the tuned model.
        seed: of the few-shot prompts.
        at_once: the most rows of the task in one forward; a step has BATCH of them in any case.
        targets: the maps that are changed (`LoRA.target_modules`).
        texts: rows of the task as text, by which the prompts are chosen (`ICLAnchor.requests`).

    Raises:
        PlanError: the tuned model has no linear map that LoRA can stand beside.
    """
    anchor = {"every": 1, "short": 0, "pool": steps, "seed": seed}  # the tuned model is far from the base at once
    teacher = _learnt(base(), tokenizer, texts, ICLAnchor(**anchor), lambda x: tell(0.1 * x, "answers of the base"))
    model = tuned()
    plan = Plan([LoRA(target_modules=targets), KLToBase(), _Anchor(teacher=teacher, **anchor)])
    ctx = Context(model, tokenizer, SEED, texts, total_steps=steps)
    return _trained(plan, ctx, rows(model), at_once, lambda x, words: tell(0.2 + 0.8 * x, words))


def _learnt(
    model: Any, tokenizer: Any, texts: Sequence[Any], anchor: ICLAnchor, progress: Callable[[float], None]
) -> Teacher:
    """The base's answers to the prompts of `anchor`, and its head."""
    rows = anchor.asides(Context(model, tokenizer, SEED, texts))
    teacher = Teacher(model)
    teacher.learn(model, rows, progress=progress)
    teacher.freeze_base(model, head_trains=True, needs_copy=not teacher.exact_head)
    return teacher


def _trained(
    plan: Plan, ctx: Context, rows: Sequence[TokenRow], at_once: int, tell: Callable[[float, str], None]
) -> Session:
    model, steps, dtype = ctx.model, ctx.total_steps, ctx.model.dtype
    model.name_or_path = ""  # an adapter merged in memory: nobody will look for a folder below this one
    plan.check(Host("repair"), ctx)
    session = Session(plan, model, ctx, compute_dtype=dtype, knows_rows=True)
    mix = session.mix(rows)
    order = mix.draw(SEED)
    session.prepare([next(order) for _ in range(steps * BATCH)])
    half = None if dtype == torch.float32 else torch.bfloat16  # float16 would need its losses scaled
    rate = RATE * min(1.0, WIDTH / width_of(model))  # as `auto` falls
    batch = max(n for n in range(1, BATCH + 1) if BATCH % n == 0 and n <= max(1, at_once))
    settings = Training(steps, batch, BATCH // batch, learning_rate=rate, seed=SEED, autocast=half, save_steps=0)

    def on_step(step: int, of: int, parts: Mapping[str, float]) -> None:
        tell(step / of, "  ".join(f"{name} {value:.3f}" for name, value in parts.items()))

    train(session, mix, settings, on_step=on_step)
    return session


def write_change(model: Any, target: Path) -> None:
    """Write the change of a model's LoRA, whole or not at all: s B and A of each map, by the name of its weight.

    Where the weight is stored turned, (in, out) as in GPT-2, they are A^T and s B^T, so that B A has its shape.
    """
    from safetensors.torch import save_file

    found = {}
    for name, m in lora_layers(model).items():
        (adapter,) = m.active_adapters
        if adapter in m.lora_embedding_A:  # W^T + s B A
            a, b = m.lora_embedding_B[adapter].detach().float().T, m.lora_embedding_A[adapter].detach().float().T
        else:
            a, b = m.lora_A[adapter].weight.detach().float(), m.lora_B[adapter].weight.detach().float()
        b = b * m.scaling[adapter]
        a, b = (b.T, a.T) if getattr(m, "fan_in_fan_out", False) else (a, b)
        found[f"{name}.weight.A"], found[f"{name}.weight.B"] = a.cpu().contiguous(), b.cpu().contiguous()
    assert found
    part = target.with_name(f".{target.name}.part")
    save_file(found, part)
    part.replace(target)
