"""tune under a budget: as much of the change as keeps what must be kept, chosen on items that are not reported."""

import copy
import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from holdfast import cli, models
from holdfast.errors import HoldfastError, ModelError, PlanError, RecipeError
from holdfast.measure.names import DEFAULT
from holdfast.recipe import recipe_from
from holdfast.runs import budget, change, looking, repair_heal, repair_search, settle, settle_heal
from holdfast.runs.halves import Halves
from holdfast.runs.job import checked
from holdfast.runs.joined import factors, joined
from holdfast.runs.repair_search import Point, affordable, falls_short
from holdfast.runs.run import Run
from holdfast.verbs.tune import _exit, _wished, budgeted, floors_to_keep, tune
from test_repair import reader
from test_shard import two
from tiny import ticket_rows
from tiny_run import make_world, recipe_data, write_recipe

FLOOR = 0.9
PLANS = {"dense": [], "adapter": [{"LoRA": {"r": 8}}]}
RATES = {"dense": 0.005, "adapter": 0.005}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    """A base that has read the passages of the language suite, which tuning on tickets makes it forget."""
    folder = tmp_path_factory.mktemp("settle")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setenv("HOLDFAST_HOME", str(folder / "home"))
        yield make_world(folder, reader(tokenizer), tokenizer, ticket_rows())


def asked(world, out, plan="dense", **changes):
    measure = {"suites": ["language"], "limit": 4, "num_fewshot": 0, "keep": {"language": FLOOR}, "budget": True}
    training = {"max_steps": 60, "save_steps": 30, "learning_rate": RATES[plan], "per_device_train_batch_size": 8}
    data = {"validation_size": 12, "metric": "loss"}
    found = recipe_data(world, out, measure=measure | changes, training=training, data=data, plan=PLANS[plan])
    return recipe_from(found)


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module", params=PLANS)
def settled(request, world, tmp_path_factory):
    """Runs with and without a budget, whose line is walked to its end."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        walks_the_line(patch)
        return both(request.param, world, folder)


def walks_the_line(patch):
    patch.setattr(budget, "why_unhealed", lambda *_: "a test walks the line")


def both(kind, world, folder):
    report = report_of(tune(asked(world, folder / "with", kind)))
    bare = report_of(tune(asked(world, folder / "without", kind, budget=False)))
    return kind, folder, report, bare


def kept_of(report):
    (ability,) = report["abilities"]
    return ability["retention"]["value"]


def test_the_bound_holds_where_it_broke(settled):
    _, _, report, bare = settled
    found = report["training"]["budget"]
    assert kept_of(bare) < FLOOR - 0.05  # else there is nothing to see here
    assert found["met"] and 0 < found["share"] < 1
    assert kept_of(report) > kept_of(bare) + 0.03
    assert report["task"]["after"]["value"] < report["task"]["before"]["value"]  # and the task is still learnt
    assert f"{found['share']:.0%} of the change was kept" in report["task"]["note"]


def test_it_is_the_largest_share_seen_that_meets_the_bound_and_learns_most(settled):
    found = settled[2]["training"]["budget"]
    meeting = [p for p in found["points"] if p["meets"]]
    best = min(meeting, key=lambda p: p["task"]["value"])
    assert (found["share"], found["healed"]) == (best["share"], best["healed"])
    line = [p for p in found["points"] if not p["healed"]]
    assert len(line) <= 1 + settle.HALVINGS


@pytest.mark.parametrize("given_back", [-1.0, 1.0])
def test_the_line_is_walked_where_healing_gives_back_much(world, tmp_path, monkeypatch, given_back):
    """Healed before the line is looked at, which follows where that gives back more of the gain than it may."""
    monkeypatch.setattr(repair_search, "GIVEN_BACK", given_back)
    monkeypatch.setattr(repair_heal, "RATE", 0.02)  # a tiny model moves little
    found = report_of(tune(asked(world, tmp_path / "run", "adapter")))["training"]["budget"]
    line, healed = ([p for p in found["points"] if p["healed"] == which] for which in (False, True))
    best = min((p for p in [*line, *healed] if p["meets"]), key=lambda p: p["task"]["value"])
    assert (found["share"], found["healed"]) == (best["share"], best["healed"]) and found["met"]
    assert healed[0]["share"] == 1 and (not healed[0]["meets"] or len(healed) == (1 if given_back == 1 else 2))
    assert (len(line) > 1) == (given_back < 1 or not healed[0]["meets"])


def test_what_chose_is_not_reported(settled):
    _, folder, report, _ = settled
    chose, told = (json.loads((folder / "with" / f"{name}.json").read_text()) for name in ("before.choose", "before"))
    for part in ("abilities", "task"):
        ids = [
            {i["id"] for i in (s[part] if part == "task" else [i for t in s[part][0]["tasks"] for i in t["items"]])}
            for s in (chose, told)
        ]
        assert ids[0] and ids[1] and not ids[0] & ids[1]
    assert len(report["task"]["answers"]) > 0


def test_the_export_is_what_was_measured(settled):
    """The change of the export is the chosen share of the change without a budget, on every weight."""
    kind, folder, report, _ = settled
    share = report["training"]["budget"]["share"]
    sides = [
        models.load(str(folder / name / "model"), merge_adapter=True, dtype="float32")[0]
        for name in ("with", "without")
    ]
    base = dict(models.load(report["model"]["name"], dtype="float32")[0].named_parameters())
    for (name, with_budget), (_, without) in zip(*(m.named_parameters() for m in sides), strict=True):
        torch.testing.assert_close(with_budget - base[name], share * (without - base[name]), atol=2e-6, rtol=1e-4)
    assert kind in PLANS


def test_where_nothing_is_lost_nothing_is_taken_back(world, tmp_path):
    recipe = asked(world, tmp_path / "run", keep={"language": 0.05})
    report = report_of(tune(recipe))
    found = report["training"]["budget"]
    assert found["share"] == 1 and found["met"] and len(found["points"]) == 1
    assert "the whole change meets the budget" in report["task"]["note"]
    bare = tune(asked(world, tmp_path / "bare", budget=False))
    mine, other = (dict(models.load(str(p / "model"))[0].named_parameters()) for p in (tmp_path / "run", bare))
    assert all(torch.equal(mine[n], other[n]) for n in other)


def test_a_search_by_hand():
    """Bounds are met up to 0.46 of the change: 0.5 fails, then 0.25 and 0.375 meet them; up to 0.49 that is noise,
    which is left alone where a quarter of the change is at most a tenth of what the task gained."""

    def look(share, margin):
        return Point(settle.End(share), share, margin, ("choose",))

    points = [look(1.0, -0.5)]
    settle._halve(points, lambda share: look(share, 0.46 - share))
    assert [p.candidate.share for p in points] == [1.0, 0.5, 0.25, 0.375]
    points = [look(1.0, -0.5)]
    settle._halve(points, lambda share: look(share, 0.49 - share), gain=2.5)
    assert [p.candidate.share for p in points] == [1.0, 0.5, 0.25]
    points = [look(1.0, -0.5)]
    settle._halve(points, lambda share: look(share, 0.49 - share), gain=2.4)
    assert [p.candidate.share for p in points] == [1.0, 0.5, 0.25, 0.375]


def test_a_bound_that_nothing_meets():
    points = [Point(settle.End(1.0), 1.0, -1.0, ("choose",))]
    settle._halve(points, lambda share: Point(settle.End(share), share, -share, ("choose",)))
    assert [p.candidate.share for p in points] == [1.0, 0.5, 0.25, 0.125]


def test_a_sure_bound_is_not_bought_with_the_task():
    """Task 0.08 of the base, 0.9 tuned. A tenth of the gain is 0.082: what keeps 0.818 is affordable."""

    def end(share, value, margin, likely, healed=False):
        return Point(settle.End(share, healed), value, margin, ("choose",), likely=likely)

    whole, eighth = end(1.0, 0.9, -0.05, -0.02), end(0.125, 0.15, 0.001, 0.03)
    healed, weaker = end(1.0, 0.85, -0.02, 0.01, True), end(0.5, 0.88, -0.03, 0.0, True)
    best = partial(affordable, tuned=0.9, base=0.08)
    assert best([whole, eighth, healed, weaker]) == healed  # the surest of those that keep the task
    assert best([whole, eighth]) == eighth  # nothing else may meet it
    assert best([whole, eighth, end(0.5, 0.83, 0.0, 0.02), healed]).candidate.share == 0.5  # sure, and affordable
    assert best([whole, eighth, end(0.5, 0.6, -0.01, 0.02)]).value == 0.6  # both cost much: the one that costs less
    assert best([whole, end(0.4, 0.57, 0.0, 0.03), end(0.5, 0.6, -0.01, 0.02)]).value == 0.57  # or the sure one beside
    assert best([whole]) == whole and not whole.may_meet


def test_the_line_may_be_sure_where_nothing_is_healed(world, tmp_path, monkeypatch):
    """All of the change may meet the bound by its estimate; half of it does surely, and keeps the task."""
    walks_the_line(monkeypatch)
    plain = settle._point

    def bent(job, end, *args):
        margin = 0.01 if end.share <= 0.5 else -0.02
        return replace(plain(job, end, *args), value=0.5 + 0.01 * end.share, margin=margin, likely=margin + 0.025)

    monkeypatch.setattr(settle, "_point", bent)
    monkeypatch.setattr(settle, "_value", lambda *_: 0.0)
    report = report_of(tune(asked(world, tmp_path / "run", "adapter")))
    found = report["training"]["budget"]
    assert (found["share"], found["surely"], found["met"]) == (0.5, True, True)
    monkeypatch.setattr(settle, "HALVINGS", 0)
    report = report_of(tune(asked(world, tmp_path / "other", "adapter")))
    found = report["training"]["budget"]
    assert (found["share"], found["surely"], found["met"]) == (1.0, False, True)
    assert settle.LIKELY in found["said"] and "could not be healed, since a test walks the line" in found["said"]


def test_how_a_bound_is_met_is_said():
    floors = {"floors": {"in-context": 0.97}, "others": [], "unseen": [], "points": []}
    found = {"share": 1.0, "healed": False, "met": True, "surely": True, **floors}
    assert settle.words(found) == f"the whole change meets the budget (in-context 0.97) {settle.SURELY}"
    assert settle.words({**found, "surely": False}).endswith(settle.LIKELY)
    healed = {**found, "surely": False, "healed": True, "points": [{"healed": False, "share": 1.0, "meets": False}]}
    said = settle.words(healed)
    assert (
        f"(heal) meets it {settle.LIKELY}, and was used" in said
        and f"does not meet the budget (in-context 0.97) {settle.SURELY}" in said
    )


def test_a_gain_below_zero_gives_nothing_back():
    whole = Point(settle.End(1.0), 0.4, 0.1, ("choose",))
    assert not falls_short(whole, 0.4, 0.5)  # the task got worse, and all of the change is kept
    assert falls_short(Point(settle.End(0.5), 0.35, 0.1, ("choose",)), 0.4, 0.5)


def test_the_page_shows_what_was_looked_at(settled):
    folder = settled[1]
    text = (folder / "with" / "report.html").read_text()
    assert "What the budget looked at" in text and "50 % of the change" in text
    assert "What the budget looked at" not in (folder / "without" / "report.html").read_text()


def test_an_adapter_below_is_part_of_the_base(world, tmp_path):
    """All weights are tuned on a base with an adapter: the way back leads to both, not past them."""
    first = tune(asked(world, tmp_path / "adapter", "adapter", budget=False)) / "model"
    base = dict(models.load(str(first), merge_adapter=True, dtype="float32")[0].named_parameters())
    recipe = asked(world, tmp_path / "run").model_copy(
        update={"model": asked(world, tmp_path).model.model_copy(update={"model_name_or_path": str(first)})}
    )
    job = checked(Run(recipe, world.folder))
    job.session.enter(job.session.stages[-1])
    with torch.no_grad():
        for p in job.session.model.parameters():
            p.add_(0.01)
    change = settle.Change(job)
    change.scale(job.session.model, 0.0)
    for name, p in job.session.model.named_parameters():
        torch.testing.assert_close(p.float(), base[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "error",
    [
        ModelError("its parts do not fit", "no cure"),
        *(kind("its parts do not fit") for kind in (RuntimeError, TypeError)),
    ],
)
def test_a_healing_that_fails_loses_nothing(world, tmp_path, monkeypatch, error):
    monkeypatch.setattr(settle, "HALVINGS", 1)

    def fails(*_):
        raise error

    monkeypatch.setattr(settle_heal, "heal", fails)
    report = report_of(tune(asked(world, tmp_path / "run", keep={"language": 0.999})))
    found = report["training"]["budget"]
    assert len(found["points"]) == 2 and not found["healed"] and found["met"] is False
    assert "could not be healed, since its parts do not fit" in report["task"]["note"]


def test_a_healed_model_that_cannot_be_merged_loses_nothing(healed, world, tmp_path, monkeypatch):
    strong(monkeypatch)
    monkeypatch.setattr(settle, "joined", lambda *_: None)

    def fails(self):
        raise MemoryError

    monkeypatch.setattr(settle_heal.Healed, "plain", fails)
    found = report_of(tune(without_a_word(world, tmp_path / "run")))["training"]["budget"]
    assert healed[1]["training"]["budget"]["healed"] and not found["healed"] and found["met"] is False
    assert "could not be healed, since MemoryError" in found["said"] and (tmp_path / "run" / "model").exists()


def test_what_nobody_named_and_the_base_does_not_have_is_no_bound():
    found = {"share": 1.0, "healed": False, "met": None, "points": [], "floors": {}, "others": ["language"]}
    said = settle.words({**found, "unseen": ["language"]})
    assert said == "nothing is held of language, which the base is not shown to have"


def test_an_adapter_needs_no_tensors_of_its_base(world, tmp_path, monkeypatch):
    """Its base may be packed, or have other names on the disk."""

    def refuses(*_):
        raise ModelError("its files have other names", "")

    monkeypatch.setattr(change, "Stacked", refuses)
    with pytest.raises(ModelError):
        tune(asked(world, tmp_path / "dense"))
    assert not (tmp_path / "dense" / "training.json").exists()  # told before the training
    assert report_of(tune(asked(world, tmp_path / "run", "adapter", keep={"language": 0.05})))


def test_a_killed_search_ends_the_same(settled, world, tmp_path, monkeypatch):
    kind, _, report, _ = settled

    class Killed(BaseException):
        """Stands for a lost process."""

    plain, looks = settle.Change.scale, []

    def dies(self, model, share):
        looks.append(share)
        if len(looks) == 3:
            raise Killed
        plain(self, model, share)

    walks_the_line(monkeypatch)
    monkeypatch.setattr(settle.Change, "scale", dies)
    with pytest.raises(Killed):
        tune(asked(world, tmp_path / "run", kind))
    monkeypatch.setattr(settle.Change, "scale", plain)
    again = report_of(tune(asked(world, tmp_path / "run", kind)))
    assert again["training"]["budget"] == report["training"]["budget"] and again["abilities"] == report["abilities"]


def test_modules_of_its_own_cannot_be_taken_back(world, tmp_path):
    recipe = asked(world, tmp_path / "run")
    with pytest.raises(PlanError, match=r"ControlLLM.*Remove measure.budget|measure.budget.*ControlLLM"):
        tune(recipe.model_copy(update={"plan": [{"ControlLLM": {}}]}))


def test_what_is_more_than_a_scale_and_cannot_be_healed_is_said(world, tmp_path):
    recipe = asked(world, tmp_path / "run", "adapter", keep={"language": 0.999})
    report = report_of(tune(recipe.model_copy(update={"plan": [{"ProMoT": {"num_virtual_tokens": 3}}]})))
    found, note = report["training"]["budget"], report["task"]["note"]
    assert "could not be enforced" in note and "could not be healed, since its soft prompt" in note
    assert found["met"] is False and found["share"] == 1 and len(found["points"]) == 1 and not found["healed"]


LATER = pytest.mark.long
DORA = {"LoRA": {"r": 8, "use_dora": True}}


@pytest.mark.parametrize("plan", [pytest.param({}, marks=LATER), {"LoRA": {"r": 8}}, pytest.param(DORA, marks=LATER)])
def test_where_no_part_meets_the_bound_the_model_is_healed(world, tmp_path, monkeypatch, plan):
    """The line is cut short here, so that nothing on it meets the bound."""
    monkeypatch.setattr(settle, "HALVINGS", 1)
    monkeypatch.setattr(settle_heal, "STEPS", (72, 72))
    monkeypatch.setattr(repair_heal, "RATE", 0.02)  # a tiny model moves little
    kind = "adapter" if plan else "dense"
    recipe = asked(world, tmp_path / "run", kind, keep={"language": 0.99}).model_copy(
        update={"plan": [plan] * bool(plan)}
    )
    run = tune(recipe)
    report = report_of(run)
    found, note = report["training"]["budget"], report["task"]["note"]
    line, healed = ([p for p in found["points"] if p["healed"] == which] for which in (False, True))
    assert [p["share"] for p in line] == ([1.0] if "use_dora" in str(plan) else [1.0, 0.5])
    assert healed[0]["share"] == 1
    assert healed[0]["margin"] > max(p["margin"] for p in line) and found["healed"] and "heal" in note
    assert f"{found['share']:.0%} of a short training" in note
    assert report["task"]["after"]["value"] < report["task"]["before"]["value"]  # a loss: the task stays learnt
    assert AutoModelForCausalLM.from_pretrained(run / "model")
    assert (run / "model" / "adapter_config.json").exists() == (plan == {"LoRA": {"r": 8}})  # one of both
    sides = (models.load(str(p), merge_adapter=True)[0] for p in (run / "model", world.base))
    model, base = (dict(m.named_parameters()) for m in sides)
    assert model.keys() == base.keys() and any(not torch.equal(model[n], base[n]) for n in base)


def test_a_share_of_a_healing_is_that_share_of_its_change(world):
    plain = models.load(str(world.base), dtype="float32")[0]
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    change = {n: m.get_delta_weight("default") for n, m in adapted.named_modules() if isinstance(m, LoraLayer)}
    healing = settle_heal.Healed(adapted, "it")
    for share in (0.3, 1.0, 0.5):  # each time of the whole
        healing.scale(share)
    got = dict(healing.plain().named_parameters())
    assert change
    for name, old in before.items():
        delta = change.get(f"base_model.model.{name.removesuffix('.weight')}", torch.zeros(()))
        torch.testing.assert_close(got[name], old + 0.5 * delta)


def adapter_on(plain, rank, targets, **more):
    config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets, init_lora_weights=False, **more)
    return get_peft_model(plain, config)


def test_two_adapters_are_joined_to_the_sum_of_their_changes(world):
    """Of different maps, ranks and scales; a map of one alone keeps its own."""
    plain = models.load(str(world.base), dtype="float32")[0]
    own = adapter_on(copy.deepcopy(plain), 2, ["q_proj", "up_proj"])
    other = adapter_on(copy.deepcopy(plain), 3, ["q_proj", "v_proj"])
    wanted = {n: p.detach().clone() for n, p in plain.named_parameters()}
    for name, (a, b) in [*factors(own).items(), *factors(other).items()]:
        wanted[f"{name}.weight"] += b @ a
    both = joined(own, other)
    assert both.peft_config["default"].r == 5 and factors(both).keys() == factors(other).keys() | {
        n for n in factors(both) if "up_proj" in n
    }
    got = dict(models.merged(both, "it").named_parameters())
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"exclude_modules": ["lm_head"]}])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_an_adapter_that_is_more_than_two_factors_is_not_joined(world, more):
    plain = models.load(str(world.base), dtype="float32")[0]
    other = adapter_on(copy.deepcopy(plain), 2, ["q_proj"])
    assert joined(plain, other) is None
    targets = ["q_proj"] if "use_dora" in more else ["q_proj", "embed_tokens"]
    assert joined(adapter_on(plain, 2, targets, **more), other) is None


@pytest.mark.filterwarnings("ignore:The following")
def test_adapters_of_experts_are_not_joined():
    """PEFT puts them beside the experts' one tensor, and such an adapter cannot be made by the names of maps."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=64, num_local_experts=2, num_key_value_heads=2, **sizes)
    experts = [get_peft_model(MixtralForCausalLM(config), LoraConfig(r=2, target_modules="all-linear")) for _ in "ab"]
    assert factors(experts[0]) is None and joined(*experts) is None
    assert hasattr(experts[0], "peft_config")  # it is still there


@pytest.mark.parametrize("plan", [[{"HalfFineTune": {}}], [{"OrthogonalSubspace": {}}]])
def test_a_promise_about_weights_is_kept(world, tmp_path, plan):
    """What promises not to move some weights or directions goes back along its line, and no training heals it."""
    recipe = without_a_word(world, tmp_path / "run", "dense", keep={"language": 0.999}).model_copy(
        update={"plan": plan}
    )
    job = checked(Run(recipe, world.folder))
    assert "promises which weights" in budget.why_unhealed(job, None)
    found = report_of(tune(recipe))["training"]["budget"]
    assert not any(p["healed"] for p in found["points"]) and found["points"][1:] and "promises" in found["unhealed"]


def test_a_healing_stands_beside_the_maps_of_the_plan(world, tmp_path):
    recipe = without_a_word(world, tmp_path / "run").model_copy(
        update={"plan": [{"LoRA": {"r": 2, "target_modules": ["q_proj"]}}]}
    )
    job = checked(Run(recipe, world.folder))
    healing = settle_heal.heal(job, copy.deepcopy(job.model), 0.0, lambda *_: None)
    assert {n.split(".")[-1] for n in factors(healing.model)} == {"q_proj"}


def test_an_ability_that_the_base_does_not_have_is_no_bound_met(world, tmp_path):
    report = report_of(tune(asked(world, tmp_path / "run", suites=["in-context"], keep={"in-context": 0.97})))
    found, note = report["training"]["budget"], report["task"]["note"]
    assert found["met"] is None and found["unseen"] == ["in-context"] and found["share"] == 1
    assert "nothing is held of in-context" in note and "meets the budget" not in note


def test_a_budget_of_nothing(world, tmp_path):
    with pytest.raises(RecipeError, match="budget"):
        asked(world, tmp_path, skip_before=True)


@pytest.mark.parametrize("name", ["in-contex", "all"])
def test_a_share_of_what_is_no_single_suite_would_hold_nothing(world, tmp_path, name):
    recipe = asked(world, tmp_path / "run", suites=["all"], keep={name: 0.97})
    with pytest.raises(RecipeError, match=f"names '{name}', but only in-context, format"):
        tune(recipe)


def without_a_word(world, out, plan="adapter", **measure):
    """A recipe that says nothing about a budget; nor about shares, unless `measure` does."""
    found = asked(world, out, plan).model_dump(exclude_unset=True)
    found["data"]["validation_size"] = 16
    found["measure"] = {k: v for k, v in found["measure"].items() if k not in ("budget", "keep")} | measure
    return recipe_from(found)


def test_a_loss_that_is_shown_is_taken_back_without_a_word(world, tmp_path):
    """Nobody named the suite: it is held at 0.95, and its bound is broken where the interval lies below that."""
    report = report_of(tune(without_a_word(world, tmp_path / "run")))
    found = report["training"]["budget"]
    assert found["floors"] == {} and found["others"] == ["language"]
    whole = found["points"][0]["kept"]["language"]
    assert whole["high"] < 0.95 and not found["points"][0]["meets"]
    assert (found["share"], found["healed"]) != (1.0, False)
    assert kept_of(report) > whole["value"]
    assert "no shown loss below 0.95 of language" in report["task"]["note"]


def test_a_floor_that_nobody_wrote_is_told_from_one_that_is_asked_for(world, tmp_path):
    """Also by a run that goes on from the recipe in its own folder, which has every key."""
    silent = without_a_word(world, tmp_path / "a", suites=["in-context"])
    again = recipe_from(silent.model_dump(mode="json"))
    for recipe in (silent, again):
        assert recipe.measure.floors == {"in-context": 0.97} and budget.asked_to_keep(recipe) == ()
    said = without_a_word(world, tmp_path / "b", suites=["in-context"], keep={"in-context": 0.97})
    assert list(budget.asked_to_keep(said)) == ["in-context"]
    assert said.measure.floors == silent.measure.floors
    for suites, floors in ((["default"], {"in-context": 0.97}), (["language"], {}), ([], {})):
        assert without_a_word(world, tmp_path / "c", suites=suites).measure.floors == floors


@pytest.mark.parametrize(
    ("method", "healed"),
    [
        ({"Freeze": {}}, True),
        ({"Freeze": {"layers": 1}}, False),
        ({"GSLoRA": {}}, True),
        ({"GSLoRA": {"proximal": True}}, False),
    ],
)
def test_what_promises_nothing_about_weights_is_healed(world, tmp_path, method, healed):
    recipe = without_a_word(world, tmp_path / "run", "dense").model_copy(update={"plan": [method]})
    assert (budget.why_unhealed(checked(Run(recipe, world.folder)), None) == "") == healed


@pytest.mark.parametrize("dora", [False, True])
def test_what_can_be_neither_healed_nor_scaled_has_no_budget(world, tmp_path, monkeypatch, dora):
    """DoRA beside packed weights, say."""
    walks_the_line(monkeypatch)
    plan = [{"LoRA": {"r": 2, "use_dora": dora}}]
    job = checked(Run(without_a_word(world, tmp_path / "run").model_copy(update={"plan": plan}), world.folder))
    assert job.budget != dora and ("a test walks the line" in job.unheld) == dora


def test_the_change_of_adalora_can_be_scaled(world, tmp_path, monkeypatch):
    walks_the_line(monkeypatch)
    recipe = without_a_word(world, tmp_path / "run", keep={"language": 0.999}).model_copy(
        update={"plan": [{"AdaLoRA": {}}]}
    )
    found = report_of(tune(recipe))["training"]["budget"]
    assert "why" not in found and len(found["points"]) > 1


def test_which_bounds_hold_a_run_without_a_word(world, tmp_path):
    job = checked(Run(without_a_word(world, tmp_path / "a", suites=["in-context", "language"]), world.folder))
    assert job.budget and budget.named(job) == {"in-context": 0.97} and budget.others(job) == ["language"]
    wide, low = {"value": 0.9, "low": 0.8, "high": 1.0}, {"value": 0.85, "low": 0.8, "high": 0.9}
    good = {"value": 1.02, "low": 1.0, "high": 1.04}
    assert budget.margin(job, {"in-context": good, "language": wide}) == pytest.approx(0.04)
    assert budget.margin(job, {"in-context": good, "language": low}) == pytest.approx(-0.05)
    assert budget.margin(job, {"in-context": wide}) == pytest.approx(0.9 - 0.03 - 0.97)
    assert budget.margin(job, {}) == 0.0
    said = checked(Run(asked(world, tmp_path / "b", suites=["in-context", "language", "format"]), world.folder))
    assert budget.named(said) == {"in-context": 0.97, "language": FLOOR} and budget.others(said) == ["format"]


@pytest.mark.parametrize(
    ("plan", "measure", "halved"),
    [
        ([{"ProMoT": {"num_virtual_tokens": 3}}], {}, False),
        ([{"ControlLLM": {}}], {}, False),
        ([{"LoRA": {"r": 2}}], {"skip_before": True}, False),
        ([{"LoRA": {"r": 2}}], {"limit": 2}, False),
        ([{"LoRA": {"r": 2}}], {"suites": []}, False),
        ([{"LoRA": {"r": 2}}], {}, True),
    ],
)
def test_a_run_that_can_hold_nothing_has_no_budget(world, tmp_path, plan, measure, halved):
    recipe = without_a_word(world, tmp_path / "run", **measure).model_copy(update={"plan": plan})
    job = checked(Run(recipe, world.folder, halved=halved))
    assert not job.budget and job.halved == halved
    assert budget.words(job) == f"Nothing is held: {job.unheld}" and job.unheld


def test_a_base_with_other_names_on_the_disk_has_no_budget_for_its_weights(world, tmp_path, monkeypatch):
    def refuses(*_):
        raise ModelError("its files have other names", "")

    monkeypatch.setattr(change, "Stacked", refuses)
    assert not checked(Run(without_a_word(world, tmp_path / "a", "dense"), world.folder)).budget
    assert checked(Run(without_a_word(world, tmp_path / "b", "adapter"), world.folder)).budget


def test_keep_none_on_the_command_line_takes_nothing_back(world, tmp_path):
    path = write_recipe(tmp_path / "r.yaml", without_a_word(world, tmp_path / "run").model_dump(mode="json"))
    assert _wished(path, (), ["none"]).measure.budget is False
    with pytest.raises(HoldfastError, match="--keep none takes nothing back"):
        _wished(path, (), ["none", "language=0.9"])


def test_keep_on_the_command_line_is_a_budget(world, tmp_path):
    plain = asked(world, tmp_path, budget=False)
    found = budgeted(plain, {"in-context": 0.97, "language": 0.99}).measure
    assert found.budget and found.keep == {"in-context": 0.97, "language": 0.99}
    assert found.suites == ["language", "in-context"]
    more = budgeted(plain, {"format": 0.9}).measure  # what the recipe names stays named
    assert more.keep == {"language": FLOOR, "format": 0.9} and more.suites == ["language", "format"]


def test_a_loss_on_the_reported_items_is_told_to_the_shell():
    """The half that chose met the bound, and the reported one shows a loss all the same."""
    met, missed, lost, unclear = (
        {"met": True},
        {"met": False},
        *({"verdict": {"status": s}} for s in ("lost", "unclear")),
    )
    assert [_exit(lost, met), _exit(unclear, met), _exit(unclear, met, missed)] == [1, 0, 1]
    assert _exit(lost, None) == _exit(lost) == 0  # no budget: a verdict alone


def test_that_nothing_is_held_is_told_unless_it_was_asked_for(world, tmp_path):
    """On the report's first lines, and not only beside its settings."""
    silent, plan = without_a_word(world, tmp_path / "a", limit=2), [{"LoRA": {"r": 2}}]
    note = report_of(tune(silent.model_copy(update={"plan": plan})))["task"]["note"]
    assert ("Nothing is held: " in note and "enough" in note) or "too few" in note
    assert budget.unasked(checked(Run(asked(world, tmp_path / "b", budget=False), world.folder))) == ""


def test_the_default_budget_names_every_default_suite():
    found = floors_to_keep(["language=0.99", "default"])
    assert found.keys() == set(DEFAULT) and found["in-context"] == 0.97 and found["language"] == 0.99
    assert {v for k, v in found.items() if k not in ("in-context", "language")} == {0.95}
    assert floors_to_keep(["language=0.99"]) == {"language": 0.99}


def test_the_command_says_when_the_bound_cannot_be_met(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settle, "HALVINGS", 1)
    path = write_recipe(tmp_path / "r.yaml", asked(world, tmp_path / "run", budget=False).model_dump(mode="json"))
    monkeypatch.setattr(sys, "argv", ["holdfast", "tune", str(path), "--keep", "language=0.99"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1 and "no part of the change that was looked at meets the budget" in " ".join(
        capsys.readouterr().out.split()
    )


def test_what_looks_during_training_sees_is_not_reported(world, tmp_path, monkeypatch):
    """Looks, searches and stages choose weights and settings: under a budget they see the half that chooses."""
    asked_for = set()
    plain = looking.score_rows

    def notes(job, model, rows, *args, **more):
        asked_for.update(r.where for r in rows)
        return plain(job, model, rows, *args, **more)

    monkeypatch.setattr(looking, "score_rows", notes)
    recipe = asked(world, tmp_path / "run")
    training = recipe.training.model_copy(update={"max_steps": 4, "eval_steps": 2, "load_best_model_at_end": True})
    folder = tune(recipe.model_copy(update={"training": training}))
    before = json.loads((folder / "before.json").read_text())
    assert asked_for and not asked_for & {i["id"] for i in before["task"]}
    seen = json.loads((folder / looking.PROBE).read_text())
    ids = [{i["id"] for t in s["tasks"] for i in t["items"]} for s in (seen["abilities"][0], before["abilities"][0])]
    assert ids[0] and not ids[0] & ids[1]


def test_test_rows_are_halved_where_nothing_validates(world, tmp_path):
    recipe = asked(world, tmp_path / "run")
    data = recipe.data.model_copy(update={"validation_size": 0.0, "test": recipe.data.train})
    job = checked(Run(recipe.model_copy(update={"data": data}), tmp_path))
    rows = [{r.where for r in half} for half in Halves(job).rows.values()]
    assert rows[0] and rows[1] and not rows[0] & rows[1]


@pytest.fixture(scope="module")
def healed(world, tmp_path_factory):
    """A run without a word about a budget that breaks its bound, and is healed."""
    folder = tmp_path_factory.mktemp("healed")
    with pytest.MonkeyPatch.context() as patch:
        strong(patch)
        report = report_of(tune(without_a_word(world, folder / "run")))
    assert report["training"]["budget"]["healed"]
    return folder / "run", report


def strong(patch):
    """A tiny model moves little: healing that does what it should there."""
    patch.setattr(repair_heal, "RATE", 0.02)
    patch.setattr(settle_heal, "STEPS", (72, 72))
    patch.setattr(settle, "HALVINGS", 0)


def test_a_killed_healing_ends_the_same(healed, world, tmp_path, monkeypatch):
    class Killed(BaseException):
        """Stands for a lost process."""

    def dies(*_):
        raise Killed

    strong(monkeypatch)
    plain = settle_heal.Healed.scale
    monkeypatch.setattr(settle_heal.Healed, "scale", dies)
    with pytest.raises(Killed):
        tune(without_a_word(world, tmp_path / "run"))
    assert not (tmp_path / "run" / "training.json").exists()
    monkeypatch.setattr(settle_heal.Healed, "scale", plain)
    again = report_of(tune(without_a_word(world, tmp_path / "run")))
    assert (
        again["training"]["budget"] == healed[1]["training"]["budget"] and again["abilities"] == healed[1]["abilities"]
    )


def test_the_card_and_the_report_say_what_was_done(healed):
    folder, report = healed
    said = report["training"]["budget"]["said"]
    assert "of a short training towards the base (heal)" in said and said in report["task"]["note"]
    assert "After the training: the whole change does not meet" in (folder / "model" / "README.md").read_text()
    assert report["settings"]["items"].startswith("half of each suite")
    assert "8 of 16 validation rows chose under the budget" in report["task"]["note"]


@pytest.mark.parametrize("export", [{"merge": True}, {"dtype": "bfloat16"}])
def test_a_healed_adapter_is_exported_as_asked(healed, world, tmp_path, monkeypatch, export):
    """Merged into the base, or in fewer bits: what is measured is what the file computes."""
    strong(monkeypatch)
    recipe = without_a_word(world, tmp_path / "run")
    recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update=export)})
    report = report_of(tune(recipe))
    assert report["training"]["budget"]["healed"] and report["tuned"]["export"]
    merged, adapter = tmp_path / "run" / "model", healed[0] / "model"
    assert (merged / "adapter_config.json").exists() == ("merge" not in export)
    sides = [models.load(str(p), merge_adapter=True, dtype="float32")[0] for p in (merged, adapter)]
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in sides), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2 if "dtype" in export else 1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("kind", ["adapter", pytest.param("dense", marks=LATER)])
def test_two_processes_heal_as_one(world, tmp_path, kind):
    """Each holds the whole model, so a run means the same wherever it is started, healed or taken back."""
    recipes = {}
    for name in ("one", "two"):  # a floor that the whole change misses and an end meets: else the command exits with 1
        recipe = without_a_word(world, tmp_path / name, kind, keep={"language": 0.8})
        recipes[name] = write_recipe(tmp_path / f"{name}.yaml", recipe.model_dump(mode="json"))
    two("-m", "holdfast.cli", "tune", str(recipes["two"]))
    tune(recipes["one"])
    one, other = (report_of(tmp_path / name) for name in recipes)
    ends = [r["training"]["budget"] for r in (one, other)]
    assert any(p["healed"] for p in ends[0]["points"]), "the bound must break"
    shown = [[(p["share"], p["healed"], p["meets"]) for p in end["points"]] for end in ends]
    assert shown[0] == shown[1] and ends[0]["share"] == ends[1]["share"]
    assert kept_of(one) == pytest.approx(kept_of(other), abs=0.1)  # rounding grows over 60 steps at a high rate
    assert one["task"]["after"]["value"] == pytest.approx(other["task"]["after"]["value"], rel=0.1)
