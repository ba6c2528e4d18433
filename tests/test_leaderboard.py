"""The leaderboard: a cell on the tiny model, the choice of a rate, resuming, packing, and a table of fixed cells."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from holdfast import models
from holdfast.data.rows import identity
from scripts import LEADERBOARD, scripts

pytestmark = pytest.mark.filterwarnings("default")  # what other libraries warn of is not ours


@pytest.fixture(scope="module")
def lead():
    with scripts(*LEADERBOARD, "leaderboard") as found:
        yield SimpleNamespace(**{name.removeprefix("leaderboard_"): one for name, one in vars(found).items()})


def entries(lead):
    return {"full": lead.cells.Entry("[]", 2e-5), "eaft": lead.cells.Entry("[EAFT]", 2e-5)}


def record(cell, task="1" * 10, held="1" * 20, kl=0.1, validation=0.5, **further):
    """A cell as its file has it."""
    base = cell.method == "base"
    scores = {"in-context": {"t": held}, "other authors": {"o": held}}
    figures = {"task": task.count("1") / len(task), **({} if base else {"kl": kl, "validation": validation})}
    return {
        "task": cell.task, "method": cell.method, "rate": cell.rate, "seed": cell.seed, "figures": figures,
        "cost": {"seconds": 60.0, "train_cpu_seconds": 30.0, "peak_bytes": 2**30},
        "made": {"date": "2026-01-02", "commit": "abc", "machine": "M"},
        **({"chance": {"in-context": {"t": 0.0}, "other authors": {"o": 0.0}}} if base else {}),
        "task_scores": task, "suites": scores, **further,
    }  # fmt: skip


def put(lead, board, cell, **scores):
    lead.cells.save(board.folder / cell.file, record(cell, **scores))


# ---- files


def test_scores_are_packed_and_come_back(lead, tmp_path):
    for scores in ([0, 1, 1, 0], [0.25, 1, 0.3333], [1.0, 0.0], []):
        assert lead.cells.unpacked(lead.cells.packed(scores)) == scores
    assert lead.cells.packed([0, 1.0, 1]) == "011"
    cell = lead.cells.Cell("sst2", "l2 to init", 2e-5, 1)
    made = record(cell, loss=[1.25] * 60)
    lead.cells.save(tmp_path / cell.file, made)
    text = (tmp_path / "sst2" / "l2-to-init.2e-05.1.json").read_text()
    assert json.loads(text) == made and len(text.splitlines()) < 40
    assert lead.cells.scores_of(made, "in-context") == {"t": [1] * 20}
    assert lead.cells.scores_of(made, "language") == {}


def test_methods_have_files_of_their_own_and_three_rates(lead):
    known = lead.leaderboard.methods()
    assert len({lead.cells.Cell("sst2", name, 1e-3).file.lower() for name in known}) == len(known)
    for name, entry in known.items():
        low, middle, high = lead.plans.rates(entry.rate)
        assert low < middle < high, name
        assert "object at 0x" not in entry.words, name
    assert known["lora"].adapter and known["TRL + PEFT CorDA"].adapter and not known["full"].adapter
    assert lead.plans.rates(2e-5) == (2e-5, 5e-5, 1e-4) and lead.plans.rates(3e-2) == (1e-2, 3e-2, 9e-2)


def test_committed_cells_can_be_read(lead):
    board = lead.cells.Board(lead.plans.FOLDER, lead.leaderboard.methods())
    before = board.records(before=True)
    assert len(before) == 105
    for run in (*before, *board.records()):
        assert sum(lead.cells.unpacked(run["task_scores"])) == pytest.approx(
            run["figures"]["task"] * len(run["task_scores"]), abs=0.1
        )
        assert run["suites"].keys() >= {"in-context", "other authors"}


# ---- the choice of a rate


def test_the_rate_with_the_best_validation_score_is_chosen_and_the_lowest_of_equals(lead):
    assert lead.cells.best_rate({1e-4: 0.8, 2e-5: 0.7, 5e-5: 0.8}) == 5e-5


def test_a_choice_reads_no_reported_score_waits_for_all_rates_and_stays(lead, tmp_path):
    board = lead.cells.Board(tmp_path, entries(lead))
    Cell = lead.cells.Cell
    put(lead, board, Cell("sst2", "eaft", 2e-5), validation=0.7, task="1111111111")
    put(lead, board, Cell("sst2", "eaft", 5e-5), validation=0.8, task="0000000000")
    assert board.chosen("eaft") is None and not (tmp_path / "chosen.json").exists()
    put(lead, board, Cell("sst2", "eaft", 1e-4), validation=0.6, task="1111111111")
    assert board.chosen("eaft") == 5e-5
    said = json.loads((tmp_path / "chosen.json").read_text())["eaft"]
    assert said["validation"] == {"2e-05": 0.7, "5e-05": 0.8, "0.0001": 0.6} and len(said["sha"]) == 24
    put(lead, board, Cell("sst2", "eaft", 1e-4), validation=0.9)
    assert lead.cells.Board(tmp_path, entries(lead)).chosen("eaft") == 5e-5


def test_a_rate_that_fails_leaves_the_others(lead, tmp_path):
    board = lead.cells.Board(tmp_path, entries(lead))
    for rate, score in ((2e-5, 0.6), (5e-5, 0.7)):
        put(lead, board, lead.cells.Cell("sst2", "eaft", rate), validation=score)
    board.note(lead.cells.Cell("sst2", "eaft", 1e-4), "the loss is not finite")
    assert board.chosen("eaft") == 5e-5


# ---- many cells


def runner(lead, board, fails=()):
    """Measures nothing: writes the cell, or fails. `ran` has what it was asked for."""
    ran = []

    def one(cell):
        ran.append(cell)
        if (cell.method, cell.rate) in fails:
            raise MemoryError("too much")
        put(lead, board, cell, held="1" * 20, task="01" * 5 if cell.method == "base" else "1" * 10)
        return None

    return one, ran


def test_all_cells_run_once_and_a_new_method_adds_its_own(lead, tmp_path):
    board = lead.cells.Board(tmp_path, {"full": entries(lead)["full"]})
    one, ran = runner(lead, board)
    assert lead.leaderboard.drive(board, board.wanted, one, workers=2) == []
    assert len(ran) == 2 + 6 and len(set(ran)) == 8
    assert {(c.task, c.seed) for c in ran if c.rate == 2e-5} == {
        ("sst2", 0),
        ("sst2", 1),
        ("tickets", 0),
        ("tickets", 1),
    }
    assert [c for c in ran if c.method == "base"] == ran[:2]
    again = lead.cells.Board(tmp_path, entries(lead))
    one, ran = runner(lead, again)
    lead.leaderboard.drive(again, again.wanted, one)
    assert {c.method for c in ran} == {"eaft"} and len(ran) == 6
    assert not again.missing(again.wanted())


def test_a_failing_cell_is_reported_and_stops_no_other(lead, tmp_path, capsys):
    board = lead.cells.Board(tmp_path, entries(lead))
    one, ran = runner(lead, board, fails={("eaft", 5e-5)})
    (bad,) = lead.leaderboard.drive(board, board.wanted, one)
    assert bad.rate == 5e-5 and len(ran) == 2 + 6 + 3  # nothing is chosen without a cell that may come through yet
    assert "sst2, eaft at 5e-05, seed 0: FAILED: MemoryError: too much" in capsys.readouterr().out
    assert json.loads((tmp_path / "failed.json").read_text()) == {str(bad): "MemoryError: too much"}
    later = lead.cells.Board(tmp_path, entries(lead))
    one, ran = runner(lead, later)
    lead.leaderboard.drive(later, later.wanted, one)
    assert ran[0] == bad and len(ran) == 1 + 3 and not json.loads((tmp_path / "failed.json").read_text())


def test_a_cell_that_fails_twice_leaves_the_others(lead, tmp_path):
    for cells in (2 + 6 + 3, 1 + 3):
        board = lead.cells.Board(tmp_path, entries(lead))
        one, ran = runner(lead, board, fails={("eaft", 5e-5)})
        assert len(lead.leaderboard.drive(board, board.wanted, one)) == 1 and len(ran) == cells
    assert board.chosen("eaft") == 2e-5


def test_nothing_starts_without_a_base_or_when_time_is_over(lead, tmp_path):
    board = lead.cells.Board(tmp_path, entries(lead))
    one, ran = runner(lead, board)
    assert lead.leaderboard.drive(board, board.wanted, one, until=0.0) == [] and not ran
    one, ran = runner(lead, board, fails={("base", None)})
    assert len(lead.leaderboard.drive(board, board.wanted, one)) == 2 == len(ran)


def test_the_start_says_what_is_missing_and_how_long_it_takes(lead, tmp_path):
    board = lead.cells.Board(tmp_path, entries(lead))
    assert "14 of 14 cells are missing: no cell was measured" in lead.leaderboard.announce(board, board.wanted(), 2)
    put(lead, board, lead.cells.Cell("sst2", "base"))
    words = lead.leaderboard.announce(board, board.wanted(), 2)
    assert words.startswith("13 of 14 cells are missing: about 0.1 hours with 2 workers")


def test_cells_of_a_plan_that_has_changed_are_named(lead, tmp_path):
    board = lead.cells.Board(tmp_path, entries(lead))
    put(lead, board, lead.cells.Cell("sst2", "eaft", 2e-5), plan="[EAFT]")
    put(lead, board, lead.cells.Cell("sst2", "full", 2e-5), plan="[Replay]")
    assert board.changed() == ["full"]
    put(lead, board, lead.cells.Cell("sst2", "full", 5e-5), plan="[]")
    assert board.changed() == ["full"]  # a newer cell hides none


def test_runs_of_two_plans_have_no_mean(lead, filled):
    cell = lead.cells.Cell("sst2", "full", 2e-5, 1)
    put(lead, filled, cell, task="0" * 10, plan="[Replay]")
    full = next(r for r in lead.table.rows_of(filled) if r.method == "full")
    assert len(full.runs) == 1 and full.accuracy().value == 1.0 and not full.stale
    filled.methods["full"] = lead.cells.Entry("[LoRA]", 2e-5)
    for rate in (2e-5, 5e-5, 1e-4):
        put(lead, filled, lead.cells.Cell("sst2", "full", rate), plan="[]", validation=rate)
    assert any(r.name == "full (an earlier plan)" for r in lead.table.rows_of(filled))


def test_cells_of_two_models_do_not_mix(lead, tmp_path):
    board = lead.cells.Board(tmp_path, entries(lead))
    put(lead, board, lead.cells.Cell("sst2", "base"))
    with pytest.raises(SystemExit, match=r"holds cells of smollm2-135m, and this run is of other/model.*--folder"):
        lead.leaderboard.main(["run", "--folder", str(tmp_path), "--model", "other/model"])


def test_only_and_the_best_on_all_tasks(lead, tmp_path):
    board = lead.cells.Board(tmp_path, entries(lead))
    one, _ = runner(lead, board)
    assert {c.method for c in board.wanted(["eaft"])} == {"base", "eaft"}
    lead.leaderboard.drive(board, board.wanted, one)
    best = lead.table.best(board)
    assert best == ["full", "eaft"]
    wide = [c for c in board.wanted([], best) if c.task in ("rte", "agnews", "talk")]
    assert len(wide) == 3 + 2 * 3 * 3 and all(c.rate == 2e-5 for c in wide if c.method != "base")
    with pytest.raises(SystemExit, match="no method 'luck'"):
        lead.leaderboard.main(["run", "--only", "luck", "--folder", str(tmp_path)])


# ---- the table


@pytest.fixture
def filled(lead, tmp_path):
    """full learns all and keeps half, eaft learns half and keeps all; an earlier row of another method."""
    board = lead.cells.Board(tmp_path / "cells", entries(lead))
    Cell = lead.cells.Cell
    put(lead, board, Cell("sst2", "base"), task="1111100000", held="1" * 20)
    for rate, score in ((2e-5, 0.9), (5e-5, 0.8), (1e-4, 0.7)):
        put(lead, board, Cell("sst2", "full", rate), validation=score, task="1" * 10, held="10" * 10, kl=1.0)
        put(lead, board, Cell("sst2", "eaft", rate), validation=score, task="11111100001"[:10], kl=0.01)
    old = {"cost": {}, "made": {"date": "2025-12-24", "commit": "old", "machine": None}}
    for cell, extra in ((Cell("sst2", "base"), {}), (Cell("sst2", "uds", 2e-5), old)):
        made = record(cell, task="1" * 10, **extra)
        made["figures"] = {"task": 1.0}
        lead.cells.save(board.folder / "before" / cell.file, made)
    return board


def test_rows_are_the_chosen_rates_in_order_of_merit_and_what_was_before(lead, filled):
    rows = lead.table.rows_of(filled)
    assert [(r.name, r.rate) for r in rows] == [("full", 2e-5), ("eaft", 2e-5), ("uds (before)", 2e-5)]
    full, eaft, uds = rows
    assert full.kept("in-context").value == pytest.approx(0.5) and full.accuracy().value == 1.0
    assert full.kept("language") is None and lead.table.figure_kept(full, "other authors") == pytest.approx(0.5)
    assert full.within() == (0, 2) and eaft.within() == (2, 2)
    assert lead.table.merit(rows, full) == pytest.approx(0.5) and lead.table.merit(rows, eaft) == pytest.approx(0.2)
    assert uds.peak() is None and uds.figure("kl") is None


def test_a_method_at_its_own_rate_alone_is_shown_as_such_and_decides_nothing(lead, tmp_path):
    board = lead.cells.Board(tmp_path, entries(lead))
    Cell = lead.cells.Cell
    first = [c for c in board.wanted(own_first=True) if c.task == "sst2"][:4]
    assert first[1:3] == [Cell("sst2", "full", 2e-5), Cell("sst2", "eaft", 2e-5)] and first[3].rate == 5e-5
    assert sorted(map(str, board.wanted(own_first=True))) == sorted(map(str, board.wanted()))
    put(lead, board, Cell("sst2", "base"))
    put(lead, board, Cell("sst2", "eaft", 2e-5))
    put(lead, board, Cell("sst2", "full", 5e-5))  # not its own
    assert [r.name for r in lead.table.rows_of(board)] == ["eaft (one rate)"]
    assert lead.table.best(board) == [] and not (tmp_path / "chosen.json").exists()


def test_the_page_has_the_best_first_and_says_what_is_not_measured(lead, filled, tmp_path):
    filled.note(lead.cells.Cell("sst2", "eaft", 2e-5, 1), "out of memory")
    docs = tmp_path / "docs"
    docs.mkdir()
    (tmp_path / "README.md").write_text("a\n<!-- leaderboard -->\nold\n<!-- end of leaderboard -->\nb\n")
    lead.table.write(filled, docs)
    text = (docs / "leaderboard.md").read_text()
    assert text.index("| full | 2e-05 | 1.000 | 0.50 | 0.50 | 0 % of 2 | 1.000 | 1.00 | 0.50 |") < text.index(
        "| eaft |"
    )
    assert "| uds (before) | 2e-05 | 1 | 1.000" in text and "| not measured | 2025-12-24 old |" in text
    assert "Not measured in any of these rows: language, knowledge" in text
    assert "sst2, eaft at 2e-05, seed 1 (out of memory)" in text and "1.00 GiB | 2026-01-02 abc A |" in text
    assert "| eaft | 2e-05 (at an edge) | 2e-05: 0.900, 5e-05: 0.800, 0.0001: 0.700 |" in text and "- A: M" in text
    assert (docs / "leaderboard.png").stat().st_size > 1000 and (docs / "leaderboard-kl.png").is_file()
    assert "| full fine-tuning | 1.00 | 0.50 (" in (tmp_path / "README.md").read_text()


def test_the_page_says_whether_the_kl_predicts(lead):
    noise = random.Random(0)
    aligned = [("sst2", f"m{n // 2}", 0.1 * n, n + noise.random()) for n in range(20)]
    found = lead.table.rank_correlation(aligned)
    assert found.value == pytest.approx(1.0) and "it predicts the share" in lead.table.says(found)
    chaos = [("sst2", f"m{n // 2}", 0.1 * n, noise.random()) for n in range(20)]
    assert "does not predict" in lead.table.says(lead.table.rank_correlation(chaos))
    assert lead.table.rank_correlation(aligned[:8]) is None


# ---- one cell


@pytest.fixture(scope="module")
def lab(lead, world):
    """The tiny model, a made SST-2 and a made task of other authors."""
    shared = world.folder / "shared"
    (shared / "icl").mkdir(parents=True)
    (shared / "text" / "sst2").mkdir(parents=True)
    pairs = [{"input": f"word {n}", "output": f"{n}"} for n in range(12)]
    (shared / "icl" / "count.json").write_text(json.dumps(pairs))
    for split, count in (("train", 40), ("test", 6)):
        rows = [{"sentence": f"{split} text {n}", "label": ("Good", "Bad")[n % 2]} for n in range(count)]
        lines = "\n".join(json.dumps(r) for r in rows)
        (shared / "text" / "sst2" / f"{split}.jsonl").write_text(lines)
    small = {"suites": {"in-context": 1, "language": 1}, "more": {"format": 1}, "shared": 2, "shots": 1}
    size = lead.plans.Size(steps=2, batch=4, validation=8, divergence=4, **small)
    return lead.cell.Lab(shared, str(world.base), size)


def test_a_cell_from_end_to_end(lead, lab, tmp_path):
    board = lead.cells.Board(tmp_path, {"eaft": entries(lead)["eaft"]})
    base, cell = lead.cells.Cell("sst2", "base"), lead.cells.Cell("sst2", "eaft", 1e-3)
    for one in (base, cell):
        lead.cells.save(board.folder / one.file, lead.cell.run(one, lab, "words"))
    before, found = board.read(base), board.read(cell)
    assert len(before["task_scores"]) == len(found["task_scores"]) == 6
    assert before["suites"].keys() - found["suites"].keys() == {"format"}
    assert found["suites"].keys() == {"in-context", "language", "other authors"} == found["figures"].keys() - {
        "task", "validation", "kl"}  # fmt: skip
    assert 0 < found["figures"]["kl"] < 1 and "kl" not in before["figures"]
    assert found["cost"]["peak_bytes"] > 1e8 and found["cost"]["train_cpu_seconds"] > 0
    assert found["made"]["commit"] and "1 of" in found["made"]["machine"]
    assert len(found["loss"]) == 2 and (board.folder / cell.file).stat().st_size < 6000


def test_validation_rows_do_not_train(lead, lab):
    tokenizer = models.load(lab.model)[1]
    rows = lead.cell.material("sst2", lab, tokenizer)
    assert len(rows.validation) == 8 and len(rows.train) == len(rows.tokens) == 32
    assert not {identity(r) for r in rows.train} & {identity(r) for r in rows.validation}


def test_the_base_is_no_distance_from_itself(lead, lab):
    from holdfast.data.tokens import tokenize

    model, tokenizer = models.load(lab.model)
    rows = [tokenize(r, tokenizer, 512) for r in lead.cell.material("sst2", lab, tokenizer).test]
    assert lead.cell.divergence(model, model, rows) == pytest.approx(0, abs=1e-6)
    other, soft = models.load(lab.model)[0], model.get_input_embeddings().weight[:3].detach()
    assert lead.cell.divergence(model, other, rows, soft) > 1e-5  # a prompt before the task's rows, for this once
    assert lead.cell.divergence(model, other, rows) == pytest.approx(0, abs=1e-6)


def test_methods_that_only_merge_share_a_training(lead, lab, tmp_path):
    """The same figures as with a training of its own, and the cost of the one that was shared."""
    cells = [lead.cells.Cell("sst2", name, 3e-2) for name in ("wise-ft", "task arithmetic")]
    alone = [lead.cell.run(c, lab, "") for c in cells]
    sharing = replace(lab, trained=tmp_path)
    shared = [lead.cell.run(c, sharing, "") for c in cells]
    assert [f.name for f in tmp_path.iterdir()] == ["sst2.0.03.0.safetensors"]
    for a, b in zip(alone, shared, strict=True):
        assert a.keys() == b.keys() and all(a[k] == b[k] for k in a.keys() - {"cost", "made"})
        assert a["cost"].keys() == b["cost"].keys()
    first, second = (r["cost"]["train_seconds"] for r in shared)
    assert second >= first - 0.2 and alone[0]["figures"] != alone[1]["figures"]


def test_conversations_ask_for_the_first_and_for_the_last_answer(lead, lab, tmp_path):
    tokenizer = models.load(lab.model)[1]
    test, train = (lead.talk.rows(split, tokenizer, tmp_path) for split in ("test", "train"))
    assert lead.cell.read("talk", lab.shared, tokenizer)[3] == ()  # no labels: the text must be exact
    assert "Shall I pass it on?" in test[1].completion and "Shall I pass it on?" in test[0].prompt
    assert len(train[0].turns) == 2 and not test[0].turns
    asked = {r.completion for r in test[::2]}
    assert len(asked) > 5 * len(lead.talk.REPLIES) - 5


LATER = pytest.mark.long  # the others go the same ways
PEERS = {"full": [LATER], "LoRA": [LATER], "10 % general data": [], "OSF": [], "CorDA": []}


@pytest.mark.parametrize("end", [pytest.param(name, marks=marks) for name, marks in PEERS.items()])
def test_peers_train(lead, lab, end):
    """Every recipe moves the model and gives it back plain enough to be asked."""
    pytest.importorskip("trl")
    (name,) = [n for n in lead.peers.PEERS if n.endswith(end)]
    assert len(PEERS) == len(lead.peers.PEERS)
    model, tokenizer = models.load(lab.model)
    rows = lead.cell.material("sst2", lab, tokenizer)
    tuned = lead.peers.train(name, model, tokenizer, rows.tokens, 1e-3, 0, 2, 4)
    base = models.load(lab.model)[0]
    assert tuned.dtype == base.dtype and not tuned.training
    assert 1e-9 < lead.cell.divergence(base, tuned, rows.tokens[:4]) < 1


@LATER
def test_a_cell_that_fails_in_its_process_says_why(lead, lab, tmp_path):
    said = {"shared": tmp_path, "folder": tmp_path, "model": lab.model, "workers": 1}
    run_one = lead.leaderboard.in_process(type("Args", (), said))
    assert "rte/train.jsonl" in run_one(lead.cells.Cell("rte", "base"))
    assert not list(tmp_path.iterdir())
