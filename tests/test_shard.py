"""Two processes measure as one: the same decisions and text, log-likelihoods within 1e-5, the same in each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.engine import processes
from holdfast.measure.asking import score_suite
from holdfast.measure.probe import Group, Probe, Suite
from holdfast.measure.suites import measure_suite

WORKER = """
import json, sys
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from holdfast import RetentionCallback
from holdfast.engine import processes
from holdfast.measure import generate, scorer

torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_shard import probes
from holdfast.measure.asking import score_suite

generate.generate.__kwdefaults__["batch_size"] = 4
processes.start()
folder, rank = sys.argv[1], dist.get_rank()
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
asked, plain = [], scorer.Scorer.score_tokens
scorer.Scorer.score_tokens = lambda self, encoded: asked.append(len(encoded)) or plain(self, encoded)
out = score_suite(model, tokenizer, probes())
print("said by", rank)
split = torch.nn.Linear(2, 2)
split.weight.ds_id = 0
facts = {
    "measured": out,
    "asked": list(asked),
    "gathered": processes.gather({"rank": rank, "text": "\\u00fc" * (1 + 9 * rank)}),
    "told": processes.told(lambda: [f"from {rank}", float("inf")]),
    "split": processes.world(split),
    "world": processes.world(model),
}
rows = [{"input_ids": [5 + n, 6, 7], "labels": [5 + n, 6, 7]} for n in range(8)]
args = TrainingArguments(
    f"{folder}/out", max_steps=2, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
    per_device_train_batch_size=2, learning_rate=0.1,
)
watch = RetentionCallback(f"jsonl:{folder}/own.jsonl", every=1)
collate = DataCollatorForSeq2Seq(tokenizer)
Trainer(model, args, collate, rows, processing_class=tokenizer, callbacks=[watch]).train()
facts |= {"before": watch._before, "history": [{**h, "seconds": 0} for h in watch.history]}
with open(f"{folder}/rank{rank}.json", "w") as f:
    json.dump(facts, f)
"""


def probes() -> Suite:
    """Every kind of probe; clusters of unequal size that share a prefix, and more than one batch of text."""
    shots = ["Input: yes\nOutput: no\n\n" * 3, "Q: 12\nA: 3\n" * 5, "Ticket: Where is it?\nQueue: shipping\n\n"]
    exact = [
        Probe(
            "exact", f"exact/{n}", "exact", f"{shots[n % 3]}Input: {n}\nOutput:", (f" {n % 4}",), cluster=f"c{n % 3}"
        )
        for n in range(11)
    ]
    choice = [
        Probe("choice", f"choice/{n}", "choice", f"Ticket {n}\nQueue:", (" billing", " other", " account and access"))
        for n in range(7)
    ]
    text = [Probe("text", f"text/{n}", "likelihood", "", (f"The order {n} has not arrived.",)) for n in range(3)]
    spoken = [
        Probe(
            "said", f"said/{n}", "generate", f"Ticket: {'no ' * (n % 5)}{n}\nQueue:", judge=judge, max_tokens=6 + n % 2
        )
        for n in range(13)
    ]
    groups = [Group(name, 1, 0.0, "exact", name == "exact") for name in ("exact", "choice", "text", "said")]
    return Suite("mixed", tuple(groups), (*exact, *choice, *text, *spoken), {"limit": None, "seed": 0})


def judge(text: str) -> float:
    return float(len(text) % 2)


def two(*command: str, timeout: int = 500, **more: str) -> list[str]:
    """Run a command as two gloo processes; returns what each printed."""
    return together(2, *command, timeout=timeout, **more)


def together(num: int, *command: str, timeout: int = 500, **more: str) -> list[str]:
    """As `two`, for any number of processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}
    shared |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *command],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(num)
    ]  # fmt: skip
    said = [job.communicate(timeout=timeout) for job in jobs]
    for job, (_, errors) in zip(jobs, said, strict=True):
        assert job.returncode == 0, errors[-3000:]
    return [out for out, _ in said]


@pytest.fixture(scope="module")
def ran(tiny_model, tokenizer, tmp_path_factory) -> Any:
    """What each of two processes found, and what it printed."""
    folder = tmp_path_factory.mktemp("two")
    tiny_model(tied=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = [json.dumps({"text": f"Where is order {n}, please?"}) for n in range(12)]
    (folder / "own.jsonl").write_text("\n".join(lines), encoding="utf-8")
    said = two("-c", WORKER, str(folder), str(Path(__file__).parent))
    found = [json.loads((folder / f"rank{r}.json").read_text(encoding="utf-8")) for r in (0, 1)]
    return found, [text.splitlines()[:1] for text in said], f"jsonl:{folder}/own.jsonl"


@pytest.fixture(scope="module")
def one(tiny_model, tokenizer) -> Any:
    from holdfast.measure import generate

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(generate.generate.__kwdefaults__, "batch_size", 4)
        return json.loads(json.dumps(score_suite(tiny_model(tied=False), tokenizer, probes())))


CLOSE = 5e-5  # of weights after some steps of 2e-3; rows that are shared out wrongly part them by a thousandth
STRAYS = 0.005  # of the entries: where a gradient is 0 but for rounding, Adam goes a whole step where rounding points


def apart(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], most: float = 5e-3) -> float:
    """The largest difference of an entry, but for a few strays, none of which may lie further than `most`."""
    assert one.keys() == other.keys()
    all_of_them = torch.cat([(one[n] - other[n]).abs().flatten() for n in one])
    assert all_of_them.max() < most
    return all_of_them.sort().values[-1 - int(STRAYS * len(all_of_them))].item()


def close(a: Any, b: Any) -> bool:
    """Equal plain data, numbers that are not whole within CLOSE, or a ten thousandth."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))
    return a == (pytest.approx(b, abs=CLOSE, rel=1e-4) if isinstance(a, float) and isinstance(b, float) else b)


def test_two_processes_measure_as_one(ran, one):
    (first, second), *_ = ran
    assert first["measured"] == second["measured"]
    assert close(first["measured"], one)
    texts = [i["output"] for t in one["tasks"] if t["name"] == "said" for i in t["items"]]
    assert len(set(texts)) > 1 and any(texts)


def test_the_work_was_shared(ran):
    (first, second), *_ = ran
    counts = [first["asked"], second["asked"]]
    assert all(len(c) == 1 for c in counts)
    # each answer that brings no end may end with the text or with its line
    assert counts[0][0] + counts[1][0] == 2 * (11 + 7 * 3) + 3
    assert min(c[0] for c in counts) > 8


def test_only_the_first_prints(ran):
    assert ran[1] == [["said by 0"], []]


def test_data_of_unequal_length_is_gathered(ran):
    for rank, found in enumerate(ran[0]):
        assert found["gathered"] == [{"rank": 0, "text": "\u00fc"}, {"rank": 1, "text": "\u00fc" * 10}]
        assert found["told"] == ["from 0", float("inf")]
        assert found["world"] == [rank, 2]


def test_split_weights_are_not_dealt_out(ran):
    assert all(found["split"] == [0, 1] for found in ran[0])


def test_a_trainer_of_two_processes_is_watched_as_one(ran, tiny_model, tokenizer):
    (first, second), _, suite = ran
    assert first["before"] == second["before"] and first["history"] == second["history"]
    assert [h["step"] for h in first["history"]] == [0, 1, 2]
    alone = measure_suite(suite, lambda: tiny_model(tied=False), tokenizer)
    assert close(first["before"], json.loads(json.dumps([alone])))
    assert first["history"][0]["score"] != first["history"][-1]["score"]


# ---- one process


def test_shares_keep_clusters_and_balance():
    keys = ["a", "b", "a", "c", "d", "b", "a"]
    sizes = [5, 1, 5, 4, 9, 1, 5]
    dealt = processes.shares(keys, sizes, 2)
    assert sorted(n for part in dealt for n in part) == list(range(7))
    assert not {keys[n] for n in dealt[0]} & {keys[n] for n in dealt[1]}
    assert [sum(sizes[n] for n in part) for part in dealt] == [15, 15]


@pytest.mark.parametrize("keys", [[], ["a"], ["a", "a"]])
def test_more_processes_than_clusters(keys: Sequence[str]):
    dealt = processes.shares(keys, [1] * len(keys), 3)
    assert dealt == [list(range(len(keys))), [], []]


def test_alone_nothing_is_started(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes.start()
    assert processes.world() == (0, 1) and processes.first()
    assert processes.gather([1]) == [[1]] and processes.told(lambda: "x") == "x"
