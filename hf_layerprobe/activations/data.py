"""Turns what callers have (texts, a data set, a loader) into batches of model inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import LayerProbeError

Batch = dict[str, torch.Tensor]


def batches(
    data: Any,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    batch_size: int = 4,
    max_length: int = 512,
    pack: bool | None = None,
) -> Iterator[Batch]:
    """Batches of model inputs on the CPU.

    Args:
        data: A list of texts or a `datasets.Dataset` (column `text`, its only string column, or `input_ids`), or
            anything that yields model inputs: a list of dicts of tensors, a `DataLoader`.
        model: Who they are for.
        tokenizer: Needed for texts.
        batch_size: Sequences a batch, for texts and tokenised rows.
        max_length: Tokens a sequence at most.
        pack: Join the texts and cut them to full length, so that no token is padding; by default for decoder-only
            models. Otherwise one text is one sequence, padded on the right and masked.

    Raises:
        LayerProbeError: No data, texts without a tokenizer, or rows of an unknown form.
    """
    if data is None:
        raise LayerProbeError("This needs data: pass a list of texts with tokenizer=, or batches of model inputs.")
    if isinstance(data, str):
        raise LayerProbeError("data is one string; pass a list of texts.")
    rows = iter(_rows_of(data) if isinstance(data, (Dataset, IterableDataset)) else data)
    first = next(rows, None)
    if first is None:
        raise LayerProbeError("The data set is empty.")
    rows = chain([first], rows)
    if isinstance(first, str):
        rows = _tokenized(rows, tokenizer, max_length, _packs(model) if pack is None else pack)
        return _padded(rows, tokenizer, batch_size)
    if not isinstance(first, Mapping):
        raise LayerProbeError(
            f"data yields {type(first).__name__}; expected texts, or mappings of model inputs (name to tensor)."
        )
    if isinstance(first.get("input_ids"), (list, tuple)) or _is_row(first):
        return _padded((_row(row, max_length) for row in rows), tokenizer, batch_size)
    return ({name: value for name, value in batch.items() if isinstance(value, torch.Tensor)} for batch in rows)


def text_rows(data: Any) -> list[str]:
    """The texts of a list or data set, for what can only be measured on text.

    Raises:
        LayerProbeError: No texts.
    """
    if isinstance(data, str) or data is None:
        raise LayerProbeError(f"Expected a list of texts, got {'one string' if data else 'nothing'}.")
    texts = list(_rows_of(data) if isinstance(data, (Dataset, IterableDataset)) else data)
    if not all(isinstance(text, str) for text in texts):
        raise LayerProbeError("Expected texts: a list of strings, or a data set with one string column.")
    return texts


def _rows_of(data: Dataset | IterableDataset) -> Iterable[Any]:
    """Texts, or rows with token ids, of a data set."""
    columns = list(data.features or next(iter(data)).keys())
    if "input_ids" in columns:
        return data
    features = data.features or {}
    strings = [name for name in columns if getattr(features.get(name), "dtype", None) == "string"]
    column = "text" if "text" in columns else strings[0] if len(strings) == 1 else None
    if column is None:
        raise LayerProbeError(
            f"The data set has columns {columns}; expected 'input_ids', 'text' or exactly one string column. Select or "
            "rename one, for example dataset.rename_column('passage', 'text')."
        )
    return (row[column] for row in data)


def _is_row(first: Mapping) -> bool:
    ids = first.get("input_ids")
    return isinstance(ids, torch.Tensor) and ids.dim() == 1


def _row(row: Mapping, max_length: int) -> list[int]:
    ids = torch.as_tensor(row["input_ids"])
    if "attention_mask" in row:  # a row padded by whoever tokenised it
        ids = ids[torch.as_tensor(row["attention_mask"]).bool()]
    return ids[:max_length].tolist()


def _packs(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return bool(getattr(model, "can_generate", lambda: False)()) and not getattr(config, "is_encoder_decoder", False)


def _tokenized(texts: Iterable[str], tokenizer, max_length: int, pack: bool) -> Iterator[list[int]]:
    if tokenizer is None:
        raise LayerProbeError("data is a list of texts, so a tokenizer is needed: pass tokenizer=.")
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    buffer: list[int] = []
    for text in texts:
        if not isinstance(text, str):
            raise LayerProbeError(f"data mixes texts with {type(text).__name__}.")
        if not pack:
            yield tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
            continue
        # The warning about texts longer than the model's context does not apply: they are cut below.
        buffer += tokenizer(text, verbose=False)["input_ids"] + separator
        while len(buffer) >= max_length:
            yield buffer[:max_length]
            buffer = buffer[max_length:]
    if buffer:
        yield buffer


def _padded(rows: Iterable[Sequence[int]], tokenizer, batch_size: int) -> Iterator[Batch]:
    """Sequences of token ids as right-padded batches; what the padding holds never counts."""
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    rows = (row for row in rows if len(row))
    while group := list(islice(rows, batch_size)):
        length = max(map(len, group))
        yield {
            "input_ids": torch.tensor([[*row, *[pad] * (length - len(row))] for row in group]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in group]),
        }
