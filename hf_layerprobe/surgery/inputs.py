"""Generated inputs to compare models on: text, images, sound, or text with images in it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PruningError

TOKENS = 12
# Inputs beside the text that carry features of their own into a text model.
MEDIA = ("pixel_values", "pixel_values_videos", "pixel_values_images", "input_features", "input_values")

Inputs = dict[str, torch.Tensor]


def example_inputs(model: PreTrainedModel) -> Inputs:
    """Small random values for the main input of text, image and audio models, the same at every call.

    Raises:
        PruningError: A modality for which none can be made.
    """
    generator = torch.Generator().manual_seed(0)
    config, name = model.config, model.main_input_name
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    tokens = lambda: torch.randint(3, max(vocabulary, 4), (2, TOKENS), generator=generator)  # noqa: E731
    if name == "input_ids" and vocabulary:
        inputs = {"input_ids": tokens(), "attention_mask": torch.ones((2, TOKENS), dtype=torch.long)}
    elif name == "pixel_values" and (pixels := _pixels(config, generator)) is not None:
        inputs = {"pixel_values": pixels}
    elif name == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 32)  # Whisper's two convolutions halve the frames once
        inputs = {"input_features": torch.rand((2, config.num_mel_bins, frames), generator=generator)}
    elif name == "input_values":
        inputs = {"input_values": torch.rand((2, 4000), generator=generator)}
    else:
        raise PruningError(
            f"No example inputs are known for {type(model).__name__} (main input {name!r}), so the pruned model cannot be "
            "compared with the original. Pass verify=False to accept it unchecked."
        )
    if "decoder_input_ids" in _accepted(model) and vocabulary:
        inputs["decoder_input_ids"] = tokens()
    return _placed(inputs, model)


def with_images(model: PreTrainedModel, text: Inputs) -> Inputs:
    """The inputs of a text model that also reads images (or sound), with images; of any other model, what was given.

    Text alone does not show what a model does with images: its tower does not run, and features that it adds to the first
    text layers are not there.

    Args:
        model: A model in evaluation mode.
        text: Its [`example_inputs`].

    Raises:
        PruningError: It reads images or sound, and no inputs that fit it could be generated.
    """
    media = [name for name in MEDIA if name in _accepted(model)]
    if "input_ids" not in text or not media:
        return text
    tried = []
    for images in _image_inputs(model):
        images = _placed(images, model)
        try:
            inputs = _joined(model, text, images)
            model(**inputs)
            return inputs
        except Exception as error:  # inputs of another form than the model's: whatever its code raises
            tried.append(f"{', '.join(f'{k} {list(v.shape)}' for k, v in images.items())}: {error}")
    raise PruningError(
        f"{type(model).__name__} reads {' and '.join(media)} beside text, and no such inputs that fit it could be generated, "
        "so what it does with them cannot be compared. Pass verify=False to accept the pruned model unchecked. "
        f"Tried: {'; '.join(tried) or 'none, for no form of them is known'}."
    )


def _joined(model: PreTrainedModel, text: Inputs, images: Inputs) -> Inputs:
    """Text with as many image tokens in it as the images have features."""
    config, accepted = model.config, _accepted(model)
    token = next(
        (t for n in ("image_token_id", "image_token_index") if (t := getattr(config, n, None)) is not None), None
    )
    inputs = {**text, **images}
    if token is not None:
        # In the vocabulary, and not the image token.
        words = torch.where(
            text["input_ids"] == token, (token + 1) % config.get_text_config().vocab_size, text["input_ids"]
        )
        features = model.get_image_features(**images)
        marks = torch.full((2, _rows(getattr(features, "pooler_output", features)) // 2), token, device=words.device)
        ids = torch.cat([words[:, :4], marks, words[:, 4:]], dim=1)
        inputs.update(input_ids=ids, attention_mask=torch.ones_like(ids))
        # Which tokens are images, where a model is told.
        inputs.update(
            {name: (ids == token).long() for name in ("mm_token_type_ids", "token_type_ids") if name in accepted}
        )
    return inputs


def _image_inputs(model: PreTrainedModel) -> Iterator[Inputs]:
    """Two images, one for each text, in the forms that models take them."""
    generator = torch.Generator().manual_seed(1)
    accepted, vision = _accepted(model), getattr(model.config, "vision_config", None)
    if "image_grid_thw" in accepted:
        if not all(hasattr(vision, name) for name in ("spatial_merge_size", "temporal_patch_size", "patch_size")):
            return  # patches of another form
        side = 2 * vision.spatial_merge_size
        values = _channels(vision) * vision.temporal_patch_size * vision.patch_size**2
        yield {
            "pixel_values": torch.rand((2 * side**2, values), generator=generator),
            "image_grid_thw": torch.tensor([[1, side, side]] * 2),
        }
    elif "pixel_values" in accepted and (pixels := _pixels(model.config, generator)) is not None:
        # Whole images, or each in several parts, as many as models cut one of that size into.
        forms = [pixels, *(pixels[:, None].repeat(1, parts, 1, 1, 1) for parts in (1, 3, 5))]
        for form in forms:
            yield {"pixel_values": form}
            if "image_sizes" in accepted:
                yield {"pixel_values": form, "image_sizes": torch.tensor([pixels.shape[-2:]] * 2)}


def _pixels(config: PreTrainedConfig, generator: torch.Generator) -> torch.Tensor | None:
    """Two random images of the size that the config, or the first config in it that has one, names."""
    nodes: list[Any] = [config]
    for node in nodes:
        size = getattr(node, "image_size", None) or getattr(node, "input_size", None)
        if size and isinstance(size, (int, list, tuple)):
            height, width = (size, size) if isinstance(size, int) else size
            return torch.rand((2, _channels(node), height, width), generator=generator)
        nodes += [value for value in vars(node).values() if isinstance(value, PreTrainedConfig)]
    return None


def _channels(config: PreTrainedConfig) -> int:
    names = ("num_channels", "in_channels", "in_chans")
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 3)


def _rows(features) -> int:
    if isinstance(features, torch.Tensor):
        return features[..., 0].numel()
    return sum(_rows(part) for part in features)


def _accepted(model: PreTrainedModel):
    return inspect.signature(model.forward).parameters


def _placed(inputs: Inputs, model: PreTrainedModel) -> Inputs:
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
