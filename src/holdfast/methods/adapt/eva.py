"""EVA: LoRA whose A starts at the main directions of what the task puts into each map, with ranks shared out by them.

    A_l = the first r_l right singular vectors of the inputs of map l on the task's rows, centred;   B = 0
    xi_li = s_li^2 / ((M - 1) * total variance);   r_l: how many of the r * (number of maps) largest xi are of map l,
    at most rho * r;   scale lora_alpha / r whatever r_l is

Rows of A are orthonormal, step 0 is the base, maps of rank 0 get no adapter, and the ranks add up to those of LoRA.
Incremental SVD, its end (when components turn by less than tau) and the ranks are PEFT's; maps with equal inputs share
one. PEFT skips batches of too few tokens and then goes on for ever: here batches are filled up to rho * r tokens, and
a task that has fewer is refused. PEFT also goes over the same rows until all components stand still, which those of
little variance never do where answers are short (SST-2: not in 20 minutes): here the directions are taken as they are
after `passes` over the rows, and the report says so.
It is made to learn faster and does not protect by itself; for the directions that matter least take CorDA.
Cost: forwards of a few batches and small SVDs before training; then that of LoRA.
Combine with: every data and loss method, WiSEFT and LiNeS (exact). Do not combine with: LoRA, CorDA.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from holdfast.engine.base import as_base
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.method import Paper, State
from holdfast.methods.adapt._adapter import Adapter, layers
from holdfast.methods.adapt._inputs import task_rows
from holdfast.methods.adapt._matrices import inputs_of
from holdfast.services import Context

WRAPPED = "base_model.model."  # before the names of maps in PEFT's model
BATCH_TOKENS = 4096
ANY = -2.0  # below every cosine
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class EVA(Adapter):
    """Explained-variance adaptation (2024), arXiv 2410.07170.

    Raises:
        PlanError: as LoRA; rho * r above a map's inputs, no text of the task or too little.
    """

    rho: float = 2.0  # PEFT; 1: the same rank everywhere
    tau: float = 0.99  # PEFT: cosine at which a component has settled
    use_label_mask: bool = True  # PEFT: inputs at the answers alone
    whiten: bool = False  # PEFT
    samples: int = 256  # ours: rows of the task
    max_tokens: int = 256  # ours
    passes: int = 3  # ours: over the rows, if the directions do not settle before

    paper: ClassVar = Paper("Parameter Efficient Fine-tuning via Explained Variance Adaptation", "2410.07170",
                            "its tables were not verified; it says nothing of forgetting")  # fmt: skip
    does: ClassVar = "starts a low-rank adapter at the main directions of the task's inputs, and shares out its ranks"

    def check(self, ctx: Context) -> None:
        super().check(ctx)
        if self.rho < 1 or not 0 < self.tau <= 1 or min(self.samples, self.passes) < 1 or self.max_tokens < 2:
            what = "EVA needs rho of at least 1, tau above 0 and at most 1, samples, passes and max_tokens."
            raise PlanError(what, "Mend them.")
        for name, m in self.maps(ctx.model).items():
            width = inputs_of(m)
            if self.components > width:
                what = f"EVA looks for rho * r = {self.components} directions, but {name} has {width} inputs."
                raise PlanError(what, "Lower r or rho.")

    @property
    def components(self) -> int:
        return round(self.rho * self.r)

    @property
    def _eva(self) -> dict[str, Any]:
        return self._eva_at(self.tau)

    def _eva_at(self, tau: Any) -> dict[str, Any]:
        from peft import EvaConfig

        eva = EvaConfig(rho=self.rho, tau=tau, use_label_mask=self.use_label_mask, whiten=self.whiten)
        return {"init_lora_weights": "eva", "eva_config": eva}

    def prepare(self, ctx: Context) -> State:
        """A (r_l, n) of every map, by its name."""
        from peft import LoraConfig
        from peft.tuners.lora.eva import get_eva_state_dict

        rows = task_rows(ctx, self.name, self.samples, self.max_tokens)
        batches = _Batches(self, rows, torch.tensor(self.tau))
        more = {"target_modules": list(self.maps(ctx.model)), "exclude_modules": None, **self._eva_at(batches.tau)}
        config, quiet = LoraConfig(**self.peft_settings(ctx.model, **more)), {"show_progress_bar": False}
        with as_base(ctx.model), torch.random.fork_rng(devices=[]):
            found = get_eva_state_dict(
                ctx.model,
                batches,
                config,
                _run,
                _counted,
                _inputs,
                gather_distributed_inputs=False,
                **quiet,
            )
        if batches.over:
            said = f"EVA's directions did not all settle in {self.passes} passes over {len(rows)} rows, and were taken"
            ctx.notes.append(f"{said} as they were")
        return {f"A/{name}": a.float().contiguous() for name, a in found.items()}

    def adapt(self, model: Any, ctx: Context, state: State) -> Any:
        from peft import LoraConfig, initialize_lora_eva_weights

        model = self.wrapped(model, LoraConfig(**self.peft_settings(model)), ctx)
        config = model.peft_config["default"]
        vars(config).update(self._eva)
        found = {f"{WRAPPED}{key.removeprefix('A/')}": a for key, a in state.items() if key.startswith("A/")}
        with torch.random.fork_rng(devices=[]):
            initialize_lora_eva_weights(model, eva_state_dict=found)
        vars(config).update(init_lora_weights=True, eva_config=None)  # what is saved loads as plain LoRA
        for name, module in layers(model).items():  # PEFT makes layers of another rank anew, in the base's dtype
            module.lora_A.float()
            module.lora_B.float()
            module.lora_A["default"].weight.data.copy_(state[f"A/{name}"])
        return model


def _counted(batch: Batch, config: Any) -> torch.Tensor:
    """(B, L) which tokens' inputs count."""
    mask = batch["attention_mask"].bool()
    return mask & (batch["labels"] != -100) if config.eva_config.use_label_mask else mask


def _inputs(args: Any, counted: torch.Tensor, name: str) -> torch.Tensor:
    """(M, n) inputs of a map at the tokens that count; some maps are given (B, L, n), others (B L, n)."""
    x = args[0] if isinstance(args, tuple) else args
    return x.flatten(0, -2)[counted.flatten()]


def _run(model: Any, batch: Batch) -> None:
    """Run a batch; without logits, unless PEFT watches the head."""
    watched = model.get_output_embeddings()._forward_hooks
    (model if watched else model.base_model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


class _Batches:
    """Batches over and over. After the last pass `tau`, which PEFT's hooks hold too, lets every direction pass."""

    def __init__(self, method: EVA, rows: Sequence[TokenRow], tau: torch.Tensor):
        self.passes, self.tau, self.over = method.passes, tau, False
        self.batches = [padded(part) for part in filled(rows, method.components, method.use_label_mask)]
        if not self.batches:
            what = f"EVA looks for {method.components} directions, but {len(rows)} rows have fewer tokens for it."
            raise PlanError(what, "Lower EVA.r or rho, raise samples, or set use_label_mask to false.")

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.passes - 1):
            yield from self.batches
        yield from self.batches[:-1]
        while True:  # ranks that move while it looks may ask for a few more
            self.tau.fill_(ANY)
            yield self.batches[-1]
            self.over = True  # PEFT asks for a batch before it sees that all have settled


def filled(rows: Sequence[TokenRow], least: int, scored: bool) -> list[list[TokenRow]]:
    """Rows in batches of at least BATCH_TOKENS tokens, and `least` that count; the last one has what is left over."""
    out: list[list[TokenRow]] = []
    part, every, own = [], 0, 0
    for row in rows:
        part.append(row)
        every, own = every + len(row.ids), own + (row.num_scored if scored else len(row.ids))
        if own >= least and every >= BATCH_TOKENS:
            out.append(part)
            part, every, own = [], 0, 0
    if own >= least:
        out.append(part)
    elif out:
        out[-1] += part
    return out


def padded(rows: Sequence[TokenRow]) -> Batch:
    """What a model and PEFT's hooks read: (B, L) ids, mask, and labels, -100 where nothing is scored."""
    longest = max(len(r.ids) for r in rows)
    ids, mask, labels = (torch.full((len(rows), longest), fill) for fill in (0, 0, -100))
    for n, row in enumerate(rows):
        there, own = slice(len(row.ids)), torch.from_numpy(row.ids)
        ids[n, there], mask[n, there] = own, 1
        labels[n, there] = torch.where(torch.from_numpy(row.scored), own, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
