"""An old adapter on a new base: the same numbers as adding it, both identities, and what is refused."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from holdfast import models
from holdfast.errors import ModelError
from holdfast.sites.porting import PORTED, port
from tiny import build_model

IDS = torch.tensor([[0, 17, 42, 9, 77]])


def nudged(model, by, seed=1):
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.add_(torch.randn_like(p) * by)
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    """Folders: old, new (a little further on) and other (unrelated) bases, and adapters on the old one."""
    at = tmp_path_factory.mktemp("port")
    bases = {"old": build_model(), "new": nudged(build_model(), 0.002), "other": build_model(seed=5)}
    for name, model in bases.items():
        models.save_model(model, tokenizer, at / name, card=None)
    kinds = {"plain": {}, "dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}
    kinds["whole"] = {"modules_to_save": ["norm"]}
    for name, settings in kinds.items():
        base, _ = models.load(str(at / "old"), dtype="float32", device="cpu")
        adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **settings))
        for n, p in adapter.named_parameters():
            if "lora_B" in n:
                torch.nn.init.normal_(p, std=0.2)
        adapter.save_pretrained(at / name)
    return at


@torch.no_grad()
def test_it_is_the_new_base_plus_the_old_change(world, tmp_path):
    said = port(str(world / "plain"), str(world / "new"), tmp_path / "out")
    got, _ = models.load(str(tmp_path / "out"), dtype="float32", device="cpu")
    assert isinstance(got, PeftModel)
    merged, _ = models.load(str(tmp_path / "out"), dtype="float32", device="cpu", merge_adapter=True)
    torch.testing.assert_close(merged(IDS).logits, got(IDS).logits, atol=1e-5, rtol=1e-4)
    old, new = (models.load(str(world / n), dtype="float32", device="cpu")[0] for n in ("old", "new"))
    tuned, _ = models.load(str(world / "plain"), dtype="float32", device="cpu", merge_adapter=True)
    for name, p in merged.named_parameters():
        change = tuned.get_parameter(name) - old.get_parameter(name)
        torch.testing.assert_close(p, new.get_parameter(name) + change, atol=1e-6, rtol=1e-5)
    assert said == json.loads((tmp_path / "out" / PORTED).read_text())
    bases = [models.resolve(str(world / n)).sha for n in ("old", "new")]
    assert [said["trained on"]["sha"], said["moved to"]["sha"]] == bases
    name = "model.layers.1.mlp.up_proj.weight"
    apart = new.get_parameter(name) - old.get_parameter(name)
    assert said["drift"][name] == pytest.approx(float(apart.norm() / old.get_parameter(name).norm()), rel=1e-5)
    assert len(said["drift"]) == 4


@torch.no_grad()
def test_on_its_own_base_nothing_changes(world, tmp_path):
    said = port(str(world / "plain"), str(world / "old"), tmp_path / "out")
    before, after = (
        models.load(str(p), dtype="float32", device="cpu")[0] for p in (world / "plain", tmp_path / "out")
    )
    assert torch.equal(before(IDS).logits, after(IDS).logits) and set(said["drift"].values()) == {0.0}


@pytest.mark.parametrize(
    ("adapter", "base", "words"),
    [
        ("plain", "other", "does not descend from the base"),
        ("dora", "new", "magnitudes of DoRA"),
        ("pissa", "new", "its start 'pissa' changed the base"),
        ("whole", "new", "cannot be read as its base plus a change"),
        ("old", "new", "is not an adapter"),
        ("plain", "plain", "is no whole model"),
    ],
)
def test_what_is_refused(world, tmp_path, adapter, base, words):
    with pytest.raises(ModelError, match=words):
        port(str(world / adapter), str(world / base), tmp_path / "out")
    assert not (tmp_path / "out").exists()
