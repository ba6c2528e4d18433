"""What "learned the task" means: each metric asked of a tiny model, in its own unit, and told the right way up."""

import io
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from holdfast.data import own_metric
from holdfast.data.encoder import Encoder
from holdfast.data.metric import METRICS, check_rows, judge_of, last_number, metric_of
from holdfast.data.own_metric import judge, load_function
from holdfast.data.rows import Row
from holdfast.data.sets import Set
from holdfast.errors import DataError, HoldfastError, PlanError
from holdfast.measure import stats, verifiers
from holdfast.measure.generate import new_tokens
from holdfast.measure.tuned_task import cut_words, judged, plainly, score_task, task_estimates, written
from holdfast.models.card import model_card
from holdfast.recipe import METRIC_NAMES, Source, load_recipe
from holdfast.report import examples, markdown, page, schema, terminal
from holdfast.verbs.tune import tune
from tiny import build_model
from tiny_run import recipe_data, write_recipe, write_rows
from tokenizers_made import MADE

RULES = """\
def begins(prompt, answer, row):
    return float(answer[:1] == row["queue"][:1])

def broken(prompt, answer, row):
    return 1 / 0

def large(prompt, answer, row):
    return 7
"""


def recipe(world, out: Path, metric: str | None, **changes):
    data = {"train": str(world.train), "validation_size": 6, "metric": metric}
    return load_recipe(write_recipe(out.parent / "recipe.yaml", recipe_data(world, out, data=data, **changes)))


def report_of(run: Path):
    return json.loads((run / "report.json").read_text(encoding="utf-8"))


def test_the_recipe_knows_the_metrics():
    assert tuple(METRICS) == METRIC_NAMES


# ---- the numbers


def test_loss_by_token_is_that_of_the_model(tiny_model, tokenizer, rows):
    model = tiny_model().eval()
    items = score_task(model, tokenizer, rows[:5], None)
    total = 0.0
    for row, item in zip(rows[:5], items, strict=True):
        prompt = tokenizer(row.prompt)["input_ids"]
        answer = [*tokenizer(row.completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        assert item["tokens"] == len(answer) and item["bytes"] == len(row.completion.encode())
    sides = task_estimates(metric_of("loss"), items, items)
    assert sides["after"]["value"] == pytest.approx(total / sum(i["tokens"] for i in items), rel=1e-4)
    assert sides["others"][0]["after"]["value"] == pytest.approx(total / sum(i["bytes"] for i in items), rel=1e-4)
    assert sides["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 5}
    assert [o["metric"] for o in sides["others"]] == ["loss per byte", "exact match"]


def test_a_pooled_loss_by_hand():
    # (2 + 6) / (1 + 3) = 2; residuals 2 - 2 * 1 = 0 and 6 - 2 * 3 = 0: no spread at all
    assert stats.pooled([2, 6], [1, 3]).to_dict() == {"value": 2.0, "low": 2.0, "high": 2.0, "n": 2}
    # (1 + 5) / 4 = 1.5; residuals -0.5 and 0.5 over the mean size 2: -0.25 and 0.25, their error 0.25, t(1) = 12.706
    one = stats.pooled([1, 5], [1, 3])
    assert one.value == 1.5 and one.high - one.value == pytest.approx(0.25 * 12.7062, rel=1e-4)
    with pytest.raises(HoldfastError, match="size of 0"):
        stats.pooled([1, 2], [1, 0])


def test_intervals_of_a_pooled_loss_hold_the_truth():
    draw, hit = np.random.default_rng(0), 0
    for _ in range(400):
        size = draw.integers(1, 40, 60)
        total = size * (1.3 + 0.5 * draw.normal(size=60)) + 2  # rows with few tokens cost more for each
        one = stats.pooled(total, size)
        hit += one.low <= 1.3 + 2 / 20 <= one.high
    assert 0.92 <= hit / 400 <= 0.98


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 1,250.50 it is", "1250.50"),
        ("3 and -4", "-4"),
        ("\u22122", "-2"),
        (".5", "0.5"),
        ("1e3.", "1000"),
        ("10-20 minutes", "20"),  # a range, no sign
        ("20-18", "18"),
        ("(5)-3", "3"),
        ("GPT-4", "4"),
        ("x=-4", "-4"),
        ("**-0.5**", "-0.5"),
        ("1,2,3", "3"),  # a list
        ("1,250,000", "1250000"),
        ("12,3456", "3456"),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == last_number(number) and str(last_number(number)) == number


def test_an_exponent_that_no_number_has_is_none():
    assert last_number("5e1234567890123456789012") is None and last_number("7 or 5e1234567890123456789012") is None


def test_a_verifier_reads_the_same_last_number():
    assert [verifiers.number(text, "20", None) for text in ("10-20", "1,20", "120", "-20")] == [1, 1, 0, 0]
    assert verifiers.number("GPT-4", "none", None) == 0


def test_judges_of_text():
    row = Row("How many?", " 12 apples are left", where="a.jsonl:1")
    for name in ("chrf", "rouge_l"):
        judge_text, top = judge_of(name), METRICS[name].top
        right, near, wrong = (judge_text(t, row) for t in ("12 apples are left", "12 apples", "zz"))
        assert right == pytest.approx(top) and top > near > wrong >= 0
    assert [judge_of("number")(t, Row("", "#### 12")) for t in ("It is 12.0", "12 of 13", "none")] == [1, 0, 0]


def test_chrf_is_told_of_100():
    items = judged(
        [Row("q", " abcdef", where=str(n)) for n in range(4)], [{"answer": "abcdef"}] * 4, judge_of("chrf"), 100.0
    )
    sides = task_estimates(metric_of("chrf"), None, items)
    assert sides["before"] is None and sides["after"]["value"] == pytest.approx(100) and sides["after"]["n"] == 4


def test_the_end_that_a_template_writes_is_no_part_of_an_answer(tiny_model):
    tokenizer = MADE["bytes"]()
    encoder = Encoder(tokenizer, [tokenizer.convert_tokens_to_ids("<|im_end|>")])
    assert encoder.without_end("Paris<|im_end|>\n") == "Paris" and encoder.without_end(" Paris") == " Paris"
    assert encoder.without_end("<|im_end|>\n") == "<|im_end|>\n"  # nothing else would be left
    (row,) = plainly([Row("q", "Paris is large<|im_end|>\n", where="a:1")], encoder)
    assert judge_of("chrf")("Paris is large", row) == pytest.approx(100)
    assert judge_of("rouge_l")("Paris is large", row) == 1


def test_bytes_are_those_of_the_text(world, tmp_path):
    model, tokenizer = build_model(), MADE["bytes"]()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = [Row("q", "Paris<|im_end|>\n", where="a:1"), Row("q", "Paris", where="a:2")]
    model.resize_token_embeddings(len(tokenizer))
    assert [i["bytes"] for i in score_task(model, tokenizer, rows, None)] == [5, 5]


def test_rouge_needs_words_that_it_knows():
    with pytest.raises(DataError, match=r"a:1: data.metric is rouge_l, which knows words of a to z"):
        check_rows("rouge_l", [Row("q", "\u041f\u0430\u0440\u0438\u0436", where="a:1")])
    check_rows("chrf", [Row("q", "\u041f\u0430\u0440\u0438\u0436", where="a:1")])


# ---- what a model writes


def test_answers_are_those_of_each_prompt_alone(tiny_model, tokenizer, rows):
    model, shares = tiny_model(), []
    together = written(model, tokenizer, rows[:6], 5, progress=shares.append)
    assert together == [written(model, tokenizer, [r], 5)[0] for r in rows[:6]] and shares[-1] == 1
    assert any(one["answer"] for one in together)


def test_nothing_is_written_beyond_the_positions(tiny_model, tokenizer, rows):
    model = tiny_model()
    longest = max(len(tokenizer(r.prompt)["input_ids"]) for r in rows[:3])
    model.config.max_position_embeddings = longest + 4
    texts = written(model, tokenizer, rows[:3], 500)
    assert all(len(tokenizer(t["answer"])["input_ids"]) < longest + 8 for t in texts)


def test_an_answer_says_where_it_was_cut(tiny_model, tokenizer, rows):
    """The same model, once as it is and once so that the first token it writes is an end."""
    model, row = tiny_model(), rows[0]
    assert [one["cut"] for one in written(model, tokenizer, rows[:2], 5)] == [5, 5]
    ((first, *_),) = new_tokens(model, tokenizer, [(tokenizer(row.prompt)["input_ids"], 5)], do_sample=False)
    ending = tiny_model()
    ending.generation_config.eos_token_id = first
    assert [written(ending, tokenizer, [row], most)[0]["cut"] for most in (5, 1)] == [0, 0]


def test_no_answer_is_cut_short_of_the_longest_reference(tiny_model, tokenizer, rows):
    model = tiny_model()
    model.config.max_position_embeddings = 2048
    long = Row(rows[0].prompt, " billing" * 600, where="a:1")
    reference = len(tokenizer(long.completion)["input_ids"])
    assert reference > 512 and written(model, tokenizer, [long])[0]["cut"] >= reference


def test_cut_answers_are_counted_and_marked():
    whole, cut, early = ({"correct": 1, "answer": "a b", "cut": n} for n in (0, 512, 90))
    assert cut_words([whole], [whole]) == "" == cut_words(None, [{"correct": 1, "answer": None}])
    assert cut_words([cut, whole], [cut, cut]).startswith("2 of 2 answers (base: 1) were cut at 512 tokens")
    assert cut_words(None, [cut, early, whole]).startswith("2 of 3 answers were cut at 90 to 512 tokens")
    (shown,) = examples.answers([Row("q", "a b c")], [whole], [cut])
    assert (shown["before"], shown["after"]) == ("a b", "a b ...")


# ---- a user's own function


def test_an_own_function_sees_the_columns(tmp_path):
    (tmp_path / "rules.py").write_text(RULES, encoding="utf-8")
    data = write_rows(tmp_path / "d.jsonl", [Row("a", " x"), Row("b", " y")])
    rows = [Row("b", " y", where="d.jsonl:2")]
    score = judge("rules:begins", tmp_path, [Set(Source(path=str(data)), "task", None, None, None)], rows)
    assert (score("yes", rows[0]), score("no", rows[0])) == (1, 0)


def test_an_own_function_reads_no_more_than_it_needs(tmp_path, monkeypatch):
    """Two files of one name: the set that is named first is asked, and nothing behind the last row is read."""
    (tmp_path / "rules.py").write_text(RULES, encoding="utf-8")
    read = []

    def records(source, base_dir, shown):
        def each():
            for n in range(1, 10):
                read.append((source.path, n))
                yield f"d.jsonl:{n}", {"queue": source.path}

        return each(), None

    monkeypatch.setattr(own_metric, "records_of", records)
    sets = [Set(Source(path=p), "task", None, None, None) for p in ("mine/d.jsonl", "other/d.jsonl")]
    row = Row("b", " y", where="d.jsonl:2")
    assert judge("rules:begins", tmp_path, sets, [row])("my answer", row) == 1
    assert read == [("mine/d.jsonl", 1), ("mine/d.jsonl", 2)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rules:broken", "d.jsonl:2: data.metric rules:broken failed on this row (ZeroDivisionError"),
        ("rules:large", "d.jsonl:2: data.metric rules:large gave 7"),
    ],
)
def test_an_own_function_that_fails_is_told_with_its_row(tmp_path, name, said):
    (tmp_path / "rules.py").write_text(RULES, encoding="utf-8")
    row = Row("b", " y", where="d.jsonl:2")
    with pytest.raises(DataError) as told:
        judge(name, tmp_path, [], [row])("yes", row)
    assert told.value.what.startswith(said) and "\n" not in told.value.what


def test_an_own_function_must_be_there(tmp_path):
    (tmp_path / "rules.py").write_text(RULES, encoding="utf-8")
    (tmp_path / "bent.py").write_text("def (", encoding="utf-8")
    for name, said in {
        "rules:no": "no function no",
        "bent:f": "SyntaxError",
        "absent_here:f": "ModuleNotFound",
    }.items():
        with pytest.raises(DataError, match=said):
            load_function(name, tmp_path)


COMMANDS = {  # what the program does with what it read: (python, what is said)
    "right": ("print(float(x['answer'][:1] == x['row']['queue'][:1]))", None),
    "fails": ("raise SystemExit('no such label')", "exit code 1: no such label"),
    "talks": ("print('fine')", "it printed 'fine' and no number"),
    "large": ("print(7)", "gave 7 for this row"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_judges_each_answer(tmp_path, name):
    body, said = COMMANDS[name]
    (tmp_path / "judge.py").write_text(f"import json, sys\nx = json.load(sys.stdin)\n{body}\n", encoding="utf-8")
    data = write_rows(tmp_path / "d.jsonl", [Row("a", " x"), Row("b", " y")])
    row = Row("b", " y", where="d.jsonl:2")
    sets = [Set(Source(path=str(data)), "task", None, None, None)]
    score = judge(f"command: {sys.executable} judge.py", tmp_path, sets, [row])
    if said is None:
        assert (score("yes", row), score("no", row)) == (1, 0)
        return
    with pytest.raises(DataError) as told:
        score("yes", row)
    assert "d.jsonl:2" in told.value.what and said in told.value.what


def test_a_command_is_told_by_the_files_it_names(tmp_path):
    name = "command: python judge.py"
    (tmp_path / "judge.py").write_text("print(1)")
    first = own_metric.identity(name, tmp_path)
    (tmp_path / "judge.py").write_text("print(0)")
    assert first != own_metric.identity(name, tmp_path) != own_metric.identity("command: python other.py", tmp_path)


def test_a_command_must_be_there(tmp_path):
    for name, said in (("command: no-such-program-1", "is no program"), ("command:", "without a program"),
                       ("command: 'open", "no command")):  # fmt: skip
        with pytest.raises(DataError, match=said):
            load_function(name, tmp_path)
    own = tmp_path / "judge"
    own.write_text("#!/bin/sh\ncat > /dev/null; echo 0.5\n", encoding="utf-8")
    own.chmod(0o755)
    assert load_function("command: judge", tmp_path)("p", "a", {}) == 0.5


def test_two_folders_have_each_their_own_rules(tmp_path):
    found = []
    for n in (0, 1):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "helper.py").write_text(f"N = {n}\n", encoding="utf-8")
        (tmp_path / str(n) / "rules.py").write_text(f"def score(p, a, r):\n    return {n}\n", encoding="utf-8")
        found.append(load_function("rules:score", tmp_path / str(n)))
    assert [f("", "", {}) for f in found] == [0, 1]


# ---- whole runs


def test_free_text_is_scored_by_its_loss(world, tmp_path, rows):
    few = write_rows(tmp_path / "few.jsonl", rows[:8])
    one = recipe(world, tmp_path / "run", None)
    data = one.data.model_copy(update={"train": Source(path=str(few)), "validation_size": 3})
    tune(one.model_copy(update={"data": data}))
    report = report_of(tmp_path / "run")
    task = report["task"]
    assert (task["metric"], task["unit"], task["lower"], task["chance"]) == ("loss per token", "nats", True, None)
    assert task["after"]["value"] < task["before"]["value"] and task["difference"]["value"] < 0
    assert [o["metric"] for o in task["others"]] == ["loss per byte", "exact match"]
    assert len(task["answers"]) == 3 and all(isinstance(a["before"], str) for a in task["answers"])
    ratio = task["others"][0]["after"]["value"] / task["after"]["value"]
    assert 0 < ratio < 1  # a token is several bytes


def test_written_text_is_scored_and_shown(world, tmp_path):
    tune(recipe(world, tmp_path / "run", "chrf", measure={"max_new_tokens": 6}))
    report = report_of(tmp_path / "run")
    assert (report["task"]["metric"], report["task"]["unit"]) == ("chrF", "of 100")
    assert len(report["task"]["answers"]) == 6 and report["task"]["after"]["high"] <= 100
    assert re.search(r"\d of 6 answers \(base: \d\) were cut at 6 tokens", report["task"]["note"])
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Answers to your task" in html


def test_a_run_with_an_own_function_and_its_change(world, tmp_path):
    rules = tmp_path / "rules.py"
    rules.write_text(RULES, encoding="utf-8")
    one = write_recipe(tmp_path / "recipe.yaml", recipe_data(world, tmp_path / "run", data={"metric": "rules:begins"}))
    tune(one, ["measure.max_new_tokens=3"])
    assert report_of(tmp_path / "run")["task"]["metric"] == "rules:begins"
    (tmp_path / "run" / "report.json").unlink()
    rules.write_text(RULES + "\n# another\n", encoding="utf-8")
    with pytest.raises(HoldfastError, match="The metric of this recipe is no longer"):
        tune(one, ["measure.max_new_tokens=3"])


def test_what_does_not_fit_is_refused_before_work(world, tmp_path, rows, monkeypatch):
    few = write_rows(tmp_path / "few.jsonl", rows[:8])
    refused = {
        "accuracy": (DataError, "no closed set", few, []),
        "number": (DataError, "few.jsonl:[0-9]+: data.metric is number, but the answer .* holds no number", few, []),
        "nowhere:f": (DataError, "cannot be loaded", few, []),
        "chrf": (PlanError, "ProMoT learns a soft prompt", few, [{"ProMoT": {"num_virtual_tokens": 2}}]),
    }
    for metric, (kind, said, train, plan) in refused.items():
        data = {"train": str(train), "validation_size": 3, "metric": metric}
        one = load_recipe(
            write_recipe(tmp_path / "r.yaml", recipe_data(world, tmp_path / "run", data=data, plan=plan))
        )
        with pytest.raises(kind, match=said):
            tune(one)
    monkeypatch.setattr("holdfast.data.metric.find_spec", lambda name: None)
    with pytest.raises(DataError, match="needs the package rouge_score") as told:
        tune(recipe(world, tmp_path / "run", "rouge_l"))
    assert 'pip install "holdfast-lm[metrics]"' in told.value.cure
    assert not (tmp_path / "run" / "before.json").exists()


# ---- a loss is told the right way up


def part(before: float, after: float, half: float, **more):
    ends = [{"value": v, "low": v - half, "high": v + half, "n": 9} for v in (before, after, after - before)]
    return {"name": "notes", "metric": "loss per token", "unit": "nats", "lower": True,
            **dict(zip(("before", "after", "difference"), ends, strict=True)), **more}  # fmt: skip


def test_less_is_better_everywhere():
    fell, rose, open_ = part(0.9, 0.4, 0.1), part(0.4, 0.9, 0.1), part(0.4, 0.41, 0.1)
    assert [schema.gain_words(p) for p in (fell, rose, open_)] == ["better", "worse", "no change shown"]
    assert schema.gain_words({**fell, "lower": False}) == "worse"
    assert schema.task_words(fell) == "The task went from 0.90 to 0.40 (loss per token in nats, lower is better)."
    report = {"kind": "tune", "task": {**fell, "others": [{**rose, "metric": "loss per byte"}]}, "abilities": []}
    text = markdown.summary(report)
    assert "| -0.50 (-0.60 to -0.40) |  | better |" in text and "| worse |" in text and "lower is better" in text
    out = io.StringIO()
    terminal.show(report, Console(file=out, width=80))
    assert "better" in out.getvalue() and "worse" in out.getvalue() and "loss per byte" in out.getvalue()
    card = model_card({**report, "model": {"name": "m"}, "verdict": {}}, adapter=False)
    assert "notes (loss per token in nats, lower is better)" in card
    html = page.render(report)
    assert "loss per token in nats, lower is better on notes" in html and ": better" in html


def test_a_small_loss_has_an_axis_of_its_own():
    ability = {"name": "a", "before": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}, "tasks": []}
    blocks = page._panels({"task": part(0.30, 0.20, 0.01), "abilities": [ability]})
    assert ">0.75<" in blocks[1]["axis"] and ">0.75<" not in blocks[0]["axis"]


def test_what_a_model_wrote_is_never_markup():
    words = "<script>alert(1)</script>"
    shown = {"task": "d:1", "prompt": words, "expected": words, "before": words, "after": words}
    html = page.render({"kind": "tune", "task": part(1, 0.5, 0.1, answers=[shown])})
    assert "<script" not in html and html.count("&lt;script&gt;") == 4


def test_an_interval_nobody_knows_is_left_out():
    assert math.isinf(stats.pooled([1.0], [2]).high) and stats.pooled([1.0], [2]).to_dict()["high"] is None
    assert schema.gain_words({"difference": {"value": 1.0, "low": None, "high": None}}) == ""
