"""Parameter sensitivity on a tiny model that has really learned the questions."""

import copy

import pytest
import torch

from holdfast.diagnose import Case
from holdfast.diagnose.sensitivity import diagnose, groups_of, losses, questions, swapped
from holdfast.measure.tasks import held_out_tasks


def state(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def equal(model, before):
    return all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.fixture(scope="module")
def learned(tiny_model, tokenizer):
    """A base that knows the answers: 80 steps on the questions themselves."""
    model = tiny_model(layers=4)
    suite = questions(Case(model, model, tokenizer))
    texts = [tokenizer.encode(p.context + p.answers[0]) for p in suite.probes]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(t[-48:]) for t in texts], batch_first=True, padding_value=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        model(input_ids=ids, labels=ids.masked_fill(ids == 2, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def damaged(model, *layers, noise=0.2):
    tuned = copy.deepcopy(model)
    torch.manual_seed(0)
    for n in layers:
        for p in tuned.model.layers[n].parameters():
            p.add_(torch.randn_like(p) * noise)
    return tuned


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_the_planted_layer_is_named_and_its_reset_regains_all(learned, tokenizer, layer):
    tuned = damaged(learned, layer)
    before = state(tuned), state(learned)
    found = diagnose(Case(learned, tuned, tokenizer))
    assert f"sits in layer {layer}:" in found.finding and found.scores["damage"] > 0
    assert found.scores["regained"] == pytest.approx(1, abs=1e-4)
    assert found.scores["alone"] == pytest.approx(found.scores["damage"], rel=1e-3)
    assert equal(tuned, before[0]) and equal(learned, before[1])


def test_the_worst_of_several_layers_is_named(learned, tokenizer):
    tuned = damaged(learned, 0, 1, 2, 3, noise=0.005)
    with torch.no_grad():
        for p in tuned.model.layers[2].parameters():
            p.add_(torch.randn_like(p) * 0.2)
    found = diagnose(Case(learned, tuned, tokenizer))
    assert "sits in layer 2:" in found.finding and "Spearman" in found.detail
    assert found.table[1][0] == "layer 2" and len(found.table) == 5


def test_a_better_tuned_model_is_nothing_unusual(learned, tokenizer):
    found = diagnose(Case(damaged(learned, 1), learned, tokenizer))
    assert found.finding.startswith("Nothing unusual") and found.scores["damage"] < 0


def test_resetting_all_groups_is_the_base_and_transplanting_all_the_tuned(learned, tokenizer):
    tuned = damaged(learned, 0, 2)
    with torch.no_grad():
        tuned.get_input_embeddings().weight.mul_(1.1)
    case = Case(learned, tuned, tokenizer)
    suite, groups = questions(case), groups_of(case)
    assert [g.name for g in groups if g.pairs] == ["embeddings", "layer 0", "layer 2"]
    whole = copy.copy(groups[0])
    whole.pairs = [p for g in groups for p in g.pairs]
    base, after = losses(learned, case, suite), losses(tuned, case, suite)
    with swapped(whole):
        assert losses(tuned, case, suite) == base
    with swapped(whole, into_base=True):
        assert losses(learned, case, suite) == after
    assert losses(tuned, case, suite) == after != base


def test_weights_come_back_after_an_error(learned, tokenizer):
    tuned = damaged(learned, 0)
    before = state(tuned)
    group = next(g for g in groups_of(Case(learned, tuned, tokenizer)) if g.pairs)
    with pytest.raises(KeyError), swapped(group):
        assert not equal(tuned, before)
        raise KeyError
    assert equal(tuned, before)


def test_deep_models_are_cut_into_runs_of_layers(tiny_model, tokenizer):
    case = Case(tiny_model(layers=13), tiny_model(layers=13), tokenizer)
    names = [g.name for g in groups_of(case)]
    assert names[:3] == ["embeddings", "layers 0 to 2", "layers 3 to 4"] and names[-2:] == [
        "layers 11 to 12",
        "norm and head",
    ]
    assert len(names) == 8


def test_questions_are_of_the_tasks_that_lost_most(learned, tokenizer):
    lost = sorted(t.name for t in held_out_tasks())[-4:]

    def measured(score):
        tasks = [{"name": t.name, "items": [{"correct": score(t.name)}] * 2} for t in held_out_tasks()]
        return [{"suite": "in-context", "tasks": tasks}]

    case = Case(learned, learned, tokenizer, measured(lambda _: 1), measured(lambda n: 0 if n in lost else 1))
    suite = questions(case)
    assert {p.task for p in suite.probes} == set(lost) and len(suite.probes) == 16
    assert suite == questions(case)
