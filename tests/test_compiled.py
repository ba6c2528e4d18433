"""Compiled blocks give the same training up to rounding, in steps alone, and are compiled in the first ones alone."""

import pytest
import torch

from holdfast import methods as M
from holdfast.data.tokens import tokenize
from holdfast.engine import attention
from holdfast.engine.ways import blocks
from holdfast.errors import PlanError
from holdfast.hosts import compiled
from holdfast.hosts.compiled import Compiled, check_compiled
from holdfast.hosts.plain import Training, train
from holdfast.plan import Plan
from holdfast.services import Context
from holdfast.session import Session


@pytest.fixture(autouse=True)
def own_attention():
    """The plain function again, for other tests."""
    yield
    attention.register(attention.ATTENTION, attention.packed_attention)


def test_blocks_are_compiled_while_it_is_on(tiny_model, monkeypatch):
    ran = []
    monkeypatch.setattr(torch, "compile", lambda call, **how: lambda *a, **k: ran.append(how) or call(*a, **k))
    model = tiny_model()
    ids = torch.tensor([[5, 6, 7]])
    one = Compiled(model)
    plain = model(ids).logits
    with pytest.raises(ValueError), one.on():
        assert torch.equal(model(ids).logits, plain) and len(ran) == len(blocks(model))
        raise ValueError
    model(ids)
    assert len(ran) == len(blocks(model)) and ran[0]["dynamic"] is True


@pytest.mark.parametrize(
    "method",
    [M.ControlLLM(), M.FeatureDistillation(layers=(0,))],
    ids=["replaces modules", "reads states between blocks"],
)
def test_what_looks_into_blocks_is_refused(method, request):
    name, words = type(method).__name__, request.node.callspec.id
    with pytest.raises(PlanError, match=f"torch_compile is true, but {name} {words}"):
        check_compiled(True, Plan([method]))
    check_compiled(False, Plan([method]))
    check_compiled(True, Plan([M.LoRA(), M.ICLAnchor()]))


@pytest.mark.long  # dynamo takes some 20 s
def test_training_is_the_same(tiny_model, tokenizer, rows, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setattr(compiled, "BACKEND", "eager")  # the same graphs, run as they are
    graphs = []

    def run(on):
        model = tiny_model()
        ctx = Context(model, tokenizer, 0, rows, total_steps=6)
        session = Session(Plan([M.LoRA(r=2), M.ICLAnchor(pool=4, every=2)]), model, ctx, compute_dtype=torch.bfloat16)
        mix = session.mix([tokenize(r, tokenizer, 512) for r in rows])
        session.prepare()
        settings = Training(6, 3, learning_rate=1e-2, autocast=torch.bfloat16, save_steps=0, torch_compile=on)
        log = train(session, mix, settings, on_step=lambda *_: graphs.append(counters["stats"]["unique_graphs"]))
        return torch.tensor([parts["task"] for _, parts in log.loss])

    torch._dynamo.reset()
    counters.clear()
    torch.testing.assert_close(run(True), run(False), atol=5e-3, rtol=0)
    assert 0 < graphs[1] == graphs[5]  # steps with and without anchors, rows of all lengths
