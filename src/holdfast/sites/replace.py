"""Replaced modules: put in place once, made again on the same base when an export is loaded, folded in where they may.

One method of a plan replaces modules. Its own terms add up what it finds inside; other methods see the model as ever:
its logits, its states and the parameters that train. `engine/replaced.py` says what such a module is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from holdfast import models
from holdfast.engine import trial
from holdfast.engine.replaced import ORIGINAL, Origin, Replaced, own_tensors, put, replaced_in, set_origin
from holdfast.engine.ways import inner
from holdfast.errors import ModelError, NoEffect, PlanError
from holdfast.files import read_json
from holdfast.method import Method, State
from holdfast.models.identity import REPLACED, REPLACED_STATE, REPLACED_WEIGHTS
from holdfast.plan import method_from
from holdfast.services import Context


def replace(model: Any, method: Method, ctx: Context, state: State) -> list[str]:
    """Ask `method` for every module and put its answers in place; returns their names. Only their own parts train.

    Raises:
        NoEffect: it replaces nothing.
    """
    core = inner(model)
    made = _answers(core, method, ctx, state)
    if not made:
        raise NoEffect(f"{method.name} replaces no module of this model.", "Take it out of the plan.")
    core.requires_grad_(False)
    device = next(core.parameters()).device
    for name, module in made.items():
        for n, p in module.named_parameters():
            p.requires_grad_(not n.startswith(ORIGINAL))
        put(core, name, module.to(device).train(core.training))
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in method.settings().items()}
    set_origin(core, Origin(method.name, settings, ctx.seed, str(getattr(core, "name_or_path", "")), state))
    trial.forget(core)
    return list(made)


def _answers(core: Any, method: Method, ctx: Context, state: State) -> dict[str, Replaced]:
    """What `method` gives for the modules of a model, by name."""
    made: dict[str, Replaced] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ctx.seed)  # the same start whatever ran before
        for name, module in core.named_modules():
            if name and not any(name.startswith(f"{above}.") for above in made):
                answer = method.replace(name, module, ctx, state)
                if answer is not None:
                    made[name] = answer
    return made


def merge(model: Any, method: Method) -> None:
    """Put plain modules in the place of the trained ones (`Method.merged`): a plain model is left."""
    core = inner(model)
    for name, module in replaced_in(core).items():
        plain = method.merged(name, module)
        assert plain is not None, f"{method.name} overrides merged, so it must answer for {name}"
        put(core, name, plain.requires_grad_(False).train(core.training))
    set_origin(core, None)
    trial.forget(core)


# ---- loading


def load(source: models.ModelSource | str | Path, **how: Any) -> tuple[Any, Any]:
    """Load a model and its tokenizer, in eval mode: whatever `holdfast tune` exports, and any model it takes.

    Args:
        source: a folder (plain, an adapter, or with replaced modules), hub id, GGUF file or alias.
        how: as of `models.load`: dtype, device, trust_remote_code, attn_implementation, revision, merge_adapter,
            load_in_4bit.

    Raises:
        ModelError: as `models.load`; replaced modules do not fit their base, or cannot be loaded in that way.
    """
    if not isinstance(source, models.ModelSource):
        source = models.resolve(str(source), how.pop("revision", None))
    if source.kind != "replaced":
        return models.load(source, **how)
    if how.get("load_in_4bit"):
        what = f"{source.label} holds replaced modules, whose base cannot be loaded in 4 bits."
        raise ModelError(what, "Remove load_in_4bit.")
    assert source.base is not None
    how["merge_adapter"] = True  # of an adapter below
    model, _ = models.load(source.base, **how)
    tokenizer = models.load_tokenizer(source, bool(how.get("trust_remote_code")))
    take_up(model, tokenizer, source)
    trial.packs(model.eval())
    return model, tokenizer


@torch.no_grad()
def take_up(model: Any, tokenizer: Any, source: models.ModelSource) -> None:
    """Make the replaced modules of a folder again on its loaded base, and give them what was trained.

    Raises:
        ModelError: the folder is damaged, or of a method that makes other modules here.
    """
    from transformers import GenerationConfig

    folder = Path(source.path)
    method, seed, wanted, tensors = _read(folder, source.label)
    state = {k.removeprefix(REPLACED_STATE): tensors.pop(k) for k in [*tensors] if k.startswith(REPLACED_STATE)}
    names = replace(model, method, Context(model, tokenizer, seed), state)
    own = own_tensors(model)
    if names != wanted or {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in tensors.items()}:
        what = f"{source.label}: {method.name} makes other modules on its base than those in the folder."
        raise ModelError(what, f"Load it with the version and the base that its {REPLACED} names.")
    for name, value in own.items():
        value.copy_(tensors[name])
    model.requires_grad_(False)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.name_or_path = model.config.name_or_path = source.path


def _read(folder: Path, label: str) -> tuple[Method, int, list[str], dict[str, torch.Tensor]]:
    """(method, seed of its run, names of its modules, tensors) of a folder."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    said = read_json(folder / REPLACED)
    try:
        method = method_from({said["method"]: said["settings"]})
        return method, said["seed"], said["modules"], load_file(folder / REPLACED_WEIGHTS)
    except PlanError as e:
        raise ModelError(f"{label} cannot be loaded: {e.what}", "Load it with the version it names.") from e
    except (KeyError, SafetensorError) as e:
        raise ModelError(f"{label} is damaged: {type(e).__name__}: {e}", "Copy it again.") from e
