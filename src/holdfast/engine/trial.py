"""How a model may be run, found out by trying it on two short rows: nothing is believed of its name.

Each way is tried once a model, when it is loaded or first goes that way, by a few forwards of 16 tokens. A model that
lets a token see later ones is refused by name: in training it would see the answers, and its scores would mean
nothing. Any other way that differs from the plain forward of one row is not gone with this model.

What is found is kept beside the weights, by the transformers model inside DDP and PEFT; it is in no config and no
state dict, and a copy of the model has it too. Weights that FSDP2 cuts must be tried before, while they are whole;
a model that comes cut is tried by all processes alike, as each of them asks for the same forward next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import torch

from holdfast.engine.pack import pack, token_row
from holdfast.engine.passing import stay
from holdfast.engine.ways import Outcome, inner, run_packed, run_padded
from holdfast.errors import HoldfastError, ModelError

T = TypeVar("T")
KEPT = "_holdfast_trial"  # attribute of the model: what was found, as plain data
SHORT, LONG, SAME = 5, 11, 7  # tokens of the two rows, and how many of the long one stay when its end is changed
SMALL = 20_000_000  # parameters up to which a copy in fp32 on the CPU is tried too: it tells rounding from a path best
# Ours, in spreads of logits: the median over positions, and the largest. Of 190 tiny random architectures fp32 rounds
# by less than 1e-5 and the weakest wrong path is 9e-4 off; trained weights in bf16 round by some hundredths.
EXACT = (2e-4, 2e-3)
COARSE = (0.1, 0.5)
LEAK = (0.03, 0.3)  # as COARSE, of rows of one length: they round alike, but for experts
MOVING = ("dynamic", "longrope")  # rotary embeddings that a forward changes
CHOOSES = ("index_topk", "indexer_budget", "keep_window_size")  # how many tokens attention reads that chooses them


def packs(model: Any) -> bool:
    """Whether rows may be laid end to end, and the place where a model is refused (`can_pack` asks its windows too).

    Raises:
        ModelError: it is not causal, or cannot read a row of token ids alone.
    """
    return kept(model, "packs", _packs)


def asked(model: Any) -> list[tuple[int | None, float | None, bool]]:
    """What each layer asks of the attention of packed rows: (window, soft cap, whether it has sinks)."""
    return kept(model, "asked", lambda m: Trial(m).asked())


def pads_right(model: Any) -> bool:
    """Whether rows may go side by side, padded on the right."""
    return packs(model) is not None and kept(model, "right", lambda m: _all(m, Trial.pads_right))


def beside(model: Any) -> bool:
    """Whether rows of equal length may go side by side."""
    return packs(model) is not None and kept(model, "beside", lambda m: _all(m, Trial.beside))


def continues(model: Any, pad: int, padded: bool) -> bool:
    """Whether prompts that go together are continued as each of them alone: `padded` on the left with `pad`, or equal.

    Recurrent models may read the padding, and RWKV mixes up even the states of prompts of one length.
    """
    name = f"continues {pad} {padded}"
    return packs(model) is not None and kept(
        model, name, lambda m: all(one.continues(pad, padded) for one in _trials(m))
    )


def together(model: Any) -> int:
    """Tokens up to which rows may share a forward: longer ones depend on those beside them.

    With LongRoPE or dynamic scaling the longest row of a forward decides the positions of all of them. Attention that
    chooses some tokens chooses none up to that many; beyond, ties are decided by the width of the forward.
    """
    return kept(model, "together", _together)


def _together(model: Any) -> int:
    config = _text(inner(model).config)
    chosen = [getattr(config, name, None) for name in CHOOSES]
    if "minimax_m3_sparse" in (getattr(config, "layer_types", None) or ()):
        chosen.append(config.index_topk_blocks * config.index_block_size)
    return min([n for n in chosen if n] + [_moves_at(m) for m in model.modules() if moves(m)], default=1 << 30)


def moves(module: Any) -> bool:
    """Whether this is a rotary embedding that a forward changes (of all layers, or of one kind of them)."""
    kind = getattr(module, "rope_type", "")
    return any(k in MOVING for k in (kind.values() if isinstance(kind, dict) else [kind]))


def _moves_at(module: Any) -> int:
    given = getattr(module.config, "rope_parameters", None) or {}
    each = given.values() if given and all(isinstance(v, dict) for v in given.values()) else [given]
    found = [p.get("original_max_position_embeddings") for p in each if p.get("rope_type") in MOVING]
    return min([n for n in found if n] or [module.original_max_seq_len])


def reach(model: Any) -> int:
    """Tokens that the model reads: positions of its configuration, less those that stand before the first token.

    A table of positions with a padding index (RoBERTa and its relatives) begins behind that index.
    """
    limit = getattr(_text(inner(model).config), "max_position_embeddings", None) or 2048
    return limit - kept(model, "before", lambda m: _before(m, limit))


def _before(model: Any, limit: int) -> int:
    tables = [
        m
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Embedding) and "position" in name.rsplit(".", 1)[-1] and m.num_embeddings == limit
    ]
    return max((m.padding_idx + 1 for m in tables if m.padding_idx is not None), default=0)


def is_cut(model: Any) -> bool:
    """Whether this process holds only a part of the weights (FSDP2, ZeRO-3, tensor parallelism)."""
    return any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())


def kept(model: Any, name: str, find: Callable[[Any], T]) -> T:
    """What `find` gives for the model, which must be plain data; found once."""
    model = getattr(model, "module", model)
    core = inner(model)
    book, config = core.__dict__.setdefault(KEPT, {}), core.config
    # what may be switched later, and changes what a forward is
    key = f"{name} {_prompted(model)} {getattr(config, 'is_causal', None)} {getattr(config, 'is_decoder', None)}"
    if key not in book:
        with undisturbed(model):
            book[key] = find(model)
    return book[key]


def forget(model: Any) -> None:
    """The model computes something else from now on: find out anew how it may be run."""
    inner(model).__dict__.pop(KEPT, None)


def _prompted(model: Any) -> bool:
    """Whether PEFT puts virtual tokens or keys before every row."""
    return any(getattr(c, "is_prompt_learning", False) for c in getattr(model, "peft_config", {}).values())


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Dropout off and no gradients; modes, dice and the casts that autocast keeps are afterwards as before."""
    device = next(model.parameters()).device
    modes = [(m, m.training) for m in model.modules()]
    # weights of two precisions may need autocast to meet; a forward that trains cannot use casts without gradients
    autocast = torch.is_autocast_enabled(device.type) and len(_precisions(model)) > 1
    dtype = torch.get_autocast_dtype(device.type)
    quiet = torch.autocast(device.type, dtype, enabled=autocast, cache_enabled=False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), quiet:
            yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode


def _precisions(model: Any) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters() if p.is_floating_point()}


# ---- the trial


def _packs(model: Any) -> bool:
    trials = _trials(model)
    for one in trials:
        one.must_be_causal(type(inner(model)).__name__)
    return all(one.packs() for one in trials)


def _all(model: Any, right: Callable[[Trial], bool]) -> bool:
    return all(right(one) for one in _trials(model))


def _trials(model: Any) -> list[Trial]:
    """Of the model and, if it is small, of a copy in fp32 on the CPU: it may be off by no more than bf16 rounds."""
    mine, core = Trial(model), inner(model)
    small = sum(p.numel() for p in model.parameters()) <= SMALL and not is_cut(model)
    if mine.exact or not small or getattr(core, "hf_device_map", None) or getattr(core, "is_quantized", False):
        return [mine]
    try:
        apart = copy.deepcopy(model)
        stay(apart)  # it has no device of its own to pass blocks through
        sharp = Trial(apart.float().cpu().eval())
        assert sharp.alone
    except (RuntimeError, TypeError, NotImplementedError, ModelError):
        return [mine]
    return [sharp, mine]


class Trial:
    """Two short rows, and what one model makes of them in one way or another."""

    def __init__(self, model: Any):
        self.model, self.core, self.device = model, inner(model), next(model.parameters()).device
        full = _precisions(model) <= {torch.float32, torch.float64} and not getattr(self.core, "is_quantized", False)
        # GPUs round products in fp32 as they are told elsewhere
        self.exact = full and self.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        self.long = [self.words[3 * n % len(self.words)] for n in range(LONG)]
        self.short = self.long[:SHORT]
        after = {a: b for a, b in zip(self.words, self.words[1:] + self.words[:1], strict=True)}
        self.changed = self.long[:SAME] + [after[i] for i in self.long[SAME:]]

    @cached_property
    def words(self) -> list[int]:
        """Ordinary tokens: within the vocabulary, and none that the configuration names."""
        text = _text(self.core.config)
        configs = [c for c in (self.core.config, text, getattr(self.core, "generation_config", None)) if c is not None]
        named = [v for c in configs for k, v in vars(c).items() if k.endswith(("_id", "_ids", "_index"))]
        special = {i for v in named for i in (v if isinstance(v, list | tuple) else [v]) if isinstance(i, int)}
        size = min(_rows(self.core), getattr(text, "vocab_size", None) or 1 << 30)
        many = [i for i in range(size // 4, size // 2) if i not in special][:64]
        few = [i for i in range(size) if i not in special][:64]
        return next((w for w in (many, few) if len(w) > 3 * LONG), few if len(few) > 1 else [*range(size)])

    @cached_property
    def alone(self) -> list[torch.Tensor]:
        """[(T, V)] logits of each row by itself: what every other way is held against."""
        return [self.plain([self.short])[0], self.plain([self.long])[0]]

    def plain(self, ids: Sequence[list[int]]) -> torch.Tensor:
        """(B, T, V) logits of rows of equal length, as the model gives them."""
        name = type(self.core).__name__
        try:
            logits = self.model(input_ids=torch.tensor(ids, device=self.device), use_cache=False).logits
        except Exception as error:
            _pass_on(error)
            what = f"{name} cannot read a row of token ids alone: {' '.join(str(error).split())[:300]}"
            raise ModelError(what, "Use a causal language model of text, set up as its own page says.") from error
        if logits.shape[:2] != (len(ids), len(ids[0])):
            what = f"{name} gives logits of shape {tuple(logits.shape)} for {len(ids)} x {len(ids[0])} token ids."
            raise ModelError(what, "Use a model that gives a line of logits for each token (no prompt adapter).")
        return logits

    @cached_property
    def tells(self) -> bool:
        return all(tells(a) for a in self.alone)

    def must_be_causal(self, name: str) -> None:
        """Leave off the end of the long row, or change it: what the model says before it must not change."""
        if not self.tells:
            return
        short, long = self.alone
        left_off, changed = apart(short, long[:SHORT]), apart(self.plain([self.changed])[0, :SAME], long[:SAME])
        if self.beyond(left_off) or beyond(changed, EXACT if self.exact else LEAK):
            what = (
                f"{name} is not causal: its tokens see later ones (other last tokens, or none, move the logits before "
                f"them by {max(left_off.max(), changed.max()).item():.1g} of their spread), so it would see the "
                "answers that it is to give."
            )
            raise ModelError(what, _cure(self.core.config))

    def packs(self) -> bool:
        return self._same(lambda: self._engine(run_packed), [a[:-1] for a in self.alone])

    def asked(self) -> list[tuple[int | None, float | None, bool]]:
        rows = pack([token_row(self.long, 1)], self.device)
        run_packed(self.model, rows, [0], None, ())
        return rows.layout.said

    def pads_right(self) -> bool:
        """With a mask, as in training, and without one, as in scoring: causality hides what follows a row."""
        bare = [self.short + [self.long[0]] * (LONG - SHORT), self.long]
        masked = self._same(lambda: self._engine(run_padded), [a[:-1] for a in self.alone])
        return masked and self._same(lambda: torch.cat([*self.plain(bare)])[_without(SHORT, LONG)], self.alone)

    def beside(self) -> bool:
        """Rows of equal length in one batch."""
        two = [self.long, self.changed]
        return self._same(lambda: self.plain(two).flatten(0, 1), [self.plain([ids])[0] for ids in two])

    def continues(self, pad: int, padded: bool) -> bool:
        """Two new tokens: the first reads the prompt, the second what the cache keeps of it."""
        prompts = [self.short if padded else self.changed, self.long]
        alone = [self._two_steps([prompt], pad) for prompt in (prompts[:1] if padded else prompts)]
        try:
            logits, words = self._two_steps(prompts, pad)
        except Exception as error:
            _pass_on(error)
            return False
        for n, (expected, (word,)) in enumerate(alone):
            steps = 2 if word == words[n] else 1  # after another first token the second is another's
            if self.differs(logits[n, :steps], expected[0, :steps]):
                return False
        return True

    def _two_steps(self, prompts: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, list[int]]:
        """((B, 2, V) logits, first new tokens) of the greedy text after each prompt."""
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=2, min_new_tokens=2, pad_token_id=pad, do_sample=False,
            num_beams=1, temperature=None, top_p=None, top_k=None, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return torch.stack(out.logits, dim=1), out.sequences[:, width].tolist()

    def _engine(self, way: Callable[..., Outcome]) -> torch.Tensor:
        """What one of `engine.ways` gives for all tokens of the two rows but the last of each."""
        rows = pack([token_row(ids, 1) for ids in (self.short, self.long)], self.device)
        return way(self.model, rows, [0, 0], None, ())[0]

    def _same(self, run: Callable[[], torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
        """Whether `run` gives what is expected; layers that pass no arguments on, and the like, do not."""
        try:
            got = run()
        except Exception as error:
            if not isinstance(error, ModelError):
                _pass_on(error)
            return False
        return not self.differs(got, torch.cat([*expected]))

    def differs(self, got: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether logits (T, V) are further apart than rounding in the model's precision puts them."""
        return self.tells and (got.shape != expected.shape or self.beyond(apart(got, expected)))

    def beyond(self, error: torch.Tensor) -> bool:
        """As `differs`, of errors (T,) in spreads of logits."""
        return beyond(error, EXACT if self.exact else COARSE)


def _rows(core: Any) -> int:
    """Rows of the input embeddings; without any, no more than the configuration's vocabulary counts."""
    try:
        return core.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):
        return 1 << 30


def _without(short: int, width: int) -> list[int]:
    """Places of two rows of `width`, the first of them padded behind its `short` tokens."""
    return [*range(short), *range(width, 2 * width)]


def _cure(config: Any) -> str:
    other = "else use a causal language model."
    for name in ("is_decoder", "causal", "is_causal"):
        if getattr(config, name, True) is False:
            return f"If it was trained as a decoder, set {name}=true in its configuration, {other}"
    return "Use a causal language model."


def _pass_on(error: Exception) -> None:
    """Raise again what says nothing about the model."""
    if isinstance(error, HoldfastError | torch.OutOfMemoryError):
        raise error


def _text(config: Any) -> Any:
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


# ---- how much is a difference


def beyond(error: torch.Tensor, limits: tuple[float, float]) -> bool:
    """Whether the median or the largest of `error` is above its limit."""
    if not error.isfinite().all():
        return True
    return bool(error.median() > limits[0] or error.max() > limits[1])


def apart(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """(T,) root mean square difference of (T, V) logits, in spreads of `expected`."""
    some = _some(expected)
    return (got[:, some].float() - expected[:, some].float()).pow(2).mean(-1).sqrt() / spread(expected)


def tells(logits: torch.Tensor) -> bool:
    """False where logits (T, V) are not finite, or all the same: nothing can be seen there."""
    some = _some(logits)
    return bool(some.any() and logits[:, some].float().std(-1, correction=0).min() > 0)


def spread(logits: torch.Tensor) -> torch.Tensor:
    """Standard deviation over the vocabulary of (T, V) logits, the mean of the rows."""
    return logits[:, _some(logits)].float().std(-1, correction=0).mean().clamp_min(1e-12)


def _some(logits: torch.Tensor) -> torch.Tensor:
    """(V,) tokens with ordinary logits: some models put those they never say at the lowest number there is."""
    return (logits.abs() < 1e9).all(0)
