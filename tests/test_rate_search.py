"""`training.learning_rate: search`: how it chooses, that it leaves no trace, and that a killed one goes on."""

import json
import math

import pytest
import torch

from cases import CASES, stands, start, weights_of
from holdfast import Plan
from holdfast.errors import PlanError, RecipeError, TrainingError
from holdfast.hosts.plain import Training, train
from holdfast.hosts.rewind import rewound
from holdfast.runs import rate_search
from holdfast.runs.rate_search import choose, rate_at, shorter, walk
from holdfast.verbs.explain import command as explain
from holdfast.verbs.tune import tune
from tiny_run import recipe_data, write_recipe

# ---- choosing, by hand


@pytest.mark.parametrize(
    "losses, asked",
    [
        ({0: 2, 1: 1, 2: 3}, [0, 1, 2]),  # better above: on to the outermost, once
        ({0: 1, 1: 2, -1: 3}, [0, 1, -1]),  # a valley at 0
        ({0: 2, 1: 3, -1: 1, -2: 0.5}, [0, 1, -1, -2]),
        ({0: None, 1: None, -1: None, -2: 1}, [0, 1, -1, -2]),  # diverged: further down
        ({0: 2, 1: None, -1: 3}, [0, 1, -1]),
    ],
)
def test_the_walk_goes_where_it_gets_better(losses, asked):
    seen = []

    def ask(k):
        seen.append(k)
        return None if losses[k] is None else [losses[k]] * 4

    found = walk(ask)
    assert seen == asked and set(found) == set(asked)


def test_of_equals_the_lowest_is_chosen():
    # k = 0 is best in the mean. k = -1 is worse by 0.1 in the mean; the differences 0.3, -0.1, 0.3, -0.1 have a
    # standard deviation of 0.231 and a standard error of 0.115: within. k = -2 is worse by 0.1 in every row: not.
    best = [1.0, 2.0, 3.0, 4.0]
    near = [1.3, 1.9, 3.3, 3.9]
    assert choose({0: best, 1: [9.0] * 4, -1: near}) == -1
    assert choose({0: best, 1: None, -1: [x + 0.1 for x in best]}) == 0
    assert [rate_at(1.5e-3, k) for k in (-2, -1, 0, 1, 2)] == [1.7e-4, 5e-4, 1.5e-3, 4.5e-3, 1.3e-2]


def test_a_run_that_is_longer_than_a_trial_takes_less():
    assert [rate_at(4.5e-3, 0 - shorter(steps)) for steps in (5, 24, 25)] == [4.5e-3, 4.5e-3, 1.5e-3]


# ---- no trace


ONE_STAGE = {c.name: c for c in CASES if len(c.method.stages()) <= 1}


@pytest.mark.parametrize("name", stands(ONE_STAGE))
def test_a_method_leaves_no_trace(name, tiny_model, tokenizer, rows):
    """Trained, undone and trained again is trained once, to the last bit."""
    case = ONE_STAGE[name]

    def tuned(before):
        settings = Training(4, batch_size=4, learning_rate=1e-3, save_steps=0)
        session, mix = start(Plan([case.method]), tiny_model(), tokenizer, rows, settings)
        for rate in before:
            with rewound(session):
                train(session, mix, Training(3, batch_size=4, learning_rate=rate, save_steps=0))
        log = train(session, mix, settings)
        return weights_of(session.model), log.loss, session.effects

    (once, losses, effects), (again, others, same) = tuned(()), tuned((1e-2, 1e-4))
    assert losses == others and effects == same
    assert all(torch.equal(once[n], again[n]) for n in once)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_broken_trial_leaves_no_trace(autocast, tiny_model, tokenizer, rows):
    """In bf16 the weights are halves with masters elsewhere when the loss stops being finite."""
    settings = Training(4, batch_size=4, save_steps=0, autocast=autocast)
    session, mix = start(Plan([]), tiny_model(), tokenizer, rows, settings)
    before = {n: p.detach().clone() for n, p in session.params.items()}
    with pytest.raises(TrainingError, match="The loss is"), rewound(session):
        train(session, mix, Training(6, 4, learning_rate=1e30, max_grad_norm=0, warmup_steps=0, save_steps=0,
                                     autocast=autocast))  # fmt: skip
    assert all(torch.equal(before[n], p) and p.dtype == before[n].dtype for n, p in session.params.items())


# ---- in a run

PLAN = [{"LoRA": {"r": 2, "lora_dropout": 0.1}}, {"ICLAnchor": {"pool": 4, "every": 1}}]


def searching(world, out, **changes):
    training = {"learning_rate": "search", "max_steps": 5, "warmup_steps": 0, **changes.pop("training", {})}
    data = recipe_data(world, out, training=training, **{"plan": PLAN, **changes})
    return write_recipe(out.parent / f"{out.name}.yaml", data)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The folder of a run that searched."""
    out = tmp_path_factory.mktemp("search") / "run"
    tune(searching(world, out))
    return out


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


RESULT = ("loss", "terms", "realised_mix", "tokens")


def test_the_found_rate_trains_the_untouched_model(whole, world, tmp_path):
    rate = read(whole, "training.json")["rate"]
    assert len(rate["tried"]) in (3, 4) and rate["value"] in [r for r, _ in rate["tried"]]
    assert all(math.isfinite(loss) for _, loss in rate["tried"])
    tune(searching(world, tmp_path / "plain", training={"learning_rate": rate["value"]}))
    for name in RESULT:
        assert read(whole, "training.json")[name] == read(tmp_path / "plain", "training.json")[name]
    files = [f / "model" / "adapter_model.safetensors" for f in (whole, tmp_path / "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_its_cost_is_told_before_and_after(whole, world, tmp_path, capsys):
    explain(searching(world, tmp_path / "run"), (), 0)
    told = " ".join(capsys.readouterr().out.split())
    assert "Learning rate: 0.0015 (search: around this, by 3 or 4 trials of 5 steps before the 5 of the run" in told
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "Tried: " in page and "within one standard error" in page
    report = read(whole, "report.json")
    assert report["timing"]["rates"] > 0
    assert "the reported rows also chose the learning rate" in report["task"]["note"]  # there is no test set


def test_a_killed_search_goes_on(whole, world, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    trial, tried = rate_search._trial, []

    def dying(job, rate):
        if len(tried) == 2:
            raise Killed
        tried.append(rate)
        return trial(job, rate)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(rate_search, "_trial", dying)
        tune(searching(world, tmp_path / "run"))
    again = []
    monkeypatch.setattr(rate_search, "_trial", lambda job, rate: (again.append(rate), trial(job, rate))[1])
    tune(searching(world, tmp_path / "run"))
    assert again and not set(again) & set(tried)
    assert read(tmp_path / "run", "training.json")["rate"] == read(whole, "training.json")["rate"]
    files = [f / "model" / "adapter_model.safetensors" for f in (whole, tmp_path / "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_another_recipe_searches_anew(world, tmp_path, monkeypatch):
    """A folder without work may be used by a mended recipe, whose trials are others."""
    trial, tried = rate_search._trial, []

    class Killed(Exception):
        pass

    def once(job, rate):
        if tried:
            raise Killed
        tried.append(rate)
        return trial(job, rate)

    monkeypatch.setattr(rate_search, "_trial", once)
    with pytest.raises(Killed):
        tune(searching(world, tmp_path / "run", measure={"skip_before": True}))
    with pytest.raises(Killed):  # at its first trial
        tune(searching(world, tmp_path / "run", measure={"skip_before": True}, training={"weight_decay": 0.1}))
    assert len(tried) == 1


REFUSED = {
    "no rows to judge by": ({"data": {"validation_size": 0, "test": "TRAIN"}}, RecipeError, "validation rows, and"),
    "stages": ({"plan": [{"ProMoT": {"num_virtual_tokens": 3}}]}, PlanError, "ProMoT splits it into stages"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_searched_is_refused_first(name, world, tmp_path):
    changes, kind, words = REFUSED[name]
    changes = json.loads(json.dumps(changes).replace("TRAIN", str(world.train)))
    with pytest.raises(kind, match=words):
        tune(searching(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "before.json").exists()


def test_a_training_that_always_diverges_is_told(world, tmp_path, monkeypatch):
    monkeypatch.setattr(rate_search, "rate_at", lambda middle, k: 1e30)
    changes = {"plan": [], "training": {"max_grad_norm": 0}}
    with pytest.raises(TrainingError, match="diverged at every learning rate"):
        tune(searching(world, tmp_path / "run", **changes))
