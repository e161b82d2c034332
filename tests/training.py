"""What the tests of the callbacks share: data for tiny models, and what a Trainer has logged."""

from __future__ import annotations

import numpy as np
from datasets import Dataset
from transformers import TrainingArguments

from hf_layerprobe import score_layers

LENGTH, LAYERS = 6, 4
# Its name in older versions is deprecated in newer ones.
CHECKPOINTING = "activation_checkpointing"
if not hasattr(TrainingArguments, CHECKPOINTING):
    CHECKPOINTING = "gradient_checkpointing"
AVSS = [f"layerprobe/avss/layer_{i:02d}" for i in range(LAYERS)]


def rows(count: int, seed: int, padding: int = 0) -> Dataset:
    ids = np.random.default_rng(seed).integers(0, 64, (count, LENGTH))
    mask = np.ones_like(ids)
    mask[::2, LENGTH - padding :] = 0
    labels = np.where(mask, ids, -100)
    columns = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return Dataset.from_dict({name: array.tolist() for name, array in columns.items()})


def entries(trainer, part="layerprobe/"):
    return [e for e in trainer.state.log_history if any(name.startswith(part) for name in e)]


def steps(trainer, part):
    return [e["step"] for e in entries(trainer, part)]


def logged(entry, part="layerprobe/avss/"):
    return [value for name, value in entry.items() if name.startswith(part)]


def expected(trainer, by="avss", data=None):
    return score_layers(trainer.model, list(trainer.get_eval_dataloader(data)), by=by).values


def model_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
