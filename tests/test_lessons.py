"""The two lessons: differences of what is kept, one curve, the page of made-up runs, and a run on the tiny model."""

import json
import random

import pytest

from holdfast import models
from scripts import LEADERBOARD, scripts

pytestmark = pytest.mark.filterwarnings("default")  # what other libraries warn of is not ours


@pytest.fixture(scope="module")
def less():
    with scripts(*LEADERBOARD, "lessons_plans", "lessons_curve", "lessons_before", "lessons_page", "lessons") as found:
        yield found


def record(method, rate=None, seed=0, task="1" * 10, held="1" * 20, kl=0.1):
    """A run as its file has it."""
    figures = {"task": task.count("1") / len(task)}
    figures |= {} if rate is None else {"kl task": kl, "kl few-shot": 2 * kl}
    return {
        "task": "sst2", "method": method, "rate": rate, "seed": seed, "figures": figures,
        "cost": {"train_cpu_seconds": 30.0, "cpu_seconds": 60.0, "seconds": 70.0},
        "made": {"date": "2026-01-02", "commit": "abc", "machine": "M, 1 of 2 cores"},
        **({"chance": {"in-context": {"t": 0.0}, "other authors": {"o": 0.5}}} if rate is None else {}),
        "task_scores": task, "suites": {"in-context": {"t": held}, "other authors": {"o": held}},
    }  # fmt: skip


def rows_of(less, runs, base):
    return less.leaderboard_table.Row("sst2", runs[0]["method"], runs[0]["rate"], runs, base)


@pytest.fixture
def pair(less):
    """A setting that keeps 15 of 20 and one that keeps 5, of a base that has 20 of 20."""
    base = record("base")
    new = rows_of(less, [record("full + anchor", 2e-5, held="1" * 15 + "0" * 5)], base)
    old = rows_of(less, [record("full", 2e-5, task="1" * 5 + "0" * 5, held="1" * 5 + "0" * 15)], base)
    return new, old


def test_what_is_kept_more_by_hand(less, pair):
    """(15 - 5) / 20 = 1/2 more without chance. With a chance of 1/2 the base is 1/2 above it, and a difference of 10
    items is 1/2 of the scores: (10 / 20) / (1 - 1/2) over (20 / 20 - 1/2) / (1 - 1/2) = 1."""
    found = less.lessons_page.kept_change(*pair, "in-context")
    assert found.value == pytest.approx(0.5) and 0.2 < found.low < 0.5 < found.high < 0.8 and found.n == 20
    assert less.lessons_page.kept_change(*pair, "other authors").value == pytest.approx(1.0)
    assert less.lessons_page.kept_change(*pair, "language") is None
    task = less.lessons_page.task_change(*pair)
    assert task.value == pytest.approx(0.5) and less.lessons_page.side(task) == "more"
    assert less.lessons_page.side(less.lessons_page.task_change(*pair[::-1])) == "less"
    same = less.lessons_page.kept_change(pair[0], pair[0], "in-context")
    assert (same.low, same.value, same.high) == (0, 0, 0) and less.lessons_page.side(same) == "no difference shown"


def test_only_seeds_that_both_have_are_compared(less, pair):
    new, old = pair
    more = rows_of(less, [*new.runs, record("full + anchor", 2e-5, seed=1, held="0" * 20)], new.base)
    assert less.lessons_page.kept_change(more, old, "in-context").value == pytest.approx(0.5)
    both = rows_of(less, [*old.runs, record("full", 2e-5, seed=1, task="1" * 5 + "0" * 5, held="0" * 20)], new.base)
    assert less.lessons_page.kept_change(more, both, "in-context").value == pytest.approx(0.25)


# ---- one curve


def test_a_rising_curve_by_hand(less):
    """1, 3, 2 pool to 1, 2.5, 2.5; between two points straight, beyond them flat."""
    found = less.lessons_curve.rising([1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [0.0, 1.5, 2.0, 9.0])
    assert found.tolist() == pytest.approx([1.0, 1.75, 2.5, 2.5])


def test_the_curve_of_the_others_misses_what_lies_beside_it(less):
    point = less.lessons_curve.Point
    line = [point(f"full {n}", "full", "plain", {"task": 10.0**n, "few-shot": 1.0}, n / 10) for n in range(9)]
    off = point("lora", "lora", "own", {"task": 10.0**4, "few-shot": 1.0}, 0.9)
    curve, flat = less.lessons_curve.misses([*line, off], "task")
    assert curve["lora"] == pytest.approx(0.5) and flat["lora"] == pytest.approx(0.5)
    assert abs(curve["full 2"]) < 0.11 < abs(flat["full 2"])
    words = " ".join(less.lessons_curve.curve_words([*line, off]))
    assert "KL on the task's answers" in words and "KL on few-shot prompts" in words
    assert less.lessons_curve.curve_words(line[:3]) == ["One curve needs at least 8 settings."]


# ---- the page


@pytest.mark.long
def test_the_page_says_what_is_measured_and_what_is_not(less, tmp_path):
    known, folder, draw = less.lessons_plans.settings(), tmp_path / "runs", random.Random(0)
    put = less.leaderboard_cells.save
    put(folder / "base.json", record("base"))
    with pytest.raises(SystemExit, match="no measured run"):
        less.lessons_page.write(folder, known, 2, tmp_path)
    for n, s in enumerate(known[:12]):
        held = "".join(draw.choice("01") for _ in range(20))
        run = record(s.name, s.rate, held=held, kl=0.01 * (n + 1))
        put(less.lessons.path_of(folder, s.name, 0), run)
    less.lessons_page.write(folder, known, 2, tmp_path)
    text = (tmp_path / "lessons.md").read_text(encoding="utf-8")
    assert (tmp_path / "lessons.png").stat().st_size > 10_000
    assert f"Not measured at all: {known[12].name}; " in text and "12 of 12 settings have fewer than 2 seeds" in text
    assert "M, 1 of 2 cores" in text and "task 10 test rows; in-context 20 items of 1 tasks" in text
    assert "| LoRA forgets less than full tuning | best rates | lora - full | 1 |" in text
    assert "- **20 % of the rows as few-shot prompts of the task itself.** Not measured yet." in text
    assert "One rising curve of the KL on the task's answers" in text
    assert "| Tickets | The anchor term | anchor (weight 1), full at 2e-05 - full at 2e-05 | 2 |" in text


def test_earlier_runs_are_paired_by_task_and_rate(less):
    found = less.lessons_before.pairs()
    assert {task for task, *_ in found} == {"SST-2", "Tickets"} and len(found) > 15
    assert all(new.task == old.task and new.method != "base" != old.method for *_, new, old in found)
    told = {less.lessons_before.named(new) for *_, new, _ in found}
    assert {"lora at 0.001", "sdft at 0.0003", "in-context mix at 2e-05"} <= told


def test_what_is_missing_comes_in_order_and_once(less, tmp_path):
    known = less.lessons_plans.settings()
    assert len({s.name for s in known}) == len({less.lessons.path_of(tmp_path, s.name, 0).name for s in known})
    todo = list(less.lessons.missing(tmp_path, known, 2))
    assert (
        todo[0] == (None, 0) and [s for s, seed in todo[1:] if not seed] == known and len(todo) == 1 + 2 * len(known)
    )
    less.leaderboard_cells.save(tmp_path / "base.json", record("base"))
    less.leaderboard_cells.save(less.lessons.path_of(tmp_path, known[0].name, 0), record(known[0].name, 1e-3))
    assert list(less.lessons.missing(tmp_path, known, 2)) == todo[2:]


def test_the_plans_of_all_settings_fit_together(less):
    from holdfast.plan import Plan

    for setting in less.lessons_plans.settings():
        plan = Plan(setting.methods())
        plan.check_together()
        assert plan.trains_new == (setting.kind == "lora") and "object at 0x" not in setting.words
    names = {s.name for s in less.lessons_plans.settings()}
    assert {n for _, pairs in less.lessons_page.advice() for _, *two in pairs for n in two} <= names
    assert {n for some in less.lessons_page.OWN.values() for n in some} <= names


# ---- a run


@pytest.fixture(scope="module")
def bench(less, tmp_path_factory, tiny_model, tokenizer):
    """The tiny model, a made SST-2 and a made task of other authors."""
    folder = tmp_path_factory.mktemp("lessons")
    models.save_model(tiny_model(), tokenizer, folder / "model", card=None)
    for split, count in (("train", 40), ("test", 6)):
        rows = [{"sentence": f"Text: film {n} was {'good' if n % 2 else 'bad'}", "label": "Good" if n % 2 else "Bad"}
                for n in range(count)]  # fmt: skip
        path = folder / "shared" / "text" / "sst2" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "shared" / "icl").mkdir()
    items = [{"input": f"w{n}", "output": f"W{n}"} for n in range(12)]
    (folder / "shared" / "icl" / "upper.json").write_text(json.dumps(items))
    size = less.leaderboard_plans.Size(
        steps=2, batch=4, test={"sst2": 6}, validation=8, divergence=3, shared=2, suites={"copying": 1}, more={}
    )
    return less.lessons.Bench(less.leaderboard_cell.Lab(folder / "shared", str(folder / "model"), size))


def test_runs_go_on_where_they_stopped_and_a_broken_one_stops_no_other(less, bench, tmp_path):
    known = {s.name: s for s in less.lessons_plans.settings()}
    some = [known[n] for n in ("full", "lora, eight phrasings", "full, s3ft")]
    broken = less.lessons_plans._setting("broken", "full", lambda: 1 / 0)
    assert less.lessons.drive(bench, tmp_path, list(less.lessons.missing(tmp_path, some, 1)), 0.0) == {}
    todo = list(less.lessons.missing(tmp_path, [*some[:1], broken, some[1]], 1))
    failed = less.lessons.drive(bench, tmp_path, todo, float("inf"))
    assert list(failed) == ["broken, seed 0"] and "division" in failed["broken, seed 0"]
    found = json.loads(less.lessons.path_of(tmp_path, "full", 0).read_text())
    assert len(found["task_scores"]) == 6 and found["cost"]["train_cpu_seconds"] > 0
    other = json.loads(less.lessons.path_of(tmp_path, "lora, eight phrasings", 0).read_text())["figures"]
    assert other["kl task"] > 0 < other["kl few-shot"]
    assert found["suites"].keys() == {"copying", "other authors"} and found["plan"] == "[] on plain rows"
    assert "chance" in json.loads((tmp_path / "base.json").read_text())
    assert [s.name for s, _ in less.lessons.missing(tmp_path, some, 1)] == ["full, s3ft"]


def test_the_base_is_no_distance_from_itself(bench):
    assert list(bench.divergence(bench.base).values()) == [0.0, 0.0]


def test_rows_in_other_words_have_the_same_answers(less, bench):
    plain, few, said = (bench.rows_of(kind) for kind in ("plain", "few", "phrasings"))
    assert [r.completion for r in said.train] == [r.completion for r in plain.train] and few.train == plain.train[:48]
    texts = [r.prompt.removesuffix("\nLabel:") for r in plain.train]
    assert all(text in r.prompt for text, r in zip(texts, said.train, strict=True))
    assert said.train[0].prompt == plain.train[0].prompt and said.train[3].prompt.startswith("Film review. Text: film")
    assert said.test is plain.test and len(said.tokens) == len(plain.tokens)
