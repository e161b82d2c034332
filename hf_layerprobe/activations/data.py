"""Turns what callers have (texts, a data set, a loader) into batches of model inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from numbers import Integral
from typing import Any

import numpy as np
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
        model: Who they are for. The decoder of an encoder-decoder model that is fed texts or tokenised rows reads the
            same tokens, shifted right as the model does it.
        tokenizer: Needed for texts; left as it was.
        batch_size: Sequences a batch, for texts and tokenised rows.
        max_length: Tokens a sequence at most; no more than the positions that the model has (by its config).
        pack: Join the texts and cut them to full length, so that no token is padding; by default for decoder-only
            models. Otherwise one text is one sequence, padded on the right and masked. Empty texts add nothing.

    Raises:
        LayerProbeError: No data, texts without a tokenizer or for a model that needs images or audio, rows of an
            unknown form, or a size that is no positive number.
    """
    check_positive(batch_size=batch_size, max_length=max_length)
    if data is None:
        raise LayerProbeError("This needs data: pass a list of texts with tokenizer=, or batches of model inputs.")
    max_length = longest(model, max_length)
    rows = _examples(data)
    first = next(rows, None)
    if first is None:
        raise LayerProbeError("The data set is empty.")
    rows = chain([first], rows)
    if isinstance(first, str):
        _check_reads_text(model)
        rows = _tokenized(rows, tokenizer, max_length, _packs(model) if pack is None else pack)
        return _padded(rows, model, tokenizer, batch_size)
    if not isinstance(first, Mapping):
        raise LayerProbeError(
            f"data yields {type(first).__name__}; expected texts, or mappings of model inputs (name to tensor)."
        )
    if _is_row(first):
        return _padded((_row(row, max_length) for row in rows), model, tokenizer, batch_size)
    names = inspect.signature(model.forward).parameters
    return (_batch(batch, names) for batch in rows)


def text_rows(data: Any) -> list[str]:
    """The texts of a list or data set, for what can only be measured on text.

    Raises:
        LayerProbeError: No texts.
    """
    texts = list(_examples(data))
    if not all(isinstance(text, str) for text in texts):
        raise LayerProbeError("Expected texts: a list of strings, or a data set with one string column.")
    return texts


def longest(model: nn.Module, max_length: int) -> int:
    """`max_length`, or the number of positions that a text model has where those are fewer."""
    config = getattr(model, "config", None)
    try:
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    except (AttributeError, ValueError):  # no config of Transformers; or several text models
        return max_length
    if not isinstance(positions, int) or positions < 1:
        return max_length
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding index.
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            positions = min(positions, module.num_embeddings - module.padding_idx - 1)
    return min(max_length, positions)


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


def check_positive(**sizes: int) -> None:
    """Refuses sizes that are no positive whole number.

    Raises:
        LayerProbeError: The message names the size.
    """
    for name, value in sizes.items():
        if not isinstance(value, Integral) or value < 1:
            raise LayerProbeError(f"{name} must be a positive whole number, got {value!r}.")


def _examples(data: Any) -> Iterator[Any]:
    """Texts, tokenised rows or batches, whatever the container."""
    if isinstance(data, str) or data is None:
        raise LayerProbeError(f"Expected a list of texts, got {'nothing' if data is None else 'one string'}.")
    if isinstance(data, Mapping):
        splits = any(isinstance(value, (Dataset, IterableDataset)) for value in data.values())
        advice = "pass one split, such as data[{!r}]" if splits else "pass a list with one batch, [data]"
        raise LayerProbeError(
            f"data is a {type(data).__name__} with {list(data)}, of which only the names would be read; "
            f"{advice.format(next(iter(data), None))}."
        )
    try:
        return iter(_rows_of(data) if isinstance(data, (Dataset, IterableDataset)) else data)
    except TypeError:
        raise LayerProbeError(
            f"data is a {type(data).__name__}; expected a list of texts, a data set, or batches of model inputs."
        ) from None


def _rows_of(data: Dataset | IterableDataset) -> Iterable[Any]:
    """Texts, or rows with token ids, of a data set."""
    if data.features:
        kinds = {name: getattr(feature, "dtype", None) for name, feature in data.features.items()}
    else:  # a stream of unknown form tells by its first row
        kinds = {name: "string" if isinstance(value, str) else None for name, value in next(iter(data), {}).items()}
    if not kinds or "input_ids" in kinds:
        return data
    strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    column = "text" if "text" in kinds else strings[0] if len(strings) == 1 else None
    if column is None:
        raise LayerProbeError(
            f"The data set has columns {list(kinds)}; expected 'input_ids', 'text' or exactly one string column. Select "
            "or rename one, for example dataset.rename_column('passage', 'text')."
        )
    return (row[column] for row in data)


def _is_row(first: Mapping) -> bool:
    """Whether this is one sequence of token ids, rather than a batch of them."""
    ids = first.get("input_ids")
    if isinstance(ids, (list, tuple)):
        return not len(ids) or isinstance(ids[0], Integral)
    return getattr(ids, "ndim", None) == 1


def _row(row: Mapping, max_length: int) -> list[int]:
    ids = torch.as_tensor(row["input_ids"])
    if "attention_mask" in row:  # a row padded by whoever tokenised it
        ids = ids[torch.as_tensor(row["attention_mask"]).bool()]
    return ids[:max_length].tolist()


def _batch(batch: Mapping, names: Iterable[str]) -> Batch:
    """The tensors of a batch, and what else the model takes by name as tensors."""
    tensors = {}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif name in names and isinstance(value, (list, tuple, np.ndarray)):
            try:
                tensor = torch.as_tensor(np.asarray(value))
            except (TypeError, ValueError) as error:
                raise LayerProbeError(
                    f"{name!r} of a batch is a {type(value).__name__} that makes no tensor ({error}); pad its rows to "
                    "one length, or pass one row a mapping."
                ) from None
            # Python's numbers are float64 to NumPy, and models have float32 or less.
            tensors[name] = tensor.float() if tensor.dtype == torch.float64 else tensor
    return tensors


def _check_reads_text(model: nn.Module) -> None:
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
    needed = [
        name for name, p in parameters.items() if p.kind is plain and p.default is p.empty and name != "input_ids"
    ]
    if main != "input_ids" and "input_ids" not in parameters:
        needed = [main, *needed]
    if needed:
        raise LayerProbeError(
            f"data is texts, and {type(model).__name__} needs {', '.join(needed)}; pass batches of its inputs, such as a "
            "list of what its processor returns."
        )


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
        if not text:
            continue  # the tokens that frame it say nothing about the model
        if not pack:
            yield token_ids(tokenizer, text, truncation=True, max_length=max_length)
            continue
        buffer += token_ids(tokenizer, text) + separator
        while len(buffer) >= max_length:
            yield buffer[:max_length]
            buffer = buffer[max_length:]
    if buffer:
        yield buffer


def _padded(rows: Iterable[Sequence[int]], model: nn.Module, tokenizer, batch_size: int) -> Iterator[Batch]:
    """Sequences of token ids as right-padded batches; what the padding holds never counts."""
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    rows = (row for row in rows if len(row))
    while group := list(islice(rows, batch_size)):
        length = max(map(len, group))
        ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in group])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in group])
        yield {"input_ids": ids, "attention_mask": mask, **_decoder_inputs(model, ids, mask)}


def _decoder_inputs(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> Batch:
    """What the decoder of an encoder-decoder model reads: the tokens, shifted right as the model shifts its labels."""
    if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        return {}
    # Models without either shift their input ids themselves.
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None) or getattr(model, "_shift_right", None)
    shifted = {} if shift is None else {"decoder_input_ids": shift(torch.where(mask.bool(), ids, -100))}
    return {**shifted, "decoder_attention_mask": mask}
