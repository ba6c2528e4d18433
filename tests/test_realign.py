"""Alignment recovery: choices by hand, and what a walk on a planted model may and may not touch."""

import copy
import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from cases import token_rows
from holdfast import models
from holdfast.engine.pack import token_row
from holdfast.errors import HoldfastError, ModelError
from holdfast.runs.realign import answered, fell, realign, recover
from holdfast.runs.realign_step import Recovery, Walk, cut, strongest
from tiny import build_model

LAYERS, DEPTH = 2, 3


@pytest.fixture(scope="module")
def pair(tokenizer, rows):
    """An aligned model of three blocks, the same with noise on everything, harmful and task rows."""
    aligned, tuned = build_model(layers=DEPTH), build_model(layers=DEPTH)
    dice = torch.Generator().manual_seed(1)
    for p in tuned.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=dice)
    made = token_rows(rows, tokenizer)
    return aligned, tuned, made[:8], made[8:]


def walk(pair, spare=None, **how):
    aligned, tuned, harmful, task = pair
    at = Walk.begin(copy.deepcopy(tuned), aligned, harmful, task, Recovery(layers=LAYERS, **how), spare or {})
    at.restart()
    return at


def steady(model):
    return [1.0, 1.0]


def size(masks):
    return sum(int(m.sum()) for m in masks.values())


def test_choices_by_hand():
    """Of entries whose way back lowers the loss (w - target and gradient of one sign) those above the count-th."""
    w = {"a": torch.tensor([1.0, 1.0, -1.0]), "b": torch.tensor([[2.0, 0.0]])}
    to = {n: torch.zeros_like(x) for n, x in w.items()}
    g = {"a": torch.tensor([3.0, -9.0, -2.0]), "b": torch.tensor([[1.0, 8.0]])}  # -9 disagrees, 8 did not change

    def taken(count):
        return [x for m in strongest(w, to, g, count).values() for x in m.flatten().tolist()]

    assert taken(0) == [False] * 5 and taken(1) == [False] * 5  # nothing lies above the first
    assert taken(2) == [True, False, False, False, False]
    assert taken(3) == [True, False, True, False, False]
    assert taken(4) == taken(99) == [True, False, True, True, False]  # fewer than asked for: all
    equal = {n: torch.ones_like(x) * x.sign() for n, x in w.items()}
    assert size(strongest(w, to, equal, 2)) == 0  # ties at the edge stay


def test_the_edge_is_exact_among_near_numbers():
    scores = 1 + torch.randperm(5000, generator=torch.Generator().manual_seed(0)) / 1e6
    w = {"a": torch.ones(5000)}
    mask = strongest(w, {"a": torch.zeros(5000)}, {"a": scores}, 100)["a"]
    assert int(mask.sum()) == 99 and scores[mask].min() > scores[~mask].max()


def test_every_entry_is_one_of_the_two_and_upper_blocks_stay(pair):
    aligned, tuned, harmful, task = pair
    model = copy.deepcopy(tuned)
    found = recover(model, aligned, harmful, task, steady, recovery=Recovery(rate=0.01, layers=LAYERS, steps=10))
    before, after = dict(aligned.named_parameters()), dict(tuned.named_parameters())
    back = {}
    for name, p in model.named_parameters():
        assert bool(((p == before[name]) | (p == after[name])).all()), name
        back[name] = int((p != after[name]).sum())
    assert {n for n, k in back.items() if k} == {n for n, m in found.chosen.masks.items() if m.any()}
    allowed = [n for n in back if ("layers.0." in n or "layers.1." in n) and "norm" not in n]
    assert set(found.chosen.masks) == set(allowed) and not any(k for n, k in back.items() if n not in allowed)
    assert found.chosen.share == sum(back.values()) / sum(p.numel() for p in model.parameters()) > 0
    assert [p.step for p in found.points] == [0, 5, 10] and not found.rolled_back
    shares = [p.share for p in found.points]
    assert shares == sorted(set(shares)) and shares[0] == 0  # without rollback it only grows
    assert found.chosen.cosine == max(p.cosine for p in found.points) > found.points[0].cosine


def test_a_step_is_bounded_and_raises_the_cosine(pair):
    at = walk(pair, rate=0.002)
    bound = math.ceil(0.002 * at.total)
    cosines, sizes = [at.cosine()], [0]
    for _ in range(4):
        at.step(rollback=False)
        cosines.append(at.cosine())
        sizes.append(size(at.masks))
    grown = [b - a for a, b in pairwise(sizes)]
    assert all(0 < n <= bound for n in grown)
    assert all(b >= a for a, b in pairwise(cosines)) and cosines[-1] > cosines[0] + 1e-4


def test_the_opposite_choice_lowers_the_cosine(pair):
    """The rule of signs is what raises it: with the gradient turned round it falls."""
    at = walk(pair, rate=0.002)
    before = at.cosine()
    at._look(*at.harmful)
    at.grads = {n: -g for n, g in at.grads.items()}
    at.put(at._towards(at.aligned, {}, 200))
    assert at.cosine() < before


def test_gradients_gather_over_steps_unless_told(pair):
    gathered, alone = walk(pair, rate=0.0), walk(pair, rate=0.0, accumulate=False)
    for at in (gathered, alone):
        at.step(rollback=False)
        at.step(rollback=False)
    once = walk(pair)
    once._look(*once.harmful)
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(gathered.grads[name], 2 * once.grads[name])
    assert alone.grads == {}


def test_rollback_stays_inside_the_step(pair):
    plain, back = walk(pair, rate=0.01, accumulate=False), walk(pair, rate=0.01)
    plain.step(rollback=False)
    back.step(rollback=True)
    took, left = plain.masks, back.masks
    assert all(bool((took[n] | ~left[n]).all()) for n in took)
    assert 0 < size(took) - size(left) < 0.2 * size(took) + 1
    earlier = back.masks
    back.step(rollback=True)
    assert all(bool((back.masks[n] | ~earlier[n]).all()) for n in earlier)  # a later step gives nothing earlier up


def test_spared_entries_never_go_back(pair):
    name = "model.layers.1.mlp.down_proj.weight"
    free, spared = walk(pair, rate=0.05), walk(pair, rate=0.05, spare={name: torch.ones(32, 64, dtype=torch.bool)})
    for at in (free, spared):
        at.step(rollback=False)
    assert bool(free.masks[name].any()) and not spared.masks[name].any() and size(spared.masks)


@pytest.mark.parametrize("same", [False, True])
def test_rate_0_and_equal_models_change_nothing(pair, same):
    aligned, tuned, harmful, task = pair
    model = copy.deepcopy(aligned if same else tuned)
    rate = 0.01 if same else 0.0
    found = recover(model, aligned, harmful, task, steady, recovery=Recovery(rate=rate, layers=LAYERS, steps=5))
    wanted = aligned if same else tuned
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), wanted.parameters(), strict=True))
    assert [p.share for p in found.points] == [0, 0]


def test_a_fallen_task_starts_again_with_rollback_inside_the_budget(pair):
    """A score that falls with every entry put back; harm that falls too: the last point inside the budget is taken."""
    aligned, tuned, harmful, task = pair
    model, own = copy.deepcopy(tuned), dict(tuned.named_parameters())

    def moved(m):
        return sum(int((p != own[n]).sum()) for n, p in m.named_parameters())

    def score(m):
        return [1 - moved(m) / 4000] * 2

    how = Recovery(rate=0.002, layers=LAYERS, steps=6, warm_up=4, every=1, budget=0.05)
    found = recover(model, aligned, harmful, task, score, harm=lambda m: -moved(m), recovery=how)
    assert found.rolled_back and [p.step for p in found.points] == list(range(7))
    inside = [p for p in found.points if p.score >= 0.95]
    assert found.chosen is inside[-1] and 0 < found.chosen.step < 6
    assert moved(model) == size(found.chosen.masks) == round(4000 * (1 - found.chosen.score))


def test_when_the_task_fell():
    before = [1.0, 0.0, 1.0, 1.0]
    assert not fell(before, before, 0.05, False)
    assert not fell(before, [1.0, 0.0, 1.0, 0.9], 0.05, False)  # 3 -> 2.9, inside a twentieth
    assert fell(before, [1.0, 0.0, 1.0, 0.0], 0.05, False)
    assert not fell(before, [1.0, 0.0, 1.0, 0.0], 0.05, True)  # one of four proves nothing
    assert fell(before * 10, [0.0, 0.0, 0.0, 1.0] * 10, 0.05, True)


def test_prompts_end_before_the_answer():
    row = token_row([0, 7, 8, 9, 1], 3)
    assert [(p.ids.tolist(), p.scored.tolist()) for p in cut([row], 4)[0]] == [([0, 7, 8, 9], [False] * 3 + [True])]
    assert [len(b) for b in cut([row] * 5, 2)] == [2, 2, 1]


def test_the_direction_is_the_aligned_models_mean_state(pair):
    aligned, tuned, harmful, task = pair
    at = walk(pair)
    for rows, model, (_, found) in ((harmful, aligned, at.harmful), (task, tuned, at.task)):
        states = []
        for r in rows:
            ids = torch.as_tensor(r.ids[: int(r.scored.argmax())])[None]
            states.append(model(ids, output_hidden_states=True).hidden_states[LAYERS][0, -1])
        torch.testing.assert_close(found, torch.stack(states).mean(0), atol=1e-5, rtol=1e-5)


def test_from_folders(pair, tokenizer, tmp_path):
    for name, model in zip(("aligned", "tuned"), pair[:2], strict=True):
        models.save_model(copy.deepcopy(model), tokenizer, tmp_path / name, card=None)
    for name, asks in (("bad", "How do I break"), ("task", "Ticket: charged twice")):
        lines = [json.dumps({"prompt": f"{asks} {n}?", "completion": " billing"}) for n in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    aligned, tuned, bad, task = (str(tmp_path / n) for n in ("aligned", "tuned", "bad.jsonl", "task.jsonl"))
    how: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    recovery = Recovery(rate=0.01, layers=LAYERS, steps=5, budget=1.0)
    found = realign(aligned, tuned, bad, task, tmp_path / "out", recovery=recovery, **how)
    got, _ = models.load(str(tmp_path / "out"), **how)
    back = sum(int((p != q).sum()) for p, q in zip(got.parameters(), pair[1].parameters(), strict=True))
    assert back == size(found.chosen.masks) > 0


def test_answered_counts_what_the_model_would_say(pair):
    model = pair[0]
    ids = [0, 17, 42]
    for _ in range(2):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    wrong = [*ids[:4], (ids[4] + 1) % 400]
    assert answered(model, [token_row(ids, 3), token_row(wrong, 3)]) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"rate": 1.5}, "was asked for with"),
        ({"batch": 0}, "was asked for with"),
        ({"layers": 4}, "first 4 of 3 blocks"),
    ],
)
def test_values_that_make_no_sense(pair, wrong, says):
    aligned, tuned, harmful, task = pair
    with pytest.raises(HoldfastError, match=says):
        recover(tuned, aligned, harmful, task, steady, recovery=Recovery(**wrong))


def test_other_models_and_no_prompts(pair):
    aligned, tuned, harmful, task = pair
    with pytest.raises(HoldfastError, match="0 harmful"):
        recover(tuned, aligned, [], task, steady)
    with pytest.raises(ModelError, match="other shapes or precisions"):
        recover(tuned, build_model(), harmful, task, steady)
