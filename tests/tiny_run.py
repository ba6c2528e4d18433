"""A run that takes a second: the tiny model on disk, tickets in a file, two items of each measured task."""

import json
from pathlib import Path
from types import SimpleNamespace

import yaml

from holdfast import models

POSITIONS = 4096  # room for few-shot prompts in a vocabulary of 400


def make_world(folder: Path, model, tokenizer, rows) -> SimpleNamespace:
    """Save base model and data under `folder`; returns their paths."""
    model.config.max_position_embeddings = POSITIONS
    models.save_model(model, tokenizer, folder / "base", card=None)
    return SimpleNamespace(folder=folder, base=folder / "base", train=write_rows(folder / "train.jsonl", rows))


def write_rows(path: Path, rows) -> Path:
    lines = [json.dumps({"text": r.prompt, "queue": r.completion.strip()}) for r in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe_data(world, out: Path, **changes) -> dict:
    """A recipe as a mapping; `changes` are merged into its sections, and `plan` replaces the plan."""
    data = {
        "model": {"model_name_or_path": str(world.base), "dtype": "float32"},
        "data": {
            "train": str(world.train),
            "prompt": "{text}",
            "completion": " {queue}",
            "validation_size": 6,
        },
        "training": {
            "output_dir": str(out),
            "max_steps": 8,
            "save_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
        },
        "plan": [{"LoRA": {"r": 2}}],
        "measure": {"limit": 2, "num_fewshot": 1},
    }
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and key in data else value
    return data


def write_recipe(path: Path, data: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path
