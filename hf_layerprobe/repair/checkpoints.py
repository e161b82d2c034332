"""What is looked at before a training starts: whether it can learn anything, and whose checkpoints it would go on from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..activations.fingerprint import digest
from ..activations.text import Batch
from ..errors import LayerProbeError
from ..files import write_atomically
from ..stacks import LayerStack
from .losses import predicts_next
from .settings import Finetune, Lora

# Settings that may change between a run and the one that goes on from its checkpoints.
FREE = ("steps", "minutes", "output_dir", "adapter_dir", "arguments")


def check_training(original: LayerStack, batches: Sequence[Batch], settings: Finetune) -> None:
    """Refuses what would fail after minutes.

    Raises:
        LayerProbeError: No gradients, nothing to learn from, or no place for the adapter.
    """
    if torch.is_inference_mode_enabled():
        raise LayerProbeError(
            f"repair={settings.name!r} needs gradients, which torch.inference_mode() rules out; call it outside."
        )
    if not settings.teacher and not predicts_next(original.model) and not all("labels" in row for row in batches):
        raise LayerProbeError(
            f"{type(original.model).__name__} does not predict next tokens, so without a teacher the batches need labels to "
            "learn from. Pass batches with labels, or leave teacher=False out."
        )
    if isinstance(settings, Lora) and settings.adapter_dir is not None and Path(settings.adapter_dir).is_file():
        raise LayerProbeError(f"{settings.adapter_dir} exists and is no folder; name another adapter_dir.")


def checkpoint_folder(
    original: LayerStack, keep: Sequence[int], batches: Sequence[Batch], settings: Finetune
) -> Path | None:
    """The folder of a stack's checkpoints; None where they are not kept.

    Raises:
        LayerProbeError: It holds those of another repair.
    """
    if settings.output_dir is None:
        return None
    about = {
        "model and data": digest(original, batches),
        "kept layers": list(keep),
        "method": settings.name,
        "settings": {name: value for name, value in asdict(settings).items() if name not in FREE},
    }
    folder = Path(settings.output_dir, original.path)
    file = folder / "repair.json"
    if not file.is_file():
        write_atomically(file, json.dumps(about, indent=1) + "\n")
        return folder
    found = json.loads(file.read_text(encoding="utf-8"))
    if other := [name for name in about if found.get(name) != about[name]]:
        raise LayerProbeError(
            f"{folder} holds the checkpoints of another repair (other {', '.join(other)}), so this one cannot go on from "
            "them. Name another output_dir, or delete that folder."
        )
    return folder
