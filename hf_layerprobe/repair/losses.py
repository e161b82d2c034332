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
from ..scores.loss import IGNORED, check_causal, next_tokens, summed_loss

LABELS, NEXT, DISTANCE = "labels", "next token", "distance to the original"


def predicts_next(model: PreTrainedModel) -> bool:
    """Whether it is a causal language model."""
    try:
        check_causal(model)
    except LayerProbeError:
        return False
    return True


def counted(batch: Batch, model: PreTrainedModel) -> torch.Tensor | None:
    """Which rows of a model's output are no padding, `[batch, tokens]`; None for all. Of two sequences, the decoder's is answered."""
    return batch.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")


def value_errors(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared errors of single values (a reward, a regression), relative to the mean square of what is wanted, `[...]`."""
    wanted, found = wanted.float().squeeze(-1), found.float().squeeze(-1)
    return (found - wanted).square() / wanted.square().mean().clamp_min(1e-6)


class HeldOutLoss:
    """The loss that has to fall for a repair to be kept.

    With labels in the batches, the model's own loss; for causal language models the next-token loss; for any other model
    the distance of its outputs from the original's: the Kullback-Leibler divergence of what its logits say, or the
    relative squared error of its hidden states, or of its values where it has one output.

    Args:
        original: The untouched model.
        batches: Held-out batches.

    Attributes:
        name: `"labels"`, `"next token"` or `"distance to the original"`.
        shifts: Whether a label is predicted at the position before it.
    """

    def __init__(self, original: PreTrainedModel, batches: Sequence[Batch]):
        self.original = original
        self.batches = batches
        self.shifts = predicts_next(original)
        if all("labels" in batch for batch in batches):
            self.name = LABELS
        else:
            self.name = NEXT if self.shifts else DISTANCE

    def of(self, model: PreTrainedModel) -> float:
        """Mean loss of a model.

        Raises:
            LayerProbeError: Nothing in the batches counts.
        """
        total, count = 0.0, 0
        torch.clear_autocast_cache()  # under a caller's autocast, copies of weights that have changed since
        with evaluating(model, self.original), torch.no_grad():
            for batch in self.batches:
                inputs = {name: value.to(model.device) for name, value in batch.items()}
                loss, weight = self.sums(batch, model(**inputs), self.wanted(batch))
                total, count = total + loss, count + weight
        if not count:
            raise LayerProbeError(
                f"Nothing that is held out counts for the loss ({self.name}): every label is {IGNORED}, or every row is padding or "
                "one token. Pass data in which there is something to predict."
            )
        return total / count

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
            labels = batch["labels"][:, 1:] if self.shifts else batch["labels"]  # no model predicts its first token
            count = int((labels != IGNORED).sum())
            return found.loss.item() * count if count else 0.0, count
        if self.name == NEXT:
            labels = next_tokens(batch).to(found.logits.device)
            return summed_loss(found.logits[:, :-1], labels).item(), int((labels != IGNORED).sum())
        if "logits" not in found:
            wanted, found = (each[0].float() for each in (wanted, found))
            distances = (found - wanted).square().sum(-1) / wanted.square().sum(-1)
        elif found.logits.shape[-1] == 1:
            distances = value_errors(found.logits, wanted.logits)
        else:
            wanted, found = (log_softmax(each.logits.float(), dim=-1) for each in (wanted, found))
            distances = (wanted.exp() * (wanted - found)).sum(-1)
        mask = counted(batch, self.original)
        if mask is not None and mask.shape == distances.shape:
            distances = distances[mask.bool().to(distances.device)]
        return distances.sum().item(), distances.numel()
