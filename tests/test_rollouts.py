"""Answers kept by content, whatever the batch or process; verifiers; rollouts and their teachers on a tiny model."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import run, same
from holdfast import methods as hf
from holdfast import models
from holdfast.data.asked import Reader
from holdfast.data.encoder import Encoder
from holdfast.data.rows import Row
from holdfast.data.tokens import tokenize
from holdfast.engine.base import adapters_off
from holdfast.engine.counts import count_rows
from holdfast.engine.processes import start, world
from holdfast.errors import PlanError
from holdfast.measure import answers
from holdfast.measure.answers import Dice, Sampling, identity_of, respond, seed_of
from holdfast.measure.verifiers import verifier
from holdfast.method import Method, Rollouts, Term
from holdfast.plan import Plan
from holdfast.services import Context
from holdfast.session import Session
from test_shard import two
from tiny import build_model, build_tokenizer, ticket_rows
from tiny_run import make_world, recipe_data, write_recipe


class Killed(Exception):
    """Stands for a lost process."""


HOT = {"temperature": 1.0, "max_new_tokens": 5}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def prompts(rows, tokenizer) -> list[list[int]]:
    return tokenizer([r.prompt for r in rows[:7]])["input_ids"]


@pytest.fixture
def asked(monkeypatch) -> list[list[list[int]]]:
    """The prompts of every piece that a model was really asked, in turn."""
    seen: list[list[list[int]]] = []
    plain = answers.respond

    def spy(model: Any, tokenizer: Any, prompts: Any, *args: Any) -> Any:
        seen.append([p for p, _ in prompts])
        return plain(model, tokenizer, prompts, *args)

    monkeypatch.setattr(answers, "respond", spy)
    return seen


# ---- answers of the base


def test_an_answer_depends_on_its_prompt_alone(tiny_model, tokenizer, prompts):
    model, sampling = tiny_model(), Sampling(5, 1.0)
    seeds = [seed_of(3, p, 0) for p in prompts]
    together = respond(model, tokenizer, [(p, 5) for p in prompts], seeds, sampling)
    alone = [respond(model, tokenizer, [(p, 5)], [s], sampling)[0] for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone and len({tuple(a) for a in alone}) > 1
    assert respond(model, tokenizer, [(p, 5) for p in prompts], [s + 1 for s in seeds], sampling) != alone


def test_greedy_is_the_models_own(tiny_model, tokenizer, prompts):
    model, ids = tiny_model(), torch.tensor([prompts[0]])
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=2)[0, ids.shape[1] :].tolist()
    assert Context(model, tokenizer).answers(prompts[:1], max_new_tokens=4) == [[wanted]]


def test_an_answer_ends_with_its_end(tiny_model, tokenizer, prompts):
    """The third token of an answer is declared to end it."""
    model = tiny_model(tied=False)
    got = respond(model, tokenizer, [(prompts[0], 6)], [0], Sampling(6))[0]
    model.generation_config.eos_token_id = [1, got[2]]
    assert respond(model, tokenizer, [(prompts[0], 6)], [0], Sampling(6))[0] == got[:3]


def test_the_dice_have_the_law_of_the_logits():
    """p = (0.5, 0.3, 0.2); 4 standard errors of a share of 4000 draws are 0.032. top_p 0.6 leaves (5/8, 3/8, 0)."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(4000, 1)
    for top_p, heat, wanted in ((1.0, 1.0, (0.5, 0.3, 0.2)), (0.6, 1.0, (0.625, 0.375, 0.0))):
        drawn = Dice(range(4000), Sampling(1, heat, top_p))(None, logits).argmax(-1)  # type: ignore[arg-type]
        shares = torch.bincount(drawn, minlength=3) / 4000
        assert (shares - torch.tensor(wanted)).abs().max() < 0.032
    squares = torch.tensor([0.25, 0.09, 0.04]) / 0.38  # temperature 1/2 squares the odds
    drawn = Dice(range(4000), Sampling(1, 0.5))(None, logits).argmax(-1)  # type: ignore[arg-type]
    assert (torch.bincount(drawn, minlength=3) / 4000 - squares).abs().max() < 0.032


def test_answers_are_kept_by_content(tiny_model, tokenizer, prompts, asked):
    ctx = Context(tiny_model(), tokenizer)
    first = ctx.answers(prompts, num=2, **HOT)
    assert sum(map(len, asked)) == 14 and all(len(a) == 2 and a[0] != a[1] for a in first)
    assert Context(tiny_model(), tokenizer).answers(prompts, num=2, **HOT) == first and sum(map(len, asked)) == 14
    assert ctx.answers(prompts[3:5], **HOT) == [[a[0]] for a in first[3:5]] and sum(map(len, asked)) == 14
    assert ctx.answers(prompts, seed=1, **HOT) != [[a[0]] for a in first]
    ctx.answers(prompts, temperature=0.5, max_new_tokens=5)
    assert sum(map(len, asked)) == 28
    with torch.no_grad():
        ctx.model.lm_head.weight[7, 3] += 1e-3
    Context(ctx.model, tokenizer).answers(prompts, **HOT)
    assert sum(map(len, asked)) == 35


def test_an_answer_ends_with_a_text(tiny_model, tokenizer, prompts):
    """Here the second and third token of the unstopped answer; what follows is not kept."""
    ctx = Context(tiny_model(), tokenizer)
    ((whole,),) = ctx.answers(prompts[:1], temperature=1.0, max_new_tokens=6)
    text = tokenizer.decode(whole[1:3])
    assert text not in tokenizer.decode(whole[:2])
    assert ctx.answers(prompts[:1], temperature=1.0, max_new_tokens=6, stop=(text,)) == [[whole[:3]]]


def test_a_killed_run_goes_on_with_what_it_has(tiny_model, tokenizer, prompts, asked, monkeypatch, tmp_path):
    monkeypatch.setattr(answers, "PIECE", 3)
    said: list[float] = []

    def tell(share: float, words: str) -> None:
        said.append(share)
        if len(said) == 2:
            raise Killed

    with pytest.raises(Killed):
        Context(tiny_model(), tokenizer, tell=tell).answers(prompts, **HOT)
    assert said == [pytest.approx(3 / 7), pytest.approx(6 / 7)]
    again = Context(tiny_model(), tokenizer, tell=tell).answers(prompts, **HOT)
    assert [len(p) for p in asked] == [3, 3, 1] and said[2] == 1.0
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "elsewhere"))
    assert Context(tiny_model(), tokenizer).answers(prompts, **HOT) == again


def test_a_damaged_piece_is_asked_anew(tiny_model, tokenizer, prompts, home, asked):
    first = Context(tiny_model(), tokenizer).answers(prompts, **HOT)
    (piece,) = (home / "answers").rglob("*.json")
    piece.write_text(piece.read_text()[:-9])
    assert Context(tiny_model(), tokenizer).answers(prompts, **HOT) == first and len(asked) == 2


def test_the_base_is_asked_through_an_adapter(tiny_model, tokenizer, prompts, asked):
    model = tiny_model()
    ctx = Context(model, tokenizer)
    first, identity = ctx.answers(prompts, max_new_tokens=4), identity_of(model)
    tuned = hf.LoRA(r=2).adapt(model, ctx, {})
    with torch.no_grad():
        for n, p in tuned.named_parameters():
            p += 0.5 * ("lora_B" in n)
    trains = [n for n, p in tuned.named_parameters() if p.requires_grad]
    assert identity_of(model) == identity_of(tuned) == identity
    with adapters_off(model):
        off = respond(model, tokenizer, [(p, 4) for p in prompts], [0] * 7, Sampling(4))
    on = respond(model, tokenizer, [(p, 4) for p in prompts], [0] * 7, Sampling(4))
    assert [[a] for a in off] == first and off != on
    assert trains == [n for n, p in tuned.named_parameters() if p.requires_grad]
    assert ctx.answers(prompts, max_new_tokens=4) == first and len(asked) == 1


def test_two_processes_get_the_same_answers(tiny_model, tokenizer, prompts, tmp_path, home):
    wanted = Context(tiny_model(), tokenizer).answers(prompts, num=2, **HOT)
    two(__file__, str(tmp_path), HOLDFAST_HOME=str(tmp_path / "twice"))
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == wanted
    (ours,), (theirs,) = ((h / "answers").rglob("*.json") for h in (home, tmp_path / "twice"))
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())


def test_the_report_says_what_is_trained_on(tiny_model, tokenizer, rows, tmp_path):
    """A whole run; the user's verifier stands beside the recipe."""
    from holdfast.verbs.tune import tune

    (tmp_path / "mine.py").write_text("def yes(answer, reference, row):\n    return True\n")
    plan = [{"S3FT": {"verifier": "mine:yes", "max_new_tokens": 2, "temperature": 5.0, "ended": False}}]
    world = make_world(tmp_path, tiny_model(), tokenizer, rows)
    heard: list[str] = []
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_data(world, tmp_path / "out", plan=plan))
    folder = tune(recipe, tell=lambda _phase, _share, words: heard.append(words))
    report = json.loads((folder / "report.json").read_text())
    said, _ = report["training"]["notes"]  # the other one is about the learning rate
    assert said.startswith("S3FT trains on ") and said in report["task"]["note"]
    assert "S3FT: own answers" in heard and "S3FT: paraphrases" in heard


# ---- verifiers


@pytest.mark.parametrize(
    "name, answer, reference, right",
    [
        ("exact", " Yes \n", "Yes", 1),
        ("exact", "yes", "Yes", 0),
        ("contains", "It is the shipping\n desk, I think", "shipping desk", 1),
        ("contains", "It is rebilling", "billing", 0),
        ("contains", "anything", " ", 0),
        ("number", "3 + 4 = 7, so 1,234.50", "The answer is 1234.5", 1),
        ("number", "7, then 8", "7", 0),
        ("number", "7", "seven", 0),
    ],
)
def test_verifiers(name, answer, reference, right):
    assert verifier(name)(answer, reference, None) == right


def test_a_verifier_of_the_user(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def short(answer, reference, row):\n    return len(answer) < len(row.prompt)\n"
        "def many(answer, reference, row):\n    return 7\nname = 3\n"
    )
    short = verifier("mine:short", tmp_path)
    assert short("ab", "", Row("abc", "")) == 1 and short("abcd", "", Row("abc", "")) == 0
    with pytest.raises(PlanError, match="'mine:many' gave 7"):
        verifier("mine:many", tmp_path)("", "", None)
    for name, words in (
        ("exakt", "no verifier 'exakt'"),
        ("mine:long", "cannot be imported"),
        ("absent:short", "cannot be imported"),
        ("mine:name", "is no function"),
    ):
        with pytest.raises(PlanError, match=words) as caught:
            verifier(name, tmp_path)
        assert caught.value.cure


# ---- rows as prompt and answer


def test_a_plain_row_is_read_and_answered(rows, tokenizer):
    row, reader = tokenize(rows[1], tokenizer, 512), Reader(Encoder(tokenizer))
    asked = reader.read(row)
    assert asked and (asked.prompt, asked.lead, asked.answer, asked.tail) == (rows[1].prompt, " ", "shipping desk", "")
    made = reader.answered(asked, "Other", row, 512)
    assert made and made.key == tokenize(replace(rows[1], completion=" Other"), tokenizer, 512).key
    assert reader.answered(asked, "Other", row, 8) is None and reader.answered(asked, " ", row, 512) is None
    assert reader.filled(asked, "{prompt}{answer}\n{prompt}{x}", {"answer": "{prompt}"}) == tokenizer.encode(
        f"{rows[1].prompt}{{prompt}}\n{rows[1].prompt}{{x}}"
    )


def test_what_a_base_goes_on_with_is_cut(rows, tokenizer):
    reader = Reader(Encoder(tokenizer))
    asked = reader.read(tokenize(rows[0], tokenizer, 512))
    assert asked
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    assert reader.said(ids(" billing\nTicket: no"), asked, True) == "billing"
    assert reader.said(ids(" billing\n"), asked, True) == "billing"
    assert reader.said(ids(" billing"), asked, True) is None
    assert reader.said(ids(" billing"), asked, False) == "billing"
    assert reader.said([*ids(" billing"), tokenizer.eos_token_id], asked, True) == "billing"
    assert reader.said([tokenizer.eos_token_id], asked, True) is None


def test_a_chat_is_asked_in_its_own_template(tokenizer):
    from holdfast.data.chat import Chat
    from holdfast.data.notes import Notes

    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes. "}]
    turns += [{"role": "user", "content": "Really?"}]
    prompt, completion, _ = Chat(tokenizer, Notes()).pair(turns, [{"role": "assistant", "content": "No."}], {}, "a:1")
    encoder = Encoder(tokenizer, [tokenizer.convert_tokens_to_ids("<|im_end|>")])
    row, reader = tokenize(Row(prompt, completion), tokenizer, 512, stops=encoder.stops), Reader(encoder)
    asked = reader.read(row)
    assert asked and asked.prompt == prompt and asked.answer == "No." and not asked.one_line
    shown = reader.filled(asked, "{prompt} Say: {answer}", {"answer": "No."})
    turns[-1]["content"] += " Say: No."
    assert shown == tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    made = reader.answered(asked, "Sure.\nGo!", row, 512)
    assert made and tokenizer.decode(made.ids) == f"{prompt}Sure.\nGo!<|im_end|>"


def test_rows_without_one_answer_are_not_read(tokenizer):
    reader = Reader(Encoder(tokenizer))
    text = tokenize(Row("", "Only text."), tokenizer, 512)
    row = tokenize(Row("Two words", " and more words"), tokenizer, 512)
    holes = replace(row, scored=row.scored.copy())
    holes.scored[-2] = False
    assert reader.read(text) is None and reader.read(holes) is None and reader.read(row)


# ---- rollouts


@dataclass(frozen=True, kw_only=True)
class Echo(Method):
    """Answers the first task row of a step; the teacher reads the prompt twice. Its loss is the distance of both."""

    teacher: str = "base"
    instead: bool = False

    @property
    def needs(self):  # type: ignore[override]
        return frozenset({"base_logits"} if self.teacher == "base" else ())

    def rollouts(self, rows, step, ctx, state):
        prompts = [r.ids[~r.scored].tolist() for r in rows[:2]]
        return Rollouts(
            prompts, [p + p for p in prompts], self.teacher, ema_rate=0.25, max_new_tokens=4, instead=self.instead
        )

    def loss(self, view):
        at = view.positions(self.name)
        return Term((view.logp[at] - view.teacher_logp(self.name)).square().sum(-1), self.name) if len(at) else None


def by_hand(model: Any, row: Any) -> torch.Tensor:
    """(M, V) log-probabilities behind the teacher's prompt, by the model's own forward."""
    start = int(row.scored.argmax())
    ids = [*row.ids[:start], *row.ids[:start], *row.ids[start:]]
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, 2 * start - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("teacher", ["base", "live", "ema", "outside"])
def test_a_teacher_reads_its_own_prompt(teacher, lora, tiny_model, tokenizer, rows, tmp_path):
    if teacher == "outside":
        teacher = str(models.save_model(build_model(seed=5), tokenizer, tmp_path / "other", card=None))
    plan = Plan([*([hf.LoRA(r=4, lora_dropout=0.5)] if lora else []), Echo(teacher=teacher)])
    session = Session(plan, tiny_model(), Context(tiny_model(), tokenizer, 0, rows), knows_rows=True)
    session.ctx.model = session.model
    session.prepare()
    session.enter(session.stages[0])
    task = [tokenize(r, tokenizer, 512) for r in rows[:3]]
    shift = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for n, p in session.params.items()}
    session.roll(task, 0)
    with torch.no_grad():
        for n, p in session.params.items():
            p += 0.1 * shift[n]
    kept, made = session.roll(task, 1)
    assert kept is task and [r.owner for r in made] == ["Echo", "Echo"]
    with torch.no_grad():
        got = session.rolling.teacher_logp(made)
        live = torch.cat([by_hand(session.model.eval(), r) for r in made])
        if teacher == "ema":  # a quarter of the way from the start to where the weights are
            for n, p in session.params.items():
                p -= 0.075 * shift[n]
        wanted = {
            "base": lambda: torch.cat([by_hand(tiny_model(), r) for r in made]),
            "live": lambda: live,
            "ema": lambda: torch.cat([by_hand(session.model.eval(), r) for r in made]),
        }.get(teacher, lambda: torch.cat([by_hand(build_model(seed=5), r) for r in made]))()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert teacher == "live" or (got - live).abs().max() > 1e-2


def test_another_tokenizer_is_refused(tiny_model, tokenizer, rows, tmp_path):
    other = build_tokenizer()
    other.add_tokens(["<new>"])
    folder = models.save_model(build_model(vocab_size=401), other, tmp_path / "other", card=None)
    with pytest.raises(PlanError, match="another tokenizer"):
        run([Echo(teacher=str(folder))], tiny_model(), tokenizer, rows, 2)


def test_the_answers_are_those_of_the_model_so_far(tiny_model, tokenizer, rows):
    """Seeded by run, step and prompt: the same however often they are asked, other ones at another step or seed."""
    task = [tokenize(r, tokenizer, 512) for r in rows[:3]]

    def ids(seed: int, step: int, order: int = 1) -> list[list[int]]:
        session = Session(Plan([Echo()]), tiny_model(), Context(tiny_model(), tokenizer, seed))
        session.prepare()
        session.enter(session.stages[0])
        return [r.ids.tolist() for r in session.roll(task[:2][::order], step)[1]]

    assert ids(0, 0) == ids(0, 0) == ids(0, 0, -1)
    assert ids(0, 0) != ids(0, 1) != ids(1, 1)


def test_twice_the_same_prompt_gives_two_answers(tiny_model, tokenizer, rows):
    task = [tokenize(rows[0], tokenizer, 512)] * 2
    session = Session(Plan([Echo()]), tiny_model(), Context(tiny_model(), tokenizer))
    session.prepare()
    session.enter(session.stages[0])
    one, other = session.roll(task, 0)[1]
    assert one.ids.tolist() != other.ids.tolist()


@pytest.mark.parametrize("split", [(4, 1), (1, 4)])
def test_a_step_without_task_rows(split, tiny_model, tokenizer, rows):
    size, pieces = split
    result = run(
        [Echo(instead=True)], tiny_model(), tokenizer, rows, 3, batch_size=size, gradient_accumulation_steps=pieces
    )
    assert all(p["task"] == 0 and p["Echo"] > 0 for _, p in result.log.loss)
    assert Counter({k: n for k, n in result.log.realised.items() if "examples" in k}) == {"Echo/examples": 6}


def test_task_rows_beside_the_answers(tiny_model, tokenizer, rows):
    result = run([Echo()], tiny_model(), tokenizer, rows, 3)
    assert result.log.realised["task/examples"] == 12 and result.log.realised["Echo/examples"] == 6
    alone = run([], tiny_model(), tokenizer, rows, 3)
    assert result.log.loss[0][1]["task"] == pytest.approx(alone.log.loss[0][1]["task"], rel=1e-6)


def test_no_room_for_an_answer_is_refused(tokenizer, rows):
    with pytest.raises(PlanError, match="Echo has a prompt at step 1 that leaves no room for an answer in 32 tokens"):
        run([Echo()], build_model(max_position_embeddings=32), tokenizer, rows, 2)


@pytest.mark.parametrize("extra", [(), (hf.LoRA(r=4, lora_dropout=0.1),)], ids=["dense", "lora"])
def test_a_moving_average_is_resumed(extra, tiny_model, tokenizer, rows, tmp_path):
    """It moves as its equation says, and a killed run has the same at the end, to the last bit."""
    plan, weights = [*extra, Echo(teacher="ema")], []

    def watch(session: Session, step: int) -> None:
        weights.append({n: p.detach().clone() for n, p in session.params.items()})

    whole = run(plan, tiny_model(), tokenizer, rows, 6, watch=watch)
    average = whole.session.state["Echo"]
    for n in weights[0]:
        if "lora_A" not in n:
            start = torch.zeros_like(weights[0][n]) if extra else tiny_model().get_parameter(n).detach()
            for at in weights[:5]:  # what the sixth step did is not in it yet
                start = 0.75 * start + 0.25 * at[n]
            torch.testing.assert_close(average[f"ema/{n}"], start, rtol=1e-5, atol=1e-6)

    def die(_session: Session, step: int) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        run(plan, tiny_model(), tokenizer, rows, 6, watch=die, save_steps=2, folder=tmp_path)
    again = run(plan, tiny_model(), tokenizer, rows, 6, save_steps=2, folder=tmp_path)
    same(again, whole)
    assert all(torch.equal(again.session.state["Echo"][n], t) for n, t in average.items())


def test_the_teacher_under_autocast_is_the_average(tiny_model, tokenizer, rows):
    """Autocast remembers what it rounded of each weight; the average must not be taken for the weight."""
    session = Session(Plan([Echo(teacher="ema")]), tiny_model(), Context(tiny_model(), tokenizer, 0, rows))
    session.prepare()
    session.enter(session.stages[0])
    task = [tokenize(r, tokenizer, 512) for r in rows[:2]]
    session.roll(task, 0)
    with torch.no_grad():
        for p in session.params.values():
            p += 0.2
    _, made = session.roll(task, 0)
    with torch.autocast("cpu", torch.bfloat16):
        session.loss(session.model, made, count_rows(made), 0)
        cached = session.rolling.teacher_logp(made)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert torch.equal(cached, session.rolling.teacher_logp(made))
    assert not torch.equal(cached, session.rolling._live([r.teacher_row for r in made]))


def worker(folder: Path) -> None:
    """What each of two processes gets for the same prompts."""
    tokenizer = build_tokenizer()
    prompts = tokenizer([r.prompt for r in ticket_rows()[:7]])["input_ids"]
    got = Context(build_model(), tokenizer).answers(prompts, num=2, **HOT)
    (folder / f"{world()[0]}.json").write_text(json.dumps(got))


if __name__ == "__main__":
    torch.set_num_threads(1)
    start()
    worker(Path(sys.argv[1]))
