"""Models: found, identified, loaded, merged, saved, and checked after they were saved.

Importing this is cheap: torch and transformers load on first use.
"""

from holdfast.files import cache_dir, no_bars, safe_name
from holdfast.models.convert import convert_gguf
from holdfast.models.identity import state_fingerprint
from holdfast.models.loading import context_length, load, load_tokenizer, read_config
from holdfast.models.merging import merged, peft_quiet
from holdfast.models.place import FOUR_BITS, auto_place, four_bits, is_packed, may_load_in_4bit, precision
from holdfast.models.saving import may_replace, name_after, prompting, save_model
from holdfast.models.source import ALIASES, ModelSource, fingerprint, resolve, stop_tokens

__all__ = [
    "ALIASES",
    "FOUR_BITS",
    "ModelSource",
    "auto_place",
    "cache_dir",
    "context_length",
    "convert_gguf",
    "fingerprint",
    "four_bits",
    "is_packed",
    "load",
    "load_tokenizer",
    "may_load_in_4bit",
    "may_replace",
    "merged",
    "name_after",
    "no_bars",
    "peft_quiet",
    "precision",
    "prompting",
    "read_config",
    "resolve",
    "safe_name",
    "save_model",
    "state_fingerprint",
    "stop_tokens",
]
