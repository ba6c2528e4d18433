"""What a run works on: a recipe whose settings, plan, rows and model are checked (`runs.job.checked`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from holdfast import models
from holdfast.data.own_metric import identity
from holdfast.data.task import TaskData
from holdfast.files import content_key
from holdfast.hosts.plain import Training
from holdfast.models.identity import file_sha
from holdfast.recipe import Recipe
from holdfast.runs.rate import Rate
from holdfast.runs.run import Run
from holdfast.session import Session
from holdfast.sites.merging import sources_of


@dataclass(frozen=True)
class Job:
    """A recipe that can be worked on. `mix` draws its rows, `training` is its schedule, `session` its plan,
    `rate` its learning rate with the reason, `suites` what is measured, `unheld` why it has no budget ("": it has)."""

    run: Run
    source: models.ModelSource
    model: Any
    tokenizer: Any
    task: TaskData
    session: Session
    training: Training
    rate: Rate
    mix: Any
    suites: tuple[str, ...]
    unheld: str = "it is not decided yet"

    @property
    def budget(self) -> bool:
        """Whether what breaks a bound is healed or taken back (`runs.budget`)."""
        return not self.unheld

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def halved(self) -> bool:
        """Whether what chooses anything sees one half of items and rows alone (`runs.halves`)."""
        return self.run.halved or self.budget

    @property
    def wraps(self) -> bool:
        """Whether an adapter is trained, and not the weights themselves."""
        return any(m.wraps for m in self.session.methods)

    @property
    def note(self) -> str:
        """What is no error and must be said of the data, "" if nothing."""
        left = [f"{name} leaves out {share:.0%} of the task's rows" for name, share in self.session.left_out.items()]
        return "; ".join([*([self.task.note] if self.task.note else []), *left])

    @property
    def replaces(self) -> bool:
        """Whether modules of the model are replaced."""
        return any("replace" in m.sites() for m in self.session.methods)

    def inputs(self) -> dict[str, Any]:
        """Identity of the model, of the rows and of the models to merge with, by content."""
        found = {"model": self.source.sha, "data": self.task.key}
        own = identity(self.task.metric, self.run.base_dir) if ":" in self.task.metric else None
        found |= {"metric": own} if own else {}
        for m in self.session.merging.methods:
            others = sources_of(m, self.run.base_dir)
            found |= {f"{m.name} model {role}": source.sha for role, source in others.items()}
        found |= {f"file {path} of {name}": sha for name, path, sha in self._files()}
        if self.recipe.data.test and self.task.validation:
            found["validation rows"] = content_key([[r.prompt, r.completion] for r in self.task.validation])
        return found

    def _files(self) -> Iterator[tuple[str, str, str]]:
        """(method, path as it is written, identity) of every file that a setting of a method names."""
        for m in self.session.methods:
            for value in (getattr(m, f.name) for f in dataclasses.fields(m)):
                for path in value if isinstance(value, tuple) else (value,):
                    try:
                        there = isinstance(path, str) and (self.run.base_dir / path).is_file()
                    except (OSError, ValueError):  # a text that is longer than a name may be
                        there = False
                    if there:
                        yield m.name, path, file_sha(self.run.base_dir / path)
