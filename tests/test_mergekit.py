"""Merges against mergekit, which reads and writes the same folders: equal, or different where the docs say so."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from holdfast import methods as hf
from holdfast import models
from holdfast.sites.merge_files import merge_files
from test_merge_files import moved
from tiny import build_model

ALPHA, DENSITY = 0.3, 0.4


@pytest.fixture(scope="module")
def trio(tmp_path_factory, tokenizer):
    """Folders of a base, of a tuned model, and of another one from the same base; far enough apart for an arc."""
    folder = tmp_path_factory.mktemp("trio")
    made = {"base": build_model(False), **{n: moved(build_model(False), 0.05, s) for n, s in (("tuned", 1), ("b", 2))}}
    for name, model in made.items():
        models.save_model(model, tokenizer, folder / name, card=None)
    return SimpleNamespace(**{n: folder / n for n in made}, folder=folder)


def by_mergekit(trio, method, members, base=True, **settings):
    """Tensors of mergekit's merge. members: name -> parameters of that model."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    out = trio.folder / "mergekit" / method
    run_merge(
        MergeConfiguration(
            merge_method=method,
            models=[{"model": str(getattr(trio, n)), "parameters": p} for n, p in members.items()],
            dtype="float32",
            parameters=settings,
            **({"base_model": str(trio.base)} if base else {}),
        ),
        str(out),
        MergeOptions(quiet=True, copy_tokenizer=False),
    )
    return load_file(out / "model.safetensors")


def by_us(trio, *methods):
    return load_file(merge_files(str(trio.base), str(trio.tuned), methods, trio.folder / "ours") / "model.safetensors")


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("method", [hf.WiSEFT(alpha=ALPHA), hf.LiNeS(alpha=ALPHA, beta=0.0)], ids=lambda m: m.name)
def test_a_straight_line_is_its_linear_merge(trio, method):
    theirs = by_mergekit(trio, "linear", {"base": {"weight": 1 - ALPHA}, "tuned": {"weight": ALPHA}}, base=False)
    assert_same(by_us(trio, method), theirs)


def test_slerp(trio):
    ours = by_us(trio, hf.SLERP(t=ALPHA))
    assert_same(ours, by_mergekit(trio, "slerp", {"base": {}, "tuned": {}}, t=ALPHA))
    line, name = by_us(trio, hf.WiSEFT(alpha=ALPHA)), "model.layers.0.mlp.up_proj.weight"
    assert (ours[name] - line[name]).abs().max() > 1e-4  # it is an arc


def test_task_arithmetic(trio):
    ours = by_us(trio, hf.TaskArithmetic(models=(str(trio.b),), weights=(0.5, -0.25), scale=0.8))
    members = {"tuned": {"weight": 0.5}, "b": {"weight": -0.25}}
    assert_same(ours, by_mergekit(trio, "task_arithmetic", members, **{"lambda": 0.8}))


def test_ties_trimmed_by_tensor(trio):
    """mergekit elects on weighted changes and divides by the weights; with weights of 1 that is the paper's rule."""
    members = {n: {"weight": 1.0, "density": DENSITY} for n in ("tuned", "b")}
    ours = by_us(trio, hf.TIES(models=(str(trio.b),), density=DENSITY, trim="tensor"))
    assert_same(ours, by_mergekit(trio, "ties", members, normalize=True))


def test_breadcrumbs(trio):
    members = {"tuned": {"weight": 1.0, "density": DENSITY, "gamma": 0.05}}
    ours = by_us(trio, hf.Breadcrumbs(density=DENSITY, outliers=0.05))
    assert_same(ours, by_mergekit(trio, "breadcrumbs", members, normalize=False))


def test_dare_draws_other_entries_and_enlarges_by_the_density(trio):
    """The paper divides by the density; mergekit enlarges to the old L1 norm of each tensor, and draws elsewhere."""
    base, tuned = (load_file(f / "model.safetensors") for f in (trio.base, trio.tuned))
    members = {"tuned": {"weight": 1.0, "density": DENSITY}}
    ours, theirs = by_us(trio, hf.DARE(density=DENSITY)), by_mergekit(trio, "dare_linear", members, normalize=False)
    name = "model.embed_tokens.weight"
    tau, *changes = (x[name] - base[name] for x in (tuned, ours, theirs))
    for change, factor in zip(changes, (1 / DENSITY, None), strict=True):
        kept = change.abs() > 1e-7
        assert kept.float().mean() == pytest.approx(DENSITY, abs=0.05)
        factor = factor or tau.abs().sum() / tau[kept].abs().sum()
        torch.testing.assert_close(change[kept], tau[kept] * factor, rtol=0, atol=2e-6)
