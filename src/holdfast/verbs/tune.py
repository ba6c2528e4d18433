"""The main job: measure before, tune under a plan, measure after, report, export. Every piece is a file in the run
folder; a run that died goes on at its last finished piece, and a finished run does nothing.

Several processes (torchrun) all go through the same flow and share the work inside; the first alone looks at the run
folder and writes, and tells the others (`hosts/processes.py`).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from holdfast.errors import ModelError, PlanError, RecipeError, TrainingError
from holdfast.files import content_key, write_json, write_text
from holdfast.recipe import KEEP_FRAC, Recipe, _resolved, load_recipe
from holdfast.versions import __version__, versions

T = TypeVar("T")
Tell = Callable[[str, float, str], None]  # phase, share done (0..1), words beside the bar
ROWS = 3  # of the training data that the report shows token by token
WORK = {"before.json", "checkpoint", "checkpoint.old", "model", "training.json"}  # what a mended recipe would spoil


def default_plan() -> list[Any]:
    """What `holdfast tune` uses when the recipe names no plan; chosen in docs/results.md."""
    from holdfast.methods import ICLAnchor, LoRA

    return [LoRA(), ICLAnchor()]


def tune(recipe: str | Path | Recipe, overrides: list[str] | None = None, *, tell: Tell | None = None) -> Path:
    """Run a recipe; returns the run folder, which holds `report.json` and `report.html`.

    Raises:
        HoldfastError: one clear message for anything a user can mend, before long work where possible.
    """
    if isinstance(recipe, Recipe):
        base_dir, recipe = Path.cwd(), _resolved(recipe, Path.cwd())
    else:
        base_dir, recipe = Path(recipe).absolute().parent, load_recipe(recipe, overrides or ())
    return Run(recipe, base_dir, tell or (lambda *_: None)).go()


@dataclass(frozen=True)
class Job:
    """A recipe checked on its real model and data; nothing is measured or trained yet."""

    source: Any  # models.ModelSource
    model: Any
    tokenizer: Any
    task: Any  # task.TaskData
    session: Any
    training: Any  # hosts.plain.Training
    mix: Any


class Run:
    """One run folder and what is in it."""

    def __init__(self, recipe: Recipe, base_dir: Path, tell: Tell):
        self.recipe, self.base_dir, self.tell = recipe, base_dir, tell
        self.folder = Path(recipe.training.output_dir)
        self.export = Path(recipe.export.folder) if recipe.export.folder else self.folder / "model"
        self.timing: dict[str, float] = {}
        self.checked_export: str | None = None

    # ---- files

    def _read(self, name: str) -> Any:
        path = self.folder / name
        return by_first(lambda: json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None)

    def _write(self, name: str, value: Any) -> None:
        by_first(lambda: write_json(self.folder / name, value))

    @property
    def finished(self) -> bool:
        return by_first(lambda: (self.folder / "report.json").is_file() and self._same_recipe())

    def _same_recipe(self) -> bool:
        path = self.folder / "recipe.yaml"
        return path.is_file() and load_recipe(path) == self.recipe

    def _open(self) -> None:
        """Claim the folder for this recipe. A run that failed before any work leaves it to a mended recipe."""
        try:
            there = {p.name for p in self.folder.iterdir()} if self.folder.is_dir() else set()
            if there & WORK and "recipe.yaml" in there and not self._same_recipe():
                raise RecipeError(
                    f"The run folder {self.folder} holds a run of another recipe (see its recipe.yaml).",
                    "Choose another training.output_dir, or remove the folder.",
                )
            if there - {"recipe.yaml.new"} and "recipe.yaml" not in there:
                raise RecipeError(
                    f"The folder {self.folder} is not empty and holds no Holdfast run.",
                    "Choose another training.output_dir.",
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self.recipe.save(self.folder / "recipe.yaml.new")
            os.replace(self.folder / "recipe.yaml.new", self.folder / "recipe.yaml")
        except OSError as e:
            raise RecipeError(
                f"The run folder {self.folder} cannot be written: {e.strerror or e}.",
                "Check training.output_dir, its rights and the free disk space.",
            ) from e

    def _claim(self, job: Job) -> None:
        """A run goes on only with the model and the rows it began with."""
        rows = [[r.prompt, r.completion] for r in (*job.task.train, *job.task.test)]
        now = {"model": job.source.sha, "data": content_key(rows)}
        began = (self._read("inputs.json") if self._has_work() else None) or {}
        for what in began:
            if began[what] != now[what]:
                raise RecipeError(
                    f"The {what} of this recipe is no longer what the run in {self.folder} began with.",
                    "Choose another training.output_dir, or put it back as it was.",
                )
        self._write("inputs.json", now)
        self._write("plan.json", job.session.plan.explain())

    def _has_work(self) -> bool:
        return by_first(lambda: any((self.folder / name).exists() for name in WORK))

    def _check_room(self, job: Job) -> None:
        """At the most two checkpoints (weights and two moments in fp32) of what trains, and the export."""
        count = sum(p.numel() for p in job.model.parameters())
        own = sum(p.numel() * p.element_size() for p in job.model.parameters())
        adapter = any(m.wraps for m in job.session.methods)
        need = own if adapter else 2 * 12 * count + own
        need += own if self._writes_base(job) else 0
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise TrainingError(
                f"{self.folder} has {free / 1e9:.1f} GB free, but checkpoints and export of {job.source.name} "
                f"need up to {need / 1e9:.1f} GB.",
                "Free some disk space or choose another training.output_dir.",
            )

    @contextmanager
    def _timed(self, phase: str) -> Any:
        start = time.perf_counter()
        yield
        self.timing[phase] = self.timing.get(phase, 0.0) + time.perf_counter() - start

    # ---- the flow

    def go(self) -> Path:
        if self.finished:
            self.tell("done", 1.0, f"This run is finished: {self.folder}")
            return self.folder
        by_first(self._open)
        job = self.checked()
        by_first(lambda: self._check_room(job))
        self._claim(job)
        before = None if self.recipe.measure.skip_before else self._measured("before", job, job.model)
        tuned, soft = self._tuned(job)
        after = self._measured("after", job, tuned, soft)
        return self._report(job, tuned, before, after)

    def checked(self) -> Job:
        """Check everything, the cheap before the dear: settings, plan, rows, prompts, weights. Writes nothing."""
        from holdfast import models
        from holdfast.data.task import read_task
        from holdfast.measure.probe import Ask
        from holdfast.measure.suites import check_suite, names_of

        r, m = self.recipe, self.recipe.measure
        self._check_settings()
        plan = self._plan()
        with self._timed("load"):
            self.tell("load", 0.0, r.model.model_name_or_path)
            source = models.resolve(r.model.model_name_or_path, r.model.model_revision)
            tokenizer = models.load_tokenizer(source, r.model.trust_remote_code)
            longest = models.context_length(source, r.model.trust_remote_code)
            stops = models.stop_tokens(source)
            task = read_task(r, tokenizer, self.base_dir, longest, stops)
            for suite in names_of(m.suites):
                check_suite(suite, Ask(tokenizer, m.num_fewshot, m.limit, labels=task.labels or ()), longest)
            model, tokenizer = self._load(source, merge_adapter=True)
            self._may_train(source, model, plan)
            bad = not_finite(model)
            if bad:
                what = f"The weight {bad} of {source.name} is not finite, so the model can give no probabilities."
                raise ModelError(what, "Copy or download the model again.")
            check_saving(model, tokenizer, source.name)
        session, training, mix = self._planned(plan, model, tokenizer, task, longest)
        return Job(source, model, tokenizer, task, session, training, mix)

    def _may_train(self, source: Any, model: Any, plan: Any) -> None:
        """Packed weights cannot be trained themselves, nor take up an adapter."""
        from holdfast import models
        from holdfast.plan import Host

        if hasattr(model, "peft_config"):
            what = f"{source.label} is an adapter on quantised weights, which cannot take it up to be tuned further."
            raise ModelError(what, "Name the unquantised model as the base of the adapter.")
        if models.is_packed(model):
            if not getattr(getattr(model, "hf_quantizer", None), "is_trainable", True):
                what = (
                    f"{source.label} keeps its weights as {models.precision(model)}, which nothing can be trained on."
                )
                raise ModelError(what, "Tune the unquantised model.")
            plan.check_host(Host("holdfast tune", quantised=True))
            if self.recipe.export.merge:
                kept = models.precision(model)
                what = f"export.merge is true, but {source.name} keeps its weights in a few bits ({kept})."
                raise ModelError(what, "Remove export.merge, or tune the unquantised model.")

    def _check_settings(self) -> None:
        """Settings that this host cannot follow are refused, never skipped."""
        from holdfast import models
        from holdfast.measure.suites import names_of

        t = self.recipe.training
        names_of(self.recipe.measure.suites)
        if t.save_total_limit != 1:
            raise RecipeError(
                f"training.save_total_limit is {t.save_total_limit}, but holdfast tune keeps one checkpoint.",
                "Remove training.save_total_limit.",
            )
        dtype = self.recipe.model.dtype
        if self.recipe.export.merge and self.recipe.model.load_in_4bit:
            raise RecipeError(
                "export.merge is true, but model.load_in_4bit would round the merged weights to 4 bits again.",
                "Remove export.merge; merge the adapter into the unquantised base afterwards.",
            )
        if t.bf16 is False and dtype == "bfloat16":
            raise RecipeError("training.bf16 is false, but model.dtype is bfloat16.", "Remove one of the two.")
        if self.recipe.export.folder and not (self.folder / "training.json").is_file():
            models.may_replace(None, self.export.expanduser().resolve())

    def _plan(self) -> Any:
        """The plan, checked as far as that needs no model."""
        from holdfast import models
        from holdfast.plan import Plan

        plan = Plan(default_plan()) if self.recipe.plan is None else Plan.from_recipe(self.recipe.plan)
        plan.check_together()
        if self.recipe.model.load_in_4bit:
            plan.check_host(self._host())
            models.may_load_in_4bit()
        return plan

    def _host(self) -> Any:
        from holdfast.plan import Host

        return Host("holdfast tune", quantised=self.recipe.model.load_in_4bit)

    def _load(self, source: Any, *, merge_adapter: bool) -> tuple[Any, Any]:
        from holdfast import models

        spec = self.recipe.model
        plain = spec.dtype == "auto" and self.recipe.training.bf16 is False
        return models.load(
            source,
            dtype="float32" if plain else spec.dtype,
            trust_remote_code=spec.trust_remote_code,
            attn_implementation=spec.attn_implementation,
            merge_adapter=merge_adapter,
            load_in_4bit=spec.load_in_4bit,
        )

    def _planned(self, plan: Any, model: Any, tokenizer: Any, task: Any, longest: int) -> tuple[Any, Any, Any]:
        """Check the whole plan on the real model before anything long."""
        import torch

        from holdfast.hosts.plain import Training
        from holdfast.measure.soft_prompt import check_export
        from holdfast.plan import Host
        from holdfast.services import Context
        from holdfast.session import Session

        t = self.recipe.training
        most = min(self.recipe.data.max_length, longest)
        ctx = Context(model, tokenizer, t.seed, task.train, max_length=most, base_dir=self.base_dir)
        if t.packing and any("stages" in m.sites() for m in plan.active):
            plan.check(Host("training.packing: true", packing=True), ctx)
        plan.check(self._host(), ctx)
        for m in plan.active:
            if any(s.trains == "prompt" for s in m.stages()):
                check_export(model, tokenizer, m.name)
        session = Session(plan, model, ctx, compute_dtype=model.dtype, knows_rows=True, packing=t.packing is not False)
        mix = session.mix(task.token_rows)
        size = t.per_device_train_batch_size * t.gradient_accumulation_steps
        steps = t.max_steps if t.max_steps > 0 else math.ceil(mix.num_rows(t.num_train_epochs) / size)
        if steps < len(session.stages):
            owner = next(m.name for m in plan.active if "stages" in m.sites())
            raise PlanError(
                f"{owner} splits the run into {len(session.stages)} stages, but the run has {steps} step.",
                "Raise training.max_steps or num_train_epochs, or lower the batch size.",
            )
        ctx.total_steps = steps
        half = model.dtype if model.dtype in (torch.bfloat16, torch.float16) else None
        training = Training(
            num_steps=steps,
            batch_size=t.per_device_train_batch_size,
            gradient_accumulation_steps=t.gradient_accumulation_steps,
            learning_rate=t.learning_rate,
            lr_scheduler_type=t.lr_scheduler_type,
            warmup_steps=t.warmup_steps,
            weight_decay=t.weight_decay,
            max_grad_norm=t.max_grad_norm,
            adam_beta1=t.adam_beta1,
            adam_beta2=t.adam_beta2,
            adam_epsilon=t.adam_epsilon,
            fused=t.optim == "adamw_torch_fused",
            seed=t.seed if t.data_seed is None else t.data_seed,  # of the order of rows (and of dropout)
            autocast=torch.bfloat16 if t.bf16 else half,
            save_steps=t.save_steps,
            folder=self.folder,
        )
        return session, training, mix

    # ---- measuring

    def _measured(self, when: str, job: Job, model: Any, soft_prompt: Any = None) -> dict[str, Any]:
        """Abilities and task of one model; the base's half is kept by content for later runs."""
        found = self._read(f"{when}.json")
        if found:
            return found
        from holdfast.measure.suites import measure_suite, names_of, remembered
        from holdfast.measure.tuned_task import score_task

        m, task, out = self.recipe.measure, job.task, {}
        key = None
        if when == "before" and job.source.sha:
            packed = "nf4, " if self.recipe.model.load_in_4bit else ""
            key = content_key(job.source.sha, f"{packed}{model.dtype}", model.device.type)

        def tell(start: float, share: float, words: str) -> Callable[[float], None]:
            return lambda x: self.tell(f"measure {when}", start + share * x, words)

        tell(0.0, 0.0, "")(0.0)
        with self._timed(f"measure {when}"):
            names = names_of(m.suites)
            part = 0.7 / max(1, len(names))
            out["abilities"] = [
                measure_suite(
                    suite,
                    lambda: model,
                    job.tokenizer,
                    num_fewshot=m.num_fewshot,
                    limit=m.limit,
                    labels=task.labels or (),
                    batch_tokens=m.batch_tokens,
                    cache_key=key,
                    progress=tell(n * part, part, suite),
                )
                for n, suite in enumerate(names)
            ]
            rows = [[r.where, r.prompt, r.completion] for r in task.test]
            out["task"] = remembered(
                key and content_key(key, rows, task.labels, m.batch_tokens),
                lambda: score_task(
                    model,
                    job.tokenizer,
                    task.test,
                    task.labels,
                    soft_prompt=soft_prompt,
                    batch_tokens=m.batch_tokens,
                    progress=tell(0.7, 0.3, "task"),
                ),
            )
        tell(1.0, 0.0, "")(1.0)
        self._write(f"{when}.json", out)
        return out

    # ---- training

    def _tuned(self, job: Job) -> tuple[Any, Any]:
        """Train and export, or load the export of a run that got this far. Returns (model, soft prompt or None)."""
        if self._read("training.json"):
            return self._exported()
        from holdfast import models
        from holdfast.engine.forward import inner
        from holdfast.engine.processes import first
        from holdfast.hosts.checkpoint import Checkpoint
        from holdfast.hosts.plain import train
        from holdfast.measure.tuned_task import score_task

        session, training, task = job.session, job.training, job.task
        base_dtype, start = job.model.dtype, time.perf_counter()
        if self._writes_base(job):
            self._save_base(job)
        elif job.source.kind == "adapter":
            models.name_after(job.model, self.export)  # where the whole will lie
        with self._timed("prepare"):
            self.tell("prepare", 0.0, "")
            order = job.mix.draw(training.seed)
            rows = min(training.num_steps * training.batch_size * training.gradient_accumulation_steps, 1 << 20)
            drawn = [next(order) for _ in range(rows)]
            session.prepare(drawn, lambda x: self.tell("prepare", x, "base answers"))
            session.enter(session.stages[-1])
            session.probe(drawn[:2], training.autocast)
            if self.recipe.training.gradient_checkpointing:
                inner(session.model).gradient_checkpointing_enable({"use_reentrant": False})

        every, writes = self.recipe.training.logging_steps, first()

        def on_step(step: int, of: int, parts: dict[str, float]) -> None:
            if writes and (step % every == 0 or step == of):
                self._log({"step": step, "of": of, **parts})
            words = "  ".join(f"{k} {v:.3f}" for k, v in parts.items())
            self.tell("tune", step / of, f"step {step}/{of}  {words}")

        def evaluate(m: Any) -> float:
            rows = task.validation[:64] or task.train[:64]
            scored = score_task(m, job.tokenizer, rows, task.labels, soft_prompt=session.soft_prompt())
            return sum(i["correct"] for i in scored) + 1e-3 * sum(i["logprob"] for i in scored) / len(scored)

        log = train(session, job.mix, training, on_step=on_step, evaluate=evaluate)
        session.merge()
        session.finish()
        bad = not_finite(session.model)
        if bad:
            what = f"The weight {bad} of the tuned model is not finite; it is not exported."
            raise TrainingError(what, "Start again with a lower training.learning_rate and another output_dir.")
        tuned, soft = session.finished_model(base_dtype)
        if self.recipe.export.merge and hasattr(tuned, "peft_config"):
            tuned = models.merged(tuned, f"The adapter of this run on {job.source.label}")
        self.timing["tune"] = log.seconds
        self._save_export(job, tuned, soft)
        self._check_export(job, tuned, soft)
        self._write("training.json", self._training_part(log, training, time.perf_counter() - start))
        Checkpoint(self.folder).clear()
        return tuned, soft

    def _exported(self) -> tuple[Any, Any]:
        """The tuned model of this folder, and its soft prompt or None."""
        from holdfast import models
        from holdfast.hosts.checkpoint import Checkpoint

        Checkpoint(self.folder).clear()
        tuned, _ = self._load(models.resolve(str(self.export)), merge_adapter=False)
        soft = self.folder / "prompt" / "adapter_model.safetensors"
        if not soft.is_file():
            return tuned, None
        from safetensors.torch import load_file

        return tuned, next(iter(load_file(soft).values())).to(tuned.device)

    def _save_export(self, job: Job, tuned: Any, soft: Any) -> None:
        from holdfast import models
        from holdfast.hosts.checkpoint import writing
        from holdfast.measure.soft_prompt import save as save_prompt

        def save() -> None:
            with writing(f"The tuned model in {self.export}"):
                models.save_model(tuned, job.tokenizer, self.export, card=None)
                if soft is not None:
                    save_prompt(tuned, soft, self.folder / "prompt", self.export)

        with self._timed("export"):
            by_first(save)

    def _export_of(self, tuned: Any, source: Any, tokenizer: Any) -> Any:
        """How the export is loaded without Holdfast."""
        from holdfast import models
        from holdfast.data.tokens import Encoder
        from holdfast.models.exported import Export

        spec = self.recipe.model
        given = {"trust_remote_code": spec.trust_remote_code or None, "attn_implementation": spec.attn_implementation}
        adapter, prompt, base = hasattr(tuned, "peft_config"), self.folder / "prompt", self.folder / "base"
        return Export(
            self.export,
            adapter,
            str(tuned.dtype).removeprefix("torch."),
            prompt=prompt if prompt.is_dir() else None,
            base=base if adapter and source.kind == "adapter" else None,
            packed=models.is_packed(tuned),
            four_bits=spec.load_in_4bit,
            settings={k: v for k, v in given.items() if v is not None},
            runs_on=adapter and source.kind != "adapter" and Encoder(tokenizer).end not in models.stop_tokens(source),
        )

    def _check_export(self, job: Job, tuned: Any, soft: Any) -> None:
        """The export, loaded the way its card says, must compute what the model in memory does."""
        from holdfast.models.exported import check

        with self._timed("export check"):
            self.checked_export = by_first(
                lambda: check(self._export_of(tuned, job.source, job.tokenizer), tuned, soft)
            )

    def _writes_base(self, job: Job) -> bool:
        """Whether this run trains an adapter on a base that no folder holds: another adapter, merged."""
        wraps = any(m.wraps for m in job.session.methods)
        return job.source.kind == "adapter" and wraps and not self.recipe.export.merge

    def _save_base(self, job: Job) -> None:
        """Write the merged base, for plain PEFT to load the new adapter on; a run that goes on has it already."""
        from holdfast import models
        from holdfast.hosts.checkpoint import writing

        folder = self.folder / "base"

        def save() -> None:
            if not ((self.folder / "checkpoint").is_dir() and (folder / "config.json").is_file()):
                with writing(f"The merged base in {folder}"):
                    models.save_model(job.model, job.tokenizer, folder, card=None)

        with self._timed("export"):
            by_first(save)
        models.name_after(job.model, folder)

    def _training_part(self, log: Any, training: Any, seconds: float) -> dict[str, Any]:
        """What the report says about the training; see `report.schema.TrainingPart`."""
        realised: dict[str, dict[str, int]] = {}
        for key, count in log.realised.items():
            name, unit = key.rsplit("/", 1)
            realised.setdefault(name, {})[unit] = count
        terms = {k for _, p in log.loss for k in p} - {"task"}
        return {
            "steps": training.num_steps,
            "seconds": log.seconds,
            "seconds_with_prepare": seconds,
            "tokens": log.tokens,
            "tokens_per_second": log.tokens / max(log.seconds, 1e-9),
            "loss": [[s, p["task"]] for s, p in log.loss],
            "terms": {t: [[s, p[t]] for s, p in log.loss if t in p] for t in sorted(terms)},
            "realised_mix": realised,
            "export": self.checked_export,
            "timing": self.timing,
        }

    def _log(self, line: dict[str, Any]) -> None:
        """One line of log.jsonl. A resumed run writes the steps after its checkpoint again; the last line counts."""
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # ---- the end

    def _report(self, job: Job, model: Any, before: Any, after: Any) -> Path:
        from holdfast import models
        from holdfast.measure.compare import abilities, estimates, only_after, verdict

        task, source, floors = job.task, job.source, self.recipe.measure.keep
        training = self._read("training.json")
        if before:
            judged = abilities(before["abilities"], after["abilities"], floors, KEEP_FRAC)
        else:
            judged = [only_after(a, floors.get(a["suite"], KEEP_FRAC)) for a in after["abilities"]]
        part = {
            "name": task.name,
            "metric": task.metric,
            "chance": task.chance,
            "split": "test" if self.recipe.data.test else "validation",
            "note": task.note or None,
            **estimates(before and before["task"], after["task"]),
        }
        from holdfast.report.examples import examples
        from holdfast.report.seen import seen_rows

        with self._timed("examples"):
            shown = examples(lambda: model, job.tokenizer, before["abilities"], after["abilities"]) if before else []
        report = {
            "holdfast_version": __version__,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "kind": "tune",
            "verdict": verdict(judged, part),
            "model": {
                "name": source.name,
                "revision": source.revision,
                "sha": source.sha,
                "dtype": models.precision(model),
            },
            "tuned": {
                "name": task.name,
                "path": str(self.export),
                "sha": None,
                "export": training.get("export"),
            },
            "task": part,
            "abilities": judged,
            "plan": self._read("plan.json"),
            "data": {"name": task.name, "train": self.recipe.data.train.path, "rows": len(task.train)},
            "training": training,
            "examples": shown,
            "rows": seen_rows(job, ROWS),
            "timing": {**training.get("timing", {}), **self.timing},
            "versions": versions(),
            "settings": {
                "num_fewshot": self.recipe.measure.num_fewshot,
                "limit": self.recipe.measure.limit,
                "seed": self.recipe.training.seed,
            },
        }
        by_first(lambda: self._save_report(report, self._export_of(model, source, job.tokenizer)))
        self.tell("done", 1.0, str(self.folder))
        return self.folder

    def _save_report(self, report: dict[str, Any], export: Any) -> None:
        """report.json last: with it the run is finished."""
        from holdfast.models.card import model_card
        from holdfast.report import markdown, page

        report["recipe"] = (self.folder / "recipe.yaml").read_text(encoding="utf-8")
        base = str(export.base) if export.base else None
        card = model_card(report, adapter=export.adapter, code=export.code(), base=base)
        write_text(self.export / "README.md", card)
        page.write(report, self.folder / "report.html")
        write_text(self.folder / "report.md", markdown.summary(report))
        write_json(self.folder / "report.json", report)


# ---- pieces


def by_first(make: Callable[[], T]) -> T:
    """`hosts.processes.by_first`, without loading torch: where nobody has, there is one process."""
    if "torch" not in sys.modules:
        return make()
    from holdfast.hosts import processes

    return processes.by_first(make)


def planned(recipe: Recipe, base_dir: Path) -> Job:
    """The job of a recipe, checked on the real model; nothing is written."""
    return Run(recipe, base_dir, lambda *_: None).checked()


def not_finite(model: Any) -> str | None:
    """The first weight that holds NaN or infinity: every number computed from it would too."""
    import torch

    return next((name for name, p in model.named_parameters() if not torch.isfinite(p).all()), None)


def check_saving(model: Any, tokenizer: Any, name: str) -> None:
    """Save everything but the weights to a folder that is thrown away: better now than after the training.

    Raises:
        ModelError: the configuration or the tokenizer cannot be saved.
    """
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="holdfast-") as folder:
        for what, part in (("configuration", model.config), ("tokenizer", tokenizer)):
            try:
                part.save_pretrained(folder)
            except OSError:  # no room in this folder says nothing about the one of the export
                return
            except Exception as e:  # values that JSON cannot hold, checks of transformers, custom code
                words = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
                raise ModelError(
                    f"The {what} of {name} cannot be saved ({words}), so the tuned model could not be exported.",
                    "Load and save it once with plain transformers, mend what fails there, and tune that.",
                ) from e
