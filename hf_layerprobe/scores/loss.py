"""Token losses of language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..activations.data import Batch
from ..errors import LayerProbeError
from ..progress import progress
from ..stacks import LayerStack, bypassed

IGNORED = -100
# Logits are taken through the softmax this many rows at a time: in float32 they are the largest tensor of the pass.
ROWS = 512


def check_causal(model: PreTrainedModel) -> None:
    """Refuses models whose loss on a text is not that of predicting each next token.

    Raises:
        LayerProbeError: Not a causal language model.
    """
    if model.config.is_encoder_decoder or not model.can_generate():
        raise LayerProbeError(
            f"{type(model).__name__} is not a causal language model, so it has no perplexity on text."
        )


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the token losses in nats, `[]` float64.

    Args:
        logits: `[batch, tokens, vocabulary]`, already aligned with the labels.
        labels: `[batch, tokens]`; `IGNORED` where nothing is predicted.
    """
    total = torch.zeros((), dtype=torch.float64)
    for rows, targets in zip(logits.flatten(0, 1).split(ROWS), labels.flatten().split(ROWS), strict=True):
        losses = cross_entropy(rows.float(), targets, ignore_index=IGNORED, reduction="none")
        total += losses.sum(dtype=torch.float64).cpu()
    return total


def held_out_losses(
    stack: LayerStack, removals: Mapping[str, Sequence[int]], data: Sequence[Batch], *, max_tokens: int | None = None
) -> dict[str, float]:
    """Mean next-token loss (nats) of a decoder-only model under each removal, its layers bypassed in place.

    Raises:
        LayerProbeError: Not a causal language model.
    """
    model = stack.model
    check_causal(model)
    training = model.training
    model.eval()
    losses = {}
    try:
        for name, removed in progress(removals.items(), desc="Measuring plans", unit="plan"):
            total, tokens = 0.0, 0
            with bypassed(stack, removed), torch.no_grad():
                for batch in data:
                    ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
                    labels = torch.where(mask[:, 1:].bool(), ids[:, 1:], IGNORED)
                    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
                    total += summed_loss(logits, labels).item()
                    tokens += int((labels != IGNORED).sum())
                    if max_tokens is not None and tokens >= max_tokens:
                        break
            losses[name] = total / tokens
    finally:
        model.train(training)
    return losses
