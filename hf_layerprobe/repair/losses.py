"""What a repair is judged by, on held-out batches: the model's own loss, or how far its outputs are from the original's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from ..activations.text import Batch
from ..errors import LayerProbeError
from ..modes import evaluating
from ..scores.loss import IGNORED, check_causal, summed_loss

LABELS, NEXT, DISTANCE = "labels", "next token", "distance to the original"


def predicts_next(model: PreTrainedModel) -> bool:
    """Whether it is a causal language model."""
    try:
        check_causal(model)
    except LayerProbeError:
        return False
    return True


class HeldOutLoss:
    """The loss that has to fall for a repair to be kept.

    With labels in the batches, the model's own loss; for causal language models the next-token loss; for any other model
    the distance of its outputs from the original's: the Kullback-Leibler divergence of what its logits say, or the
    relative squared error of its hidden states.

    Args:
        original: The untouched model.
        batches: Held-out batches.

    Attributes:
        name: `"labels"`, `"next token"` or `"distance to the original"`.
    """

    def __init__(self, original: PreTrainedModel, batches: Sequence[Batch]):
        self.original = original
        self.batches = batches
        if all("labels" in batch for batch in batches):
            self.name = LABELS
            return
        self.name = NEXT if predicts_next(original) else DISTANCE

    def of(self, model: PreTrainedModel) -> float:
        """Mean loss of a model."""
        total, count = 0.0, 0
        torch.clear_autocast_cache()  # under a caller's autocast, copies of weights that have changed since
        with evaluating(model, self.original), torch.no_grad():
            for batch in self.batches:
                inputs = {name: value.to(model.device) for name, value in batch.items()}
                loss, weight = self.sums(batch, model(**inputs), self.wanted(batch))
                total, count = total + loss, count + weight
        return total / max(count, 1)

    def wanted(self, batch: Batch) -> Any:
        """The original's output, where the loss is the distance from it; else None."""
        if self.name != DISTANCE:
            return None
        return self.original(**{name: value.to(self.original.device) for name, value in batch.items()})

    def sums(self, batch: Batch, found: Any, wanted: Any) -> tuple[float, int]:
        """Summed loss of a batch, and how much it counts.

        Args:
            batch: The batch.
            found: The model's output.
            wanted: The original's, for the distance.
        """
        if self.name == LABELS:
            count = int((batch["labels"] != IGNORED).sum())
            return found.loss.item() * count if count else 0.0, count
        if self.name == NEXT:
            ids = batch["input_ids"]
            mask = batch.get("attention_mask", torch.ones_like(ids))
            labels = torch.where(mask[:, 1:].bool(), ids[:, 1:], IGNORED).to(found.logits.device)
            return summed_loss(found.logits[:, :-1], labels).item(), int((labels != IGNORED).sum())
        if "logits" in found:
            wanted, found = (log_softmax(each.logits.float(), dim=-1) for each in (wanted, found))
            distances = (wanted.exp() * (wanted - found)).sum(-1)
        else:
            wanted, found = (each[0].float() for each in (wanted, found))
            distances = (found - wanted).square().sum(-1) / wanted.square().sum(-1)
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == distances.shape:
            distances = distances[mask.bool().to(distances.device)]
        return distances.sum().item(), distances.numel()
