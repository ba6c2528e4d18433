"""The leaderboard: what each method learns and what it keeps. Resumable: a small file a run.

    python benchmarks/leaderboard.py run --shared ../shared/data             # trains what is missing: hours
    python benchmarks/leaderboard.py run --only eaft --only "l2 to init"     # of these methods alone
    python benchmarks/leaderboard.py run --minutes 60                        # starts no cell after an hour
    python benchmarks/leaderboard.py table                                   # docs/leaderboard.md and its plots

Every method trains on SST-2 at three learning rates with one seed; validation rows choose one of them; at that rate
come a second seed and two seeds on the shipped tickets. The ten best and the plain runs are measured on RTE, AG News
and made conversations too, with three seeds. To measure a cell again, remove its file (for another choice of rate also
its line of chosen.json).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import leaderboard_cell
import leaderboard_table
from holdfast.errors import HoldfastError
from leaderboard_cell import Lab
from leaderboard_cells import BASE, MODEL, WIDE_SEEDS, Board, Cell, Entry, clock_after, save
from leaderboard_peers import PEERS
from leaderboard_plans import FOLDER, HERE, PLAIN, SHARED, WIDE, plans

DOCS = HERE.parent / "docs"


def methods() -> dict[str, Entry]:
    """All methods and recipes by name."""
    from holdfast.plan import Plan

    own = {name: Entry(repr(of), rate, Plan(of).trains_new) for name, (of, rate) in plans().items()}
    return {**own, **{name: Entry(name, peer.rate, peer.adapter) for name, peer in PEERS.items()}}


# ---- many cells


def drive(
    board: Board,
    wanted: Callable[[], Sequence[Cell]],
    run_one: Callable[[Cell], str | None],
    workers: int = 1,
    until: float = float("inf"),
) -> list[Cell]:
    """Run missing cells, several at a time, until none can be run or the clock shows `until`.

    run_one: what is wrong with a cell in words, or None. Returns the cells that failed.
    """
    turn, busy, failed = threading.Condition(), list[Cell](), list[Cell]()

    def work() -> None:
        while time.monotonic() < until:
            with turn:
                cell = board.ready(wanted(), busy)
                if cell is None and not busy:
                    return
                if cell is None:  # what others measure now may decide what comes next
                    turn.wait()
                    continue
                busy.append(cell)
            begun = time.monotonic()
            try:
                error = run_one(cell)
            except Exception as e:  # one broken cell must not end the night
                error = f"{type(e).__name__}: {e}"
            with turn:
                board.note(cell, error)
                failed.extend([cell] * (error is not None))
                busy.remove(cell)
                turn.notify_all()
            how = f"{time.monotonic() - begun:.0f} s" if error is None else f"FAILED: {error}"
            print(f"{time.strftime('%H:%M:%S')} {cell}: {how}", flush=True)

    crew = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for one in crew:
        one.start()
    for one in crew:
        one.join()
    return failed


def in_process(args: argparse.Namespace, trained: Path | None = None) -> Callable[[Cell], str | None]:
    """A cell in a process of its own: whatever happens to it, no other cell sees.

    They are forked from one that has imported everything, which takes longer than many a training here.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // args.workers)))
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["leaderboard_warm"])
    lab = Lab(args.shared, args.model, trained=trained)

    def run_one(cell: Cell) -> str | None:
        hears, says = fork.Pipe(duplex=False)
        child = fork.Process(target=one_cell, args=(cell, lab, args.folder, says))
        child.start()
        says.close()
        try:
            error = hears.recv()
        except EOFError:  # it was killed
            error = ""
        child.join()
        return error if error or child.exitcode == 0 else f"it ended with {child.exitcode}"

    return run_one


def one_cell(cell: Cell, lab: Lab, folder: Path, says: Connection) -> None:
    """Run one cell and write its file; says what is wrong, or None."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    words = "" if cell.method == BASE else methods()[cell.method].words
    try:
        save(folder / cell.file, leaderboard_cell.run(cell, lab, words))
        says.send(None)
    except HoldfastError as e:
        says.send(e.what)
    except Exception as e:
        traceback.print_exc()
        says.send(f"{type(e).__name__}: {e}"[:300])


def announce(board: Board, cells: Sequence[Cell], workers: int) -> str:
    """How many cells are missing and how long they take, in words."""
    missing = board.missing(cells)
    seconds = board.seconds(missing)
    long = "no cell was measured so far, so nobody knows how long they take"
    if seconds is not None:
        long = f"about {seconds / workers / 3600:.1f} hours with {workers} workers, by the times measured so far"
    known = sum(c.task in WIDE and c.method != BASE for c in cells)
    later = len(WIDE) * WIDE_SEEDS * (leaderboard_table.TEN + len(PLAIN)) - known
    further = f" Up to {later} more come when the best rows are known." if later > 0 else ""
    return f"{len(missing)} of {len(cells)} cells are missing: {long}.{further}"


def run(args: argparse.Namespace) -> int:
    """Run what is missing; 1 if a cell failed."""
    board = Board(args.folder, methods())
    unknown = [n for n in args.only if n not in board.methods]
    if unknown:
        raise SystemExit(
            f"There is no method {unknown[0]!r} in leaderboard_plans.py. Known: {', '.join(board.order)}."
        )

    if others := board.models() - {args.model}:
        said = f"{args.folder} holds cells of {', '.join(sorted(others))}, and this run is of {args.model}."
        raise SystemExit(f"{said} Give it a --folder of its own.")

    def wanted() -> list[Cell]:
        return board.wanted(args.only, leaderboard_table.best(board), args.best_first, args.own_first)

    print(announce(board, wanted(), args.workers), flush=True)
    if changed := board.changed():
        print(f"Measured with settings that have changed since (remove their files to measure again): {changed}")
    with tempfile.TemporaryDirectory(prefix="holdfast-trained-") as trained:  # some 540 MB a task, rate and seed
        failed = drive(board, wanted, in_process(args, Path(trained)), args.workers, clock_after(args.minutes))
    left = board.missing(wanted())
    print(f"{len(left)} cells are left, {len(failed)} failed{': ' if failed else ''}{'; '.join(map(str, failed))}.")
    return int(bool(failed))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--shared", type=Path, default=SHARED, help="a folder with text/<task> and icl")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the cells")
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each: faster than one of two")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this method; may be repeated")
    parser.add_argument("--minutes", type=float, default=None, help="start no cell after so many")
    parser.add_argument("--best-first", action="store_true", help="the best so far on all tasks, before other cells")
    parser.add_argument("--own-first", action="store_true", help="every method at its own rate, before other rates")
    args = parser.parse_args(argv)
    if args.what == "table":
        leaderboard_table.write(Board(args.folder, methods()), args.docs)
        return 0
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
