"""What goes to the libraries below a tokenizer at once gives what the tokenizer gives."""

import pytest

from holdfast.data.direct import Direct, Renderer
from tiny import build_tokenizer
from tokenizers_made import MADE

TEXTS = ["Where is order 1042 now?", " two  blanks\n", "<|im_end|>", "caf\u00e9 \U0001f600", "x"]
ASKED = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "a\n\nb <|im_end|>"}]
ROWS = {
    "text": (ASKED, {}),
    "a key for thinking": ([*ASKED, {"role": "assistant", "content": "b", "thinking": "hm"}], {}),
    "a number": ([{"role": "user", "content": "b", "id": 1.5}], {}),
    "tools": (ASKED, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}),
    "a variable": (ASKED, {"enable_thinking": False}),
}
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% if enable_thinking is defined %}off{% endif %}"
    "{% set seen = namespace(n=0) %}{% for m in messages %}{% set seen.n = seen.n + 1 %}[{{ m['role'] }}]"
    "{{ m.reasoning_content or '' }}{{ m['content'] }}{{ m.id }}{{ eos_token }}{% endfor %}{{ seen.n }}"
    "{% if documents is none %}-{% endif %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("name", list(MADE))
def test_tokens_and_texts_are_the_tokenizers_own(name):
    tokenizer = MADE[name]()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    direct = Direct(tokenizer)
    assert direct.encode(TEXTS) == ids
    only = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    assert direct.decode(ids) == [tokenizer.decode(row, **only) for row in ids]


def test_a_call_with_settings_leaves_no_trace():
    """The library below keeps the settings of the last call."""
    tokenizer, direct = build_tokenizer(), Direct(build_tokenizer())
    direct.tokenizer = tokenizer
    whole = direct.encode(TEXTS)
    tokenizer(TEXTS, truncation=True, max_length=2, padding="max_length")
    assert direct.encode(TEXTS) == whole and max(map(len, whole)) > 2
    tokenizer("a", split_special_tokens=True)
    assert direct.encode(TEXTS) == whole


@pytest.mark.parametrize("name", list(ROWS))
@pytest.mark.parametrize("answer_next", [False, True])
def test_a_template_writes_the_same(name, answer_next):
    tokenizer, (messages, options) = build_tokenizer(), ROWS[name]
    tokenizer.chat_template = TEMPLATE
    render, told = Renderer(tokenizer), {"tokenize": False, "add_generation_prompt": answer_next}
    assert render(messages, answer_next, options) == tokenizer.apply_chat_template(messages, **told, **options)


def test_a_tokenizer_with_ways_of_its_own_keeps_them():
    tokenizer = build_tokenizer()

    class Own(type(tokenizer)):
        def apply_chat_template(self, messages, **settings):
            return "own"

        def _decode(self, token_ids, **settings):
            return "own"

    tokenizer.__class__ = Own
    assert Renderer(tokenizer)(ASKED, False, {}) == "own" and Direct(tokenizer).decode([[5, 6]]) == ["own"]
