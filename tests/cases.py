"""One row per method: settings fit for the tiny model, what its values promise, and `run`, the way tests train."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from holdfast import methods as hf
from holdfast.data.mix import Mix, Source
from holdfast.data.rows import Row
from holdfast.data.tokens import tokenize
from holdfast.engine.forward import forward
from holdfast.engine.pack import token_row
from holdfast.engine.replaced import switched_off
from holdfast.hosts.plain import Log, Training, rows_of_run, train
from holdfast.measure.answers import Sampling, respond, seed_of
from holdfast.method import Method, canonical
from holdfast.methods.adapt.lift import principal
from holdfast.methods.adapt.peqa import rounded
from holdfast.methods.loss._divergence import forward_kl
from holdfast.methods.loss.gere import _flags, _key, margin
from holdfast.plan import Host, Plan
from holdfast.services import Context
from holdfast.session import Session
from holdfast.sites.replace import merge, replace
from tiny import build_tokenizer

Weights = dict[str, torch.Tensor]
Watch = Callable[[Session, int], None]
HOST = Host("holdfast tune")
GENERAL = "holdfast:general/instructions.jsonl"


@dataclass
class Result:
    """A finished run. weights: exported tensors by name in the plain model; soft: the prompt of ProMoT or None."""

    model: Any
    session: Session
    log: Log
    weights: Weights
    soft: torch.Tensor | None


def weights_of(model: Any) -> Weights:
    """Copies of all parameters by canonical name."""
    return {canonical(n): p.detach().clone() for n, p in model.named_parameters()}


def token_rows(rows: Sequence[Any], tokenizer: Any) -> list[Any]:
    return [tokenize(r, tokenizer, 512) for r in rows]


def start(plan: Plan, model: Any, tokenizer: Any, rows: Sequence[Any], settings: Training) -> tuple[Session, Mix]:
    """A session and its mix after everything that comes before training, as `holdfast tune` does it."""
    steps, seed = settings.num_steps, settings.seed
    ctx = Context(model, tokenizer, seed, rows, max_length=512, total_steps=steps)
    plan.check(HOST, ctx)
    session = Session(plan, model, ctx, compute_dtype=model.dtype, knows_rows=True)
    mix = session.mix(token_rows(rows, tokenizer))
    drawn = list(rows_of_run(session, mix, settings))
    session.prepare(drawn)
    session.enter(session.stages[-1])
    session.probe(drawn[:2], settings.autocast)
    return session, mix


def run(
    plan: Plan | Sequence[Method],
    model: Any,
    tokenizer: Any,
    rows: Sequence[Any],
    steps: int = 4,
    *,
    watch: Watch | None = None,
    evaluate: Callable[[Any], float] | None = None,
    **training: Any,
) -> Result:
    """Train as `holdfast tune` does, from the check of the plan to the exported model.

    `watch` sees the session after every step; `training` are fields of `Training`.
    """
    plan = plan if isinstance(plan, Plan) else Plan(plan)
    settings = Training(steps, **{"batch_size": 4, "learning_rate": 1e-3, "save_steps": 0, **training})
    dtype = model.dtype
    session, mix = start(plan, model, tokenizer, rows, settings)
    on_step = (lambda step, _of, _parts: watch(session, step)) if watch else None
    log = train(session, mix, settings, on_step=on_step, evaluate=evaluate)
    session.merge()
    session.finish()
    tuned, soft = session.finished_model(dtype)
    return Result(tuned, session, log, weights_of(tuned), soft)


def same(a: Result, b: Result) -> None:
    """Assert two results bit-identical."""
    assert a.weights.keys() == b.weights.keys()
    different = [n for n in a.weights if not torch.equal(a.weights[n], b.weights[n])]
    assert not different, f"{len(different)} tensors differ, such as {different[0]}"
    assert (a.soft is None) == (b.soft is None)
    assert a.soft is None or torch.equal(a.soft, b.soft)
    assert a.log.loss == b.log.loss and a.log.realised == b.log.realised


# ---- invariants: what a method promises after 20 AdamW steps with weight decay and clipping


@dataclass
class Seen:
    """What an invariant may look at. plain: the same run with an empty plan; middle: (weights, soft prompt) after half
    of the steps, the end of stage 1 where there is one; task: the training rows."""

    method: Any
    base: Weights
    base_model: Any
    result: Result
    plain: Result
    middle: tuple[Weights, torch.Tensor | None]
    task: list[Any]


def held(seen: Seen, names: Sequence[str]) -> None:
    """`names` are bit-identical to the base and everything else moved."""
    frozen = set(names)
    assert frozen and frozen < set(seen.base)
    for name, value in seen.result.weights.items():
        assert torch.equal(value, seen.base[name]) == (name in frozen), name


def freeze_holds(seen: Seen) -> None:
    held(seen, [n for n in seen.base if "layers.0." in n or "embed" in n or "norm" in n])
    ids = torch.as_tensor(seen.task[0].ids)[None]
    with torch.no_grad():
        a, b = (m(ids, output_hidden_states=True).hidden_states for m in (seen.base_model, seen.result.model))
    assert torch.equal(a[1], b[1]) and not torch.equal(a[2], b[2])


def half_holds(seen: Seen) -> None:
    chosen = seen.method.choose(list(seen.base))
    held(seen, [n for n in seen.base if n not in chosen])
    matrices = [n for n in seen.base if "_proj" in n]
    attention = sum(seen.base[n].numel() for n in matrices if "attn" in n)
    assert 2 * sum(seen.base[n].numel() for n in chosen if "attn" in n) == attention


def lora_holds(seen: Seen) -> None:
    inside = {n: w for n, w in seen.result.weights.items() if ".lora_" not in n and ".ranknum." not in n}
    assert inside.keys() == seen.base.keys() and len(inside) < len(seen.result.weights)
    assert all(torch.equal(w, seen.base[n]) for n, w in inside.items())
    ids = torch.as_tensor(seen.task[0].ids)[None]
    with torch.no_grad(), seen.result.model.disable_adapter():
        assert torch.equal(seen.result.model(ids).logits, seen.base_model(ids).logits)


def halves_hold(seen: Seen) -> None:
    """As an adapter; and the second half of the ranks is to the last bit what was taken away at the start."""
    lora_holds(seen)
    state, r, count = seen.result.session.state["CorDA"], seen.method.r, 0
    for name, w in seen.result.weights.items():
        if ".lora_" in name:
            kind, at = ("A", w) if ".lora_A." in name else ("B", w.T)
            start = state[f"{kind}/{name.split('.lora_')[0]}"]
            start = start if kind == "A" else start.T
            assert torch.equal(at[r:], start if kind == "A" else -start), name
            assert not torch.equal(at[:r], start) and at.shape[0] == 2 * r, name
            count += 1
    assert count == 28  # A and B of seven maps in each of two blocks


def beside_holds(seen: Seen) -> None:
    """The originals are the base's to the last bit, what stands beside them moved, and off the model is the base."""
    inside = {n: w for n, w in seen.result.weights.items() if n in seen.base}
    assert inside.keys() == seen.base.keys() and all(torch.equal(w, seen.base[n]) for n, w in inside.items())
    again = replaced_again(seen)
    own = {n: w for n, w in seen.result.weights.items() if n not in seen.base}
    assert own.keys() == again.keys() and all(not torch.equal(w, again[n]) for n, w in own.items())
    ids = torch.as_tensor(seen.task[0].ids)[None]
    with torch.no_grad(), switched_off(seen.result.model):
        assert torch.equal(seen.result.model(ids).logits, seen.base_model(ids).logits)


def replaced_again(seen: Seen) -> Weights:
    """What the replaced modules began with."""
    model = copy.deepcopy(seen.base_model)
    replace(model, seen.method, Context(model, None), seen.result.session.state[seen.method.name])
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def rounded_holds(seen: Seen) -> None:
    """Folded in, each row is the base's rounded to 15 steps and stretched: no row turned."""
    beside_holds(seen)
    model, count = copy.deepcopy(seen.result.model), 0
    merge(model, seen.method)
    for name, w in weights_of(model).items():
        if not matrix(name, w):
            assert torch.equal(w, seen.base[name])
            continue
        ints, scale = rounded(seen.base[name], 4, 0)
        at_start = ints * scale
        assert (at_start - seen.base[name]).abs().max() <= 0.5001 * scale.max() and not torch.equal(w, at_start)
        torch.testing.assert_close(torch.cosine_similarity(w, at_start, dim=1), torch.ones(len(w)), rtol=0, atol=1e-5)
        count += 1
    assert count == 14


def scaled_holds(seen: Seen) -> None:
    """Folded in, each row of a matrix points where the base's does, and has another length."""
    beside_holds(seen)
    model, count = copy.deepcopy(seen.result.model), 0
    merge(model, seen.method)
    for name, w in weights_of(model).items():
        base = seen.base[name]
        assert torch.equal(w, base) == ("embed" in name)
        if matrix(name, w):
            torch.testing.assert_close(torch.cosine_similarity(w, base, dim=1), torch.ones(len(w)), rtol=0, atol=1e-5)
            count += int((w.norm(dim=1) / base.norm(dim=1) - 1).abs().max() > 1e-4)
    assert count == 14


def slices_hold(seen: Seen) -> None:
    """Folded in, the chosen columns and rows moved and every other number is the base's to the last bit."""
    beside_holds(seen)
    state, model = seen.result.session.state["S2FT"], copy.deepcopy(seen.result.model)
    merge(model, seen.method)
    for name, w in weights_of(model).items():
        moved = w != seen.base[name]
        chosen = state.get(name.removesuffix(".weight"))
        if chosen is None:
            assert not moved.any(), name
            continue
        dim = 1 if "down_proj" in name or "o_proj" in name else 0
        kept = torch.ones(w.shape[dim], dtype=torch.bool).index_fill(0, chosen, False)
        assert not moved.index_select(dim, kept.nonzero()[:, 0]).any(), name
        assert moved.index_select(dim, chosen).float().mean() > 0.95, name
    assert {n.rsplit(".", 1)[-1] for n in state} == {"down_proj", "up_proj", "o_proj", "v_proj"}


def ranks_hold(seen: Seen) -> None:
    """As an adapter, whose ranks add up to r for each of fourteen maps and are not all the same."""
    lora_holds(seen)
    ranks = [len(w) for n, w in seen.result.weights.items() if ".lora_A." in n]
    assert sum(ranks) == 14 * seen.method.r and min(ranks) < max(ranks) <= seen.method.rho * seen.method.r


def apart_holds(seen: Seen) -> None:
    """As an adapter; and what each map reads best of the base's inputs goes through it as before."""
    lora_holds(seen)
    count = 0
    for name, w in seen.base.items():
        if matrix(name, w):
            a, b = (seen.result.weights[name.replace("weight", f"lora_{x}.default.weight")] for x in "AB")
            main = torch.linalg.svd(w, full_matrices=False).Vh[: seen.method.principal]
            assert b.norm() > 1e-3 and (main @ a.T).abs().max() < 1e-6, name
            count += 1
    assert count == 14


def budget_holds(seen: Seen) -> None:
    """As an adapter; and of all maps target_r ranks a map are left, not the same number in each."""
    lora_holds(seen)
    left = [int((w != 0).sum()) for n, w in seen.result.weights.items() if ".lora_E." in n]
    assert len(left) == 14 and sum(left) == 14 * seen.method.target_r and min(left) < max(left)
    whole = [int((w != 0).sum()) for n, w in seen.middle[0].items() if ".lora_E." in n]
    assert sum(left) < sum(whole) == seen.method.budget(10, 20, 14) < 14 * seen.method.r


def groups_hold(seen: Seen) -> None:
    """An adapter on feed-forward nets alone; each block's A shrank; what was to be unlearnt became less likely."""
    lora_holds(seen)
    own = {n: w for n, w in seen.result.weights.items() if n not in seen.base}
    assert len(own) == 12 and all(".mlp." in n for n in own)
    begun = weights_of(seen.method.adapt(copy.deepcopy(seen.base_model), Context(seen.base_model, None), {}))
    for layer in ("layers.0.", "layers.1."):
        before, after = (sum(w[n].square().sum() for n in own if layer in n and ".lora_A." in n) for w in (begun, own))
        assert 0 < after < 0.9 * before
    rows = seen.result.session.asides["GSLoRA"]
    models = seen.base_model, seen.plain.model, seen.result.model
    a, b, c = (sum(losses_of(m, r).mean().item() for r in rows) for m in models)
    assert c - a > 0.1 > 10 * abs(b - a)
    assert seen.result.log.realised["GSLoRA/examples"] == 20


def pairs_hold(seen: Seen) -> None:
    """The originals are the base's to the last bit, every copy moved, and switched off the model is the base."""
    inside = {n: w for n, w in seen.result.weights.items() if ".expanded." not in n}
    assert inside.keys() == seen.base.keys() and all(torch.equal(w, seen.base[n]) for n, w in inside.items())
    copies = {n: w for n, w in seen.result.weights.items() if ".expanded." in n}
    assert len(copies) == sum("layers." in n for n in seen.base)
    assert all(not torch.equal(w, seen.base[n.replace("expanded.", "")]) for n, w in copies.items())
    ids = torch.as_tensor(seen.task[0].ids)[None]
    with torch.no_grad(), switched_off(seen.result.model):
        assert torch.equal(seen.result.model(ids).logits, seen.base_model(ids).logits)


def subspace_holds(seen: Seen) -> None:
    state, count = seen.result.session.state["OrthogonalSubspace"], 0
    for name, value in seen.result.weights.items():
        moved = value - seen.base[name]
        assert moved.norm() > 0, name
        if f"U/{name}" in state:
            inside = state[f"U/{name}"].T @ moved @ state[f"V/{name}"].T
            assert inside.norm() / moved.norm() < 1e-5, name
            count += 1
    assert count == 14  # seven matrices in each of two blocks


def outside_holds(seen: Seen) -> None:
    """Matrices moved, with nothing inside M; all else is the base to the last bit."""
    state, count = seen.result.session.state["CoSO"], 0
    for name, value in seen.result.weights.items():
        moved = value - seen.base[name]
        if f"M/{name}" not in state:
            assert torch.equal(value, seen.base[name]), name
            continue
        m, loose = state[f"M/{name}"], seen.plain.weights[name] - seen.base[name]
        assert moved.norm() > 0 and (m.T @ moved).norm() < 1e-5 * moved.norm(), name
        assert (m.T @ loose).norm() > 0.1 * loose.norm(), name
        count += 1
    assert count == 14


def chosen_hold(seen: Seen) -> None:
    """After the first step nothing but the chosen tensors moved, and their backward costs what it may."""
    state, names = seen.result.session.state["GreenTrainer"], list(seen.base)
    chosen = {n for n in names if f"chosen/{n}" in state}
    assert all(not torch.equal(w, seen.base[n]) for n, w in seen.result.weights.items())
    assert chosen == {n for n, w in seen.result.weights.items() if not torch.equal(w, seen.middle[0][n])}
    sizes = [w.numel() for w in seen.base.values()]
    above = [*sizes[min(names.index(n) for n in chosen) + 1 :], sizes[0]]  # the head is the table of the embeddings
    forward = sum(sizes[1:]) + sizes[0]
    whole, spent = sum(sizes) + forward, sum(seen.base[n].numel() for n in chosen) + sum(above)
    assert 0 < spent <= (seen.method.rho * (whole + forward) - forward) + 0.01 * whole


def prompt_holds(seen: Seen) -> None:
    weights, prompt = seen.middle
    assert all(torch.equal(weights[n], w) for n, w in seen.base.items())
    assert prompt is not None and torch.equal(prompt, seen.result.soft)
    assert not torch.equal(prompt, seen.result.session.state["ProMoT"]["init"])
    assert all(not torch.equal(w, seen.base[n]) for n, w in seen.result.weights.items())


def prompt_alone_holds(seen: Seen) -> None:
    """Every weight is the base's to the last bit; the prompt moved, and the task is likelier behind it."""
    assert all(torch.equal(w, seen.base[n]) for n, w in seen.result.weights.items())
    init = seen.result.session.state[seen.method.name]["init"]
    assert seen.result.soft.shape == init.shape and (seen.result.soft - init).abs().min() > 0
    losses = [p["task"] for _, p in seen.result.log.loss]
    assert sum(losses[-5:]) < sum(losses[:5])


def phrasing_holds(seen: Seen) -> None:
    """Every weight is the base's and the prompt moved. The first step: what the base says behind the prompt to a line
    of other words and the row is compared with what it says to the row alone, at the answer's tokens."""
    assert all(torch.equal(w, seen.base[n]) for n, w in seen.result.weights.items())
    init, model = seen.result.session.state["PhrasingPrompt"]["init"], seen.base_model
    assert (seen.result.soft - init).abs().min() > 0
    table, values = model.get_input_embeddings(), []
    more = build_tokenizer()("Say which:\n", add_special_tokens=False)["input_ids"]
    for _, row in zip(range(4), Mix(seen.task).draw(0), strict=False):
        ids, n = torch.as_tensor(row.ids), int(row.scored.sum())
        begin = ids[: len(ids) - n].tolist()[:1] if not row.ids[0] else []  # a token that begins every text
        other = torch.tensor([*begin, *more, *ids[len(begin) :].tolist()])
        with torch.no_grad():
            alone = model(ids[None]).logits[0, -n - 1 : -1].log_softmax(-1)
            behind = model(inputs_embeds=torch.cat([init, table(other)])[None]).logits[0, -n - 1 : -1].log_softmax(-1)
        values.append(forward_kl(alone, behind))
    first = seen.result.log.loss[0][1]["PhrasingPrompt"]
    assert math.isclose(first, seen.method.weight * torch.cat(values).mean().item(), rel_tol=1e-2)


@torch.no_grad()
def guesses_hold(seen: Seen) -> None:
    """The first step: the base reads 0.8 of a row and 0.2 of its guesses, and a token counts by what follows it."""
    m, table, order, plain, weighted, count = (
        seen.method,
        seen.base_model.get_input_embeddings(),
        Mix(seen.task),
        0,
        0,
        0,
    )
    for _, row in zip(range(4), order.draw(0), strict=False):
        ids, at = torch.as_tensor(row.ids), torch.as_tensor(row.scored)
        other = ids.clone()
        other[at] = seen.base_model(ids[None]).logits[0].argmax(-1)[at.roll(-1)]
        mixed = (1 - m.lam) * table(ids) + m.lam * table(other)
        logp = seen.base_model(inputs_embeds=mixed[None]).logits[0].log_softmax(-1)
        losses = [-logp[t - 1, ids[t]].item() for t in at.nonzero()[:, 0].tolist()]
        later = [sum(m.gamma**k * x for k, x in enumerate(losses[t:])) for t in range(len(losses))]
        plain += sum(losses)
        weighted += sum(x * w for x, w in zip(losses, later, strict=True)) * len(losses) / sum(later)
        count += len(losses)
    first = seen.result.log.loss[0][1]
    assert math.isclose(first["task"], plain / count, rel_tol=1e-4)
    assert math.isclose(first["task"] + first["IFT"], weighted / count, rel_tol=1e-4)


def share_holds(name: str) -> Callable[[Seen], None]:
    def check(seen: Seen) -> None:
        real = seen.result.log.realised
        whole = sum(n for k, n in real.items() if k.endswith("/examples"))
        mine = sum(n for k, n in real.items() if k.startswith(name) and k.endswith("/examples"))
        assert mine and abs(mine - seen.method.share * whole) <= 1

    return check


@torch.no_grad()
def kl(base_model: Any, model: Any, rows: Sequence[Any]) -> float:
    """Mean KL(base || model) in nats per scored token, model run without any prompt."""
    a, b = (forward(m, rows)[1].log_softmax(-1) for m in (base_model, model))
    return forward_kl(a, b).mean().item()


def anchor_holds(seen: Seen) -> None:
    assert seen.result.log.realised["ICLAnchor/examples"] == 20
    rows = seen.result.session.asides["ICLAnchor"]
    assert kl(seen.base_model, seen.result.model, rows) < 0.8 * kl(seen.base_model, seen.plain.model, rows)


def task_kl_holds(seen: Seen) -> None:
    assert kl(seen.base_model, seen.result.model, seen.task) < 0.8 * kl(seen.base_model, seen.plain.model, seen.task)


def token_loss_holds(seen: Seen) -> None:
    """p * (-log p) is at most 1 / e."""
    assert all(0 < p["task"] <= 1 / math.e for _, p in seen.result.log.loss)
    assert all(p["task"] > 1 / math.e for _, p in seen.plain.log.loss[:3])


@torch.no_grad()
def unsure_holds(seen: Seen) -> None:
    """Each token's loss counts by the entropy of the 20 likeliest; never more than in the plain run."""
    order = Mix(seen.task).draw(0)
    packed, logits = forward(seen.base_model, [next(order) for _ in range(4)])
    entropy = torch.distributions.Categorical(logits=logits.topk(20).values).entropy()
    token_loss = torch.nn.functional.cross_entropy(logits, packed.target, reduction="none")
    first = (token_loss * (entropy / math.log(20)) ** seen.method.alpha).mean().item()
    assert math.isclose(seen.result.log.loss[0][1]["task"], first, rel_tol=1e-5)
    losses = [(a["task"], b["task"]) for (_, a), (_, b) in zip(seen.result.log.loss, seen.plain.log.loss, strict=True)]
    assert all(0 < a < 0.95 * b for a, b in losses)


def pull_holds(seen: Seen) -> None:
    near, far = (
        sum((r.weights[n] - w).square().sum() for n, w in seen.base.items()) for r in (seen.result, seen.plain)
    )
    assert 0 < near < 0.8 * far


def line_holds(factor: Callable[[Any, str], float]) -> Callable[[Seen], None]:
    """theta = base + factor * (tuned - base), tuned being the run without the method."""

    def check(seen: Seen) -> None:
        for n, w in seen.base.items():
            wanted = w + factor(seen.method, n) * (seen.plain.weights[n] - w)
            torch.testing.assert_close(seen.result.weights[n], wanted, rtol=1e-6, atol=1e-8)

    return check


def trim_holds(seen: Seen) -> None:
    """Of all changes of the run without the method the largest are there, and the rest are gone."""
    moved = {n: seen.plain.weights[n] - w for n, w in seen.base.items()}
    flat = torch.cat([tau.abs().flatten() for tau in moved.values()])
    least = flat.topk(int(seen.method.density * flat.numel())).values[-1]
    for n, w in seen.base.items():
        kept = seen.result.weights[n] != w
        wanted = torch.where(kept, w + moved[n], w)
        torch.testing.assert_close(seen.result.weights[n], wanted, rtol=1e-6, atol=1e-8)
        assert (moved[n].abs()[kept] >= least * (1 - 2**-11)).all() and (moved[n].abs()[~kept] < least).all()


def noise_dropped_holds(seen: Seen) -> None:
    """What is left of each matrix's change is a sum of its strongest directions, fewer of them than it had."""
    cut = 0
    for n, w in seen.base.items():
        plain, kept = (x.weights[n].double() - w.double() for x in (seen.plain, seen.result))
        if w.ndim < 2:
            torch.testing.assert_close(kept, plain, rtol=1e-6, atol=1e-8)
            continue
        rank = int(torch.linalg.matrix_rank(kept, rtol=1e-4))
        u, s, v = torch.linalg.svd(plain, full_matrices=False)
        torch.testing.assert_close(kept, (u[:, :rank] * s[:rank]) @ v[:rank], rtol=1e-3, atol=1e-6)
        cut += rank < int((s > 1e-6 * s[0]).sum())
    assert cut > 3


def strangers_hold(seen: Seen) -> None:
    """Of each changed matrix of the blocks the strongest directions unlike the base's are smaller by lambda."""
    method, found = seen.method, 0
    for n, w in seen.base.items():
        u, s, v = torch.linalg.svd(seen.plain.weights[n].double()) if w.ndim == 2 else (None,) * 3
        if u is None or ".layers." not in n:
            assert torch.equal(seen.result.weights[n], seen.plain.weights[n])
            continue
        base = torch.linalg.svd(w.double(), full_matrices=False).U
        near = (u.T[: method.top_k] @ base).abs().amax(1)
        factor = torch.ones_like(s)
        factor[: method.top_k][near < method.threshold_epsilon] = method.mitigation_lambda
        found += int((factor < 1).sum())
        wanted = (u[:, : len(s)] * (s * factor)) @ v[: len(s)]
        torch.testing.assert_close(seen.result.weights[n].double(), wanted, rtol=1e-4, atol=1e-6)
    assert found > 3


def dropped_holds(seen: Seen) -> None:
    """An entry of the change is gone or enlarged to keep the mean, and as many are there as were asked for."""
    kept = total = 0
    for n, w in seen.base.items():
        stays = seen.result.weights[n] != w
        wanted = torch.where(stays, w + (seen.plain.weights[n] - w) / seen.method.density, w)
        torch.testing.assert_close(seen.result.weights[n], wanted, rtol=1e-5, atol=1e-7)
        kept, total = kept + int(stays.sum()), total + w.numel()
    assert abs(kept / total - seen.method.density) < 4 * (0.25 / total) ** 0.5


def tails_hold(seen: Seen) -> None:
    """Of every tensor's change the largest and the smallest are gone, and nothing between them."""
    for n, w in seen.base.items():
        tau, stays = seen.plain.weights[n] - w, seen.result.weights[n] != w
        wanted = torch.where(stays, w + tau, w)
        torch.testing.assert_close(seen.result.weights[n], wanted, rtol=1e-6, atol=1e-8)
        ranks = tau.abs().flatten().argsort(descending=True).argsort()[stays.flatten()]
        first = int(seen.method.outliers * w.numel())
        assert len(ranks) == int(seen.method.density * w.numel())
        assert int(ranks.min()) == first and int(ranks.max()) == first + len(ranks) - 1, n


def arc_holds(seen: Seen) -> None:
    """Every tensor lies on the arc from base to tuned, by the formula in double precision; some leave the line."""
    t, bent = seen.method.t, 0
    for n, w in seen.base.items():
        a, b = w.double(), seen.plain.weights[n].double()
        angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
        bent += bool(angle.cos() < 0.9994)
        wanted = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
        line = torch.lerp(a, b, t)
        torch.testing.assert_close(
            seen.result.weights[n].double(), wanted if angle.cos() < 0.9995 else line, rtol=1e-4, atol=1e-6
        )
    assert bent


def lift_holds(seen: Seen) -> None:
    """Nothing but the principal entries of the base moved, and all of those did."""
    for name, base in seen.base.items():
        moved = seen.result.weights[name] != base
        if base.ndim == 2 and "layers." in name:
            chosen = principal(base, seen.method.filter_rank, seen.method.lora_rank)
            assert int(chosen.sum()) == min(sum(base.shape) * seen.method.lora_rank, base.numel())
            assert not moved[~chosen].any() and moved[chosen].float().mean() > 0.99, name
        else:
            assert not moved.any(), name


def sparse_holds(prefix: str, count: Callable[[Any, Weights], int], tensor: Callable[[str, Any], bool]) -> Any:
    """Outside of the entries in the method's state the base is there to the last bit, and they are as many as said."""

    def check(seen: Seen) -> None:
        state, chosen = seen.result.session.state[seen.method.name], 0
        for name, base in seen.base.items():
            moved = seen.result.weights[name] != base
            if not tensor(name, base):
                assert not moved.any(), name
                continue
            mask = state[f"{prefix}{name}"]
            chosen += int(mask.sum())
            assert not moved[~mask].any() and moved[mask].float().mean() > (0.95 if mask.any() else -1), name
        assert chosen == count(seen.method, {n: w for n, w in seen.base.items() if tensor(n, w)})
        assert all(torch.isfinite(torch.tensor(p["task"])) for _, p in seen.result.log.loss)

    return check


def matrix(name: str, w: torch.Tensor) -> bool:
    return w.ndim == 2 and "layers." in name


def spiel_holds(seen: Seen) -> None:
    """k entries of each matrix moved, and they are others than at the start."""
    count = lambda m, ws: sum(m.count(w) for w in ws.values())  # noqa: E731
    sparse_holds("entries/", count, matrix)(seen)
    state = seen.result.session.state["SpIEL"]
    for name in (n for n, w in seen.base.items() if matrix(n, w)):
        first = seen.method.entries(name, seen.base[name], {}, 0)
        assert first.sum() == state[f"entries/{name}"].sum() and not torch.equal(first, state[f"entries/{name}"])


def lottery_holds(seen: Seen) -> None:
    """k entries of all tensors together moved, and they are those that had moved most in the middle of the run."""
    size = lambda m, ws: round(m.density * sum(w.numel() for w in ws.values()))  # noqa: E731
    sparse_holds("entries/", size, matrix)(seen)
    assert all(torch.equal(w, seen.base[n]) for n, w in seen.result.weights.items() if "norm" in n)
    weights, state = seen.middle[0], seen.result.session.state["LTSFT"]
    moved = {n: (weights[n] - w).abs() for n, w in seen.base.items() if matrix(n, w)}
    inside, outside = (torch.cat([m[state[f"entries/{n}"] == x] for n, m in moved.items()]) for x in (True, False))
    assert inside.min() >= outside.max() > 0


def balance_holds(seen: Seen) -> None:
    """After the warm-up a token weighs 1 on average, and the weights differ; held-out rows never trained."""
    state, parts = seen.result.session.state["CoBa"], seen.result.session.held_out.parts
    weights = {k.removeprefix("weight/"): float(v) for k, v in state.items() if k.startswith("weight/")}
    assert len(weights) == 2 and sum(parts[n] * w for n, w in weights.items()) == pytest.approx(1)
    assert max(weights.values()) - min(weights.values()) > 1e-3
    assert seen.result.session.steering.source_weight == weights
    assert state["losses"].shape == (2, 20) and state["slopes"].shape == (3, 20 - seen.method.warmup)


def finch_holds(seen: Seen) -> None:
    """The reference is the mean of the first losses, and as the loss fell the weights went further than without."""
    state, losses = seen.result.session.state["FINCH"], [p["task"] for _, p in seen.result.log.loss]
    first = seen.method.first
    assert int(state["count"]) == first and float(state["sum"]) == pytest.approx(sum(losses[:first]))
    far, near = (sum((r.weights[n] - w).norm() ** 2 for n, w in seen.base.items()) for r in (seen.result, seen.plain))
    assert losses[-1] < losses[0] and far > near


def bands_hold(seen: Seen) -> None:
    """On the replayed text the states left their bands by less than without."""
    method, session = seen.method, seen.result.session
    rows, state = session.asides["GeRe"][:4], session.state["GeRe"]
    out = []
    for model in (seen.result.model, seen.plain.model):
        with torch.no_grad():
            h = torch.cat([forward(model, [r], hidden=True)[1] for r in rows]).float()
        low, high = (torch.cat([_flags(state[f"{n}/{_key(r)}"], h) for r in rows]) for n in ("low", "high"))
        out.append(margin(h, state["lo"], state["hi"], low, high).mean())
    assert 0 < out[0] < 0.8 * out[1] and method.weight


def end_holds(seen: Seen) -> None:
    """At the second look there was no rise, and the run ended there."""
    assert seen.result.log.ended.startswith("ClassSeparability") and len(seen.result.log.loss) == 3
    assert len(seen.plain.log.loss) == 20


@torch.no_grad()
def largest_hold(seen: Seen) -> None:
    """Of each four drawn rows one was trained on; of the first four the one of the largest nuclear norm."""
    order = Mix(seen.task).draw(0)
    drawn = [next(order) for _ in range(4)]
    sizes = [torch.linalg.matrix_norm(forward(seen.base_model, [r])[1].double(), "nuc").item() for r in drawn]
    chosen = drawn[sizes.index(max(sizes))]
    packed, logits = forward(seen.base_model, [chosen])
    first = torch.nn.functional.cross_entropy(logits, packed.target).item()
    assert math.isclose(seen.result.log.loss[0][1]["task"], first, rel_tol=1e-5)
    assert seen.result.log.realised["task/examples"] == 20 and seen.plain.log.realised["task/examples"] == 80


@torch.no_grad()
def losses_of(model: Any, row: Any) -> torch.Tensor:
    """(n,) loss of each target of one row alone, in nats."""
    packed, logits = forward(model, [row])
    return torch.nn.functional.cross_entropy(logits.double(), packed.target, reduction="none")


def drawn_first(seen: Seen, count: int = 4) -> list[Any]:
    order = Mix(seen.task).draw(0)
    return [next(order) for _ in range(count)]


def easy_first_holds(seen: Seen) -> None:
    """The first batch is of the 8 of 24 rows that the base finds easiest (24 * 0.3 = 7.2, and a row begun counts)."""
    means = [losses_of(seen.base_model, r).mean().item() for r in seen.task]
    first = seen.method.order(means, 0, 0)[:4]
    assert set(first) <= set(sorted(range(24), key=lambda i: means[i])[:8])
    wanted = torch.cat([losses_of(seen.base_model, seen.task[i]) for i in first]).mean().item()
    assert math.isclose(seen.result.log.loss[0][1]["task"], wanted, rel_tol=1e-5)
    assert wanted < seen.plain.log.loss[0][1]["task"]


def masks_hold(seen: Seen) -> None:
    """At rate 0 the first step is the plain one; later other tokens are read, and the targets stay."""
    masked, plain = ([p["task"] for _, p in r.log.loss] for r in (seen.result, seen.plain))
    assert masked[0] == plain[0] and all(a != b for a, b in zip(masked[1:], plain[1:], strict=True))
    hit = total = 0
    for row in seen.task * 20:
        total += row.num_scored
        other = seen.method.masked(row, 0.5, total, seen.result.session.ctx)
        assert (other.predicted == row.ids).all() and (other.ids == row.ids)[~row.scored].all()
        hit += int((other.ids != row.ids).sum())
    assert abs(hit / total - 0.5) < 3 * (0.25 / total) ** 0.5 + 0.5 / 400  # a random token is the right one sometimes


def samples_hold(seen: Seen) -> None:
    """The first loss is the mean over four rows of the mean over each one's tokens."""
    wanted = sum(losses_of(seen.base_model, r).mean().item() for r in drawn_first(seen)) / 4
    assert math.isclose(seen.result.log.loss[0][1]["task"], wanted, rel_tol=1e-5)


def keys_hold(seen: Seen) -> None:
    """The first loss, with the key tokens found by comparing every answer with every other."""
    answers = {tuple(r.ids[r.scored].tolist()) for r in seen.task}

    def weights(own: tuple[int, ...]) -> list[float]:
        shared = [next((n for n, (x, y) in enumerate(zip(own, o, strict=False)) if x != y), len(own)) for o in answers]
        key = {0, *(n for n in shared if n < len(own))}
        rest = len(own) - len(key)
        return [min(rest / len(key), 9.0) if n in key and len(key) < rest else 1.0 for n in range(len(own))]

    first = drawn_first(seen)
    weight = torch.tensor([w for r in first for w in weights(tuple(r.ids[r.scored].tolist()))], dtype=torch.float64)
    losses = torch.cat([losses_of(seen.base_model, r) for r in first])
    assert weight.max() > 1
    assert math.isclose(
        seen.result.log.loss[0][1]["task"], ((weight * losses).sum() / weight.sum()).item(), rel_tol=1e-5
    )


def half_right(answer: str, reference: str, row: Any) -> bool:
    """A verifier for S3FT: every answer to a prompt of even length is right."""
    return len(row.prompt) % 2 == 0


def two_thirds(answer: str, reference: str, row: Any) -> bool:
    """A verifier that is right about 16 of the 24 tickets, where rounds of rows must divide."""
    return len(row.prompt) % 3 != 1


def parts_of(row: Any, tokenizer: Any) -> tuple[list[int], str, str]:
    """The prompt's tokens, its text and the answer's text of a ticket."""
    start = int(row.scored.argmax())
    prompt, answer = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (row.ids[:start], row.ids[start:]))
    return row.ids[:start].tolist(), prompt, answer


@torch.no_grad()
def own_answers_hold(seen: Seen) -> None:
    """The first step is on the base's answers where the verifier takes them, and it takes some."""
    tokenizer, order, rows = build_tokenizer(), Mix(seen.task).draw(0), []
    for row in (next(order) for _ in range(4)):
        ids, prompt, answer = parts_of(row, tokenizer)
        if half_right("", "", Row(prompt, "")):
            (got,) = respond(seen.base_model, tokenizer, [(ids, 2)], [seed_of(0, ids, 0)], Sampling(2, 5.0))
            said = tokenizer.decode(got, skip_special_tokens=True).strip().split("\n")[0]
            answer = f" {said}" if said and "\ufffd" not in said else answer
        rows.append(tokenize(Row(prompt, answer), tokenizer, 512))
    packed, logits = forward(seen.base_model, rows)
    first = torch.nn.functional.cross_entropy(logits, packed.target).item()
    assert math.isclose(seen.result.log.loss[0][1]["task"], first, rel_tol=1e-5)
    assert not math.isclose(seen.plain.log.loss[0][1]["task"], first, rel_tol=1e-3)


@torch.no_grad()
def shown_answers_hold(seen: Seen) -> None:
    """The first step's term by the model's own forward, row by row: JSD behind the prompt and one with the answer."""
    m, model, tokenizer, order = seen.method, seen.base_model, build_tokenizer(), Mix(seen.task).draw(0)
    total = count = 0
    for row in (next(order) for _ in range(4)):
        ids, prompt, answer = parts_of(row, tokenizer)
        seed = seed_of("0/SDFT/0", ids, 0)
        sampling = Sampling(m.max_completion_length, m.temperature)
        (said,) = respond(model, tokenizer, [(ids, m.max_completion_length)], [seed], sampling)
        shown = tokenizer(f"{prompt}{answer}\n\n{prompt}")["input_ids"]
        a, b = (
            (model(torch.tensor([[*p, *said]])).logits[0, len(p) - 1 : -1] / m.temperature).double().log_softmax(-1)
            for p in (ids, shown)
        )
        middle = ((a.exp() + b.exp()) / 2).log()
        total += ((a.exp() * (a - middle)).sum() + (b.exp() * (b - middle)).sum()).item() / 2
        count += len(said)
    first = seen.result.log.loss[0][1]["SDFT"]
    assert math.isclose(first, total / count, rel_tol=1e-3) and first > 1e-4
    assert seen.result.log.realised["SDFT/examples"] == 80 and not seen.result.log.realised["task/examples"]


def easy_rows_weigh(seen: Seen) -> None:
    """The first loss, rows weighted by the base's losses on all rows of the task."""
    means = torch.stack([losses_of(seen.base_model, r).mean() for r in seen.task])
    first = [losses_of(seen.base_model, r) for r in drawn_first(seen)]
    tau = (means.sort().values[11] + means.sort().values[12]) / 2
    weighted = torch.cat([loss * (-loss.mean() / tau).exp() for loss in first])
    assert math.isclose(seen.result.log.loss[0][1]["task"], weighted.mean().item(), rel_tol=1e-5)


def protected_hold(seen: Seen) -> None:
    """The largest tenth of every matrix moved less than half as far as without."""
    near = far = 0.0
    for n, w in seen.base.items():
        if w.ndim == 2:
            mask = w.abs() >= w.abs().flatten().topk(round(0.1 * w.numel())).values[-1]
            near += float((seen.result.weights[n] - w).abs()[mask].sum())
            far += float((seen.plain.weights[n] - w).abs()[mask].sum())
    assert 0 < near < 0.5 * far


def states_hold(seen: Seen) -> None:
    """The states before the head are nearer to the base's than without."""
    with torch.no_grad():
        base, *others = (
            forward(m, seen.task, hidden=True)[1] for m in (seen.base_model, seen.result.model, seen.plain.model)
        )
    near, far = ((h - base).square().sum().item() for h in others)
    assert 0 < near < 0.8 * far


def skills_hold(seen: Seen) -> None:
    """The weights are those of the last three looks, whose losses stand in the state: source 0 helps the task too."""
    state = seen.result.session.state["SkillIt"]
    own, task = state["losses"].sum(1).tolist()
    assert state["losses"].shape == (2, 3) and list(seen.result.session.steering.source_weight) == ["SkillIt", "task"]
    ratio = math.exp(0.5 * (own + 0.5 * task) - 0.5 * task)
    assert float(state["weight/SkillIt"] / state["weight/task"]) == pytest.approx(ratio)
    parts = seen.result.session.held_out.parts
    assert sum(parts[n] * w for n, w in seen.result.session.steering.source_weight.items()) == pytest.approx(1)


def made_up_holds(seen: Seen) -> None:
    assert seen.result.log.realised["VRLwF/examples"] == 40
    rows = seen.result.session.asides["VRLwF"]
    assert kl(seen.base_model, seen.result.model, rows) < 0.8 * kl(seen.base_model, seen.plain.model, rows)


def faults_hold(seen: Seen) -> None:
    """The first loss is at least the plain one, and by the marks: a label that the base got wrong differs all over."""
    first, plain = (r.log.loss[0][1]["task"] for r in (seen.result, seen.plain))
    assert 1.5 * plain < first < 2.5 * plain  # w is below 1 + 0.5 + 1, and the random base knows nothing


def explained_holds(seen: Seen) -> None:
    """40 explanations came, and the model says them more readily than without."""
    rows = seen.result.session.asides["MORepair"]
    near, far = (sum(float(losses_of(m, r).sum()) for r in rows) for m in (seen.result.model, seen.plain.model))
    assert seen.result.log.realised["MORepair/examples"] == 40 and near < 0.98 * far


def answers_alone_hold(seen: Seen) -> None:
    """The first loss is that of the answers behind the first token alone."""
    rows = [r.ids[~r.scored][:1].tolist() + r.ids[r.scored].tolist() for r in drawn_first(seen)]
    first = torch.cat([losses_of(seen.base_model, token_row(ids, 1)) for ids in rows]).mean().item()
    assert math.isclose(seen.result.log.loss[0][1]["task"], first, rel_tol=1e-5)


def further_pretraining_holds(seen: Seen) -> None:
    """Six steps on the prompts with the base's labels, every token, and none of these later."""
    real, losses = seen.result.log.realised, [p["task"] for _, p in seen.result.log.loss]
    assert real["PCP/examples"] == 24 and real["task/examples"] == 56
    answers = sorted({tuple(r.ids[r.scored].tolist()) for r in seen.task})
    made = []
    for prompt in (r.ids[~r.scored].tolist() for r in seen.task):
        scores = [losses_of(seen.base_model, token_row([*prompt, *a], len(prompt))).sum() for a in answers]
        made.append(token_row([*prompt, *answers[int(torch.stack(scores).argmin())]], 1, source="PCP"))
    order = Mix(seen.task, (Source("PCP", made, 0.3),)).only(("PCP",)).draw(0)
    first = torch.cat([losses_of(seen.base_model, next(order)) for _ in range(4)]).mean().item()
    assert math.isclose(losses[0], first, rel_tol=1e-5)


def graft_holds(seen: Seen) -> None:
    """At most the share of the blocks' and norms' entries changed: the largest changes; embeddings are the base's."""
    taken = {n: seen.plain.weights[n] - w for n, w in seen.base.items() if "layers." in n or w.ndim == 1}
    kept = {n: seen.result.weights[n] != seen.base[n] for n in taken}
    assert all(torch.equal(seen.result.weights[n], w) for n, w in seen.base.items() if n not in taken)
    assert all(torch.equal(seen.result.weights[n][k], seen.plain.weights[n][k]) for n, k in kept.items())
    inside, outside = (torch.cat([taken[n].abs()[kept[n] == x] for n in taken]) for x in (True, False))
    total = len(inside) + len(outside)
    assert inside.min() > outside.max() and 0.98 * seen.method.share < len(inside) / total <= seen.method.share


def repair_holds(seen: Seen) -> None:
    """In the second half, on rows of its own, only chosen tensors within the budget moved."""
    weights, state = seen.middle[0], seen.result.session.state["FPF"]
    chosen = {n for n in seen.base if state[f"chosen/{n}"]}
    assert {n for n, w in seen.result.weights.items() if not torch.equal(w, weights[n])} == chosen
    total = sum(w.numel() for w in seen.base.values())
    assert 0 < sum(seen.base[n].numel() for n in chosen) <= seen.method.budget * total
    assert seen.result.log.realised["FPF:instructions/examples"] == 40 == seen.result.log.realised["task/examples"]


def average_holds(seen: Seen) -> None:
    """The training is that of the plain run; what comes out lags behind it, in every tensor."""
    assert seen.result.log.loss == seen.plain.log.loss
    for n, w in seen.base.items():
        mine, whole = seen.result.weights[n] - w, seen.plain.weights[n] - w
        assert 0 < mine.norm() < whole.norm(), n


def even_and_said(seen: Seen) -> list[Any]:
    """Rows with prompts of even length to which the base says something: there `half_right` agrees with it."""
    tokenizer, kept = build_tokenizer(), []
    for row in seen.task:
        ids, prompt, _ = parts_of(row, tokenizer)
        (got,) = respond(seen.base_model, tokenizer, [(ids, 2)], [seed_of(0, ids, 0)], Sampling(2, 5.0, 1.0, ("\n",)))
        said = tokenizer.decode(got, skip_special_tokens=True).lstrip().split("\n")[0].strip()
        kept += [row] * bool(len(prompt) % 2 == 0 and said and "\ufffd" not in said)
    return kept


def kept_hold(name: str) -> Callable[[Seen], None]:
    def check(seen: Seen) -> None:
        kept = even_and_said(seen)
        assert 0 < len(kept) < 24 and seen.result.session.left_out == {name: pytest.approx(1 - len(kept) / 24)}
        order = Mix(kept).draw(0)
        first = torch.cat([losses_of(seen.base_model, next(order)) for _ in range(4)]).mean().item()
        assert math.isclose(seen.result.log.loss[0][1]["task"], first, rel_tol=1e-5)

    return check


def own_words_hold(seen: Seen) -> None:
    """40 answers came, and on what the base says to the prompts the model is nearer to it than without."""
    tokenizer, made = build_tokenizer(), []
    for row in seen.task:
        ids = parts_of(row, tokenizer)[0]
        (said,) = respond(seen.base_model, tokenizer, [(ids, 4)], [seed_of(9, ids, 0)], Sampling(4, 1.0))
        made.append(token_row([*ids, *said], len(ids)))
    assert seen.result.log.realised["OnPolicyKL/examples"] == 40
    assert kl(seen.base_model, seen.result.model, made) < 0.8 * kl(seen.base_model, seen.plain.model, made)


# ---- the rows


@dataclass(frozen=True)
class Case:
    """A method in the contract.

    off: values that must be no method at all, bit for bit.
    no_off: why there are none.
    invariant: asserts what the method promises after 20 steps.
    zero_at_base: the part of the loss that is 0 at the base weights; no_zero: why there is none.
    no_default: why its defaults find nothing to do on the tiny model.
    short: what stands for a default that would have the tiny model write for minutes.
    too_short: words with which its defaults refuse a run of a few steps. ends_at: the steps after which it ends a run.
    needs_rows: it looks at the task's rows as text, which a trainer that has only tokens does not know.
    picks: it compares the rows at hand, which in a trainer of several processes are those of one process.
    """

    method: Method
    invariant: Callable[[Seen], None]
    off: tuple[Method, ...] = ()
    no_off: str = ""
    zero_at_base: str = ""
    no_zero: str = ""
    no_default: str = ""
    short: Mapping[str, int] = field(default_factory=dict)
    too_short: str = ""
    ends_at: int = 0
    needs_rows: bool = False
    picks: bool = False

    @property
    def name(self) -> str:
        return self.method.name


NO_TERM = "it adds no term to the loss"
CASES = (
    Case(
        hf.AdaLoRA(r=4, target_r=2, lora_alpha=8, delta_t=2),
        budget_holds,
        no_off="a rank of 0 is refused: leaving it out is off",
        no_zero="random A and B are not orthonormal, so the term is not 0 at the base",
    ),
    Case(
        hf.AdaptiveEMA(fallback=0.2),
        average_holds,
        no_off="an average that is the weights themselves has no rate: leaving it out is off",
        no_zero=NO_TERM,
    ),
    Case(hf.AnchoredDecay(alpha=100.0), pull_holds, off=(hf.AnchoredDecay(alpha=0.0),), no_zero=NO_TERM),
    Case(
        hf.AnchoredSFT(weight=0.5),
        token_loss_holds,
        no_off="weight 0 is DFT, tested as such",
        zero_at_base="AnchoredSFT",
    ),
    Case(
        hf.BottleneckAdapter(reduction_factor=4),
        beside_holds,
        no_off="without adapters nothing would train: leaving it out is off",
        no_zero=NO_TERM,
    ),
    Case(
        hf.Breadcrumbs(density=0.3, outliers=0.05),
        tails_hold,
        off=(hf.Breadcrumbs(density=1.0, outliers=0.0),),
        no_zero=NO_TERM,
    ),
    Case(
        hf.CLEAR(verifier="cases:half_right", gamma=0.5, most=0.95, samples=1, max_new_tokens=2, temperature=5.0),
        kept_hold("CLEAR"),
        off=(hf.CLEAR(most=0.0), hf.CLEAR(gamma=0.0)),
        no_zero=NO_TERM,
    ),
    Case(hf.CPOPenalty(weight=1e5), protected_hold, off=(hf.CPOPenalty(weight=0.0),), zero_at_base="CPOPenalty"),
    Case(
        hf.ClassSeparability(texts=6, every=1, patience=1, least=1e9),
        end_holds,
        off=(hf.ClassSeparability(patience=0),),
        no_zero=NO_TERM,
        too_short="it never would",
        ends_at=3,
        needs_rows=True,
    ),
    Case(
        hf.CoBa(warmup=2, share=0.3, cut=0.3, tau=1.0),
        balance_holds,
        off=(hf.CoBa(cut=0.0),),
        no_zero=NO_TERM,
        too_short="CoBa balances sources",
    ),
    Case(
        hf.CoSO(rank=4, every=3, sketch=6, samples=4, max_tokens=16, rows_per_gradient=2),
        outside_holds,
        no_off="a rank of 0 is refused: leaving it out is off",
        no_zero=NO_TERM,
    ),
    Case(
        hf.ConnectedAdapter(reduction_factor=4),
        beside_holds,
        no_off="without adapters nothing would train: leaving it out is off",
        no_zero=NO_TERM,
    ),
    Case(
        hf.ControlLLM(every=1, weight=5.0),
        pairs_hold,
        no_off="without copies nothing would train: leaving it out is off",
        zero_at_base="ControlLLM",
    ),
    Case(
        hf.CorDA(r=4, lora_alpha=8, samples=8, max_tokens=32),
        halves_hold,
        no_off="a rank of 0 is refused: leaving it out is off",
        no_zero=NO_TERM,
    ),
    Case(hf.Curriculum(start=0.3, epochs=3.0), easy_first_holds, off=(hf.Curriculum(start=1.0),), no_zero=NO_TERM),
    Case(hf.DARE(density=0.3), dropped_holds, off=(hf.DARE(density=1.0),), no_zero=NO_TERM),
    Case(
        hf.DART(verifier="cases:half_right", k=2, trials=2, round=1, max_new_tokens=3, temperature=5.0, ended=False),
        share_holds("DART"),
        off=(hf.DART(share=0.0),),
        no_zero=NO_TERM,
        short={"max_new_tokens": 3},
        too_short="no right answer of the base",
    ),
    Case(hf.DFT(), token_loss_holds, no_off="it has no settings: leaving it out is off", no_zero=NO_TERM),
    Case(hf.DGHard(strength=0.6), noise_dropped_holds, off=(hf.DGHard(strength=0.0),), no_zero=NO_TERM),
    Case(hf.EAFT(alpha=30.0), unsure_holds, off=(hf.EAFT(alpha=0.0),), no_zero=NO_TERM),
    Case(
        hf.EVA(r=4, lora_alpha=8),
        ranks_hold,
        no_off="a rank of 0 is refused: leaving it out is off",
        no_zero=NO_TERM,
        needs_rows=True,
    ),
    Case(hf.EWC(alpha=5.0, rows=4, max_tokens=32), pull_holds, off=(hf.EWC(alpha=0.0),), zero_at_base="EWC"),
    Case(
        hf.FAIT(tries=2, max_new_tokens=3, temperature=5.0),
        faults_hold,
        off=(hf.FAIT(line=0.0, token=0.0),),
        no_zero=NO_TERM,
        short={"max_new_tokens": 3},
    ),
    Case(hf.FINCH(first=2, power=4.0), finch_holds, off=(hf.FINCH(power=0.0),), no_zero=NO_TERM),
    Case(hf.FLOW(), easy_rows_weigh, no_off="every temperature weights: leaving it out is off", no_zero=NO_TERM),
    Case(
        hf.FPF(repair_share=0.5, budget=0.3, sources=(GENERAL,), max_tokens=32),
        repair_holds,
        off=(hf.FPF(repair_share=0.0), hf.FPF(k=0)),
        no_zero=NO_TERM,
    ),
    Case(
        hf.FeatureDistillation(weight=100.0),
        states_hold,
        off=(hf.FeatureDistillation(weight=0.0),),
        zero_at_base="FeatureDistillation",
    ),
    Case(
        hf.Freeze(layers=1, embeddings=True, patterns=("norm",), layer_decay=0.9),
        freeze_holds,
        off=(hf.Freeze(layer_decay=1.0),),
        no_zero=NO_TERM,
    ),
    Case(
        hf.GOTD(share=0.3, sources=("holdfast:general/text.jsonl",), select=8, pool=24, max_tokens=32),
        share_holds("GOTD"),
        off=(hf.GOTD(share=0.0),),
        no_zero=NO_TERM,
    ),
    Case(
        hf.GSLoRA(r=4, lora_alpha=8, weight=0.5, forget=(GENERAL,), forget_weight=20.0, max_tokens=32),
        groups_hold,
        no_off="without its terms it is a LoRA of the feed-forward nets: leaving it out is off",
        no_zero="its terms are of the adapter's size and of rows to unlearn, and not 0 at the base",
    ),
    Case(
        hf.GeRe(weight=30.0, replay=0.0, pool=4, max_tokens=32),
        bands_hold,
        off=(hf.GeRe(weight=0.0, replay=0.0), hf.GeRe(rows_per_step=0)),
        zero_at_base="GeRe",
    ),
    Case(
        hf.GreenTrainer(rho=0.6, epochs=100),
        chosen_hold,
        no_off="rho 1 still leaves out what does not help: leaving it out is off",
        no_zero=NO_TERM,
    ),
    Case(hf.HalfFineTune(), half_holds, no_off="half is half: leaving it out is off", no_zero=NO_TERM),
    Case(
        hf.ICLAnchor(weight=20.0, every=1, short=0, shots=(1, 2), pool=8),
        anchor_holds,
        off=(hf.ICLAnchor(weight=0.0, gold=0.0), hf.ICLAnchor(prompts_per_step=0)),
        zero_at_base="ICLAnchor",
    ),
    Case(
        hf.IFT(),
        guesses_hold,
        off=(hf.IFT(lam=0.0, gamma=0.0),),
        no_zero="a weighted loss is not the plain one",
    ),
    Case(
        hf.InContextMix(share=0.3, pool=8),
        share_holds("InContextMix"),
        off=(hf.InContextMix(share=0.0),),
        no_zero=NO_TERM,
    ),
    Case(
        hf.IntruderReduction(mitigation_lambda=0.5, threshold_epsilon=0.95, top_k=6),
        strangers_hold,
        off=(hf.IntruderReduction(mitigation_lambda=1.0),),
        no_default="a few steps turn no direction so far away from the base's",
        no_zero=NO_TERM,
    ),
    Case(
        hf.KLToBase(weight=20.0),
        task_kl_holds,
        off=(hf.KLToBase(weight=0.0), hf.KLToBase(weight=0.0, on="replay")),
        zero_at_base="KLToBase",
    ),
    Case(hf.L2ToInit(alpha=5.0), pull_holds, off=(hf.L2ToInit(alpha=0.0),), zero_at_base="L2ToInit"),
    Case(hf.LIFT(lora_rank=2, filter_rank=4), lift_holds, off=(hf.LIFT(lora_rank=0),), no_zero=NO_TERM),
    Case(
        hf.LTSFT(),
        lottery_holds,
        no_off="a density of 0 is refused: leaving it out is off",
        no_zero=NO_TERM,
    ),
    Case(
        hf.LiNeS(alpha=0.25),
        line_holds(lambda m, n: 1.0 if "layers.1." in n else 0.25),
        off=(hf.LiNeS(alpha=1.0), hf.LiNeS(alpha=1.0, beta=0.0)),
        no_zero=NO_TERM,
    ),
    Case(
        hf.LoRA(r=4, lora_alpha=8, lora_dropout=0.1),
        lora_holds,
        no_off="a rank of 0 is refused: leaving it out is off",
        no_zero=NO_TERM,
    ),
    Case(
        hf.LoRAMoE(r=2, experts=4, lora_dropout=0.0, weight=1.0),
        beside_holds,
        no_off="without experts nothing would train: leaving it out is off",
        no_zero="the router begins anywhere, so the term is not 0 at the base",
    ),
    Case(
        hf.LocFT(),
        lambda seen: held(seen, [n for n in seen.base if n != "model.layers.1.mlp.down_proj.weight"]),
        no_off="one matrix is one: leaving it out is off",
        no_zero=NO_TERM,
    ),
    Case(
        hf.MFTCoder(inside="samples"),
        samples_hold,
        off=(hf.MFTCoder(across=False),),
        no_zero=NO_TERM,
        too_short="no method before it adds one",
    ),
    Case(
        hf.MORepair(max_new_tokens=4, rows=6),
        explained_holds,
        off=(hf.MORepair(weight=0.0), hf.MORepair(rows_per_step=0)),
        no_zero="an explanation is learnt, so its loss is not 0 at the base",
        needs_rows=True,
    ),
    Case(
        hf.ManyICL(share=0.3, unit="examples", max_tokens=96, pool=8),
        share_holds("ManyICL"),
        off=(hf.ManyICL(share=0.0),),
        no_zero=NO_TERM,
    ),
    Case(
        hf.MaskedThought(max_rate=0.8, warmup=0.5),
        masks_hold,
        off=(hf.MaskedThought(max_rate=0.0),),
        no_zero=NO_TERM,
    ),
    Case(
        hf.ModelSoup(base=1),
        line_holds(lambda _m, _n: 0.5),
        no_off="a soup of one is refused: leaving it out is off",
        no_zero=NO_TERM,
        too_short="one model alone",
    ),
    Case(hf.MovingAverage(decay=0.9), average_holds, off=(hf.MovingAverage(decay=0.0),), no_zero=NO_TERM),
    Case(
        hf.NonInstructional(share=0.3, max_tokens=48, pool=24),
        share_holds("NonInstructional"),
        off=(hf.NonInstructional(share=0.0),),
        no_zero=NO_TERM,
    ),
    Case(
        hf.OnPolicyKL(weight=20.0, max_new_tokens=4),
        own_words_hold,
        off=(hf.OnPolicyKL(weight=0.0), hf.OnPolicyKL(prompts=0)),
        zero_at_base="OnPolicyKL",
    ),
    Case(
        hf.OrthogonalLoRA(r=4, lora_alpha=8, principal=5, hard=True),
        apart_holds,
        no_off="nothing to be orthogonal to is refused: leaving it out is off",
        no_zero="soft, the start is not orthogonal, so the term is not 0 at the base; hard mode has no term",
        too_short="without earlier adapters it is LoRA",
    ),
    Case(
        hf.OrthogonalSubspace(),
        subspace_holds,
        off=(hf.OrthogonalSubspace(rank_frac=0.0),),
        no_zero=NO_TERM,
    ),
    Case(
        hf.PCP(share=0.3),
        further_pretraining_holds,
        off=(hf.PCP(share=0.0),),
        no_zero=NO_TERM,
    ),
    Case(
        hf.PEQA(),
        rounded_holds,
        no_off="weights that are not rounded have no scales: leaving it out is off",
        no_zero=NO_TERM,
    ),
    Case(
        hf.PhrasingPrompt(num_virtual_tokens=3, phrasings=("Say which:",)),
        phrasing_holds,
        no_off="a prompt of no tokens is refused: leaving it out is off",
        no_zero="behind a prompt and other words the model is not the base",
    ),
    Case(
        hf.PrefixTuning(num_virtual_tokens=3, learning_rate=0.1),
        prompt_alone_holds,
        no_off="a prefix of no positions is refused: leaving it out is off",
        no_zero=NO_TERM,
    ),
    Case(
        hf.ProMoT(num_virtual_tokens=3),
        prompt_holds,
        no_off="a prompt of no tokens is refused: leaving it out is off",
        no_zero=NO_TERM,
    ),
    Case(
        hf.PromptTuning(num_virtual_tokens=3),
        prompt_alone_holds,
        no_off="a prompt of no tokens is refused: leaving it out is off",
        no_zero=NO_TERM,
    ),
    Case(
        hf.RIF(verifier="cases:half_right", samples=1, max_new_tokens=2, temperature=5.0),
        kept_hold("RIF"),
        no_off="a row is solved or not: leaving it out is off",
        no_zero=NO_TERM,
        too_short="No row of the task is left",
        short={"max_new_tokens": 3},
    ),
    Case(
        hf.Replay(share=0.3, sources=(GENERAL,), max_tokens=32),
        share_holds("Replay"),
        off=(hf.Replay(share=0.0),),
        no_zero=NO_TERM,
    ),
    Case(
        hf.ResponseTuning(),
        answers_alone_hold,
        no_off="without prompts is without prompts: leaving it out is off",
        no_zero=NO_TERM,
    ),
    Case(
        hf.S2FT(d_ratio=0.2, u_ratio=0.1, o_ratio=0.5, v_ratio=0.5),
        slices_hold,
        no_off="ratios of 0 are refused: leaving it out is off",
        no_zero=NO_TERM,
    ),
    Case(
        hf.S3FT(verifier="cases:half_right", max_new_tokens=2, temperature=5.0, ended=False),
        own_answers_hold,
        no_off="it exchanges answers: leaving it out is off",
        no_zero=NO_TERM,
        too_short="would train on the given answers alone",
    ),
    Case(
        hf.SDFT(temperature=0.15, max_completion_length=6, distillation_mode="full_logits"),
        shown_answers_hold,
        no_off="it replaces the loss: leaving it out is off",
        no_zero="the teacher reads another prompt, so the term is not 0 at the base",
    ),
    Case(hf.SLERP(t=0.4), arc_holds, off=(hf.SLERP(t=1.0),), no_zero=NO_TERM),
    Case(
        hf.SSF(),
        scaled_holds,
        no_off="without factors nothing would train: leaving it out is off",
        no_zero=NO_TERM,
    ),
    Case(
        hf.SkillGraft(share=0.1),
        graft_holds,
        off=(hf.SkillGraft(share=1.0, embeddings=True),),
        no_zero=NO_TERM,
    ),
    Case(
        hf.SkillIt(eta=0.5, every=2, share=0.3, cut=0.3, graph=(("SkillIt", "task", 0.5),)),
        skills_hold,
        off=(hf.SkillIt(eta=0.0),),
        no_zero=NO_TERM,
        too_short="SkillIt weights sources|it never would",
    ),
    Case(
        hf.SpIEL(density=0.1, every=6, accumulate=2),
        spiel_holds,
        off=(hf.SpIEL(density=0.0),),
        no_zero=NO_TERM,
    ),
    Case(
        hf.TIES(density=0.3),
        trim_holds,
        off=(hf.TIES(density=1.0),),
        no_zero=NO_TERM,
    ),
    Case(hf.TLTraining(), keys_hold, off=(hf.TLTraining(max_weight=1.0),), no_zero=NO_TERM),
    Case(
        hf.TaskArithmetic(scale=-0.5),
        line_holds(lambda m, _n: m.scale),
        off=(hf.TaskArithmetic(scale=1.0),),
        no_zero=NO_TERM,
    ),
    Case(hf.UDS(), largest_hold, off=(hf.UDS(keep=1.0),), no_zero=NO_TERM, picks=True),
    Case(
        hf.VRLwF(weight=20.0, rows=6, max_tokens=16, rows_per_step=2),
        made_up_holds,
        off=(hf.VRLwF(weight=0.0), hf.VRLwF(rows_per_step=0)),
        zero_at_base="VRLwF",
    ),
    Case(hf.WiSEFT(alpha=0.5), line_holds(lambda m, _n: m.alpha), off=(hf.WiSEFT(alpha=1.0),), no_zero=NO_TERM),
)
BY_NAME = {c.name: c for c in CASES}


KNOWN = ("ICLAnchor", "KLToBase", "LoRA", "ProMoT")  # they stand for others before any other does


def _standing() -> frozenset[str]:
    """One method for each set of sites, and those of the default plan: what several processes, both hosts and every
    kind of model do with a method depends on its sites. `make test-long` tries all."""
    cases = [*reversed(CASES), *(BY_NAME[n] for n in KNOWN)]
    found = {(c.method.sites(), c.method.wraps): c.name for c in cases}
    return frozenset({*found.values(), "LoRA", "ICLAnchor", "KLToBase"})


STANDING = _standing()


def _covering() -> frozenset[str]:
    """The fewest of those that have every site and every need between them, as a wrapper and without: for what starts
    processes. Those that bring most that is missing first; of equal ones those of KNOWN, then the first by name."""

    def has(case: Case) -> set[tuple[str, bool]]:
        return {(t, case.method.wraps) for t in (*case.method.sites(), *case.method.needs)}

    found, left = {"LoRA", "ICLAnchor", "ProMoT"}, set[tuple[str, bool]]().union(*map(has, CASES))
    left -= set[tuple[str, bool]]().union(*(has(BY_NAME[n]) for n in found))
    while left:
        best = min(CASES, key=lambda c: (-len(has(c) & left), c.name not in KNOWN, c.name))
        found.add(best.name)
        left -= has(best)
    return frozenset(found)


COVERING = _covering()


def late(name: str, among: frozenset[str] = STANDING) -> list[Any]:
    """Marks of a test of a method (or a plan) that is long where another one stands for it."""
    return [pytest.mark.long] if name in BY_NAME.keys() - among else []


def stands(names: Iterable[str]) -> list[Any]:
    """Parameters of a test of plans by name that starts processes, or trainers."""
    return [pytest.param(n, marks=late(n, COVERING)) for n in names]


def cases_that_stand(cases: Iterable[Case] = CASES, among: frozenset[str] = STANDING) -> list[Any]:
    """Parameters of a test of the contract's rows."""
    return [pytest.param(c, id=c.name, marks=late(c.name, among)) for c in cases]
