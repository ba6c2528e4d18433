"""Merging on the disk: methods of `merge` applied to a saved base and a saved tuned model, one tensor at a time.

The outcome has the files, names and dtypes of the tuned model (for an adapter: of its base), with its configuration
and tokenizer, and loads in plain transformers. No model is ever whole in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from holdfast import models
from holdfast.data.encoder import ends_to_set
from holdfast.errors import ModelError, PlanError
from holdfast.files import fresh_folder, read_json, write_json
from holdfast.method import Method
from holdfast.methods import LiNeS, WiSEFT
from holdfast.models import loadable, shards
from holdfast.models.loading import load_tokenizer
from holdfast.models.overlap import grown, offer
from holdfast.models.related import check_related, may_read
from holdfast.models.source import ModelSource
from holdfast.models.tensors import Adapted, Saved, files_of, names_on_disk, shapes_of, stored, tensors_of
from holdfast.services import Context
from holdfast.sites.merging import Merging, check_others

# One `torch.lerp`, which computes bfloat16 in fp32 and rounds once: the same bits as ours, without three more passes
LINES = (WiSEFT, LiNeS)
CONFIGS = ("config.json", "generation_config.json", "model.safetensors.index.json")


class _Weights(Mapping[str, torch.Tensor]):
    """The weights of a saved model by name, each read when it is asked for: a whole model's as they are stored, an
    adapter's in fp32 as its base plus its change."""

    def __init__(self, tensors: Saved | Adapted, base: Saved, names: Sequence[str]):
        self._tensors, self._base, self._names = tensors, base, names

    def __getitem__(self, name: str) -> torch.Tensor:
        if isinstance(self._tensors, Saved):
            return self._tensors.stored(name)
        return self._tensors.read(name, self._base.stored(name).float())

    @property
    def in_parts(self) -> bool:
        """Whether `part` may be asked."""
        return isinstance(self._tensors, Saved)

    def part(self, name: str, part: slice) -> torch.Tensor:
        """Some entries of a tensor, flat."""
        assert isinstance(self._tensors, Saved)
        return self._tensors.part(name, part)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Pair:
    """A saved base and what was tuned from it, looked at and found to be relatives (`models.related`).

    Attributes:
        base, tuned: what was resolved.
        like: the base without weights (on the meta device): its configuration and parameter names.
        base_weights, tuned_weights: by parameter name, read one by one.
        overlap: whether `tuned` has other tokens, and `like` is its shape (`models.overlap`).

    Raises:
        ModelError: `base` is an adapter, one of the two is quantised, or `tuned` does not descend from `base`.
    """

    def __init__(self, base: ModelSource | str, tuned: ModelSource | str, overlap: bool = False):
        self.base, self.tuned = (models.resolve(m) if isinstance(m, str) else m for m in (base, tuned))
        self.like = _without_weights(self.base)
        self.overlap, own = overlap, Saved(self.base, self.like)
        if overlap:
            may_read(self.tuned)
            own, self.like = grown(self.base, self.tuned, self.like)
        names = tuple(shapes_of(self.like))
        self.base_weights = _Weights(own, own, names)
        self.tokenizer = load_tokenizer(self.tuned if overlap else self.base, False)
        self._check_related()
        self.tuned_weights = _Weights(tensors_of(self.tuned, self.like), own, names)
        self._layout = self.tuned if self.tuned.base is None else self.base
        self._at = {key: name for name in names for key in names_on_disk(name, self.like)}
        self._files = {file: shards.header(file)[1] for file in files_of(Path(self._layout.path))}
        self._check_dtypes()

    def _check_related(self) -> None:
        try:
            check_related(self.tuned, self.like, self.tokenizer, self.base_weights)
        except ModelError as e:
            cure = None if self.overlap else offer(self.base, self.tuned)
            raise ModelError(e.what, cure or e.cure) from e

    @cached_property
    def num_layers(self) -> int:
        """Decoder blocks."""
        return int(self.like.config.get_text_config().num_hidden_layers)

    @property
    def size(self) -> int:
        """Bytes of the weights that `write` writes."""
        return sum(file.stat().st_size for file in self._files)

    @torch.no_grad()
    def merged(
        self, methods: Sequence[Method], *, seed: int = 0, base_dir: Path | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(parameter name, tensor) of the model that `methods` make of the tuned one, rounded as its files will be.

        Raises:
            PlanError: a method does more than merge, or has a wrong setting.
        """
        make, seen = _Maker(self, methods, seed, base_dir), set()
        for entries in self._files.values():
            for key, entry in entries.items():
                name = self._at.get(key)
                if name is not None and name not in seen:  # tied weights may lie there twice
                    seen.add(name)
                    yield name, make.whole(name, entry["dtype"])

    @torch.no_grad()
    def write(
        self,
        methods: Sequence[Method],
        out: Path,
        *,
        seed: int = 0,
        base_dir: Path | None = None,
        card: str | None = None,
        tell: Callable[[float], None] | None = None,
    ) -> Path:
        """Write the model that `methods` make of the tuned one into the folder `out`; whole or not at all.

        card: becomes README.md. tell: hears the share done.

        Raises:
            ModelError: `out` holds something else than an older model, or is one of the two models.
            PlanError: a method does more than merge, or has a wrong setting.
        """
        target, done = self._target(out), 0
        make = _Maker(self, methods, seed, base_dir)
        piece, at_once = (shards.PIECE, torch.get_num_threads()) if make.in_parts else (None, 1)
        for left in target.parent.glob(f".{target.name}-{'[0-9a-f]' * 8}"):  # by a merge that was killed
            shutil.rmtree(left)
        with fresh_folder(target, replace=True) as part:
            for file in self._files:
                tensor = partial(self._entries, make, file)
                for added in shards.rewrite(file, part / file.name, tensor, piece, at_once):
                    done += added
                    if tell:
                        tell(min(1.0, done / self.size))
            self._beside(part, card)
        return target

    def _entries(self, make: _Maker, file: Path, key: str, dtype: str, part: slice) -> torch.Tensor:
        """Some entries of a tensor of a file, or all."""
        name = self._at.get(key)
        if name is None:  # a buffer
            return stored(file, key).flatten()[part]
        return make.part(name, dtype, part) if make.in_parts else make.whole(name, dtype)

    def _target(self, out: Path) -> Path:
        target = out.expanduser().resolve()
        if target in {Path(s.path).resolve() for s in (self.base, self.tuned)}:
            raise ModelError(f"{target} is one of the two models: it is not replaced.", "Choose another folder.")
        models.may_replace(None, target)
        return target

    def _beside(self, part: Path, card: str | None) -> None:
        """What lies beside the weights."""
        for name in CONFIGS:
            found = Path(self._layout.path) / name
            if found.is_file():
                shutil.copyfile(found, part / name)
        tokenizer = models.prompting(load_tokenizer(self.tuned, False))
        tokenizer.save_pretrained(part)
        _let_end(part / "generation_config.json", tokenizer)
        if card is not None:
            (part / "README.md").write_text(card, encoding="utf-8")

    def _check_dtypes(self) -> None:
        for entries in self._files.values():
            for key, entry in entries.items():
                if key in self._at and entry["dtype"] not in shards.DTYPES:
                    what = f"{self._layout.label} stores {key} as {entry['dtype']}, which cannot be merged."
                    raise ModelError(what, f"Name a copy in one of {', '.join(shards.DTYPES)}.")


def _let_end(file: Path, tokenizer: Any) -> None:
    """What is written must stop where answers were trained to end, with the tokenizer's end, whatever the base did."""
    found = read_json(file)
    if (ends := ends_to_set(found, tokenizer)) is not None:
        write_json(file, {**found, "eos_token_id": ends})


class _Maker:
    """What methods make of the tuned model of a pair, after their surveys; in the dtype of a file.

    Attributes:
        in_parts: whether `part` may be asked: every method works entry by entry, on whole models.

    Raises:
        PlanError: a method does more than merge, or has a wrong setting.
    """

    def __init__(self, pair: Pair, methods: Sequence[Method], seed: int, base_dir: Path | None):
        ctx = Context(pair.like, pair.tokenizer, seed=seed, base_dir=base_dir)
        for m in methods:
            _check(m, ctx, pair.base_weights)
        self._pair = pair
        self._merging = Merging(methods, {m.name: m.prepare(ctx) for m in methods}, base_dir, pair.num_layers)
        self._merging.open(pair.like)
        self._merging.survey(pair.tuned_weights, pair.base_weights)
        self._line = methods[0] if len(methods) == 1 and type(methods[0]) in LINES else None
        self.in_parts = self._merging.in_parts and pair.tuned_weights.in_parts and not pair.overlap

    def whole(self, name: str, dtype: str) -> torch.Tensor:
        """A tensor."""
        new = self._merging.merged(name, self._pair.base_weights[name], self._pair.tuned_weights[name])
        return new.to(shards.dtype_of(dtype))

    def part(self, name: str, dtype: str, part: slice) -> torch.Tensor:
        """Some entries of it, flat."""
        base, tuned = (w.part(name, part) for w in (self._pair.base_weights, self._pair.tuned_weights))
        if self._line and dtype == "BF16" and base.dtype == tuned.dtype == torch.bfloat16:
            return self._line.merge(name, {"base": base, "tuned": tuned}, {}, self._pair.num_layers)
        return self._merging.merged(name, base, tuned, part).to(shards.dtype_of(dtype))


def merge_files(
    base: ModelSource | str,
    tuned: ModelSource | str,
    methods: Sequence[Method],
    out: Path,
    *,
    overlap: bool = False,
    **settings: Any,
) -> Path:
    """Apply merging methods to two saved models and write a third, tensor by tensor; returns its folder.

    Args:
        base: the whole model that `tuned` came from: a hub id, folder or GGUF file.
        tuned: the same, or an adapter on `base`.
        methods: in plan order; each may name further models.
        out: the new folder; an older model there is replaced, whole or not at all.
        overlap: merge what belongs to common tokens where the vocabularies differ.
        settings: of `Pair.write`.

    Raises:
        ModelError: the two are no relatives, or `out` is not free.
        PlanError: a method does more than merge, or has a wrong setting.
    """
    return Pair(base, tuned, overlap).write(methods, out, **settings)


def _without_weights(base: ModelSource) -> Any:
    """A plain base on the meta device."""
    if base.kind == "adapter":
        what = f"{base.label} is an adapter, and the way back from a tuned model leads to a whole one."
        raise ModelError(what, "Name the model below it, or merge it and save the whole.")
    may_read(base)
    like = loadable.skeleton(base, trust_remote_code=False)
    if like is None:
        what = f"{base.label} cannot be built without its weights."
        raise ModelError(what, "Check that transformers knows its architecture.")
    return like


def _check(method: Method, ctx: Context, weights: Mapping[str, torch.Tensor]) -> None:
    more = [s for s in method.sites() if s not in ("merge", "prepare")]
    if more or "merge" not in method.sites():
        what = f"{method.name} works at {', '.join(more) or 'no site'}, and saved models can only be merged."
        raise PlanError(what, "Name methods of the site merge.")
    method.check(ctx)
    check_others(method, ctx, weights)
