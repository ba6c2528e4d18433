"""Two processes (torchrun) tune as one: weights within 1e-5 in fp32, checkpoints, errors, and the whole command."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cases import CASES, run, stands
from holdfast import methods as hf
from holdfast import services
from holdfast.engine.processes import first, start, world
from holdfast.errors import HoldfastError, RecipeError, TrainingError
from holdfast.hosts import processes
from holdfast.method import Method
from holdfast.session import Session
from test_law_rows import Averaged, Unlikely
from test_shard import CLOSE, apart, close, two
from tiny import build_model, build_tokenizer, ticket_rows
from tiny_run import make_world, recipe_data, write_recipe
from trainers import Watcher

LORA = hf.LoRA(r=4, lora_alpha=8, lora_dropout=0.0)  # dropout draws for the rows of a forward: other numbers, one law
SETTINGS = {"batch_size": 4, "gradient_accumulation_steps": 2, "weight_decay": 0.1, "learning_rate": 2e-3}
PLANS: dict[str, Sequence[Method]] = {
    "none": [],
    **{c.name: [LORA if c.name == "LoRA" else c.method] for c in CASES},
    "feedback": [Watcher()],
    "all at once": [LORA, hf.ICLAnchor(pool=8), hf.KLToBase(on="replay"), hf.InContextMix(pool=8), hf.L2ToInit()],
    "held": [hf.ICLAnchor(pool=8, shots=(1, 2), prompts_per_step=2, hold=1e-3, hold_over=2)],
    "balanced": [LORA, hf.Replay(share=0.5), hf.MFTCoder()],
    "left out and paired": [Unlikely(), hf.Curriculum(), Averaged(grouped=True)],
    "by source": [Averaged(per="source")],
}
RESUMED = [hf.OrthogonalSubspace(), hf.ICLAnchor(pool=8), hf.Freeze(layers=1)]


class Killed(Exception):
    """Stands for a lost process."""


def tuned(methods: Sequence[Method], steps: int = 6, **settings: Any) -> Any:
    return run(methods, build_model(tied=False), build_tokenizer(), ticket_rows(), steps, **{**SETTINGS, **settings})


def die_at(step: int) -> Any:
    def watch(_session: Any, at: int) -> None:
        if at == step:
            raise Killed

    return watch


def killed(folder: Path, methods: Sequence[Method] = RESUMED) -> None:
    """A run that dies in step 5; its last checkpoint is of step 4."""
    with pytest.raises(Killed):
        tuned(methods, save_steps=2, folder=folder, watch=die_at(5))


def weights_of(result: Any) -> dict[str, torch.Tensor]:
    soft = {} if result.soft is None else {"soft": result.soft}
    return {**result.weights, **soft}


def worker(folder: Path) -> None:
    """What each of the two does, the plans that are asked for first; everything it finds goes to files."""
    names = json.loads((folder / "wanted.json").read_text())
    rank, facts, plain = world()[0], {}, Session.loss
    mine: list[int] = []
    asked: list[int] = []
    batches = services._batches
    services._batches = lambda rows, most: asked.append(len(rows)) or batches(rows, most)

    def loss(self: Session, model: Any, rows: Any, *args: Any, **probe: Any) -> Any:
        mine.append(0 if probe else len(rows))
        return plain(self, model, rows, *args, **probe)

    Session.loss = loss  # type: ignore[method-assign]
    for name in (n for n in PLANS if n in names):
        mine.clear()
        asked.clear()
        got = tuned(PLANS[name])
        save_file(weights_of(got), folder / f"{name}.{rank}.safetensors")
        facts[name] = {
            "rows": sum(mine),
            "loss": got.log.loss,
            "realised": got.log.realised,
            "effects": sorted(k for k, n in got.session.effects.items() if n),
            "learnt": len(got.session.teacher) if got.session.teacher else 0,
            "asked": sum(asked),
        }
    if None in names:
        facts |= worker_rest(folder, rank)
    (folder / f"rank{rank}.json").write_text(json.dumps(facts))


def worker_rest(folder: Path, rank: int) -> dict[str, Any]:
    """What the tests of no single plan look at: a process without rows, checkpoints, dropout and errors."""
    facts: dict[str, Any] = {}
    idle = tuned([hf.L2ToInit(alpha=5.0), hf.ICLAnchor(pool=4)], batch_size=1, gradient_accumulation_steps=1)
    save_file(weights_of(idle), folder / f"idle.{rank}.safetensors")
    save_file(
        weights_of(tuned(RESUMED, save_steps=2, folder=folder / "by-one")), folder / f"by-one.{rank}.safetensors"
    )
    killed(folder / "by-two")
    noisy = [hf.LoRA(r=4, lora_dropout=0.5)]
    killed(folder / "noisy", noisy)
    again, whole = weights_of(tuned(noisy, save_steps=2, folder=folder / "noisy")), weights_of(tuned(noisy))
    facts["dropout"] = {"seed": torch.initial_seed(), "same": all(torch.equal(again[n], w) for n, w in whole.items())}
    facts["errors"] = [said(lambda: tuned([], learning_rate=1e30)), said(lambda: processes.by_first(fail))]
    facts["errors"].append(said(lambda: processes.agree(rank, folder)))
    return facts


def fail() -> None:
    raise RecipeError("Only the first looked.", "Mend it.") if first() else AssertionError


def said(make: Any) -> list[str]:
    with pytest.raises(HoldfastError) as caught:
        make()
    return [type(caught.value).__name__, caught.value.what, caught.value.cure]


@pytest.fixture(scope="module")
def ran(tmp_path_factory, wanted, request) -> Any:
    """The folder of what two processes found, and their facts; one checkpoint was left there by a single process."""
    folder = tmp_path_factory.mktemp("two")
    names = {name for _, name in wanted(request, "name")}
    (folder / "wanted.json").write_text(json.dumps(list(names)))
    if None in names:
        killed(folder / "by-one")
    two(__file__, str(folder))
    return folder, [json.loads((folder / f"rank{r}.json").read_text()) for r in (0, 1)]


def distance(folder: Path, name: str, result: Any) -> float:
    """`apart` of the weights of two processes and of one; the two must agree to the last bit."""
    first, second = (load_file(folder / f"{name}.{r}.safetensors") for r in (0, 1))
    assert all(torch.equal(first[n], second[n]) for n in first), name
    return apart(first, weights_of(result))


@pytest.mark.parametrize("name", stands(PLANS))
def test_two_processes_give_the_weights_of_one(name, ran):
    folder, facts = ran
    one = tuned(PLANS[name])
    far = distance(folder, name, one)
    print(f"{name}: {far:.1e}")
    assert far < CLOSE
    first, second = (f[name] for f in facts)
    assert first["realised"] == second["realised"] == dict(one.log.realised)
    assert first["effects"] == second["effects"] == sorted(k for k, n in one.session.effects.items() if n)
    assert close(first["loss"], json.loads(json.dumps(one.log.loss)))
    rows = sum(n for k, n in one.log.realised.items() if k.endswith("/examples"))
    assert first["rows"] + second["rows"] == rows and abs(first["rows"] - second["rows"]) <= rows / 4
    if one.session.teacher is not None and len(one.session.teacher):
        assert first["learnt"] == second["learnt"] == len(one.session.teacher)
        assert first["asked"] + second["asked"] == first["learnt"] and first["asked"] and second["asked"]


def test_a_process_without_rows(ran):
    one = tuned([hf.L2ToInit(alpha=5.0), hf.ICLAnchor(pool=4)], batch_size=1, gradient_accumulation_steps=1)
    assert distance(ran[0], "idle", one) < 1e-5


@pytest.fixture(scope="module")
def unbroken() -> Any:
    return tuned(RESUMED)


def test_two_go_on_from_the_checkpoint_of_one(ran, unbroken):
    assert distance(ran[0], "by-one", unbroken) < 1e-5


def test_one_goes_on_from_the_checkpoint_of_two(ran, unbroken):
    steps: list[int] = []
    again = tuned(RESUMED, save_steps=2, folder=ran[0] / "by-two", watch=lambda _s, n: steps.append(n))
    assert steps == [5, 6]
    assert max((again.weights[n] - w).abs().max().item() for n, w in unbroken.weights.items()) < 1e-5


def test_dropout_differs_by_process_and_survives_a_restart(ran):
    first, second = (f["dropout"] for f in ran[1])
    assert first["seed"] != second["seed"] and first["same"] and second["same"]


def test_every_process_says_what_is_wrong(ran):
    first, second = (f["errors"] for f in ran[1])
    assert first == second
    loss, file, steps = first
    assert loss[0] == "TrainingError" and "The loss is nan at step" in loss[1]
    assert file == ["RecipeError", "Only the first looked.", "Mend it."]
    assert steps[0] == "TrainingError" and "[0, 1]" in steps[1] and "output_dir" in steps[2]


# ---- the command


def test_the_command_with_two_processes(tiny_model, tokenizer, rows, tmp_path):
    from holdfast.verbs.tune import tune

    world = make_world(tmp_path, tiny_model(tied=False), tokenizer, rows)
    plan = [{"LoRA": {"r": 2}}, {"ICLAnchor": {"pool": 8}}, {"ProMoT": {"num_virtual_tokens": 2}}]
    recipes = {
        name: write_recipe(tmp_path / f"{name}.yaml", recipe_data(world, tmp_path / name, plan=plan))
        for name in ("one", "two")
    }
    said = two("-m", "holdfast.cli", "tune", str(recipes["two"]))
    assert "Tuned model" in said[0] and not said[1]
    tune(recipes["one"])
    a, b = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in recipes)
    assert max((a[n] - b[n]).abs().max().item() for n in a) < 1e-5
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in recipes]
    for key in ("abilities", "task", "verdict"):
        assert close(*(r[key] for r in reports)), key
    lines = [(tmp_path / name / "log.jsonl").read_text().count("\n") for name in recipes]
    assert lines[0] == lines[1] > 0
    assert {p.name for p in (tmp_path / "one").iterdir()} == {p.name for p in (tmp_path / "two").iterdir()}


# ---- one process


def test_alone_nothing_is_shared():
    assert processes.by_first(lambda: 3) == 3
    with pytest.raises(TrainingError):
        processes.by_first(lambda: (_ for _ in ()).throw(TrainingError("no", "")))


if __name__ == "__main__":
    torch.set_num_threads(1)
    start()
    worker(Path(sys.argv[1]))
