"""Other people's recipes on the same rows, in the same order, for as many steps: TRL's trainer with its defaults.

What each recipe adds comes from PEFT as its documentation shows it. Only what makes runs comparable is set: rows in
order, steps, learning rate, no files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from leaderboard_plans import FULL, LORA

CALIBRATION = 256  # general rows that CorDA looks at, as its documentation advises


def full(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """(model in the precision that trains, PEFT's configuration or None)."""
    import torch

    import _common

    _common.set_weights(model, torch.float32)
    return model, None


def lora(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    from peft import LoraConfig

    return model, LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def osf(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    from peft import OSFConfig

    return full(model, tokenizer)[0], OSFConfig(target_modules="all-linear")


def corda(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The knowledge-preserved mode: directions that general rows use most stay frozen."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    full(model, tokenizer)  # its decompositions ask for fp32
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(
        r=16, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM",
        init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm", verbose=False),
    )  # fmt: skip
    rows = general(tokenizer)[:CALIBRATION]

    def look() -> None:
        with torch.no_grad():
            for row in rows:
                model(torch.as_tensor(row.ids)[None])

    preprocess_corda(model, config, run_model=look)
    return model, config


@dataclass(frozen=True)
class Peer:
    """A recipe. share: of general rows among those that train."""

    prepare: Callable[[Any, Any], tuple[Any, Any]]
    rate: float
    adapter: bool = True
    share: float = 0.0

    @property
    def merges(self) -> bool:
        """Whether PEFT has changed the weights beside the adapter, so that only the merged model is the tuned one."""
        return self.prepare in (osf, corda)


PEERS = {
    "TRL SFT, full": Peer(full, FULL, adapter=False),
    "TRL + PEFT LoRA": Peer(lora, LORA),
    "TRL + PEFT LoRA, 10 % general data": Peer(lora, LORA, share=0.1),
    "TRL + PEFT OSF": Peer(osf, FULL, adapter=False),
    "TRL + PEFT CorDA": Peer(corda, 1e-4),
}


def general(tokenizer: Any) -> list[Any]:
    """The shipped instructions as token rows."""
    from holdfast.data.rows import read_rows
    from holdfast.data.tokens import tokenize
    from leaderboard_plans import HERE

    rows = read_rows("holdfast:general/instructions.jsonl", base_dir=HERE, tokenizer=tokenizer)
    return [tokenize(r, tokenizer, 1024) for r in rows]


def train(
    name: str, model: Any, tokenizer: Any, tokens: Sequence[Any], rate: float, seed: int, steps: int, batch: int
) -> Any:
    """Train `model` (it is used up) by a recipe; returns it ready to be asked, in the precision it came in."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    import _common
    from holdfast.data.mix import Mix, Source

    disable_progress_bars()
    torch.manual_seed(seed)
    dtype, mix, peer = model.dtype, Mix(tokens), PEERS[name]
    if peer.share:
        mix = mix.add(Source("general", general(tokenizer), peer.share))
    rows = list(islice(mix.draw(seed), steps * batch))
    model, adapter = peer.prepare(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch, learning_rate=rate, seed=seed,
            bf16=dtype == torch.bfloat16, train_sampling_strategy="sequential", save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=False,
        )  # fmt: skip
        data = Dataset.from_list([_common.columns(r) for r in rows])
        trainer = SFTTrainer(
            model=model, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=adapter
        )
        trainer.train()
    tuned: Any = trainer.model
    if peer.merges:
        tuned = tuned.merge_and_unload()
    if peer.merges or adapter is None:  # what PEFT trains stays in fp32, as it is used
        _common.set_weights(tuned, dtype)
    if getattr(tuned, "is_gradient_checkpointing", False):
        tuned.gradient_checkpointing_disable()
    return tuned.requires_grad_(False).eval()
