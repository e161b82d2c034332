"""Text with as many placeholder tokens in it as its images, videos and recordings have features."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .sizes import Sizes

Inputs = dict[str, torch.Tensor]
KINDS = {"image": 1, "video": 2, "audio": 3}  # as `mm_token_type_ids` count them
TYPES = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")
WORDS_BEFORE = 3
MOST_TOKENS = 65


def counts_features(model: PreTrainedModel, modality: str) -> bool:
    """Whether a model has a placeholder for a modality, and a method that says what it makes of one."""
    return _getter(model, modality) is not None and _token(model.config, modality) is not None


def features_in(model: PreTrainedModel, modality: str, form: Inputs) -> int | None:
    """How many features a model makes of each of two images (videos, recordings); None for a form that it does not take."""
    get = _getter(model, modality)
    parameters = inspect.signature(get).parameters
    given = {name: value for name, value in form.items() if name in parameters}
    masks = [value for name, value in form.items() if name.endswith("mask")]
    for name, parameter in parameters.items():  # the same mask by another name
        if name not in form and name.endswith("mask") and parameter.default is parameter.empty and masks:
            given[name] = masks[0]
    given = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in given.items()
    }
    ids = parameters.get("input_ids")
    if ids is None or ids.default is not ids.empty:
        return _count(get, given)
    token = torch.tensor(_token(model.config, modality), device=model.device)
    # One that reads the placeholders, of which there have to be as many as it then makes features.
    return next(
        (n for n in range(1, MOST_TOKENS) if _count(get, {**given, "input_ids": token.expand(2, n)}) == n), None
    )


def features_told(form: Inputs) -> int | None:
    """How many features become of each image or recording where the arguments themselves say so (Phi-4); else None."""
    if "audio_embed_sizes" in form:
        return int(form["audio_embed_sizes"][0])
    if "image_pixel_values" in form:
        # Two by two patches become one; each of the two parts has a column more, and a separator stands between them.
        side = (form["image_attention_mask"].shape[-1] + 1) // 2
        return 2 * side * (side + 1) + 1
    return None


def reader(model: PreTrainedModel, modality: str) -> PreTrainedModel | None:
    """The part of a model that makes the features of a modality and puts them between the words; None for no such part."""
    get = _getter(model, modality)
    return None if get is None else get.__self__


def _count(get, given: Inputs) -> int | None:
    try:
        with torch.no_grad():
            features = get(**given)
    except Exception:  # a form that is not this model's: whatever its code raises
        return None
    if hasattr(features, "last_hidden_state"):
        features = features.last_hidden_state if features.pooler_output is None else features.pooler_output
    return _rows(features) // 2


def _getter(model: PreTrainedModel, modality: str):
    found = [getattr(module, name) for module in model.modules() if hasattr(module, name := f"get_{modality}_features")]
    # Not one that only hands its arguments on: it does not say what they are.
    return next((get for get in found if any(map(_is_named, inspect.signature(get).parameters.values()))), None)


def _is_named(parameter: inspect.Parameter) -> bool:
    return parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


def mixed(
    config: PreTrainedConfig, accepted: Collection[str], text: Inputs, media: dict[str, tuple[Inputs, int]]
) -> Iterator[Inputs]:
    """Two texts, each with its image, video and recording between its words."""
    ids = text["input_ids"]
    pieces, kinds = [ids[:, :WORDS_BEFORE]], [torch.zeros_like(ids[:, :WORDS_BEFORE])]
    for position, (modality, (_, count)) in enumerate(media.items(), WORDS_BEFORE):
        token = _token(config, modality)
        if count and token is not None:
            pieces.append(torch.full((len(ids), count), token))
            kinds.append(torch.full((len(ids), count), KINDS[modality]))
        pieces.append(ids[:, position : position + 1])
        kinds.append(torch.zeros_like(pieces[-1]))
    rest = ids[:, WORDS_BEFORE + len(media) :]
    joined, kind = torch.cat([*pieces, rest], dim=1), torch.cat([*kinds, torch.zeros_like(rest)], dim=1)
    inputs = {**text, "input_ids": joined}
    if "attention_mask" in text:
        inputs["attention_mask"] = torch.ones_like(joined)
    for form, _ in media.values():
        inputs |= form
    if any(count for _, count in media.values()):
        yield {**inputs, **{name: kind for name in TYPES if name in accepted}}
    yield from _told_apart(config, accepted, inputs)
    yield inputs
    if "image_grid_thw" in inputs and "pixel_values" in inputs:  # each image's patches in a row of their own
        yield {**inputs, "pixel_values": inputs["pixel_values"].unflatten(0, (2, -1))}


def _told_apart(config: PreTrainedConfig, accepted: Collection[str], inputs: Inputs) -> Iterator[Inputs]:
    """Models without a placeholder token are told in masks which tokens are images, or which images a token sees."""
    ids = inputs["input_ids"]
    length = ids.shape[1]
    if "image_embeds_position_mask" in accepted:
        count = Sizes(config, "text").get("latent_query_num", default=4)
        longer = torch.cat([ids[:, :1], ids[:, :1].expand(-1, count), ids[:, 1:]], dim=1)
        mask = torch.zeros_like(longer)
        mask[:, 1 : count + 1] = 1
        changed = {"input_ids": longer, "image_embeds_position_mask": mask, "attention_mask": torch.ones_like(longer)}
        yield {**inputs, **changed}
    if "cross_attention_mask" in accepted and (pixels := inputs.get("pixel_values")) is not None and pixels.dim() == 6:
        yield {**inputs, "cross_attention_mask": torch.ones((len(ids), length, *pixels.shape[1:3]), dtype=torch.long)}
    if "image_attention_mask" in accepted and "image_attention_mask" not in inputs:
        yield {**inputs, "image_attention_mask": torch.ones((len(ids), length, 1), dtype=torch.long)}


def _token(config: PreTrainedConfig, modality: str) -> int | None:
    """The token that stands for an image (a video, a recording)."""
    value = Sizes(config, "text").get(f"{modality}_token_id", f"{modality}_token_index")
    return value if value is not None and value >= 0 else None


def _rows(features) -> int:
    if isinstance(features, torch.Tensor):
        return features[..., 0].numel()
    return sum(_rows(part) for part in features)
