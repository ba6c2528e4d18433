"""What a command exits with: 1 is a finding and never an error; a fault of ours is 70, its traceback in a file."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from functools import partial

import pytest
import safetensors
import torch

from holdfast import cli
from holdfast.errors import ModelError
from holdfast.verbs import check as checking
from holdfast.verbs import ending
from tiny_run import make_world, recipe_data, write_recipe

COMMANDS = {  # a call of each command, and the piece below it that fails
    "tune": (["tune", "RECIPE"], "holdfast.verbs.tune.go"),
    "explain": (["explain", "RECIPE"], "holdfast.runs.job.checked"),
    "measure": (["measure", "x"], "holdfast.verbs.measure.measure"),
    "check": (["check", "x", "y"], "holdfast.verbs.check.check"),
    "suites": (["suites", "in-context", "--export", "x"], "holdfast.models.resolve"),
    "methods": (["methods"], "holdfast.methods.all_methods"),
    "init": (["init", "x.jsonl"], "holdfast.verbs.init.init"),
    "recipe": (["recipe"], "holdfast.recipe.recipe_schema"),
    "doctor": (["doctor"], "holdfast.versions.versions"),
}


class OfALibrary(Exception):
    """An error of a kind that we do not know."""


@pytest.fixture
def ended(monkeypatch, capsys, tmp_path):
    """ended(words): (exit code, stderr) of one command in this process, with a cache folder of its own."""
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["holdfast", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert isinstance(stop.value.code, int)
        return stop.value.code, capsys.readouterr().err

    return run


def failing(monkeypatch, where: str, error: BaseException) -> None:
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(where, fail)


def call(name: str, tmp_path) -> list[str]:
    (tmp_path / "r.yaml").write_text("model: {model_name_or_path: x}\ndata: {train: t.jsonl}\n"
                                     f"training: {{output_dir: {tmp_path / 'run'}}}\n")  # fmt: skip
    return [str(tmp_path / "r.yaml") if w == "RECIPE" else w for w in COMMANDS[name][0]]


def crashes(tmp_path):
    return sorted((tmp_path / "home" / "crashes").glob("*"))


# ---- a fault


@pytest.mark.parametrize("name", COMMANDS)
def test_a_fault_of_any_command_is_70_with_its_traceback_in_a_file(ended, monkeypatch, tmp_path, name):
    failing(monkeypatch, COMMANDS[name][1], OfALibrary("shape\nmismatch"))
    code, told = ended(*call(name, tmp_path))
    assert code == 70
    (file,) = crashes(tmp_path)
    first, second = told.splitlines()
    failed = f"Error: holdfast {name} failed (OfALibrary: shape mismatch)"
    assert first == f"{failed}; this is a fault of Holdfast, not yours."
    assert str(file) in second and "holdfast doctor" in second
    text = file.read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in text and "OfALibrary: shape\nmismatch" in text and name in text


def deep() -> None:
    deep()


def too_deep() -> RecursionError:
    try:
        deep()
    except RecursionError as e:
        return e
    raise AssertionError


@pytest.mark.parametrize(
    "error",
    [SystemExit(1), SystemExit(0), SystemExit("bye"), EOFError("input"), RuntimeError("shape"), KeyError("k"),
     AssertionError(), UserWarning("as an error"), GeneratorExit(), torch.linalg.LinAlgError("singular"),
     safetensors.SafetensorError("header"), StopIteration(), too_deep()],
    ids=lambda e: f"{type(e).__name__} {getattr(e, 'code', '')}",
)  # fmt: skip
def test_no_error_looks_like_a_verdict(ended, monkeypatch, tmp_path, error):
    """A library that calls sys.exit(1) has not found a loss, and one that calls sys.exit(0) has not shown none."""
    failing(monkeypatch, "holdfast.verbs.check.check", error)
    code, told = ended("check", "x", "y")
    assert code == 70 and "Traceback" not in told and len(crashes(tmp_path)) == 1
    if isinstance(error, SystemExit):
        assert f"a library ended the program with exit code {error.code}" in told


def test_debug_shows_the_traceback_and_exits_the_same(ended, monkeypatch, tmp_path):
    failing(monkeypatch, "holdfast.verbs.check.check", OfALibrary("shape"))
    code, told = ended("check", "x", "y", "--debug")
    assert code == 70 and "Traceback" in told and "OfALibrary: shape" in told and not crashes(tmp_path)
    failing(monkeypatch, "holdfast.verbs.check.check", ModelError("No model.", "Name one."))
    code, told = ended("check", "x", "y", "--debug")
    assert code == 2 and "Traceback" in told and "Error: No model.\n       Name one." in told


def test_a_traceback_that_cannot_be_written_is_printed(ended, monkeypatch, tmp_path):
    failing(monkeypatch, "holdfast.verbs.check.check", OfALibrary("shape"))
    (tmp_path / "home").write_text("in the way")
    code, told = ended("check", "x", "y")
    assert code == 70 and "could not be written" in told and "Traceback" in told and "OfALibrary: shape" in told


def test_a_verdict_keeps_its_code(ended, monkeypatch):
    monkeypatch.setattr("holdfast.report.terminal.show", lambda *_: None)
    for status, code in {"kept": 0, "lost": 1, "unclear": 3, "not checked": 3}.items():
        found = {"verdict": {"status": status}, "diagnosis": None}
        monkeypatch.setattr("holdfast.verbs.check.check", lambda *_a, found=found, **_k: found)
        assert ended("check", "x", "y") == (code, "")


def test_wrong_words_stay_2(ended):
    for words in (["check", "x"], ["check", "x", "y", "--limit", "many"], ["chek"], ["check", "x", "y", "--nope"],
                  ["check", "x", "y", "--batch-tokens", "0"]):  # fmt: skip
        assert ended(*words)[0] == 2, words


# ---- mistakes, memory, Ctrl-C


def loading(error: BaseException) -> ModelError:
    """As `models.load` reports what went wrong below it."""
    out = ModelError("Cannot load the model.", "Check that the folder is whole.")
    out.__cause__ = error
    return out


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    safetensors.SafetensorError("Error while mapping: Cannot allocate memory (os error 12)"),
    loading(torch.OutOfMemoryError("CUDA out of memory")),
    loading(MemoryError()),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda e: f"{type(e).__name__} {str(e)[:20]}")
@pytest.mark.parametrize("name", ["tune", "explain", "measure", "check"])
def test_memory_has_a_cure_that_fits_the_command(ended, monkeypatch, tmp_path, name, error):
    failing(monkeypatch, COMMANDS[name][1], error)
    code, told = ended(*call(name, tmp_path))
    assert code == 2 and "There is not enough memory for this run." in told and not crashes(tmp_path)
    assert ("per_device_train_batch_size" in told) == (name == "tune")
    assert ("--batch-tokens" in told) == (name in ("measure", "check")) and ("--why" in told) == (name == "check")


def test_a_row_that_speaks_of_memory_is_no_lack_of_it(ended, monkeypatch):
    failing(monkeypatch, "holdfast.verbs.check.check", ModelError("The label 'out of memory' is new.", "Mend it."))
    assert ended("check", "x", "y") == (2, "Error: The label 'out of memory' is new.\n       Mend it.\n")


@pytest.mark.parametrize(
    ("error", "words"),
    [(PermissionError(errno.EACCES, "Permission denied", "/data/x"), "Permission denied (/data/x)"),
     (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Check the network"),
     (TimeoutError("no answer"), "Check the network"),
     (BrokenPipeError(errno.EPIPE, "Broken pipe"), "A connection broke")],
)  # fmt: skip
def test_the_system_says_no(ended, monkeypatch, error, words):
    """A broken pipe too, where it is not our own output that nobody reads."""
    failing(monkeypatch, "holdfast.verbs.check.check", error)
    code, told = ended("check", "x", "y")
    assert code == 2 and words in told


@pytest.mark.parametrize("name", ["tune", "check"])
def test_ctrl_c(ended, monkeypatch, tmp_path, name):
    failing(monkeypatch, COMMANDS[name][1], KeyboardInterrupt())
    code, told = ended(*call(name, tmp_path))
    assert code == 130 and told.startswith("Stopped.") and ("goes on" in told) == (name == "tune")


def test_a_process_that_others_left_alone(ended, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:5555")
    failing(monkeypatch, "holdfast.engine.processes.start", error)
    code, told = ended("check", "x", "y")
    assert code == 70 and "another process of this run has ended" in told and "fault of Holdfast" not in told


# ---- as a pipeline sees it

HOLDFAST = (sys.executable, "-m", "holdfast.cli")
FAILING = (  # the one command that loads nothing heavy
    "import sys; from holdfast import cli, recipe\n"
    "def fail(*a, **k): {0}\n"
    "recipe.recipe_schema = fail; sys.argv = ['holdfast', 'recipe']; cli.main()"
)


def shell(line: str, tmp_path, **more: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "HOLDFAST_HOME": str(tmp_path / "home"), "PY": sys.executable, "COLUMNS": "100", **more}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=env, timeout=120)


def test_a_fault_from_outside(tmp_path):
    told = shell(f'"$PY" -c "{FAILING.format("raise ZeroDivisionError(3)")}"', tmp_path)
    assert told.returncode == 70 and "ZeroDivisionError" in told.stderr and len(crashes(tmp_path)) == 1
    assert shell(f'"$PY" -c "{FAILING.format("sys.exit(1)")}"', tmp_path).returncode == 70


def test_a_module_is_the_command(tmp_path):
    told = shell('"$PY" -m holdfast check nobody/nothing nobody/nothing', tmp_path)
    assert told.returncode == 2 and told.stderr.startswith("Error: No model 'nobody/nothing'")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    assert shell(f'"$PY" -m holdfast.cli tune {tmp_path}/bad.yaml', tmp_path).returncode in (2, 70)


@pytest.mark.parametrize("words", ["suites", "recipe", "--help", "methods ICLAnchor"])
def test_a_reader_that_leaves(tmp_path, words):
    """`holdfast suites | head -1`: quiet, and no exit code of a verdict."""
    script = (
        f"import sys; sys.argv = ['holdfast', *{words.split()!r}]; sys.stdin.read()\n"
        "from holdfast import cli; cli.main()"
    )
    job = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)  # fmt: skip
    job.stdout.close()  # before a word is written, so that nothing depends on who is faster
    job.stdin.close()
    assert job.wait(60) == 141 and job.stderr.read() == b""


def test_nobody_listens_at_all(tmp_path):
    fail = FAILING.format("raise ZeroDivisionError(3)")
    for streams in (">&- 2>&-", "> /dev/full 2> /dev/full", "2>&1 | true; exit ${PIPESTATUS[0]}"):
        assert shell(f'"$PY" -c "{fail}" {streams}', tmp_path).returncode in (70, 141), streams
    told = shell('"$PY" -m holdfast.cli recipe > /dev/full', tmp_path)
    assert told.returncode == 2 and "No space left on device" in told.stderr


def test_a_disk_that_is_full_below_a_library_in_rust(capsys):
    """tokenizers and safetensors raise errors of their own kinds."""
    assert ending.end(Exception("No space left on device (os error 28)"), "repair", False) == 2
    assert "No space left on device (no file named)" in capsys.readouterr().err


def test_letters_that_a_terminal_lacks(tmp_path):
    script = FAILING.format("print(chr(0x4f60)); sys.stdout.flush(); raise KeyboardInterrupt")
    told = shell(f'"$PY" -c "{script}"', tmp_path, PYTHONIOENCODING="ascii")
    assert told.returncode == 130 and "\\u4f60" in told.stdout


def test_a_killed_process_is_not_lost(tmp_path):
    script = FAILING.format("print('there', flush=True); import time; time.sleep(60)")
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGHUP):
        heard = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored here too
        job = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, preexec_fn=heard)
        assert job.stdout.readline() == b"there\n"
        job.send_signal(number)
        assert job.wait(30) == -number


# ---- several processes


@pytest.fixture(scope="module")
def world(tiny_model, tokenizer, rows, tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("exit"), tiny_model(), tokenizer, rows)


@pytest.mark.long  # test_processes starts the command so too
def test_under_torchrun_the_file_decides(world, tmp_path):
    """torchrun makes 1 of every code but 0. A report of an earlier check is gone once a new one has begun."""
    out = tmp_path / "report.json"
    out.write_text('{"verdict": {"status": "kept"}}')
    run = f'"$PY" -m torch.distributed.run --nproc-per-node 2 -m holdfast.cli check {world.base} {{}} --out {out} ' \
          "--suite in-context --limit 2 --num-fewshot 1"  # fmt: skip
    told = shell(run.format(world.folder / "nothing"), tmp_path, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    assert told.returncode == 1 and "No model" in told.stderr
    assert not out.exists()


def test_alone_an_older_report_stays_until_there_is_a_new_one(ended, world, tmp_path):
    out = tmp_path / "report.json"
    out.write_text("old")
    assert ended("check", world.base, world.folder / "nothing", "--out", out)[0] == 2
    assert out.read_text() == "old"


@pytest.mark.parametrize("name", ["report.pdf", "folder"])
def test_a_report_that_cannot_be_is_refused_before_any_work(ended, monkeypatch, tmp_path, name):
    (tmp_path / "folder").mkdir()
    failing(monkeypatch, "holdfast.verbs.check.check", AssertionError("too late"))
    code, told = ended("check", "x", "y", "--out", tmp_path / name)
    assert code == 2 and name in told


def test_a_mistake_of_one_process_alone_waits_for_the_first(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "1")
    assert ending.end(ModelError("No.", ""), "check", False) == 2 and slept == [3]
    monkeypatch.setenv("RANK", "0")
    assert ending.end(ModelError("No.", ""), "check", False) == 2 and slept == [3]


# ---- fewer tokens in a forward


def test_batch_tokens_reach_the_scorer_and_the_cache_keeps_them_apart(ended, world, monkeypatch):
    from holdfast.measure.scorer import Scorer

    seen, alone, plain = [], [], Scorer.__init__

    def spy(self, *args, **options):
        if "progress" in options:  # not the small tree on which a model is tried
            seen.append(options["batch_tokens"])
            alone.append(options["invariant"])
        plain(self, *args, **options)

    monkeypatch.setattr(Scorer, "__init__", spy)
    words = ["measure", world.base, "--suite", "in-context", "--limit", 2, "--num-fewshot", 1]
    for more in (["--batch-tokens", 64], ["--batch-tokens", 64], []):
        assert ended(*words, *more)[0] == 0
    assert seen == [64, 2048]  # the second is read from the cache, the third is not
    for more in (["--batch-tokens", 64], ["--batch-tokens", 32], []):
        assert ended(*words, "--invariant", *more)[0] == 0
    assert alone == [False, False, True]  # of all batch_tokens one is as good as the other


def test_an_invariant_run_measures_the_same_bits_whatever_batch_tokens_is(ended, world, tmp_path):
    found, training = [], {"max_steps": 1, "save_steps": 1}
    for n in (2048, 24):
        out = tmp_path / str(n)
        data = recipe_data(world, out, training=training, measure={"invariant": True, "batch_tokens": n})
        assert ended("tune", write_recipe(tmp_path / f"{n}.yaml", data))[0] in (0, 1, 3)
        found.append(json.loads((out / "after.json").read_text()))  # of the tuned model: the cache has none of it
    assert found[0] == found[1] and found[0]["abilities"][0]["invariant"]


def test_generation_takes_smaller_batches_too():
    from holdfast.measure.generate import BATCH, batch_for

    assert [batch_for(n) for n in (1, 64, 1024, 2048, 1 << 20)] == [1, 1, BATCH // 2, BATCH, BATCH]
    assert {batch_for(n, invariant=True) for n in (1, 2048, 1 << 20)} == {1}


def test_a_recipe_that_crashes_leaves_its_folder_to_the_next_try(ended, world, tmp_path, monkeypatch):
    path = write_recipe(tmp_path / "r.yaml", recipe_data(world, tmp_path / "run", training={"max_steps": 1}))
    with monkeypatch.context() as patch:
        failing(patch, "holdfast.hosts.plain.train", OfALibrary("shape"))
        assert ended("tune", path)[0] == 70
    assert ended("tune", path)[0] == 0


def test_warnings_as_errors_are_no_verdict(ended, monkeypatch):
    def warned(*_args, **_options):
        warnings.warn("of a library", FutureWarning, stacklevel=1)
        return {"verdict": {"status": "kept"}, "diagnosis": None}

    monkeypatch.setattr(checking, "check", warned)
    monkeypatch.setattr("holdfast.report.terminal.show", lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ended("check", "x", "y", "--debug")[0] == 70
    with warnings.catch_warnings():
        assert ended("check", "x", "y")[0] == 0
