"""Live measuring inside a trainer: training does not notice it, and its numbers are those of a plain measurement."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from holdfast import Plan, RetentionCallback, with_plan
from holdfast import methods as hf
from holdfast.errors import HoldfastError, ModelError
from holdfast.measure.scorer import Scorer
from holdfast.measure.suites import measure_suite
from holdfast.report import writing
from holdfast.verbs.callback import FILE, untouched

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:RetentionCallback:UserWarning"),  # so few questions prove nothing
]
QUESTIONS = 40
STEPS = 4


@pytest.fixture
def base(tiny_model) -> Any:
    """The tiny model with dropout, so that a random number taken by the measuring would show."""
    model = tiny_model(tied=False)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    return model


@pytest.fixture(scope="module")
def suite(tiny_model, tokenizer, rows, tmp_path_factory) -> str:
    """Questions whose right answers are the base's own, so that it knows all of them."""
    model, questions = tiny_model(tied=False), []
    starts = [r.prompt[:n] for r in rows for n in range(12, len(r.prompt)) if r.prompt[n].isspace()]
    for context in dict.fromkeys(starts):
        ids = torch.tensor([tokenizer.encode(context)])
        answer = tokenizer.decode(model(ids).logits[0, -1].argmax())
        if answer.isascii() and Scorer(model, tokenizer).score([(context, answer)])[0].greedy:  # text that reads back
            questions.append({"context": context, "begins": answer, "task": "own"})
    assert len(questions) >= QUESTIONS
    path = tmp_path_factory.mktemp("suite") / "own.jsonl"
    path.write_text("\n".join(json.dumps(q) for q in questions[:QUESTIONS]), encoding="utf-8")
    return f"jsonl:{path}"


@pytest.fixture
def make(rows, tokenizer, tmp_path) -> Any:
    """A trainer on the tickets with these callbacks; keywords go to its arguments."""

    def build(model: Any, callbacks: list[Any], kind: type = Trainer, rate: float = 3e-3, **options: Any) -> Any:
        given: dict[str, Any] = {"processing_class": tokenizer}
        if kind is Trainer:
            data = [{"input_ids": i, "labels": i} for i in (tokenizer.encode(r.prompt + r.completion) for r in rows)]
            given["data_collator"] = DataCollatorForSeq2Seq(tokenizer)
        else:
            data = [{"prompt": r.prompt, "completion": r.completion} for r in rows]
        options = {
            "output_dir": str(tmp_path / "out"), "max_steps": STEPS, "per_device_train_batch_size": 2, "seed": 0,
            "learning_rate": rate, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no",
            "logging_steps": 2, "disable_tqdm": True, "gradient_checkpointing": False, **options,
        }  # fmt: skip
        args = {Trainer: TrainingArguments, SFTTrainer: SFTConfig}[kind](**options)
        return kind(model, args, train_dataset=Dataset.from_list(data), callbacks=callbacks, **given)

    return build


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def adapted(model: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"]))


CASES = {
    "Trainer": (Trainer, False, {}),
    "SFTTrainer": (SFTTrainer, False, {}),
    "LoRA": (SFTTrainer, True, {"gradient_accumulation_steps": 2}),
    "checkpointing": (Trainer, False, {"gradient_checkpointing": True}),
    "checkpointing LoRA": (SFTTrainer, True, {"gradient_checkpointing": True}),
    "autocast": (Trainer, False, {"bf16": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_does_not_notice(case, base, tiny_model, make, suite):
    kind, adapter, options = CASES[case]
    runs = []
    for callbacks in ([], [RetentionCallback([suite, "format"], every=2, limit=1)]):
        model = tiny_model(tied=False)
        model.load_state_dict(base.state_dict())
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.2
        trainer = make(adapted(model) if adapter else model, callbacks, kind, **options)
        trainer.train()
        runs.append((weights(trainer.model), [x["loss"] for x in trainer.state.log_history if "loss" in x]))
    assert runs[0][1] == runs[1][1] and runs[0][1]
    assert all(torch.equal(p, runs[1][0][n]) for n, p in runs[0][0].items())
    start = base.state_dict()
    assert adapter or any(not torch.equal(p, start[n]) for n, p in runs[0][0].items())


def test_the_numbers_are_those_of_a_plain_measurement(base, make, suite, tokenizer):
    expected = measure_suite(suite, lambda: base, tokenizer)
    watch = RetentionCallback(suite, every=2)
    trainer = make(base, [watch])
    trainer.train()
    assert watch._before == [expected]
    assert watch._after == [measure_suite(suite, lambda: trainer.model, tokenizer)]
    assert [(h["step"], h["status"] == "base") for h in watch.history] == [(0, True), (2, False), (4, False)]
    assert watch.history[0]["score"] == 1 and len(expected["tasks"][0]["items"]) == QUESTIONS
    rows = [x for x in trainer.state.log_history if f"retention/{suite}" in x]
    assert [(r["step"], r[f"retention/{suite}"]) for r in rows] == [
        (h["step"], h["retention"]) for h in watch.history[1:]
    ]
    assert all(r[f"retention/{suite}_low"] <= r[f"retention/{suite}"] for r in rows)


def test_the_base_of_an_adapter_is_without_it(base, make, suite, tokenizer):
    expected = measure_suite(suite, lambda: base, tokenizer)
    model = adapted(base)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.5)
    watch = RetentionCallback(suite, every=100)
    make(model, [watch], rate=1e-9).train()
    assert watch._before == [expected]
    assert watch._after[0]["tasks"] != expected["tasks"]


def test_a_share_of_the_steps(base, make, suite):
    watch = RetentionCallback(suite, every=0.3, limit=2)  # 0.3 of 4 steps, rounded up, is 2
    make(base, [watch]).train()
    assert [h["step"] for h in watch.history] == [0, 2, 4]


def test_a_loss_stops_the_run(base, make, suite):
    watch = RetentionCallback(suite, every=1, stop_when_lost=True)
    trainer = make(base, [watch], rate=0.3, max_steps=20)
    trainer.train()
    assert watch.report()["verdict"]["status"] == "lost"
    assert trainer.state.global_step == watch.history[-1]["step"] < 20
    assert [h["status"] for h in watch.history[1:-1]].count("lost") == 0


def test_without_the_wish_it_runs_on(base, make, suite):
    watch = RetentionCallback(suite, every=1)
    trainer = make(base, [watch], rate=0.3)
    trainer.train()
    assert trainer.state.global_step == STEPS and watch.history[-1]["status"] == "lost"


def test_the_report_can_be_written(base, make, suite, tmp_path):
    watch = RetentionCallback(suite, every=100)
    with pytest.raises(HoldfastError, match="still in memory"):
        watch.report()
    trainer = make(base, [watch], rate=0.3)
    trainer.train()
    report = watch.report()
    assert report["abilities"][0]["status"] == "lost" and report["examples"]
    for name in ("r.json", "r.html", "r.md", "r.xml"):
        writing.write(report, tmp_path / name)
        assert "own" in (tmp_path / name).read_text(encoding="utf-8")


class Seen(TrainerCallback):
    """A reporter: remembers what it is told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.rows.append(dict(logs))


def test_attached_it_reports_through_the_trainer(base, make, suite):
    seen = Seen()
    trainer = make(base, [seen], SFTTrainer)
    watch = RetentionCallback(suite, every=2, limit=8).attach(trainer).attach(trainer)
    trainer.train()
    assert trainer.callback_handler.callbacks.count(watch) == 1
    told = [row for row in seen.rows if f"retention/{suite}" in row]
    assert len(told) == len([x for x in trainer.state.log_history if f"retention/{suite}" in x]) == 2
    assert all("loss" not in row and "mean_token_accuracy" not in row for row in told)
    losses = [x for x in trainer.state.log_history if "loss" in x]
    assert [x["step"] for x in losses] == [2, 4] and all("mean_token_accuracy" in x for x in losses)


def test_in_a_trainer_with_a_plan(base, rows, tokenizer, suite, tmp_path):
    expected = measure_suite(suite, lambda: base, tokenizer)
    config = SFTConfig(
        str(tmp_path / "out"), max_steps=2, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
        disable_tqdm=True, per_device_train_batch_size=2,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": r.prompt, "completion": r.completion} for r in rows])
    watch = RetentionCallback(suite, every=1)
    trainer = with_plan(SFTTrainer)(
        model=base, args=config, train_dataset=data, processing_class=tokenizer, plan=Plan([hf.LoRA(r=4)]),
        callbacks=[watch],
    )  # fmt: skip
    trainer.train()
    assert watch._before == [expected] and [h["step"] for h in watch.history] == [0, 1, 2]


# ---- resuming


def test_a_resumed_run_keeps_its_base(base, tiny_model, make, suite, tmp_path):
    first = RetentionCallback(suite, every=2)
    make(base, [first], save_strategy="steps", save_steps=2).train()
    again = RetentionCallback(suite, every=2)
    make(tiny_model(tied=False), [again]).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert again._before == first._before
    assert [h["step"] for h in again.history] == [0, 2, 4]


def test_a_resumed_run_without_its_base_is_refused(base, tiny_model, make, suite, tmp_path):
    make(base, [RetentionCallback(suite, limit=2)], save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "out" / "checkpoint-2"
    (folder / FILE).unlink()
    trainer = make(tiny_model(tied=False), [RetentionCallback(suite, limit=2)])
    with pytest.raises(ModelError, match="step 2"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_a_second_training_keeps_the_first_base(base, make, suite):
    watch = RetentionCallback(suite, every=100, limit=8)
    make(base, [watch]).train()
    first = watch._before
    make(base, [watch]).train()
    assert watch._before is first and [h["step"] for h in watch.history] == [0, 4, 4]


# ---- what is kept, and what is refused


def test_all_is_put_back_even_after_an_error(base):
    model = adapted(base)
    model.train()
    model.base_model.model.model.norm.eval()
    model.config.use_cache = False
    frozen = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    with pytest.raises(KeyError), untouched(model), model.disable_adapter():
        assert model.config.use_cache and not torch.is_grad_enabled()
        model.eval()
        torch.rand(3)
        raise KeyError
    assert [m.training for m in model.modules()] == modes and len(set(modes)) == 2
    assert [p.requires_grad for p in model.parameters()] == grads
    assert model.config.use_cache is False and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"every": 0}, "every"), ({"every": 1.5}, "every"), ({"keep": 1.0}, "keep"), ({"suite": "in-contxt"}, "contxt")],
)
def test_wrong_settings_are_refused(settings, word):
    with pytest.raises(HoldfastError, match=word):
        RetentionCallback(**settings)


def test_no_tokenizer_is_refused(base, make, suite):
    trainer = make(base, [RetentionCallback(suite)])
    trainer.callback_handler.processing_class = None
    with pytest.raises(HoldfastError, match="tokenizer"):
        trainer.train()


def test_what_cannot_be_measured_is_said(base, make, tmp_path):
    path = tmp_path / "hard.jsonl"
    path.write_text("\n".join(json.dumps({"context": f"{n}:", "answer": " shipping"}) for n in range(9)))
    watch = RetentionCallback(f"jsonl:{path}", every=100)
    trainer = make(base, [watch])
    with pytest.warns(UserWarning, match="not measurable"):
        trainer.train()
    assert watch.report()["verdict"]["status"] == "not checked"
    assert not [x for x in trainer.state.log_history if any(k.startswith("retention/") for k in x)]


def test_importing_holdfast_stays_light():
    code = "import sys, holdfast; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_page_shows_a_script_that_runs(base, rows, tokenizer, suite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "callback.md").read_text(encoding="utf-8")
    code = page.split("```python\n", 1)[1].split("```", 1)[0].replace('"in-context"', repr(suite))
    names = {
        "model": base, "tokenizer": tokenizer,
        "data": Dataset.from_list([{"prompt": r.prompt, "completion": r.completion} for r in rows[:8]]),
        "args": SFTConfig("out", max_steps=2, use_cpu=True, bf16=False, report_to=[], save_strategy="no"),
    }  # fmt: skip
    exec(code, names)
    assert (tmp_path / "retention.html").is_file() and names["watch"].history
