"""Token losses of language models."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..activations.data import Batch
from ..errors import LayerProbeError
from ..modes import evaluating

IGNORED = -100
# Logits are taken through the softmax this many rows at a time: in float32 they are the largest tensor of the pass.
ROWS = 512


def check_causal(model: PreTrainedModel) -> None:
    """Refuses models whose loss on a text is not that of predicting each next token.

    Whether a model sees the tokens that it is to predict is measured, not read from its config: a BERT with a language
    model head does unless it was told to be a decoder, and the field that says so means nothing in most other configs.

    Raises:
        LayerProbeError: Not a causal language model.
    """
    if model.config.is_encoder_decoder or not model.can_generate() or model.main_input_name != "input_ids":
        raise LayerProbeError(
            f"{type(model).__name__} is not a causal language model, so it has no perplexity on text."
        )
    ids = torch.arange(3, 11, device=model.device)[None]
    other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
    with evaluating(model), torch.no_grad():
        one, two = (model(input_ids=each).logits[:, :-1].float() for each in (ids, other))
    if one.isnan().any():
        raise LayerProbeError(
            f"{type(model).__name__} has logits that are no numbers (NaN) on eight tokens. Look at its weights, or run it in float32 "
            "or bfloat16."
        )
    # Equal to the bit in most causal models; the margin is for experts, whose groups change with the last token.
    margin = max(1e-3, 4 * torch.finfo(model.dtype).eps)
    if (one - two).abs().max() > margin * one.abs().max():
        raise LayerProbeError(
            f"{type(model).__name__} sees the tokens that it is to predict (another last token changes what it says before "
            "it), so its loss on a text is no perplexity. Load it as a decoder (is_decoder=True in its config) if it was "
            "trained as one."
        )


def next_tokens(batch: Batch) -> torch.Tensor:
    """What each position but the last predicts, `[batch, tokens - 1]`; `IGNORED` where it or what comes next is padding."""
    ids = batch["input_ids"]
    if (mask := batch.get("attention_mask")) is None:
        return ids[:, 1:]
    return ids[:, 1:].where((mask[:, 1:] * mask[:, :-1]).bool(), IGNORED)


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


def next_token_loss(model: PreTrainedModel, data: Iterable[Batch], *, max_tokens: int | None = None) -> float:
    """Mean next-token loss of a decoder-only model, nats; padding is neither read nor predicted.

    Raises:
        LayerProbeError: Data without two tokens in a row.
    """
    total, tokens = 0.0, 0
    with evaluating(model), torch.no_grad():
        for batch in data:
            ids = batch["input_ids"].to(model.device)
            mask = batch.get("attention_mask", torch.ones_like(ids)).to(model.device)
            labels = next_tokens(batch).to(model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            total += summed_loss(logits, labels).item()
            tokens += int((labels != IGNORED).sum())
            if max_tokens is not None and tokens >= max_tokens:
                break
    if not tokens:
        raise LayerProbeError(
            "No text to measure on has a second token, so there is nothing to predict. Pass longer texts."
        )
    return total / tokens
