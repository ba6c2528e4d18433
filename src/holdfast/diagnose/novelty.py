"""CGE: what is new in the tuning data? Text written by the difference of the two models.

    c(x) = sum over tokens of log p_tuned - log p_base
    texts: tokens drawn from softmax(log p_tuned - log p_base) where p_tuned >= ALPHA of its largest

Isonuma and Titov, ICLR 2025 (2410.14765), the static form; read in abstract and summaries. Their iterative form tunes
the base on the texts so far and contrasts again, so that what was found makes room for what else is new: `iterated`,
with the short LoRA training of the revival test. Theirs, too: to rank given texts by c (`contrasts`), which finds
novel ones.

Ours: 16 texts of at most 24 tokens from nothing, ALPHA 0.1, temperature 1, and the rule: something new is there when
the median of c a token over the upper half of the texts is CLEAR or more. What the texts say is a hint at labels,
formats and topics of the training data. They may be training data: treat them as private.

Cost: 24 steps of generation of both models, and one forward over the texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch

from holdfast.data.encoder import encoder_of
from holdfast.decode.contrast import Contrast
from holdfast.diagnose import NOTHING, Case, Finding
from holdfast.diagnose._pair import evaluating
from holdfast.diagnose.revival import LEARNING_RATE, briefly_tuned
from holdfast.engine.pack import token_row
from holdfast.errors import ModelError

TEXTS, TOKENS, ALPHA = 16, 24, 0.1  # ours
CLEAR = 0.5  # ours: nats a token
SHOWN = 8


def diagnose(case: Case) -> Finding:
    """Texts that tuning made likelier, the clearest first."""
    encoder = encoder_of(case.tuned, case.tokenizer)
    if not encoder.first:
        raise ModelError("The tokenizer has neither a first nor a last token to write from.", "Leave it out.")
    with evaluating(case.base, case.tuned):
        texts = written(case.base, case.tuned, encoder.first, encoder.stops, case.seed)
        rates = contrasts(case.base, case.tuned, texts, len(encoder.first))
    order = sorted(range(len(texts)), key=lambda n: -rates[n])
    plain = [case.tokenizer.decode(texts[n], skip_special_tokens=True) for n in order]
    clear = median(sorted(rates)[len(rates) // 2 :])
    return Finding(
        "novelty",
        _sentence(plain[0], rates[order[0]], clear),
        f"{len(texts)} texts written by the difference of the two models. The number is how much likelier tuning made"
        " a text, in nats a token. They may be training data: treat them as private.",
        [["nats a token", "text"], *([f"{rates[n]:+.2f}", t] for n, t in zip(order, plain, strict=True))][: SHOWN + 1],
        {"clear": clear, "most": rates[order[0]]},
    )


def written(base: Any, tuned: Any, first: Sequence[int], stops: frozenset[int], seed: int) -> list[list[int]]:
    """TEXTS texts (tokens, `first` included) drawn by the contrast of the two models; equal ones once."""
    device = next(tuned.parameters()).device
    ids = torch.tensor([list(first)] * TEXTS, device=device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        got = tuned.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), logits_processor=[Contrast(base, ALPHA)],
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_beams=1, repetition_penalty=1.0,
            max_new_tokens=TOKENS, eos_token_id=sorted(stops) or None, pad_token_id=min(stops, default=0),
        )  # fmt: skip
    return [list(t) for t in dict.fromkeys(tuple(_ended(row, len(first), stops)) for row in got.tolist())]


def _ended(row: list[int], start: int, stops: frozenset[int]) -> list[int]:
    """A row up to and with its end, without the padding behind it."""
    end = next((n for n, t in enumerate(row) if n >= start and t in stops), len(row) - 1)
    return row[: end + 1]


def iterated(case: Case, rounds: int = 3, learning_rate: float = LEARNING_RATE) -> list[list[list[int]]]:
    """Texts (tokens) of each round; from the second on, against the base after a short training on all texts so far.

    Both models are left as they were. Costs a training and TOKENS steps of generation a round.
    """
    encoder = encoder_of(case.tuned, case.tokenizer)
    start, found = encoder.first, []
    for n in range(rounds):
        rows = [token_row(t, len(start)) for texts in found for t in texts if len(t) > len(start)]
        taught = briefly_tuned(case.base, case.tokenizer, rows, case.seed, learning_rate) if rows else None
        with taught or nullcontext(case.base) as base, evaluating(base, case.tuned):
            found.append(written(base, case.tuned, start, encoder.stops, case.seed + n))
    return found


def contrasts(base: Any, tuned: Any, texts: Sequence[Sequence[int]], start: int = 1) -> list[float]:
    """c of each text (tokens) over its number of tokens from `start` on; 0 for a text that has none."""
    found = []
    for text in texts:
        ids = torch.tensor([list(text)])
        after, before = (_logp(m, ids)[start - 1 :] for m in (tuned, base))
        found.append(float((after - before).mean()) if len(after) else 0.0)
    return found


@torch.no_grad()
def _logp(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(T - 1,) log-probability of each token but the first, fp32."""
    ids = ids.to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return logits.gather(1, ids[0, 1:, None])[:, 0].cpu()


def _sentence(text: str, rate: float, clear: float) -> str:
    if clear < CLEAR:
        return f"{NOTHING}: no text was found that tuning made much likelier, at most {rate:.2f} nats a token."
    return f"Tuning taught text such as {text.strip()!r}: {rate:.1f} nats a token likelier than in the base."
