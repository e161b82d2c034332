"""What the arguments of a command name: models, tokenizers, texts, lists of layers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer
from transformers import AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..embedded import NOTE, embedded_model, embedded_texts
from ..errors import LayerProbeError
from ..loading import load_model, load_tokenizer
from .options import DEFAULT_MODEL


def open_model(name: str) -> PreTrainedModel:
    """Loads a model by folder, Hub id or `smollm2`.

    Raises:
        LayerProbeError: Nothing there that Transformers can open.
    """
    return _open(load_model, name)


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model.

    Raises:
        LayerProbeError: The model has none.
    """
    return _open(load_tokenizer, name)


def open_processor(name: str) -> Any:
    """Loads a model's processor: images and sound where it reads them, else its tokenizer.

    Raises:
        LayerProbeError: The model has none.
    """
    return _open(AutoProcessor.from_pretrained, name)


def note_on(*names: str | None) -> str | None:
    """What has to stand beside every number of these models."""
    return NOTE if DEFAULT_MODEL in names else None


def _open(load, name: str):
    try:
        return load(embedded_model() if name == DEFAULT_MODEL else name)
    except LayerProbeError:
        raise
    except (OSError, ValueError) as error:
        what = "the model" if load is load_model else "the tokenizer of"
        raise LayerProbeError(
            f"Cannot load {what} {name!r}. Expected a folder with a model saved by save_pretrained, a Hub id, or "
            f"{DEFAULT_MODEL!r}. Transformers says: {error}"
        ) from error


def read_texts(path: Path | None, column: str = "text") -> list[str]:
    """The texts of a file, or the embedded ones.

    Args:
        path: A .jsonl file, or a text file whose paragraphs are separated by blank lines.
        column: The field of a .jsonl file that holds the text.

    Raises:
        LayerProbeError: A file without text, or lines that are not JSON objects with that field.
        OSError: No such file.
    """
    if path is None:
        return embedded_texts()
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LayerProbeError(f"{path} is not UTF-8 text: {error}.") from error
    if path.suffix == ".jsonl":
        texts = [
            _field(path, number, line, column) for number, line in enumerate(content.split("\n"), 1) if line.strip()
        ]
    else:
        texts = re.split(r"\n\s*\n", content)
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise LayerProbeError(f"{path} holds no text.")
    return texts


def _field(path: Path, number: int, line: str, column: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise LayerProbeError(f"{path}, line {number}, is not JSON: {error}.") from error
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise LayerProbeError(
            f"{path}, line {number}: no text in field {column!r} (found: {fields}). Name it by --column."
        )
    return row[column]


def halves(texts: list[str]) -> tuple[list[str], list[str]]:
    """Texts to calibrate on and texts to measure on: every other one.

    Raises:
        LayerProbeError: Too few to split.
    """
    if len(texts) < 4:
        raise LayerProbeError(
            f"Found {len(texts)} texts, expected at least 4: a plan is made from every other one, and measured on the rest."
        )
    return texts[::2], texts[1::2]


def first_tokens(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[str]:
    """The first texts that together have at most `max_tokens` tokens; at least one."""
    taken, total = [], 0
    for text in texts:
        total += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if taken and total > max_tokens:
            break
        taken.append(text)
    return taken


def layer_list(value: str | None, option: str) -> list[int] | None:
    """`3,5` → [3, 5].

    Raises:
        typer.BadParameter: Something else than whole numbers.
    """
    if value is None:
        return None
    try:
        return [int(part) for part in value.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"expected layer numbers separated by commas, such as 3,5; got {value!r}.", param_hint=option
        ) from error
