"""The learning rate of a run: the rule of `auto`, and where a user sees it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from holdfast import Plan
from holdfast.methods import PEQA, ICLAnchor, LoRA
from holdfast.methods.adapt.control_llm import ControlLLM
from holdfast.methods.adapt.half_fine_tune import HalfFineTune
from holdfast.runs.job import default_plan
from holdfast.runs.rate import auto
from holdfast.verbs.explain import command as explain
from holdfast.verbs.tune import tune
from tiny_run import recipe_data, write_recipe


def of_width(width):
    """A model of that width, which has shapes and no weights."""
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4, vocab_size=8
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "width, adapter, full",
    # 1.5e-3 * 576 / width; a tenth of it, at most 2e-5: 8192 gives 1.05e-4 and 1.05e-5, to two digits
    [(32, 1.5e-3, 2e-5), (576, 1.5e-3, 2e-5), (2048, 4.2e-4, 2e-5), (4096, 2.1e-4, 2e-5), (8192, 1.1e-4, 1.1e-5)],
)
def test_the_rule_by_hand(width, adapter, full):
    model = of_width(width)
    assert auto(Plan(default_plan()), model).value == adapter
    assert auto(Plan([]), model).value == full


def test_the_kind_of_tuning_comes_from_what_trains():
    model = of_width(576)
    for methods, value in (
        ([LoRA()], 1.5e-3),
        ([ICLAnchor()], 2e-5),
        ([HalfFineTune()], 2e-5),
        ([PEQA()], 2e-5),  # scales of the base's weights, which move by the rate itself
        ([ControlLLM()], 2e-5),  # copies of the base's layers, which the paper tunes like these
    ):
        assert auto(Plan(methods), model).value == value, methods
    assert "new weights" in auto(Plan([LoRA()]), model).why


def test_the_width_has_other_names():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=1152, n_layer=1, n_head=2, vocab_size=8))
    assert auto(Plan([LoRA()]), model).value == 7.5e-4


def test_a_run_says_its_rate_and_why(world, tmp_path, capsys):
    data = recipe_data(world, tmp_path / "run", training={"max_steps": 2})
    del data["training"]["learning_rate"]
    path = write_recipe(tmp_path / "recipe.yaml", data)
    explain(path, (), 0)
    assert "Learning rate: 0.0015 (auto: new weights" in " ".join(capsys.readouterr().out.split())
    tune(path)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["training"]["rate"]["value"] == 1.5e-3
    assert "Peak learning rate 0.0015: auto: new weights" in (tmp_path / "run" / "report.html").read_text()
