"""Answers to many prompts, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from holdfast.data.encoder import encoder_of
from holdfast.engine import BATCH_TOKENS, processes, trial
from holdfast.engine.attention import no_plans
from holdfast.engine.ways import inner
from holdfast.measure.probe import Probe

BATCH = 32
RUNS = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "cache_implementation", "cache_config")
GREEDY = {"do_sample": False, "num_beams": 1}


def batch_for(batch_tokens: int, invariant: bool = False) -> int:
    """Prompts in a batch of generation: fewer where the user asks for smaller forwards than the default.

    invariant: each prompt alone, as greedy text depends on the last bits of a batch.
    """
    return 1 if invariant else min(BATCH, max(1, BATCH * batch_tokens // BATCH_TOKENS))


class Spoken(NamedTuple):
    """What a model wrote, and whether it came to its end before `max_tokens` did."""

    text: str
    ended: bool


def generate(
    model: Any,
    tokenizer: Any,
    probes: Sequence[Probe],
    *,
    batch_size: int = BATCH,
    progress: Callable[[float], None] | None = None,
) -> list[str]:
    """The texts of `spoken`."""
    return [s.text for s in spoken(model, tokenizer, probes, batch_size=batch_size, progress=progress)]


def spoken(
    model: Any,
    tokenizer: Any,
    probes: Sequence[Probe],
    *,
    batch_size: int = BATCH,
    progress: Callable[[float], None] | None = None,
) -> list[Spoken]:
    """The model's greedy text after each probe's context, up to its `max_tokens` or the end-of-text token.

    Prompts are sorted by length and padded on the left (not for models that read the padding, see `engine.trial`).
    Greedy text depends on the last bits of the logits, so two batch sizes may give other words in bf16; the batches
    depend on the probes and the kind of model alone, so base and tuned get the same.
    """
    encoder = encoder_of(model, tokenizer)
    seen = encoder.prompts([p.context for p in probes])
    prompts = [(ids or encoder.first, p.max_tokens) for ids, p in zip(seen, probes, strict=True)]
    ends = {"eos_token_id": sorted(encoder.stops)} if encoder.stops else {}
    with bare(model):
        new = new_tokens(model, tokenizer, prompts, batch_size=batch_size, progress=progress, **ends, **GREEDY)
    over = encoder.stops | {_pad(tokenizer)}
    texts = [_text(tokenizer, ids, over, p.with_special).strip() for ids, p in zip(new, probes, strict=True)]
    return [Spoken(text, not encoder.stops.isdisjoint(ids)) for text, ids in zip(texts, new, strict=True)]


@contextmanager
def bare(model: Any) -> Iterator[None]:
    """Inside, the model's generation config says how it runs and nothing of what it writes: no penalties, no bans, no
    least length. `generate` would take from it whatever is not passed."""
    both = dict.fromkeys((model, inner(model)))  # PEFT's wrapper hands its own down
    held = [(m, m.generation_config) for m in both]
    for m, own in held:
        m.generation_config = type(own)(**{k: v for k in RUNS if (v := getattr(own, k, None)) is not None})
    try:
        yield
    finally:
        for m, own in held:
            m.generation_config = own


def _text(tokenizer: Any, ids: list[int], over: frozenset[int], special: bool) -> str:
    """Tokens as text, without special tokens or with those that come before the end."""
    end = next((n for n, i in enumerate(ids) if i in over), len(ids)) if special else len(ids)
    return tokenizer.decode(ids[:end], skip_special_tokens=not special)


def go_on(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[list[int], int]],
    *,
    stop: Sequence[str] = (),
    batch_size: int = BATCH,
    progress: Callable[[float], None] | None = None,
    **settings: Any,
) -> list[str]:
    """The model's text after each prompt (token ids, most new tokens), without special tokens.

    A text ends soon after it holds one of `stop`; the caller cuts it there. `settings` go to the model's own
    `generate`, over its generation config. Several processes share the work by whole batches (`measure.shard`).
    """
    new = new_tokens(model, tokenizer, prompts, stop=stop, batch_size=batch_size, progress=progress, **settings)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in new]


@torch.no_grad()
def new_tokens(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[list[int], int]],
    *,
    stop: Sequence[str] = (),
    batch_size: int = BATCH,
    progress: Callable[[float], None] | None = None,
    dice: Callable[[Sequence[int]], Any] | None = None,
    **settings: Any,
) -> list[list[int]]:
    """As `go_on`, the tokens: with special ones, and padding behind those that ended before their batch.

    dice: indices of the prompts of a batch -> a logits processor for it, in that order (`measure.answers`).
    """
    if not prompts:
        return []
    batches = _batches(model, _pad(tokenizer), prompts, batch_size)
    rank, num = (0, 1) if settings.get("do_sample") else processes.world(model)  # dice are rolled batch after batch
    mine, found = batches[rank::num], {}
    was_training = model.training
    model.eval()
    try:
        for at, batch in enumerate(mine, start=1):
            rolls = {"logits_processor": [dice(batch)]} if dice else {}
            with no_plans(next(model.parameters()).device):  # each new token is a new shape
                new = _batch(model, tokenizer, [prompts[n] for n in batch], stop, {**settings, **rolls})
            for n, ids in zip(batch, new, strict=True):
                found[n] = ids[: prompts[n][1]].tolist()
            if progress:
                progress(at / len(mine))
    finally:
        model.train(was_training)
    parts = [list(found.items())] if num == 1 else processes.gather(list(found.items()))
    whole = {n: ids for part in parts for n, ids in part}
    return [whole[n] for n in range(len(prompts))]


def _batches(model: Any, pad: int, prompts: Sequence[tuple[list[int], int]], most: int) -> list[list[int]]:
    """Indices of prompts that go together, sorted by length.

    They are of one length where the model reads the padding too (recurrent ones do) or a longer prompt would move the
    positions of the others, and alone where even neighbours matter.
    """
    order = sorted(range(len(prompts)), key=lambda n: (prompts[n][1], len(prompts[n][0])))
    lengths, limit = {len(ids) for ids, _ in prompts}, trial.together(model)
    pads = len(lengths) > 1 and trial.continues(model, pad, padded=True)
    size = most if pads or (len(prompts) > 1 and trial.continues(model, pad, padded=False)) else 1
    out: list[list[int]] = []
    for n in order:
        ids, new = prompts[n]
        before = [len(prompts[i][0]) for i in out[-1]] if out else []
        alike = len(ids) in before or (pads and max([*before, len(ids)]) + new <= limit)
        if before and alike and len(before) < size:
            out[-1].append(n)
        else:
            out.append([n])
    return out


def _batch(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[list[int], int]], stop: Sequence[str], settings: dict[str, Any]
) -> torch.Tensor:
    """(B, new tokens) ids that follow the prompts."""
    device, pad = next(model.parameters()).device, _pad(tokenizer)
    width = max(len(ids) for ids, _ in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for i, (prompt, _) in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    got = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max(most for _, most in prompts),
        pad_token_id=pad,
        stopping_criteria=[_ended(tokenizer, stop, width)] if stop else [],
        **settings,
    )
    return got[:, width:]


def _pad(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _ended(tokenizer: Any, stop: Sequence[str], width: int) -> Callable[..., torch.Tensor]:
    """A row has ended when its latest new tokens hold a stop string.

    Two tokens more than a stop string has are read: a model may write it in other tokens (lm_eval's rule).
    """
    latest = 2 + max(len(tokenizer.encode(text, add_special_tokens=False)) for text in stop)

    def ended(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        texts = tokenizer.batch_decode(ids[:, max(width, ids.shape[1] - latest) :])
        return torch.tensor([any(s in text for s in stop) for text in texts], device=ids.device)

    return ended
