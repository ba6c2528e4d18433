"""What a run hands over, loaded the way its card says and compared with the model in memory.

The card's code and the check are made from one description, so that what people copy is what was tried.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.errors import TrainingError

ROOM = 1.2  # the second copy, and what two short rows take


@dataclass(frozen=True)
class Export:
    """A model folder and how to load it with plain transformers and peft, or with `holdfast.load`.

    Attributes:
        folder: the exported model or adapter.
        adapter: it is a PEFT adapter.
        dtype: name of the dtype to compute in, as 'bfloat16'.
        prompt: folder of a soft prompt that goes with it, or None.
        base: the merged base that this run wrote for the adapter, or None.
        packed: the weights of the base are kept in a few bits.
        four_bits: and are put into 4 bits while they are loaded.
        settings: what else from_pretrained is given.
        runs_on: the adapter's base by itself does not stop generating where the answers end.
        replaced: `holdfast.load`, where the model has replaced modules, which nothing else loads.
    """

    folder: Path
    adapter: bool
    dtype: str
    prompt: Path | None = None
    base: Path | None = None
    packed: bool = False
    four_bits: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    runs_on: bool = False
    replaced: Callable[..., tuple[Any, Any]] | None = None

    def code(self) -> str:
        """Python that loads it, for the card; `folder` is where the card lies."""
        given = {"dtype": self.dtype, **self.settings}
        words = "".join(f", {k}={v!r}" for k, v in given.items()).replace("'", '"')
        kind = "AutoPeftModelForCausalLM" if self.adapter else "AutoModelForCausalLM"
        peft = [kind] if self.adapter else []
        hf = ["AutoTokenizer"] if self.adapter else [kind, "AutoTokenizer"]
        more = []
        if self.replaced:
            kind, peft, hf = "", [], []
        if self.four_bits:
            hf.append("BitsAndBytesConfig")
            words += ", quantization_config=BitsAndBytesConfig(" + ", ".join(
                f"{k}={v!r}".replace("'", '"') for k, v in _four_bits(self.dtype).items()
            ) + ")"  # fmt: skip
        if self.prompt:
            peft.append("PeftModel")
            place = f"../{self.prompt.name}" if self.prompt.parent == self.folder.parent else self.prompt.name
            inside = "model.get_base_model()" if self.adapter else "model"
            more = [
                "# before the task's own prompts, and nowhere else, comes the trained soft prompt:",
                f'task_model = PeftModel.from_pretrained({inside}, "{place}")',
            ]
        lines = [f"from peft import {', '.join(peft)}"] if peft else []
        lines += [f"from transformers import {', '.join(sorted(hf))}"] if hf else ["import holdfast"]
        loading = [
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            f"model = {kind}.from_pretrained(folder{words})",
        ]
        lines += [
            "",
            'folder = "."  # this one',
            *([f"model, tokenizer = holdfast.load(folder{words})"] if self.replaced else loading),
            *(["model.generation_config.eos_token_id = tokenizer.eos_token_id  # answers end there"] * self.runs_on),
            *more,
        ]
        return "\n".join(lines)

    def load(self, device: Any) -> Any:
        """The same by hand: the model on `device`, without its soft prompt; nothing is asked of the network."""
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        if self.replaced:
            return self.replaced(str(self.folder), device=device, dtype=self.dtype, **self.settings)[0]
        given = {"dtype": self.dtype, **self.settings, "local_files_only": True}
        if self.packed:
            given["device_map"] = {"": device}  # packed weights lie where they work, and are not moved later
        if self.four_bits:
            given["quantization_config"] = BitsAndBytesConfig(**_four_bits(self.dtype))
        kind: Any = AutoPeftModelForCausalLM if self.adapter else AutoModelForCausalLM
        model = kind.from_pretrained(str(self.folder), **given).eval()
        return model if self.packed else model.to(device)

    def prompted(self, model: Any) -> Any:
        """What `load` gave, with the soft prompt before every text."""
        from peft import PeftModel

        inside = model.get_base_model() if self.adapter else model
        return PeftModel.from_pretrained(inside, str(self.prompt)).eval()


def _four_bits(dtype: str) -> dict[str, Any]:
    from holdfast.models.place import FOUR_BITS

    return {**FOUR_BITS, "bnb_4bit_compute_dtype": dtype}


def check(export: Export, tuned: Any, soft_prompt: Any = None) -> str:
    """Load an export plainly, compare its logits on two short rows with the model in memory, and let it go again.

    Returns one sentence for the report: how near it came, or why there was no room to try.

    Raises:
        TrainingError: it does not load the way its card says, or computes something else.
    """
    from holdfast.engine import twins

    place = _place(tuned, export.packed)
    if place is None:
        return "not checked: there is no room for a second copy of the model"
    trained = list(getattr(tuned, "peft_config", {}).values())
    rows = twins.short_rows(tuned, [i for c in trained for i in _ids(c)])
    pairs = [("model", twins.logits_of(tuned, rows))]
    if soft_prompt is not None:
        pairs.append(("soft prompt", twins.logits_of(tuned, rows, soft_prompt)))
    found = _found(export, place, rows, soft_prompt is not None)
    if found is None:
        return "not checked: the memory did not suffice for a second copy of the model"
    dtype, near = tuned.dtype, place == tuned.device
    limit = (twins.SAME if near else twins.ROUGH).get(dtype, 1e-3)
    apart = [twins.distance(mine, theirs) for (_, mine), theirs in zip(pairs, found, strict=True)]
    for (name, _), far in zip(pairs, apart, strict=True):
        if not far <= limit:
            raise TrainingError(
                f"The {name} exported to {export.folder}, loaded the way its card says, computes something else than "
                f"the model that was trained: logits lie {far:.2g} of their spread apart, and {limit:g} is allowed.",
                "The run is not finished and keeps its checkpoint. Please report this with `holdfast doctor`.",
            )
    where = "" if near else f" (on {place}, where numbers round in another way)"
    how = f"lie {max(apart):.1g} of their spread from" if max(apart) else "equal"
    return f"loaded the way its card says, its logits {how} the trained model's{where}"


def _ids(config: Any) -> list[int]:
    from holdfast.models.loadable import token_ids

    return token_ids(config)


def _found(export: Export, place: Any, rows: Any, prompted: bool) -> list[Any] | None:
    """Logits of the export loaded plainly, then of it with its soft prompt; None where the memory does not suffice."""
    import warnings

    import torch

    from holdfast.engine import twins
    from holdfast.files import no_bars

    loaded = None
    try:
        with no_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what loading warns of was said before; here the numbers count
            loaded = export.load(place)
            found = [twins.logits_of(loaded, rows)]
            return [*found, twins.logits_of(export.prompted(loaded), rows)] if prompted else found
    except torch.OutOfMemoryError:
        return None
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise TrainingError(
            f"The export in {export.folder} cannot be loaded the way its card says: {type(error).__name__}: {text}",
            "The run is not finished and keeps its checkpoint; the same command tries again.",
        ) from error
    finally:
        del loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _place(tuned: Any, packed: bool) -> Any:
    """Where a second copy of the model has room: beside it, else on the CPU, else nowhere (None)."""
    import torch

    need = ROOM * sum(p.numel() * p.element_size() for p in tuned.parameters())
    if free_memory() < need:  # files go through the CPU's memory in any case
        return None
    if tuned.device.type != "cuda":
        return tuned.device
    if torch.cuda.mem_get_info(tuned.device)[0] >= need:
        return tuned.device
    return None if packed else torch.device("cpu")


def free_memory() -> float:
    """Bytes of main memory that can be had; infinity where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(float(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return float("inf")
