"""The one scorer: log-likelihood and greedy exactness of given continuations, each unique token computed once.

All requests become one prefix tree. The tree is walked depth first with one key/value cache: a shared few-shot prefix
is computed once, and the subtrees below it stand side by side in one row, where a token sees exactly its ancestors.
Logits exist only where a token is scored, and a score depends on its own request alone.

Tokens, truncation and the greedy flag follow lm-evaluation-harness 0.4.13 (`HFLM.loglikelihood`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from holdfast.engine.forward import attention, can_pack, inner
from holdfast.engine.pack import ATTENTION, Layout, layout
from holdfast.errors import HoldfastError
from holdfast.measure import BATCH_TOKENS

Request = tuple[str, str]
WIDEST = 512  # nodes of one block: attention is quadratic in them
SCORED = 512  # nodes with logits in one forward: each costs a vocabulary of floats


@dataclass(frozen=True)
class Score:
    """logprob: summed natural-log probability of the continuation; greedy: every token was the argmax."""

    logprob: float
    greedy: bool
    num_tokens: int


@dataclass
class Tree:
    """Prefix tree of token sequences in depth-first order; node 0 is the empty root."""

    token: list[int] = field(default_factory=lambda: [-1])
    parent: list[int] = field(default_factory=lambda: [-1])
    depth: list[int] = field(default_factory=lambda: [-1])
    end: list[int] = field(default_factory=list)  # one past the last node of the subtree
    wanted: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # node -> (request, target token)

    def __len__(self) -> int:
        return len(self.token)


def grow(sequences: Sequence[tuple[list[int], int]]) -> Tree:
    """Build the tree. Each sequence is (context + continuation tokens, number of context tokens >= 1)."""
    tree, path, before = Tree(), [0], []
    for n in sorted(range(len(sequences)), key=lambda i: sequences[i][0][:-1]):
        ids, start = sequences[n]
        inputs = ids[:-1]
        same = 0
        while same < min(len(before), len(inputs)) and before[same] == inputs[same]:
            same += 1
        del path[same + 1 :]
        for depth in range(same, len(inputs)):
            tree.token.append(inputs[depth])
            tree.parent.append(path[-1])
            tree.depth.append(depth)
            path.append(len(tree) - 1)
        for t in range(start, len(ids)):
            tree.wanted.setdefault(path[t], []).append((n, ids[t]))
        before = inputs
    tree.end = [i + 1 for i in range(len(tree))]
    for node in range(len(tree) - 1, 0, -1):
        tree.end[tree.parent[node]] = max(tree.end[tree.parent[node]], tree.end[node])
    return tree


def chunks(tree: Tree, most: int, widest: int, scored: int) -> Iterator[tuple[list[int], list[range]]]:
    """Cut the tree into forwards: (path from the root, blocks below it).

    A block is a whole subtree (depth-first, so a range of nodes) that hangs on the end of the path. Blocks have at
    most `widest` nodes, since attention is quadratic in them; the blocks of a forward have together at most `most`
    nodes and, unless one block has more, `scored` nodes with logits.
    """
    wanted = np.cumsum([node in tree.wanted for node in range(len(tree))])

    def cut(node: int, path: list[int]) -> Iterator[tuple[list[int], list[range]]]:
        child, batch, size, kept = node + 1, [], 0, 0
        while child < tree.end[node]:
            block = range(child, tree.end[child])
            more = int(wanted[block[-1]] - wanted[child - 1])
            if len(block) > widest:
                chain = [child]
                while tree.end[chain[-1]] - chain[-1] > widest and _one_child(tree, chain[-1]):
                    chain.append(chain[-1] + 1)
                if tree.end[chain[-1]] - chain[-1] <= widest:
                    chain.pop()
                yield from cut(chain[-1], path + chain)
            else:
                if batch and (size + len(block) > most or kept + more > scored):
                    yield path, batch
                    batch, size, kept = [], 0, 0
                batch.append(block)
                size, kept = size + len(block), kept + more
            child = block.stop
        yield path, batch

    yield from cut(0, [])


def _one_child(tree: Tree, node: int) -> bool:
    return node + 1 < tree.end[node] and tree.end[node + 1] == tree.end[node]


class Scorer:
    """Scores continuations with one model.

    Args:
        model: a Hugging Face causal LM (a PEFT model too), in eval mode while scoring.
        tokenizer: its tokenizer.
        batch_tokens: new tokens per forward.
        soft_prompt: (p, D) embeddings put before everything (ProMoT's task prompt), or None.
        progress: called with the share done, 0 to 1.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_tokens: int = BATCH_TOKENS,
        soft_prompt: torch.Tensor | None = None,
        progress: Callable[[float], None] | None = None,
    ):
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.soft_prompt, self.progress = soft_prompt, progress
        self.device = next(model.parameters()).device
        self.num_unique_tokens = 0  # of the last call: the floor is 2 * parameters * this

    # ---- tokens (lm-evaluation-harness rules)

    def encode(self, request: Request) -> tuple[list[int], int]:
        """Return (context + continuation tokens, number of context tokens)."""
        context, continuation = request
        moved = len(context) - len(context.rstrip())
        if moved and context.strip():
            context, continuation = context[:-moved], context[-moved:] + continuation
        if not context:
            first = self.tokenizer.bos_token_id
            first = self.tokenizer.eos_token_id if first is None else first
            ids = self._ids(continuation, add_special_tokens=False)
            ids, start = (ids if ids and ids[0] == first else [first, *ids]), 1
        else:
            ids = self._ids(context + continuation)
            start = len(self._ids(context))
        if len(ids) <= start:
            raise ValueError(f"The continuation {continuation!r} adds no token to its context.")
        cut = max(0, len(ids) - self.max_length - 1)
        if start <= cut:
            raise HoldfastError(
                f"A continuation has {len(ids) - start} tokens, the model reads {self.max_length}.",
                "Shorten it, or use a model that reads more.",
            )
        return ids[cut:], start - cut

    def _ids(self, text: str, **kw: bool) -> list[int]:
        bos = self.tokenizer.bos_token
        if bos and text.startswith(bos):
            kw["add_special_tokens"] = False
        return self.tokenizer.encode(text, **kw)

    @property
    def max_length(self) -> int:
        config = getattr(self.model.config, "text_config", None) or self.model.config
        limit = getattr(config, "max_position_embeddings", None) or 2048
        return limit - (0 if self.soft_prompt is None else len(self.soft_prompt))

    # ---- scores

    @torch.no_grad()
    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Score every (context, continuation); order and duplicates do not matter."""
        encoded = [self.encode(r) for r in requests]
        return self.score_tokens(encoded)

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
            walk = self._walk_tree if supports_tree(self.model) else self._walk_padded
            for request, target, logits in walk(encoded):
                of_target = logits.gather(1, target[:, None])[:, 0].float()
                total_here = (of_target - logits.float().logsumexp(-1)).double().cpu().numpy()
                np.add.at(total, request, total_here)
                np.logical_and.at(greedy, request, (logits.argmax(-1) == target).cpu().numpy())
        finally:
            self.model.train(was_training)
        return [Score(float(total[n]), bool(greedy[n]), len(ids) - start) for n, (ids, start) in enumerate(encoded)]

    def _walk_tree(self, encoded: Sequence[tuple[list[int], int]]) -> Iterator[Any]:
        from transformers import DynamicCache

        tree = grow(encoded)
        self.num_unique_tokens, done = len(tree) - 1, 0
        cache, held = DynamicCache(config=self.model.config), []
        offset = self._open(cache)
        most, widest = self.batch_tokens, min(self.batch_tokens, WIDEST)
        for path, blocks in chunks(tree, most, widest, SCORED):
            same = 0
            while same < min(len(held), len(path)) and held[same] == path[same]:
                same += 1
            if len(held) > same:
                cache.crop(same - len(held))
            rest = path[same:]
            parts = [[rest[n : n + widest]] for n in range(0, len(rest), widest)]
            for part in (*parts, blocks):
                if part:
                    yield from self._forward(tree, part, cache, offset)
                    done += sum(map(len, part))
            if blocks:
                cache.crop(-sum(map(len, blocks)))
            held = path
            if self.progress:
                self.progress(done / max(1, len(tree) - 1))

    def _open(self, cache: Any) -> int:
        if self.soft_prompt is None:
            return 0
        soft = self.soft_prompt[None].to(self._dtype)
        self.model(inputs_embeds=soft, **{cache_name(self.model): cache}, use_cache=True, logits_to_keep=1)
        return len(self.soft_prompt)

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    def _forward(self, tree: Tree, blocks: Sequence[Sequence[int]], cache: Any, offset: int) -> Iterator[Any]:
        """Blocks side by side below the cached path: a token sees the path and its ancestors in its own block."""
        nodes = [node for block in blocks for node in block]
        keep = [i for i, node in enumerate(nodes) if node in tree.wanted]
        to = {"device": self.device}
        with attention(self.model, ATTENTION):
            out = self.model(
                input_ids=torch.tensor([[tree.token[i] for i in nodes]], **to),
                position_ids=torch.tensor([[tree.depth[i] + offset for i in nodes]], **to),
                packed_layout=_layout(tree, blocks, cache.get_seq_length(), self.device),
                **{cache_name(self.model): cache},
                use_cache=True,
                logits_to_keep=torch.tensor(keep or [len(nodes) - 1], **to),
            )
        if keep:
            where = [(k, r, t) for k, i in enumerate(keep) for r, t in tree.wanted[nodes[i]]]
            k, r, t = zip(*where, strict=True)
            yield np.array(r), torch.tensor(t, **to), out.logits[0][list(k)]

    def _walk_padded(self, encoded: Sequence[tuple[list[int], int]]) -> Iterator[Any]:
        """For models without plain full attention: right-padded batches sorted by length (causal, so exact)."""
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
        self.num_unique_tokens = sum(len(e[0]) - 1 for e in encoded)
        at = 0
        while at < len(order):
            width = len(encoded[order[at]][0]) - 1
            batch = order[at : at + max(1, self.batch_tokens // width)]
            at += len(batch)
            ids = torch.zeros((len(batch), width), dtype=torch.long)
            for i, n in enumerate(batch):
                ids[i, : len(encoded[n][0]) - 1] = torch.tensor(encoded[n][0][:-1])
            logits = self._logits(ids.to(self.device))
            for i, n in enumerate(batch):
                tokens, start = encoded[n]
                span = logits[i, start - 1 : len(tokens) - 1]
                target = torch.tensor(tokens[start:], device=self.device)
                yield np.full(len(target), n), target, span
            if self.progress:
                self.progress(at / len(order))

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T, V) logits of ids (B, T), read behind the soft prompt if there is one."""
        if self.soft_prompt is None:
            return self.model(input_ids=ids, use_cache=False).logits
        soft = self.soft_prompt.to(self._dtype).expand(len(ids), -1, -1)
        embedded = torch.cat([soft, self.model.get_input_embeddings()(ids)], dim=1)
        return self.model(inputs_embeds=embedded, use_cache=False).logits[:, soft.shape[1] :]


def _layout(tree: Tree, blocks: Sequence[Sequence[int]], held: int, device: Any) -> Layout:
    """Who sees whom: j is i or an ancestor of i exactly if j <= i < end of j, in depth-first order."""
    lengths = [len(b) for b in blocks]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    nodes = np.array([node for block in blocks for node in block])
    end = np.array(tree.end)[nodes]
    out = layout(starts, lengths, device)
    out.held, out.masks = held, []
    for index, real, b, width in out.blocks:
        at, there = index.view(b, width).cpu().numpy(), real.view(b, width).cpu().numpy()
        i, stop = nodes[at], np.where(there, end[at], -1)
        sees = (i[:, None, :] <= i[:, :, None]) & (i[:, :, None] < stop[:, None, :])
        sees |= np.eye(width, dtype=bool)  # padding sees itself: a row of nothing would be NaN
        mask = np.concatenate([np.ones((b, width, held), dtype=bool), sees], 2)
        out.masks.append(torch.from_numpy(mask)[:, None].to(device))
    return out


def cache_name(model: Any) -> str:
    """What `forward` calls its key/value cache: transformers is renaming it."""
    return "cache" if "cache" in inspect.signature(inner(model).forward).parameters else "past_key_values"


def supports_tree(model: Any) -> bool:
    """True for models that can be packed."""
    return can_pack(model)
