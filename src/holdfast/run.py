"""The main job: measure before, tune under a plan, measure after, report, export. Every piece is a file in the run
folder; a run that died goes on at its last finished piece, and a finished run does nothing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import holdfast
from holdfast.errors import HoldfastError, RecipeError, TrainingError
from holdfast.recipe import Recipe, load_recipe

Tell = Callable[[str, float, str], None]  # phase, share done (0..1), words beside the bar


def default_plan() -> list[Any]:
    """What `holdfast tune` uses when the recipe names no plan; chosen in docs/results.md."""
    from holdfast.methods import ICLAnchor, LoRA

    return [LoRA(), ICLAnchor()]


def tune(recipe: str | Path | Recipe, overrides: list[str] | None = None, *, tell: Tell | None = None) -> Path:
    """Run a recipe; returns the run folder, which holds `report.json` and `report.html`.

    Raises:
        HoldfastError: one clear message for anything a user can mend, before long work where possible.
    """
    base_dir = Path.cwd()
    if not isinstance(recipe, Recipe):
        base_dir, recipe = Path(recipe).resolve().parent, load_recipe(recipe, overrides or ())
    return Run(recipe, base_dir, tell or (lambda *_: None)).go()


class Run:
    """One run folder and what is in it."""

    def __init__(self, recipe: Recipe, base_dir: Path, tell: Tell):
        self.recipe, self.base_dir, self.tell = recipe, base_dir, tell
        self.folder = Path(recipe.training.output_dir)
        self.timing: dict[str, float] = {}

    # ---- files

    def _read(self, name: str) -> Any:
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _write(self, name: str, value: Any) -> None:
        write_json(self.folder / name, value)

    @property
    def finished(self) -> bool:
        return (self.folder / "report.json").is_file() and self._same_recipe()

    def _same_recipe(self) -> bool:
        from holdfast.recipe import load_recipe

        path = self.folder / "recipe.yaml"
        return path.is_file() and load_recipe(path) == self.recipe

    def _open(self) -> None:
        """Claim the folder for this recipe and check that there is room."""
        if (self.folder / "recipe.yaml").is_file():
            if not self._same_recipe():
                raise RecipeError(
                    f"The run folder {self.folder} holds a run of another recipe (see its recipe.yaml).",
                    "Choose another training.output_dir, or remove the folder.",
                )
            return
        if self.folder.exists() and any(self.folder.iterdir()):
            raise RecipeError(
                f"The folder {self.folder} is not empty and holds no Holdfast run.", "Choose another output_dir."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.recipe.save(self.folder / "recipe.yaml")
        except OSError as e:
            raise RecipeError(
                f"The run folder {self.folder} cannot be written: {e.strerror or e}.", "Check the path and its rights."
            ) from e

    def _check_room(self, model: Any) -> None:
        """Two copies of the weights (checkpoint and export) must fit."""
        need = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise TrainingError(
                f"{self.folder} has {free / 1e9:.1f} GB free, but this model's checkpoint and export need up to "
                f"{need / 1e9:.1f} GB.",
                "Free some space or choose another training.output_dir.",
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
        from holdfast import models
        from holdfast.task import read_task

        self._open()
        recipe = self.recipe
        with self._timed("load"):
            self.tell("load", 0.0, recipe.model.model_name_or_path)
            source = models.resolve(recipe.model.model_name_or_path, recipe.model.model_revision)
            model, tokenizer = models.load(
                source,
                dtype=_dtype(recipe.model.dtype),
                trust_remote_code=recipe.model.trust_remote_code,
                attn_implementation=recipe.model.attn_implementation,
                merge_adapter=True,
            )
        self._check_room(model)
        longest = int(getattr(model.config, "max_position_embeddings", None) or 1 << 20)
        task = read_task(recipe, tokenizer, self.base_dir, longest)
        session, training, mix = self._planned(model, tokenizer, task)
        sha = models.fingerprint(source)
        before = self._measured("before", model, tokenizer, task, sha)
        tuned = self._tuned(source, model, tokenizer, task, session, training, mix)
        after = self._measured("after", tuned[0], tokenizer, task, None, tuned[1])
        return self._report(source, sha, tuned[0], tokenizer, task, before, after)

    def _planned(self, model: Any, tokenizer: Any, task: Any, write: bool = True) -> tuple[Any, Any, Any]:
        """Check the whole plan on the real model before anything long."""
        import torch

        from holdfast.hosts.plain import Training
        from holdfast.plan import Host, Plan
        from holdfast.services import Context
        from holdfast.session import Session

        t = self.recipe.training
        plan = Plan(default_plan()) if self.recipe.plan is None else Plan.from_recipe(self.recipe.plan)
        ctx = Context(
            model, tokenizer, t.seed, task.train, max_length=self.recipe.data.max_length, base_dir=self.base_dir
        )
        if t.packing and any("stages" in m.sites() for m in plan.active):
            plan.check(Host("training.packing: true", packing=True), ctx)
        plan.check(Host("holdfast tune"), ctx)
        compute = model.dtype
        session = Session(plan, model, ctx, compute_dtype=compute, knows_rows=True)
        mix = session.mix(task.token_rows)
        size = t.per_device_train_batch_size * t.gradient_accumulation_steps
        steps = t.max_steps if t.max_steps > 0 else math.ceil(mix.num_rows(t.num_train_epochs) / size)
        ctx.total_steps = steps
        half = compute in (torch.bfloat16, torch.float16)
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
            seed=t.seed,
            autocast=compute if half and t.bf16 is not False else None,
            save_steps=t.save_steps,
            folder=self.folder,
        )
        if write:
            self._write("plan.json", plan.explain())
        return session, training, mix

    def plan_only(self) -> tuple[Any, Any, Any]:
        """(session, training, task) of a checked plan; nothing is written or trained."""
        from holdfast import models
        from holdfast.task import read_task

        source = models.resolve(self.recipe.model.model_name_or_path, self.recipe.model.model_revision)
        model, tokenizer = models.load(source, trust_remote_code=self.recipe.model.trust_remote_code)
        longest = int(getattr(model.config, "max_position_embeddings", None) or 1 << 20)
        task = read_task(self.recipe, tokenizer, self.base_dir, longest)
        session, training, _ = self._planned(model, tokenizer, task, write=False)
        return session, training, task

    # ---- measuring

    def _measured(
        self, when: str, model: Any, tokenizer: Any, task: Any, sha: str | None, soft_prompt: Any = None
    ) -> dict[str, Any] | None:
        """Abilities and task of one model; the base's half is cached by content across runs."""
        if when == "before" and self.recipe.measure.skip_before:
            return None
        found = self._read(f"{when}.json")
        if found:
            return found
        from holdfast.measure.suites import measure_suite
        from holdfast.task import score_task

        m, out = self.recipe.measure, {}
        with self._timed(f"measure {when}"):
            out["abilities"] = [
                measure_suite(
                    suite,
                    model,
                    tokenizer,
                    num_fewshot=m.num_fewshot,
                    limit=m.limit,
                    batch_tokens=m.batch_tokens,
                    cache_key=sha,
                    progress=lambda x: self.tell(f"measure {when}", 0.7 * x, "abilities"),
                )
                for suite in m.suites
            ]
            out["task"] = score_task(
                model,
                tokenizer,
                task.test,
                task.labels,
                soft_prompt=soft_prompt,
                batch_tokens=m.batch_tokens,
                progress=lambda x: self.tell(f"measure {when}", 0.7 + 0.3 * x, "task"),
            )
        self.tell(f"measure {when}", 1.0, "")
        self._write(f"{when}.json", out)
        return out

    # ---- training

    def _tuned(
        self, source: Any, model: Any, tokenizer: Any, task: Any, session: Any, training: Any, mix: Any
    ) -> tuple[Any, Any]:
        """Train and export, or load the export of a run that got this far. Returns (model, soft prompt or None)."""
        from holdfast import models
        from holdfast.hosts.plain import train
        from holdfast.task import score_task

        if self._read("training.json"):
            tuned, _ = models.load(str(self.folder / "model"), dtype=model.dtype, merge_adapter=False)
            soft = self.folder / "prompt" / "adapter_model.safetensors"
            if soft.is_file():
                from safetensors.torch import load_file

                return tuned, next(iter(load_file(soft).values())).to(tuned.device)
            return tuned, None
        compute = model.dtype
        with self._timed("prepare"):
            order = mix.draw(training.seed)
            rows = min(training.num_steps * training.batch_size * training.gradient_accumulation_steps, 1 << 20)
            drawn = [next(order) for _ in range(rows)]
            session.prepare(drawn, lambda x: self.tell("prepare", x, "base answers"))
            session.enter(session.stages[-1])
            session.probe(drawn[:2], training.autocast)
        start = time.perf_counter()

        def on_step(step: int, of: int, parts: dict[str, float]) -> None:
            words = "  ".join(f"{k} {v:.3f}" for k, v in parts.items())
            self.tell("tune", step / of, f"step {step}/{of}  {words}")

        def evaluate(m: Any) -> float:
            rows = task.validation[:64] or task.train[:64]
            soft = session.soft_prompt()
            scored = score_task(m, tokenizer, rows, task.labels, soft_prompt=soft)
            return sum(i["correct"] for i in scored) + 1e-3 * sum(i["logprob"] for i in scored) / len(scored)

        log = train(session, mix, training, on_step=on_step, evaluate=evaluate)
        session.merge()
        session.finish()
        tuned, soft = session.finished_model(compute)
        self.timing["tune"] = log.seconds
        with self._timed("export"):
            models.save_model(tuned, tokenizer, self.folder / "model", card=None)
            if soft is not None:
                save_prompt(tuned, soft, self.folder / "prompt", self.folder / "model")
        realised: dict[str, dict[str, int]] = {}
        for key, count in log.realised.items():
            name, unit = key.rsplit("/", 1)
            realised.setdefault(name, {})[unit] = count
        terms = {k for _, p in log.loss for k in p} - {"task"}
        self._write(
            "training.json",
            {
                "steps": training.num_steps,
                "seconds": log.seconds,
                "seconds_with_prepare": time.perf_counter() - start + self.timing["prepare"],
                "tokens": log.tokens,
                "tokens_per_second": log.tokens / max(log.seconds, 1e-9),
                "loss": [[s, p["task"]] for s, p in log.loss],
                "terms": {t: [[s, p[t]] for s, p in log.loss if t in p] for t in sorted(terms)},
                "realised_mix": realised,
                "timing": self.timing,
            },
        )
        shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)
        return tuned, soft

    # ---- the end

    def _report(
        self, source: Any, sha: str, model: Any, tokenizer: Any, task: Any, before: Any, after: Any
    ) -> Path:
        from holdfast.compare import ability, estimates, verdict
        from holdfast.model_card import model_card
        from holdfast.report import markdown, page

        keep = self.recipe.measure.keep
        training = self._read("training.json")
        pairs = zip(before["abilities"], after["abilities"], strict=True) if before else ()
        abilities = [ability(b, a, keep[b["suite"]]) for b, a in pairs]
        if not before:
            abilities = [{**ability(a, None, keep[a["suite"]]), "status": None} for a in after["abilities"]]
        part = {
            "name": task.name,
            "metric": task.metric,
            "chance": task.chance,
            "split": "test" if self.recipe.data.test else "validation",
            "note": task.note or None,
            **estimates(before and before["task"], after["task"]),
        }
        with self._timed("examples"):
            shown = examples(model, tokenizer, before, after, self.recipe) if before else []
        report = {
            "holdfast_version": holdfast.__version__,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "kind": "tune",
            "verdict": verdict(abilities, part),
            "model": {"name": source.name, "revision": source.revision, "sha": sha, "dtype": str(model.dtype)[6:]},
            "tuned": {"name": task.name, "path": str(self.folder / "model"), "sha": None},
            "task": part,
            "abilities": abilities,
            "plan": self._read("plan.json"),
            "data": {"name": task.name, "rows": len(task.train)},
            "training": training,
            "examples": shown,
            "timing": {**training.get("timing", {}), **self.timing},
            "versions": versions(),
            "settings": {
                "num_fewshot": self.recipe.measure.num_fewshot,
                "limit": self.recipe.measure.limit,
                "seed": self.recipe.training.seed,
            },
            "recipe": (self.folder / "recipe.yaml").read_text(encoding="utf-8"),
        }
        adapter = (self.folder / "model" / "adapter_config.json").is_file()
        write_text(self.folder / "model" / "README.md", model_card(report, adapter=adapter))
        page.write(report, self.folder / "report.html")
        write_text(self.folder / "report.md", markdown.summary(report))
        self._write("report.json", report)
        self.tell("done", 1.0, str(self.folder))
        return self.folder


# ---- pieces


def planned(recipe: Recipe, base_dir: Path) -> tuple[Any, Any, Any]:
    """(session, training settings, task) of a recipe, checked on the real model; nothing is written."""
    return Run(recipe, base_dir, lambda *_: None).plan_only()


def examples(model: Any, tokenizer: Any, before: Any, after: Any, recipe: Recipe, most: int = 6) -> list[dict]:
    """Items of the abilities that were right before and are wrong now, with what the tuned model says."""
    from holdfast.measure.suites import prompt_of

    out: list[dict] = []
    for b, a in zip(before["abilities"], after["abilities"], strict=True):
        for tb, ta in zip(b["tasks"], a["tasks"], strict=True):
            pairs = zip(tb["items"], ta["items"], strict=True)
            broken = [i["id"] for i, j in pairs if i["correct"] and not j["correct"]]
            if broken and len(out) < most:
                prompt = prompt_of(b["suite"], tb["name"], broken[0], tokenizer, b)
                ids = tokenizer(prompt.context, return_tensors="pt").to(model.device)
                got = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
                text = tokenizer.decode(got[0, ids["input_ids"].shape[1] :])
                out.append(
                    {
                        "task": tb["name"],
                        "prompt": prompt.context[-400:],
                        "expected": prompt.answer.strip(),
                        "before": prompt.answer.strip(),
                        "after": text.strip().split("\n")[0],
                    }
                )
    return out


def save_prompt(model: Any, soft_prompt: Any, folder: Path, base: Path) -> None:
    """Write a soft prompt (p, D) as a PEFT prompt-tuning adapter on `base`."""
    from peft import PromptTuningConfig
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=len(soft_prompt),
        token_dim=soft_prompt.shape[1],
        num_transformer_submodules=1,
        num_attention_heads=model.config.num_attention_heads,
        num_layers=model.config.num_hidden_layers,
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file({"prompt_embeddings": soft_prompt.float().cpu().contiguous()}, folder / "adapter_model.safetensors")


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import platform
    from importlib import metadata

    out = {"python": platform.python_version(), "holdfast": holdfast.__version__}
    for name in ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "lm_eval"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError as e:
        fresh.unlink(missing_ok=True)
        raise HoldfastError(f"{path} could not be written: {e.strerror or e}.", "Free some disk space.") from e


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; NaN is refused."""
    write_text(path, json.dumps(value, allow_nan=False, indent=1))


def _dtype(name: str) -> Any:
    import torch

    return "auto" if name == "auto" else getattr(torch, name)


def content_key(*parts: Any) -> str:
    """A short hash of plain data, for names of cached files."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]
