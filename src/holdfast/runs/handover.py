"""What follows a finished run where the recipe asks for it: a GGUF file, and an upload to the Hugging Face hub.

Both begin when the report is written, so what fails here loses nothing: the same command tries it again, alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from holdfast.errors import PlanError, RecipeError, TrainingError
from holdfast.files import read_json
from holdfast.recipe import Recipe
from holdfast.runs.run import Run
from holdfast.runs.several import by_first
from holdfast.runs.written import own_export

CONVERTER, HOME = "convert_hf_to_gguf.py", "LLAMA_CPP"  # of llama.cpp, and where people say that it lies
KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # --outtype
GGUF, PUSHED = "model.gguf", "pushed.json"  # in the run folder
AGAIN = "Nothing is lost: the run is finished. The same command tries again; by hand: "


# ---- before any work


def check_asked(recipe: Recipe) -> None:
    """Raise RecipeError where the tool, the name or the token is missing; asks nothing of the network."""
    if recipe.export.gguf:
        converter(recipe)
    if recipe.export.push_to_hub is None:
        return
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    asked = f"export.push_to_hub is {recipe.export.push_to_hub}"
    try:
        validate_repo_id(recipe.export.push_to_hub)
    except HFValidationError as e:
        raise RecipeError(f"{asked}, which is no name of a repository: {e}.", "Write user/name.") from None
    if constants.HF_HUB_OFFLINE:
        raise RecipeError(f"{asked}, but HF_HUB_OFFLINE is set.", "Unset it, or remove export.push_to_hub.")
    if get_token() is None:
        raise RecipeError(f"{asked}, but there is no token of the hub.", "Run `hf auth login`, or set HF_TOKEN.")


def check_fits(recipe: Recipe, plan: Any, source: Any) -> None:
    """Raise PlanError where the plan leaves something else than the one folder that is converted or uploaded."""
    wraps = next((m.name for m in plan.active if m.wraps), None)
    prompts = next((m.name for m in plan.active if m.trains_prompt), None)
    if recipe.export.gguf and wraps and not recipe.export.merge:
        what = f"export.gguf converts whole weights, but {wraps} leaves weights of its own beside the base's."
        raise PlanError(what, "Set export.merge: true.")
    if recipe.export.gguf and prompts:
        what = f"export.gguf converts weights, but {prompts} leaves a soft prompt, which a GGUF file does not hold."
        raise PlanError(what, f"Remove export.gguf, or {prompts}.")
    if recipe.export.push_to_hub and prompts:
        what = f"export.push_to_hub uploads one folder, but {prompts} leaves a soft prompt in another."
        raise PlanError(what, "Remove export.push_to_hub, and upload both folders with `hf upload`.")
    if recipe.export.push_to_hub and wraps and source.kind == "adapter" and not recipe.export.merge:
        what = f"export.push_to_hub uploads an adapter, but its base is {source.label}, merged on this machine alone."
        raise PlanError(what, "Set export.merge: true.")


def converter(recipe: Recipe) -> Path:
    """llama.cpp's script: the path in the recipe, else in $LLAMA_CPP, else on PATH.

    Raises:
        RecipeError: it is nowhere.
    """
    named = recipe.export.gguf if isinstance(recipe.export.gguf, str) else os.environ.get(HOME)
    if not named:
        on_path = shutil.which(CONVERTER)
        places = [Path(on_path)] if on_path else []
    else:
        given = Path(named).expanduser()
        places = [given / CONVERTER if given.is_dir() else given]
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        where = f"in {named}" if named else "on PATH"
        raise RecipeError(
            f"export.gguf needs {CONVERTER} of llama.cpp, which is not {where}.",
            f"Run: git clone https://github.com/ggml-org/llama.cpp, and set {HOME} or export.gguf to that folder.",
        )
    return found.resolve()


# ---- afterwards


def hand_over(run: Run) -> None:
    """Do what the recipe asks for and what is not done yet, in the first process.

    Raises:
        TrainingError: it failed; the run is finished all the same.
    """
    asked = run.recipe.export
    converts = bool(asked.gguf) and not (run.path / GGUF).is_file()
    uploads = bool(asked.push_to_hub) and not (run.path / PUSHED).is_file()
    if converts or uploads:
        own_export(run)
    if converts:
        run.tell("gguf", 0.0, "")
        by_first(lambda: _convert(run))
    if asked.push_to_hub and uploads:
        run.tell("upload", 0.0, asked.push_to_hub)
        run.folder.write(PUSHED, by_first(lambda: _push(run)))


def command_line(script: Path, folder: Path, out: Path) -> list[str]:
    """How the converter is called: in the type that the weights have."""
    kind = KINDS.get(read_json(folder / "config.json").get("dtype", ""), "auto")
    return [sys.executable, str(script), str(folder), "--outfile", str(out), "--outtype", kind]


def _convert(run: Run) -> None:
    part = run.path / f".{GGUF}"  # renamed when it is whole
    command = command_line(converter(run.recipe), run.export, part)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not part.is_file():
        part.unlink(missing_ok=True)
        last = (done.stderr.strip() or done.stdout.strip() or "it wrote no file").splitlines()[-1][:300]
        raise TrainingError(
            f"{CONVERTER} failed on {run.export} (exit code {done.returncode}): {last}",
            f"{AGAIN}{' '.join(command)}",
        )
    part.replace(run.path / GGUF)


def _push(run: Run) -> dict[str, str]:
    """Upload the export; returns where it lies."""
    from huggingface_hub import HfApi

    repo, private, api = str(run.recipe.export.push_to_hub), run.recipe.export.hub_private_repo, HfApi()
    again = f"{AGAIN}hf upload {repo} {run.export}"
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        public = not api.repo_info(repo).private
        if not (private and public):
            done = api.upload_folder(repo_id=repo, folder_path=run.export, commit_message="Tuned with Holdfast")
            return {"repo": repo, "commit": done.oid}
    except Exception as e:  # of the hub, of httpx, of the system: whatever it is, the run must not look failed
        words = " ".join(str(e).split())[:300]
        raise TrainingError(f"The upload of {run.export} to {repo} failed: {type(e).__name__}: {words}", again) from e
    raise TrainingError(
        f"{repo} exists and is public, but export.hub_private_repo is true; nothing was uploaded.",
        f"Make it private on the hub. {again}",
    )
