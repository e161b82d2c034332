"""Texts, conversations and token ids as sequences of one length, packed or padded."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import LayerProbeError

Batch = dict[str, torch.Tensor]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    """Token ids of one text. A fast tokenizer's own truncation and padding, which every call sets, are put back."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = getattr(backend, "truncation", None), getattr(backend, "padding", None)
    try:
        # The warning about texts longer than the model's context does not apply: callers cut them.
        return tokenizer(text, verbose=False, **options)["input_ids"]
    finally:
        if backend is not None:
            backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
            backend.enable_padding(**padding) if padding else backend.no_padding()


def sequences(
    items: Iterable[Any], processor: Any, *, chat: bool, max_length: int, pack: bool, max_tokens: int | None
) -> Iterator[list[int]]:
    """Token ids of texts or of conversations, sequence by sequence.

    Args:
        items: Texts, or lists of messages, which go through the chat template.
        processor: A tokenizer, or a processor that has one.
        chat: Whether they are conversations.
        max_length: Tokens a sequence at most.
        pack: Join the items and cut them to full length; otherwise each is a sequence.
        max_tokens: How many tokens are wanted in all.

    Raises:
        LayerProbeError: No tokenizer or chat template, or items of several kinds.
    """
    tokenizer = _tokenizer_of(processor)
    limit = {} if pack else {"truncation": True, "max_length": max_length}

    def ids(index: int, item: Any) -> list[int]:
        if not (is_conversation(item) if chat else isinstance(item, str)):
            kind = "conversations" if chat else "texts"
            raise LayerProbeError(f"data mixes {kind} with {type(item).__name__} (row {index}).")
        if chat:  # the template frames it, special tokens included
            return token_ids(tokenizer, render(item, processor, index), add_special_tokens=False, **limit)
        # The tokens that frame an empty text say nothing about the model.
        return token_ids(tokenizer, item, **limit) if item else []

    rows = (ids(index, item) for index, item in enumerate(items))
    if not pack:
        return within(rows, max_tokens)
    separator = [] if chat or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return _packed((row + separator for row in rows if row), max_length, max_tokens)


def is_conversation(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and bool(item) and isinstance(item[0], Mapping) and "role" in item[0]


def render(messages: Sequence[Mapping], processor: Any, index: int, *, media: bool = False) -> str:
    """A conversation as the text that the model's chat template makes of it.

    Raises:
        LayerProbeError: No template, one that refuses this conversation, or parts that are not text unless `media`.
    """
    owner = processor if getattr(processor, "chat_template", None) else _tokenizer_of(processor)
    if not getattr(owner, "chat_template", None):
        raise LayerProbeError(
            f"data is conversations, and {type(owner).__name__} has no chat template. Set tokenizer.chat_template, or "
            "pass texts."
        )
    parts = [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]
    other = sorted({str(part.get("type")) for part in parts if part.get("type") != "text"})
    if other and not media:
        raise LayerProbeError(
            f"Conversation {index} has parts of type {other} and no column to take them from; pass rows with 'messages' "
            "and 'images' or 'audio', with tokenizer=processor."
        )
    try:
        return owner.apply_chat_template(list(messages), tokenize=False)
    except (TemplateError, KeyError, TypeError, ValueError) as error:
        raise LayerProbeError(f"The chat template refuses conversation {index}: {error}") from error


def within(rows: Iterable[Sequence[int]], max_tokens: int | None) -> Iterator[Sequence[int]]:
    """Whole sequences, with no more than `max_tokens` tokens in all.

    Raises:
        LayerProbeError: The first sequence is longer than that.
    """
    total = 0
    for row in rows:
        if not len(row):
            continue
        total += len(row)
        if max_tokens is not None and total > max_tokens:
            if total == len(row):
                raise LayerProbeError(
                    f"max_tokens={max_tokens} is less than the first sequence, which has {len(row)} tokens and is not cut. "
                    "Raise max_tokens, or pass a lower max_length."
                )
            return
        yield row


def padded(rows: Iterable[Sequence[int]], model: nn.Module, processor: Any, batch_size: int) -> Iterator[Batch]:
    """Sequences of token ids as right-padded batches; what the padding holds never counts."""
    pad = getattr(getattr(processor, "tokenizer", processor), "pad_token_id", None) or 0
    rows = iter(rows)
    while group := list(islice(rows, batch_size)):
        length = max(map(len, group))
        ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in group])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in group])
        yield {"input_ids": ids, "attention_mask": mask, **decoder_inputs(model, ids, mask)}


def decoder_inputs(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> Batch:
    """What the decoder of an encoder-decoder model reads: the tokens, shifted right as the model shifts its labels."""
    if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        return {}
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None) or getattr(model, "_shift_right", None)
    config = model.config
    if getattr(config, "decoder_start_token_id", None) is None:
        config = getattr(config, "text_config", config)
    start = getattr(config, "decoder_start_token_id", None)
    shifted = {}
    if shift is not None:
        shifted["decoder_input_ids"] = shift(torch.where(mask.bool(), ids, -100))
    elif start is not None:  # M2M100 and Whisper shift inside of forward, and labels alone
        ids = torch.where(mask.bool(), ids, config.pad_token_id or 0)
        shifted["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
    return {**shifted, "decoder_attention_mask": mask}


def _packed(rows: Iterable[list[int]], length: int, max_tokens: int | None) -> Iterator[list[int]]:
    """All tokens in sequences of full length, the last one shorter; no more than `max_tokens` in all."""
    tokens = islice(chain.from_iterable(rows), max_tokens)
    while row := list(islice(tokens, length)):
        yield row


def _tokenizer_of(processor: Any) -> PreTrainedTokenizerBase:
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "eos_token_id"):
        found = "" if processor is None else f", and {type(processor).__name__} has none"
        raise LayerProbeError(f"data is texts or conversations, so a tokenizer is needed{found}: pass tokenizer=.")
    return tokenizer
