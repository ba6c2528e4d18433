"""The weights of a saved model, one tensor at a time, by the names of another model of its shape.

Whole models are read from their safetensors by name; the header says where each tensor lies, so the rest stays on the
disk. An adapter counts as a base plus its change: PEFT merges it layer by layer, into the base's tensor that is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.engine.ways import inner
from holdfast.errors import ModelError
from holdfast.files import read_json
from holdfast.models import loadable, shards
from holdfast.models.merging import peft_quiet
from holdfast.models.source import ModelSource

if TYPE_CHECKING:
    import torch

SAME_BASE = "Name a model that was tuned from the same base."
SAVE_WHOLE = "Merge it into its base, save the whole, and name that folder."


class Saved:
    """A whole model on the disk.

    Args:
        source: of kind 'hub', 'folder' or 'gguf' (converted).
        like: the model in memory whose parameter names are used.

    Raises:
        ModelError: its files have no tensor for one of these names, or one of another shape.
    """

    def __init__(self, source: ModelSource, like: Any):
        files = files_of(Path(source.path))
        found = {file: loadable.shapes(file) for file in files}
        damaged = next((file for file, shapes in found.items() if not shapes), None)
        if damaged:
            what = f"{source.label} cannot be read: {damaged.name} is missing, cut off, or no safetensors file."
            raise ModelError(what, "Copy or download the model again.")
        header = {name: (file, shape) for file, shapes in found.items() for name, shape in shapes.items()}
        self._at: dict[str, tuple[Path, str]] = {}
        for name, shape in shapes_of(like).items():
            key = next((k for k in names_on_disk(name, like) if k in header), None)
            if key is None:
                raise ModelError(f"{source.label} has no tensor {name}, which the base has.", SAME_BASE)
            file, own = header[key]
            if own != shape:
                what = f"{source.label} has {name} of shape {own}, and the base of shape {shape}."
                raise ModelError(what, SAME_BASE)
            self._at[name] = (file, key)
        self._parts = shards.Parts(files)

    def read(self, name: str, base: torch.Tensor, part: slice | None = None) -> torch.Tensor:
        """One tensor in fp32, on the device of `base`; with `part` these entries of it, flat."""
        return (self.stored(name) if part is None else self.part(name, part)).to(base.device).float()

    def part(self, name: str, part: slice) -> torch.Tensor:
        """Some entries of one tensor, flat, as they lie in its file, on the CPU; good until this thread asks again."""
        found = self._parts.read(*self._at[name], part)
        return self.stored(name).flatten()[part] if found is None else found

    def stored(self, name: str) -> torch.Tensor:
        """One tensor as it lies in its file, on the CPU."""
        return stored(*self._at[name])


class Adapted:
    """An adapter on the disk, read as a base plus its change. The adapter's own weights are held in memory.

    Args:
        source: of kind 'adapter'.
        like: the model in memory whose parameter names are used.

    Raises:
        ModelError: the adapter is not of a kind whose change belongs to single weights of the base.
    """

    def __init__(self, source: ModelSource, like: Any):
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        loadable.may_adapt(source)
        hollow = _hollow(source)
        loadable.may_fit(source, hollow)
        try:
            with peft_quiet():
                model = PeftModel.from_pretrained(hollow, source.path, low_cpu_mem_usage=True)
        except Exception as error:
            raise _cannot_merge(source, " ".join(str(error).split())[:200]) from error
        named = ((n.removeprefix(loadable.PREFIX), m) for n, m in model.named_modules())
        self._layers = {f"{n}.weight": m for n, m in named if isinstance(m, BaseTunerLayer)}
        self._source = source
        self._refuse(inner(like))

    def read(self, name: str, base: torch.Tensor, part: slice | None = None) -> torch.Tensor:
        """`base`, the base's tensor of this name in fp32, plus the adapter's change of it; it has no parts."""
        import torch

        assert part is None, "a product of matrices is made as a whole"
        layer = self._layers.get(name)
        if layer is None:
            return base
        inside = layer.get_base_layer()
        hollow, inside.weight = inside.weight, torch.nn.Parameter(base.cpu().clone(), requires_grad=False)
        try:
            layer.merge()
            return inside.weight.data.to(base.device)
        except Exception as error:
            raise _cannot_merge(self._source, f"{name}: {' '.join(str(error).split())[:200]}") from error
        finally:
            inside.weight, layer.merged_adapters = hollow, []

    @property
    def names(self) -> list[str]:
        """The weights that it changes."""
        return list(self._layers)

    def _refuse(self, base: Any) -> None:
        left = _beside(Path(self._source.path), self._layers)
        if left:
            raise _cannot_merge(self._source, f"it brings {left}, which is no change of one weight")
        embeddings = loadable.embedding_names(base).values() if loadable.is_tied(base) else ()
        both = next((n for n in embeddings if f"{n}.weight" in self._layers), None)
        if both:
            raise _cannot_merge(self._source, f"it changes {both}, which the base ties to another module, alone")
        away = next((n for n in self._layers if n not in shapes_of(base)), None)
        if away:
            raise ModelError(f"{self._source.label} changes {away}, which the base does not have.", SAME_BASE)


class Stacked:
    """What is loaded of `source`: a whole model, with the adapters on it folded in, one on the other.

    Raises:
        ModelError: as `Saved` and `Adapted`.
    """

    def __init__(self, source: ModelSource, like: Any):
        self._adapters: list[Adapted] = []  # the lowest first
        while source.base is not None:
            self._adapters.insert(0, Adapted(source, like))
            source = source.base
        self._whole = Saved(source, like)

    def read(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """One tensor in fp32, on the device of `base`."""
        found = self._whole.read(name, base)
        for adapter in self._adapters:
            found = adapter.read(name, found)
        return found


def tensors_of(source: ModelSource, like: Any) -> Saved | Adapted:
    """The weights of `source` by the parameter names of `like`, the untouched base in memory."""
    return Saved(source, like) if source.base is None else Adapted(source, like)


def stored(file: Path, key: str) -> torch.Tensor:
    """One tensor of a file, on the CPU."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(key)


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a plain model's parameters by name."""
    return {n: tuple(p.shape) for n, p in inner(model).named_parameters()}


def files_of(folder: Path) -> list[Path]:
    """The files of weights that transformers would read: those of the index, else the one."""
    shards = read_json(folder / "model.safetensors.index.json").get("weight_map", {}).values()
    return [folder / name for name in sorted(set(shards)) or ["model.safetensors"]]


def names_on_disk(name: str, like: Any) -> Iterable[str]:
    """Under which names a parameter may be saved: its own, a tied one's, or without the head's prefix."""
    model = inner(like)
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    same = [name, *(a for pair in ties.items() for a in pair if name in pair and a != name)]
    return [*same, *(n.removeprefix(f"{model.base_model_prefix}.") for n in same)]


def _hollow(source: ModelSource) -> Any:
    """The base of an adapter on the CPU, with tensors that have a shape and hold one number: they take no memory."""
    import torch

    model = loadable.skeleton(source, trust_remote_code=False)
    if model is None:
        raise _cannot_merge(source, "its base cannot be built without its weights")
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(torch.zeros(()).expand(p.shape), requires_grad=False)
    return model


def _beside(folder: Path, layers: Iterable[str]) -> str | None:
    """The first tensor of an adapter's file that lies in none of these layers, or changes a bias."""
    inside = tuple(f"{loadable.PREFIX}{n.removesuffix('weight')}" for n in layers)
    header = loadable.shapes(folder / "adapter_model.safetensors")
    return next((k for k in header if not k.startswith(inside) or k.endswith(".bias")), None)


def _cannot_merge(source: ModelSource, why: str) -> ModelError:
    return ModelError(f"{source.label} cannot be read as its base plus a change: {why}.", SAVE_WHOLE)
