"""The GPU benchmark's dry run, and the arithmetic behind every benchmark's figures."""

import json

import pytest

from scripts import FOLDER, scripts

NAMES = ("_common", "stand_in", "gpu_tries", "gpu", "growth", "memory", "since", "speed", "startup")
NAMES += ("performance_page",)
LATER = pytest.mark.long  # a whole dry run of both sides
pytestmark = pytest.mark.filterwarnings("default")  # what other libraries warn of is not ours


@pytest.fixture(scope="module")
def bench():
    """The benchmark scripts, imported as they import each other; forgotten afterwards."""
    pytest.importorskip("trl")
    with scripts(*NAMES) as found:
        yield vars(found)


@pytest.fixture(scope="module")
def dry(bench, tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    bench["gpu"].main(["--dry-run", "--out", str(path), "--try", "cudnn-off,varlen,fixed,pageable,tree"])
    return path


@LATER
def test_both_loops_train_the_same(dry):
    (model,) = json.loads(dry.read_text())["models"]
    assert [r["kind"] for r in model["training"]] == ["lora", "full"]
    for run in model["training"]:
        own = run["blocks"]["ours"][0]
        for name, (block,) in run["blocks"].items():
            assert block["tokens"] == own["tokens"] and block["trained"] == own["trained"], name
            assert block["loss"] == pytest.approx(own["loss"], rel=1e-2), name
        assert len(run["blocks"]) == 6 and not run["out_of_memory"] and not run["lost"]


@LATER
def test_both_scorers_agree(dry):
    pytest.importorskip("lm_eval")
    (model,) = json.loads(dry.read_text())["models"]
    scores = model["scoring"]
    assert scores["items"] == 20 and scores["equal"] >= 18
    assert set(scores["seconds"]) == {"ours", "harness", "ours, tokens alone", "ours, tree"}
    assert scores["ratio"] == pytest.approx(scores["seconds"]["harness"][0] / scores["seconds"]["ours"][0])


@LATER
def test_prompts_with_many_continuations_and_beginnings_are_timed(dry):
    found = json.loads(dry.read_text())
    assert found["continuations"]["items"] == 12 and found["continuations"]["items_per_second"] > 0
    assert 0 < found["begins"]["pass"] < 10


@LATER
def test_suspects_are_tried_one_by_one_and_a_step_is_profiled(dry, bench):
    found = json.loads(dry.read_text())
    assert set(found["tries"]) == {"as it is", "cudnn-off", "varlen", "fixed", "pageable"}
    assert all(t["rate"] > 0 for t in found["tries"].values())
    assert len(found["profile"]["longest"]) == 10 and found["profile"]["busy_seconds"] > 0
    with pytest.raises(SystemExit, match="knows no luck"):
        bench["gpu"].main(["--dry-run", "--try", "luck"])


def test_what_does_not_fit_the_time_is_named(bench, tmp_path):
    bench["gpu"].main(["--dry-run", "--minutes", "0", "--out", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["models"] == []
    rows = [["tiny", "lora", 100], ["tiny", "full", 100], ["tiny", "scoring", 0]]
    assert found["left_out"] == [*rows, ["tiny", "continuations", 0], ["a process", "begins", 0]]


@LATER
def test_what_fails_is_named_and_the_rest_goes_on(dry, bench, monkeypatch):
    assert json.loads(dry.read_text())["failed"] == []

    def broken(*_):
        raise RuntimeError("no such kernel")

    gpu, common = bench["gpu"], bench["_common"]
    lost = {}
    assert common.alternate({"bad": broken, "good": common.Block}, 0, lost) == {"bad": [], "good": []}
    block = common.Block(seconds=[1.0], tokens=[1, 2])
    assert common.alternate({"bad": broken, "good": lambda: block}, 2, lost) == {"good": [block, block]}
    assert lost == {"bad": "RuntimeError: no such kernel"}
    with pytest.raises(RuntimeError):
        common.alternate({"bad": broken}, 1)
    for name in ("training", "scoring", "fanned"):
        monkeypatch.setattr(gpu, name, broken)
    kept = []
    found = gpu.measure(gpu.DRY, 1, kept.append)
    assert [row[1:] for row in found["failed"]][-1] == ["continuations", 0, "RuntimeError: no such kernel"]
    assert len(found["failed"]) == 4 and found["begins"]["pass"] > 0 and len(kept) == 5


@LATER
def test_the_page_says_what_is_not_measured(dry, bench, tmp_path):
    page = bench["performance_page"].page
    assert page(tmp_path, tmp_path / "growth.png").count("Not measured yet.") == 7
    text = page(dry.parent, tmp_path / "growth.png")
    assert text.count("Not measured yet.") == 6
    assert "| tiny | lora |" in text and "torch 2" in text


def test_the_page_shows_the_committed_results(bench, tmp_path):
    text = bench["performance_page"].page(FOLDER / "results", tmp_path / "growth.png")
    assert "| `holdfast --help`, whole process |" in text and "plain tuning of the same kind = 1" in text


def test_a_rate_leaves_the_first_step_out(bench):
    block = bench["_common"].Block(seconds=[1.0, 3.0], tokens=[99, 10, 30], trained=[9, 1, 3])
    assert block.rate() == 10.0 and block.rate("trained") == 1.0


def test_an_exponent_is_the_slope_of_the_logarithms(bench):
    x = [1, 2, 4, 8]
    exponent = bench["_common"].exponent
    assert exponent(x, [3 * n**1.5 for n in x]) == pytest.approx(1.5)
    assert exponent(x, [0, 0, 5, 0]) is None


def test_curves_apart(bench):
    assert bench["_common"].apart([2.0, 2.0], [2.0, 1.0]) == 0.25


def test_the_best_setting_must_keep_the_loss(bench):
    found = {
        "defaults": {"tokens_per_second": 5.0, "apart": 0.0},
        "wrong": {"tokens_per_second": 9.0, "apart": 0.5, "equal": False},
        "failed": {"error": "no"},
        "right": {"tokens_per_second": 7.0, "apart": 0.0, "equal": True},
    }
    assert bench["speed"].best_of(found) == "right"
    assert bench["speed"].best_of({"defaults": found["defaults"], "wrong": found["wrong"]}) == "defaults"


def test_random_shapes_have_the_size_they_are_named_after(bench):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    named = {"10M": 10e6, "30M": 30e6, "100M": 100e6, "300M": 300e6, "1B": 1e9, "smollm2-135m": 134.5e6}
    named |= {"llama-1b": 1.236e9, "qwen-0.6b": 0.596e9}
    for name, size in named.items():
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**bench["_common"].SIZES[name]))
        assert bench["_common"].parameters(model) == pytest.approx(size, rel=0.05), name
