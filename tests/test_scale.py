"""The arithmetic of docs/scale.md against real tensors: counts exactly, activations to a few parts in a hundred."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from transformers import AutoModelForCausalLM, LlamaConfig

import holdfast.methods as hf
from holdfast.engine.pack import token_row
from holdfast.engine.ways import LAST
from holdfast.plan import Plan
from holdfast.services import Context
from holdfast.session import Session

ROOT = Path(__file__).parent.parent
SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 400, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 192, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def scale():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import scale

        yield scale
        sys.modules.pop("scale")


def llama(settings, device="cpu"):
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=torch.bfloat16)


def started(methods, rows, tokenizer):
    """A session whose weights are set up for the first step."""
    model = llama(SHAPE).train()
    plan = Plan(methods)
    session = Session(plan, model, Context(model, tokenizer), compute_dtype=torch.bfloat16, knows_rows=True)
    session.prepare(rows)
    session.enter(session.stages[-1])
    return session


def in_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.fixture
def row():
    return token_row([n % 390 + 5 for n in range(512)], 1)  # long enough for attention in bf16 on a CPU too


def test_parameters_are_those_of_the_models(scale):
    untied = {**SHAPE, "tie_word_embeddings": False}
    large = {
        "hidden_size": 8192, "num_hidden_layers": 80, "vocab_size": 128256, "num_attention_heads": 64,
        "num_key_value_heads": 8, "intermediate_size": 28672, "tie_word_embeddings": False,
    }  # fmt: skip
    for settings in (SHAPE, untied, large):
        count = sum(p.numel() for p in llama(settings, "meta").parameters())
        assert scale.shape_of(settings).parameters == count
    assert scale.shape_of(large) == scale.LLAMA_70B


@pytest.mark.parametrize("half", [False, True])
def test_what_trains_and_what_is_frozen(scale, tokenizer, row, half):
    setup = scale.Setup(lora=False, methods=("HalfFineTune",)) if half else scale.Setup()
    session = started([hf.HalfFineTune() if half else hf.LoRA()], [row], tokenizer)
    shape = scale.shape_of(SHAPE)
    train = in_bytes(session.params.values())
    frozen = in_bytes(p for p in session.model.parameters() if not p.requires_grad)
    if half:  # only the last norm is drawn by chance
        assert scale.WHOLE * scale.trained(shape, setup) == pytest.approx(train, abs=scale.WHOLE * shape.width)
        assert scale.frozen_bytes(shape, setup) == pytest.approx(frozen, abs=scale.HALF * shape.width)
    else:
        assert 4 * scale.trained(shape, setup) == train
        assert scale.frozen_bytes(shape, setup) == frozen


def test_copies_bases_and_prompts(scale, tokenizer, row):
    shape = scale.shape_of(SHAPE)
    held = scale.held
    session = started([hf.WiSEFT()], [row], tokenizer)
    full = scale.Setup(lora=False, methods=("WiSEFT",))
    assert held(shape, full, scale.Step(0, 0))["copy of the base"] == in_bytes(session.base_weights.values())
    session = started([hf.OrthogonalSubspace()], [row], tokenizer)
    assert scale.bases_bytes(shape, 0.5) == in_bytes(session.state["OrthogonalSubspace"].values())
    session = started([hf.KLToBase()], [row], tokenizer)
    setup, step = scale.Setup(lora=False, methods=("KLToBase",)), scale.Step(512, 511, stored=511)
    assert held(shape, setup, step)["teacher: hidden states"] == in_bytes(session.teacher._hidden[LAST])
    session = started([hf.LoRA(), hf.ProMoT()], [row], tokenizer)
    assert scale.soft_prompt_bytes(shape, scale.Setup()) == 5 * in_bytes(session.state["ProMoT"].values())


@pytest.mark.parametrize("kind", ["lora", "full", "checkpointing"])
def test_activations_are_what_autograd_keeps(scale, tokenizer, row, kind):
    session = started([hf.LoRA()] if kind == "lora" else [], [row], tokenizer)
    if kind == "checkpointing":
        session.model.gradient_checkpointing_enable({"use_reentrant": False})
    own = {p.untyped_storage().data_ptr() for p in (*session.model.parameters(), *session.model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with (
        disable_input_dtype_casting(session.model),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        session.loss(session.model, [row], Counter(task=511), 0)
    shape, step = scale.shape_of(SHAPE), scale.Step(512, 511)
    setup = scale.Setup(lora=kind == "lora", checkpointing=kind == "checkpointing")
    expected = scale.activations(shape, setup, step) + 4 * shape.vocab * 511
    if kind == "checkpointing":  # nothing is redone yet, and the copies of the blocks' matrices are not kept
        expected += scale.HALF * shape.embedding - 512 * scale.block_activations(shape, setup)
    else:
        expected += scale.autocast_bytes(shape, setup)
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) == pytest.approx(expected, rel=0.03)


def test_four_bits(scale):
    smollm = scale.Shape(576, 30, 49152, 9, 3, 1536, 64)
    size = scale.frozen_bytes(smollm, scale.Setup(four_bit=True))
    scales = smollm.layers * smollm.block * (1 / 64 + 4 / (64 * 256))
    assert size - scales == 109_777_536  # what bitsandbytes 0.50.2 keeps of SmolLM2-135M, its scales apart


def test_fsdp_cuts_what_can_be_cut(scale):
    setup, step = scale.Setup(methods=("ICLAnchor",)), scale.Step(100, 10, 5, 5, stored=1000)
    one, eight = (scale.card(scale.LLAMA_1B, setup, step, n) for n in (1, 8))
    assert eight["frozen weights"] == one["frozen weights"] / 8
    for name in ("activations", "logits", "teacher: hidden states"):
        assert eight[name] == one[name]
    assert eight["gathered"] == scale.gathered(scale.LLAMA_1B)


def test_the_page_shows_what_was_measured(scale, tmp_path):
    found = json.loads(scale.RESULTS.read_text(encoding="utf-8"))
    assert {key.split(" | ")[0] for key in found["cases"]} == set(scale.CASES)
    for key, one in found["cases"].items():
        assert 0.8 < one["measured"] / one["predicted"] < 1.25, key
    page = tmp_path / "scale.md"
    page.write_text(scale.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    scale.write_page(page, found)
    assert page.read_text(encoding="utf-8") == scale.PAGE.read_text(encoding="utf-8"), (
        "python benchmarks/scale.py --table"
    )
