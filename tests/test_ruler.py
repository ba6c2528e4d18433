"""The instrument checks: the quick simulation against the real verdict, what a limit can see, every cheap section."""

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from holdfast.measure import stats
from holdfast.measure.compare import ability
from holdfast.measure.sight import DISCORDANT, POWER, can_see
from tiny_run import make_world

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def ruler():
    spec = importlib.util.spec_from_file_location("ruler", FOLDER / "ruler.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["ruler"] = module
    sys.path.insert(0, str(FOLDER))
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))
    del sys.modules["ruler"]


@pytest.fixture(scope="module")
def world(tiny_model, tokenizer, rows, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("ruler")
        patch.setenv("HOLDFAST_HOME", str(folder / "home"))
        yield make_world(folder, tiny_model(tied=True), tokenizer, rows)


def section(ruler, world, name, out, results=None):
    """The data of one section, made tiny by the command itself."""
    words = ["run", "--smoke", "--only", name, "--model", str(world.base), "--out", str(out)]
    ruler.main([*words, "--results", str(results or out)])
    found = json.loads((out / f"{name}.json").read_text())
    assert found["smoke"] and found["seconds"] > 0 and found["versions"]["torch"]
    assert ruler.SECTIONS[name][2](found["data"])  # the page can be written from it
    return found["data"]


# ---- sight


def made_up(marks, chance=0.0, clusters=None):
    names = clusters or [""] * len(marks)
    items = [{"id": str(n), "correct": m, "cluster": names[n]} for n, m in enumerate(marks)]
    task = {"name": "t", "chance": chance, "metric": "exact", "items": items, "clustered": clusters is not None}
    return {"suite": "made up", "tasks": [task]}


def test_one_plain_task_sees_what_stats_says():
    """Keeping all: only a loss above zero must be shown, so the answer is that of stats.detectable."""
    seen = can_see(made_up([1, 1, 1, 0] * 50), 1.0)
    assert seen.items == 200
    assert seen.loss == pytest.approx(stats.detectable(200, DISCORDANT, POWER))
    assert seen.share == pytest.approx(seen.loss / 0.75)


def test_the_margin_must_be_passed_too():
    strict, loose = (can_see(made_up([1, 1, 1, 0] * 50), keep) for keep in (0.95, 0.7))
    assert strict.loss < 0.3 * 0.75 < loose.loss


def test_chance_and_clusters_cost_sight():
    marks = [1, 1, 1, 0] * 50
    plain, guessed = can_see(made_up(marks), 0.9), can_see(made_up(marks, chance=0.5), 0.9)
    pairs = can_see(made_up(marks, clusters=[str(n // 4) for n in range(200)]), 0.9)
    assert guessed.share > plain.share
    assert pairs.items == 50 and pairs.loss > plain.loss


def test_chance_is_not_measurable():
    assert can_see(made_up([1, 0] * 30, chance=0.5), 0.95) is None


def test_the_promise_holds_in_simulation(ruler):
    """A loss of the promised size is called lost about nine times in ten."""
    rng, plain = np.random.default_rng(1), ruler.simulated.World(20, 48, DISCORDANT)
    seen = can_see(ruler.simulated.measurement(plain.draw(1, rng)[0], plain.chance)[0], ruler.simulated.KEEP)
    world = ruler.simulated.World(20, 48, DISCORDANT, seen.loss)
    found = ruler.simulated.statuses([ruler.simulated.judge(world.draw(2000, rng), world.chance)])
    assert 0.8 < (found == "lost").mean() < 0.97


# ---- the simulation


def test_worlds_are_what_they_say(ruler):
    world = ruler.simulated.World(20, 48, 0.1, 0.05)
    cells = world.cells()
    assert np.allclose(cells.sum(1), 1) and (cells >= 0).all()
    np.testing.assert_allclose(cells[0], [0.67 - 0.075, 0.075, 0.025, 0.33 - 0.025])
    share = ruler.simulated.World(20, 48, 0.1, 0.05, relative=True).truth()["share"]
    assert share == pytest.approx(0.05)
    assert ruler.simulated.World(20, 48, 0.2).truth()["loss"] == 0


def test_the_quick_verdict_is_that_of_compare(ruler):
    rng = np.random.default_rng(0)
    for n, loss in enumerate((0.0, 0.0, 0.04, 0.08, 0.12)):
        world = ruler.simulated.World(6, 24, 0.1, loss)
        counts = world.draw(1, rng)
        known, p_loss, _, kept = (x[0] for x in ruler.simulated.judge(counts, world.chance))
        part = ability(*ruler.simulated.measurement(counts[0], world.chance), ruler.simulated.KEEP)
        assert (
            known and part["status"] == ruler.simulated.statuses([ruler.simulated.judge(counts, world.chance)])[0, 0]
        ), n
        assert kept == pytest.approx(part["retention"]["value"])
        assert p_loss == pytest.approx(part["p_loss"], abs=0.02)
        (drawn,) = ruler.simulated.bootstrapped(counts, world.chance, np.array([p_loss]), rng)
        assert drawn == pytest.approx(part["p_loss"], abs=0.02 if p_loss >= ruler.simulated.ALPHA else 0.006)


def test_few_tasks_that_are_not_measurable_are_left_out_as_in_stats(ruler):
    rng = np.random.default_rng(3)
    for p, chance in ((0.3, 0.0), (0.6, 0.5), (0.1, 0.0), (0.75, 0.5)):
        for right in rng.binomial(24, p, 10):
            marks = np.repeat([1, 0], [right, 24 - right])
            quick = ruler.simulated._measurable(np.array([right / 24]), np.array([24]), np.array([chance]))[0]
            assert quick == stats.measurable(marks, None, chance), (right, chance)


def test_holm_is_that_of_stats(ruler):
    p = [0.001, 0.03, 0.015, 0.5]
    verdicts = [(np.array([True]), np.array([x]), np.array([0.5]), np.array([0.8])) for x in p]
    adjusted = stats.holm({str(n): x for n, x in enumerate(p)})
    want = ["lost" if adjusted[str(n)] < 0.05 else "unclear" for n in range(4)]
    assert list(ruler.simulated.statuses(verdicts)[0]) == want == ["lost", "unclear", "lost", "unclear"]


def test_simulated(ruler, world, tmp_path):
    data = section(ruler, world, "simulated", tmp_path)
    assert all(r["any_lost"] <= 0.08 for r in data["alone"])
    assert {c["limit"] for c in data["curve"]} == {12}


def test_intervals(ruler, world, tmp_path):
    data = section(ruler, world, "intervals", tmp_path)
    assert len(data["one"]) == len(ruler.intervals.KINDS) * 3 and len(data["five"]) == 9
    assert all(len(r["covered"]) == len(ruler.intervals.TRUTHS) for r in data["one"])


@pytest.mark.long
def test_intervals_cover_what_the_page_says(ruler):
    """At the size of the page: 95 % where items show what they are, less only in the kind that is named there."""
    data = ruler.intervals.intervals(ruler.Lab("", False))
    *known, hard = ([r for r in data["one"] if r["kind"] == kind] for kind in ruler.intervals.KINDS)
    worst = min(hit for rows in known for r in rows for hit in r["covered"])
    assert worst > 0.88 and min(hit for r in data["five"] for hit in r["covered"]) > 0.91
    assert min(hit for r in hard for hit in r["covered"]) < 0.6  # a limit that is told, not hidden
    assert all(r["covered"] > 0.93 for r in data["changes"])


# ---- the sections that need a model


def test_zero(ruler, world, tmp_path):
    suites = section(ruler, world, "zero", tmp_path)["suites"]
    assert len(suites) == 7 and all(s["items"] and s["changed"] == 0 == s["largest"] for s in suites)


def test_invariance(ruler, world, tmp_path):
    found = section(ruler, world, "invariance", tmp_path)["float32"]["ways"]
    assert all(w["differ"] == 0 and w["largest"] < 1e-3 for w in found.values()), found
    assert found["again"]["largest"] == 0 < found["no shared prefixes, one by one"]["largest"]


def record(folder, method, seed, scores, **further):
    """A cell of the leaderboard, as far as the ruler reads it."""
    path = folder / "sst2" / f"{method}.{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    run = {"task": "sst2", "method": method, "rate": 1e-3, "seed": seed, "suites": {"in-context": {"t": scores}}}
    path.write_text(json.dumps({**run, **further}))


def test_noise_and_damage(ruler, world, tmp_path):
    rows = section(ruler, world, "noise", tmp_path)["repetitions"]
    assert len(rows) == 2 and all(r["status"] != "lost" for r in rows)
    record(tmp_path, "base", 0, "1" * 90, chance={"in-context": {"t": 0.0}})
    record(tmp_path, "full", 0, "1" * 60 + "0" * 30)
    found = section(ruler, world, "damage", tmp_path)
    assert [r["damage"] for r in found["rows"]] == ["noise", "noise", "middle layers scaled"]
    (tuning,) = found["tunings"]
    assert tuning["status"] == "lost" and tuning["kept"]["value"] == pytest.approx(2 / 3)


def test_seeds_reads_recorded_runs_and_trains_if_there_are_none(ruler, world, tmp_path):
    folder = tmp_path / "runs"
    for name, seed, right in (("base", 0, 20), ("full", 0, 10), ("full", 1, 12), ("full", 2, 14)):
        record(folder, name, seed, "1" * right + "0" * (20 - right))
    (row,) = section(ruler, world, "seeds", tmp_path / "a", folder)["rows"]
    assert row["over_seeds"]["value"] == pytest.approx(-0.4) and len(row["runs"]) == 3
    (row,) = section(ruler, world, "seeds", tmp_path / "b")["rows"]
    assert row["recipe"].startswith("tickets") and len(row["runs"]) == 3


@pytest.mark.filterwarnings("default")
def test_harness(ruler, world, tmp_path, monkeypatch):
    quick_harness(monkeypatch)
    kinds = section(ruler, world, "harness", tmp_path)["kinds"]
    assert len(kinds) == 7
    for kind, r in kinds.items():
        assert r["items"] == r["equal"] > 0, kind
        assert r["largest"] is None or r["largest"] < 1e-3
    assert kinds["multiple choice"]["own_equal"] == kinds["multiple choice"]["items"]


def quick_harness(monkeypatch):
    pytest.importorskip("lm_eval")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lm_eval.models.huggingface  # noqa: F401
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


@pytest.mark.long
@pytest.mark.filterwarnings("default")
def test_speed(ruler, world, tmp_path, monkeypatch):
    quick_harness(monkeypatch)
    data = section(ruler, world, "speed", tmp_path)
    assert data["equal"] == data["items"] and data["unique_tokens"] < data["all_tokens"]
    assert data["check"]["first"]["peak_bytes"] > data["check"]["model_bytes"]


# ---- the page and the command


def test_what_was_not_measured_is_not_on_the_page(ruler, world, tmp_path):
    section(ruler, world, "simulated", tmp_path)
    assert ruler.written(tmp_path).count("Not measured yet.") == len(ruler.SECTIONS)  # a smoke run is no measurement
    found = json.loads((tmp_path / "simulated.json").read_text())
    (tmp_path / "simulated.json").write_text(json.dumps(found | {"smoke": False}))
    assert ruler.written(tmp_path).count("Not measured yet.") == len(ruler.SECTIONS) - 1


def test_a_section_is_measured_once(ruler, world, tmp_path, capsys):
    (tmp_path / "zero.json").write_text("{}")
    ruler.run(ruler.Lab(str(world.base), True), tmp_path, "zero")
    assert "there already" in capsys.readouterr().out and (tmp_path / "zero.json").read_text() == "{}"


def test_smoke_needs_its_own_folder(ruler):
    with pytest.raises(SystemExit):
        ruler.main(["run", "--smoke"])
