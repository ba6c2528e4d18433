"""The bridge to lm-evaluation-harness against the harness's own HFLM, on identical requests and whole tasks."""

import copy
import importlib
import json
import logging
import random
import sys
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import datasets
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

from holdfast.errors import HoldfastError
from holdfast.measure import lm_eval as bridge
from holdfast.measure.lm_eval import HoldfastLM, _metric, _parse, measure_task

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own warnings are not ours
SHOTS = "Ticket: The box came open.\nQueue: shipping desk\n\n"
PAIRS = [
    (SHOTS + "Ticket: Where is order 1042 now?\nQueue:", " shipping desk"),
    (SHOTS + "Ticket: Where is order 1042 now?\nQueue: ", "billing"),  # the blank moves to the continuation
    (SHOTS + "Ticket: Where is order 1042 now?\nQueue:", " other"),
    ("", "Please refund the last payment."),
    ("", "<|bos|> with its own beginning"),
    ("<|bos|>Q: 12\nA:", " 3"),
    ("Q: 12\n", "A"),
    ("   ", "a context of blanks only"),
    ("Q: \u00fcber \u4f60", "\u597d"),
]
TEXTS = ["I was charged twice for May.", "", "word " * 70 + "end\n\n  two"]
NUMBERS = [(a, b) for a in range(4) for b in range(4)]
TRAIN = [{"q": f"{a} and {b}", "ch": [f"{a}", f"{b} of {a}", "none at all"], "lab": (a + b) % 3} for a, b in NUMBERS]
TEST = [{"q": f"{a} or {b}", "ch": [f"{b} by {a}", f"{a}", "box"], "lab": (a * b) % 3} for a, b in NUMBERS[:12]]
SPLITS = {"train": datasets.Dataset.from_list(TRAIN), "test": datasets.Dataset.from_list(TEST)}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """The harness's survey of the machine takes seconds; its data cache stays in the test's folder."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def both(tiny_model, tokenizer):
    def make(most=None, tied=True):
        model = tiny_model(tied)
        if most:
            model.config.max_position_embeddings = most
        return HoldfastLM(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)

    return make


def requests(kind, arguments):
    return [Instance(kind, {}, args, n) for n, args in enumerate(arguments)]


@pytest.mark.parametrize("most", [None, 12])
def test_loglikelihoods_equal_hflm(both, most):
    ours, theirs = both(most)
    asked = requests("loglikelihood", [p for p in PAIRS if most is None or len(p[1]) < 8])
    got, want = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    assert [g for _, g in got] == [g for _, g in want]
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in want], atol=1e-4)
    assert (ours.num_truncated > 0) == (most is not None)


def test_a_greedy_continuation_is_flagged(both, tokenizer):
    """The random model's own next tokens: the flag is not always False."""
    ours, theirs = both()
    context = PAIRS[0][0]
    ids = torch.tensor([tokenizer.encode(context)])
    new = ours.model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
    asked = requests("loglikelihood", [(context, tokenizer.decode(new)), (context, "zz")])
    assert [g for _, g in ours.loglikelihood(asked)] == [g for _, g in theirs.loglikelihood(asked)]
    assert ours._loglikelihood_tokens([(None, ids[0].tolist(), new.tolist())])[0][1]


@pytest.mark.parametrize("most", [None, 16])
def test_rolling_equals_hflm(both, most):
    ours, theirs = both(most)
    asked = requests("loglikelihood_rolling", [(t,) for t in TEXTS])
    want = theirs.loglikelihood_rolling(asked)
    np.testing.assert_allclose(ours.loglikelihood_rolling(asked), want, atol=1e-4)
    assert want[0] < 0


@pytest.mark.parametrize("most", [None, 40])
def test_generated_text_equals_hflm(both, most):
    ours, theirs = both(most, tied=False)  # a tied random model repeats itself
    asked = [(c, {"until": [], "max_gen_toks": 24}) for c, _ in PAIRS[:3]]
    free = theirs.generate_until(requests("generate_until", asked))
    stops = [t[len(t) // 2 : len(t) // 2 + 2] for t in free]  # stop strings the model does write
    asked += [(c, {"until": [s, "\n\n"], "max_gen_toks": 24}) for (c, _), s in zip(PAIRS, stops, strict=False)]
    asked += [(PAIRS[5][0], {"until": stops[0], "max_gen_toks": 7, "do_sample": False, "temperature": 0.0})]
    asked = requests("generate_until", asked)
    got = ours.generate_until(asked)
    assert got == theirs.generate_until(asked)
    assert got[:3] == free and all(len(cut) < len(whole) for cut, whole in zip(got[3:6], free, strict=True))


def test_the_models_own_generation_config_counts(both):
    ours, theirs = both(tied=False)
    asked = requests("generate_until", [(c, {"until": [], "max_gen_toks": 16}) for c, _ in PAIRS[:2]])
    plain = ours.generate_until(asked)
    ours.model.generation_config.repetition_penalty = 50.0
    assert ours.generate_until(asked) == theirs.generate_until(asked) != plain


def test_a_tokenizer_without_bos(tiny_model, tokenizer):
    from tokenizers import processors

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    ours, theirs = (m(tiny_model(), tokenizer) for m in (HoldfastLM, lambda a, b: HFLM(pretrained=a, tokenizer=b)))
    assert ours.prefix_token_id == theirs.prefix_token_id == tokenizer.eos_token_id
    asked = requests("loglikelihood", [p for p in PAIRS if p[0].strip() or not p[0]])
    np.testing.assert_allclose(*([x for x, _ in lm.loglikelihood(asked)] for lm in (ours, theirs)), atol=1e-4)
    with pytest.raises(HoldfastError, match="none before it"):
        ours.loglikelihood(requests("loglikelihood", [("  ", "x")]))


def test_a_chat_template_is_the_same(both):
    ours, theirs = both()
    turns = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(turns) == theirs.apply_chat_template(turns) != ""


def test_what_does_not_fit_is_refused(both):
    ours, _ = both(8)
    with pytest.raises(HoldfastError, match="the model reads 8"):
        ours.loglikelihood(requests("loglikelihood", [("a", " long" * 20)]))
    with pytest.raises(HoldfastError, match="max_gen_toks"):
        ours.generate_until(requests("generate_until", [("a", {"until": ["\n"]})]))


def metrics(*names):
    return [{"metric": m, "higher_is_better": True} for m in names]


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "ch",
    "doc_to_target": "lab",
    "metric_list": metrics("acc", "acc_norm", "exact_match", "acc_mutual_info"),
}
EXACT = {"output_type": "loglikelihood", "doc_to_target": " {{ch[lab]}}", "metric_list": metrics("acc", "perplexity")}
ROLLS = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{q}}",
    "metric_list": metrics("word_perplexity", "byte_perplexity", "bits_per_byte"),
}
WRITES = {
    "output_type": "generate_until",
    "doc_to_target": "{{ch[lab]}}",
    "generation_kwargs": {"until": ["\n", "of"], "max_gen_toks": 6},
    "metric_list": metrics("exact_match"),
}


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("kind", [CHOICE, EXACT, ROLLS, WRITES], ids=lambda k: k["output_type"])
def test_whole_tasks_equal_hflm(both, kind, shots):
    if kind is ROLLS and shots:
        shots = None  # perplexity has no demonstrations
    task = {
        "task": "toy",
        "custom_dataset": lambda **_: SPLITS,
        "fewshot_split": "train",
        "test_split": "test",
        "doc_to_text": "Q: {{q}}\nA:",
        **kind,
    }
    manager = TaskManager(include_defaults=False)
    found = [
        lm_eval.simple_evaluate(model=lm, tasks=[task], num_fewshot=shots, task_manager=manager, bootstrap_iters=0)
        for lm in both()
    ]
    ours, theirs = (f["results"]["toy"] for f in found)
    assert ours.keys() == theirs.keys()
    for key in (k for k in ours if not isinstance(ours[k], str)):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    prompts = [[s["arguments"] for s in sorted(f["samples"]["toy"], key=lambda s: s["doc_id"])] for f in found]
    assert prompts[0] == prompts[1]
    if shots:
        assert prompts[0][0][0][0].count("Q:") == 3


# measure_task


def write_task(folder, name="mine", **changes):
    for split, rows in (("train", TRAIN), ("test", TEST)):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {s: str(folder / f"{s}.jsonl") for s in ("train", "test")}},
        "fewshot_split": "train",
        "test_split": "test",
        "doc_to_text": "Q: {{q}}\nA:",
        "metadata": {"version": 3},
        **CHOICE,
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def test_a_yaml_task_is_measured(tiny_model, tokenizer, tmp_path):
    path = write_task(tmp_path)
    model, told = tiny_model(), []
    manager = TaskManager(include_defaults=False)
    want = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=[str(path)], num_fewshot=2, task_manager=manager
    )
    got = measure_task(model, tokenizer, f"lm_eval:{path}:2", progress=told.append)
    assert {k: got[k] for k in ("suite", "num_fewshot", "limit", "seed", "num_truncated")} == {
        "suite": f"lm_eval:{path}:2",
        "num_fewshot": 2,
        "limit": None,
        "seed": 1234,
        "num_truncated": 0,
    }
    (task,) = got["tasks"]
    items = task.pop("items")
    assert task == {
        "name": "mine",
        "version": 3,
        "num_fewshot": 2,
        "chance": pytest.approx(1 / 3),
        "metric": "acc_norm",
        "clustered": False,
    }
    assert [i["id"] for i in items] == [f"mine/{n}" for n in range(len(TEST))]
    assert np.mean([i["correct"] for i in items]) == pytest.approx(want["results"]["mine"]["acc_norm,none"])
    assert told[-1] == pytest.approx(1)
    few = measure_task(model, tokenizer, f"lm_eval:{path}:2", limit=5)["tasks"][0]["items"]
    assert few == items[:5]
    assert json.dumps(got)


@pytest.mark.parametrize(
    ("changes", "metric", "chance"),
    [
        (EXACT, "acc", 0),
        (WRITES, "exact_match", 0),
        (ROLLS, "likelihood per byte", 0),
        (ROLLS | {"metric_list": metrics("word_perplexity")}, "likelihood per word", 0),
        (CHOICE | {"metric_list": metrics("acc", "acc_mutual_info")}, "acc", 1 / 3),
        (CHOICE | {"metric_list": metrics("exact_match")}, "exact_match", 0),
    ],
)
def test_each_output_type_has_a_score(tiny_model, tokenizer, tmp_path, changes, metric, chance):
    if changes["output_type"] != "multiple_choice":
        changes = {"doc_to_choice": None, **changes}
    path = write_task(tmp_path, **changes)
    (task,) = measure_task(tiny_model(), tokenizer, f"lm_eval:{path}", limit=4)["tasks"]
    assert (task["metric"], task["chance"]) == (metric, pytest.approx(chance))
    assert len(task["items"]) == 4 and all(0 <= i["correct"] <= 1 for i in task["items"])
    if metric == "likelihood per byte":
        text = TEST[0]["q"]
        lm = HoldfastLM(tiny_model(), tokenizer)
        (logprob,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
        assert task["items"][0]["correct"] == pytest.approx(np.exp(logprob / len(text.encode())), rel=1e-4)


def test_every_demonstration_may_be_shown(tiny_model, tokenizer, tmp_path):
    path = write_task(tmp_path, fewshot_config={"sampler": "first_n"})  # as MMLU does with its five
    measured = measure_task(tiny_model(), tokenizer, f"lm_eval:{path}:16", limit=1)
    assert (measured["num_fewshot"], measured["num_truncated"]) == (16, 0)


def test_a_group_is_several_tasks(tiny_model, tokenizer, tmp_path, monkeypatch):
    for name in ("one", "two"):
        write_task(tmp_path, name)
    path = tmp_path / "both.yaml"
    path.write_text("group: 'both'\ntask: [one, two]\n")
    made = TaskManager  # without the registry, which takes seconds to read
    monkeypatch.setattr(bridge, "TaskManager", lambda **kw: made(**{**kw, "include_defaults": False}))
    tasks = measure_task(tiny_model(), tokenizer, f"lm_eval:{path}", limit=2)["tasks"]
    assert [(t["name"], [i["id"] for i in t["items"]]) for t in tasks] == [
        ("one", ["one/0", "one/1"]),
        ("two", ["two/0", "two/1"]),
    ]


def test_the_process_is_left_as_it_was(tiny_model, tokenizer, tmp_path):
    path, logger = write_task(tmp_path), logging.getLogger("lm_eval")
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    want = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    level = logger.level
    measure_task(tiny_model(), tokenizer, f"lm_eval:{path}", limit=1)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == want
    assert logger.level == level


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("lm_eval:arc_easy", ("arc_easy", None)),
        ("lm_eval:arc_easy:5", ("arc_easy", 5)),
        ("lm_eval:C:\\tasks\\mine.yaml", ("C:\\tasks\\mine.yaml", None)),
        ("lm_eval:a/b.yaml:0", ("a/b.yaml", 0)),
    ],
)
def test_names(name, parsed):
    assert _parse(name) == parsed


def test_mistakes_are_named(tiny_model, tokenizer, tmp_path, monkeypatch):
    model = tiny_model()
    manager = TaskManager(include_defaults=False, include_path=str(write_task(tmp_path).parent))
    monkeypatch.setattr(bridge, "_manager", lambda registered: manager)

    def fails(name, match):
        with pytest.raises(HoldfastError, match=match):
            measure_task(model, tokenizer, name, limit=1)

    fails("lm_eval:mime", r"no task 'mime'.\nDid you mean 'mine'\?")
    fails("lm_eval:missing.yaml", "missing.yaml cannot be read")
    fails(f"lm_eval:{write_task(tmp_path, 'mine')}:17", "has 16 demonstrations, too few to draw 17")
    fails(f"lm_eval:{write_task(tmp_path, 'bad', doc_to_text='{{nope}}')}", "cannot be loaded .*nope")
    fails(f"lm_eval:{write_task(tmp_path, 'hub', dataset_path='nobody/nothing', dataset_kwargs=None)}", "HF_TOKEN")
    fails(f"lm_eval:{write_task(tmp_path, 'code', unsafe_code=True)}", "code that the model wrote")


def test_a_metric_beyond_one_is_no_score():
    rows = [{"metrics": ["bleu"], "bleu": 31.0}, {"metrics": ["bleu"], "bleu": 0.5}]
    with pytest.raises(HoldfastError, match="has bleu"):
        _metric("translate", rows, {"bleu": True})
    assert _metric("qa", [{"metrics": ["f1", "em"], "f1": 0.5, "em": 0}], {})[0] == "f1"
    assert _metric("qa", [{"metrics": ["ter", "em"], "ter": 0.5, "em": 0}], {"ter": False})[0] == "em"


def test_without_the_harness_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.delitem(sys.modules, "holdfast.measure.lm_eval")
    with pytest.raises(HoldfastError, match=r'pip install "holdfast-lm\[eval\]"'):
        importlib.import_module("holdfast.measure.lm_eval")
    sys.modules["holdfast.measure.lm_eval"] = bridge
