"""Answers of a model to prompts of tokens: each prompt has its own dice, and answers can be kept on disk by content.

Sampling is the greedy choice after Gumbel noise, which has the same law. The noise of a prompt comes from its own seed
alone, so an answer does not depend on the prompts beside it, on where a killed run went on, or on how many processes
share the work; but for ties within rounding, which may fall otherwise in a batch of another shape.

Legend: B prompts, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from holdfast.data.encoder import encoder_of
from holdfast.engine import processes
from holdfast.files import cache_dir, content_key, read_json, write_json
from holdfast.measure.generate import BATCH, GREEDY, bare, new_tokens
from holdfast.models.identity import tensors_fingerprint
from holdfast.versions import versions

FORMAT = 2  # of what is kept; raise it when an answer comes about in another way
PIECE = 2 * BATCH  # answers in a file: what a killed run loses at most
ADAPTER = (".lora_", ".modules_to_save.")  # in the names of weights that an adapter brings
Tokens = list[int]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature 0 takes the likeliest token; top_p: of the likeliest tokens, this mass; stop:
    an answer ends with the token that completes one of these texts."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


class Dice:
    """A logits processor that makes the greedy choice a draw: one generator a row, on the CPU, on every device."""

    def __init__(self, seeds: Sequence[int], sampling: Sampling):
        self.rolls = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.sampling = sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, V) scores -> scores whose largest is a draw."""
        scaled = _nucleus(scores.float() / self.sampling.temperature, self.sampling.top_p)
        waits = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=g) for g in self.rolls])
        return scaled - waits.log().to(scaled.device)  # -log of an exponential wait is Gumbel noise


def _nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Scores outside of the smallest set of likeliest tokens that holds `top_p` of the mass are -inf."""
    if top_p >= 1:
        return scores
    ordered, index = scores.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    return scores.scatter(-1, index, ordered.masked_fill(before >= top_p, -torch.inf))


def seed_of(seed: int | str, prompt: Sequence[int], draw: int) -> int:
    """The seed of one answer: of the run's seed, the prompt and the number of the draw, of nothing else."""
    digest = hashlib.sha256(f"{seed}/{draw}/{','.join(map(str, prompt))}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def respond(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[Tokens, int]],
    seeds: Sequence[int],
    sampling: Sampling,
    progress: Callable[[float], None] | None = None,
) -> list[Tokens]:
    """The model's answer to each (prompt, most new tokens), up to the token that ends it, which is included.

    Several processes share the work; all must ask alike, and all get the whole.
    """
    stops = encoder_of(model, tokenizer).stops
    ends = {"eos_token_id": sorted(stops)} if stops else {}
    rolls = (lambda at: Dice([seeds[n] for n in at], sampling)) if sampling.temperature > 0 else None
    with bare(model):
        found = new_tokens(
            model, tokenizer, prompts, stop=sampling.stop, progress=progress, dice=rolls, **ends, **GREEDY
        )
    return [_ended(ids, stops, sampling.stop, tokenizer) for ids in found]


def _ended(ids: Tokens, stops: Collection[int], texts: Sequence[str], tokenizer: Any) -> Tokens:
    """An answer without what follows its end."""
    end = next((n + 1 for n, token in enumerate(ids) if token in stops), len(ids))
    if texts and any(text in tokenizer.decode(ids[:end]) for text in texts):
        end = next(n for n in range(1, end + 1) if any(text in tokenizer.decode(ids[:n]) for text in texts))
    return ids[:end]


def room_of(model: Any) -> int:
    """Tokens that the model can read, prompt and answer together."""
    config = getattr(model, "module", model).config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


# ---- kept by content


def identity_of(model: Any) -> str:
    """Identity of the base's weights and configuration, the same with and without an adapter on it."""
    named = {
        n.replace(".base_layer.", ".").removeprefix("base_model.model."): t
        for n, t in model.state_dict().items()
        if not any(part in n for part in ADAPTER)
    }
    return content_key(tensors_fingerprint(named), model.config.to_dict())


def kept(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    num: int = 1,
    seed: int = 0,
    identity: str,
    progress: Callable[[float], None] | None = None,
) -> list[list[Tokens]]:
    """`num` answers to each prompt, from the cache or into it, a piece at a time, so that a killed run goes on.

    identity: `identity_of` the model. What other versions of the libraries answered is not used.
    """
    stops = sorted(encoder_of(model, tokenizer).stops)
    name = content_key(FORMAT, identity, stops, asdict(sampling), seed, versions(), torch.get_num_threads())
    folder = cache_dir() / "answers" / name
    asked = {_key(p, draw): (list(p), draw) for p in prompts for draw in range(num)}
    found = processes.told(lambda: _read(folder, asked))
    missing = sorted((k for k in asked if k not in found), key=lambda k: (len(asked[k][0]), k))
    for at in range(0, len(missing), PIECE):
        piece = missing[at : at + PIECE]
        wanted = [(asked[k][0], sampling.max_new_tokens) for k in piece]
        seeds = [seed_of(seed, *asked[k]) for k in piece]
        got = dict(zip(piece, respond(model, tokenizer, wanted, seeds, sampling), strict=True))
        if processes.first():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"{content_key(piece)}.json", got)
        found |= got
        if progress:
            progress(1 - (len(missing) - at - len(piece)) / len(asked))
    return [[found[_key(p, draw)] for draw in range(num)] for p in prompts]


def _key(prompt: Sequence[int], draw: int) -> str:
    return content_key([int(i) for i in prompt], draw)


def _read(folder: Path, asked: Mapping[str, Any]) -> dict[str, Tokens]:
    """What earlier runs left in whole pieces, of what is asked."""
    pieces = [read_json(path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
    return {key: ids for piece in pieces for key, ids in piece.items() if key in asked}
