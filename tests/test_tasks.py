"""The built-in in-context tasks, and the suite that asks them."""

from collections import Counter

import pytest

from holdfast.data.fewshot import FORMATS
from holdfast.errors import HoldfastError
from holdfast.measure.suites.in_context import items_of, measure, pick_shots
from holdfast.measure.tasks import AnchorTask, HeldOutTask, anchor_tasks, held_out_tasks, tasks

ALL = sorted(tasks())
HELD_OUT = sorted(t.name for t in held_out_tasks())
MOST_SHARED = 0.05  # of a held-out task's pairs that an anchor task may contain


@pytest.mark.parametrize("name", ALL)
def test_a_task_is_sound(name):
    task = tasks()[name]
    assert type(task) in (AnchorTask, HeldOutTask)
    assert len(task.items) >= 100
    inputs = [x for x, _ in task.items]
    assert [x for x, n in Counter(inputs).items() if n > 1] == []
    assert all(x.strip() == x and y.strip() == y and x and y for x, y in task.items)
    assert not any("\n" in y for _, y in task.items)  # the newline ends an answer
    if task.labels is not None:
        assert {y for _, y in task.items} == set(task.labels)
        assert len(set(task.labels)) == len(task.labels)


def test_roles_are_read_from_the_files():
    import json

    from holdfast.measure.tasks import FOLDER

    roles = {raw["name"]: raw["role"] for f in FOLDER.glob("*.json") for raw in [json.loads(f.read_text())]}
    assert set(roles.values()) == {"anchor", "heldout"}
    assert {t.name for t in anchor_tasks()} == {n for n, role in roles.items() if role == "anchor"}
    assert {t.name for t in held_out_tasks()} == {n for n, role in roles.items() if role == "heldout"}


def shared_with_anchors(task):
    """The pairs of a task that some anchor task has with the same input and output."""
    return set(task.items) & {pair for t in anchor_tasks() for pair in t.items}


@pytest.mark.parametrize("name", HELD_OUT)
def test_anchors_do_not_teach_the_answers_of_held_out_tasks(name):
    (task,) = held_out_tasks((name,))
    assert len(shared_with_anchors(task)) < MOST_SHARED * len(task.items)


def test_held_out_tasks_cannot_be_anchored():
    for task in held_out_tasks():
        assert not isinstance(task, AnchorTask)
        with pytest.raises(HoldfastError, match="held-out task"):
            anchor_tasks((task.name,))


def test_unknown_names_get_a_hint():
    with pytest.raises(HoldfastError, match="Did you mean 'capitalize'"):
        anchor_tasks(("capitalise",))
    with pytest.raises(HoldfastError, match="Did you mean 'antonym'"):
        held_out_tasks(("antonyms",))


def questions(item, task):
    """The nine questions of a prompt, the last one asked, as written in its format."""
    form, text, at, out = FORMATS[item.cluster.split("/")[1]], item.prompt.context, 0, []
    for start, end in item.prompt.spans:
        block = text[at:start].removeprefix(form.header.format(instruction=task.instruction))
        if form.name == "chat":
            block = block.split("user\n")[1].removeprefix(task.instruction)
        out.append(block.strip())
        at = end
    return out


@pytest.mark.parametrize("name", ALL)
def test_the_query_is_never_among_the_shots(tokenizer, name):
    task = tasks()[name]
    items = items_of(task, tokenizer=tokenizer, limit=None)
    for cluster in {i.cluster for i in items}:
        asked = [questions(i, task) for i in items if i.cluster == cluster]
        assert len({tuple(q[:-1]) for q in asked}) == 1  # one set of demonstrations for all
        assert len({q[-1] for q in asked}) == len(asked)
        assert all(len(set(q)) == 9 for q in asked)
    for item in items:
        text = item.prompt.context + item.prompt.answer
        assert all(text[a:b] in {y for _, y in task.items} for a, b in item.prompt.spans)


def test_a_smaller_limit_is_a_subset(tokenizer):
    for name in ("antonym", "topic", "capital"):
        task = tasks()[name]
        few, many = (items_of(task, tokenizer=tokenizer, limit=n) for n in (10, 40))
        assert many[:10] == few
        assert items_of(task, tokenizer=tokenizer, limit=40, seed=1) != many


def test_formats_get_about_as_many_items_each(tokenizer):
    clusters = Counter(i.cluster for i in items_of(tasks()["antonym"], tokenizer=tokenizer, limit=48))
    assert sorted(clusters.values()) == [16, 16, 16]


def test_shots_show_every_label_about_equally_often():
    task = tasks()["topic"]  # four labels, eight shots: two of each
    shots = pick_shots(task.items, task.labels, 8, "key")
    assert Counter(y for _, y in shots) == dict.fromkeys(task.labels, 2)
    assert len(set(shots)) == 8
    assert pick_shots(task.items, task.labels, 8, "key") == shots


def test_too_many_shots_are_refused(tokenizer):
    with pytest.raises(HoldfastError, match="too few for 500 shots"):
        items_of(tasks()["antonym"], tokenizer=tokenizer, num_fewshot=500)


def test_base_against_base_is_exactly_equal(tiny_model, tokenizer):
    some = held_out_tasks(("antonym", "topic"))
    one, two = (measure(tiny_model(), tokenizer, some, num_fewshot=2, limit=6) for _ in range(2))
    assert one == two
    assert [len(t["items"]) for t in one["tasks"]] == [6, 6]
    assert all(i["logprob"] < 0 for t in one["tasks"] for i in t["items"])


def test_another_model_measures_differently(tiny_model, tokenizer):
    import torch

    some, other = held_out_tasks(("antonym",)), tiny_model()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    one, two = (measure(m, tokenizer, some, num_fewshot=2, limit=4) for m in (tiny_model(), other))
    assert [i["id"] for i in one["tasks"][0]["items"]] == [i["id"] for i in two["tasks"][0]["items"]]
    assert one["tasks"][0]["items"] != two["tasks"][0]["items"]


def test_a_prompt_too_long_is_refused(tiny_model, tokenizer):
    model = tiny_model()
    model.config.max_position_embeddings = 40
    with pytest.raises(HoldfastError, match="the model reads 40"):
        measure(model, tokenizer, held_out_tasks(("antonym",)), limit=3)


def test_chance_is_the_best_constant_answer():
    for task in tasks().values():
        if task.labels is None:
            assert task.chance == 0.0
        else:
            most = Counter(y for _, y in task.items).most_common(1)[0][1]
            assert task.chance == pytest.approx(max(most / len(task.items), 1 / len(task.labels)))


@pytest.mark.parametrize(
    ("answered", "answer", "stop"),
    [
        ("{{ m.content }}</s>\n", "no", "</s>"),
        (" {{ m.content }}</s>", " no", "</s>"),  # Mistral
        (" {{ m.content }} </s>", " no", " </s>"),  # Llama 2
        ("{{ m.content }}\n", "no", ""),
        ("<think>\n\n</think>\n\n{{ m.content }}</s>", "no", ""),  # rewritten: the prompts have no thinking
    ],
)
def test_an_answer_in_a_chat_stands_as_the_template_writes_it(answered, answer, stop, tokenizer):
    """A model that goes on as its template does is right: the blank before an answer belongs to it."""
    import copy

    from holdfast.data.fewshot import build

    words = copy.deepcopy(tokenizer)
    words.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
        + answered
        + "{% endif %}{% endfor %}"
    )
    prompt = build(FORMATS["chat"], [("a", "yes")], ("b", "no"), instruction="Do", tokenizer=words)
    assert (prompt.answer, prompt.stop) == (answer, stop)
    start, end = prompt.spans[-1]
    assert (prompt.context + prompt.answer)[start:end] == "no" and len(prompt.spans) == 2


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}\n{% endfor %}",
        "{% for m in messages %}{{ m.content[0]['text'] + '' }}{% endfor %}",
        "{% for m in messages %}{{ m.content + no_such_token }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    ],
)
def test_a_chat_template_that_writes_no_plain_text_is_not_asked_through(template, tokenizer):
    """Its prompts would hold no question: the suites ask in plain text, as without a template."""
    import copy

    from holdfast.data.fewshot import formats_for
    from holdfast.measure.probe import Ask

    words = copy.deepcopy(tokenizer)
    assert [f.name for f in formats_for(words)] == list(FORMATS)
    assert "hello" in Ask(words).chat("hello") != "Question: hello\nAnswer:"
    words.chat_template = template
    assert [f.name for f in formats_for(words)] == [name for name in FORMATS if name != "chat"]
    assert (Ask(words).chat("hello"), Ask(words).lead("no")) == ("Question: hello\nAnswer:", " no")
