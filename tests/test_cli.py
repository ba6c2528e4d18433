"""The command line from outside: what it imports, prints and accepts."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import typer.main
from rich.console import Console

from holdfast import __version__, cli
from holdfast.report.progress import Bars, Lines, progress_on
from tiny_run import make_world, recipe_data, write_recipe

OPTIONS = {  # frozen: settings of a method belong in a recipe, never here
    "tune": ["recipe", "--seeds", "--keep", "--set", "--debug"],
    "explain": ["recipe", "--set", "--rows", "--debug"],
    "measure": ["model", "--revision", "--suite", "--num-fewshot", "--limit", "--labels", "--batch-tokens",
                "--invariant", "--out", "--trust-remote-code", "--debug"],
    "check": ["base", "tuned", "--keep", "--suite", "--num-fewshot", "--limit", "--labels", "--batch-tokens",
              "--invariant", "--why", "--cause", "--ancestor", "--base-revision", "--tuned-revision", "--out",
              "--trust-remote-code", "--debug"],
    "repair": ["base", "tuned", "--out", "--also", "--data", "--prompt", "--completion", "--metric", "--prompts",
               "--harmful", "--overlap", "--keep", "--suite", "--method", "--num-fewshot", "--limit", "--labels",
               "--batch-tokens", "--debug"],
    "compare": ["recipe", "--methods", "--factor", "--strength", "--search", "--seeds", "--ray", "--out", "--set",
                "--debug"],
    "suites": ["name", "--export", "--model", "--num-fewshot", "--limit", "--debug"],
    "methods": ["name"],
    "init": ["data", "--out", "--model", "--debug"],
    "recipe": ["--schema"],
    "doctor": [],
}  # fmt: skip
HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "pydantic")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model, tokenizer, rows):
    return make_world(tmp_path_factory.mktemp("world"), tiny_model(), tokenizer, rows)


@pytest.fixture
def holdfast(monkeypatch, capsys):
    """holdfast(words): (exit code, stdout, stderr) of one command in this process."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["holdfast", *words])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as end:
            cli.main()
        told = capsys.readouterr()
        return end.value.code or 0, told.out, told.err

    return run


def outside(*words: str, home=None) -> subprocess.CompletedProcess:
    """One command in a process of its own, as a user starts it."""
    env = {**os.environ, "HOLDFAST_HOME": str(home), "COLUMNS": "100"} if home else None
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, timeout=120)


def test_options_are_frozen():
    commands = typer.main.get_command(cli.app).commands
    found = {name: [p.opts[0] for p in c.params if p.name != "help"] for name, c in commands.items()}
    assert found == OPTIONS


def test_every_command_has_a_file_of_its_own():
    assert all(callable(importlib.import_module(f"holdfast.verbs.{name}").command) for name in OPTIONS)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from holdfast import cli; sys.argv = ['holdfast', '--help']\n"
        "try: cli.main()\n"
        f"finally: print('heavy:', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    told = outside("-c", code)
    assert told.returncode == 0 and told.stderr == ""
    assert "heavy: []" in told.stdout
    assert all(name in told.stdout for name in OPTIONS)


def test_version(holdfast):
    assert holdfast("--version") == (0, f"{__version__}\n", "")


def test_no_words_are_help(holdfast):
    code, out, err = holdfast()
    assert code == 2 and "tune" in out + err and "Traceback" not in out + err


def test_an_unknown_command_and_option(holdfast):
    for words in (["tunr", "x"], ["tune", "x", "--lora-r", "8"]):
        code, _, err = holdfast(*words)
        assert code == 2 and words[-2 if "--lora-r" in words else 0] in err


def test_methods_are_listed(holdfast):
    from holdfast.methods import all_methods

    code, out, _ = holdfast("methods")
    assert code == 0
    assert [name for name in all_methods() if name not in out] == []
    assert "2106.09685" in out  # the paper of LoRA


def test_one_method_in_full(holdfast):
    code, out, _ = holdfast("methods", "ICLAnchor")
    assert code == 0 and "ICL-preservation term" in out and "weight = 1.0" in out
    code, out, err = holdfast("methods", "IclAnchor")
    assert code == 2 and "Did you mean 'ICLAnchor'?" in err and out == ""


def test_the_keys_of_a_recipe(holdfast):
    code, out, _ = holdfast("recipe")
    assert code == 0
    for key in ("model.model_name_or_path", "training.learning_rate", "measure.keep"):
        assert key in out


def test_doctor(holdfast, tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path))
    code, out, _ = holdfast("doctor")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0 and facts["holdfast"] == __version__ and facts["cache"] == str(tmp_path.resolve())
    assert {"python", "torch", "transformers", "peft", "system", "threads", "cpu", "cuda"} <= set(facts)


def test_explain_shows_rows_as_the_model_sees_them(holdfast, world, tmp_path):
    path = write_recipe(tmp_path / "r.yaml", recipe_data(world, tmp_path / "run"))
    code, out, _ = holdfast("explain", str(path), "--rows", "2")
    assert code == 0 and "Rows as the model sees them" in out
    assert out.count("targets") == 2 and out.count("train.jsonl:") == 2 and out.count("<|eos|>") == 2
    assert holdfast("explain", str(path), "--rows", "-1")[0] == 2


def test_doctor_speaks_where_torch_does_not_work(holdfast, tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path))
    monkeypatch.setattr("torch.get_num_threads", lambda: 1 / 0)
    code, out, _ = holdfast("doctor")
    assert code == 0 and "does not work: ZeroDivisionError" in out and "cache" in out


@pytest.mark.parametrize("words", ["suites", "suites in-context", "recipe", "recipe --schema"])
def test_a_list_loads_nothing_heavy(words):
    code = (
        f"import sys; from holdfast import cli; sys.argv = ['holdfast', *{words.split()!r}]\n"
        "try: cli.main()\n"
        f"finally: print('heavy:', [m for m in {HEAVY[:-1]!r} if m in sys.modules])"
    )
    told = outside("-c", code)
    assert told.returncode == 0 and told.stderr == "" and "heavy: []" in told.stdout


def test_explain_writes_nothing(holdfast, world, tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    plan = [{"LoRA": {"r": 2}}, {"ICLAnchor": {"pool": 4}}]
    path = write_recipe(tmp_path / "recipe.yaml", recipe_data(world, tmp_path / "run", plan=plan))
    code, out, _ = holdfast("explain", str(path), "--set", "training.max_steps=7")
    assert code == 0 and "7 steps" in out
    assert "LoRA" in out and "ICLAnchor" in out and "r=2" in out
    assert "computed once before training, for: ICLAnchor" in out
    kept = tmp_path / "home" / "rows"  # which the run would make too
    assert [p for p in tmp_path.rglob("*") if p.is_file() and kept not in p.parents] == [path]


@pytest.fixture(scope="module")
def tuned(world, tmp_path_factory):
    """A run started from outside, into a pipe: (the process, its folder, its recipe)."""
    folder = tmp_path_factory.mktemp("outside")
    plan = [{"LoRA": {"r": 2}}, {"ICLAnchor": {"pool": 4}}]
    data = recipe_data(world, folder / "run", plan=plan, training={"max_steps": 20, "save_steps": 5})
    path = write_recipe(folder / "recipe.yaml", data)
    return outside("-m", "holdfast.cli", "tune", str(path), home=folder / "home"), folder / "run", path


def test_a_pipe_gets_plain_lines(tuned):
    told, folder, _ = tuned
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    phases = ["Loading the model", "Measuring before", "Preparing the plan", "Tuning", "Measuring after"]
    assert [line for line in lines if line in phases] == phases
    steps = [line.split() for line in lines if "step" in line]
    assert [s[0] for s in steps] == [f"{n}%" for n in range(10, 101, 10)]
    assert steps[0][1:3] == ["step", "2/20"]
    assert "\x1b" not in told.stdout and "\r" not in told.stdout
    assert f"Page: {folder / 'report.html'}" in told.stdout
    assert f"Tuned model: {folder / 'model'}" in told.stdout


def test_the_libraries_below_are_silent(tuned):
    assert tuned[0].stderr == ""


def test_a_finished_run_says_so(tuned, holdfast):
    _, folder, path = tuned
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    code, out, _ = holdfast("tune", str(path))
    assert code == 0 and "This run was finished before; nothing was done." in out
    assert json.loads((folder / "report.json").read_text())["verdict"]["sentence"] in " ".join(out.split())
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_our_own_warnings_are_shown(holdfast, world, tmp_path):
    path = write_recipe(tmp_path / "recipe.yaml", recipe_data(world, tmp_path / "run"))
    code, _, err = holdfast("explain", str(path), "--set", "model.trust_remote_code=true")
    assert code == 0 and err.startswith("Warning: trust_remote_code: Python code of ")


# ---- progress


def test_bars_on_a_terminal_and_lines_elsewhere():
    assert isinstance(progress_on(Console(force_terminal=True)), Bars)
    assert isinstance(progress_on(Console(force_terminal=False)), Lines)


def told_to(console: Console) -> str:
    with console.capture() as told, progress_on(console) as progress:
        progress.tell("load", 0.0, "[bold]model")
        for step in range(1, 31):
            progress.tell("tune", step / 30, f"step {step}/30")
        progress.tell("measure after", 0.5, "[red]task")
        progress.tell("done", 1.0, "")
    return told.get()


def test_lines_come_at_every_tenth():
    lines = told_to(Console(force_terminal=False, width=40)).splitlines()
    assert [line for line in lines if "%" not in line] == ["Loading the model", "Tuning", "Measuring after"]
    assert [line.split()[-1] for line in lines if "%" in line] == [f"{n}/30" for n in range(3, 31, 3)]


def test_bars_reach_the_end():
    last = told_to(Console(force_terminal=True, width=100)).split("\r")[-1]
    assert last.count("100%") == 3 and "[red]task" in last
