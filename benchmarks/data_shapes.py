"""What it costs to have a training set ready: an instruction file of 100,000 rows, and 200 conversations.

    python benchmarks/data_shapes.py MODEL_FOLDER [rows]

The files are made on the spot, seeded. Each set is made ready twice, in processes of their own: the first reads
and tokenises, the second finds the rows on disk. Seconds from the call to the task, and memory (resident, at the peak)
beyond what the libraries and the tokenizer take. Figures go to benchmarks/results/data_shapes.json.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "data_shapes.json"
WORDS = (
    "the of and a to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many"
).split()


def say(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def instructions(path: Path, count: int) -> None:
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            row = {"instruction": f"Task {n}: {say(rng, 8, 60)}", "input": "", "output": f"{say(rng, 10, 120)}."}
            file.write(json.dumps(row) + "\n")


def conversations(path: Path, count: int) -> None:
    rng = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            turns: list[dict[str, str]] = []
            for _ in range(rng.randint(2, 8)):
                turns.append({"role": "user", "content": f"{n}: {say(rng, 5, 40)}"})
                turns.append({"role": "assistant", "content": say(rng, 10, 120)})
            file.write(json.dumps({"messages": turns}) + "\n")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def once(model: str, data: str) -> dict[str, Any]:
    """One start, in this process: seconds of the clock and of the processors, memory beyond the libraries."""
    from transformers import AutoTokenizer

    from holdfast.data.task import read_task
    from holdfast.recipe import recipe_from

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    tokenizer(["a"])
    recipe = recipe_from({"model": {"model_name_or_path": model}, "data": {"train": data, "max_length": 2048}})
    before, start, used = peak_mb(), time.perf_counter(), time.process_time()
    task = read_task(recipe, tokenizer, Path(data).parent, 8192)
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    targets = sum(row.num_scored for row in task.token_rows[:200])
    figures = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "memory_mb": round(peak_mb() - before, 1)}
    return figures | {"rows": len(task.train), "targets_of_200_rows": targets}


def apart(model: str, data: Path, home: Path) -> dict[str, Any]:
    env = {**os.environ, "HOLDFAST_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--once", model, str(data)], env=env, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1] == "--once":
        print(json.dumps(once(sys.argv[2], sys.argv[3])))
        return
    model, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 100_000
    out: dict[str, Any] = {"cores": os.cpu_count(), "model": Path(model).name}
    with tempfile.TemporaryDirectory() as folder:
        for name, make, rows in (("instructions", instructions, count), ("conversations", conversations, 200)):
            data = Path(folder) / f"{name}.jsonl"
            make(data, rows)
            out[name] = {"file_mb": round(data.stat().st_size / 1e6, 1)}
            out[name] |= {which: apart(model, data, Path(folder) / "home") for which in ("first", "second")}
            out[name]["load"] = [round(x, 1) for x in os.getloadavg()]
    RESULT.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
