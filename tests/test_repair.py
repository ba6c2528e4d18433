"""Repair: parts without a common item, the search by hand, and whole repairs of a tiny model that forgot."""

import copy
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from browser import CHROMIUM, assert_fits
from holdfast import cli, models
from holdfast import methods as hf
from holdfast.data.encoder import Encoder
from holdfast.engine.forward import forward
from holdfast.errors import DataError, HoldfastError, ModelError, PlanError, RecipeError
from holdfast.measure import closeness as close
from holdfast.measure.parts import COARSE, FINE, REPORT, cut, join, whole_parts
from holdfast.measure.probe import Ask, Group, Probe, Suite
from holdfast.measure.suites import build
from holdfast.methods import ICLAnchor
from holdfast.methods.loss._divergence import forward_kl
from holdfast.plan import Plan
from holdfast.report import repair as shown
from holdfast.runs import repair as repair_run
from holdfast.runs import repair_heal, repair_judge, repair_search
from holdfast.runs.repair_goal import from_data
from holdfast.runs.repair_heal import Healed, heal, write_change
from holdfast.runs.repair_search import GRID, MADE, TUNED, Candidate, Point, best, candidates, choose, frontier, search
from holdfast.services import Context
from holdfast.session import Session
from holdfast.sites.adapter_files import may_scale
from holdfast.sites.merge_files import Pair, merge_files
from holdfast.verbs.repair import repair
from tiny import build_model, ticket_rows
from tiny_run import make_world, write_rows

FEW: dict = {"suites": ("language",), "limit": 4, "methods": ("WiSEFT", "LiNeS")}
WORDS = ["--suite", "language", "--limit", "4", "--method", "WiSEFT"]
ROWS = {"prompt": "{text}", "completion": " {queue}", "metric": "loss"}


def train(model, texts, steps, lr):
    """Plain AdamW on (tokens, how many of them are not learnt)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for n in range(steps):
        tokens, start = texts[n % len(texts)]
        ids = torch.tensor([tokens])
        labels = ids.clone()
        labels[:, :start] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def reader(tokenizer):
    """A tiny base that has read the passages of the language suite."""
    suite = build("language", Ask(tokenizer, limit=4))
    passages = [(tokenizer(p.answers[0])["input_ids"][:96], 0) for p in suite.probes]
    return train(build_model(), passages, 150, 0.01)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    """A base that has read the passages of the language suite, and a model tuned on tickets that forgot them."""
    folder = tmp_path_factory.mktemp("repair")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setenv("HOLDFAST_HOME", str(folder / "home"))
        base = reader(tokenizer)
        found = make_world(folder, base, tokenizer, ticket_rows())
        splits = Encoder(tokenizer).join([(r.prompt, r.completion) for r in ticket_rows()], end=True)
        tuned = train(base, [(s.ids, 0) for s in splits], 288, 0.005)
        models.save_model(tuned, tokenizer, folder / "tuned", card=None)
        yield SimpleNamespace(base=str(found.base), tuned=str(folder / "tuned"), data=str(found.train), folder=folder)


def exit_of(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["holdfast", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


# ---- parts


@pytest.mark.parametrize("name", ["in-context", "knowledge", "language"])
def test_every_item_is_in_one_part(name, tokenizer):
    suite = build(name, Ask(tokenizer, num_fewshot=1, limit=8))
    parts = cut(suite)
    ids = [p.id for part in (COARSE, FINE, REPORT) for p in parts[part].probes]
    assert sorted(ids) == sorted(p.id for p in suite.probes) and len(set(ids)) == len(ids)
    assert abs(len(parts[REPORT].probes) - len(ids) / 2) <= len(suite.groups) * (2 if name == "knowledge" else 1) + 8
    assert all({p.task for p in s.probes} == {g.name for g in s.groups} for s in parts.values())


def test_clusters_stay_together_where_they_count_and_are_spread_where_not():
    def made(clustered):
        groups = tuple(Group(t, 1, 0.0, "m", clustered) for t in ("a", "b"))
        asked = [(t, c, n) for t in "ab" for c in range(4) for n in range(4)]
        probes = [Probe(t, f"{t}{c}{n}", "exact", "", ("x",), cluster=f"c{c}") for t, c, n in asked]
        return Suite("s", groups, tuple(probes))

    together, spread = cut(made(True)), cut(made(False))
    for part in together:
        others = {p.cluster for q, s in together.items() if q != part for p in s.probes}
        assert not others & {p.cluster for p in together[part].probes}
        assert {p.cluster for p in spread[part].probes} == {"c0", "c1", "c2", "c3"}
    assert [len(spread[part].probes) for part in (COARSE, FINE, REPORT)] == [8, 8, 16]


def test_parts_are_joined_task_by_task():
    one = {"suite": "s", "part": "coarse", "tasks": [{"name": "a", "items": [1]}, {"name": "b", "items": [2]}]}
    two = {"suite": "s", "part": "fine", "tasks": [{"name": "b", "items": [3]}]}
    got = join([one, two])
    assert got["tasks"] == [{"name": "a", "items": [1]}, {"name": "b", "items": [2, 3]}]
    assert got["part"] == "coarse+fine" and one["tasks"][1]["items"] == [2]


# ---- the search


def at(value, margin, name="p"):
    return Point(Candidate(name, {"alpha": value}), value, margin, ("coarse",))


def test_frontier_and_choice_by_hand():
    a, b, c, d = at(0.9, -0.2), at(0.8, 0.01), at(0.7, 0.05), at(0.6, 0.04)
    assert frontier([a, b, c, d]) == [a, b, c]  # c is better than d at both
    assert best([a, b, c, d], 2) == [b, c] and best([a, b, c, d], 9) == [b, c, a, d]
    assert choose([a, b, c, d]) == b  # the best task among those that meet the bound
    assert choose([a, at(0.95, -0.3)]) == a  # nobody meets it: the nearest


def test_the_second_look_decides_and_always_sees_the_tuned_model():
    asked = [Candidate("WiSEFT", {"alpha": x}) for x in (0.2, 0.5, 0.8)]
    seen = []

    def fine(who):
        seen.append(who)
        alpha = who.settings.get("alpha", 1.0)
        return Point(who, alpha, 0.4 - alpha, ("coarse", "fine"))  # coarse items were kinder

    _, chosen = search(asked, lambda who: at(who.settings["alpha"], 0.6 - who.settings["alpha"]), fine)
    assert seen[0] == TUNED
    assert chosen.candidate.settings["alpha"] == 0.2 and "parts" not in chosen.candidate.settings


def test_the_best_line_is_bent_third_by_third():
    """A low lowest third gives margin, a high highest third gives task: found from the best line in six looks."""

    def coarse(who):
        alpha = who.settings.get("alpha", 1.0)
        low, _, high = who.settings.get("parts", (alpha,) * 3)
        return Point(who, high, 0.55 - low, ("coarse",))

    asked = [Candidate("WiSEFT", {"alpha": x}) for x in (0.3, 0.5, 0.9)]
    points, chosen = search(asked, coarse, coarse)
    looked = [p.candidate.settings["parts"] for p in points if "parts" in p.candidate.settings]
    assert looked[:6] == [(0.3, 0.5, 0.5), (0.7, 0.5, 0.5), (0.3, 0.3, 0.5), (0.3, 0.7, 0.5), (0.3, 0.5, 0.3),
                          (0.3, 0.5, 0.7)]  # fmt: skip
    assert chosen.candidate.settings == {"alpha": 0.5, "parts": (0.3, 0.5, 0.7)}
    assert chosen.candidate.label == "WiSEFT alpha 0.5 parts 0.3/0.5/0.7" and not chosen.candidate.methods[0].off()


def test_the_greedy_soup_by_hand():
    """b alone is the best; c makes it better and joins, the tuned model would make it worse and does not."""
    values = {"tuned model": 0.5, "b": 0.7, "c": 0.6, "b + c": 0.8, "tuned model + b + c": 0.65}
    seen = []

    def coarse(who):
        seen.append(who.label)
        return Point(who, values[who.label], 0.1, ("coarse",))

    points, chosen = search([], coarse, lambda who: Point(who, values[who.label], 0.1, ("coarse", "fine")), ("b", "c"))
    assert seen == ["tuned model", "b", "c", "tuned model + b + c", "b + c"] and chosen.candidate.label == "b + c"
    assert [p.candidate.label for p in points[:4]] == ["b", "c", "tuned model + b + c", "b + c"]
    (method,) = chosen.candidate.methods
    assert method == hf.TaskArithmetic(models=("b", "c"), weights=(0.0, 1.0, 1.0), scale=0.5)
    search([], lambda who: Point(who, 0.5, 0.1, ("coarse",)), coarse, ())  # one model: no soup


def test_the_grid_is_made_of_methods_that_only_merge():
    names = [name for name in GRID if name not in MADE]
    for c in candidates(names):
        assert len(c.methods) == 1 and not c.methods[0].off() and "merge" in c.methods[0].sites(), c.label
    with pytest.raises(PlanError, match="no grid for the method 'LoRA'"):
        candidates(["LoRA"])


# ---- closeness


def test_closeness_is_the_share_of_likeliest_tokens(world, tokenizer):
    tuned, base = (AutoModelForCausalLM.from_pretrained(p) for p in (world.tuned, world.base))
    prompts = close.drawn_prompts(tuned, tokenizer)
    assert len({tuple(p) for p in prompts}) == len(prompts) >= close.FEWEST and len(prompts[0]) > close.SHORTEST
    pairs = list(zip(prompts, close.greedy_answers(tuned, tokenizer, prompts), strict=True))
    own = close.closeness(tuned, pairs, batch_tokens=512)
    assert all(i["correct"] == 1 for i in own)
    others = close.closeness(base, pairs, batch_tokens=512)
    prompt, answer = pairs[3]
    logits = base(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    same = logits.argmax(-1) == torch.tensor(answer)
    assert others[3]["correct"] == pytest.approx(float(same.float().mean()))
    assert sum(i["correct"] for i in others) < 0.9 * len(others)


def test_prompts_of_a_file(tmp_path):
    lines = [json.dumps({"prompt": f"p{n}"} if n % 2 else f"p{n}") for n in range(9)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n\n")
    assert close.read_prompts(tmp_path / "p.jsonl") == [f"p{n}" for n in range(9)]
    (tmp_path / "p.txt").write_text("same\n" * 20)
    with pytest.raises(DataError, match="holds 1 different prompts"):
        close.read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:1 is neither"):
        close.read_prompts(tmp_path / "p.jsonl")


# ---- task rows


def test_rows_of_a_closed_set_are_scored_by_accuracy_on_parts_without_a_common_row(world, tokenizer):
    goal = from_data(world.data, **{**ROWS, "metric": None}, tokenizer=tokenizer, batch_tokens=512)
    rows = {part: {p for p, _ in asked[0]} for part, asked in goal.asked.items()}
    assert goal.metric.name == "accuracy" and [len(rows[p]) for p in (COARSE, FINE, REPORT)] == [6, 6, 12]
    assert not rows[REPORT] & (rows[COARSE] | rows[FINE]) and not rows[COARSE] & rows[FINE]
    items = goal.score(AutoModelForCausalLM.from_pretrained(world.tuned), REPORT)
    assert goal.value(items) == sum(i["correct"] for i in items) / 12


# ---- whole repairs


@pytest.fixture(scope="module")
def done(world):
    """A repair with task rows whose bound lies between the two ends."""
    out = world.folder / "out"
    return SimpleNamespace(
        out=out, report=repair(world.base, world.tuned, out, data=world.data, keep={"language": 0.8}, **ROWS, **FEW)
    )


def test_the_chosen_merge_meets_the_bound_and_keeps_more_of_the_task_than_the_base(done):
    r = done.report
    looked = {p["label"]: p for p in r["points"] if len(p["parts"]) == 2}
    base, tuned, chosen = looked["base"], looked["tuned model"], r["chosen"]
    assert tuned["kept"]["language"]["value"] < 0.6 and not tuned["meets"]
    assert r["met"] and chosen["meets"] and chosen["kept"]["language"]["value"] >= 0.8
    meeting = [p for p in looked.values() if p["meets"] and p["label"] != "base"]
    assert chosen["task"]["value"] == min(p["task"]["value"] for p in meeting)  # a loss
    assert tuned["task"]["value"] < chosen["task"]["value"] < base["task"]["value"]


def test_what_was_written_is_the_chosen_merge(world, done):
    c = done.report["chosen"]
    wanted = dict(Pair(world.base, world.tuned).merged(Candidate(c["method"], c["settings"]).methods))
    model = AutoModelForCausalLM.from_pretrained(done.report["model"])
    assert all(torch.equal(p, wanted[n]) for n, p in model.named_parameters())
    assert c["label"] in (done.out / "model" / "README.md").read_text()


def test_the_report_rests_on_items_that_chose_nothing(done, tokenizer):
    report = done.report["report"]
    suite = cut(build("language", Ask(tokenizer, limit=4)))
    tasks = report["repaired"][0]["tasks"]
    assert sum(t["n"] for t in tasks) == len(suite[REPORT].probes)
    assert report["task"]["repaired"]["n"] == 12 == done.report["chosen"]["task"]["n"]
    assert report["tuned"][0]["retention"]["value"] < report["repaired"][0]["retention"]["value"]


def test_a_finished_repair_does_nothing_and_another_bound_asks_nothing_new(world, done, monkeypatch):
    asked, plain = [], repair_judge.score_suite

    def noted(model, tokenizer, suite, **options):
        asked.append(suite.settings["part"])
        return plain(model, tokenizer, suite, **options)

    monkeypatch.setattr(repair_judge, "score_suite", noted)
    settings = {"data": world.data, **ROWS, **FEW}
    again = repair(world.base, world.tuned, done.out, keep={"language": 0.8}, **settings)
    assert again == done.report and not asked
    other = repair(world.base, world.tuned, world.folder / "other", keep={"language": 0.7}, **settings)
    assert asked.count(COARSE) <= 6  # all but the lines that are bent from another one were known
    assert other["chosen"]["task"]["value"] <= done.report["chosen"]["task"]["value"]
    with pytest.raises(RecipeError, match="of another recipe"):
        repair(world.base, world.tuned, done.out, keep={"language": 0.9}, **settings)


def test_a_killed_search_goes_on_and_comes_to_the_same(world, done, tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    settings = {"data": world.data, "keep": {"language": 0.8}, **ROWS, **FEW}
    asked, plain = [], repair_judge.score_suite

    def killed(*args, **options):
        asked.append(args)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return plain(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(repair_judge, "score_suite", killed)
        repair(world.base, world.tuned, tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "repair.json").exists()
    got = repair(world.base, world.tuned, tmp_path / "out", **settings)
    same = ("points", "chosen", "report", "status", "sentence")
    assert {k: got[k] for k in same} == {k: done.report[k] for k in same}


def test_without_data_the_tuned_models_own_answers_count(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    code = exit_of(monkeypatch, "repair", world.base, world.tuned, "-o", out, "--keep", "language=0.7", *WORDS)
    r = json.loads((out / "repair.json").read_text())
    assert code == {"kept": 0, "unclear": 3, "lost": 1}[r["status"]]
    looked = {p["label"]: p for p in r["points"] if len(p["parts"]) == 2}
    assert looked["tuned model"]["task"]["value"] == 1 > looked["base"]["task"]["value"]
    assert r["report"]["task"]["source"] == "own answers" and r["met"]
    shown = capsys.readouterr().out
    assert r["chosen"]["label"] in shown and "language" in shown and str(out / "repair.html") in shown
    page, text = (out / "repair.html").read_text(), (out / "repair.md").read_text()
    assert page.count("<svg") == 1 and "<script" not in page and "http" not in page.replace("http://www.w3.org", "")
    assert f"**{r['chosen']['label']}**" in text


def test_several_tuned_models_make_a_soup(world, tmp_path):
    """The tuned model walked back a little stands for a second one, which keeps more."""
    other = merge_files(world.base, world.tuned, [hf.WiSEFT(alpha=0.4)], tmp_path / "other")
    settings = {"data": world.data, "keep": {"language": 0.6}, **ROWS, **FEW, "methods": ("SLERP",)}
    r = repair(world.base, world.tuned, tmp_path / "out", also=[str(other)], **settings)
    looked = {p["label"]: p for p in r["points"]}
    mean = looked[f"tuned model + {other}"]
    assert looked[str(other)]["kept"]["language"]["value"] > mean["kept"]["language"]["value"]
    if r["chosen"]["method"] == "ModelSoup":
        got = dict(AutoModelForCausalLM.from_pretrained(r["model"]).named_parameters())
        ends = [dict(AutoModelForCausalLM.from_pretrained(p).named_parameters()) for p in (world.tuned, other)]
        own, second = r["chosen"]["settings"]["has"]
        for name, p in got.items():
            wanted = (own * ends[0][name] + second * ends[1][name]) / (own + second)
            torch.testing.assert_close(p, wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(HoldfastError, match="named twice"):
        repair(world.base, world.tuned, tmp_path / "twice", also=[world.tuned], **settings)


def test_an_adapter_is_repaired_as_an_adapter_too(world, tmp_path, monkeypatch, capsys):
    """On the base it computes what the repaired whole model does; what cannot be scaled gives a whole model alone."""
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapter, (base, out) = tmp_path / "adapter", (world.base, tmp_path / "out")
    with models.peft_quiet():
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(adapter)
    monkeypatch.setitem(repair_search.GRID, "LiNeS", [{"alpha": 0.1}])
    words = ["--data", world.data, "--prompt", "{text}", "--completion", " {queue}", "--metric", "loss"]
    words += ["--keep", "language=0.99", "--suite", "language", "--limit", "4"]
    exit_of(monkeypatch, "repair", base, adapter, "-o", out, *words, "--method", "LiNeS")
    r = json.loads((out / "repair.json").read_text())
    assert r["chosen"]["method"] == "LiNeS" and f"Adapter: {out / 'adapter'}" in capsys.readouterr().out
    ids = torch.arange(20)[None] + 5
    with models.peft_quiet():
        one, two = (models.load(str(out / n), dtype="float32")[0](input_ids=ids).logits for n in ("adapter", "model"))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    source = models.resolve(str(adapter))
    assert may_scale(source, [hf.WiSEFT()]) and not may_scale(source, [hf.TIES(), hf.WiSEFT()])


def test_a_bound_that_no_candidate_meets_exits_with_1_and_gives_the_nearest(world, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("\n".join(r.prompt.replace("\n", " ") for r in ticket_rows()))
    monkeypatch.setitem(repair_search.GRID, "WiSEFT", [{"alpha": 0.8}, {"alpha": 0.9}])
    words = ["--prompts", tmp_path / "p.txt", "--keep", "language=0.98", *WORDS]
    assert exit_of(monkeypatch, "repair", world.base, world.tuned, "-o", tmp_path / "out", *words) == 1
    r = json.loads((tmp_path / "out" / "repair.json").read_text())
    assert not r["met"] and r["status"] == "not met" and "The nearest is WiSEFT alpha 0.8" in r["sentence"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert "BOUND NOT MET" in capsys.readouterr().out


# ---- heal


def test_heal_pulls_towards_the_base_and_reads_no_label(world, tokenizer, tmp_path, monkeypatch):
    """KL to the base on few-shot prompts that the training did not see falls."""
    base, tuned = (AutoModelForCausalLM.from_pretrained(p) for p in (world.base, world.tuned))
    goal = from_data(world.data, **ROWS, tokenizer=tokenizer, batch_tokens=512)
    answers = [a for a, _ in goal.asked[REPORT][0]]
    texts = [tokenizer.decode(p) for p in goal.prompts]
    assert len(texts) == 12 and all(t not in answers for t in texts)
    file, told = tmp_path / "heal.safetensors", []
    monkeypatch.setattr(repair_heal, "RATE", 0.02)  # a tiny model moves little
    healing = heal(lambda: base, lambda: tuned, tokenizer, goal.prompts, steps=24, tell=lambda x, _: told.append(x))
    write_change(healing.model, file)
    assert told == sorted(told) and told[-1] == 1 and [p.name for p in tmp_path.iterdir()] == [file.name]

    rows = ICLAnchor(pool=12, seed=5).asides(Context(base, tokenizer))
    pair = Pair(world.base, world.tuned)
    apart = []
    for methods in ([], [Healed(file=str(file))]):
        weights = dict(pair.merged(methods))
        model = AutoModelForCausalLM.from_pretrained(world.base)
        model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            logp = [forward(m, rows)[1].log_softmax(-1) for m in (base, model)]
        apart.append(float(forward_kl(*logp).mean()))
    assert apart[1] < 0.7 * apart[0]


@pytest.mark.parametrize("floor, heals", [(0.8, True), (0.1, False)])
def test_by_default_it_is_healed_where_the_merges_fall_short(world, tmp_path, monkeypatch, floor, heals):
    """At 0.8 the best merge gives back much of the task; at 0.1 the tuned model meets the bound itself."""
    monkeypatch.setitem(repair_search.GRID, "heal", [{"steps": 6}])
    settings = {"data": world.data, **ROWS, "suites": ("language",), "limit": 4}
    got = repair(world.base, world.tuned, tmp_path / "out", keep={"language": floor}, **settings)
    seen = {p["label"]: p for p in got["points"] if len(p["parts"]) == 2}
    assert ("heal steps 6" in seen) == heals and any(label.startswith("TIES") for label in seen)
    if heals:
        merges = [
            p["task"]["value"] for label, p in seen.items() if p["meets"] and label not in ("base", "heal steps 6")
        ]
        lost, gained = min(merges) - seen["tuned model"]["task"]["value"], seen["base"]["task"]["value"]
        assert lost > 0.1 * (gained - seen["tuned model"]["task"]["value"])
    else:
        assert got["chosen"]["label"] == "tuned model"


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_a_change_of_turned_weights_is_written_in_their_shape(tokenizer, tmp_path):
    """GPT-2 stores its maps (in, out): what `Healed` adds is what PEFT's own merge adds."""
    sizes = {
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": len(tokenizer),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    tuned = {n: p.detach().clone() for n, p in model.named_parameters()}
    session = Session(Plan([hf.LoRA(r=2)]), model, Context(model, tokenizer))
    session.prepare([])
    session.enter(session.stage)
    with torch.no_grad():
        for name, p in session.params.items():
            p.normal_(generator=torch.Generator().manual_seed(len(name)))
    write_change(session.model, tmp_path / "heal.safetensors")
    healed = Healed(file=str(tmp_path / "heal.safetensors"))
    merged = dict(session.model.merge_and_unload().named_parameters())
    for name in (n for n in tuned if not n.startswith("lm_head")):
        got = healed.merge(name, {"tuned": tuned[name]}, {}, 1)
        torch.testing.assert_close(got, merged[name].detach(), rtol=1e-4, atol=1e-4)
    assert not torch.equal(merged["transformer.h.0.attn.c_attn.weight"], tuned["transformer.h.0.attn.c_attn.weight"])


def test_a_suite_that_asks_this_model_nothing_is_no_fault():
    parts = whole_parts(Suite("thinking", (), (), {}, note="no switch"), "--limit")
    assert not any(p.probes for p in parts.values()) and set(parts) == {COARSE, FINE, REPORT}


def test_a_change_of_an_embedding_is_written_too(tiny_model, tmp_path):
    """PEFT keeps the factors of an embedding by another name; s B A stands there turned."""
    model = tiny_model(tied=False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    write_change(adapted, tmp_path / "change.safetensors")
    change = Healed(file=str(tmp_path / "change.safetensors"))
    merged = dict(adapted.merge_and_unload().named_parameters())
    for name, old in before.items():
        torch.testing.assert_close(change.merge(name, {"tuned": old}, {}, 1), merged[name], atol=1e-5, rtol=1e-4)
    assert not torch.equal(merged["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_another_change_at_the_same_place_is_read_anew(tmp_path):
    file, w = tmp_path / "change.safetensors", torch.zeros(2, 2)
    for n, value in enumerate((1.0, 3.0)):
        save_file({"w.A": torch.full((1, 2), value), "w.B": torch.ones(2, 1)}, file)
        os.utime(file, ns=(n, n))
        assert Healed(file=str(file)).merge("w", {"tuned": w}, {}, 1).unique().tolist() == [value]


def test_without_rows_the_least_share_of_a_healing_that_meets_the_bound_is_chosen():
    """The training saw the prompts: there the whole looks nearest to the tuned model, which it is not."""

    def healed(share, value, margin):
        return Point(Candidate("heal", {"steps": 6, "share": share}), value, margin, ("coarse",))

    line = Point(Candidate("WiSEFT", {"alpha": 0.1}), 0.80, 0.1, ("coarse",))
    shares = [healed(1.0, 0.99, 0.1), healed(0.7, 0.98, 0.02), healed(0.5, 0.97, -0.1)]
    assert repair_search.choose([line, *shares]) == shares[0]
    assert repair_search.choose_nearest([line, *shares]) == shares[1]
    better = Point(Candidate("WiSEFT", {"alpha": 0.9}), 0.985, 0.1, ("coarse",))
    assert repair_search.choose_nearest([better, *shares]) == better
    short = [healed(1.0, 0.9, -0.1), healed(0.5, 0.95, -0.2)]
    assert repair_search.choose_nearest(short) == short[0]  # none meets it: the nearest to the bound


def test_a_share_of_a_healing_lies_between_the_tuned_model_and_the_whole(tmp_path):
    change = {"w.A": torch.randn(2, 5), "w.B": torch.randn(3, 2)}
    save_file(change, tmp_path / "heal.safetensors")
    tuned = torch.randn(3, 5)
    whole, half, none = (
        Healed(file=str(tmp_path / "heal.safetensors"), share=s).merge("w", {"tuned": tuned}, {}, 1)
        for s in (1.0, 0.5, 0.0)
    )
    assert torch.equal(none, tuned)
    torch.testing.assert_close(whole, tuned + change["w.B"] @ change["w.A"])
    torch.testing.assert_close(half, (whole + tuned) / 2)


def test_a_healed_candidate_is_written_and_made_once_for_all_shares(world, tmp_path, monkeypatch):
    monkeypatch.setitem(repair_search.GRID, "heal", [{"steps": 6}, {"steps": 6, "share": 0.5}])
    made, plain = [], repair_run.heal
    monkeypatch.setattr(repair_run, "heal", lambda *a, **k: made.append(1) or plain(*a, **k))
    settings = {"data": world.data, "keep": {"language": 0.1}, **ROWS, **FEW, "methods": ("heal",)}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(repair_judge.Judge, "measured", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        repair(world.base, world.tuned, tmp_path / "out", **settings)
    got = repair(world.base, world.tuned, tmp_path / "out", **settings)
    assert len(made) == 1 and [p["label"] for p in got["points"]].count("heal steps 6") == 2
    looked = {p["label"]: p for p in got["points"]}
    tasks = [looked[label]["task"]["value"] for label in ("tuned model", "heal steps 6 share 0.5", "heal steps 6")]
    assert len(set(tasks)) == 3
    if got["chosen"]["method"] == "heal":
        change = Healed(
            file=str(tmp_path / "out" / "heal.safetensors"), share=got["chosen"]["settings"].get("share", 1)
        )
        wanted = dict(Pair(world.base, world.tuned).merged([change]))
        model = AutoModelForCausalLM.from_pretrained(got["model"])
        assert all(torch.equal(p, wanted[n]) for n, p in model.named_parameters())


# ---- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "format=0.9"], "only language is measured"),
        (["--data", "x.jsonl", "--prompts", "y.txt"], "--data and --prompts both say"),
        (["--method", "LoRA"], "no grid for the method 'LoRA'"),
        (["--suite", "lm_eval:piqa"], "lm_eval"),
        (["--keep", "language"], "not of the form"),
    ],
)
def test_usage_mistakes_exit_with_2(words, message, world, tmp_path, monkeypatch, capsys):
    asked = ["--keep", "language=0.9", *WORDS] if words[0] != "--keep" else ["--suite", "language", "--limit", "4"]
    assert exit_of(monkeypatch, "repair", world.base, world.tuned, "-o", tmp_path / "out", *asked, *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "model").exists()


def test_what_cannot_be_repaired_is_refused(world, tmp_path, tokenizer):
    keep = {"keep": {"language": 0.9}, **FEW}
    models.save_model(build_model(seed=5), tokenizer, tmp_path / "other", card=None)
    with pytest.raises(ModelError, match="does not descend from the base"):
        repair(world.base, str(tmp_path / "other"), tmp_path / "a", **keep)
    with pytest.raises(HoldfastError, match="has the weights of its base"):
        repair(world.base, world.base, tmp_path / "same", **keep)
    few = write_rows(tmp_path / "few.jsonl", ticket_rows()[:4])
    with pytest.raises(DataError, match="holds 4 rows"):
        repair(world.base, world.tuned, tmp_path / "b", data=str(few), **ROWS, **keep)
    with pytest.raises(DataError, match="no metric 'acuracy'"):
        repair(world.base, world.tuned, tmp_path / "c", data=world.data, **{**ROWS, "metric": "acuracy"}, **keep)
    with pytest.raises(HoldfastError, match="too few items at this limit"):
        repair(world.base, world.tuned, tmp_path / "d", **{**keep, "limit": 2})
    (tmp_path / "p.txt").write_text("\n".join(f"Ticket {n}" for n in range(9)))
    with pytest.raises(DataError, match="heal has 5 prompts"):
        prompts = {"prompts": str(tmp_path / "p.txt"), "methods": ("heal",)}
        repair(world.base, world.tuned, tmp_path / "g", **{**keep, **prompts})
    shown = {"keep": {"in-context": 0.9}, "suites": ("in-context",), "num_fewshot": 1, "limit": 4}
    with pytest.raises(HoldfastError, match="does not show every ability to keep"):
        repair(world.base, world.tuned, tmp_path / "e", data=world.data, **ROWS, **shown)
    Path(tmp_path / "f").mkdir()
    (tmp_path / "f" / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="holds no Holdfast run"):
        repair(world.base, world.tuned, tmp_path / "f", **keep)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: the width of the page is not looked at")
def test_the_page_fits_phone_and_desktop_and_shows_names_as_text(done, tmp_path):
    report = copy.deepcopy(done.report)
    report["tuned"]["name"] = "<script>alert(1)</script>" + "x" * 500
    report["points"].append({**report["chosen"], "label": "WiSEFT " + "alpha" * 60})
    page = shown.page(report)
    assert "<script" not in page
    assert_fits(page, tmp_path)
