"""SDFT: divergences worked out by hand, prompts, and one step against TRL's trainer."""

import math

import pytest
import torch

from holdfast import models
from holdfast.data.rows import Row
from holdfast.data.tokens import tokenize
from holdfast.engine.pack import pack, token_row
from holdfast.errors import PlanError
from holdfast.methods import SDFT
from holdfast.methods.loss.sdft import divergence
from holdfast.services import Context, View
from holdfast.sites.rollouts import Paired
from tiny import build_model

TRL_PROMPT = "{prompt}\n\n{privileged_context}"


def log(*p):
    return torch.tensor([p]).log()


def test_divergences_by_hand():
    """s = (3/4, 1/4), q = (1/4, 3/4): both KLs are 3/4 log 3 + 1/4 log 1/3 = 1/2 log 3; with m = (1/2, 1/2) both parts
    of the JSD are 3/4 log 3/2 + 1/4 log 1/2, whatever their weights."""
    s, q = log(0.75, 0.25), log(0.25, 0.75)
    assert divergence(s, q, 0).item() == pytest.approx(0.5 * math.log(3))
    assert divergence(s, q, 1).item() == pytest.approx(0.5 * math.log(3))
    assert divergence(s, q, 0.5).item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))
    # which stands first: q = (1/2, 1/2): KL(q || s) = 1/2 log 2/3 + 1/2 log 2, KL(s || q) = 3/4 log 3/2 - 1/4 log 2
    q = log(0.5, 0.5)
    assert divergence(s, q, 0).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert divergence(s, q, 1).item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))
    # alpha 1/4: m = (11/16, 5/16)
    first = 0.75 * math.log(12 / 11) + 0.25 * math.log(4 / 5)
    second = 0.5 * math.log(8 / 11) + 0.5 * math.log(8 / 5)
    assert divergence(s, q, 0.25).item() == pytest.approx(0.75 * first + 0.25 * second)


def view_of(logits, teacher, targets):
    row = token_row([0, *targets], 1, "SDFT")
    return View(pack([row]), logits, 0, None, {}, None, "SDFT", {}, {}, {}, paired=lambda rows: teacher)


def test_reverse_kl_and_its_gradient():
    """d KL(s || q) / d z_i = s_i (log s_i / q_i - KL). s = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2):
    KL = 1/2 log 2 - 1/4 log 2 = 1/4 log 2, so the gradient is log 2 (3/8, -1/16, -5/16)."""
    logits = log(0.5, 0.25, 0.25).requires_grad_(True)
    method = SDFT(distillation_alpha=1.0, distillation_mode="full_logits")
    term = method.loss(view_of(logits, log(0.25, 0.25, 0.5), [2]))
    assert term.owner == "SDFT" and term.value.shape == (1,)
    assert term.value.item() == pytest.approx(0.25 * math.log(2))
    term.value.sum().backward()
    wanted = torch.tensor([[0.375, -0.0625, -0.3125]]) * math.log(2)
    torch.testing.assert_close(logits.grad, wanted)


def test_every_answer_counts_as_much():
    """An answer of one token at distance 1/4 log 2 (above), and one of three at 1/4 log 2, 0 and 0."""
    s, q = log(0.5, 0.25, 0.25), log(0.25, 0.25, 0.5)
    packed = pack([token_row([0, *answer], 1, "SDFT") for answer in ([2], [1, 2, 1])])
    logits, teacher = torch.cat([s, s, s, s]), torch.cat([q, q, s, s])
    view = View(packed, logits, 0, None, {}, None, "SDFT", {}, {}, {}, paired=lambda rows: teacher)
    term = SDFT(distillation_alpha=1.0, distillation_mode="full_logits").loss(view)
    assert term.per == "row"
    torch.testing.assert_close(term.value, torch.tensor([1 / 4, 1 / 12]) * math.log(2))


def test_the_likeliest_tokens_of_the_student():
    """Top 2 of s = (1/2, 1/4, 1/8, 1/8) on q = (1/8, 3/8, 1/4, 1/4): renormalised (2/3, 1/3) on (1/4, 3/4); with the
    rest (1/2, 1/4, 1/4) on (1/8, 3/8, 1/2)."""
    logits, teacher = log(0.5, 0.25, 0.125, 0.125), log(0.125, 0.375, 0.25, 0.25)
    settings = {"distillation_alpha": 1.0, "distillation_topk": 2}
    value = SDFT(**settings).loss(view_of(logits, teacher, [0])).value.item()
    assert value == pytest.approx(2 / 3 * math.log(8 / 3) + 1 / 3 * math.log(4 / 9))
    value = SDFT(**settings, distillation_add_tail=True).loss(view_of(logits, teacher, [0])).value.item()
    assert value == pytest.approx(0.5 * math.log(4) + 0.25 * math.log(2 / 3) + 0.25 * math.log(0.5))
    value = SDFT(distillation_alpha=1.0).loss(view_of(logits, teacher, [0])).value.item()  # 100 of 4 tokens are all
    assert value == pytest.approx(0.5 * math.log(4) + 0.25 * math.log(2 / 3) + 0.25 * math.log(0.5))


def test_both_are_heated():
    """Temperature 2 takes square roots: (0.8, 0.2) becomes (2/3, 1/3), (0.5, 0.5) stays."""
    settings = {"distillation_alpha": 1.0, "distillation_mode": "full_logits"}
    view = view_of(log(0.8, 0.2), log(0.5, 0.5), [0])
    wanted = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert SDFT(temperature=2.0, **settings).loss(view).value.item() == pytest.approx(wanted)
    plain = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert SDFT(temperature=0.0, **settings).loss(view).value.item() == pytest.approx(plain)


def test_the_teacher_is_shown_the_answer(tokenizer, tiny_model, rows):
    ctx = Context(tiny_model(), tokenizer)
    task = [tokenize(r, tokenizer, 512) for r in rows[:2]]
    said = SDFT(num_generations=2, teacher_model_kind="ema", teacher_update_rate=0.1).rollouts(task, 0, ctx, {})
    assert said.instead and said.teacher == "ema" and said.ema_rate == 0.1
    assert said.prompts == [tokenizer.encode(r.prompt) for r in rows[:2]] * 2
    shown = [tokenizer.encode(f"{r.prompt}{r.completion}\n\n{r.prompt}") for r in rows[:2]]
    assert said.teacher_prompts == shown * 2


def test_a_chat_is_shown_the_answer_in_the_papers_words(tokenizer, tiny_model):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    turn = [{"role": "user", "content": "Hello?"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    row = token_row([*ids, *tokenizer.encode("Yes.", add_special_tokens=False), end], len(ids))
    model = tiny_model()
    model.generation_config.eos_token_id = [1, end]
    said = SDFT().rollouts([row], 0, Context(model, tokenizer), {})
    turn[0]["content"] += "\n\nThis is an example for a response to the question:\nYes.\n\n"
    turn[0]["content"] += "Now answer with a response of your own, including the thinking process:"
    assert said.teacher_prompts == [tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]]
    twice = SDFT(teacher_prompt_template="{prompt}{privileged_context}{prompt}")
    with pytest.raises(PlanError, match="cannot show the given answer in a chat"):
        twice.rollouts([row], 0, Context(model, tokenizer), {})


def test_rows_without_a_prompt_are_refused(tokenizer, tiny_model):
    row = tokenize(Row("", "Only text."), tokenizer, 512)
    with pytest.raises(PlanError, match="a row without a prompt"):
        SDFT().rollouts([row], 0, Context(tiny_model(), tokenizer), {})


@pytest.mark.parametrize(
    "settings",
    [
        {"distillation_mode": "sampled_token"},
        {"distillation_alpha": 1.5},
        {"distillation_topk": 0},
        {"temperature": -1.0},
        {"teacher_prompt_template": "{prompt}"},
    ],
    ids=str,
)
def test_values_without_meaning(settings):
    with pytest.raises(PlanError, match=next(iter(settings))) as caught:
        SDFT(**settings).check(Context(None, None))
    assert caught.value.cure


# ---- TRL

SETTINGS = (
    {},
    {"distillation_add_tail": True, "distillation_topk": 7},
    {"distillation_mode": "full_logits", "distillation_alpha": 1.0},
    {"distillation_mode": "full_logits", "distillation_alpha": 0.0, "teacher_model_kind": "live"},
    {"distillation_mode": "full_logits", "distillation_alpha": 0.3, "temperature": 0.7},
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_one_step_equals_trl(settings, tokenizer, rows, tmp_path, start, gradients):
    """Loss and every gradient of one step on the answers that TRL drew, one of them cut shorter."""
    trl = pytest.importorskip("trl.experimental.sdft")
    from datasets import Dataset

    base = build_model(tied=False)
    base.lm_head.weight.data *= 40  # a random model hardly minds what it reads
    folder = models.save_model(base, tokenizer, tmp_path / "base", card=None)
    model, _ = models.load(str(folder), dtype="float32", device="cpu")
    options = trl.SDFTConfig(
        str(tmp_path / "out"), per_device_train_batch_size=4, num_generations=2, max_completion_length=5,
        generation_kwargs={"min_new_tokens": 5}, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
        teacher_prompt_template=TRL_PROMPT, **settings,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": r.prompt, "privileged_context": r.completion} for r in rows[:2]])
    trainer = trl.SDFTTrainer(model, options, train_dataset=data, processing_class=tokenizer)
    trainer.model.train()
    batch = trainer._prepare_inputs([data[0], data[0], data[1], data[1]])
    assert batch["completion_mask"].all() and "old_per_token_logps" not in batch
    batch["completion_mask"][1, 3:] = batch["teacher_attention_mask"][1, -2:] = 0
    trainer.current_gradient_accumulation_steps = 1
    wanted = trainer.compute_loss(trainer.model, batch)
    wanted.backward()

    method = SDFT(teacher_prompt_template=TRL_PROMPT, max_completion_length=5, **settings)
    session = start([method], models.load(str(folder), dtype="float32", device="cpu")[0])
    task = [tokenize(r, tokenizer, 512) for r in rows[:2]]
    said = method.rollouts(task, 0, session.ctx, {})
    answered = []
    for n, answer in enumerate(batch["completion_ids"].tolist()):
        shown = batch["teacher_input_ids"][n][batch["teacher_attention_mask"][n].bool()].tolist()
        prompt, teacher_prompt = said.prompts[n // 2], said.teacher_prompts[n // 2]
        answer = answer[:3] if n == 1 else answer
        assert shown == [*teacher_prompt, *answer]
        assert batch["prompt_ids"][n][batch["prompt_mask"][n].bool()].tolist() == prompt
        row, read = (token_row([*p, *answer], len(p), "SDFT", "SDFT") for p in (prompt, teacher_prompt))
        answered.append(
            Paired(row.ids, row.scored, "SDFT", "SDFT", teacher_row=read, teacher=method.teacher_model_kind)
        )
    loss, grads = gradients(session, answered)
    assert loss == pytest.approx(wanted.item(), rel=1e-5) and loss > 1e-3
    theirs = {n: p.grad for n, p in trainer.model.named_parameters()}
    assert theirs.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-4 * theirs[name].abs().max().item())
