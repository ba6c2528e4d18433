"""LocFT: one matrix moves, small losses move nothing, and an epoch of small losses ends the run."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
import torch

from cases import run, start, weights_of
from holdfast.errors import PlanError
from holdfast.hosts.plain import Training, train
from holdfast.method import Past
from holdfast.methods import KLToBase, LocFT
from holdfast.plan import Plan
from holdfast.services import Context
from holdfast.sites.steering import Steering


def test_an_epoch_by_hand():
    """Epochs of two steps, threshold 1. Losses 0.5, 3: the first step is not taken, mean 1.75 goes on; 0.9, 1.05: mean
    0.975 ends, though its last step is taken."""
    method = LocFT(threshold=1.0)
    steering = Steering([method], {"LocFT": {}})
    said = []
    for step, loss in enumerate((0.5, 3.0, 0.9, 1.05)):
        steering.ask(Past(step, 10, {"task": loss}, 1e-3, epochs=(step + 1) // 2))
        said.append((steering.frozen, steering.ended))
    assert [bool(f) for f, _ in said] == [True, False, True, False]
    assert [e for _, e in said] == ["", "", "", "LocFT: the mean loss of an epoch was 0.975"]


def test_what_is_not_taken_leaves_every_bit(tiny_model, tokenizer, rows):
    """24 rows in steps of 4: an epoch is 6 steps. Weight decay does not act in a step that is not taken."""
    got = run([LocFT(threshold=1e9)], tiny_model(), tokenizer, rows, 20, weight_decay=0.1)
    base = weights_of(tiny_model())
    assert all(torch.equal(w, base[n]) for n, w in got.weights.items())
    assert len(got.log.loss) == 6 and "mean loss of an epoch" in got.log.ended


@dataclass
class Batches:
    """Some batches of four of a mix, in place of the mix."""

    mix: Any
    numbers: tuple[int, ...]

    def only(self, *_: Any) -> Any:
        return self

    def num_rows(self, epochs: float) -> int:
        return self.mix.num_rows(epochs)

    def draw(self, seed: int) -> Any:
        drawn = list(islice(self.mix.draw(seed), 4 * (max(self.numbers) + 1)))
        return iter([row for n in self.numbers for row in drawn[4 * n : 4 * n + 4]])


def trained(methods, batches, model, tokenizer, rows, watch=None):
    """The weights after steps on these batches, at one learning rate."""
    settings = Training(len(batches), batch_size=4, learning_rate=1e-3, save_steps=0, lr_scheduler_type="constant")
    session, mix = start(Plan(methods), model, tokenizer, rows, settings)
    train(session, Batches(mix, batches), settings, on_step=watch and (lambda n, *_: watch(session, n)))
    return weights_of(session.model)


def test_moments_stay_where_a_step_is_not_taken(tiny_model, tokenizer, rows):
    """Steps 2 and 3 are below the threshold: what follows is the run without them, to the last bit, at the same
    learning rate. Adam's moments, and the step that corrects them, would else be those of four steps."""
    losses, at = iter([5.0, 0.1, 0.1, 5.0, 5.0]), {}
    real = LocFT.steer

    def steer(self, past, state):
        return real(self, Past(past.step, past.total, {"task": next(losses)}, past.learning_rate), state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocFT, "steer", steer)
        watch = lambda session, n: at.update({n: weights_of(session.model)})  # noqa: E731
        got = trained([LocFT(threshold=1.0)], (0, 1, 2, 3, 4), tiny_model(), tokenizer, rows, watch)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(at[1][name], at[2][name]) and torch.equal(at[2][name], at[3][name])
    without = trained([LocFT(threshold=0.0)], (0, 3, 4), tiny_model(), tokenizer, rows)
    assert not torch.equal(at[3][name], at[4][name]) and torch.equal(got[name], without[name])


@pytest.mark.parametrize(
    ("settings", "layers", "wanted"),
    [
        ({}, 2, "model.layers.1.mlp.down_proj.weight"),  # 2 * 22 / 32 = 1.4
        ({}, 3, "model.layers.2.mlp.down_proj.weight"),
        ({"layer": 0, "matrix": "mlp.up_proj"}, 2, "model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_which_matrix(settings, layers, wanted, tiny_model):
    assert LocFT(**settings).chosen(tiny_model(layers=layers)) == wanted


def test_beside_a_distance_to_the_base(tiny_model, tokenizer, rows):
    got = run([LocFT(), KLToBase()], tiny_model(), tokenizer, rows, 3)
    base = weights_of(tiny_model())
    assert [n for n, w in got.weights.items() if not torch.equal(w, base[n])] == [
        "model.layers.1.mlp.down_proj.weight"
    ]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"threshold": -1.0}, "threshold"),
        ({"layer": 2}, "Layers are 0 to 1"),
        ({"matrix": "proj"}, "names 0 in layer 1"),
        ({"matrix": "down"}, "mlp.down_proj"),
    ],
)
def test_values_that_make_no_sense(wrong, words, tiny_model, tokenizer):
    with pytest.raises(PlanError) as caught:
        LocFT(**wrong).check(Context(tiny_model(), tokenizer))
    assert words in str(caught.value)
