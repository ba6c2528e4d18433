"""Moments of 8 bits by bitsandbytes, on a CPU where it is installed: killed and resumed, and what is refused.

That both hosts give the same weights is asked in tests/test_hosts.py.
"""

import pytest
import torch

from cases import start
from holdfast import Plan
from holdfast import methods as hf
from holdfast.errors import PlanError, RecipeError
from holdfast.hosts.eight_bits import check_eight_bits
from holdfast.hosts.plain import Training, train
from holdfast.verbs.tune import tune
from tiny_run import recipe_data, write_recipe


def test_without_bitsandbytes_nothing_begins(world, tmp_path, monkeypatch):
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_bitsandbytes_available", lambda *_: False)
    changes = {"optim": "adamw_bnb_8bit"}
    path = write_recipe(tmp_path / "recipe.yaml", recipe_data(world, tmp_path / "run", training=changes))
    with pytest.raises(RecipeError, match=r"adamw_bnb_8bit needs bitsandbytes .*\n.*holdfast-lm\[bnb\]"):
        tune(path)
    assert not (tmp_path / "run" / "before.json").exists()


def test_what_it_cannot_do_is_refused():
    pytest.importorskip("bitsandbytes")
    with pytest.raises(PlanError, match="LIFT drops the moments of entries that leave"):
        check_eight_bits("adamw_bnb_8bit", Plan([hf.LIFT()]))
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="paged_adamw_8bit moves moments"):
            check_eight_bits("paged_adamw_8bit", Plan([]))
    check_eight_bits("adamw_bnb_8bit", Plan([hf.LoRA()]))


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_with_its_moments(tiny_model, tokenizer, rows, tmp_path):
    pytest.importorskip("bitsandbytes")
    held = []

    def run(folder, stop=None):
        optim = "adamw_bnb_8bit" if folder.name != "plain" else "adamw_torch"
        settings = Training(6, batch_size=4, learning_rate=1e-2, save_steps=2, folder=folder, optim=optim)
        model = tiny_model(tied=False)
        session, mix = start(Plan([]), model, tokenizer, rows, settings)

        def on_step(step, *_):
            held.append(step)
            if step == stop:
                raise Killed

        train(session, mix, settings, on_step=on_step)
        return session.model.state_dict()

    whole, plain = run(tmp_path / "whole"), run(tmp_path / "plain")
    with pytest.raises(Killed):
        run(tmp_path / "killed", stop=5)
    held.clear()
    again = run(tmp_path / "killed")
    assert held[0] == 5  # the checkpoint of step 4 was read
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    # the head has more than 4,096 numbers, from which on moments have 8 bits; embeddings keep theirs in 32
    assert not torch.equal(whole["lm_head.weight"], plain["lm_head.weight"])
