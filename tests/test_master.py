"""Weights kept in bf16 with an fp32 master train to the same numbers as weights kept in fp32, bit for bit."""

import pytest
import torch

from holdfast import Plan
from holdfast import methods as M
from holdfast.data.tokens import tokenize
from holdfast.hosts import plain
from holdfast.hosts.master import MasterAdamW, linear_weights, may_hold
from holdfast.hosts.plain import Training, train
from holdfast.services import Context
from holdfast.session import Session

BF16 = torch.bfloat16
ON = {"autocast": BF16, "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, "save_steps": 0}


@pytest.fixture
def run(tiny_model, tokenizer, rows, monkeypatch):
    """run(steps, master, methods=(), ...) trains a fresh model; returns (weights, losses)."""

    def go(steps, master, methods=(), tied=True, **changes):
        settings = Training(steps, **{"batch_size": 3, **ON, **changes})
        model = tiny_model(tied=tied)
        session = Session(
            Plan(list(methods)), model, Context(model, tokenizer, 0, rows, total_steps=steps), compute_dtype=BF16
        )
        mix = session.mix([tokenize(r, tokenizer, 512) for r in rows])
        session.prepare()
        if not master:
            monkeypatch.setattr(plain, "may_hold", lambda *_: False)
        log = train(session, mix, settings)
        monkeypatch.undo()
        assert all(p.dtype == torch.float32 for p in session.params.values())  # the masters are back
        session.merge()
        return {n: p.detach().clone() for n, p in session.params.items()}, [parts for _, parts in log.loss]

    return go


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[n], b[n]) for n in a)


PLANS = {"none": (), "anchor": (M.ICLAnchor(pool=4, every=2),), "half": (M.HalfFineTune(),), "merge": (M.WiSEFT(),)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", PLANS)
def test_every_bit_is_the_same(name, tied, run):
    weights, losses = run(8, True, PLANS[name], tied)
    expected, curve = run(8, False, PLANS[name], tied)
    assert losses == curve
    assert same(weights, expected)


@pytest.mark.long
def test_it_stays_so_for_five_hundred_steps(run):
    weights, losses = run(500, True)
    expected, curve = run(500, False)
    assert losses == curve and losses[-1]["task"] < losses[0]["task"] / 2
    assert same(weights, expected)


def test_only_what_linear_layers_alone_read_becomes_bf16(tiny_model):
    for tied in (True, False):
        model = tiny_model(tied=tied)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = MasterAdamW(
            [{"params": list(model.parameters())}], linear_weights(model), lr=1e-3, betas=(0.9, 0.999), eps=1e-8
        )
        halves = {n for n, p in model.named_parameters() if p.dtype == BF16}
        assert {n for n in before if "proj" in n} <= halves
        assert not any("norm" in n or "embed" in n for n in halves)
        assert ("lm_head.weight" in halves) is not tied
        optimizer.release()
        assert same(before, {n: p.detach() for n, p in model.named_parameters()})


@pytest.mark.parametrize("resumed", [True, False])
def test_a_checkpoint_holds_the_masters(resumed, run, tmp_path, monkeypatch):
    """A stopped run goes on to the same bits, be it with masters or without."""
    expected, curve = run(8, True)

    class Stop(Exception):
        pass

    def stop(step, total, parts):
        if step == 6:
            raise Stop

    real = plain.train
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "train", lambda *a, **k: real(*a, **k, on_step=stop))
        with pytest.raises(Stop):
            run(8, True, folder=tmp_path, save_steps=4)
    weights, losses = run(8, resumed, folder=tmp_path, save_steps=4)
    assert same(weights, expected) and losses == curve


REFUSED = {
    "accumulation": ((), {"gradient_accumulation_steps": 2}),
    "fp32": ((), {"autocast": None}),
    "a penalty on the weights": ((M.L2ToInit(),), {}),
    "changed updates": ((M.OrthogonalSubspace(),), {}),
    "an adapter": ((M.LoRA(r=2),), {}),
    "a stage that goes back": ((M.ProMoT(),), {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_it_would_not_be_the_same_weights_stay_fp32(name, tiny_model, tokenizer, rows):
    methods, changes = REFUSED[name]
    model = tiny_model()
    session = Session(Plan(list(methods)), model, Context(model, tokenizer, 0, rows), compute_dtype=BF16)
    assert not may_hold(session, Training(4, **{**ON, **changes}), session.stages[0])
    assert may_hold(Session(Plan([]), model, session.ctx), Training(4, **ON), session.stages[0]) or methods
