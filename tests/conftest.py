"""Fixtures over the pieces of `tiny`."""

import copy
import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side, and what they start: a thread each, set before torch
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tiny import build_model, build_tokenizer, ticket_rows

APART = ("test_contract.py", "test_pairs.py", "test_tokens.py", "test_recipe.py", "test_floors.py")


def pytest_xdist_make_scheduler(config, log):
    """A file stays in one worker, so that what it starts once (processes, a small world) is started once. The files
    of APART start nothing dear and are many tests: they fill up what is left.

    Our own rule, since pytest 9.2 no longer lets xdist 3.8 see the groups of `--dist loadgroup`.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return nodeid if file.endswith(APART) else file

    return ByFile(config, log)


def pytest_collection_finish(session):
    """What collecting made stays to the end: trainers collect garbage at every start and need not look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model():
    """tiny_model(tied=True, layers=2) gives a fresh copy of the same random model every time."""
    cache: dict[tuple[bool, int], torch.nn.Module] = {}

    def fresh(tied: bool = True, layers: int = 2):
        if (tied, layers) not in cache:
            cache[tied, layers] = build_model(tied, layers)
        return copy.deepcopy(cache[tied, layers])

    return fresh


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def rows():
    return ticket_rows()


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model, tokenizer, rows):
    """The tiny model and tickets on disk, and a home of Holdfast of the file's own."""
    from tiny_run import make_world

    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOLDFAST_HOME", str(folder / "home"))
        yield make_world(folder, tiny_model(), tokenizer, rows)


@pytest.fixture(scope="session")
def wanted():
    """wanted(request, argument) -> {(test, value of that argument or None)} of the selected tests of this file that
    ask for the fixture. What starts processes does with it only what `pytest -k NAME` will look at."""

    def values(request, argument):
        here = [i for i in request.session.items if i.path == request.path]
        asking = [i for i in here if request.fixturename in getattr(i, "fixturenames", ())]
        return {(i.originalname, i.callspec.params.get(argument) if hasattr(i, "callspec") else None) for i in asking}

    return values
