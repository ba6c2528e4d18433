"""GOTD: the gradient of the transport on points where one knows it, and what a run mixes in."""

import json

import pytest
import torch

from cases import run, token_rows
from holdfast.data.mix import Mix
from holdfast.errors import PlanError
from holdfast.methods import GOTD
from holdfast.methods.data import gotd
from holdfast.methods.data.gotd import embed, gradients
from holdfast.services import Context

CAT, DOG = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])


def cost(pool, target):
    return (1 - pool @ target.T).double()


def test_what_the_pool_has_too_few_of_comes_first():
    """Half of the pool are cats and a fifth of the target: each further dog brings the pool nearer, each cat further.
    What is alone like the target, cats too, is not what is wanted."""
    pool = torch.cat([CAT.expand(10, 2), DOG.expand(10, 2)])
    target = torch.cat([CAT.expand(4, 2), DOG.expand(16, 2)])
    score = gradients(cost(pool, target), 0.05)
    assert set(score.argsort()[:10].tolist()) == set(range(10, 20))
    turned = gradients(cost(target, pool), 0.05)  # now the pool has too few cats
    assert set(turned.argsort()[:4].tolist()) == set(range(4))


def test_two_points_by_hand():
    """Pool: one cat, one dog; target: dogs alone. Half of the mass goes from cat to dog, at cost 1, half at cost 0:
    f_cat - f_dog = 1. s = f - the other's f: 1 and -1."""
    score = gradients(cost(torch.cat([CAT, DOG]), DOG.expand(3, 2)), 0.01)
    assert score.tolist() == pytest.approx([1.0, -1.0], abs=1e-3)


def test_a_pool_like_the_target_is_flat():
    points = torch.nn.functional.normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    score = gradients(cost(points, points), 0.05)
    away = gradients(cost(points, -points), 0.05)
    assert score.abs().max() < 0.2 * away.abs().max()


def test_the_order_of_a_pool_does_not_matter():
    dice = torch.Generator().manual_seed(1)
    pool, target = (torch.nn.functional.normalize(torch.randn(n, 4, generator=dice), dim=-1) for n in (9, 7))
    turned = torch.randperm(9, generator=dice)
    torch.testing.assert_close(
        gradients(cost(pool, target), 0.1)[turned], gradients(cost(pool[turned], target), 0.1), rtol=1e-6, atol=1e-9
    )


def test_embeddings_are_means_of_states(tiny_model, tokenizer, rows):
    model, some = tiny_model(), token_rows(rows, tokenizer)[:5]
    got = embed(model, some)
    for row, e in zip(some, got, strict=True):
        with torch.no_grad():
            states = model(torch.as_tensor(row.ids)[None], output_hidden_states=True).hidden_states[-1][0, :-1]
        wanted = torch.nn.functional.normalize(states.mean(0), dim=-1)
        torch.testing.assert_close(e.float(), wanted, rtol=1e-4, atol=1e-5)


def test_texts_like_the_task_are_mixed_in(tiny_model, tokenizer, rows, tmp_path):
    """A pool of numbers and of tickets, the task is tickets."""
    path = tmp_path / "pool.jsonl"
    numbers = [" ".join(str(7 * n + k) for k in range(12)) for n in range(12)]
    tickets = [r.prompt + r.completion for r in rows[:12]]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*numbers, *tickets]))
    got = run([GOTD(sources=(str(path),), select=10, share=0.5)], tiny_model(), tokenizer, rows, 6)
    assert got.log.realised["GOTD/examples"] == 12
    mix = GOTD(sources=(str(path),), select=10).data(
        Mix(token_rows(rows, tokenizer)), Context(tiny_model(), tokenizer)
    )
    texts = [tokenizer.decode(r.ids, skip_special_tokens=True) for r in mix.sources[0].rows]
    assert len(texts) == 10 and sum(t in tickets for t in texts) >= 8


def test_the_target_is_not_the_first_rows(tiny_model, tokenizer, rows, monkeypatch):
    seen, plain = [], gotd.embed
    monkeypatch.setattr(gotd, "embed", lambda model, rows: seen.append(rows) or plain(model, rows))
    task = token_rows(rows, tokenizer)
    GOTD(select=2, pool=6).data(Mix(task), Context(tiny_model(), tokenizer))
    first = {r.key for r in task[:6]}
    assert [len(s) for s in seen] == [6, 6] and {r.key for r in seen[1]} != first


@pytest.mark.parametrize("wrong", [{"share": 1.0}, {"select": 0}, {"blur": 0.0}, {"max_tokens": 1}])
def test_values_without_meaning_are_refused(wrong):
    with pytest.raises(PlanError, match="GOTD"):
        GOTD(**wrong).check(None)


def test_a_pool_that_is_too_small_is_refused(tiny_model, tokenizer, rows):
    with pytest.raises(PlanError, match="GOTD chooses 99999 texts"):
        GOTD(select=99999).data(Mix(token_rows(rows, tokenizer)), Context(tiny_model(), tokenizer))
