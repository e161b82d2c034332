"""Finds in the rows of a list or data set what a model can read: texts, conversations, images, audio, token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from typing import Any

import numpy as np
import torch
from datasets import Audio, Dataset, Image, IterableDataset, List
from transformers.image_utils import is_pil_image

from ..errors import LayerProbeError

# Names that win where several columns hold the same kind of thing.
USUAL = {
    "text": ("text",),
    "messages": ("messages",),
    "image": ("image", "images"),
    "audio": ("audio",),
    "label": ("labels", "label"),
}


READABLE = {"text", "messages", "image", "audio"}


@dataclass
class Sample:
    """One row of several modalities, for a processor.

    Attributes:
        images: Images of the row, as its column holds them.
        audio: `(samples, sampling rate)`.
        text: A text that goes with them.
        messages: A conversation about them.
        label: Class of the row.
    """

    images: Any = None
    audio: tuple[np.ndarray, int] | None = None
    text: str | None = None
    messages: list | None = None
    label: int | None = None


def examples(data: Any) -> Iterator[Any]:
    """What the data hold, whatever the container: texts, conversations (lists of messages), `Sample`s, or mappings.

    Raises:
        LayerProbeError: No container of examples, or rows of an unknown form.
    """
    if isinstance(data, str) or data is None:
        raise LayerProbeError(f"Expected a list of texts, got {'nothing' if data is None else 'one string'}.")
    if isinstance(data, Mapping):
        splits = any(isinstance(value, (Dataset, IterableDataset)) for value in data.values())
        advice = "pass one split, such as data[{!r}]" if splits else "pass a list with one batch, [data]"
        raise LayerProbeError(
            f"data is a {type(data).__name__} with {list(data)}, of which only the names would be read; "
            f"{advice.format(next(iter(data), None))}."
        )
    if hasattr(data, "iterrows"):
        raise LayerProbeError(
            "data is a pandas DataFrame; pass a column of texts, or datasets.Dataset.from_pandas(data)."
        )
    form = _format(data)
    if form not in (None, "torch", "custom"):  # NumPy, Arrow and tables hold the same as Python's own values
        data = _plain(data)
    try:
        rows = iter(data)
    except TypeError:
        raise LayerProbeError(
            f"data is a {type(data).__name__}; expected a list of texts, a data set, or batches of model inputs."
        ) from None
    first = next(rows, None)
    if first is None:
        return iter(())
    rows = chain([first], rows)
    if (kind := _kind_of_value(first)) in ("image", "audio") and not isinstance(first, (list, tuple)):
        return _read(({kind: row} for row in rows), {kind: kind})
    if not isinstance(first, Mapping):
        return rows
    transformed = form == "custom"  # its features are those of the columns before
    features = data.features if isinstance(data, (Dataset, IterableDataset)) and not transformed else None
    if features:
        kinds = {name: _kind_of_feature(feature) for name, feature in features.items() if name in first}
    elif not transformed and any(isinstance(value, torch.Tensor) and value.dim() > 1 for value in first.values()):
        return rows  # batches, whatever else a loader puts beside the tensors
    else:
        kinds = {name: _kind_of_value(value) for name, value in first.items()}
    if "input_ids" in kinds or not (features or transformed or READABLE & set(kinds.values())):
        return rows
    return _read(rows, kinds)


def _format(data: Any) -> str | None:
    """How a data set gives its rows: `with_format`'s type, `"custom"` for a transform."""
    if isinstance(data, Dataset):
        return data.format["type"]
    formatting = getattr(data, "_formatting", None) if isinstance(data, IterableDataset) else None
    return getattr(formatting, "format_type", None)  # a stream has no public name for it


def _plain(data: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The same columns as Python's own values."""
    if isinstance(data, IterableDataset):
        return data.with_format(None)
    return data.with_format(None, data.format["columns"], data.format["output_all_columns"])


def _read(rows: Iterable[Mapping], kinds: dict[str, str | None]) -> Iterator[Any]:
    """Rows by what their columns are."""
    text, messages, image, audio = (_column(kinds, kind) for kind in ("text", "messages", "image", "audio"))
    if {"role", "content"} <= set(kinds):
        raise LayerProbeError(
            "data is one conversation (its rows have 'role' and 'content'); pass a list of them, [data]."
        )
    if image or audio:
        label = _column(kinds, "label")
        return (_sample(row, i, image, audio, text, messages, label) for i, row in enumerate(rows))
    column = messages or text
    _require(column is not None, kinds)
    return (_field(row, i, column, "messages" if messages else "text") for i, row in enumerate(rows))


def _require(found: bool, kinds: Mapping[str, Any]) -> None:
    if not found:
        raise LayerProbeError(
            f"The data set has columns {list(kinds)}; expected 'input_ids', 'messages', an image or audio column, 'text' or "
            "exactly one string column. Select or rename one, for example dataset.rename_column('passage', 'text'); of other model "
            "inputs pass batches, for example DataLoader(dataset, batch_size=4, collate_fn=default_data_collator)."
        )


def _column(kinds: Mapping[str, str | None], kind: str) -> str | None:
    """The column of this kind: the one with a usual name, or the only one."""
    names = [name for name, found in kinds.items() if found == kind]
    usual = [name for name in USUAL[kind] if name in names]
    return usual[0] if usual else names[0] if len(names) == 1 and kind != "label" else None


def _field(row: Any, index: int, column: str, kind: str) -> Any:
    """What a row holds under a column; a row may lack it, or hold something else than the first one."""
    if not isinstance(row, Mapping) or column not in row:
        found = f"it has {list(row)}" if isinstance(row, Mapping) else f"it is {type(row).__name__}"
    elif row[column] is None or (kind in ("text", "messages") and _kind_of_value(row[column]) != kind):
        empty = isinstance(row[column], list) and not row[column]
        found = f"it is {type(row[column]).__name__}" + (" of none" if empty else "")
    else:
        return row[column]
    raise LayerProbeError(
        f"Row {index} of the data has no {kind} under {column!r}: {found}. Drop or complete such rows."
    )


def _sample(row: Any, index: int, image, audio, text, messages, label) -> Sample:
    sample = Sample(
        images=image and _field(row, index, image, "image"),
        text=text and _field(row, index, text, "text"),
        messages=messages and _field(row, index, messages, "messages"),
        label=label and row.get(label),
    )
    if audio:
        sound = _field(row, index, audio, "audio")
        sample.audio = np.asarray(sound["array"], dtype=np.float32), int(sound["sampling_rate"])
    return sample


def _kind_of_feature(feature: Any) -> str | None:
    if isinstance(feature, Image) or (isinstance(feature, List) and isinstance(feature.feature, Image)):
        return "image"
    if isinstance(feature, Audio):
        return "audio"
    if isinstance(feature, List) and isinstance(feature.feature, Mapping) and "role" in feature.feature:
        return "messages"
    if isinstance(feature, Mapping):
        return "audio" if {"array", "sampling_rate"} <= set(feature) else None
    dtype = getattr(feature, "dtype", None)
    if dtype in ("string", "large_string"):
        return "text"
    return "label" if isinstance(dtype, str) and dtype.startswith("int") else None


def _kind_of_value(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    if isinstance(value, Integral):
        return "label"
    if is_pil_image(value) or (isinstance(value, np.ndarray) and value.ndim == 3 and value.dtype == np.uint8):
        return "image"
    if isinstance(value, (list, tuple)) and value:
        if isinstance(value[0], Mapping):
            return "messages" if "role" in value[0] else None
        return "image" if _kind_of_value(value[0]) == "image" else None
    if isinstance(value, Mapping):
        return "audio" if {"array", "sampling_rate"} <= set(value) else None
    return "audio" if hasattr(value, "get_all_samples") else None  # datasets' AudioDecoder
