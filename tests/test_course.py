"""The course of the learning rate in the plain loop: by hand, through the loop, and after a kill."""

import pytest
import torch

from cases import start
from holdfast import Plan
from holdfast.errors import RecipeError
from holdfast.hosts.course import check_course, course
from holdfast.hosts.plain import Log, Training, train
from holdfast.verbs.tune import tune
from tiny_run import recipe_data, write_recipe

END = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 2e-4}}
PLATEAU = {"lr_scheduler_type": "warmup_stable_decay",
           "lr_scheduler_kwargs": {"num_decay_steps": 4, "decay_type": "linear"}, "warmup_steps": 2}  # fmt: skip


def rates(steps=10, **settings):
    """The rate of every step of a run of `steps` steps with the peak 1e-3."""
    chosen = Training(steps, learning_rate=1e-3, **settings)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = course(optimizer, steps, chosen)
    check_course(chosen)
    return [schedule.base_lrs[0] * schedule.lr_lambdas[0](s) for s in range(steps)]


def test_courses_by_hand():
    # a warm-up of 0.2 of 10 steps is 2 steps; then 8 steps down to 0
    assert rates(warmup_steps=0.2) == pytest.approx([0, 5e-4, *(1e-3 * (8 - i) / 8 for i in range(8))])
    assert rates(lr_scheduler_type="constant", warmup_steps=3) == [1e-3] * 10
    assert rates(lr_scheduler_type="constant_with_warmup", warmup_steps=2) == [0, 5e-4, *[1e-3] * 8]
    # up for 2, level for 4, down over the last 4
    down = [1e-3 * (4 - i) / 4 for i in range(4)]
    assert rates(**PLATEAU) == pytest.approx([0, 5e-4, *[1e-3] * 4, *down])


def test_a_course_may_end_above_zero_in_the_loop(tiny_model, tokenizer, rows):
    settings = Training(8, batch_size=4, learning_rate=1e-3, save_steps=0, warmup_steps=0, **END)
    seen = []
    session, mix = start(Plan([]), tiny_model(), tokenizer, rows, settings)
    log = Log()
    train(session, mix, settings, log=log, on_step=lambda *_: seen.append(log.rate))
    # 8 steps are half a cosine from 1e-3 to 2e-4: step 4 stands at the middle, step 7 just above the end
    assert seen[0] == 1e-3 and seen[4] == pytest.approx(6e-4) and 2e-4 < seen[7] < 2.5e-4


BAD = {
    "unknown setting": ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, "cycles"),
    "missing setting": ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
    "text": ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "x"}}, "does not fit"),
    "taken by nobody": ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"min_lr": 1}}, "takes no settings"),
    "below zero": ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -1.0}}, "times the peak"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_course_that_cannot_be_is_refused(name):
    settings, words = BAD[name]
    with pytest.raises(RecipeError, match=words):
        check_course(Training(10, **settings))


def test_it_is_refused_before_any_work(world, tmp_path):
    data = recipe_data(world, tmp_path / "run", training={"lr_scheduler_type": "warmup_stable_decay"})
    with pytest.raises(RecipeError, match="num_decay_steps"):
        tune(write_recipe(tmp_path / "recipe.yaml", data))
    assert not (tmp_path / "run" / "before.json").exists()


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_along_its_course(tiny_model, tokenizer, rows, tmp_path):
    def run(folder, stop=None):
        settings = Training(10, batch_size=4, learning_rate=1e-3, save_steps=3, folder=folder, **PLATEAU)
        session, mix = start(Plan([]), tiny_model(), tokenizer, rows, settings)

        def on_step(step, *_):
            if step == stop:
                raise Killed

        train(session, mix, settings, on_step=on_step)
        return session.model.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", stop=8)
    again = run(tmp_path / "killed")
    assert all(torch.equal(whole[k], again[k]) for k in whole)
