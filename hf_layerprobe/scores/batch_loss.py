"""The loss of a batch, for scores that need one."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from ..activations.forward import without_cache
from ..activations.text import Batch
from ..errors import LayerProbeError
from ..precision import widest
from .loss import IGNORED, ROWS, check_causal, next_tokens

PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id")


class BatchLoss:
    """Computes a batch's loss as a sum over its labels.

    A causal language model predicts each next token, of the labels if the batch has them. Any other model gives its own
    loss, for which the batch needs labels.
    """

    def __init__(self, model: PreTrainedModel):
        # Every bypassed layer would be a graph of its own, so that nothing is won by the compiled one.
        self.model = model = getattr(model, "_orig_mod", model)
        self._fixed = without_cache(model)
        generates = getattr(model, "can_generate", lambda: False)() and not model.config.is_encoder_decoder
        self._causal = generates and model.main_input_name == "input_ids"
        self._checked = False
        self._shifts: bool | None = None  # known from the first batch with labels

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the losses in nats, `[]`, and number of labels that count, `[]`.

        Raises:
            LayerProbeError: No labels for a model that does not predict the next token.
        """
        labels = batch.get("labels")
        if self._causal and "input_ids" in batch:
            if labels is None:
                return self._next_token_loss(batch, self._next_tokens(batch))
            if self._shifts is None:
                self._shifts = self._compare(batch)
            if self._shifts:
                return self._next_token_loss(batch, labels)
        loss = None if labels is None else self.model(**batch, **self._fixed).loss
        if loss is None:
            raise LayerProbeError(
                f"This score needs a loss, and {type(self.model).__name__}, which is not a causal language model, has none "
                f"without labels. Pass batches with labels; this one has {list(batch)}."
            )
        number = (labels != IGNORED).sum()
        summed = getattr(self.model.config, "ctc_loss_reduction", None) == "sum"
        return (loss if summed else loss * number), number

    def _compare(self, batch: Batch) -> bool:
        """Whether the model's own loss is that of each next label: XLM's, BART's decoder's and others' labels are not shifted."""
        with torch.no_grad():
            own = self.model(**batch, **self._fixed).loss
            total, number = self._next_token_loss(batch, batch["labels"])
        # What experts add for their balance is little beside it.
        return own is None or not number or bool((own - total / number).abs() <= 0.05 * own.abs())

    def _next_tokens(self, batch: Batch) -> torch.Tensor:
        if not self._checked:
            check_causal(self.model)
            self._checked = True
        ids, labels = batch["input_ids"], pad(next_tokens(batch), (1, 0), value=IGNORED)
        for name in PLACEHOLDERS:  # where images and sounds go; nobody predicts them
            if isinstance(place := getattr(self.model.config, name, None), int):
                labels = torch.where(ids == place, IGNORED, labels)
        return labels

    def _next_token_loss(self, batch: Batch, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = self.model(**inputs, **self._fixed).logits[:, :-1]  # [batch, tokens - 1, vocabulary]
        labels = labels[:, 1:].to(logits.device)
        total = logits.new_zeros((), dtype=widest(logits.device))
        for rows, targets in zip(logits.flatten(0, 1).split(ROWS), labels.flatten().split(ROWS), strict=True):
            losses = cross_entropy(rows.float(), targets, ignore_index=IGNORED, reduction="none")
            total = total + losses.sum(dtype=total.dtype)
        return total, (labels != IGNORED).sum()


def check_counted(labels: torch.Tensor) -> float:
    """The number of labels in all the data, if there were any.

    Raises:
        LayerProbeError: There were none.
    """
    if not labels:
        raise LayerProbeError(
            "The data have nothing to predict: no label counts, or no text has a second token. Pass longer texts."
        )
    return float(labels)
