"""What methods may ask for: the context of a run, the view of a step, and the base model's answers, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from holdfast.engine.base import adapters_off, as_base, has_adapter
from holdfast.engine.base import batches as _batches
from holdfast.engine.counts import Counts, count_of, sources_of, sum_of
from holdfast.engine.forward import forward_states
from holdfast.engine.head import comes_apart, forward_bare, head_is_plain, head_of
from holdfast.engine.layout import upload
from holdfast.engine.pack import Packed, TokenRow
from holdfast.engine.processes import gather_rows, is_whole, shares, world
from holdfast.engine.replaced import Handed, replaced_in
from holdfast.engine.ways import LAST, inner
from holdfast.measure import answers

State = dict[str, torch.Tensor]  # of one method, from `prepare` on


AT_ONCE = 16  # rows in one forward that is only looked at


@dataclass
class Context:
    """What a run knows before training.

    rows: the task's training rows as text (`rows.Row`), empty when the host only has tokens.
    total_steps: optimizer steps of the whole run, 0 when unknown.
    tell: hears of long work before training: the share done and words; None, nobody listens.
    notes: sentences about the data that the report passes on.
    verdicts: method -> what it decided about each row that it looked at, for the run's folder (verdicts.json).
    stage: name of the stage that is being set up, or trained; "" before the first one.
    taught: the base's answers to rows, kept for other runs on the same base (`Teacher.learn`); None: for nobody.
    """

    model: Any
    tokenizer: Any
    seed: int = 0
    rows: Sequence[Any] = ()
    total_steps: int = 0
    max_length: int = 1024
    base_dir: Any = None
    tell: Callable[[float, str], None] | None = None
    notes: list[str] = field(default_factory=list)
    verdicts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    stage: str = ""
    taught: dict[Any, Any] | None = None
    _identity: str = ""  # of the base, once it was asked

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: int = 64,
        seed: int | None = None,
        stop: Sequence[str] = (),
        words: str = "answers of the base",
    ) -> list[list[list[int]]]:
        """For each prompt (tokens) `num` answers of the untouched base (tokens), at `prepare` and `data`.

        An answer includes the token that ends it, or that completes a text of `stop`, unless max_new_tokens cut it
        off. It depends on its prompt, the settings and the seed (None: the run's) alone. Answers are kept in the
        cache by content, so a killed run goes on with those it has. All processes must ask alike.
        """
        if not prompts:
            return []
        sampling = answers.Sampling(max_new_tokens, temperature, top_p, tuple(stop))
        tell = self.tell
        self._identity = self._identity or answers.identity_of(self.model)
        with adapters_off(self.model):
            return answers.kept(
                self.model,
                self.tokenizer,
                prompts,
                sampling,
                num=num,
                seed=self.seed if seed is None else seed,
                identity=self._identity,
                progress=(lambda x: tell(x, words)) if tell else None,
            )


@dataclass(frozen=True)
class Look:
    """What the batch site may look at: the context, the method's own state, and the model so far on any rows."""

    ctx: Context
    state: State
    _forward: Callable[[Sequence[TokenRow]], tuple[Packed, torch.Tensor]]

    def logits(self, rows: Sequence[TokenRow]) -> Iterator[torch.Tensor]:
        """For each row (n, V) logits of the model so far at its n scored positions: no gradient, no dropout.

        A method that calls this has `live_logits` in its `needs`. A row's logits depend on the row alone up to
        rounding, and every process computes those of the rows it asks about. They come row by row, since those of a
        whole step with accumulation would not fit: keep what is made of them.
        """
        for n in range(0, len(rows), AT_ONCE):
            packed, logits = self._forward(rows[n : n + AT_ONCE])
            yield from packed.by_row(logits)

    def token_logp(self, rows: Sequence[TokenRow]) -> list[torch.Tensor]:
        """For each row (n,) log-probabilities of its targets."""
        targets = (torch.as_tensor(r.predicted[r.scored]) for r in rows)
        pairs = zip(self.logits(rows), targets, strict=True)
        return [z.float().log_softmax(-1).gather(1, y.to(z.device)[:, None])[:, 0] for z, y in pairs]


@dataclass
class View:
    """One forward of a step, as a method may see it. Positions of all owners stand together, in row order."""

    packed: Packed
    logits: torch.Tensor  # (N, V)
    step: int
    model: Any
    state: State
    teacher: Teacher | None
    owner: str  # the name of the method that looks
    params: Mapping[str, torch.nn.Parameter]  # trainable parameters by canonical name
    base_weights: Mapping[str, torch.Tensor]
    _shared: dict[str, Any]
    states: Mapping[int, torch.Tensor] = field(default_factory=dict)  # of the layers that some method asked for
    counts: Counts = field(default_factory=dict)  # of the whole optimizer step; asked by `count` and its fellows
    handed: Handed = field(default_factory=dict)  # by the replaced modules of the plan
    paired: Callable[[Sequence[TokenRow]], torch.Tensor] | None = None  # `sites.rollouts.Rolling.teacher_logp`
    asked: dict[Any, torch.Tensor] = field(default_factory=dict)  # what the base said about new rows of this forward
    total_steps: int = 0  # of the run; 0: unknown

    @property
    def logp(self) -> torch.Tensor:
        """(N, V) log-probabilities in fp32, computed once for all methods."""
        if "logp" not in self._shared:
            self._shared["logp"] = self.logits.float().log_softmax(-1)
        return self._shared["logp"]

    @property
    def token_logp(self) -> torch.Tensor:
        """(N,) log-probability of each target."""
        if "token_logp" not in self._shared:
            self._shared["token_logp"] = self.logp.gather(1, self.packed.target[:, None])[:, 0]
        return self._shared["token_logp"]

    def positions(self, owner: str, source: str | None = None) -> torch.Tensor:
        """(M,) indices of the positions of one owner (and one source)."""
        return upload(self._at(owner, source), self.logits.device)

    def _at(self, owner: str, source: str | None = None) -> np.ndarray:
        rows = [r.owner == owner and source in (None, r.source) for r in self.packed.rows]
        return np.flatnonzero(np.asarray(rows)[self.packed.row])

    def rows(self, owner: str) -> torch.Tensor:
        """(M,) of each position of `owner`, which of its scored rows here it stands in, counted from 0."""
        own = self.packed.row[self._at(owner)]
        return upload(np.unique(own, return_inverse=True)[1], self.logits.device)

    def number(self, name: str, owner: str = "task", missing: float = 1.0) -> torch.Tensor:
        """(N,) an array of the rows at scored positions, fp32; `missing` in rows without it and of other owners."""
        parts = [
            r.numbers[name][r.scored] if r.owner == owner and name in r.numbers else np.full(r.num_scored, missing)
            for r in self.packed.rows
        ]
        return upload(np.concatenate(parts).astype(np.float32), self.logits.device)

    def count(self, owner: str = "task", source: str | None = None, per: str = "position") -> float:
        """Scored positions (or rows, for `per` "row") of an owner, or of one of its sources, in the whole optimizer
        step: for weights that depend on them. The loss itself is divided by the host."""
        return count_of(self.counts, owner, source, per)

    def sources(self, owner: str = "task") -> list[str]:
        """The sources of an owner's rows in the whole optimizer step."""
        return sources_of(self.counts, owner)

    def total(self, name: str, owner: str = "task", missing: float = 1.0) -> float:
        """The sum of `number` over the owner's positions of the whole optimizer step."""
        return sum_of(self.counts, owner, name, missing)

    def hidden(self, owner: str, layer: int = LAST) -> torch.Tensor:
        """(M, D) states of a layer at the positions of `owner`, with gradient; see `Method.hidden_layers`."""
        return self.states[layer][self.positions(owner)]

    def inside(self, key: str, owner: str | None = None) -> list[torch.Tensor]:
        """What the modules of `Method.replace` handed out under `key`, one tensor a module, in the order they ran.

        (T, ...) at all tokens, rows end to end, each behind its soft prompt (`packed.positions` begins at 0 in every
        row), or (M, ...) at the scored positions of `owner`, as a Term of that owner wants them: the host divides
        their sum by their number in the whole step. [] where none ran (switched off, or in a stage of the prompt).
        """
        found = self.handed.get(key, [])
        return found if owner is None else [v[self.packed.where[self.positions(owner)]] for v in found]

    def base_hidden(self, owner: str, layer: int = LAST) -> torch.Tensor:
        """(M, D) the base model's states there, no gradient, for rows known before training and for new ones."""
        assert self.teacher is not None, "the plan gives a teacher to methods that need base_hidden"
        key = f"base/{owner}/{layer}"
        if key not in self._shared:
            wanted = [r for r in self.packed.rows if r.owner == owner]
            self._shared[key] = self.teacher.states(self.model, wanted, layer)
        return self._shared[key]

    def base_logp(self, owner: str) -> torch.Tensor:
        """(M, V) the base model's log-probabilities at the positions of `owner`, no gradient."""
        assert self.teacher is not None, "the plan gives a teacher to methods that need base_logits"
        key = f"base/{owner}"
        if key not in self._shared:
            wanted = [r for r in self.packed.rows if r.owner == owner]
            self._shared[key] = self.teacher.logp(self.model, wanted, self.asked)
        return self._shared[key]

    def teacher_logp(self, owner: str) -> torch.Tensor:
        """(M, V) log-probabilities of a rollout's teacher behind its own prompt, paired with `owner`'s positions.

        No gradient. `owner` is a method with the site `rollouts`.
        """
        assert self.paired is not None, "the session gives it"
        key = f"paired/{owner}"
        if key not in self._shared:
            self._shared[key] = self.paired([r for r in self.packed.rows if r.owner == owner])
        return self._shared[key]


class Teacher:
    """The base model's answers. Several processes each compute a share of what is learnt; all get the whole.

    Rows known beforehand are run through the untouched base once; their last hidden states are kept (2 D bytes a
    position instead of 2 V) and the base's own head is applied on demand: exact. So are the states of further
    `layers`. Rows never seen before are asked of the base with its adapter switched off, or, when the base itself is
    being trained, of a frozen copy.
    """

    def __init__(self, model: Any, layers: Sequence[int] = ()):
        self.layers = tuple(dict.fromkeys((LAST, *layers)))
        self._store: dict[bytes, tuple[int, int]] = {}
        self._hidden: dict[int, list[torch.Tensor]] = {n: [] for n in self.layers}
        self._head: Any = None
        self._copy: Any = None
        self.num_forwards = 0
        self.exact_head = head_is_plain(model)

    def __len__(self) -> int:
        return len(self._store)

    @torch.no_grad()
    def learn(
        self,
        model: Any,
        rows: Sequence[TokenRow],
        batch_tokens: int = 1024,
        progress: Callable[[float], None] | None = None,
        taught: dict[Any, Any] | None = None,
    ) -> None:
        """Store the answers of the untouched `model` on `rows` (duplicates once).

        taught: the last answers of the same base; those to just these rows are taken as they are, else they are
        replaced. Other rows would share forwards and so round otherwise.
        """
        new = list({r.key: r for r in rows if r.key not in self._store}.values())
        if not new or not (self.exact_head or len(self.layers) > 1):
            return
        asked = (self.layers, batch_tokens, tuple(r.key for r in new))
        taught = {} if taught is None else taught
        if asked not in taught:
            taught.clear()
            taught[asked] = self._learnt(model, new, batch_tokens, progress)
        self._take(*taught[asked])

    def _learnt(
        self, model: Any, new: Sequence[TokenRow], batch_tokens: int, progress: Callable[[float], None] | None
    ) -> tuple[list[TokenRow], dict[int, list[torch.Tensor]]]:
        """The rows in the order of their states, and the states by layer."""
        rank, num = world(model)
        dealt = [new] if num == 1 else [[new[i] for i in p] for p in shares(new, [len(r.ids) for r in new], num)]
        was_training = model.training
        model.eval()
        hidden: dict[int, list[torch.Tensor]] = {n: [] for n in self.layers}
        for done, batch in _batches(dealt[rank], batch_tokens):
            states = self._states(model, batch, self.layers)
            for n in self.layers:
                hidden[n].append(states[n].detach().clone())
            self.num_forwards += 1
            if progress:
                progress(done / len(dealt[rank]))
        model.train(was_training)
        if num > 1:
            lengths = [[r.num_scored for r in rows] for rows in dealt]
            device = next(model.parameters()).device
            hidden = {n: gather_rows(h, lengths, device) for n, h in hidden.items()}
        return [r for rows in dealt for r in rows], hidden

    def _take(self, rows: Sequence[TokenRow], hidden: Mapping[int, list[torch.Tensor]]) -> None:
        at = sum(len(h) for h in self._hidden[LAST])
        for row in rows:
            self._store[row.key] = (at, row.num_scored)
            at += row.num_scored
        for n in self.layers:
            self._hidden[n] += hidden[n]

    def freeze_base(self, model: Any, head_trains: bool, needs_copy: bool) -> None:
        """Keep what training would destroy: the head when it trains, the whole base when unknown rows will come."""
        if needs_copy or not self.exact_head:
            import copy

            self._copy = copy.deepcopy(inner(model)).eval().requires_grad_(False)
        if head_trains and self.exact_head:
            head = inner(model).get_output_embeddings()
            weight = head.weight.detach().clone()
            bias = None if getattr(head, "bias", None) is None else head.bias.detach().clone()
            self._head = lambda h: torch.nn.functional.linear(h, weight, bias)

    @torch.no_grad()
    def logp(self, model: Any, rows: Sequence[TokenRow], asked: dict[Any, torch.Tensor] | None = None) -> torch.Tensor:
        """(M, V) fp32 log-probabilities of the base at the scored positions of `rows`.

        asked: where its states on new rows are kept, for whoever asks about the same rows again.
        """
        if not self.exact_head:
            return self._ask(model, lambda m: forward_states(m, rows, ())[1]).float().log_softmax(-1)
        if self.knows(rows):
            states, head = self._kept(rows, LAST), self._head or head_of(model)
        else:
            key, asked = tuple(r.key for r in rows), {} if asked is None else asked
            if key not in asked:
                asked[key] = self._ask(model, lambda m: self._states(m, rows, (LAST,))[LAST])
            states, head = asked[key], head_of(model if self._copy is None else self._copy)
        head = getattr(head, "base_layer", head)  # an adapter on the head is not the base's
        return head(states).float().log_softmax(-1)

    @torch.no_grad()
    def states(self, model: Any, rows: Sequence[TokenRow], layer: int = LAST) -> torch.Tensor:
        """(M, D) hidden states of the base at the scored positions of `rows`."""
        if self.knows(rows):
            return self._kept(rows, layer)
        return self._ask(model, lambda m: self._states(m, rows, (layer,))[layer])

    def knows(self, rows: Sequence[TokenRow]) -> bool:
        """Whether all of them were seen before training."""
        return bool(self._store) and all((r.whole or r).key in self._store for r in rows)

    def _kept(self, rows: Sequence[TokenRow], layer: int) -> torch.Tensor:
        if len(self._hidden[layer]) > 1:
            self._hidden[layer] = [torch.cat(self._hidden[layer])]
        (joined,) = self._hidden[layer]
        return torch.cat([joined[a : a + n] for a, n in map(self._place, rows)])

    def _place(self, row: TokenRow) -> tuple[int, int]:
        """Where the states of a row, or of a part of one, are kept: (first, number)."""
        if row.whole is None:
            return self._store[row.key]
        before = int(row.whole.scored[: int(row.scored.argmax())].sum())
        return self._store[row.whole.key][0] + before, row.num_scored

    def _states(self, model: Any, rows: Sequence[TokenRow], layers: Sequence[int]) -> Mapping[int, torch.Tensor]:
        """States of a model, without its logits where the head can be left out."""
        if is_whole(model) and comes_apart(model):
            return forward_bare(model, rows, layers)[1]
        return forward_states(model, rows, layers)[2]

    def _ask(self, model: Any, how: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """What the base says to rows it has not seen before."""
        self.num_forwards += 1
        if self._copy is not None:
            return how(self._copy)
        assert has_adapter(model) or replaced_in(model), "where the base trains, freeze_base kept a copy"
        with as_base(model):
            return how(model)


class BaseWeights(Mapping[str, torch.Tensor]):
    """Base weights by canonical name, copied once before training, for the parameters that will train."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        self._weights = weights

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._weights[name]

    def __iter__(self) -> Any:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
