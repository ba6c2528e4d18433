"""Losses are read when somebody wants them, and one that is not finite is found before anything is kept."""

import pytest
import torch

from holdfast import Plan
from holdfast.data.tokens import tokenize
from holdfast.engine import forward
from holdfast.engine.attention import ATTENTION
from holdfast.errors import TrainingError
from holdfast.hosts.losses import Losses, numbers
from holdfast.hosts.plain import Training, train
from holdfast.services import Context
from holdfast.session import Session

ONE = {"task": torch.tensor(1.5), "Anchor": torch.tensor(0.25, dtype=torch.float64)}


@pytest.fixture
def run(tiny_model, tokenizer, rows):
    """run(poison=step, watch=..., **settings): the log and weights of a short run of the plain host."""

    def go(poison=None, checkpointing=False, watch=None, **settings):
        model = tiny_model()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        session = Session(Plan([]), model, Context(model, tokenizer, 0, rows, total_steps=7))
        mix = session.mix([tokenize(r, tokenizer, 512) for r in rows])
        session.prepare()
        draw = session.pick

        def pick(drawn, step):
            if step == poison:
                next(iter(session.params.values())).data.fill_(float("nan"))
            return draw(drawn, step)

        session.pick = pick
        log = train(session, mix, Training(7, batch_size=3, **{"save_steps": 0, **settings}), on_step=watch)
        return log, {n: p.detach().clone() for n, p in session.params.items()}

    return go


def test_parts_of_micro_batches_add_up():
    assert numbers([ONE, {"task": torch.tensor(2.0)}]) == {"task": 3.5, "Anchor": 0.25}
    losses = Losses()
    losses.add(4, [ONE, ONE])
    losses.add(5, [ONE])
    assert list(losses.read()) == [(4, {"task": 3.0, "Anchor": 0.5}), (5, {"task": 1.5, "Anchor": 0.25})]
    assert list(losses.read()) == []


def test_those_before_a_bad_one_are_given():
    losses, seen = Losses(), []
    losses.add(0, [ONE])
    losses.add(1, [{"task": torch.tensor(float("inf"))}])
    with pytest.raises(TrainingError, match=r"inf at step 2 \(task inf\)"):
        for step, _ in losses.read():
            seen.append(step)
    assert seen == [0]
    losses.add(1, [{"task": torch.tensor(float("inf"))}])
    assert [step for step, _ in losses.read(finite=False)] == [1]


def test_when_losses_are_read_changes_nothing(run):
    seen = []
    log, weights = run()
    other, same = run(logging_steps=4, watch=lambda step, _of, parts: seen.append((step - 1, parts)))
    assert log.loss == other.loss == seen and len(seen) == 7
    assert all(torch.equal(weights[n], same[n]) for n in weights)


def test_a_bad_loss_is_named_before_a_checkpoint_holds_it(run, tmp_path):
    with pytest.raises(TrainingError, match="at step 4 "):
        run(poison=3, logging_steps=100, save_steps=2, folder=tmp_path)
    meta = (tmp_path / "checkpoint" / "state.json").read_text()
    assert '"step": 2' in meta  # of step 4 there is none
    with pytest.raises(TrainingError, match="at step 7 "):
        run(poison=6, logging_steps=100)


def test_rows_are_packed_under_gradient_checkpointing(run, monkeypatch):
    """The backward runs layers again, and finds the attention of the forward: the same bits as without."""
    taken, packed = [], forward.run_packed
    monkeypatch.setattr(forward, "run_packed", lambda *a: taken.append(1) or packed(*a))
    log, weights = run()
    plain = len(taken)
    other, same = run(checkpointing=True)
    assert plain == len(taken) - plain == 7
    assert log.loss == other.loss and all(torch.equal(weights[n], same[n]) for n in weights)


@pytest.mark.parametrize(("asked", "packs"), [(None, True), ("sdpa", True), ("eager", False)])
def test_the_attention_that_a_user_names_is_the_one_at_work(asked, packs, tiny_model, tokenizer, rows, monkeypatch):
    from holdfast.engine.ways import ask

    model, used = tiny_model(), []
    if asked:
        model.set_attn_implementation(asked)
        ask(model, asked)
    drawn = [tokenize(r, tokenizer, 512) for r in rows[:3]]
    kind = type(model.model.layers[0].self_attn)
    real = kind.forward
    monkeypatch.setattr(
        kind, "forward", lambda self, *a, **k: used.append(self.config._attn_implementation) or real(self, *a, **k)
    )
    assert forward.can_pack(model) is packs
    used.clear()
    forward.forward(model, drawn)
    assert set(used) == {ATTENTION if packs else asked}
