"""A fingerprint of the data that a model has run on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import LayerProbeError
from ..stacks import LayerStack
from ..stacks.adapters import base_modules
from .text import Batch

# So many values of each tensor, evenly spaced over it, tell two models apart.
VALUES = 256


class Fingerprint:
    """SHA-256 of a model's main inputs in their order, and how many there were.

    Token ids count without their padding, so that it is the same however the sequences were batched.

    Attributes:
        sequences: Number of rows seen.
    """

    def __init__(self, model: nn.Module):
        self._name = getattr(model, "main_input_name", "input_ids")
        self._digest = hashlib.sha256()
        self.sequences = 0

    def update(self, batch: Batch) -> None:
        if not batch:
            raise LayerProbeError("A batch holds no tensors; expected a mapping of model inputs (name to tensor).")
        main = batch.get(self._name, next(iter(batch.values()))).detach().cpu()
        mask = batch.get("attention_mask")
        padded = isinstance(mask, torch.Tensor) and mask.shape == main.shape
        mask = mask.detach().cpu().bool() if padded else None
        for index, row in enumerate(main):
            row = row if mask is None else row[mask[index]]
            self._digest.update(f"{row.dtype}{list(row.shape)}".encode())
            self._digest.update(row.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.sequences += len(main)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def digest(stack: LayerStack, batches: Iterable[Batch]) -> str:
    """SHA-256 of a stack's place, some values of each tensor of its model, the adapters that act, and all batches: what the
    files that a later run goes on from belong to."""
    found = hashlib.sha256(f"{type(stack.model).__name__} {stack.path} {stack.num_layers}".encode())
    for parameter in stack.model.parameters():
        values = parameter.detach().flatten()
        found.update(repr(values[:: max(1, values.numel() // VALUES)].tolist()).encode())
    for _, _, around in base_modules(stack.model):
        if around is not None:
            acting = [] if around.disable_adapters else around.active_adapters
            scaling = getattr(around, "scaling", {})
            found.update(repr([(name, scaling.get(name)) for name in acting]).encode())
    for batch in batches:
        for name, value in sorted(batch.items()):
            found.update(f"{name} {list(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def used_text(rows: Iterable[Batch], model: nn.Module) -> dict[str, Any]:
    """What sets of layers were measured on: `tokens`, `sequences` and a `fingerprint`, of batches of token ids."""
    fingerprint, tokens = Fingerprint(model), 0
    for batch in rows:
        fingerprint.update(batch)
        mask = batch.get("attention_mask")
        tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
    return {"tokens": tokens, "sequences": fingerprint.sequences, "fingerprint": fingerprint.hexdigest()}
