"""Antidote: scores and masks by hand, what an adapter's base keeps, the controls, and the folders."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from holdfast import models
from holdfast.errors import HoldfastError
from holdfast.runs.antidote import antidote, largest, maps_of, prune, statistics
from tiny import build_model

ROWS = [[0, 17, 42, 9, 77], [0, 5, 5], [0, 130, 131, 132]]


class Net(nn.Module):
    """One map of two columns behind an embedding whose rows are known."""

    def __init__(self, weight):
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.embed.weight.data = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]])
        self.q_proj = nn.Linear(2, 2, bias=False)
        self.q_proj.weight.data = torch.tensor(weight)

    def forward(self, input_ids, use_cache=False):
        return self.q_proj(self.embed(input_ids))


def test_values_by_hand():
    """Rows (0, 1) and (2, 2): column 0 has 1 + 4 = 5 and 0, mean 2.5; column 1 has 0 + 1 = 1 and 9 + 9, mean 9.5.
    Scores of (4, 1): 4 sqrt 2.5 = 6.3 and sqrt 9.5 = 3.1: the first goes; of (1, 1) the second goes."""
    net = Net([[4.0, 1.0], [1.0, 1.0]])
    rows = [[0, 1], [2, 2]]
    assert statistics(net, {"q_proj": net.q_proj}, rows)["q_proj"].tolist() == [2.5, 9.5]
    assert prune(net, rows, ratio=0.5, targets="q_proj$") == {"q_proj": 0.5}
    assert net.q_proj.weight.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    other = Net([[4.0, 1.0], [1.0, 1.0]])  # the size alone: of equal ones the last goes
    prune(other, rows, ratio=0.5, targets="q_proj$", by="magnitude")
    assert other.q_proj.weight.tolist() == [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize(("ratio", "gone"), [(0.0, 0), (0.1, 1), (0.25, 3), (0.3, 3), (1.0, 10)])
def test_as_many_as_the_code_takes(ratio, gone):
    """10 - int(10 (1 - ratio)) of each row."""
    score = torch.rand(4, 10, generator=torch.Generator().manual_seed(0))
    mask = largest(score, ratio)
    assert mask.sum(1).tolist() == [gone] * 4
    assert all(score[i][mask[i]].min() > score[i][~mask[i]].max() for i in range(4) if 0 < gone < 10)


def test_whole_weights_lose_the_share_and_all_else_stays():
    model, before = build_model(), dict(build_model().named_parameters())
    pruned = prune(model, ROWS, ratio=0.25)
    assert len(pruned) == 6 and set(pruned.values()) == {0.25}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (name.removesuffix(".weight") in pruned), name
    again = build_model()
    prune(again, ROWS[::-1], ratio=0.25)  # the order of rows does not matter
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    chance, other = build_model(), build_model()
    prune(chance, ROWS, ratio=0.25, by="chance")
    prune(other, ROWS, ratio=0.25, by="magnitude")
    name = "model.layers.0.self_attn.q_proj.weight"
    found = [m.get_parameter(name) == 0 for m in (model, chance, other)]
    assert all(int(f.sum()) == 256 for f in found) and not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not any(m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_an_adapter_is_pruned_and_its_base_stays(tokenizer, tmp_path):
    models.save_model(build_model(), tokenizer, tmp_path / "base", card=None)
    base, _ = models.load(str(tmp_path / "base"), dtype="float32", device="cpu")
    adapter = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    for n, p in adapter.named_parameters():
        if "lora_B" in n:
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    adapter.save_pretrained(tmp_path / "adapter")
    rows = [{"prompt": "How?", "completion": " Like this."}, {"prompt": "Why?", "completion": " Because."}]
    (tmp_path / "harmful.jsonl").write_text("\n".join(map(json.dumps, rows)))
    where = {"dtype": "float32", "device": "cpu"}
    paths = str(tmp_path / "adapter"), tmp_path / "harmful.jsonl"
    pruned = antidote(*paths, tmp_path / "out", ratio=0.25, **where)
    assert len(pruned) == 8 and all(share == 0.25 for share in pruned.values())
    got, _ = models.load(str(tmp_path / "out"), **where)
    plain = build_model()
    for n, p in got.get_base_model().named_parameters():
        if "lora_" not in n:
            assert torch.equal(p, plain.get_parameter(n.replace("base_layer.", ""))), n
    ids = torch.tensor([ROWS[0]])
    assert not torch.equal(got(ids).logits, adapter(ids).logits)
    antidote(*paths, tmp_path / "all", ratio=1.0, **where)  # the adapter is gone
    none, _ = models.load(str(tmp_path / "all"), **where)
    torch.testing.assert_close(none(ids).logits, plain(ids).logits)


def test_what_is_refused():
    with pytest.raises(HoldfastError, match=r"ratio of 1\.5"):
        prune(build_model(), ROWS, ratio=1.5)
    with pytest.raises(HoldfastError, match="by 'luck'"):
        prune(build_model(), ROWS, by="luck")
    with pytest.raises(HoldfastError, match="no harmful rows"):
        prune(build_model(), [])
    with pytest.raises(HoldfastError, match="finds no map"):
        maps_of(build_model(), "nothing$")
