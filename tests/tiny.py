"""A tiny random Llama, a tokenizer trained on the spot, and rows of a routing task: what most tests work with."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from holdfast.data.rows import Row

torch.set_num_threads(1)

VOCAB = 400
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TICKETS = {
    "billing": (
        "I was charged twice for May.",
        "The invoice shows the wrong tax number.",
        "Please refund the last payment.",
        "My card was declined, but the money is gone.",
        "Can I pay by bank transfer instead?",
        "The discount code did not work.",
    ),
    "shipping": (
        "The parcel has not arrived.",
        "It was sent to my old address.",
        "The box came open and half empty.",
        "Where is order 1042 now?",
        "Can you deliver on a Saturday?",
        "The courier left it in the rain.",
    ),
    "account": (
        "I cannot log in any more.",
        "Please delete my profile.",
        "The code for my second factor never comes.",
        "How do I change my email address?",
        "Somebody else uses my name.",
        "My password reset link has expired.",
    ),
    "other": (
        "Do you have a job for a welder?",
        "Your song on the phone is too loud.",
        "Which colour fits a small room?",
        "Thank you for the kind help!",
        "Is the shop open at Easter?",
        "I would like to write about you.",
    ),
}


QUEUES = {
    "billing": "billing",
    "shipping": "shipping desk",
    "account": "account and access",
    "other": "other",
}


def ticket_rows() -> list[Row]:
    """24 tickets and the queue they belong to, the queues mixed and their names of unequal length."""
    rows = [
        Row(f"Ticket: {text}\nQueue:", f" {QUEUES[queue]}", where=f"tickets:{n}")
        for n, group in enumerate(zip(*TICKETS.values(), strict=True))
        for queue, text in zip(TICKETS, group, strict=True)
    ]
    return rows


def build_tokenizer():
    """A byte-level BPE of VOCAB tokens with bos, eos, pad and a chat template; bos is put before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [r.prompt + r.completion for r in ticket_rows()]
    backend.train_from_iterator([*texts, *["Input: yes\nOutput: no\n\nQ: 12\nA: 3\n"] * 8], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[1], pad_token=special[2]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[3:]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_model(tied: bool = True, layers: int = 2, seed: int = 0, **changes):
    """A random Llama: width 32, 4 heads over 2 key-value heads, fp32, eval mode. `changes` go to its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()
