"""What a step asks of a device, counted on a CPU (`benchmarks/ops.py`): no more than TRL's, few shapes, no waiting."""

import pytest
import torch

from scripts import scripts

pytestmark = pytest.mark.filterwarnings("default")  # what other libraries warn of is not ours
STEPS, SHALLOW, DEEP = 4, 2, 4


@pytest.fixture(scope="module")
def ops():
    pytest.importorskip("trl")
    with scripts("ops", "_common", "stand_in") as found:
        yield found.ops


@pytest.fixture(scope="module")
def counted(ops):
    """counted(side, kind, layers) -> what `benchmarks/ops.py` found for it."""
    from holdfast.methods import ICLAnchor

    tokenizer, found = ops.C.build_tokenizer(400), {}
    rows = ops.all_lengths(tokenizer)

    def count(side, kind, layers, steps=STEPS):
        key = side, kind, layers, steps
        if key not in found:
            model = ops.C.random_llama("tiny", tokenizer, layers)
            ops.C.set_weights(model, torch.bfloat16)
            job = ops.C.Job(rows, steps, 4, kind)
            found[key] = ops.sides(model, tokenizer, job, [ICLAnchor(pool=4)])[side]()
        return found[key]

    return count


@pytest.mark.parametrize("way", [pytest.param("blocks", marks=pytest.mark.long), "fixed", "varlen"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_step_has_no_more_operators_than_trls(kind, way, counted):
    """In all; and with the kernel for rows of any length in what each further layer adds, too.

    The grids add a few: gathers, and on a CPU casts to fp32 that CUDA does without.
    """
    most = {n: counted("TRL, padded", kind, n)["operators"] for n in (SHALLOW, DEEP)}
    own = {n: counted(f"ours, {way}", kind, n)["operators"] for n in (SHALLOW, DEEP)}
    assert own[SHALLOW] <= most[SHALLOW] and own[DEEP] <= most[DEEP]
    if way == "varlen":
        assert own[DEEP] - own[SHALLOW] <= most[DEEP] - most[SHALLOW]


@pytest.mark.parametrize("way", ["blocks", "varlen"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_default_plan_adds_little(kind, way, counted):
    plain = counted(f"ours, {way}", kind, DEEP)["operators"]
    assert counted(f"ours, default plan, {way}", kind, DEEP)["operators"] <= 1.1 * plain


@pytest.mark.parametrize("way", ["fixed", "varlen"])
def test_on_cuda_attention_has_few_shapes(way, counted):
    assert counted(f"ours, {way}", "lora", SHALLOW, 20)["attention_shapes"] <= 3
    assert counted("ours, blocks", "lora", SHALLOW, 20)["attention_shapes"] > 3  # so there is something to see


@pytest.mark.parametrize("side", ["ours, varlen", "ours, fixed", "ours, default plan, varlen"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_between_lines_of_the_log_nothing_waits(kind, side, counted):
    assert counted(side, kind, DEEP)["waits"] == 0
    assert counted("TRL, padded", kind, DEEP)["waits"] > 0  # the counter sees what waits


@pytest.fixture(scope="module")
def scored(ops):
    """scored(lines) -> what `benchmarks/ops.py` found for the in-context suite."""
    tokenizer = ops.C.build_tokenizer(400)
    model = ops.C.random_llama("tiny", tokenizer, SHALLOW)
    ops.C.set_weights(model, torch.bfloat16)
    found = {lines: ops.scored(model, tokenizer, 4, lines) for lines in (False, True)}
    return found.__getitem__


def test_on_cuda_scoring_has_few_forwards_of_few_shapes_and_waits_for_nothing(scored):
    tree, lines = scored(False), scored(True)
    assert lines["waits"] == 0 and lines["attention_shapes"] <= 2
    assert tree["waits"] > 0 and tree["attention_shapes"] > 2  # so there is something to see
    assert lines["forwards"] <= 1 + lines["cells_per_token"] * lines["tokens"] // 8192
    assert lines["cells_per_token"] <= 2 and lines["tokens"] == tree["tokens"]
    assert lines["operators"] < tree["operators"]


def test_masks_that_decide_a_shape_are_waits(ops):
    count = ops.Count()
    with count:
        x = torch.arange(4)
        x[x > 1]
        x[[0, 1]]
        x.sum().item()
    assert dict(count.now.waits) == {"aten::index": 1, "aten::_local_scalar_dense": 1}
