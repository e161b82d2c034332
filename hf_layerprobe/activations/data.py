"""Turns what callers have (texts, conversations, images, audio, a data set, a loader) into batches of model inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from ..errors import LayerProbeError
from .media import media_batches
from .rows import Sample, examples
from .text import Batch, is_conversation, padded, sequences, within

logger = logging.get_logger(__name__)


class Batches:
    """Batches of model inputs on the CPU, to be gone through once.

    Attributes:
        choices: What was decided about texts and token ids: `max_length`, and whether they were `packed`.
    """

    def __init__(self, rows: Iterable[Batch], **choices: Any):
        self._rows = iter(rows)
        self.choices = choices

    def __iter__(self) -> Iterator[Batch]:
        return self._rows


def batches(
    data: Any,
    model: nn.Module,
    tokenizer: Any = None,
    *,
    batch_size: int = 4,
    max_length: int = 512,
    pack: bool | None = None,
    max_tokens: int | None = None,
) -> Batches:
    """Batches of model inputs on the CPU.

    Args:
        data: A list or a `datasets` data set of rows, or anything that yields batches of model inputs: a list of dicts of
            tensors, a `DataLoader`, a Trainer's `get_eval_dataloader()`. A row is a text, a conversation (a list of
            messages, which goes through the chat template), or a mapping; of a mapping's columns are read `input_ids`,
            else `messages`, images or audio with the text beside them, `text`, or the only column of strings.
        model: Who they are for. The decoder of an encoder-decoder model that is fed texts or tokenised rows reads the
            same tokens, shifted right as the model does it.
        tokenizer: The model's tokenizer for texts, its processor for images and audio; left as it was.
        batch_size: Rows a batch, where batches are made here.
        max_length: Tokens a sequence at most; no more than the positions that the model has (by its config).
        pack: Join texts or conversations and cut them to full length, so that no token is padding; by default for
            decoder-only models. Otherwise each is one sequence, padded on the right and masked. Empty texts add nothing.
        max_tokens: Of texts and tokenised rows take no more tokens than this: packed ones are cut there, others are
            taken as long as they fit. What is batched already is not cut.

    Raises:
        LayerProbeError: No data, rows of an unknown form or without what the first row has, no tokenizer or processor
            for them, a model that needs something else, no room for a single sequence, or a size that is no positive
            number.
    """
    check_positive(batch_size=batch_size, max_length=max_length)
    if max_tokens is not None:
        check_positive(max_tokens=max_tokens)
    if data is None:
        raise LayerProbeError("This needs data: pass a list of texts with tokenizer=, or batches of model inputs.")
    max_length = longest(model, max_length)
    rows = examples(data)
    first = next(rows, None)
    if first is None:
        raise LayerProbeError("The data set is empty.")
    rows = chain([first], rows)
    if isinstance(first, str) or is_conversation(first):
        _check_reads_text(model)
        pack = _packs(model) if pack is None else pack
        chat = is_conversation(first)
        ids = sequences(rows, tokenizer, chat=chat, max_length=max_length, pack=pack, max_tokens=max_tokens)
        return Batches(padded(ids, model, tokenizer, batch_size), packed=pack, max_length=max_length)
    if isinstance(first, Sample):
        return Batches(media_batches(rows, model, tokenizer, batch_size=batch_size, max_length=max_length))
    if not isinstance(first, Mapping):
        raise LayerProbeError(
            f"data yields {type(first).__name__}; expected texts, conversations, or mappings of model inputs (name to "
            "tensor)."
        )
    if _is_row(first):
        taken = inspect.signature(model.forward).parameters
        if left := [name for name in first if name in taken and name not in ("input_ids", "attention_mask")]:
            logger.warning_once(
                f"Of tokenised rows input_ids are read alone, and {', '.join(left)} left out; pass batches for them to count."
            )
        ids = within((_row(row, i, max_length) for i, row in enumerate(rows)), max_tokens)
        return Batches(padded(ids, model, tokenizer, batch_size), packed=False, max_length=max_length)
    names = inspect.signature(model.forward).parameters
    return Batches(_batch(batch, names) for batch in rows)


def text_rows(data: Any) -> list[str]:
    """The texts of a list or data set, for what can only be measured on text.

    Raises:
        LayerProbeError: No texts.
    """
    texts = list(examples(data))
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


def check_positive(**sizes: int) -> None:
    """Refuses sizes that are no positive whole number.

    Raises:
        LayerProbeError: The message names the size.
    """
    for name, value in sizes.items():
        if not isinstance(value, Integral) or value < 1:
            raise LayerProbeError(f"{name} must be a positive whole number, got {value!r}.")


def _is_row(first: Mapping) -> bool:
    """Whether this is one sequence of token ids, rather than a batch of them."""
    ids = first.get("input_ids")
    if isinstance(ids, (list, tuple)):
        return not len(ids) or isinstance(ids[0], Integral)
    return getattr(ids, "ndim", None) == 1


def _row(row: Mapping, index: int, max_length: int) -> list[int]:
    if "input_ids" not in row:
        raise LayerProbeError(f"Row {index} of the data has no 'input_ids' as the first row has: it has {list(row)}.")
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
    return tensors if "decoder_input_ids" in names else _padded_on_the_right(tensors)


def _padded_on_the_right(batch: Batch) -> Batch:
    """Rows of token ids, with what was padded on their left moved behind them: a model of absolute positions (GPT-2) would
    count it, unless it is told the positions."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None or mask is None or mask.dim() != 2 or mask.shape != ids.shape or "position_ids" in batch:
        return batch
    padding = mask.bool().int().argmax(-1, keepdim=True)
    if not padding.any():
        return batch
    order = (torch.arange(mask.shape[1], device=mask.device) + padding) % mask.shape[1]
    by_token = {n: t for n, t in batch.items() if t.shape == mask.shape and not t.is_floating_point()}
    return {**batch, **{name: value.gather(1, order.to(value.device)) for name, value in by_token.items()}}


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
            "list of what its processor returns, or rows of images or audio with tokenizer=processor."
        )


def _packs(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return bool(getattr(model, "can_generate", lambda: False)()) and not getattr(config, "is_encoder_decoder", False)
