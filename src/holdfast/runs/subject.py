"""One model to be measured, from any tool: its files, its tokenizer, and its weights once somebody needs them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from holdfast import models
from holdfast.data.encoder import Encoder
from holdfast.engine import BATCH_TOKENS, processes
from holdfast.files import content_key
from holdfast.runs.measuring import measure_suites
from holdfast.runs.run import Tell, silent
from holdfast.sites import replace


class Subject:
    """A model and what is asked of it.

    Args:
        name: hub id, folder, adapter, GGUF file or alias.
        revision: of a hub id.
        trust_remote_code: run Python code that comes with the model.
    """

    def __init__(self, name: str, revision: str | None = None, trust_remote_code: bool = False):
        self.source = models.resolve(name, revision)
        self.trust = trust_remote_code
        self.tokenizer: Any = models.load_tokenizer(self.source, trust_remote_code)
        self.device, self.dtype = models.auto_place()

    @cached_property
    def model(self) -> Any:
        """The model, adapter merged."""
        return replace.load(self.source, trust_remote_code=self.trust, merge_adapter=True)[0]

    def forget(self) -> None:
        """Let the weights go; they are loaded again when asked for."""
        self.__dict__.pop("model", None)

    @cached_property
    def sha(self) -> str:
        """Identity of its content."""
        return processes.told(lambda: models.fingerprint(self.source))

    @cached_property
    def kind(self) -> str:
        """Its architecture, from the configuration alone."""
        return models.read_config(self.source, self.trust).model_type

    @cached_property
    def vocabulary(self) -> str:
        """Identity of what text becomes: vocabulary and a few encoded strings."""
        probes = ["Q: 12 apples\n\nA: pears", "  def f(x):\n\treturn x", "\u00dcber \u4f60\u597d"]
        return content_key(sorted(self.tokenizer.get_vocab().items()), Encoder(self.tokenizer).prompts(probes))

    def part(self) -> dict[str, Any]:
        """What a report says about it; see `report.schema.ModelPart`."""
        return {
            "name": self.source.name,
            "revision": self.source.revision,
            "sha": self.sha,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def measure(
        self,
        suites: Sequence[str],
        *,
        num_fewshot: int = 8,
        limit: int | None = None,
        labels: Sequence[str] = (),
        batch_tokens: int = BATCH_TOKENS,
        invariant: bool = False,
        phase: str = "measure",
        tell: Tell = silent,
    ) -> list[dict[str, Any]]:
        """Measure `suites`; what was measured before on this content is read from the cache."""
        tell(phase, 0.0, self.source.name)
        out = measure_suites(
            suites,
            lambda: self.model,
            self.tokenizer,
            lambda share, suite: tell(phase, share, suite),
            num_fewshot=num_fewshot,
            limit=limit,
            labels=labels,
            batch_tokens=batch_tokens,
            invariant=invariant,
            cache_key=content_key(self.sha, str(self.dtype), self.device.type),
        )
        tell(phase, 1.0, self.source.name)
        return out
