"""The one scorer against plain forwards of single requests."""

import copy
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model

from holdfast.engine.lines import choose, cut, heights, lay
from holdfast.engine.threads import may_share, side_by_side
from holdfast.engine.tree import TILE, grow, parts, slices, tiles
from holdfast.errors import HoldfastError, ModelError
from holdfast.measure.asking import _choice
from holdfast.measure.generate import generate
from holdfast.measure.probe import Probe
from holdfast.measure.scorer import Score, Scorer, supports_lines, supports_tree


def plain(model, encoded, prompt=None):
    """(log-probability, greedy, tokens) of each request by one forward each."""
    out = []
    for ids, start in encoded:
        inputs = torch.tensor(ids[:-1])[None]
        with torch.no_grad():
            if prompt is None:
                logits = model(input_ids=inputs, use_cache=False).logits[0]
            else:
                embedded = torch.cat([prompt, model.get_input_embeddings()(inputs)[0]])[None]
                logits = model(inputs_embeds=embedded, use_cache=False).logits[0, len(prompt) :]
        logp = logits[start - 1 :].log_softmax(-1)
        target = torch.tensor(ids[start:])
        picked = logp.gather(1, target[:, None])[:, 0]
        out.append((picked.sum().item(), bool((logp.argmax(-1) == target).all()), len(target)))
    return out


def assert_same(scores, expected, within=1e-5):
    assert len(scores) == len(expected)
    for score, (logprob, greedy, num_tokens) in zip(scores, expected, strict=True):
        assert score.logprob == pytest.approx(logprob, abs=within * max(1, num_tokens))
        assert (score.greedy, score.num_tokens) == (greedy, num_tokens)


def greedy_tokens(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


@pytest.fixture(scope="module")
def encoded(tiny_model):
    """A tree with shared prefixes at several depths, nested requests, duplicates and greedy continuations."""
    draw = random.Random(0)
    word = lambda n: [draw.randrange(5, 300) for _ in range(n)]  # noqa: E731
    shots = [word(40), word(25)]
    out = []
    for shot in shots:
        for _ in range(4):
            query = shot + word(draw.randint(1, 9))
            out += [(query + word(n), len(query)) for n in (1, 2, 5)]
            out.append((greedy_tokens(tiny_model(False), query, 2), len(query)))
    out += [(word(30), 1), (shots[0] + word(1), 20), (shots[0][:21], 20), ([7, 8], 1), out[3]]
    return out


def families(tiny_model):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                           num_attention_heads=4, num_key_value_heads=2, sliding_window=6,
                           max_position_embeddings=256)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MistralForCausalLM(config).eval()


def test_tree_is_one_by_one(tiny_model, tokenizer, encoded):
    model = tiny_model(tied=False)
    assert supports_tree(model)
    expected = plain(model, encoded)
    assert sum(greedy for _, greedy, _ in expected) >= 8  # both kinds of flag are tested
    assert sum(not greedy for _, greedy, _ in expected) >= 8
    assert_same(Scorer(model, tokenizer).score_tokens(encoded), expected)


@pytest.mark.parametrize("batch_tokens", [pytest.param(1, marks=pytest.mark.long), 3, 17, 64, 4096])
@pytest.mark.parametrize("lines", [False, True])
def test_batch_size_does_not_matter(tiny_model, tokenizer, encoded, batch_tokens, lines):
    model = tiny_model(tied=False)
    scorer = Scorer(model, tokenizer, batch_tokens=batch_tokens, _lines=lines)
    assert_same(scorer.score_tokens(encoded), plain(model, encoded))


def test_a_model_without_numbers_scores_nothing(tiny_model, tokenizer, encoded):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="no numbers"):
        Scorer(model, tokenizer).score_tokens(encoded)


def test_a_tie_is_no_right_answer():
    probe = Probe("t", "t/0", "choice", "q", ("a", "b"), right=0)
    same, better = [Score(-1.0, False, 1)] * 2, [Score(-0.5, True, 1), Score(-1.0, False, 1)]
    assert [_choice(probe, scores)["correct"] for scores in (same, better)] == [0, 1]


def test_a_models_own_penalties_are_none_of_ours(tiny_model, tokenizer):
    """Greedy text of a suite is that of the weights, whatever the generation config asks for."""
    probes = [Probe("t", "t/0", "generate", "Where is 1042", (), max_tokens=8)]
    plain, own = tiny_model(), tiny_model()
    own.generation_config.min_new_tokens, own.generation_config.no_repeat_ngram_size = 8, 1
    own.generation_config.suppress_tokens = list(range(10, 200))
    assert generate(own, tokenizer, probes) == generate(plain, tokenizer, probes)
    assert own.generation_config.min_new_tokens == 8
    adapted = get_peft_model(own, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert generate(adapted, tokenizer, probes) == generate(plain, tokenizer, probes)
    assert adapted.generation_config.min_new_tokens == own.generation_config.min_new_tokens == 8


@pytest.mark.parametrize("lines", [False, True])
def test_order_and_duplicates_do_not_matter(tiny_model, tokenizer, encoded, lines):
    scorer = Scorer(tiny_model(tied=False), tokenizer, _lines=lines)
    first = scorer.score_tokens(encoded)
    unique = scorer.num_unique_tokens
    order = list(range(len(encoded))) * 2
    random.Random(1).shuffle(order)
    again = scorer.score_tokens([encoded[n] for n in order])
    assert [again[i] for i in range(len(order))] == [first[n] for n in order]  # bit for bit: the tree is the same
    assert scorer.num_unique_tokens == unique


def test_each_score_depends_on_its_own_request_alone(tiny_model, tokenizer, encoded):
    model = tiny_model(tied=False)
    together = Scorer(model, tokenizer).score_tokens(encoded)
    alone = [Scorer(model, tokenizer).score_tokens([e])[0] for e in encoded]
    assert_same(together, [(s.logprob, s.greedy, s.num_tokens) for s in alone])


@pytest.mark.parametrize("lines", [False, True])
def test_unique_tokens_by_hand(tiny_model, tokenizer, lines):
    # inputs are all tokens but the last: (5 6 7), (5 6 8 9), (5 6 7) again, (10)
    # tree: 5, 6, then 7 | 8, 9, and 10: six nodes
    scorer = Scorer(tiny_model(), tokenizer, _lines=lines)
    scorer.score_tokens([([5, 6, 7, 20], 3), ([5, 6, 8, 9, 20], 3), ([5, 6, 7, 21], 3), ([10, 20], 1)])
    assert scorer.num_unique_tokens == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("windows", [False, True])
def test_invariant_scores_are_the_same_bits_whatever_else_is_scored(tiny_model, tokenizer, encoded, dtype, windows):
    model = copy.deepcopy(families(tiny_model) if windows else tiny_model(tied=False)).to(dtype)
    draw = random.Random(5)
    asked = [*encoded, *(([*ids[:start], *encoded[0][0], *ids[start:]], start + len(encoded[0][0]))
                         for ids, start in encoded[:6])]  # fmt: skip

    def scores(some, batch_tokens, **more):
        return Scorer(model, tokenizer, batch_tokens=batch_tokens, **more).score_tokens([asked[n] for n in some])

    everyone = range(len(asked))
    expected = scores(everyone, 2048, invariant=True)
    assert [scores([n], 1, invariant=True)[0] for n in everyone] == expected
    for size in (3, 10, len(asked)):
        some = draw.sample(everyone, size)
        assert scores(some, draw.choice([5, 64, 512]), invariant=True) == [expected[n] for n in some]
    assert scores(everyone, 20) != scores(everyone, 2048)  # so there is something to see
    if dtype is torch.float32:
        assert_same(expected, plain(model, asked))


def trees():
    draw = random.Random(3)
    bushy = [([draw.randrange(3) for _ in range(draw.randint(2, 9))], 1) for _ in range(60)]
    chain = [(list(range(200)), 1)]
    comb = [([*list(range(n)), 999], 1) for n in range(1, 60)]
    forked = [(list(range(100)) + [500 + n] * 30, 100) for n in range(3)]
    shots = [([*([shot] * 50), *([query] * 5), 300 + label, 7], 55) for shot in range(4) for query in range(9)
             for label in range(3)]  # fmt: skip
    return [bushy, chain, comb, forked, shots, [([1, 2], 1)]]


@pytest.mark.parametrize("most", [1, 7, TILE + 3, 10_000])
@pytest.mark.parametrize("scored", [1, 10, 10_000])
@pytest.mark.parametrize("sequences", trees())
def test_every_token_sees_its_ancestors_and_nothing_else(sequences, scored, most):
    """Walk parts and slices as the scorer does: each node once, in order, below what the cache keeps."""
    tree = grow(sequences)
    held, done = 2, []
    for part in parts(tree, most, 4):
        before = []
        for nodes in slices(tree, part, most, scored):
            own = [n for n in nodes if n >= part.start]
            assert len(nodes) <= most
            assert sum(n in tree.wanted for n in own) <= scored
            keys = [*([0] * held), *before, *nodes]
            at = 0
            for group in tiles(tree, before, nodes, held, torch.float32, "cpu"):
                b, _one, length, width = group.mask.shape
                assert (group.rows.start, group.rows.stop - group.rows.start) == (at, b * length)
                index = group.keys.view(b, width)
                for row in range(b * length):
                    seen = group.mask[row // length, 0, row % length] == 0
                    got = [keys[i] for i in index[row // length][seen]]
                    node = nodes[at + row]
                    assert got == [*([0] * held), *tree.above(node), node]
                at += b * length
            assert at == len(nodes)
            done += own
            before = [n for n in tree.above(nodes[-1] + 1) if n in keys] if nodes[-1] + 1 < part.stop else []
    assert done == list(range(1, len(tree)))


@pytest.mark.parametrize("most, again", [(8, 0), (8, 3), (40, 1), (40, 100)])
@pytest.mark.parametrize("sequences", trees())
def test_parts_cover_the_tree_and_repeat_little(sequences, most, again):
    tree = grow(sequences)
    got = parts(tree, most, again)
    assert [n for part in got for n in part] == list(range(1, len(tree)))
    assert all(tree.depth[part.start] <= again for part in got)
    if again == 100 and len(tree) > 2 * most:
        assert len(got) > 1


def test_parts_by_hand():
    # 12 chains of 5 nodes: with most 8 a cut is looked for at 7 +- 2, and stands where a chain begins
    tree = grow([([n, 50, 51, 52, 53, 54], 1) for n in range(12)])
    assert [part.start for part in parts(tree, 8, 0)][:4] == [1, 6, 11, 16]


@pytest.mark.parametrize("cells", [256, 1024, 100_000])
@pytest.mark.parametrize("sequences", trees())
def test_every_token_of_a_line_sees_its_ancestors_and_nothing_else(sequences, cells):
    """Each request is told once, where its path down from the root ends."""
    tree, told = grow(sequences), []
    for lines in lay(tree, cells, "cpu"):
        b, width = lines.end.shape
        ids, depth = lines.ids.view(b, width), lines.positions.view(b, width)
        sees = lines.mask(None, torch.float32)[:, 0] == 0
        near = lines.mask(3, torch.float32)[:, 0] == 0
        own = list(zip(lines.row.tolist(), lines.target.tolist(), lines.request.tolist(), strict=True))
        assert lines.rows.tolist() == [row for row, _, _ in own] == sorted(lines.rows.tolist())
        for k, cell in enumerate(lines.keep.tolist()):
            line, column = divmod(cell, width)
            path = ids[line][sees[line, column]].tolist()
            assert depth[line][sees[line, column]].tolist() == list(range(len(path)))
            assert ids[line][near[line, column]].tolist() == path[-3:]
            for row, target, request in own:
                if row == k:
                    ids_of, start = sequences[request]
                    assert ids_of[: len(path) + 1] == [*path, target] and len(path) >= start
                    told.append((request, len(path)))
    assert sorted(told) == [(n, at) for n, (ids, start) in enumerate(sequences) for at in range(start, len(ids))]


@pytest.mark.parametrize("sequences", trees())
def test_lines_are_as_few_as_can_be(sequences):
    tree = grow(sequences)
    for width in (max(tree.depth) + 1, max(tree.depth) + 5):
        runs = cut(tree, width)
        assert [n for run in runs for n in run] == list(range(1, len(tree)))
        fewest = [0] * (len(tree) + 1)  # runs that cover the nodes from here on
        for node in range(len(tree) - 1, 0, -1):
            most = min(len(tree), node + width - tree.depth[node])
            fewest[node] = 1 + min(0 if end == len(tree) else fewest[end] for end in range(node + 1, most + 1))
        assert len(runs) == fewest[1]


def test_forwards_of_lines_have_few_shapes():
    assert heights(21, 256, 2048) == [8, 8, 6] and heights(1, 256, 2048) == [2] and heights(3, 4096, 2048) == [1] * 3
    tree = grow([([*list(range(300)), 1000 + n, 7], 300) for n in range(900)])  # lines of 512 repeat 300 tokens each
    width, runs = choose(tree, 8192)
    assert width == 1024 and len(runs) == 2
    assert choose(tree, 600)[0] == choose(tree, 1)[0] == 512  # what does not fit less than 301 must have
    shapes = {lines.end.shape for lines in lay(tree, 8192, "cpu")}
    assert shapes == {(2, 1024)}


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_several_parts_at_once_are_one_by_one(threads, tiny_model, tokenizer, encoded):
    model, before = tiny_model(tied=False), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert may_share(model)
        assert_same(Scorer(model, tokenizer, batch_tokens=40).score_tokens(encoded), plain(model, encoded))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_work_side_by_side_keeps_its_order_and_its_errors():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert list(side_by_side(lambda x: (x, torch.get_num_threads()), range(20), 2)) == [(x, 2) for x in range(20)]
        with pytest.raises(ZeroDivisionError):
            list(side_by_side(lambda x: 1 // (x - 3), range(20), 2))
        weight = torch.ones(1, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            seen = list(
                side_by_side(lambda _: (torch.is_autocast_enabled("cpu"), (weight * 1).requires_grad), [1, 2], 2)
            )
        assert seen == [(True, False)] * 2
    finally:
        torch.set_num_threads(before)


def test_a_model_that_something_watches_goes_one_by_one(tiny_model):
    model = tiny_model()
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert not may_share(model)
    handle.remove()
    assert may_share(model)
    model.model.rotary_emb.rope_type = "dynamic"
    assert not may_share(model)


def test_tree_structure_by_hand():
    tree = grow([([5, 6, 9], 2), ([5, 7, 9], 1), ([5, 6, 8], 2)])
    assert tree.token == [-1, 5, 6, 7]
    assert tree.parent == [-1, 0, 1, 1]
    assert tree.depth == [-1, 0, 1, 1]
    assert tree.end == [4, 4, 3, 4]
    assert {n: sorted(w) for n, w in tree.wanted.items()} == {2: [(0, 9), (2, 8)], 1: [(1, 7)], 3: [(1, 9)]}


def test_long_chains(tiny_model, tokenizer):
    draw = random.Random(0)
    ids = [draw.randrange(5, 300) for _ in range(700)]
    requests = [(ids, 1), ([*ids[:500], 7, 8], 500), ([*ids[:300], 9], 300)]
    model = tiny_model()
    assert_same(Scorer(model, tokenizer, batch_tokens=32).score_tokens(requests), plain(model, requests))


def test_empty_context_starts_at_bos(tiny_model, tokenizer):
    scorer, bos = Scorer(tiny_model(), tokenizer), tokenizer.bos_token_id
    tail = tokenizer.encode(" yes", add_special_tokens=False)
    assert scorer.encode(("", " yes")) == ([bos, *tail], 1)
    assert scorer.encode(("", "<|bos|> yes")) == ([bos, *tail], 1)  # not twice
    assert_same(scorer.score([("", " yes")]), plain(scorer.model, [([bos, *tail], 1)]))


def test_trailing_space_moves_to_the_continuation(tiny_model, tokenizer):
    scorer = Scorer(tiny_model(), tokenizer)
    assert scorer.encode(("Q: 12\nA: ", "3")) == scorer.encode(("Q: 12\nA:", " 3"))
    ids, start = scorer.encode(("Q: 12\nA:", " 3"))
    assert ids == tokenizer.encode("Q: 12\nA: 3")
    assert tokenizer.decode(ids[start:]) == " 3"


def test_bos_in_the_text_is_not_doubled(tiny_model, tokenizer):
    ids, start = Scorer(tiny_model(), tokenizer).encode(("<|bos|>Q:", " 3"))
    assert ids == tokenizer.encode("Q: 3")
    assert start == len(tokenizer.encode("Q:"))


def test_a_continuation_without_token_is_refused(tiny_model, tokenizer):
    for context in ("Q:", ""):
        with pytest.raises(ValueError, match="adds no token"):
            Scorer(tiny_model(), tokenizer).encode((context, ""))


def test_truncation_keeps_the_last_tokens(tiny_model, tokenizer):
    """lm-evaluation-harness: (context + continuation)[-(max_length + 1):], then all but the last go in."""
    scorer = Scorer(tiny_model(), tokenizer)
    assert scorer.max_length == 1024
    text = "".join(f" {n}" for n in range(900))
    whole = tokenizer.encode(text + " yes")
    start = len(tokenizer.encode(text))
    ids, at = scorer.encode((text, " yes"))
    assert len(whole) > 1025
    assert ids == whole[-1025:]
    assert len(ids) - at == len(whole) - start
    assert_same(scorer.score([(text, " yes")]), plain(scorer.model, [(ids, at)]), within=1e-4)


@pytest.mark.parametrize("context", ["", "Q:"])
def test_a_continuation_that_cannot_fit_is_refused(tiny_model, tokenizer, context):
    with pytest.raises(HoldfastError, match="the model reads 1024"):
        Scorer(tiny_model(), tokenizer).encode((context, " 1" * 3000))


@pytest.mark.parametrize("batch_tokens", [1, 512])
def test_sliding_windows_go_in_lines(tiny_model, tokenizer, encoded, batch_tokens):
    model = families(tiny_model)
    assert supports_lines(model)
    scorer = Scorer(model, tokenizer, batch_tokens=batch_tokens, _lines=True)
    assert_same(scorer.score_tokens(encoded), plain(model, encoded))
    assert scorer.num_unique_tokens == len(grow(encoded)) - 1


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("batch_tokens", [64, 128, 1024])
def test_several_lines_and_forwards(tiny_model, tokenizer, batch_tokens, windows, soft, monkeypatch):
    """Demonstrations, questions and labels; the demonstrations are repeated in each line."""
    monkeypatch.setattr("holdfast.engine.lines.WIDTHS", (256,))
    draw = random.Random(4)
    word = lambda n: [draw.randrange(5, 300) for _ in range(n)]  # noqa: E731
    asked = []
    for shot in (word(90), word(60)):
        for _ in range(12):
            query = shot + word(draw.randint(6, 14))
            asked += [(query + word(n), len(query)) for n in (1, 2, 4)]
    model = families(tiny_model) if windows else tiny_model(tied=False)
    prompt = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) if soft else None
    tall = [lines.end.shape[0] for lines in lay(grow(asked), 4 * batch_tokens, "cpu")]
    assert tall == {64: [1, 1, 1], 128: [2, 1], 1024: [4]}[batch_tokens]
    scorer = Scorer(model, tokenizer, batch_tokens=batch_tokens, soft_prompt=prompt, _lines=True)
    assert_same(scorer.score_tokens(asked), plain(model, asked, prompt))


@pytest.mark.parametrize("plain_head", [True, False])
def test_logits_of_lines_come_in_pieces(tiny_model, tokenizer, encoded, monkeypatch, plain_head):
    monkeypatch.setattr("holdfast.measure.scorer.SCORED", 7)
    monkeypatch.setattr("holdfast.measure.scorer.comes_apart", lambda _: plain_head)
    model, sizes = tiny_model(tied=False), []
    expected = plain(model, encoded)
    assert supports_lines(model)  # tried before anybody counts
    head = model.get_output_embeddings()

    def note(_module, _args, out):
        if out.shape[-1] == head.out_features:  # not the states that a head which is left out hands on
            sizes.append(out.shape[-2])

    handle = head.register_forward_hook(note)
    scores = Scorer(model, tokenizer, _lines=True).score_tokens(encoded)
    handle.remove()
    assert_same(scores, expected)
    assert (max(sizes) == 7 and len(sizes) > 5) if plain_head else len(sizes) == 1


def test_what_no_line_holds_goes_through_the_tree(tiny_model, tokenizer, encoded, monkeypatch):
    monkeypatch.setattr("holdfast.measure.scorer.WIDTHS", (256, 32))
    model, asked = tiny_model(tied=False), []
    monkeypatch.setattr(Scorer, "_walk_lines", lambda *_: asked.append("lines"))
    assert_same(Scorer(model, tokenizer, _lines=True).score_tokens(encoded), plain(model, encoded))
    assert not asked


@pytest.mark.parametrize("batch_tokens", [1, 16, 512])
def test_sliding_window_falls_back(tiny_model, tokenizer, encoded, batch_tokens):
    model = families(tiny_model)
    assert not supports_tree(model)
    scorer = Scorer(model, tokenizer, batch_tokens=batch_tokens)
    assert_same(scorer.score_tokens(encoded), plain(model, encoded))
    assert scorer.num_unique_tokens == sum(len(ids) - 1 for ids, _ in encoded)


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("windows", [False, True])
def test_soft_prompt_stands_before_everything(tiny_model, tokenizer, encoded, windows, lines):
    model = families(tiny_model) if windows else tiny_model(tied=False)
    soft = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    scorer = Scorer(model, tokenizer, soft_prompt=soft, batch_tokens=50, _lines=lines)
    assert_same(scorer.score_tokens(encoded), plain(model, encoded, soft))
    assert_same(Scorer(model, tokenizer, soft_prompt=soft, invariant=True).score_tokens(encoded[:4]),
                plain(model, encoded[:4], soft))  # fmt: skip
    assert scorer.max_length == model.config.max_position_embeddings - 4
    bare = Scorer(model, tokenizer).score_tokens(encoded)
    pairs = zip(bare, scorer.score_tokens(encoded), strict=True)
    assert max(abs(a.logprob - b.logprob) for a, b in pairs) > 1e-3


@pytest.mark.parametrize("lines", [False, True])
def test_a_lora_model(tiny_model, tokenizer, encoded, lines):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(tied=False), config).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(p.numel()))
    assert supports_tree(model) and supports_lines(model)
    assert_same(Scorer(model, tokenizer, _lines=lines).score_tokens(encoded), plain(model, encoded))


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_over(tiny_model, tokenizer, encoded, training, lines):
    """Dropout is off while scoring, the mode comes back, and no gradient is kept."""
    model = tiny_model(tied=False).train(training)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    weights = {n: p.clone() for n, p in model.named_parameters()}
    scores = Scorer(model, tokenizer, _lines=lines).score_tokens(encoded)
    assert model.training is training
    assert_same(scores, plain(model.eval(), encoded))
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in model.named_parameters())


def test_the_mode_comes_back_after_an_error(tiny_model, tokenizer):
    model = tiny_model().train()
    with pytest.raises(IndexError):
        Scorer(model, tokenizer).score_tokens([([5, 999_999, 6], 1)])
    assert model.training


def test_progress_ends_at_one_and_nothing_gives_nothing(tiny_model, tokenizer, encoded):
    for model, lines in ((tiny_model(), False), (tiny_model(), True), (families(tiny_model), False)):
        seen = []
        scorer = Scorer(model, tokenizer, batch_tokens=32, progress=seen.append, _lines=lines)
        scorer.score_tokens(encoded)
        assert seen == sorted(seen)
        assert seen[-1] == 1.0
        assert scorer.score([]) == []
