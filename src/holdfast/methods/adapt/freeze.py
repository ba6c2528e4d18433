"""Freeze parts of the model, and let lower layers learn more slowly.

    frozen: the bottom `layers` decoder blocks (Telly-K), embeddings, and every name matching `patterns`
    learning rate of block l of L (1..L):  lr * decay^(L - l);   embeddings: lr * decay^L;   head and final norm: lr

`layer_decay` 1 and nothing frozen is the plain run, bit for bit. Frozen tensors get requires_grad=False before the
optimizer exists, so weight decay and momentum cannot move them; the hidden state after block `layers` stays the
base's. Freezing the embeddings also freezes a tied head. Re-initialising top layers (in the paper) destroys knowledge
and is not offered. Cost: saves gradients, state and the backward pass below the frozen blocks.
Combine with: everything, LoRA too (adapters of frozen blocks do not train).
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from holdfast.errors import PlanError
from holdfast.method import Method, Paper, canonical, layer_of
from holdfast.services import Context, State


@dataclass(frozen=True, kw_only=True)
class Freeze(Method):
    """Layer freezing (Telly) and layer-wise learning-rate decay (Tinn et al. 2021, arXiv 2112.07869).

    Raises:
        PlanError: a pattern that matches nothing, a bad regular expression, more layers than the model has.
    """

    layers: int = 0  # bottom blocks to freeze; Telly sweeps 0..L
    embeddings: bool = False  # ours: frozen too, not verified for Telly
    patterns: tuple[str, ...] = ()  # regular expressions searched in parameter names
    layer_decay: float = 0.9  # near the paper's range, which was not verified

    paper: ClassVar = Paper(
        "Fine-tuning large neural language models for biomedical natural language processing",
        "2112.07869",
        "the paper's exact decay values were not verified",
    )
    does: ClassVar = "freezes chosen layers or names and slows the learning of lower layers"

    @property
    def confined(self) -> bool:
        """Slower layers are not frozen ones."""
        return bool(self.layers or self.embeddings or self.patterns)

    def off(self) -> bool:
        return not self.layers and not self.embeddings and not self.patterns and self.layer_decay == 1

    def check(self, ctx: Context) -> None:
        from holdfast.engine.ways import inner

        whole = int(getattr(inner(ctx.model).config.get_text_config(), "num_hidden_layers", 0))
        if self.layers > whole:
            raise PlanError(f"Freeze.layers is {self.layers}, but the model has {whole} blocks.", "Freeze fewer.")
        names = [canonical(n) for n, _ in ctx.model.named_parameters()]
        for pattern in self.patterns:
            try:
                matched = any(re.search(pattern, n) for n in names)
            except re.error as e:
                raise PlanError(f"Freeze.patterns: {pattern!r} is no regular expression ({e}).", "Mend it.") from e
            if not matched:
                raise PlanError(
                    f"Freeze.patterns: {pattern!r} matches no parameter.",
                    f"Names look like {names[len(names) // 2]!r}.",
                )

    def adapt(self, model: Any, ctx: Context, state: State) -> Any:
        from holdfast.engine.ways import inner

        table = {id(p) for p in inner(model).get_input_embeddings().parameters()}
        for name, p in model.named_parameters():
            plain, layer = canonical(name), layer_of(canonical(name))
            below = layer is not None and layer < self.layers
            named = any(re.search(x, plain) for x in self.patterns)
            if below or named or (self.embeddings and id(p) in table):
                p.requires_grad_(False)
        return model

    def lr_factor(self, name: str, num_layers: int, state: State) -> float:
        if self.layer_decay == 1:
            return 1.0
        layer = layer_of(name)
        if layer is not None:
            return self.layer_decay ** (num_layers - (layer + 1))
        return self.layer_decay**num_layers if re.search(r"embed|wte|wpe", name) else 1.0
