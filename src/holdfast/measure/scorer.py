"""The one scorer: log-likelihood and greedy exactness of given continuations, each unique token computed once.

All requests become one prefix tree. Logits exist only where a token is scored, and a score depends on its own request
alone. Which way the tree goes through the model is chosen in `Scorer._walk`:

    lines    CUDA: pieces of the tree side by side in lines of one width (`engine.lines`): few forwards of few shapes,
             nothing waited for before the last one
    tree     each token once, in depth-first order, in slices that leave behind only the keys and values that later
             slices still see (`engine.tree`). A CPU computes several parts of the tree at once, each with its share
             of the threads: two forwards of one thread take less time than two of two threads in turn
    padded   models whose attention cannot be told what it may see: request by request, in batches
    alone    where bits must not depend on what else is scored: a forward has one request, so its shapes are its own

Truncation and the greedy flag follow lm-evaluation-harness 0.4.13 (`HFLM.loglikelihood`); so do the tokens of
`score`, which takes text. Our own suites and tasks give tokens (`holdfast.data.encoder`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from holdfast.data.encoder import Encoder, Split, encoder_of
from holdfast.engine import BATCH_TOKENS, trial
from holdfast.engine.attention import no_plans
from holdfast.engine.forward import attention, can_pack
from holdfast.engine.head import comes_apart, head_of, left_out
from holdfast.engine.lines import LINES_ATTENTION, WIDTHS, Lines, lay
from holdfast.engine.prefix import cache_name, is_prefix, layers_of
from holdfast.engine.threads import may_share, side_by_side
from holdfast.engine.tree import TREE_ATTENTION, Tree, grow, parts, slices, tiles
from holdfast.engine.ways import inner, inputs_behind
from holdfast.errors import DataError, HoldfastError, ModelError

Request = tuple[str, str]
Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # of some scored tokens: request, log-probability, is it the argmax
SCORED = 512  # tokens with logits in one forward: each costs a vocabulary of numbers
AGAIN = 32  # tokens that a part may repeat
AT_ONCE = 4  # parts at once: each needs memory for a forward
ROOM = 4  # a forward of lines has as many times batch_tokens: a GPU is not full before
LOGITS = 1 << 20  # logits widened to fp32 at a time on a CPU: they stay in its cache


@dataclass(frozen=True)
class Score:
    """logprob: summed natural-log probability of the continuation; greedy: every token was the argmax."""

    logprob: float
    greedy: bool
    num_tokens: int


class Scorer:
    """Scores continuations with one model.

    Args:
        model: a Hugging Face causal LM (a PEFT model too), in eval mode while scoring.
        tokenizer: its tokenizer.
        batch_tokens: new tokens per forward.
        soft_prompt: (p, D) embeddings or a prefix (`engine.prefix`) put before everything, or None.
        progress: called with the share done, 0 to 1.
        invariant: a score has the same bits whatever `batch_tokens` is and whatever else is scored.
        _lines: whether to go in lines, for tests and counts; None: on CUDA.

    Raises:
        ModelError: the model is not causal (when first used, where its weights are cut over processes).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_tokens: int = BATCH_TOKENS,
        soft_prompt: torch.Tensor | None = None,
        progress: Callable[[float], None] | None = None,
        invariant: bool = False,
        _lines: bool | None = None,
    ):
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.soft_prompt, self.progress, self.invariant = soft_prompt, progress, invariant
        self.device = next(model.parameters()).device
        self._in_lines = self.device.type == "cuda" if _lines is None else _lines
        self._cache = cache_name(inner(model))
        if not trial.is_cut(model):
            trial.packs(model)
        self.num_unique_tokens = 0  # of the last call: the floor is 2 * parameters * this

    # ---- tokens

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer's rules, with what stops this model's generation."""
        return encoder_of(self.model, self.tokenizer)

    def encode(self, request: Request) -> tuple[list[int], int]:
        """Return (context + continuation tokens, number of context tokens)."""
        return self.encode_all([request])[0]

    def encode_all(self, requests: Sequence[Request]) -> list[tuple[list[int], int]]:
        """`encode` of each by the rule of lm-evaluation-harness; what a plan trains on and our own suites use `fit`.

        Blanks that end the context are moved to the continuation, and the continuation is what context + continuation
        has beyond as many tokens as the context has alone, even where the two disagree about these. Only a tokenizer
        that ends every text by itself is not followed there: the harness would then drop the first token.
        """
        asked = [_spaces_moved(*r, alone=bool(self.encoder.begin)) if r[0] else r for r in requests]
        heads = self.encoder.prompts([context for context, _ in asked])
        texts = [type(context)(context + rest) for context, rest in asked]
        wholes = self.encoder.prompts(texts)
        out = []
        for given, (context, rest), head, whole in zip(requests, asked, heads, wholes, strict=True):
            if not context and not given[0]:
                head = whole[:1] if whole[:1] == self.encoder.first[:1] else self.encoder.first
                whole = [*head, *whole] if whole[:1] != head[:1] else whole
            out.append(self._cut([*head, *whole[len(head) :]], max(1, len(head)), rest))
        return out

    def fit(self, splits: Sequence[Split]) -> list[tuple[list[int], int]]:
        """What `score_tokens` takes: tokens cut from the left to what the model reads; a prompt has at least one."""
        out = []
        for split in splits:
            lead = [] if split.start else self.encoder.first
            ids = [*lead, *split.ids]
            out.append(self._cut(ids, max(1, split.start + len(lead)), ""))
        return out

    def _cut(self, ids: list[int], start: int, rest: str) -> tuple[list[int], int]:
        if len(ids) <= start:
            raise DataError(f"The continuation {rest!r} adds no token to its context.", "Fill it in, or leave it out.")
        cut = max(0, len(ids) - self.max_length - 1)
        if start <= cut:
            raise HoldfastError(
                f"A continuation has {len(ids) - start} tokens, the model reads {self.max_length}.",
                "Shorten it, or use a model that reads more.",
            )
        return ids[cut:], start - cut

    @property
    def max_length(self) -> int:
        return trial.reach(self.model) - self._held

    # ---- scores

    @torch.no_grad()
    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Score every (context, continuation); order and duplicates do not matter."""
        return self.score_tokens(self.encode_all(requests))

    @torch.no_grad()
    def score_tokens(self, encoded: Sequence[tuple[list[int], int]]) -> list[Score]:
        """As `score`, on token sequences (ids, number of context tokens >= 1)."""
        if not encoded:
            return []
        total = np.zeros(len(encoded))
        greedy = np.ones(len(encoded), dtype=bool)
        was_training = self.model.training
        self.model.eval()
        try:
            with no_plans(self.device):  # all ways but that of lines bring new shapes all the time
                for request, logprob, hit in self._walk(encoded):
                    np.add.at(total, request, logprob)
                    np.logical_and.at(greedy, request, hit)
        finally:
            self.model.train(was_training)
        if np.isnan(total).any():
            what = "The model gives probabilities that are no numbers (NaN), so nothing it scores means anything."
            raise ModelError(what, "Look for weights or states that are not finite; name an earlier checkpoint.")
        return [Score(float(total[n]), bool(greedy[n]), len(ids) - start) for n, (ids, start) in enumerate(encoded)]

    def _walk(self, encoded: Sequence[tuple[list[int], int]]) -> Iterator[Found]:
        ways = {
            "lines": self._walk_lines,
            "tree": self._walk_tree,
            "padded": self._walk_padded,
            "alone": self._walk_alone,
        }
        return ways[self._way(encoded)](encoded)

    def _way(self, encoded: Sequence[tuple[list[int], int]]) -> str:
        """One tree where that is right and no sequence would move the positions of the others."""
        longest = max(len(ids) - 1 for ids, _ in encoded) + self._held
        if self.invariant:
            return "alone"
        if longest <= trial.together(self.model):
            if (
                self._in_lines
                and not is_prefix(self.soft_prompt)
                and longest <= WIDTHS[-1]
                and supports_lines(self.model)
            ):
                return "lines"
            if supports_tree(self.model):
                return "tree"
        return "padded"

    def count(self, encoded: Sequence[tuple[list[int], int]]) -> int:
        """What `num_unique_tokens` is when one process scores all of these."""
        if self._way(encoded) in ("lines", "tree"):
            return len(grow(encoded)) - 1
        return sum(len(ids) - 1 for ids, _ in encoded)

    @property
    def _held(self) -> int:
        """Tokens of the soft prompt, which stand before everything."""
        return 0 if self.soft_prompt is None else len(self.soft_prompt)

    def _walk_tree(self, encoded: Sequence[tuple[list[int], int]]) -> Iterator[Found]:
        tree = grow(encoded)
        self.num_unique_tokens = len(tree) - 1
        soft = self._soft_keys()
        whole = [range(1, len(tree))]
        todo = parts(tree, self.batch_tokens, AGAIN) if self.device.type == "cpu" else whole
        with attention(self.model, TREE_ATTENTION):
            at_once = min(len(todo), AT_ONCE) if may_share(self.model) else 1
            for part, found in zip(todo, side_by_side(partial(self._part, tree, soft), todo, at_once), strict=True):
                yield from found
                if self.progress:
                    self.progress((part.stop - 1) / (len(tree) - 1))

    def _soft_keys(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(keys, values) of the soft prompt for each layer, (1, Hkv, p, D); none without one."""
        if self.soft_prompt is None:
            return []
        if is_prefix(self.soft_prompt):
            return layers_of(self.soft_prompt, 1, self._dtype)
        cache = DynamicCache(config=self.model.config)
        soft = self.soft_prompt[None].to(self._dtype, copy=True)  # some models (CTRL) scale what they get in place
        self.model(inputs_embeds=soft, **{self._cache: cache}, use_cache=True, logits_to_keep=1)
        return [(layer.keys, layer.values) for layer in cache.layers]

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    def _part(self, tree: Tree, soft: Sequence[tuple[torch.Tensor, torch.Tensor]], part: range) -> list[Found]:
        """Score the wanted nodes of a part."""
        todo, before, found = list(slices(tree, part, self.batch_tokens, SCORED)), [], []
        cache = DynamicCache(config=self.model.config) if len(todo) > 1 else None
        if soft:
            cache = DynamicCache()  # grows, also by the layers of copies that run beside the model's own
            for n, (keys, values) in enumerate(soft):
                cache.update(keys, values, n)
        held = self._held
        for nodes in todo:
            found += self._forward(tree, before, nodes, part.start, cache, held)
            if nodes is not todo[-1]:
                have = {node: held + n for n, node in enumerate([*before, *nodes])}
                before = [node for node in tree.above(nodes[-1] + 1) if node in have]
                _keep(cache, [*range(held), *(have[node] for node in before)], self.device)
        return found

    def _forward(
        self, tree: Tree, before: Sequence[int], nodes: Sequence[int], first: int, cache: Any, held: int
    ) -> list[Found]:
        """Nodes side by side below the cached soft prompt and ancestors; those before `first` are not scored here."""
        keep = [i for i, node in enumerate(nodes) if node >= first and node in tree.wanted]
        to = {"device": self.device}
        out = self.model(
            input_ids=torch.tensor([[tree.token[i] for i in nodes]], **to),
            position_ids=torch.tensor([[tree.depth[i] + held for i in nodes]], **to),
            tree_tiles=tiles(tree, before, nodes, held, self._dtype, self.device),
            **{self._cache: cache},
            use_cache=cache is not None,
            logits_to_keep=torch.tensor(keep or [len(nodes) - 1], **to),
        )
        if not keep:
            return []
        where = [(r, k, t) for k, i in enumerate(keep) for r, t in tree.wanted[nodes[i]]]
        request, row, target = (np.array(x) for x in zip(*where, strict=True))
        return [(request, *_read(out.logits[0], row, target))]

    def _walk_lines(self, encoded: Sequence[tuple[list[int], int]]) -> Iterator[Found]:
        """Everything is sent before the first forward, and read after the last."""
        held = self._held
        tree = grow([([0] * held + ids, held + start) for ids, start in encoded])
        self.num_unique_tokens = len(tree) - 1 - held
        todo, found = lay(tree, ROOM * self.batch_tokens, self.device), []
        with attention(self.model, LINES_ATTENTION):
            for n, lines in enumerate(todo, start=1):
                found += self._line_up(lines)
                if self.progress:
                    self.progress(n / len(todo))
        logprob, hit = (torch.cat(x).cpu().numpy() for x in zip(*found, strict=True))
        yield np.concatenate([lines.request for lines in todo]), logprob.astype(np.float64), hit

    def _line_up(self, lines: Lines) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(log-probability, whether it is the argmax) of what is scored in one forward, in its order, in pieces."""
        inputs: dict[str, Any] = {"input_ids": lines.ids}
        if self.soft_prompt is not None:
            inputs = {"inputs_embeds": self._behind(lines, self.soft_prompt.to(self._dtype))}
        head = head_of(self.model)
        apart = comes_apart(self.model) and not trial.is_cut(self.model)  # its weights are whole within a forward only
        with left_out(head) if apart else nullcontext():
            out = self.model(
                **inputs,
                position_ids=lines.positions,
                tree_lines=lines,
                use_cache=False,
                logits_to_keep=lines.keep,
            ).logits[0]
        found = []
        for start in range(0, len(out), SCORED):
            logits = out[start : start + SCORED]
            own = slice(*np.searchsorted(lines.rows, [start, start + len(logits)]))
            found.append(_tell(head(logits) if apart else logits, lines.row[own] - start, lines.target[own]))
        return found

    def _behind(self, lines: Lines, soft: torch.Tensor) -> torch.Tensor:
        """(1, B*W, D) embeddings: the soft prompt stands at the first positions, which are its alone."""
        embedded = self.model.get_input_embeddings()(lines.ids)
        at = lines.positions.clamp(max=len(soft) - 1)
        return torch.where((lines.positions < len(soft))[..., None], soft[at], embedded)

    def _walk_padded(self, encoded: Sequence[tuple[list[int], int]]) -> Iterator[Found]:
        """For models without plain full attention: right-padded batches sorted by length (causal, so exact)."""
        self.num_unique_tokens = sum(len(e[0]) - 1 for e in encoded)
        at = 0
        for batch in self._batches([len(ids) - 1 for ids, _ in encoded]):
            at += len(batch)
            ids = torch.zeros((len(batch), len(encoded[batch[0]][0]) - 1), dtype=torch.long)
            for i, n in enumerate(batch):
                ids[i, : len(encoded[n][0]) - 1] = torch.tensor(encoded[n][0][:-1])
            logits = self._logits(ids.to(self.device))
            for i, n in enumerate(batch):
                tokens, start = encoded[n]
                target = np.array(tokens[start:])
                mine = logits[i, start - 1 : len(tokens) - 1]
                yield np.full(len(target), n), *_read(mine, np.arange(len(target)), target)
            if self.progress:
                self.progress(at / len(encoded))

    def _walk_alone(self, encoded: Sequence[tuple[list[int], int]]) -> Iterator[Found]:
        """One forward a request, of its own length and with the threads that there are."""
        self.num_unique_tokens = self.count(encoded)
        for n, (ids, start) in enumerate(encoded):
            logits = self._logits(torch.tensor([ids[:-1]], device=self.device))[0, start - 1 :]
            target = np.array(ids[start:])
            yield np.full(len(target), n), *_read(logits, np.arange(len(target)), target)
            if self.progress:
                self.progress((n + 1) / len(encoded))

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Sequences that go side by side, the longest first: of equal length or alone where padding is not right."""
        pads, together = trial.pads_right(self.model), trial.together(self.model) - self._held
        order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
        while order:
            width = lengths[order[0]]
            most = max(1, self.batch_tokens // width)
            if not pads and (most == 1 or not trial.beside(self.model)):
                most = 1
            batch = order[:most]
            if not pads or width > together:
                batch = [n for n in batch if lengths[n] == width]
            del order[: len(batch)]
            yield batch

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T, V) logits of ids (B, T), read behind the soft prompt if there is one."""
        given = inputs_behind(self.model, ids, self.soft_prompt)
        return self.model(**given, use_cache=False).logits[:, -ids.shape[1] :]


def _spaces_moved(context: str, continuation: str, alone: bool) -> Request:
    """Spaces that end the context begin the continuation, as the tokenizer would have them.

    alone: the tokenizer puts something before texts, so that a context of spaces only leaves a token to start from.
    """
    moved = len(context) - len(context.rstrip())
    if moved and (alone or context.strip()):
        return type(context)(context[:-moved]), context[-moved:] + continuation  # Rendered stays Rendered
    return context, continuation


def _read(logits: torch.Tensor, row: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log-probability, whether it is the argmax) of each `target` token in its `row` of `logits` (N, V)."""
    best, norm, ties = [], [], []
    for part in logits.split(max(1, LOGITS // logits.shape[1]) if logits.device.type == "cpu" else SCORED):
        part = part.float()
        top = part.amax(-1, keepdim=True)
        best.append(top[:, 0])
        share = part.sub(top).exp_()
        norm.append(share.sum(-1).log_().add_(top[:, 0]))
        ties.append(share.floor_().sum(-1))
    row, target = (torch.from_numpy(x).to(logits.device) for x in (row, target))
    own = logits[row, target].float()
    hit = own == torch.cat(best)[row]
    tied = (hit & (torch.cat(ties)[row] > 1)).nonzero()[:, 0]  # the argmax is the first of several largest
    hit[tied] = logits[row[tied]].argmax(-1) == target[tied]
    return (own - torch.cat(norm)[row]).double().cpu().numpy(), hit.cpu().numpy()


def _tell(logits: torch.Tensor, row: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_read`, on the device: nothing is waited for."""
    norm, best = logits.float().logsumexp(-1), logits.argmax(-1)
    return logits[row, target].float() - norm[row], best[row] == target


def _keep(cache: Any, positions: list[int], device: Any) -> None:
    """Keep only `positions` of the cached keys and values."""
    index = torch.tensor(positions, dtype=torch.long, device=device)
    for layer in cache.layers:
        layer.keys, layer.values = (x.index_select(2, index) for x in (layer.keys, layer.values))


def supports_tree(model: Any) -> bool:
    """True for models that can be packed, and that score a small tree as row by row (tried once a model)."""
    return can_pack(model) and trial.kept(model, "tree", lambda m: _is_right(m, TREE_ATTENTION, _in_slices))


def supports_lines(model: Any) -> bool:
    """As `supports_tree`, of a tree in lines."""
    return can_pack(model) and trial.kept(model, "lines", lambda m: _is_right(m, LINES_ATTENTION, _in_lines))


def _in_slices(model: Any, rows: Sequence[tuple[list[int], int]]) -> Iterable[Found]:
    scorer, tree = Scorer(model, None, batch_tokens=len(rows[0][0]) - 2), grow(rows)
    return scorer._part(tree, (), range(1, len(tree)))


def _in_lines(model: Any, rows: Sequence[tuple[list[int], int]]) -> Iterable[Found]:
    return Scorer(model, None)._walk_lines(rows)


def _is_right(model: Any, name: str, walk: Callable[[Any, Sequence[tuple[list[int], int]]], Iterable[Found]]) -> bool:
    """Two rows that part after a few tokens: the later of them against itself alone."""
    one = trial.Trial(model)
    other, ids = sorted([*row, one.short[0]] for row in (one.long, one.changed))
    try:
        with attention(model, name):
            found = list(walk(model, [(other, 1), (ids, 1)]))
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
        return False  # attention or a cache of its own
    logits = one.plain([ids[:-1]])[0]  # of the later one: behind the other in the order of the tree
    if not trial.tells(logits):
        return True
    expected = logits.float().log_softmax(-1).gather(1, torch.tensor(ids[1:], device=logits.device)[:, None])[:, 0]
    got = np.concatenate([logprob[request == 1] for request, logprob, _ in found])
    error = (torch.from_numpy(got).to(expected) - expected).abs() / trial.spread(logits)
    return not one.beyond(error)
