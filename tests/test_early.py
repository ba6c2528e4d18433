"""Early signs of a run: the norms and losses of its first steps by hand, after a kill, and where they stand."""

import json
from itertools import islice

import pytest
import torch

from cases import start
from holdfast import Plan
from holdfast.hosts.early import STEPS, Early, advice
from holdfast.hosts.plain import Log, Training, train
from holdfast.verbs.tune import tune
from tiny_run import recipe_data, write_recipe


class Killed(Exception):
    pass


def run(model, tokenizer, rows, steps=3, stop=None, **settings):
    """The log of a run without methods, and its first batches of four."""
    chosen = Training(steps, **{"batch_size": 4, "save_steps": 0, "learning_rate": 0.0, **settings})
    session, mix = start(Plan([]), model, tokenizer, rows, chosen)

    def on_step(step, *_):
        if step == stop:
            raise Killed

    log = train(session, mix, chosen, on_step=on_step)
    drawn = list(islice(mix.draw(0), 4 * steps))
    return log, [drawn[4 * n : 4 * n + 4] for n in range(steps)]


@pytest.mark.parametrize("clipped", [0.0, 1e-3, 1e9])
def test_the_means_by_hand(clipped, tiny_model, tokenizer, rows):
    """A learning rate of 0: every step's gradient is that of the base, here by rows one after another; a batch's loss
    is the sum over its targets by their number. However they are clipped, the norm is the one before."""
    log, batches = run(tiny_model(), tokenizer, rows, max_grad_norm=clipped)
    model, norms, losses = tiny_model(), [], []
    for batch in batches:
        model.zero_grad()
        for row in batch:
            logp = model(torch.as_tensor(row.ids)[None]).logits[0].log_softmax(-1)
            at = torch.as_tensor(row.scored).nonzero()[:, 0]
            (-logp[at - 1, torch.as_tensor(row.ids)[at]].sum() / sum(r.num_scored for r in batch)).backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        with torch.no_grad():
            every = [model(torch.as_tensor(r.ids)[None]).logits[0].log_softmax(-1) for r in batch]
        total = sum(
            -p[i - 1, r.ids[i]].item() for p, r in zip(every, batch, strict=True) for i in r.scored.nonzero()[0]
        )
        losses.append(total / sum(r.num_scored for r in batch))
    said = log.early.said(log.loss)
    assert said == {
        "steps": 3,
        "grad_norm": pytest.approx(sum(norms) / 3, rel=1e-4),
        "loss": pytest.approx(sum(losses) / 3, rel=1e-4),
    }


def test_only_the_first_steps_count():
    """Norms 0, 1, ..., 149 and losses of ten times these: the first 100 average 49.5 and 495."""
    early = Early()
    for step in range(150):
        early.add(step, torch.tensor(float(step)))
    losses = [(step, {"task": 10.0 * step}) for step in range(150)]
    assert early.said(losses) == {"steps": STEPS, "grad_norm": 49.5, "loss": 495.0}
    assert Early().said([]) == {"steps": 0, "grad_norm": None, "loss": None}


def test_a_killed_run_has_the_same_signs(tiny_model, tokenizer, rows, tmp_path):
    settings = {"steps": 8, "learning_rate": 1e-2, "save_steps": 3}
    whole, _ = run(tiny_model(), tokenizer, rows, folder=tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        run(tiny_model(), tokenizer, rows, folder=tmp_path / "killed", stop=5, **settings)
    again, _ = run(tiny_model(), tokenizer, rows, folder=tmp_path / "killed", **settings)
    assert again.early.said(again.loss) == whole.early.said(whole.loss) and whole.early.steps == 8
    assert Log().early.steps == 0


def test_they_stand_in_the_folder_and_the_guide_has_its_say(world, tmp_path):
    """All weights at 0.01 with 4 rows a step: the guide for small models says other numbers; to an adapter nothing."""
    for name, plan in (("dense", []), ("lora", [{"LoRA": {"r": 2}}])):
        tune(write_recipe(tmp_path / f"{name}.yaml", recipe_data(world, tmp_path / name, plan=plan)))
        said = json.loads((tmp_path / name / "training.json").read_text(encoding="utf-8"))
        assert said["early"]["steps"] == 8 and said["early"]["grad_norm"] > 0
        assert said["early"]["loss"] == pytest.approx(sum(loss for _, loss in said["loss"]) / 8)
        assert any("2412.13337" in note for note in said["notes"]) == (name == "dense")


def test_what_the_guide_says_by_hand():
    assert advice(128, 1e-3) == advice(4, 2e-5) == []
    (said,) = advice(127, 2.1e-5)
    assert "rate of 2.1e-05 with 127 rows a step" in said and "128 rows or more" in said
