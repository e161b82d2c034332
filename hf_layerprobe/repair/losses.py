"""What a repair is judged by, on held-out batches: the model's own loss, or how far its outputs are from the original's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from ..activations.text import Batch
from ..errors import LayerProbeError
from ..modes import evaluating
from ..scores.loss import IGNORED, check_causal, next_token_loss


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
            self.name = "labels"
            return
        self.name = "next token"
        try:
            check_causal(original)
        except LayerProbeError:
            self.name = "distance to the original"

    def of(self, model: PreTrainedModel) -> float:
        """Mean loss of a model."""
        if self.name == "next token":
            return next_token_loss(model, self.batches)
        total, count = 0.0, 0
        with evaluating(model, self.original), torch.no_grad():
            for batch in self.batches:
                inputs = {name: value.to(model.device) for name, value in batch.items()}
                if self.name == "labels":
                    loss, weight = model(**inputs).loss, int((inputs["labels"] != IGNORED).sum())
                else:
                    loss, weight = self._distance(model, inputs)
                total, count = total + loss.item() * weight, count + weight
        return total / max(count, 1)

    def _distance(self, model: PreTrainedModel, inputs: Batch) -> tuple[torch.Tensor, int]:
        wanted, found = self.original(**inputs), model(**inputs)
        if "logits" in found:
            wanted, found = (log_softmax(each.logits.float(), dim=-1) for each in (wanted, found))
            distances = (wanted.exp() * (wanted - found)).sum(-1)
        else:
            wanted, found = (each[0].float() for each in (wanted, found))
            distances = (found - wanted).square().sum(-1) / wanted.square().sum(-1)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape == distances.shape:
            distances = distances[mask.bool()]
        return distances.mean(), distances.numel()
