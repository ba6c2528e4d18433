"""The benchmark of a bound that is held in training: its fit by hand, its tables, and a run on the tiny model."""

import json
import math

import pytest

from holdfast import models
from scripts import LEADERBOARD, scripts

pytestmark = pytest.mark.filterwarnings("default")  # what other libraries warn of is not ours


@pytest.fixture(scope="module")
def less():
    with scripts(*LEADERBOARD, "steering") as found:
        yield found


def point(less, task, signal, kept, method="default"):
    return less.steering.Point(task, method, 0, {"live": signal}, kept)


def test_a_fit_by_hand(less):
    """exp(-0.1 / c) = 1/2 at c = 0.1 / ln 2 = 0.144; with that c a signal of 0.2 gives 1/4."""
    steering = less.steering
    c = steering.fit([(0.1, 0.5), (0.3, 0.125), (0.0, 1.0)])
    assert c == pytest.approx(0.1 / math.log(2), rel=0.02)
    assert steering.predicted(0.2, 0.1 / math.log(2)) == pytest.approx(0.25) and steering.predicted(-1.0, c) == 1


def test_a_task_is_predicted_by_the_others(less):
    """Two tasks on two curves, c 0.144 and 0.0721: kept 1/2 is predicted as 1/4 and the other way round; their means
    are 1/2 and 1/4 too."""
    found = [point(less, "sst2", 0.1, 0.5), point(less, "rte", 0.1, 0.25)]
    curve, flat = less.steering.errors(found, "live")
    assert curve == pytest.approx([0.25, 0.25], abs=0.005) and flat == [0.25, 0.25]


def record(method, rate=None, task="sst2", seed=0, held="1" * 20, kl=0.1):
    """A run as its file has it."""
    looks = ([[0, 0.0], [2, kl]], [[0, 1.0], [2, 0.8]]) if method != "lora" else ([], [])
    course = dict(zip(("ICLAnchor/kl", "ICLAnchor/weight"), looks, strict=True))
    signals = {"after": kl, "labels": kl, **({"live": kl} if method != "lora" else {})}
    return {
        "task": task, "method": method, "rate": rate, "seed": seed, "figures": {"task": 0.5},
        "signals": {} if rate is None else signals,
        "shown": {} if rate is None else course, "cost": {"train_seconds": 30.0},
        **({"chance": {"in-context": {"t": 0.0}}} if rate is None else {}),
        "task_scores": "1" * 5 + "0" * 5, "suites": {"in-context": {"t": held}},
    }  # fmt: skip


def test_tables(less, tmp_path):
    steering = less.steering
    with pytest.raises(SystemExit, match="no measured run"):
        steering.table(tmp_path)
    for task in ("sst2", "rte"):
        less.leaderboard_cells.save(tmp_path / task / "base.json", record("base", task=task))
        for n, (cell, setting) in enumerate([c for c in steering.cells([task], 1) if c[1]][:3]):
            run = record(cell.method, setting.rate, task, held="1" * (20 - 2 * n) + "0" * 2 * n, kl=0.05 * n)
            less.leaderboard_cells.save(tmp_path / cell.file, run)
    text = steering.table(tmp_path)
    assert "| SST-2 | default | 0.0015 | 1 | 0.500 " in text and "| RTE | hold 0.1 |" in text
    assert "0.8 (0.8 to 1)" in text and "| 0.800 |" in text
    line = next(x for x in text.splitlines() if x.startswith("| KL on 16 anchor prompts") and "| all |" in x)
    assert "| 6 | -1.00 |" in line and "| 4 | -1.00 |" in text and "too few" not in text


@pytest.fixture(scope="module")
def bench(less, tmp_path_factory, tiny_model, tokenizer):
    """The tiny model, the shipped tickets and a made task of other authors."""
    folder = tmp_path_factory.mktemp("steering")
    models.save_model(tiny_model(), tokenizer, folder / "model", card=None)
    (folder / "shared" / "icl").mkdir(parents=True)
    items = [{"input": f"w{n}", "output": f"W{n}"} for n in range(12)]
    (folder / "shared" / "icl" / "upper.json").write_text(json.dumps(items))
    size = less.leaderboard_plans.Size(
        steps=4, batch=2, test={"tickets": 4}, divergence=2, shared=2, suites={"in-context": 1}, more={}
    )
    return less.steering.Bench(less.leaderboard_cell.Lab(folder / "shared", str(folder / "model"), size))


def test_runs_go_on_where_they_stopped(less, bench, tmp_path):
    steering = less.steering
    todo = list(steering.cells(["tickets"], 1, ["hold 0.1"]))
    assert [c.method for c, _ in todo] == ["base", "hold 0.1"]
    assert steering.drive(bench, tmp_path, todo, 0.0) == {} and not list(tmp_path.iterdir())
    assert steering.drive(bench, tmp_path, todo, float("inf")) == {}
    held = json.loads((tmp_path / todo[1][0].file).read_text())
    assert held["signals"]["live"] > 0 and held["signals"]["after"] > 0 and len(held["shown"]["ICLAnchor/weight"]) == 4
    assert held["shown"]["ICLAnchor/weight"][0] == [0, 1.0] and "hold=0.1" in held["plan"]
    assert "| Tickets | hold 0.1 |" in steering.table(tmp_path)


def test_the_default_is_only_watched(less):
    (anchor,) = (m for m in less.steering.settings()["default"].methods() if m.name == "ICLAnchor")
    assert anchor.hold_rate == 0 and anchor.weight == type(anchor)().weight
