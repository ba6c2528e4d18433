"""The errors a user can meet. Every message has three parts: what is wrong, between which things, what to do."""

import errno

# torch, CUDA, cuBLAS, C++ and the Rust libraries, in lower case
MEMORY = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "alloc_failed")


class HoldfastError(ValueError):
    """A mistake a user can mend. The command line prints it without a traceback and exits with 2.

    Args:
        what: what is wrong, one sentence, naming the file and line or the two things involved.
        cure: what to do about it, one sentence.
    """

    def __init__(self, what: str, cure: str = ""):
        self.what, self.cure = what, cure
        super().__init__(f"{what}\n{cure}" if cure else what)


class RecipeError(HoldfastError):
    """The recipe cannot be read, or asks for something that does not exist."""


class DataError(HoldfastError):
    """A data file, a row or a column is not what the recipe says."""


class ModelError(HoldfastError):
    """A model, adapter or tokenizer cannot be found, loaded or used for this."""


class PlanError(HoldfastError):
    """Two methods, or a method and its host, cannot work together. Names both."""


class NoEffect(HoldfastError):
    """A method of the plan changed nothing: the commonest silent bug of this field."""


class TrainingError(HoldfastError):
    """Training cannot go on (a loss that is not finite, no disk space)."""


def pip_install(extra: str) -> str:
    """The command that brings the packages of an extra, for the cure of an error about one that is missing."""
    return f'pip install "holdfast-lm[{extra}]"'


def suggest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return ' Did you mean X?' for a near miss, else the list of what is known."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out here, or where the error that is told about it came from."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        native = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
        if native and any(words in str(error).lower() for words in MEMORY):
            return True
        error = error.__cause__
    return False
