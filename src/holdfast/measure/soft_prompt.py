"""A soft prompt outside training: whether a model can read one at all, and its export as a PEFT adapter.

A prompt made of the embeddings of real tokens, or a prefix of their keys and values, must do what these tokens do. So
before any training three readers are compared with the model's plain forward on the tokens themselves: our own forward
(training), the scorer (the report), and PEFT (the export). A model that takes no `inputs_embeds`, or looks its tokens
up a second time in a layer, or has another kind of memory, differs or fails here and not after hours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from holdfast.engine.forward import forward
from holdfast.engine.pack import TokenRow, token_row
from holdfast.engine.prefix import is_prefix, prefix_of
from holdfast.engine.ways import SOFT_PROMPT, inner
from holdfast.errors import HoldfastError, ModelError, PlanError, out_of_memory

PROMPT, ROW = 2, 6  # tokens that stand for the prompt, and tokens behind it


BEFORE = "puts a soft prompt before the rows of the task"
PREFIXED = "puts a prefix before the rows of the task"


def check_reading(model: Any, tokenizer: Any, owner: str, prefix: bool = False, does: str = BEFORE) -> None:
    """Raise PlanError unless the model reads embeddings in the place of tokens (or a prefix) in training.

    owner: the method that wants it; does: what it does with it, in words.
    """
    ids, row = _probe(model, tokenizer)
    readers = {"training": lambda soft: _trained(model, row, soft)}
    _compare(model, ids, readers, owner, prefix, PREFIXED if prefix else does)


def check_export(model: Any, tokenizer: Any, owner: str, prefix: bool = False) -> None:
    """Raise PlanError unless scorer and PEFT read a soft prompt (or a prefix) as training does."""
    ids, row = _probe(model, tokenizer)
    readers = {"scoring": lambda soft: _scored(model, row, soft), "PEFT": lambda soft: _with_peft(model, row, soft)}
    _compare(model, ids, readers, owner, prefix, PREFIXED if prefix else BEFORE)


def save(model: Any, soft_prompt: torch.Tensor, folder: Path, base: Path) -> None:
    """Write a soft prompt (p, D) as a PEFT prompt-tuning adapter on `base`, a prefix as one of prefix tuning, with a
    page that says how to use it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = _adapter_config(model, soft_prompt)
    config.base_model_name_or_path = str(base)
    config.save_pretrained(str(folder))
    tensors = {"prompt_embeddings": soft_prompt.flatten(1).float().cpu().contiguous()}
    save_file(tensors, folder / "adapter_model.safetensors")
    page = USAGE.format(what="Prefix" if is_prefix(soft_prompt) else "Soft prompt")
    (folder / "README.md").write_text(page, encoding="utf-8")


USAGE = """# {what} of the tuned task

    base = AutoModelForCausalLM.from_pretrained(...)    # the tuned model, loaded as the card in `model` says
    model = PeftModel.from_pretrained(base, ...)        # this folder
    model.generate(**inputs, use_cache=False)

Give `use_cache=False`: with a cache, PEFT 0.21 on transformers 5.24 puts it before every new token again, and
the text is another one. Other tasks are asked without this adapter.
"""


def _adapter_config(model: Any, soft: torch.Tensor) -> Any:
    """PEFT wants heads and layers for every kind of prompt, but reads them for prefixes only: a state-space model has
    none to tell, and a multimodal one tells them in its text part."""
    from peft import PrefixTuningConfig, PromptTuningConfig

    if is_prefix(soft):
        length, layers, heads, width = soft.shape
        return PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=length,
            token_dim=heads * width,
            num_transformer_submodules=1,
            num_attention_heads=heads,
            num_layers=layers // 2,
            inference_mode=True,
        )
    text = inner(model).config.get_text_config()
    heads, layers = (getattr(text, name, None) for name in ("num_attention_heads", "num_hidden_layers"))
    return PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=len(soft),
        token_dim=soft.shape[1],
        num_transformer_submodules=1,
        num_attention_heads=heads if isinstance(heads, int) and heads > 0 else 1,
        num_layers=layers if isinstance(layers, int) and layers > 0 else 1,
        inference_mode=True,
    )


# ---- the check


def _probe(model: Any, tokenizer: Any) -> tuple[list[int], TokenRow]:
    """Ordinary tokens: all of them, and as a row those behind the prompt."""
    size = inner(model).get_input_embeddings().weight.shape[0]
    special = set(getattr(tokenizer, "all_special_ids", ()) or ())
    special |= {v for k, v in vars(inner(model).config).items() if k.endswith(("token_id", "token_index"))
                and isinstance(v, int)}  # fmt: skip
    step = max(1, size // (2 * (PROMPT + ROW)))
    usable = [i for i in range(size // 4, size, step) if i not in special] or [0]
    ids = [usable[n % len(usable)] for n in range(PROMPT + ROW)]
    return ids, token_row(ids[PROMPT:], 1)


Reader = Callable[[torch.Tensor], torch.Tensor]  # prompt or prefix -> log-probabilities of the tokens of the row (N,)


def _compare(model: Any, ids: Sequence[int], readers: dict[str, Reader], owner: str, prefix: bool, does: str) -> None:
    core = inner(model)
    with _still(core), torch.no_grad():
        device = next(core.parameters()).device
        (want, largest), (bare, _) = (_plain(core, part, device) for part in (ids, ids[PROMPT:]))
        soft = _made_of(core, ids[:PROMPT], owner, prefix)
        effect = float((want - bare).abs().max())
        # fp32 agrees to a few bits; half precision rounds every path otherwise, and a lost prompt is off by all of it
        eps = torch.finfo(core.get_input_embeddings().weight.dtype).eps
        room = min(0.3, 10 * eps**0.5) * effect + 8 * eps * max(1.0, largest)
        for who, read in readers.items():
            wrong = _words(lambda read=read: read(soft), want, room)
            if wrong:
                raise PlanError(
                    f"{owner} {does}, which {type(core).__name__} does not read ({who}: {wrong}).",
                    f"Take {owner} out of the plan, or tune another model.",
                )


def _made_of(core: Any, ids: Sequence[int], owner: str, prefix: bool) -> torch.Tensor:
    """What stands for some tokens: their embeddings (p, D), or the prefix of their keys and values."""
    if not prefix:
        return core.get_input_embeddings()(torch.as_tensor(ids, device=next(core.parameters()).device))
    try:
        return prefix_of(core, ids)
    except ModelError as e:
        raise PlanError(f"{owner} cannot be used here: {e.what}", e.cure) from e


def _words(read: Callable[[], torch.Tensor], want: torch.Tensor, room: float) -> str:
    """What is wrong with a reading, or ''."""
    try:
        found = read().to(want.device)
    except Exception as e:  # whatever a model's code does with arguments it does not know
        if isinstance(e, HoldfastError) or out_of_memory(e):
            raise
        return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    if found.shape != want.shape or not torch.isfinite(found).all():
        return "no usable logits"
    off = float((found - want).abs().max())
    return f"log-probabilities are {off:.2g} off those of the same tokens read as text" if off > room else ""


def _plain(core: Any, ids: Sequence[int], device: Any) -> tuple[torch.Tensor, float]:
    """Log-probabilities of the last ROW - 1 tokens as the model reads them without us, and its largest logit there."""
    logits = core(input_ids=torch.as_tensor(ids, device=device)[None], use_cache=False).logits[0, -ROW:-1]
    return _chosen(logits, ids[-ROW + 1 :]), float(logits.abs().max())


def _chosen(logits: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """Log-probability of each of `ids` in its row of logits (N, V)."""
    target = torch.as_tensor(ids, device=logits.device)
    return logits.float().log_softmax(-1)[torch.arange(len(target), device=logits.device), target]


def _trained(model: Any, row: TokenRow, soft: torch.Tensor) -> torch.Tensor:
    core = inner(model)
    core.register_parameter(SOFT_PROMPT, torch.nn.Parameter(soft, requires_grad=False))
    try:
        packed, logits = forward(model, [row])
    finally:
        delattr(core, SOFT_PROMPT)
    return _chosen(logits, packed.target.tolist())


def _scored(model: Any, row: TokenRow, soft: torch.Tensor) -> torch.Tensor:
    from holdfast.measure.scorer import Scorer

    ids = row.ids.tolist()
    cuts = [(ids[: n + 1], n) for n in range(1, len(ids))]
    return torch.tensor([s.logprob for s in Scorer(model, None, soft_prompt=soft).score_tokens(cuts)])


def _with_peft(model: Any, row: TokenRow, soft: torch.Tensor) -> torch.Tensor:
    from peft import PeftModelForCausalLM

    ids = torch.as_tensor(row.ids, device=soft.device)[None]
    prompted = PeftModelForCausalLM(inner(model), _adapter_config(model, soft))
    prompted.prompt_encoder["default"].embedding.weight.data.copy_(soft.flatten(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls a cache by the name that transformers gives up
        logits = prompted.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    return _chosen(logits[len(logits) - len(row.ids) : -1], row.ids[1:].tolist())


@contextmanager
def _still(core: Any) -> Iterator[None]:
    """Eval mode inside; modes and what trains are as before afterwards (PEFT freezes its base and sets one switch)."""
    modes, grads = [(m, m.training) for m in core.modules()], [(p, p.requires_grad) for p in core.parameters()]
    switch = getattr(core.config, "pretraining_tp", None)
    core.eval()
    try:
        yield
    finally:
        if switch is not None:
            core.config.pretraining_tp = switch
        for p, wanted in grads:
            p.requires_grad_(wanted)
        for module, training in modes:
            module.training = training
