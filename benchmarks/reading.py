"""What it costs to read conversations, and how much of it is the look for what a chat template loses.

    python benchmarks/reading.py [rows]

Seconds of one core, the best of three, on made-up conversations: two renderings a row alone (what any reader must do
that needs prompt and answer apart), and `read_rows`.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.data.rows import read_rows

TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]


def build_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    made = PreTrainedTokenizerFast(tokenizer_object=backend)
    made.chat_template = TEMPLATE
    return made


def say(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices("the of and a to in is you that it he was for on are as with".split(), k=words))


def turns(rng: random.Random, count: int) -> dict[str, Any]:
    messages = [{"role": "system", "content": say(rng, 8)}]
    for _ in range(count):
        messages.append({"role": "user", "content": say(rng, 30)})
        messages.append({"role": "assistant", "content": say(rng, 60)})
    return {"messages": messages}


def agent(rng: random.Random, calls: int) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": say(rng, 20)}]
    for _ in range(calls):
        call = {"function": {"name": "weather", "arguments": {"city": say(rng, 2)}}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "content": say(rng, 10)})
    return {"messages": [*messages, {"role": "assistant", "content": say(rng, 20)}], "tools": TOOLS}


def best(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def measure(rows: list[dict[str, Any]], tokenizer: Any, folder: Path) -> tuple[float, float]:
    """Seconds of the renderings alone, and of reading the file."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def render() -> None:
        for row in rows:
            for messages, asking in ((row["messages"][:-1], True), (row["messages"], False)):
                tokenizer.apply_chat_template(
                    messages, tools=row.get("tools"), tokenize=False, add_generation_prompt=asking
                )

    return best(render), best(lambda: read_rows("rows.jsonl", base_dir=folder, tokenizer=tokenizer, notes=[]))


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20000
    rng, tokenizer = random.Random(0), build_tokenizer()
    kinds = {
        "one turn": [turns(rng, 1) for _ in range(count)],
        "1 to 8 turns": [turns(rng, rng.randint(1, 8)) for _ in range(count // 4)],
        "1 to 4 tool calls": [agent(rng, rng.randint(1, 4)) for _ in range(count // 4)],
    }
    print("| conversations | rows | rendering alone | read_rows |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in kinds.items():
            alone, whole = measure(rows, tokenizer, Path(folder))
            print(f"| {name} | {len(rows):,} | {alone:.2f} s | {whole:.2f} s |")


if __name__ == "__main__":
    main()
