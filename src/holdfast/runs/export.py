"""What a run hands over: the tuned model, its soft prompt, and the base below an adapter where no folder holds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from holdfast import models
from holdfast.data.encoder import Encoder
from holdfast.engine.replaced import replaced_in
from holdfast.errors import TrainingError
from holdfast.hosts.checkpoint import Checkpoint, writing
from holdfast.measure.soft_prompt import save as save_prompt
from holdfast.models import exported
from holdfast.runs.checks import not_finite
from holdfast.runs.job import load
from holdfast.runs.run import Run
from holdfast.runs.several import by_first
from holdfast.runs.work import Job
from holdfast.runs.written import note_export, own_export
from holdfast.sites import replace

STATE_BYTES = 12  # a checkpoint keeps of each number that trains: the weight and two moments, in fp32


def room(job: Job) -> int:
    """Bytes that checkpoints (at most two at a time) and export of this job take at the most."""
    count = sum(p.numel() for p in job.model.parameters())
    own = sum(p.numel() * p.element_size() for p in job.model.parameters())
    if job.recipe.export.dtype != "auto":
        own = max(own, count * getattr(torch, job.recipe.export.dtype).itemsize)
    need = own if job.wraps and not job.replaces else 2 * STATE_BYTES * count + own
    return need + (own if _writes_base(job) else 0)


# ---- the base below


def _writes_base(job: Job) -> bool:
    """Whether this run trains an adapter on a base that no folder holds: another adapter, merged."""
    return job.source.kind == "adapter" and job.wraps and not job.recipe.export.merge


def place_base(job: Job) -> None:
    """Tell a model that came from an adapter where its weights will lie, and write them there if nobody else does."""
    if _writes_base(job):
        _save_base(job)
    elif job.source.kind == "adapter":
        models.name_after(job.model, job.run.export)  # where the whole will lie


def _save_base(job: Job) -> None:
    """Write the merged base, for plain PEFT to load the new adapter on; a run that goes on has it already."""
    run, folder = job.run, job.run.path / "base"

    def save() -> None:
        if not ((run.path / "checkpoint").is_dir() and (folder / "config.json").is_file()):
            with writing(f"The merged base in {folder}"):
                models.save_model(job.model, job.tokenizer, folder, card=None)

    with run.timed("export"):
        by_first(save)
    models.name_after(job.model, folder)


# ---- the tuned model


def round_to(job: Job, tuned: Any) -> None:
    """Let a tuned model, or its adapter, hold what the file of `export.dtype` will: what is measured is what is given.

    An adapter computes in fp32 as before, with rounded numbers: so does peft with the file.

    Raises:
        TrainingError: a weight is too large for that type.
    """
    dtype = job.recipe.export.dtype
    if dtype == "auto":
        return
    for p in _written(job, tuned):
        wide = p.dtype if hasattr(tuned, "peft_config") else None
        p.data = p.data.to(getattr(torch, dtype))
        p.data = p.data.to(wide or p.dtype)
    bad = not_finite(tuned)
    if bad:
        what = f"The weight {bad} of the tuned model is too large for export.dtype {dtype}."
        raise TrainingError(what, "Start again with export.dtype: bfloat16 and another training.output_dir.")


def _written(job: Job, tuned: Any) -> list[torch.nn.Parameter]:
    """The parameters that an export holds: of an adapter what was trained, or what it was joined to."""
    if not hasattr(tuned, "peft_config"):
        return list(tuned.parameters())
    own = {id(p) for p in job.session.params.values()}
    trained = [p for p in tuned.parameters() if id(p) in own]
    return trained or [p for name, p in tuned.named_parameters() if ".lora_" in name]


@contextmanager
def _kept_as(job: Job, tuned: Any) -> Iterator[None]:
    """While it is saved, an adapter has the type of its file."""
    dtype = job.recipe.export.dtype
    own = _written(job, tuned) if dtype != "auto" and hasattr(tuned, "peft_config") else []
    wide = [p.dtype for p in own]
    for p in own:
        p.data = p.data.to(getattr(torch, dtype))
    yield
    for p, before in zip(own, wide, strict=True):
        p.data = p.data.to(before)


def save(job: Job, tuned: Any, soft: Any) -> None:
    """Write the tuned model, and its soft prompt if it has one.

    Raises:
        TrainingError: the disk is full or refuses.
    """
    run = job.run

    def write() -> None:
        with writing(f"The tuned model in {run.export}"), _kept_as(job, tuned):
            models.save_model(tuned, job.tokenizer, run.export, card=None)
            if soft is not None:
                save_prompt(tuned, soft, run.path / "prompt", run.export)

    with run.timed("export"):
        by_first(write)
        note_export(run)


def check(job: Job, tuned: Any, soft: Any) -> str | None:
    """The export, loaded the way its card says, must compute what the model in memory does; says what was done.

    Raises:
        TrainingError: it does not, or cannot be loaded.
    """
    with job.run.timed("export check"):
        return by_first(lambda: exported.check(described(job, tuned), tuned, soft))


def described(job: Job, tuned: Any) -> exported.Export:
    """How the export is loaded, without Holdfast where that is possible."""
    run, spec, source = job.run, job.recipe.model, job.source
    given = {"trust_remote_code": spec.trust_remote_code or None, "attn_implementation": spec.attn_implementation}
    adapter, prompt, stacked = hasattr(tuned, "peft_config"), run.path / "prompt", source.kind == "adapter"
    ends = Encoder(job.tokenizer).end in models.stop_tokens(source)
    return exported.Export(
        run.export,
        adapter,
        str(tuned.dtype).removeprefix("torch."),
        prompt=prompt if prompt.is_dir() else None,
        base=run.path / "base" if adapter and stacked else None,
        packed=models.is_packed(tuned),
        four_bits=spec.load_in_4bit,
        settings={k: v for k, v in given.items() if v is not None},
        runs_on=adapter and not stacked and not ends,
        replaced=replace.load if replaced_in(tuned) else None,
    )


def loaded(run: Run) -> tuple[Any, Any]:
    """The tuned model of a run that got this far, and its soft prompt or None."""
    Checkpoint(run.path).clear()
    source, recipe = own_export(run), run.recipe
    if recipe.export.dtype != "auto" and source.kind != "adapter":
        as_written = recipe.model.model_copy(update={"dtype": recipe.export.dtype})
        recipe = recipe.model_copy(update={"model": as_written})
    tuned, _ = load(recipe, source, merge_adapter=False)
    soft = run.path / "prompt" / "adapter_model.safetensors"
    if not soft.is_file():
        return tuned, None
    from safetensors.torch import load_file

    return tuned, next(iter(load_file(soft).values())).to(tuned.device)
