"""Tokenizers of many kinds, trained on the spot: what `test_tokens` goes through."""

from __future__ import annotations

from typing import Any

from tiny import TICKETS

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    *(text for group in TICKETS.values() for text in group),
    *["Sentiment: positive\n\nSentiment: negative\n\n\nThe label is positive http://example.org Q: 12\nA: 3\n"] * 8,
    *["user\nassistant\nwhat is it 13 35 14 0 1 2 3 4 5 6 7 8 9\n"] * 4,
]


def _wrap(backend: Any, lead: str, tail: str, **names: str) -> Any:
    """A Hugging Face tokenizer that puts `lead` before and `tail` behind every text."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    added = [(t, backend.token_to_id(t)) for t in (lead, tail) if t]
    if added:
        single = " ".join(t for t in (lead, "$A", tail) if t)
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=added)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def byte_level(lead: str = "", tail: str = "", pattern: str = "", eos: str | None = "</s>") -> Any:
    """Byte-level BPE with GPT-2's pattern, or another."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    cut = [pre_tokenizers.Split(Regex(pattern), "isolated"), level] if pattern else [level]
    backend.pre_tokenizer = pre_tokenizers.Sequence(cut)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return _wrap(backend, lead, tail, bos_token="<s>", eos_token=eos, pad_token="<pad>")


def sentence_pieces(lead: str = "<s>", tail: str = "") -> Any:
    """BPE over words that begin with a mark for the blank, which is put before every text too."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    letters = ["\u2581", "\n", *map(chr, range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=560, special_tokens=["<unk>", *SPECIAL], show_progress=False, initial_alphabet=letters
    )
    backend.train_from_iterator([w for t in TEXTS for w in t.replace(" ", " \u2581").split(" ")], trainer)
    strip = decoders.Strip(content=" ", left=1)
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), strip])
    return _wrap(backend, lead, tail, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def word_pieces(eos: str | None = "[SEP]") -> Any:
    """BERT's: lower case, pieces of words, [CLS] before and [SEP] behind every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    return _wrap(
        backend, "[CLS]", "[SEP]", pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        **({"eos_token": eos} if eos else {}),
    )  # fmt: skip


def few_letters() -> Any:
    """Letters of genes and digits only; whatever else a text has, an "a" too, is left out in silence."""
    from tokenizers import Tokenizer, decoders, models

    words = [*SPECIAL, *"ACGT: 0123456789\n"]
    backend = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[]))
    backend.add_special_tokens(SPECIAL)
    backend.decoder = decoders.Fuse()
    return _wrap(backend, "<s>", "", bos_token="<s>", eos_token="</s>", pad_token="<pad>")


MADE = {
    "bytes": lambda: byte_level(),
    "bytes, bos": lambda: byte_level("<s>"),
    "bytes, bos and eos": lambda: byte_level("<s>", "</s>"),
    "bytes, eos": lambda: byte_level("", "</s>"),
    "bytes, no eos": lambda: byte_level("<s>", eos=None),
    "llama 3": lambda: byte_level("<s>", pattern=LLAMA3),
    "sentence pieces": lambda: sentence_pieces(),
    "sentence pieces, eos": lambda: sentence_pieces("<s>", "</s>"),
    "word pieces": lambda: word_pieces(),
    "word pieces, no eos": lambda: word_pieces(None),
}
