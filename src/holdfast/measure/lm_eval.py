"""The bridge to lm-evaluation-harness: its tasks and the user's own YAML tasks, answered by our scorer.

`HoldfastLM` follows the rules of the harness's own `HFLM` (0.4.13): tokens, truncation from the left, rolling windows,
stop strings. Where HFLM's result depends on its batch (a stop string ends a batch only when every row holds one), the
rule is that of batch size 1. Probabilities are always computed in float32, as with HFLM's softmax_dtype="float32".
The harness is an extra, so this module is imported only when a suite `lm_eval:...` is asked for.
"""

from __future__ import annotations

import difflib
import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holdfast.engine import BATCH_TOKENS
from holdfast.errors import HoldfastError, pip_install
from holdfast.measure.generate import BATCH, batch_for, go_on
from holdfast.measure.scorer import Scorer

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
        resolve_max_length,
    )
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise HoldfastError(
        f"Suites named lm_eval:<task> need lm-evaluation-harness, which cannot be imported ({error}).",
        f"Run: {pip_install('eval')}.",
    ) from None

SEED = 1234  # the harness's own seed of its demonstrations
MOST_NEW_TOKENS = 256  # HFLM's, where a task sets none
PREFERRED = ("acc_norm", "acc", "exact_match")  # then whatever else lies in [0, 1]
GUESSABLE = ("acc_norm", "acc", "acc_bytes", "acc_mutual_info")  # one of the choices is picked
ROLLING = {"byte_perplexity": "byte", "bits_per_byte": "byte", "word_perplexity": "word"}

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, context tokens, continuation tokens


class HoldfastLM(TemplateLM):
    """A model as the harness wants it; pass it to `lm_eval.simple_evaluate`.

    Args:
        model: a Hugging Face causal LM (a PEFT model too).
        tokenizer: its tokenizer.
        batch_tokens: new tokens per forward of the scorer.
        batch_size: prompts per batch of generation.
        invariant: as of the scorer; of generation it is a `batch_size` of 1.
        progress: called with the share done of each kind of request, 0 to 1.

    `num_truncated` counts the requests that were cut from the left to fit the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_tokens: int = BATCH_TOKENS,
        batch_size: int = BATCH,
        invariant: bool = False,
        progress: Callable[[float], None] | None = None,
    ):
        super().__init__()
        self.model, self.tokenizer, self.batch_size, self.progress = model, tokenizer, batch_size, progress
        settings: dict[str, Any] = {"batch_tokens": batch_tokens, "invariant": invariant, "progress": progress}
        self.scorer = Scorer(model, tokenizer, **settings)
        self._device = self.scorer.device
        self.num_truncated = 0

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def max_length(self) -> int:
        return resolve_max_length(self.model.config, self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Used only if the caller of the harness asks for chat templates; `measure_task` does not."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with the tokenizer's own special tokens unless the text already begins with one."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        settings = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **settings)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(summed log-probability, greedy flag) of every (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_: Any) -> list[tuple[float, bool]]:
        scores = self.scorer.score_tokens([self._fit(*r) for r in requests])
        return [(s.logprob, s.greedy) for s in scores]

    def _fit(self, texts: Any, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """What the scorer takes: tokens, cut from the left to the model's length + 1, and how many are context."""
        if not context or not continuation:
            raise HoldfastError(
                f"A request of the task leaves no token to score or none before it: {str(texts)[-200:]}",
                "The context's last token swallows the continuation: change the target_delimiter of the task.",
            )
        if len(continuation) > self.max_length:
            raise HoldfastError(
                f"A continuation of the task has {len(continuation)} tokens, the model reads {self.max_length}.",
                "Leave this task out, or use a model that reads more.",
            )
        ids = (context + continuation)[-(self.max_length + 1) :]
        self.num_truncated += len(ids) < len(context) + len(continuation)
        return ids, len(ids) - len(continuation)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of every whole text, in windows of the model's length that share one token."""
        windows: list[tuple[int, Encoded]] = []
        for n, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(n, (None, *make_disjoint_window(window))) for window in rolling]
        out = [0.0] * len(requests)
        scores = self._loglikelihood_tokens([w for _, w in windows])
        for (n, _), (logprob, _) in zip(windows, scores, strict=True):
            out[n] += logprob
        return out

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The model's text after every context, up to the first of its stop strings."""
        alike: dict[str, list[int]] = {}
        for n, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(n)
        out = [""] * len(requests)
        for members in alike.values():
            texts = self._generate([requests[n].args[0] for n in members], requests[members[0]].args[1])
            for n, text in zip(members, texts, strict=True):
                out[n] = text
        return out

    def _generate(self, contexts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(asked, MOST_NEW_TOKENS))
        eos = self.tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(settings.pop("until", None), eos=eos)
        new, total = settings.pop("max_gen_toks"), settings.pop("max_length", None)
        room = self.max_length - new
        if room <= 0:
            raise HoldfastError(
                f"The task asks for {new} new tokens, the model reads {self.max_length}.",
                "Set a lower max_gen_toks in the task, or use a model that reads more.",
            )
        if not settings["do_sample"]:
            settings |= {"temperature": None, "top_p": None, "top_k": None}
        whole = [self.tok_encode(c) or [self.prefix_token_id] for c in contexts]
        self.num_truncated += sum(len(ids) > room for ids in whole)
        cut = [ids[-room:] for ids in whole]
        prompts = [(ids, new if total is None else max(1, total - len(ids))) for ids in cut]
        texts = go_on(
            self.model,
            self.tokenizer,
            prompts,
            stop=[text for text in until if text],
            batch_size=self.batch_size,
            progress=self.progress,
            eos_token_id=self._ends(),
            **settings,
        )
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _ends(self) -> list[int]:
        """Every token that ends a text: the tokenizer's, and those of the model's generation config."""
        own = self.model.generation_config.eos_token_id
        return sorted({self.eot_token_id, *(own if isinstance(own, list) else [own])} - {None})


def measure_task(
    model: Any,
    tokenizer: Any,
    name: str,
    *,
    limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    invariant: bool = False,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Measure one task of the harness, in the shape of `measure.asking.score_suite`.

    The score of an item is the task's first of acc_norm, acc, exact_match, then any other metric between 0 and 1.
    A rolling perplexity becomes exp(-loss per byte), or per word if the task counts only words; `metric` says which.
    A group of tasks gives several tasks. `chance` is 1 / choices where one of several is picked, else 0.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        name: "lm_eval:<task>[:k]": a task, group or tag of the harness, or the path of a task's YAML file; k is the
            number of demonstrations (the task's own number if not given; a task that fixes 0 keeps 0).
        limit: the first so many documents of each task.
        batch_tokens: new tokens per forward.
        invariant: no item depends on `batch_tokens` or on other items, to the last bit.
        progress: called with the share done of each kind of request.

    Raises:
        HoldfastError: no such task, its data cannot be loaded, or its metric is not one per item.
    """
    task, shots = _parse(name)
    settings: dict[str, Any] = {"batch_tokens": batch_tokens, "invariant": invariant}
    lm = HoldfastLM(model, tokenizer, batch_size=batch_for(**settings), progress=progress, **settings)
    with _aside():
        manager, spec = _find(task)
        loaded = _load(manager, spec)
        for one in loaded.values():
            _check(one, shots)
        evaluate: Any = simple_evaluate  # its decorator hides the signature
        found = evaluate(
            model=lm,
            tasks=list(loaded.values()),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            fewshot_random_seed=SEED,
        )
    given = found["n-shot"]
    return {
        "suite": name,
        "num_fewshot": next(iter(given.values())) if len(set(given.values())) == 1 else None,
        "limit": limit,
        "seed": SEED,
        "harness": metadata.version("lm_eval"),
        "num_truncated": lm.num_truncated,
        **({"invariant": True} if invariant else {}),
        "tasks": [
            {"name": n, "version": found["versions"][n], "num_fewshot": given[n], **_scored(n, t, found["samples"][n])}
            for n, t in loaded.items()
        ],
    }


def _parse(name: str) -> tuple[str, int | None]:
    task = name.removeprefix("lm_eval:")
    head, _, tail = task.rpartition(":")
    return (head, int(tail)) if head and tail.isdecimal() else (task, None)


@contextmanager
def _aside() -> Iterator[None]:
    """The harness seeds every generator of the process and logs a lot: neither outlives the call."""
    logger = logging.getLogger("lm_eval")
    level, python, numpy = logger.level, random.getstate(), np.random.get_state()
    logger.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        logger.setLevel(level)
        random.setstate(python)
        np.random.set_state(numpy)


@lru_cache(maxsize=2)
def _manager(registered: bool) -> TaskManager:
    return TaskManager(include_defaults=registered)


def _find(task: str) -> tuple[TaskManager, str]:
    """A manager that knows the task, and the task's name for it."""
    if task.endswith((".yaml", ".yml")):
        return _find_file(Path(task).expanduser())
    manager = _manager(True)
    if task not in manager.task_index:
        near = difflib.get_close_matches(task, manager.all_tasks, n=1)
        cure = f"Did you mean {near[0]!r}?" if near else "`lm_eval ls tasks` lists them; a file's name ends in .yaml."
        raise HoldfastError(f"lm-evaluation-harness has no task {task!r}.", cure)
    return manager, task


def _find_file(path: Path) -> tuple[TaskManager, str]:
    """Reading the registry of 14,000 tasks takes seconds, and only the file of a group may name tasks of it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise HoldfastError(f"The task file {path} cannot be read ({error}).", "Check the path.") from None
    group = re.search(r"^group\s*:\s*[\"']?([^\s\"'#]+)", text, re.MULTILINE)
    if not group:
        return _manager(False), str(path)
    return TaskManager(include_path=str(path.parent)), group[1]  # the harness finds groups by name alone


def _load(manager: TaskManager, task: str) -> dict[str, Any]:
    """Every single task behind a name, with its data."""
    try:
        return manager.load([task])["tasks"]
    except Exception as error:  # YAML, templates, hub, and packages a task needs: a dozen unrelated types
        problem = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise HoldfastError(
            f"The lm_eval task {task!r} or its data cannot be loaded ({problem}).",
            "Check its YAML file, the network and HF_TOKEN; data that was loaded once stays in the cache.",
        ) from None


def _check(task: Any, shots: int | None) -> None:
    """Refuse what would fail, or do harm, in the middle of the harness."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        what = "runs code that the model wrote" if getattr(task, "UNSAFE_CODE", False) else "shows more than text"
        raise HoldfastError(
            f"The lm_eval task {task.task_name!r} {what}, which is not done here.", "Use the lm_eval command for it."
        )
    if shots and task.get_config("num_fewshot") != 0:
        pool = len(list(task.fewshot_docs() or ()))
        if pool < shots:
            raise HoldfastError(
                f"The lm_eval task {task.task_name!r} has {pool} demonstrations, too few to draw {shots}.",
                f"Ask for fewer: lm_eval:{task.task_name}:<k>.",
            )


def _scored(name: str, task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Items of one task under its first filter."""
    rows = sorted((s for s in samples if s["filter"] == samples[0]["filter"]), key=lambda s: s["doc_id"])
    metric, scores = _metric(name, rows, task.higher_is_better())
    chance = 0.0
    if task.OUTPUT_TYPE == "multiple_choice" and metric in GUESSABLE:
        chance = sum(map(_guess, rows)) / len(rows)
    items = [
        {"id": f"{name}/{r['doc_id']}", "cluster": "", "correct": score} for r, score in zip(rows, scores, strict=True)
    ]
    shown = metric if rows[0]["filter"] == "none" else f"{metric} ({rows[0]['filter']})"
    return {"chance": chance, "metric": shown, "clustered": False, "items": items}


def _guess(row: Mapping[str, Any]) -> float:
    """Score of guessing one of the choices of a document."""
    asked = len(row["arguments"])
    choices = asked // 2 if "acc_mutual_info" in row["metrics"] else asked  # it asks each choice twice
    right = len(set(row["target"])) if isinstance(row["target"], list) else 1
    return right / choices


def _metric(name: str, rows: Sequence[Mapping[str, Any]], higher: Mapping[str, bool]) -> tuple[str, list[float]]:
    """The metric that becomes the score, and its value for every document."""
    known = rows[0]["metrics"]
    others = [m for m in known if m not in PREFERRED and higher.get(m, True)]
    for metric in (*(m for m in PREFERRED if m in known), *others):
        values: list[Any] = [r.get(metric) for r in rows]
        if all(isinstance(v, Real | np.bool_) and 0 <= float(v) <= 1 for v in values):
            return metric, [float(v) for v in values]
    for metric, unit in ROLLING.items():
        if metric in known:
            pairs = [r[metric] for r in rows]
            return f"likelihood per {unit}", [math.exp(logprob / max(1, n)) for logprob, n in pairs]
    raise HoldfastError(
        f"The lm_eval task {name!r} has no score between 0 and 1 for each item (it has {', '.join(known)}).",
        "Use a task with acc, acc_norm or exact_match.",
    )
