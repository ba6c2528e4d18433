"""Contract rule 13: every ordered pair of methods trains, or is refused by name."""

from itertools import permutations

import pytest
import torch

from cases import CASES, run
from holdfast import methods as hf
from holdfast.errors import PlanError

METHODS = [c.method for c in CASES]
REFUSED = {
    frozenset(p)
    for p in (
        ("AnchoredSFT", "DFT"),
        ("AnchoredSFT", "KLToBase"),
        ("AnchoredSFT", "ProMoT"),
        ("KLToBase", "ProMoT"),
        ("HalfFineTune", "LoRA"),
        ("LoRA", "OrthogonalSubspace"),
    )
}
PAIRS = list(permutations(METHODS, 2))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "-".join(m.name for m in p))
def test_13_a_pair_runs_or_is_refused(pair, tiny_model, tokenizer, rows):
    if frozenset(m.name for m in pair) in REFUSED:
        with pytest.raises(PlanError) as e:
            run(pair, tiny_model(), tokenizer, rows, 4)
        assert all(m.name in str(e.value) for m in pair)
        return
    result = run(pair, tiny_model(), tokenizer, rows, 4)
    assert len(result.log.loss) == 4
    assert all(torch.isfinite(torch.tensor(list(parts.values()))).all() for _, parts in result.log.loss)
    assert all(w.isfinite().all() for w in result.weights.values())
    assert all(result.session.effects[m.name] for m in pair)


def test_a_long_plan_runs(tiny_model, tokenizer, rows):
    """One method of every site at once, on an adapter."""
    plan = [
        hf.LoRA(r=2),
        hf.Freeze(layers=1, layer_decay=0.8),
        hf.InContextMix(share=0.2, pool=4),
        hf.Replay(share=0.2, sources=("holdfast:general/text.jsonl",), max_tokens=16),
        hf.DFT(),
        hf.ICLAnchor(every=1, pool=4, shots=(1, 2)),
        hf.KLToBase(on="replay", max_tokens=16),
        hf.L2ToInit(),
        hf.ProMoT(num_virtual_tokens=3),
        hf.LiNeS(alpha=0.5),
        hf.WiSEFT(alpha=0.9),
    ]
    result = run(plan, tiny_model(), tokenizer, rows, 8)
    assert {"task", "ICLAnchor", "KLToBase", "L2ToInit"} == set(result.log.loss[-1][1])
    assert all(result.session.effects[m.name] for m in plan)
