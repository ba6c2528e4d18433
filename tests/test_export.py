"""Exported suites, run by the harness with its own HF model, score as ours do."""

import json
import math
import warnings

import pytest
import yaml

from holdfast.errors import HoldfastError
from holdfast.measure.asking import score_suite
from holdfast.measure.export import Exported, export_suite
from holdfast.measure.probe import Group, Probe, Suite
from holdfast.measure.scorer import Scorer

ANSWERS = (" billing", " shipping desk", " other")
LENGTHS = {
    "plain": lambda a: None,
    "norm": lambda a: tuple(map(len, a)),
    "bytes": lambda a: tuple(len(x.encode()) for x in a),
    "odd": lambda a: tuple(range(1, len(a) + 1)),
}


def probes():
    for n in range(6):
        context = f"Ticket: Where is order {n}?\nQueue:"
        yield Probe("exact one", f"exact one/{n}", "begins", context, (ANSWERS[n % 3],))
        yield Probe("sure", f"sure/{n}", "calibrated", context, ANSWERS, right=n % 3, open_ended=True)
        yield Probe("text", f"text/{n}", "likelihood", "", (f"Thank you for order {n}!",))
        yield Probe("after", f"after/{n}", "likelihood", context, (ANSWERS[n % 3],))
        yield Probe("said", f"said/{n}", "generate", context, judge=lambda text: 0.0)
        for name, of in LENGTHS.items():
            answers = (*ANSWERS, f" \u00fcber {n}")
            how = {"right": n % 4, "answer_lengths": of(answers), "open_ended": True}
            yield Probe(name, f"{name}/{n}", "choice", context, answers, **how)


def greedy_probe(model, tokenizer):
    """A question the random model answers exactly, so that not every flag is False."""
    import torch

    context = "Ticket: Where?\nQueue:"
    ids = torch.tensor([tokenizer.encode(context)])
    for length in range(1, 6):
        answer = tokenizer.decode(model.generate(ids, max_new_tokens=length, do_sample=False)[0, ids.shape[1] :])
        whole = tokenizer.encode(context + answer)
        if answer.strip() and whole[: ids.shape[1]] == ids[0].tolist() and len(whole) == ids.shape[1] + length:
            return Probe("exact one", "exact one/greedy", "begins", context, (answer,))
    raise AssertionError("the random model writes no text that survives its tokenizer")


NAMES = ("exact one", "plain", "norm", "bytes", "odd", "sure", "text", "after", "said")


def suite_of(*extra):
    return Suite("my suite", tuple(Group(n, 2, 0.0, "m") for n in NAMES), (*probes(), *extra), {"limit": 6, "seed": 0})


def test_files_and_warnings(tmp_path):
    made = export_suite(suite_of(), tmp_path / "out")
    assert [m.task for m in made] == [f"holdfast_my_suite_{n.replace(' ', '_')}" if n != "said" else "" for n in NAMES]
    assert {m.group for m in made if m.warning} == {"odd", "after", "said"}
    assert made[-1] == Exported("said", "", "said: left out, its answers are judged by code.")
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == sorted(f"{m.task}.{kind}" for m in made if m.task for kind in ("yaml", "jsonl"))
    config = yaml.safe_load((tmp_path / "out" / "holdfast_my_suite_plain.yaml").read_text())
    assert (config["target_delimiter"], config["num_fewshot"], config["metadata"]) == ("", 0, {"version": 2})
    row = json.loads((tmp_path / "out" / "holdfast_my_suite_plain.jsonl").read_text("utf-8").splitlines()[1])
    assert row == {
        "id": "plain/1",
        "cluster": "",
        "context": "Ticket: Where is order 1?\nQueue:",
        "choices": [*ANSWERS, " \u00fcber 1"],
        "answer": 1,
    }


def test_an_end_that_the_harness_does_not_see_is_said(tmp_path):
    group = (Group("n", 1, 0.0, "m"),)
    for kind, answers, said in (
        ("exact", (" 1",), True),
        ("exact", (" 1\n",), False),
        ("begins", (" 1",), False),
        ("choice", (" 1", " 12"), True),
        ("calibrated", (" 1", " 12"), True),
        ("choice", (" 1\n", " 12\n"), False),
    ):
        (made,) = export_suite(Suite("s", group, (Probe("n", "n/0", kind, "Q:", answers),)), tmp_path)
        assert ("whether an answer ends" in made.warning) is said, (kind, answers)


def test_mixed_kinds_are_left_out(tmp_path):
    mixed = Probe("plain", "plain/x", "exact", "a", ("b",))
    made = {m.group: m for m in export_suite(suite_of(mixed), tmp_path)}
    assert made["plain"].task == "" and "2 kinds" in made["plain"].warning


def test_two_groups_never_share_a_file(tmp_path):
    groups = tuple(Group(n, 1, 0.0, "exact") for n in ("a b", "a/b"))
    with pytest.raises(HoldfastError, match="both be written to 'a_b'"):
        export_suite(Suite("s", groups, ()), tmp_path)


@pytest.mark.filterwarnings("default")
def test_the_harness_gives_the_same_scores(tiny_model, tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # the harness may be started anywhere
    model = tiny_model()
    suite = suite_of(greedy_probe(model, tokenizer))
    export_suite(suite, tmp_path / "out")
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=["holdfast_my_suite"],
        task_manager=TaskManager(include_path=str(tmp_path / "out"), include_defaults=False),
        bootstrap_iters=0,
    )
    theirs = {n: found["results"].get(f"holdfast_my_suite_{n.replace(' ', '_')}") for n in NAMES}
    ours = {t["name"]: t["items"] for t in score_suite(model, tokenizer, suite)["tasks"]}

    def mean(name, key="correct"):
        return sum(i[key] for i in ours[name]) / len(ours[name])

    assert 0 < mean("exact one") == pytest.approx(theirs["exact one"]["acc,none"])
    for name, metric in (("plain", "acc"), ("norm", "acc_norm"), ("bytes", "acc_bytes")):
        assert mean(name) == pytest.approx(theirs[name][f"{metric},none"]), name
    assert theirs["odd"].keys() >= {"acc,none"} and "acc_norm,none" not in theirs["odd"]
    assert mean("sure", "hit") == pytest.approx(theirs["sure"]["acc,none"])
    assert 1 - theirs["sure"]["brier_score,none"] / 2 == pytest.approx(mean("sure"), abs=1e-5)
    logprob = sum(i["logprob"] for i in ours["after"]) / len(ours["after"])
    assert theirs["after"]["perplexity,none"] == pytest.approx(math.exp(-logprob), rel=1e-4)
    # This tokenizer puts a first token before every text; the harness predicts it too, after another one.
    (first,) = Scorer(model, tokenizer).score_tokens([([tokenizer.bos_token_id] * 2, 1)])
    total, size = (sum(i[k] for i in ours["text"]) for k in ("logprob", "num_bytes"))
    total += first.logprob * len(ours["text"])
    assert theirs["text"]["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-4)
