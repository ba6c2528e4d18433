"""The libraries below a tokenizer asked directly, where that gives the same: around each call transformers does more
work than the call itself, and a large file is hundreds of thousands of calls.

Whatever a tokenizer does in a way of its own goes through its own methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Tokens = list[int]


def _inherits(tokenizer: Any, *names: str) -> bool:
    """Whether these methods are those of transformers' own class of fast tokenizers."""
    from transformers import PreTrainedTokenizerFast

    kind, own = type(tokenizer), vars(tokenizer)
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) and name not in own for name in names
    )


class Direct:
    """Encoding and decoding of many texts without any added tokens."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._encodes = _inherits(tokenizer, "__call__", "_encode_plus")
        self._decodes = _inherits(tokenizer, "decode", "_decode")

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of each text."""
        if self._encodes and self._is_plain():
            found = self.tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [one.ids for one in found]
        only = {"return_attention_mask": False, "return_token_type_ids": False}
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False, **only)["input_ids"]

    def decode(self, rows: Sequence[Tokens]) -> list[str]:
        """The text of each row of tokens, special tokens with it."""
        if self._decodes:
            return self.tokenizer.backend_tokenizer.decode_batch(list(rows), skip_special_tokens=False)
        only = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return [self.tokenizer.decode(row, **only) for row in rows]

    def _is_plain(self) -> bool:
        """Whether the last call left the library as a call without settings has it."""
        below = self.tokenizer.backend_tokenizer
        cuts = below.truncation is not None or below.padding is not None
        return not cuts and below.encode_special_tokens == bool(self.tokenizer.split_special_tokens)


class Renderer:
    """A tokenizer's chat template. Messages of nothing but text go to the compiled template at once."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._compiled: Callable[..., str] | None = None
        self._looked = False

    def __call__(self, messages: Sequence[Mapping[str, Any]], answer_next: bool, options: Mapping[str, Any]) -> str:
        if not options and (render := self._template()) and all(map(_is_text, messages)):
            return render(messages=messages, add_generation_prompt=answer_next)
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer_next, **options
        )

    def _template(self) -> Callable[..., str] | None:
        if not self._looked:
            self._looked, self._compiled = True, _compiled(self.tokenizer)
        return self._compiled


def _compiled(tokenizer: Any) -> Callable[..., str] | None:
    """The template as transformers compiles it, with what it always gets; None where there is no such thing."""
    if not _inherits(tokenizer, "apply_chat_template", "get_chat_template"):
        return None
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template  # not promised to stay
    except ImportError:
        return None
    compiled = _compile_jinja_template(tokenizer.get_chat_template())
    always = {**compiled.globals, "tools": None, "documents": None, **tokenizer.special_tokens_map}

    def render(**given: Any) -> str:  # as compiled.render, which gathers its globals anew each time
        names = compiled.environment.context_class(compiled.environment, always | given, None, compiled.blocks)
        return "".join(compiled.root_render_func(names))

    return render


def _is_text(message: Mapping[str, Any]) -> bool:
    """A message that transformers would hand on as it stands: it renames keys for thinking, and unpacks values."""
    return all(type(value) is str for value in message.values()) and message.keys() <= {"role", "content", "name"}
