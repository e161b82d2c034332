"""Images and audio, with the texts that go with them, through a model's processor."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, islice
from typing import Any

import torch
from torch import nn
from transformers import ProcessorMixin
from transformers.image_utils import is_pil_image

from ..errors import LayerProbeError
from .rows import Sample
from .text import Batch, render, token_ids


def media_batches(
    samples: Iterable[Sample], model: nn.Module, processor: Any, *, batch_size: int, max_length: int
) -> Iterator[Batch]:
    """What the processor makes of rows with images or audio, as the model takes it.

    An encoder-decoder model for speech gets the row's text as labels, and without one the token that starts its decoder.
    Sounds whose padding would pass for sound are not padded: only those of one length that follow each other share a batch.

    Raises:
        LayerProbeError: No processor for the rows' modality, another sampling rate, or rows that it refuses.
    """
    samples = iter(samples)
    first = next(samples)
    labelled = first.label is not None
    prepare = _for_audio(model, processor) if first.audio else _for_images(model, processor)
    done = 0

    def batch_of(rows: list[Sample]) -> Batch:
        try:
            inputs = prepare(rows, max_length)
        except LayerProbeError:
            raise
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise LayerProbeError(
                f"{type(processor).__name__} refuses rows {done} to {done + len(rows) - 1} of the data: {error}"
            ) from error
        return _for_model(inputs, rows, model, first_row=done, labelled=labelled)

    apart = bool(first.audio) and _hears_padding(model, processor, batch_of([first]))
    for _, alike in groupby(chain([first], samples), lambda sample: len(sample.audio[0]) if apart else None):
        while rows := list(islice(alike, batch_size)):
            yield batch_of(rows)
            done += len(rows)


def _for_images(model: nn.Module, processor: Any):
    images_only = getattr(processor, "image_processor", processor)
    if not hasattr(images_only, "image_mean") and not hasattr(images_only, "do_resize"):
        raise _no_processor("images", processor)
    colours = getattr(getattr(model, "config", None), "num_channels", 3) == 3

    def converted(image: Any) -> Any:
        if isinstance(image, (list, tuple)):
            return [converted(each) for each in image]
        return image.convert("RGB") if colours and is_pil_image(image) else image

    def prepare(group: list[Sample], max_length: int):
        images = [converted(sample.images) for sample in group]
        texts = _texts(group, processor)
        if texts is None or not isinstance(processor, ProcessorMixin):
            return images_only(images=images, return_tensors="pt")
        # A text that holds places for an image must not be cut.
        cut = {} if group[0].messages else {"truncation": True, "max_length": max_length}
        return processor(images=images, text=texts, return_tensors="pt", padding=True, **cut)

    return prepare


def _for_audio(model: nn.Module, processor: Any):
    extractor = getattr(processor, "feature_extractor", processor)
    rate = getattr(extractor, "sampling_rate", None)
    if rate is None:
        raise _no_processor("audio", processor)
    # Extractors that pad by themselves, as Whisper's to 30 seconds, are left to it.
    pads = {} if _own_padding(extractor) else {"padding": True}
    start = getattr(getattr(model, "config", None), "decoder_start_token_id", None)

    def prepare(group: list[Sample], max_length: int):
        for sample in group:
            if sample.audio[1] != rate:
                raise LayerProbeError(
                    f"The audio has {sample.audio[1]} samples a second, and {type(extractor).__name__} expects {rate}. "
                    f"Resample it, for example dataset.cast_column('audio', Audio(sampling_rate={rate}))."
                )
        sounds, texts = [sample.audio[0] for sample in group], _texts(group, processor)
        if getattr(model, "main_input_name", "") == "input_ids":
            return processor(text=texts, audio=sounds, sampling_rate=rate, return_tensors="pt", padding=True)
        inputs = extractor(sounds, sampling_rate=rate, return_tensors="pt", **pads)
        if not getattr(model.config, "is_encoder_decoder", False):
            return inputs
        if texts is None or not hasattr(processor, "tokenizer"):
            return {**inputs, "decoder_input_ids": torch.full((len(group), 1), start)}
        length = min(max_length, getattr(model.config, "max_target_positions", max_length))
        rows = [token_ids(processor.tokenizer, text, truncation=True, max_length=length) for text in texts]
        longest = max(map(len, rows))
        return {**inputs, "labels": torch.tensor([row + [-100] * (longest - len(row)) for row in rows])}

    return prepare


def _own_padding(extractor: Any) -> str | bool | None:
    """How an extractor pads where it is not told; one that cannot be told makes all sounds equally long."""
    padding = inspect.signature(extractor.__call__).parameters.get("padding")
    return "max_length" if padding is None else padding.default


def _hears_padding(model: nn.Module, processor: Any, batch: Batch) -> bool:
    """Whether padding to the longest sound of a batch would count, or change what the model makes of the shorter ones."""
    if _own_padding(getattr(processor, "feature_extractor", processor)) == "max_length":
        return False  # it is the same in every batch, and what the model was trained on
    # The statistics of a group norm are taken over time, the padding included.
    return "attention_mask" not in batch or any(isinstance(module, nn.GroupNorm) for module in model.modules())


def _texts(group: list[Sample], processor: Any) -> list[str] | None:
    if group[0].messages:
        return [render(sample.messages, processor, i, media=True) for i, sample in enumerate(group)]
    return [sample.text for sample in group] if group[0].text is not None else None


def _for_model(inputs: Any, group: list[Sample], model: nn.Module, *, first_row: int, labelled: bool) -> Batch:
    parameters = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    batch = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and (name in parameters or anything)
    }
    classifies = "labels" in parameters and "labels" not in batch and "input_ids" not in batch
    if classifies and labelled and "decoder_input_ids" not in batch:
        for index, sample in enumerate(group, first_row):
            if sample.label is None:
                raise LayerProbeError(
                    f"Row {index} of the data has no label, and the first row has one. Drop or complete such rows, or leave "
                    "the labels out."
                )
        batch["labels"] = torch.tensor([sample.label for sample in group])
    return batch


def _no_processor(what: str, processor: Any) -> LayerProbeError:
    found = "none was passed" if processor is None else f"{type(processor).__name__} reads none"
    return LayerProbeError(
        f"data holds {what}, so the model's processor is needed, and {found}: pass tokenizer=AutoProcessor.from_pretrained(...)."
    )
