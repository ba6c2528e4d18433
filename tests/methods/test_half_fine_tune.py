"""HalfFineTune: which half trains, by the paper's count and by exact size."""

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch

import zoo
from cases import run, same, weights_of
from holdfast.errors import PlanError
from holdfast.method import layer_of
from holdfast.methods import LTSFT, HalfFineTune, ProMoT
from holdfast.plan import Plan
from holdfast.services import Context

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def sizes(model):
    return {n: p.numel() for n, p in model.named_parameters()}


def picked(chosen, layer, kinds):
    return [k for k in kinds if any(layer_of(n) == layer and k in n for n in chosen)]


@pytest.mark.parametrize("seed", range(6))
def test_exactly_half_of_attention_under_grouped_queries(tiny_model, seed):
    """Width 32, 4 heads over 2: q and o have 32 * 32 = 1024 weights, k and v 32 * 16 = 512; half is 1536."""
    model = tiny_model(layers=4)
    size = sizes(model)
    chosen = HalfFineTune(seed=seed).choose(list(size))
    for layer in range(4):
        mine = [n for n in chosen if layer_of(n) == layer and "self_attn" in n]
        assert sum(size[n] for n in mine) == 1536
        assert len(mine) == 2


@pytest.mark.parametrize("seed", range(6))
def test_the_papers_rule_is_two_of_four_by_count(tiny_model, seed):
    chosen = HalfFineTune(seed=seed, exact_half=False).choose(list(sizes(tiny_model(layers=4))))
    for layer in range(4):
        assert len(picked(chosen, layer, ATTENTION)) == 2


def test_the_papers_rule_can_train_a_third_or_two_thirds_of_attention(tiny_model):
    """Why exact_half is the default: {k, v} is 1024 of 3072, {q, o} 2048."""
    size = sizes(tiny_model(layers=4))
    found = set()
    for seed in range(20):
        chosen = HalfFineTune(seed=seed, exact_half=False).choose(list(size))
        for layer in range(4):
            found.add(sum(size[n] for n in chosen if layer_of(n) == layer and "self_attn" in n))
    assert found == {1024, 1536, 2048}


@pytest.mark.parametrize("layers", [2, 4, 5])
def test_feed_forward_two_in_half_of_the_layers_and_one_in_the_rest(tiny_model, layers):
    for seed in range(4):
        chosen = HalfFineTune(seed=seed).choose(list(sizes(tiny_model(layers=layers))))
        counts = Counter(len(picked(chosen, n, FEED_FORWARD)) for n in range(layers))
        assert counts == {2: layers // 2, 1: layers - layers // 2}


def test_half_of_the_norms_and_all_embeddings(tiny_model):
    names = list(sizes(tiny_model(tied=False)))
    chosen = HalfFineTune().choose(names)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= chosen
    for layer in range(2):
        assert sum("layernorm" in n for n in chosen if layer_of(n) == layer) == 1
    without = HalfFineTune(train_embeddings=False).choose(names)
    assert chosen - without == {"model.embed_tokens.weight", "lm_head.weight"}


def test_exactly_half_of_all_block_matrices(tiny_model):
    size = {n: s for n, s in sizes(tiny_model(layers=4)).items() if layer_of(n) is not None and "norm" not in n}
    for seed in range(4):
        chosen = HalfFineTune(seed=seed).choose(list(size))
        assert sum(size[n] for n in chosen) * 2 == sum(size.values())


def test_seeds_draw_different_halves_and_a_seed_repeats(tiny_model):
    names = list(sizes(tiny_model(layers=4)))
    masks = [frozenset(HalfFineTune(seed=s).choose(names)) for s in range(5)]
    assert len(set(masks)) == 5
    random.seed(1)
    assert frozenset(HalfFineTune(seed=3).choose(names)) == masks[3]


def test_optimizer_holds_only_the_chosen_half(tiny_model, start):
    session = start([HalfFineTune()], tiny_model())
    chosen = HalfFineTune().choose([n for n, _ in session.model.named_parameters()])
    assert {n for n, p in session.model.named_parameters() if p.requires_grad} == chosen == set(session.params)
    held = sum(len(g["params"]) for g in session.param_groups(1e-3, 0.1))
    assert held == len(chosen)


@pytest.mark.parametrize(
    ("kind", "part"),
    [(k, "q") for k in ("gpt2", "phi3", "gpt_neox")]
    + [("phi", "o")]
    + [(k, "up") for k in ("gptj", "gpt_neo", "mixtral")],
)
def test_fused_and_unusual_names_are_refused(kind, part):
    """A part that no name gives away would be frozen in every half."""
    with pytest.raises(PlanError, match=f"no {part} map in layer 0 .fused"):
        HalfFineTune().choose(list(sizes(zoo.build(kind))))


def test_without_a_gate_one_of_two_trains():
    chosen = HalfFineTune().choose(list(sizes(zoo.build("opt"))))
    for layer in range(zoo.LAYERS):
        assert len(picked(chosen, layer, (".fc1.weight", ".fc2.weight"))) == 1


# ---- rounds


def test_each_round_draws_its_own_half_and_the_first_is_that_of_one_round(tiny_model):
    names = list(sizes(tiny_model(layers=4)))
    method = HalfFineTune(rounds=4)
    halves = [frozenset(method.choose(names, n)) for n in range(4)]
    assert len(set(halves)) == 4 and halves[0] == HalfFineTune().choose(names)
    assert [s.name for s in method.stages()] == [f"round-{n}" for n in range(4)]


def test_what_a_round_froze_stays_as_the_round_found_it(tiny_model, tokenizer, rows):
    """Three rounds of two steps, with weight decay and clipping: in each, what is chosen moves and nothing else."""
    method, seen = HalfFineTune(rounds=3), [weights_of(tiny_model())]

    def watch(session, step):
        if step % 2 == 0:
            seen.append(weights_of(session.model))

    run([method], tiny_model(), tokenizer, rows, 6, watch=watch, weight_decay=0.1)
    assert len(seen) == 4
    for number, (before, after) in enumerate(pairwise(seen)):
        chosen = method.choose(list(before), number)
        for name, w in before.items():
            assert torch.equal(w, after[name]) == (name not in chosen), (number, name)


def test_a_run_killed_in_a_later_round_goes_on_with_its_half(tmp_path, tiny_model, tokenizer, rows):
    class Killed(Exception):
        pass

    def die(_session, step):
        if step == 8:
            raise Killed

    settings = {"steps": 9, "save_steps": 2}
    with pytest.raises(Killed):
        run([HalfFineTune(rounds=3)], tiny_model(), tokenizer, rows, watch=die, folder=tmp_path, **settings)
    again = run([HalfFineTune(rounds=3)], tiny_model(), tokenizer, rows, folder=tmp_path, **settings)
    same(again, run([HalfFineTune(rounds=3)], tiny_model(), tokenizer, rows, **settings))


def test_rounds_own_the_stages_and_one_round_does_not():
    for other in (LTSFT(), ProMoT()):
        Plan([HalfFineTune(), other]).check_together()
        with pytest.raises(PlanError, match="split the run into stages"):
            Plan([HalfFineTune(rounds=2), other]).check_together()
    with pytest.raises(PlanError, match="rounds is 0"):
        HalfFineTune(rounds=0).check(Context(None, None))
