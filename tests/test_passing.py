"""A base whose blocks pass through the device one at a time answers as the whole one, and never is there whole."""

import copy

import pytest
import torch

import holdfast.methods as hf
from holdfast.engine.forward import forward
from holdfast.engine.pack import token_row
from holdfast.engine.passing import HOST, pass_blocks, passes, stay
from holdfast.engine.ways import blocks
from holdfast.plan import Plan
from holdfast.services import Context
from holdfast.session import Session

CPU = torch.device("cpu")
ROWS = [token_row([5, 6, 7, 8, 9], 2), token_row([11, 12, 13], 1)]


@pytest.fixture
def model(tiny_model):
    return tiny_model()


def away(model):
    """The blocks that hold a copy of their weights on the device."""
    return [n for n, block in enumerate(blocks(model)) if HOST in vars(block)]


@torch.no_grad()
def test_it_answers_to_the_last_bit_and_one_block_is_there_at_a_time(model):
    _, expected = forward(model, ROWS)
    places = {n: p.data_ptr() for n, p in model.named_parameters()}
    pass_blocks(model, CPU)
    seen = []
    for block in blocks(model):
        block.self_attn.register_forward_hook(
            lambda module, *_: seen.append((away(model), module.q_proj.weight.data_ptr()))
        )
    _, got = forward(model, ROWS)
    assert torch.equal(got, expected)
    assert [there for there, _ in seen] == [[0], [1]]
    assert not {at for _, at in seen} & {*places.values()}  # a copy computed, as on a GPU
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == places and not away(model)


def test_what_lies_beside_the_blocks_goes_to_the_device(tiny_model, monkeypatch):
    model, plain = tiny_model(tied=False), torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: plain(self, *a, **{**k, "copy": True}))
    named = lambda: (*model.named_parameters(), *model.named_buffers())  # noqa: E731
    places = {n: t.data for n, t in named()}  # held, so that no copy lies where one of them did

    def gone():
        return {n for n, t in named() if t.data_ptr() != places[n].data_ptr()}

    beside = {n for n in places if ".layers." not in n}
    pass_blocks(model, CPU)
    assert gone() == beside and {"lm_head.weight", "model.rotary_emb.inv_freq"} <= beside and passes(model)
    stay(model, whole=True)
    assert gone() == {*places} and not passes(model)


def test_afterwards_nothing_is_left_of_it(model):
    stay(model)  # nothing passed
    pass_blocks(model, CPU)
    with pytest.raises(AttributeError):
        model.model.layers[0](None)  # a forward that fails
    assert not away(model)
    stay(model)
    assert not any(b._forward_pre_hooks or b._forward_hooks for b in blocks(model)) and not passes(model)


def test_a_copy_may_stay_while_the_model_passes(model):
    """As that in fp32 on the host, which a small model is tried with."""
    pass_blocks(model, CPU)
    other = copy.deepcopy(model)
    stay(other)
    assert passes(model) and all(b._forward_pre_hooks and b._forward_hooks for b in blocks(model))
    assert not passes(other) and not any(b._forward_pre_hooks or b._forward_hooks for b in blocks(other))


def prepared(model, tokenizer, *methods):
    """A session of a run whose weights will be cut, prepared while blocks pass."""
    pass_blocks(model, CPU)
    session = Session(Plan(methods), model, Context(model, tokenizer, total_steps=4), sharded=True)
    session.prepare()
    return session


def test_the_default_plan_needs_no_whole_base(model, tokenizer, tiny_model):
    session = prepared(model, tokenizer, hf.LoRA(r=2), hf.ICLAnchor(pool=4, every=1))
    assert passes(model) and session.teacher._copy is None
    other = Session(Plan(session.methods), tiny_model(), Context(tiny_model(), tokenizer, total_steps=4), sharded=True)
    other.prepare()
    rows = session.rows_of(0)
    assert torch.equal(session.teacher.logp(session.model, rows), other.teacher.logp(other.model, rows))


@pytest.mark.parametrize(
    "method", [hf.OrthogonalSubspace(), hf.KLToBase()], ids=["looks at weights", "asks about new rows"]
)
def test_what_needs_the_whole_base_gets_it(method, model, tokenizer):
    session = prepared(model, tokenizer, method)
    assert not passes(model) and session.methods == (method,)


def test_base_weights_are_copied_when_they_are_cut(model, tokenizer):
    session = prepared(model, tokenizer, hf.L2ToInit(alpha=1.0))
    assert passes(model) and {w.device.type for w in session.base_weights.values()} == {"meta"}
    session.enter(session.stages[0])
    session.see_shards()  # here nothing was cut
    with torch.no_grad():
        for name, p in session.params.items():
            before = session.base_weights[name]
            assert torch.equal(before, p) and before.data_ptr() != p.data_ptr()
