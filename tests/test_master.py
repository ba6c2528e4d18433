"""Weights kept in bf16 with an fp32 master train to the same numbers as weights kept in fp32, bit for bit."""

import pytest
import torch

from holdfast import Plan
from holdfast import methods as M
from holdfast.data.tokens import tokenize
from holdfast.engine import head
from holdfast.hosts import master, plain
from holdfast.hosts.master import MasterAdamW, linear_weights, may_hold
from holdfast.hosts.plain import Training, train
from holdfast.services import Context
from holdfast.session import Session

BF16 = torch.bfloat16
ON = {"autocast": BF16, "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, "save_steps": 0}


@pytest.fixture
def run(tiny_model, tokenizer, rows, monkeypatch):
    """run(steps, master, methods=(), ...) trains a fresh model; returns (weights, losses)."""

    def go(steps, holds, methods=(), tied=True, **changes):
        settings = Training(steps, **{"batch_size": 3, **ON, **changes})
        model = tiny_model(tied=tied)
        session = Session(
            Plan(list(methods)), model, Context(model, tokenizer, 0, rows, total_steps=steps), compute_dtype=BF16
        )
        mix = session.mix([tokenize(r, tokenizer, 512) for r in rows])
        session.prepare()
        if not holds:
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


def test_it_is_so_where_logits_come_in_pieces(run, monkeypatch):
    """The head is read once a piece: its gradients add up in bf16, as under autocast, which casts it once."""
    seen, real = [], head.pieces

    def pieces(*given):
        seen.append(real(*given))
        return seen[-1]

    found = []
    for holds in (True, False):
        monkeypatch.setattr(head, "PIECE", 400)  # one position at a time
        monkeypatch.setattr(head, "pieces", pieces)
        found.append(run(4, holds, tied=False))  # forgets what is set here
    assert len(seen) == 8 and all(len(own) > 3 for own in seen)
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1]


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


def test_elsewhere_everything_lies_on_the_device_of_the_weights(tiny_model, monkeypatch):
    """As on CUDA, where nothing was run: a device without numbers shows what would be made on the host."""
    model = tiny_model().to("meta")
    monkeypatch.setitem(master.CHUNK, "meta", 1 << 26)
    made = []
    monkeypatch.setattr(master, "adamw", lambda *lists, **_: made.append(lists))
    optimizer = MasterAdamW([{"params": list(model.parameters())}], linear_weights(model), lr=1e-3, betas=(0.9, 0.999),
                            eps=1e-8)  # fmt: skip
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    assert optimizer.clip(model.parameters(), 1.0).device.type == "meta"
    optimizer.step()
    (lists,) = made  # all weights in one chunk
    assert {t.device.type for some in lists for t in some} == {"meta"} and optimizer._buffer.device.type == "meta"
    assert {t.dtype for some in lists for t in some} == {torch.float32}


@pytest.mark.parametrize("methods", [[M.LoRA(r=2)], []], ids=["adapter", "all weights"])
def test_what_is_kept_in_fp32_stays_there(tiny_model, tokenizer, rows, methods):
    """As transformers keeps routers in a model of bf16: rounding them would change every choice they make."""
    model = tiny_model().to(BF16)
    exact = model.model.layers[0].mlp.down_proj
    exact.weight = torch.nn.Parameter(exact.weight.float() + 1e-4)
    before = exact.weight.detach().clone()
    session = Session(Plan(methods), model, Context(model, tokenizer, 0, rows), compute_dtype=BF16)
    session.prepare([])
    session.enter(session.stage)
    assert torch.equal(_weight(session.model), before)
    done = session.finished_model(BF16)[0]
    assert torch.equal(_weight(done), before) and _weight(done).dtype == torch.float32
    assert next(p for n, p in done.named_parameters() if "q_proj" in n and "lora" not in n).dtype == BF16


def _weight(model):
    return next(p for n, p in model.named_parameters() if "layers.0.mlp.down_proj" in n and "lora" not in n).detach()
