"""The one scorer: log-likelihood and greedy exactness of given continuations, each unique token computed once.

All requests become one prefix tree. The tree is walked depth first with one key/value cache: a shared few-shot prefix
is computed once, and the branches below it are packed into one row whose attention mask lets a token see exactly its
ancestors. Nothing is padded, logits exist only where a token is scored, and a score depends on its own request alone.

Tokens, truncation and the greedy flag follow lm-evaluation-harness 0.4.13 (`HFLM.loglikelihood`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from holdfast.engine.forward import can_pack
from holdfast.errors import HoldfastError

Request = tuple[str, str]


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


def chunks(tree: Tree, most: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut the tree into (path from the root, nodes below it), nodes at most `most` unless one chain is longer."""

    def cut(node: int, path: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        child, batch = node + 1, []
        while child < tree.end[node]:
            size = tree.end[child] - child
            if size > most:
                chain = [child]
                while tree.end[chain[-1]] - chain[-1] > most and _one_child(tree, chain[-1]):
                    chain.append(chain[-1] + 1)
                if tree.end[chain[-1]] - chain[-1] <= most:
                    chain.pop()
                yield from cut(chain[-1], path + chain)
            else:
                if len(batch) + size > most:
                    yield path, batch
                    batch = []
                batch.extend(range(child, tree.end[child]))
            child = tree.end[child]
        yield path, batch

    yield from cut(0, [])


def _one_child(tree: Tree, node: int) -> bool:
    return node + 1 < tree.end[node] and tree.end[node + 1] == tree.end[node]


class Scorer:
    """Scores continuations with one model.

    Args:
        model: a Hugging Face causal LM (a PEFT model too), in eval mode while scoring.
        tokenizer: its tokenizer.
        batch_tokens: new tokens per forward; on 2 cores 512 keeps attention over the mask cheap.
        soft_prompt: (p, D) embeddings put before everything (ProMoT's task prompt), or None.
        progress: called with the share done, 0 to 1.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_tokens: int = 512,
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
                logp = logits.float().log_softmax(-1)
                total_here = logp.gather(1, target[:, None])[:, 0].double().cpu().numpy()
                np.add.at(total, request, total_here)
                np.logical_and.at(greedy, request, (logp.argmax(-1) == target).cpu().numpy())
        finally:
            self.model.train(was_training)
        return [Score(float(total[n]), bool(greedy[n]), len(ids) - start) for n, (ids, start) in enumerate(encoded)]

    def _walk_tree(self, encoded: Sequence[tuple[list[int], int]]) -> Iterator[Any]:
        from transformers import DynamicCache

        tree = grow(encoded)
        self.num_unique_tokens, done = len(tree) - 1, 0
        cache, held = DynamicCache(config=self.model.config), []
        offset = self._open(cache)
        for path, nodes in chunks(tree, self.batch_tokens):
            same = 0
            while same < min(len(held), len(path)) and held[same] == path[same]:
                same += 1
            if len(held) > same:
                cache.crop(same - len(held))
            for part in (path[same:], nodes):
                if part:
                    yield from self._forward(tree, part, cache, offset)
                    done += len(part)
            if nodes:
                cache.crop(-len(nodes))
            held = path
            if self.progress:
                self.progress(done / max(1, len(tree) - 1))

    def _open(self, cache: Any) -> int:
        if self.soft_prompt is None:
            return 0
        self.model(inputs_embeds=self.soft_prompt[None].to(self._dtype), past_key_values=cache, use_cache=True,
                   logits_to_keep=1)  # fmt: skip
        return len(self.soft_prompt)

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    def _forward(self, tree: Tree, nodes: list[int], cache: Any, offset: int) -> Iterator[Any]:
        """One packed row below the cached path: each token sees the path and its ancestors in the row."""
        held, n = cache.get_seq_length(), len(nodes)
        row = {node: i for i, node in enumerate(nodes)}
        sees = np.zeros((n, n), dtype=bool)
        for i, node in enumerate(nodes):
            above = row.get(tree.parent[node])
            if above is not None:
                sees[i] = sees[above]
            sees[i, i] = True
        mask = torch.zeros((n, held + n), dtype=self._dtype)
        mask[:, held:].masked_fill_(~torch.from_numpy(sees), torch.finfo(self._dtype).min)
        keep = [i for i, node in enumerate(nodes) if node in tree.wanted]
        to = {"device": self.device}
        out = self.model(
            input_ids=torch.tensor([[tree.token[i] for i in nodes]], **to),
            position_ids=torch.tensor([[tree.depth[i] + offset for i in nodes]], **to),
            attention_mask=mask[None, None].to(self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor(keep or [n - 1], **to),
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
            batch = order[at : at + max(1, 4 * self.batch_tokens // width)]
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


def supports_tree(model: Any) -> bool:
    """True for models that can be packed and whose attention takes the tree's 4-D mask."""
    config = getattr(model.config, "text_config", None) or model.config
    return can_pack(model) and config._attn_implementation in ("sdpa", "eager")
