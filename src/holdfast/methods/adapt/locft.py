"""LocFT-BF: train one matrix of a late layer, over all rows epoch after epoch, until the loss is almost 0.

    trains: the weight `matrix` of layer `layer`, nothing else
    a step whose loss is below `threshold` is not taken;   the run ends after an epoch of mean loss below `threshold`

Made for editing facts: all edits are seen once before any is seen twice ("breadth-first"), in batches, with nothing
that holds the rest. All other tensors are the base's to the last bit, and so are the states below the layer. A step
that is not taken leaves weights and moments as they are.
The paper: Adam at 5e-4 without weight decay, batches of 100, up to 25 epochs: settings of the training, not of this
method (`learning_rate: auto` gives 2e-5 at most, as to all that trains the base's own weights: write 5e-4).
Differences from it: the loss is the mean over the tokens of a step, not over its rows; no tokens are added.
Its search for the matrix (try some on few rows, keep the best) is `holdfast compare` with several plans.
In a trainer that does not know how many rows an epoch has, the run does not end early.
Cost: gradients end at that layer, moments are of one matrix. Combine with: every loss and data method, WiSEFT.
Do not combine with: LoRA, HalfFineTune, Freeze.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from holdfast.engine.ways import inner
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Past, State, Steer, canonical, layer_of
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class LocFT(Method):
    """Localized breadth-first fine-tuning (ICLR 2026), arXiv 2509.22072.

    Raises:
        PlanError: layer and matrix name no weight or several, or a threshold below 0.
    """

    layer: int | None = None  # from 0; None: at 22/32 of the depth, the paper's for Llama 3 8B
    matrix: str = "down_proj"  # the paper; up_proj is its other choice
    threshold: float = 1e-2  # the paper, of a step and of an epoch

    confined: ClassVar = True
    paper: ClassVar = Paper("Fine-tuning Done Right in Model Editing", "2509.22072",
                            "its tables were not verified")  # fmt: skip
    does: ClassVar = "trains one matrix of a late layer and stops where the loss is almost 0"
    needs: ClassVar = frozenset({"dense"})
    skips_steps: ClassVar = True
    refuses: ClassVar = {
        "HalfFineTune": "one matrix has no half to draw.",
        "Freeze": "all but one matrix is frozen already.",
    }

    def check(self, ctx: Context) -> None:
        if self.threshold < 0:
            raise PlanError(f"LocFT.threshold is {self.threshold}.", "Use 0 or more.")
        self.chosen(ctx.model)

    def chosen(self, model: Any) -> str:
        """The canonical name of the weight that trains."""
        count = int(getattr(inner(model).config.get_text_config(), "num_hidden_layers", 1))
        layer = count * 22 // 32 if self.layer is None else self.layer
        names = [canonical(n) for n, p in model.named_parameters() if p.ndim >= 2]
        inside = [n for n in names if layer_of(n) == layer]
        found = [n for n in inside if re.search(rf"(^|\.){re.escape(self.matrix)}(\.weight)?$", n)]
        if len(found) != 1:
            ends = sorted({".".join(n.removesuffix(".weight").split(".")[-2:]) for n in inside})
            what = f"LocFT trains one weight, but {self.matrix!r} names {len(found)} in layer {layer} of {count}."
            raise PlanError(what, f"Matrices there: {', '.join(ends)}." if ends else f"Layers are 0 to {count - 1}.")
        return found[0]

    def adapt(self, model: Any, ctx: Context, state: State) -> Any:
        chosen = self.chosen(model)
        for name, p in model.named_parameters():
            if canonical(name) != chosen:
                p.requires_grad_(False)
        return model

    def steer(self, past: Past, state: State) -> Steer | None:
        loss = past.loss.get("task")
        if loss is None:
            return None
        total, count, epochs = state.get("epoch", torch.zeros(3, dtype=torch.float64)).tolist()
        mean = (total + loss) / (count + 1)
        over = past.epochs > epochs
        new = (0.0, 0.0, past.epochs) if over else (total + loss, count + 1, epochs)
        return Steer(
            freeze=(".",) if loss < self.threshold else (),
            end=f"the mean loss of an epoch was {mean:.4g}" if over and mean < self.threshold else "",
            state={"epoch": torch.tensor(new, dtype=torch.float64)},
        )
