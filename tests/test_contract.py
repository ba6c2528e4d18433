"""The contract every method keeps. Rule numbers are those of the design; rule 13 is in test_pairs.py."""

import copy
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
import yaml

import holdfast
from cases import (
    BY_NAME,
    CASES,
    COVERING,
    GENERAL,
    HOST,
    STANDING,
    Seen,
    cases_that_stand,
    late,
    run,
    same,
    start,
    token_rows,
    weights_of,
)  # fmt: skip
from holdfast import methods as hf
from holdfast import models
from holdfast.data.mix import Mix, Source
from holdfast.engine.forward import ATTENTION, SOFT_PROMPT, forward
from holdfast.engine.replaced import ORIGINAL, replaced_in
from holdfast.engine.ways import inner
from holdfast.errors import NoEffect, PlanError
from holdfast.hosts import plain
from holdfast.method import Method, Term
from holdfast.plan import Host, Plan
from holdfast.services import Context
from holdfast.session import Session
from pairs import orders

each = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
standing = pytest.mark.parametrize("case", cases_that_stand())
covering = pytest.mark.parametrize("case", cases_that_stand(among=COVERING))
HARD = {"weight_decay": 0.1, "max_grad_norm": 1.0, "learning_rate": 2e-3}


class Killed(Exception):
    """Stands for a lost process."""


@pytest.fixture(scope="module")
def finished(tiny_model, tokenizer, rows):
    """finished(*methods, **training): the run of a plan, computed once for all tests that ask for it."""
    known = {}

    def get(*methods, steps=4, tied=True, **training):
        key = (methods, steps, tied, tuple(sorted(training.items())))
        if key not in known:
            known[key] = run(methods, tiny_model(tied), tokenizer, rows, steps, **training)
        return known[key]

    return get


def test_every_method_has_a_row_with_reasons():
    assert [c.name for c in CASES] == list(hf.all_methods())
    for c in CASES:
        assert bool(c.off) != bool(c.no_off.strip()), f"{c.name} needs off values or a reason"
        assert bool(c.zero_at_base) != bool(c.no_zero.strip()), f"{c.name} needs a zero term or a reason"


def test_what_merges_by_more_than_scaling_trains_the_models_own_weights():
    merging = [c.method for c in CASES if "merge" in c.method.sites()]
    assert merging and all(m.scales_update != ("dense" in m.needs) for m in merging)
    assert all("base_weights" in m.needs for m in merging)


# ---- 1 recipe and back


@pytest.mark.parametrize(
    "method", [m for c in CASES for m in (c.method, type(c.method)(), *c.off)], ids=lambda m: repr(m)[:60]
)
def test_1_recipe_and_back(method):
    plan = Plan([method])
    again = Plan.from_recipe(yaml.safe_load(yaml.safe_dump(plan.to_recipe())))
    assert again == plan and again.methods[0].settings() == method.settings()
    assert Plan.from_recipe([method.name]) == Plan([type(method)()])


# ---- 2 off values


@pytest.mark.parametrize("method", [m for c in CASES for m in c.off], ids=lambda m: repr(m)[:60])
def test_2_off_is_no_method(method, finished):
    assert method.off() and not type(method)().off()
    same(finished(method), finished())


def test_2_anchored_sft_of_weight_0_is_dft(finished):
    same(finished(hf.AnchoredSFT(weight=0.0)), finished(hf.DFT()))


# ---- 3 the method does something


@each
def test_3_changes_the_run(case, finished):
    with_it, without = finished(case.method), finished()
    if with_it.weights.keys() == without.weights.keys():
        assert any(not torch.equal(with_it.weights[n], w) for n, w in without.weights.items())
    else:
        assert case.method.wraps and all(w.isfinite().all() for w in with_it.weights.values())


@standing
def test_3_defaults_change_the_run(case, tiny_model, tokenizer, rows, finished):
    """As they are, with no setting made easy for the tiny model but the length of what it writes."""
    method = type(case.method)(**case.short)
    if case.too_short:
        with pytest.raises((PlanError, NoEffect), match=case.too_short):
            run([method], tiny_model(), tokenizer, rows, 8)
        return
    with_it = run([method], tiny_model(), tokenizer, rows, 8, batch_size=2, gradient_accumulation_steps=1)
    without = finished(steps=8, batch_size=2, gradient_accumulation_steps=1)
    changed = any(not torch.equal(w, with_it.weights.get(n, w[:0])) for n, w in without.weights.items())
    assert changed != bool(case.no_default)


# ---- 4 same seed, same result


@standing
def test_4_same_seed_same_result(case, tiny_model, tokenizer, rows, finished):
    torch.manual_seed(999)  # what happened before in the process must not matter
    same(run([case.method], tiny_model(), tokenizer, rows, 4), finished(case.method))


def test_4_another_seed_another_order(finished):
    assert finished(seed=1).log.loss != finished().log.loss


# ---- 5 resume equals uninterrupted


@dataclass
class Best:
    """Scores the model best at one step, so that keeping the best has something to keep."""

    at: int
    step: int = 0

    def watch(self, _session, step):
        self.step = step

    def __call__(self, _model):
        return float(self.step == self.at)


def killed_run(folder, kill_at, methods, tiny_model, tokenizer, rows, best_at):
    """Start, die in step `kill_at`, start again with fresh objects in the same folder."""
    best = Best(best_at)

    def die(session, step):
        best.watch(session, step)
        if step == kill_at:
            raise Killed

    settings = {"steps": 8, "save_steps": 2, "folder": folder, "evaluate": best}
    with pytest.raises(Killed):
        run(methods, tiny_model(), tokenizer, rows, watch=die, **settings)
    assert (folder / "checkpoint" / "state.safetensors").is_file()
    torch.manual_seed(4321)
    return run(methods, tiny_model(), tokenizer, rows, watch=best.watch, **settings)


def unbroken_run(methods, tiny_model, tokenizer, rows, best_at):
    best = Best(best_at)
    return run(methods, tiny_model(), tokenizer, rows, 8, watch=best.watch, evaluate=best)


@standing
def test_5_resume_equals_uninterrupted(case, tmp_path, tiny_model, tokenizer, rows):
    """Step 7 is in the second half, behind checkpoint 6; with ProMoT that is stage 2."""
    again = killed_run(tmp_path, case.ends_at or 7, [case.method], tiny_model, tokenizer, rows, best_at=3)
    same(again, unbroken_run([case.method], tiny_model, tokenizer, rows, best_at=3))


@pytest.mark.parametrize("kill_at, best_at", [(3, 2), (3, 4), (5, 2), (8, 3)])
def test_5_promot_resumes_in_both_stages(kill_at, best_at, tmp_path, tiny_model, tokenizer, rows):
    """Stage 1 is steps 1 to 4. The best prompt may be the one of the checkpoint itself (step 2)."""
    methods = [BY_NAME["ProMoT"].method, BY_NAME["LoRA"].method]
    again = killed_run(tmp_path, kill_at, methods, tiny_model, tokenizer, rows, best_at)
    same(again, unbroken_run(methods, tiny_model, tokenizer, rows, best_at))


def test_5_a_resumed_run_starts_at_its_checkpoint(tmp_path, tiny_model, tokenizer, rows):
    """The comparison above would hold as well if nothing were resumed: it is."""
    steps = []

    def die(_session, step):
        steps.append(step)
        if len(steps) == 5:
            raise Killed

    settings = {"steps": 8, "save_steps": 2, "folder": tmp_path, "watch": die}
    with pytest.raises(Killed):
        run([], tiny_model(), tokenizer, rows, **settings)
    run([], tiny_model(), tokenizer, rows, **settings)
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8]


# ---- 6 one batch of 8 equals 4 of 2


# Adam divides by the root of the second moment, which turns rounding noise of near-zero gradients into full steps.
# A large epsilon makes it momentum SGD, so that a wrong scale shows and noise does not.
LINEAR = {
    "adam_epsilon": 1.0,
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "warmup_steps": 0.0,
}
# Dropout draws for the rows of a forward, and other rows stand in it: the same law, other numbers.
NO_DROPOUT = hf.LoRA(r=4, lora_alpha=8, lora_dropout=0.0)


def assert_close(one, many):
    for (_, a), (_, b) in zip(one.log.loss, many.log.loss, strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == pytest.approx(b[k], rel=1e-5, abs=1e-6) for k in a)
    for name, value in one.weights.items():
        torch.testing.assert_close(many.weights[name], value, rtol=1e-4, atol=2e-5)


@covering
def test_6_accumulation_does_not_matter(case, finished):
    method = NO_DROPOUT if case.name == "LoRA" else case.method
    one = finished(method, batch_size=8, **LINEAR)
    many = finished(method, batch_size=2, gradient_accumulation_steps=4, **LINEAR)
    assert_close(one, many)
    assert one.log.realised == many.log.realised


def test_6_a_mean_of_means_is_caught(finished, tiny_model, tokenizer, rows, monkeypatch):
    """The fault of many loops: each micro-batch divides by its own count of tokens."""
    honest = Session.loss

    def mean_of_means(self, model, rows, counts, step, share=1.0):
        own = Counter()
        for r in rows:
            own[r.owner] += r.num_scored / share
        return honest(self, model, rows, own, step, share)

    one = finished(batch_size=8, **LINEAR)
    monkeypatch.setattr(Session, "loss", mean_of_means)
    wrong = run([], tiny_model(), tokenizer, rows, 4, batch_size=2, gradient_accumulation_steps=4, **LINEAR)
    with pytest.raises(AssertionError):
        assert_close(one, wrong)


# ---- 8 the declared invariant, 9 nothing else moved


@each
def test_8_invariant_after_20_hard_steps(case, tiny_model, tokenizer, rows, finished):
    base, middle = tiny_model(), []

    def watch(session, step):
        if step == 10:
            soft = session.soft_prompt()
            middle.append((weights_of(session.model), None if soft is None else soft.clone()))

    result = run([case.method], tiny_model(), tokenizer, rows, 20, watch=watch, **HARD)
    plain_run = finished(steps=20, **HARD)
    task = token_rows(rows, tokenizer)
    half = middle[0] if middle else ({}, None)  # a run that ends early has none
    case.invariant(Seen(case.method, weights_of(base), base, result, plain_run, half, task))


@pytest.mark.parametrize("mode", ["block", "factored"])
def test_8_without_step_projection_the_subspace_moves(mode, tiny_model, tokenizer, rows, finished):
    """The measure of the invariant sees an unprotected run."""
    method = hf.OrthogonalSubspace(mode=mode)
    state = method.prepare(Context(tiny_model(), tokenizer))
    base, name = weights_of(tiny_model()), "model.layers.0.mlp.up_proj.weight"

    def inside(result):
        moved = result.weights[name] - base[name]
        u, v = state[f"U/{name}"], state[f"V/{name}"]
        if mode == "factored":
            return max((u.T @ moved).norm(), (moved @ v.T).norm()) / moved.norm()
        return (u.T @ moved @ v.T).norm() / moved.norm()

    assert inside(finished(method, steps=20, **HARD)) < 1e-5
    assert inside(finished(steps=20, **HARD)) > 0.1


@pytest.mark.parametrize("method", [hf.WiSEFT(alpha=0.0), hf.LiNeS(alpha=0.0, beta=0.0)], ids=lambda m: m.name)
def test_8_a_line_of_0_is_the_base_exactly(method, tiny_model, finished):
    base = weights_of(tiny_model())
    assert all(torch.equal(w, base[n]) for n, w in finished(method, steps=20, **HARD).weights.items())


def test_8_the_line_is_exact_on_an_adapter(finished):
    """Scaling B by alpha equals averaging the merged weights with the base."""
    lora = hf.LoRA(r=4, lora_alpha=8)
    whole, half = (
        copy.deepcopy(finished(*m, steps=8).model).merge_and_unload() for m in ((lora,), (lora, hf.WiSEFT(alpha=0.25)))
    )
    base = finished(lora, steps=8).weights
    for name, value in half.named_parameters():
        wanted = base[name] + 0.25 * (whole.get_parameter(name) - base[name])
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-8)


@standing
def test_9_nothing_else_moved(case, tiny_model, tokenizer, rows):
    model, before = tiny_model(), tiny_model()
    words, kept_rows = tokenizer.backend_tokenizer.to_str(), copy.deepcopy(rows)
    attention = model.config._attn_implementation
    result = run([case.method], model, tokenizer, rows, 4)
    tuned = inner(result.model)
    inside = [f"{n}." for n in replaced_in(tuned)]
    kept = [(n, b) for n, b in tuned.named_buffers() if not n.startswith(tuple(inside)) or ORIGINAL in n]
    for (n, a), (m, b) in zip(before.named_buffers(), kept, strict=True):
        assert n == m and torch.equal(a, b)
    assert tuned.config._attn_implementation == attention != ATTENTION
    assert tuned.config.to_dict() == before.config.to_dict()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in result.model.modules())
    assert not hasattr(tuned, SOFT_PROMPT) and not result.model.training
    if not case.method.wraps:
        assert {n: p.shape for n, p in before.named_parameters()} == {n: p.shape for n, p in tuned.named_parameters()}
        assert tuned.lm_head.weight is tuned.model.embed_tokens.weight  # still tied
    assert all(p.dtype == torch.float32 and p.grad is None for p in result.model.parameters())
    assert tokenizer.backend_tokenizer.to_str() == words and rows == kept_rows


# ---- 10 bf16, tied embeddings, grouped-query attention, LoRA


def quick_first(names, kinds):
    """Every name with every kind; quick is the first kind of those for which no other method stands, and all kinds of
    those that have every site between them."""

    def marks(name, kind):
        return late(name, STANDING if kind == kinds[0] else COVERING)

    return [pytest.param(n, k, id=f"{n}-{k}", marks=marks(n, k)) for n in names for k in kinds]


@pytest.mark.parametrize(
    "name, kind", quick_first(BY_NAME, ("dense tied", "dense untied", "lora tied", "lora untied"))
)
def test_10_finite_in_bf16(name, kind, tiny_model, tokenizer, rows):
    case, lora, tied = BY_NAME[name], "lora" in kind, "untied" not in kind
    if lora and orders(hf.LoRA(), case.method) == []:
        pytest.skip("the planner refuses this pair; test_pairs.py holds the words")
    methods = [hf.LoRA(r=4), case.method] if lora else [case.method]
    model = tiny_model(tied).to(torch.bfloat16)
    result = run(methods, model, tokenizer, rows, 4, autocast=torch.bfloat16)
    assert all(torch.isfinite(torch.tensor(list(p.values()))).all() for _, p in result.log.loss)
    assert all(w.isfinite().all() for w in result.weights.values())
    dense = [w for n, w in result.weights.items() if ".lora_" not in n]
    assert all(w.dtype == torch.bfloat16 for w in dense)


def test_10_small_steps_survive_bf16(tiny_model, tokenizer, rows):
    """What trains is kept in fp32: in bf16 a step of 1e-5 on a norm weight of 1 would round away every time."""
    last = {}
    model = tiny_model().to(torch.bfloat16)
    run(
        [],
        model,
        tokenizer,
        rows,
        8,
        learning_rate=1e-5,
        autocast=torch.bfloat16,
        watch=lambda s, _: last.update({n: p.detach().clone() for n, p in s.params.items()}),
    )
    assert last["model.norm.weight"].dtype == torch.float32
    assert 0 < (last["model.norm.weight"] - 1).abs().max() < 1e-3


# ---- 11 distances are 0 at the base


ZEROS = {c.name: c.method for c in CASES if c.zero_at_base} | {
    "reverse KL": hf.KLToBase(direction="reverse"),
    "KL on replay": hf.KLToBase(on="replay", sources=(GENERAL,)),
    "four anchors": hf.ICLAnchor(pool=4),
}


@torch.no_grad()
def shake(session):
    """Move everything that trains."""
    draw = torch.Generator().manual_seed(1)
    for p in session.params.values():
        p += 0.05 * torch.randn(p.shape, generator=draw)


@pytest.mark.parametrize("name, on", quick_first(ZEROS, ("dense", "lora", "unknown rows", "unknown rows, lora")))
def test_11_distance_is_0_at_the_base(name, on, tiny_model, tokenizer, rows):
    """With stored answers, with a frozen copy and with the adapter switched off."""
    method = ZEROS[name]
    if "lora" in on and method.wraps:
        pytest.skip("the planner refuses two wrappers; test_pairs.py holds the words")
    extra = [NO_DROPOUT] if "lora" in on else []
    model = tiny_model()
    if isinstance(method, hf.ICLAnchor):
        method = replace(method, gold=0.0)  # right answers are no distance to the base
    ctx = Context(model, tokenizer, 0, rows, max_length=512, total_steps=4)
    session = Session(Plan([*extra, method]), model, ctx, knows_rows="unknown" not in on)
    task = token_rows(rows, tokenizer)
    session.prepare(() if "unknown" in on else task)
    session.enter(session.stages[0])
    parts = session.probe(task[:3])
    # a penalty is exact; a KL of two forwards packed differently differs by rounding of the logits
    exact = "base_weights" in method.needs
    assert abs(parts[method.name]) <= (0 if exact else 1e-7 * getattr(method, "weight", 1))
    shake(session)
    assert session.probe(task[:3])[method.name] > 1e-4


HEAD_LORA = hf.LoRA(r=4, target_modules=("lm_head", "q_proj"))


@pytest.mark.parametrize("extra, known", [((), True), ((), False), ((HEAD_LORA,), True), ((HEAD_LORA,), False)])
def test_11_the_teacher_stays_the_base(extra, known, tiny_model, tokenizer, rows):
    """Whatever trains, the head and an adapter on it too: stored answers, frozen copy, adapter switched off."""
    model = tiny_model(tied=False)
    ctx = Context(model, tokenizer, 0, rows, max_length=512, total_steps=4)
    session = Session(Plan([*extra, hf.KLToBase()]), model, ctx, knows_rows=known)
    task = token_rows(rows, tokenizer)[:3]
    base = forward(model, task)[1].log_softmax(-1)
    session.prepare(task if known else ())
    session.enter(session.stages[0])
    shake(session)
    got = session.teacher.logp(session.model, task)
    torch.testing.assert_close(got, base, rtol=0, atol=1e-5)
    assert (forward(session.model, task)[1].log_softmax(-1) - base).abs().max() > 0.01


# ---- 12 the export loads in plain transformers and PEFT, one with replaced modules by holdfast.load


@pytest.fixture(scope="module")
def base_folder(tiny_model, tokenizer, tmp_path_factory):
    return models.save_model(tiny_model(), tokenizer, tmp_path_factory.mktemp("base") / "model", card=None)


@covering
def test_12_export_gives_the_same_logits(case, base_folder, tokenizer, rows, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, _ = models.load(str(base_folder), dtype="float32", device="cpu")
    result = run([case.method], base, tokenizer, rows, 4)
    folder = models.save_model(result.model, tokenizer, tmp_path / "model", card=None)
    row = token_rows(rows, tokenizer)[0]
    ids = torch.as_tensor(row.ids)[None]
    if "replace" in case.method.sites():
        loaded = holdfast.load(str(folder), dtype="float32", device="cpu")[0]
    else:
        wraps = case.method.wraps
        plain_model = AutoModelForCausalLM.from_pretrained(base_folder if wraps else folder, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(plain_model, folder) if wraps else plain_model
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, result.model(ids).logits)
        if not case.method.only_prompts:
            assert not torch.equal(loaded(ids).logits, AutoModelForCausalLM.from_pretrained(base_folder)(ids).logits)
    assert AutoTokenizer.from_pretrained(folder).encode(rows[0].prompt) == tokenizer.encode(rows[0].prompt)


def test_12_the_prompt_is_a_peft_adapter(base_folder, tokenizer, rows, tmp_path):
    """With it the exported model says what it said in stage 2; without it, it is the bare tuned model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from holdfast.measure.soft_prompt import save as save_prompt

    base, _ = models.load(str(base_folder), dtype="float32", device="cpu")
    result = run([BY_NAME["ProMoT"].method], base, tokenizer, rows, 8)
    folder = models.save_model(result.model, tokenizer, tmp_path / "model", card=None)
    save_prompt(result.model, result.soft, tmp_path / "prompt", folder)
    row = token_rows(rows, tokenizer)[0]
    prompted = copy.deepcopy(result.model)
    prompted.register_parameter(SOFT_PROMPT, torch.nn.Parameter(result.soft))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "prompt").eval()
    with torch.no_grad():
        packed, ours = forward(prompted, [row])
        theirs = loaded(torch.as_tensor(row.ids)[None]).logits[0]
    assert len(theirs) == len(row.ids) + 3
    torch.testing.assert_close(ours, theirs[packed.where], rtol=1e-5, atol=1e-6)


# ---- no effect


@dataclass(frozen=True, kw_only=True)
class Idle(Method):
    """Overrides a site and does nothing there."""

    def loss(self, view):
        return None


@dataclass(frozen=True, kw_only=True)
class Deaf(Method):
    """The commonest fault: a term on logits that carry no gradient."""

    def loss(self, view):
        return Term(view.logp.detach().square().sum(-1), "task")


@pytest.mark.parametrize(
    "method, words",
    [
        (Idle(), "Idle is in the plan but changed nothing"),
        (Deaf(), "Deaf adds a term to the loss that carries no gradient"),
        (hf.InContextMix(share=1e-6, pool=4), "InContextMix is in the plan but changed nothing"),
        (hf.Replay(share=1e-6, sources=(GENERAL,)), "Replay is in the plan but changed nothing"),
        (hf.L2ToInit(patterns=("no such weight",)), "L2ToInit is in the plan but changed nothing"),
        (hf.Freeze(layers=2, embeddings=True, patterns=("norm",)), "freezes every weight"),
    ],
    ids=lambda x: repr(x)[:40],
)
def test_a_method_without_effect_is_named(method, words, tiny_model, tokenizer, rows):
    with pytest.raises(NoEffect, match=words):
        run([method], tiny_model(), tokenizer, rows, 3)


def test_effect_survives_a_resume(tmp_path, tiny_model, tokenizer, rows):
    """A method that worked only before the checkpoint still counts as having worked."""
    method = hf.ICLAnchor(every=100, short=0, pool=2, shots=(1, 1))
    again = killed_run(tmp_path, 5, [method], tiny_model, tokenizer, rows, best_at=3)
    assert again.session.effects["ICLAnchor"] == 1


# ---- what the planner refuses


def refused(plan, ctx_model, tokenizer, host=HOST):
    with pytest.raises(PlanError) as e:
        Plan(plan).check(host, Context(ctx_model, tokenizer, rows=()))
    assert e.value.cure
    return e.value.what


@pytest.mark.parametrize(
    "plan",
    [
        (hf.LoRA(), hf.HalfFineTune()),
        (hf.OrthogonalSubspace(), hf.LoRA()),
        (hf.AnchoredSFT(), hf.DFT()),
        (hf.AnchoredSFT(), hf.KLToBase()),
        (hf.KLToBase(), hf.ProMoT()),
        (hf.ProMoT(), hf.AnchoredSFT()),
    ],
    ids=lambda p: "-".join(m.name for m in p),
)
def test_a_refusal_names_both(plan, tiny_model, tokenizer):
    what = refused(plan, tiny_model(), tokenizer)
    assert all(m.name in what for m in plan)


@pytest.mark.parametrize(
    "method, host",
    [
        (hf.ProMoT(), Host("SFTTrainer", packing=True)),
        (hf.HalfFineTune(), Host("4-bit base", quantised=True)),
        (hf.OrthogonalSubspace(), Host("Trainer", hides_gradients=True)),
    ],
    ids=lambda x: x.name,
)
def test_a_host_that_cannot_is_named(method, host, tiny_model, tokenizer):
    what = refused([method], tiny_model(), tokenizer, host)
    assert method.name in what and (host.name in what or "4 or 8 bits" in what)
    Plan([method]).check(Host(host.name), Context(tiny_model(), tokenizer))


def test_one_method_stands_once():
    with pytest.raises(PlanError, match="LoRA stands twice"):
        Plan([hf.LoRA(r=2), hf.LoRA(r=4)])


def test_a_switched_off_method_owns_nothing(tiny_model, tokenizer):
    Plan([hf.LoRA(), hf.OrthogonalSubspace(rank_frac=0.0)]).check(HOST, Context(tiny_model(), tokenizer))


@pytest.mark.parametrize(
    "item, words",
    [
        ("LORA", "'LORA', which is not a method.\nDid you mean 'LoRA'"),
        ({"LoRA": {"rank": 8}}, "LoRA has no setting 'rank'"),
        ({"LoRA": {"r": "eight"}}, "LoRA.r is 'eight', but it is a whole number"),
        ({"LoRA": {"r": True}}, "LoRA.r is True, but it is a whole number"),
        ({"LoRA": {"r": 1.5}}, "LoRA.r is 1.5, but it is a whole number"),
        ({"LoRA": {"use_dora": 1}}, "LoRA.use_dora is 1, but it is a switch"),
        ({"ICLAnchor": {"shots": 3}}, "ICLAnchor.shots is 3, but it is a list"),
        ({"ICLAnchor": {"direction": 3}}, "ICLAnchor.direction is 3, but it is a word"),
        ({"LiNeS": {"beta": "high"}}, "LiNeS.beta is 'high', but it is a number"),
        ({"ICLAnchor": {"tasks": "sentiment"}}, "ICLAnchor.tasks is 'sentiment', but it is a list"),
    ],
    ids=str,
)
def test_a_wrong_recipe_is_refused_before_work(item, words):
    with pytest.raises(PlanError) as e:
        Plan.from_recipe([item])
    assert words in str(e.value)


def test_recipe_words_that_are_numbers():
    """YAML 1.1 reads 3e-4 as a word."""
    plan = Plan.from_recipe([{"KLToBase": {"weight": "3e-1"}}, {"LiNeS": {"beta": "5e-1"}}])
    assert plan.methods == (hf.KLToBase(weight=0.3), hf.LiNeS(beta=0.5))


def test_values_without_meaning_are_refused(tiny_model, tokenizer):
    for method in (
        hf.WiSEFT(alpha=1.5),
        hf.LiNeS(alpha=-0.1),
        hf.LoRA(r=0),
        hf.Replay(share=1.0),
        hf.InContextMix(share=-0.1),
        hf.KLToBase(weight=-1.0),
        hf.L2ToInit(alpha=-1.0),
        hf.AnchoredSFT(weight=-1.0),
        hf.ICLAnchor(shots=(4, 2)),
        hf.ProMoT(prompt_share=1.0),
        hf.OrthogonalSubspace(rank_frac=2.0),
        hf.Freeze(layers=9),
        hf.Freeze(patterns=("[",)),
        hf.Freeze(patterns=("no such name",)),
    ):
        assert method.name in refused([method], tiny_model(), tokenizer)


# ---- the mix


def sized(name, *lengths):
    from holdfast.engine.pack import token_row

    return [token_row(range(n), 1, source=name) for n in lengths]


SHARES = [(0.2,), (0.01,), (0.9,), (0.2, 0.05, 0.05), (0.1,) * 5, (0.3, 0.3, 0.3), (0.45, 0.02, 0.02, 0.5)]
SHARES += [(0.472, 0.086, 0.006, 0.006, 0.014)]  # dealing by largest deficit misses by 1.1 rows here


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_shares_in_examples_are_exact_at_every_prefix(shares):
    mix = Mix(sized("task", 3, 4, 5))
    for n, share in enumerate(shares):
        mix = mix.add(Source(f"s{n}", sized(f"s{n}", 2, 9), share))
    wanted = {f"s{n}": s for n, s in enumerate(shares)} | {"task": mix.task_share}
    bound = 1 - 1 / (2 * len(wanted) - 2)  # Tijdeman 1980
    got, order = Counter(), mix.draw(0)
    for n in range(1, 600):
        got[next(order).source] += 1
        assert all(abs(got[k] - s * n) <= bound + 1e-6 for k, s in wanted.items()), (n, got)


@pytest.mark.parametrize("shares", [(0.2,), (0.5,), (0.05, 0.3)], ids=str)
def test_shares_in_tokens_are_exact_to_one_row(shares):
    mix = Mix(sized("task", 3, 4, 50))
    for n, share in enumerate(shares):
        mix = mix.add(Source(f"s{n}", sized(f"s{n}", 2, 90, 30), share, unit="tokens"))
    got, whole, order = Counter(), 0, mix.draw(0)
    for _ in range(600):
        row = next(order)
        got[row.source] += len(row.ids)
        whole += len(row.ids)
        for n, share in enumerate(shares):
            assert abs(got[f"s{n}"] - share * whole) <= 90, (whole, got)


def test_a_share_of_0_changes_nothing():
    task = sized("task", *range(2, 40))
    plain_mix, mixed = Mix(task), Mix(task).add(Source("none", sized("none", 2), 0.0))
    a, b = mixed.draw(3), plain_mix.draw(3)
    assert [next(a) for _ in range(100)] == [next(b) for _ in range(100)]


def test_a_source_does_not_disturb_the_order_of_the_task():
    task = sized("task", *range(2, 40))
    plain_order = Mix(task).draw(3)
    mixed = Mix(task).add(Source("more", sized("more", 2, 3), 0.25)).draw(3)
    seen = [r for r in (next(mixed) for _ in range(100)) if r.source == "task"]
    assert len(seen) == 75 and seen == [next(plain_order) for _ in seen]


def test_every_task_row_comes_once_an_epoch():
    task = sized("task", *range(2, 40))
    mix = Mix(task).add(Source("more", sized("more", 2), 0.2))
    order = mix.draw(0)
    drawn = Counter(len(r.ids) for r in (next(order) for _ in range(mix.num_rows(2))) if r.source == "task")
    assert mix.num_rows(2) == 95 and set(drawn.values()) == {2} and len(drawn) == 38


def test_a_function_is_streamed_and_started_again():
    turns = []

    def read():
        turns.append(1)
        yield from sized("stream", 2, 3, 4)

    order = Mix(sized("task", 9)).add(Source("stream", read, 0.5)).draw(0)
    seen = [len(r.ids) for r in (next(order) for _ in range(14)) if r.source == "stream"]
    assert seen == [2, 3, 4, 2, 3, 4, 2] and len(turns) == 3


def test_a_small_source_is_repeated_fairly():
    order = Mix(sized("task", 9)).add(Source("small", sized("small", 2, 3, 4), 0.5)).draw(0)
    seen = [len(r.ids) for r in (next(order) for _ in range(60)) if r.source == "small"]
    assert len(seen) == 30 and all(sorted(seen[n : n + 3]) == [2, 3, 4] for n in range(0, 30, 3))


def test_shares_that_leave_nothing_for_the_task_are_refused():
    mix = Mix(sized("task", 2)).add(Source("a", sized("a", 2), 0.6))
    with pytest.raises(PlanError, match=r"a 0\.6, b 0\.4"):
        mix.add(Source("b", sized("b", 2), 0.4))


def test_an_empty_source_is_named():
    order = Mix(sized("task", 2)).add(Source("hollow", [], 0.5)).draw(0)
    with pytest.raises(PlanError, match="'hollow'"):
        [next(order) for _ in range(3)]


def test_maps_run_in_order_over_every_row():
    mix = Mix(sized("task", 5)).add(Source("more", sized("more", 7), 0.5))
    cut = mix.map(lambda r: sized(r.source, len(r.ids) - 1)[0]).map(lambda r: sized(r.source, len(r.ids) * 2)[0])
    order = cut.draw(0)
    assert {len(next(order).ids) for _ in range(10)} == {8, 12}


# ---- the loop


def test_steps_of_stages_add_up():
    for stages, total in [(hf.ProMoT(prompt_share=0.3).stages(), n) for n in range(2, 30)] + [
        (hf.FPF(k=k).stages(), n)
        for k, n in ((1, 2), (3, 14), (9, 18), (9, 30))  # rounded, the last get none
    ]:
        parts = [n for _, n in plain.split_steps(stages, total)]
        assert sum(parts) == total and min(parts) >= 1


def test_a_loss_that_is_not_finite_stops_the_run(tiny_model, tokenizer, rows):
    from holdfast.errors import TrainingError

    def poison(session, step):
        if step == 2:
            next(iter(session.params.values())).data.fill_(float("nan"))

    with pytest.raises(TrainingError, match="at step 3"):
        run([], tiny_model(), tokenizer, rows, 4, watch=poison)


def test_the_probe_finds_a_plan_that_trains_nothing(tiny_model, tokenizer, rows):
    """Every token masked: the loss is finite and 0, but no gradient reaches a weight."""

    @dataclass(frozen=True, kw_only=True)
    class Nothing(Method):
        def token_weight(self, view):
            return torch.zeros(len(view.packed.target))

    with pytest.raises(NoEffect, match="No gradient reaches"):
        start(Plan([Nothing()]), tiny_model(), tokenizer, rows, plain.Training(4, batch_size=4))
