"""Finds inputs that a model runs on, by making what its signature and config ask for and trying it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import PruningError
from .arguments import BATCH, TOKENS, argument, boxes, decisions, time_series
from .images import IMAGES, VIDEOS, image_forms, video_forms
from .mixed import counts_features, features_in, features_told, mixed, reader
from .sizes import Sizes, special_tokens
from .sound import SAMPLES, SPECTROGRAMS, sound_forms

Inputs = dict[str, torch.Tensor]
FORMS_OF = {"image": image_forms, "video": video_forms, "audio": sound_forms}
SIGNS = {"image": IMAGES, "video": VIDEOS, "audio": (*SPECTROGRAMS, *SAMPLES)}
# Arguments that may be left out, but then the model does not run, or not all of it.
WANTED = (
    "decoder_input_ids", "visual_feats", "visual_pos", "input_points", "lang_ids", "protein_input_ids",
    "protein_attention_mask",
)  # fmt: skip
MOST_TRIED = 120


def example_inputs(model: PreTrainedModel, layers: Iterable[nn.Module] = ()) -> Inputs:
    """Small random inputs on which a model runs, the same at every call.

    A model that reads images, video or sound beside text gets them all: text alone does not show what it does with them,
    for its towers do not run, and features that it adds to the first text layers are not there.

    Args:
        model: A model in evaluation mode.
        layers: Layers that have to run.

    Raises:
        PruningError: No inputs could be made on which it runs; the message says what was tried.
    """
    layers, tried = list(layers), []
    for inputs in islice(_candidates(model, tried), MOST_TRIED):
        ran = _layers_run(model, inputs, layers, tried)
        if ran == len(layers):
            return inputs
        if ran is not None:
            tried.append(f"{_shapes(inputs)}: {ran} of {len(layers)} layers ran")
    raise PruningError(
        f"No inputs could be made for {type(model).__name__} on which it runs with all its layers, so a pruned model could "
        "not be compared with it; verify=False accepts it unchecked. "
        + (
            f"Tried {len(tried)} forms: {'; '.join(tried[:2])}"
            if tried
            else f"Its arguments: {', '.join(_accepted(model))}."
        )
    )


def _layers_run(model: PreTrainedModel, inputs: Inputs, layers: list[nn.Module], tried: list[str]) -> int | None:
    """How many of some layers run on the inputs; None, and a line in `tried`, if the model does not."""
    ran: set[int] = set()
    handles = [layer.register_forward_hook(lambda module, *_: ran.add(id(module))) for layer in layers]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model(**inputs)
    except Exception as error:  # inputs of another form than the model's: whatever its code raises
        tried.append(f"{_shapes(inputs)}: {type(error).__name__}: {str(error)[:200]}")
        return None
    finally:
        for handle in handles:
            handle.remove()
    return len(ran)


def _shapes(inputs: Inputs) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())


def example_prompt(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """What of a model's example inputs it can generate from: the text alone, or what its encoder reads."""
    if "input_ids" in inputs:
        return _placed(_text(model, torch.Generator().manual_seed(0)), model)
    return {name: value for name, value in inputs.items() if name != "decoder_input_ids"}


def _candidates(model: PreTrainedModel, tried: list[str]) -> Iterator[Inputs]:
    """Inputs to try, those first that show most of what the model does."""
    random = torch.Generator().manual_seed(0)
    accepted, config = _accepted(model), model.config
    complete = partial(_completed, model, random=random)
    if "past_values" in accepted:
        yield from complete(time_series(Sizes(config, "text"), accepted, random))
        return
    if "states" in accepted:
        yield from complete(decisions(Sizes(config, "text"), random))
        return
    forms = {
        modality: list(make(Sizes(config, "audio" if modality == "audio" else "image"), accepted, random))
        for modality, make in FORMS_OF.items()
        if any(name in accepted for name in SIGNS[modality]) and not _has_no_tower(config, modality)
    }
    forms = {modality: found for modality, found in forms.items() if found}
    text = _text(model, random) if "input_ids" in accepted else None
    if text is not None and not forms:
        yield from complete(text)
        if "inputs_embeds" in accepted:  # where the ids are of another form, such as several codes at each position
            width = Sizes(config, "text").get("hidden_size", "d_model", "n_embd", default=64)
            embeds = torch.rand((BATCH, TOKENS, width), generator=random) - 0.5
            yield from complete({"inputs_embeds": embeds, **{k: v for k, v in text.items() if k != "input_ids"}})
        if (end := Sizes(config, "text").get("eos_token_id")) is not None:
            # BART and T5 classify a sequence by what stands at its end.
            ids = text["input_ids"].clone()
            ids[:, -1] = end
            yield from complete({**text, "input_ids": ids})
    elif text is not None:
        fitting: dict[str, list] = {}
        for modality, found in forms.items():
            # The first that the model reads beside text, each kind of media by itself.
            for form, count in islice(_fitting(model, modality, found), MOST_TRIED):
                for inputs in mixed(config, accepted, text, {modality: (form, count)}):
                    for completed in complete(inputs):
                        if modality not in fitting and _layers_run(model, completed, [], tried) is not None:
                            fitting[modality] = [(form, count), completed]
        if len(fitting) > 1:
            for inputs in mixed(config, accepted, text, {modality: part for modality, (part, _) in fitting.items()}):
                yield from complete(inputs)
        yield from (completed for _, completed in fitting.values())
    for found in forms.values():
        for form in found:
            yield from complete(form)
    if not forms and text is None:
        yield from complete({})


def _has_no_tower(config: PreTrainedConfig, modality: str) -> bool:
    """Whether the model could have a tower for a modality and was made without."""
    return getattr(config, "audio_config" if modality == "audio" else "vision_config", 0) is None


def _fitting(model: PreTrainedModel, modality: str, forms: list[Inputs]) -> Iterator[tuple[Inputs, int]]:
    """Forms that the modality's tower accepts with the number of features that it makes of each of the two."""
    if not counts_features(model, modality):
        # Nobody can be asked: the form tells, or there is no placeholder, or one that stands for all of a recording.
        for form in forms:
            told = features_told(form)
            yield from ((form, count) for count in ((0, 1) if told is None else (told,)))
        return
    for form in forms:
        count = features_in(model, modality, form)
        if count is not None:
            yield form, count


def _text(model: PreTrainedModel, random: torch.Generator) -> Inputs:
    """Two rows of words, none of them a token with a meaning of its own."""
    inputs = {"input_ids": _ids(model, random)}
    if "attention_mask" in _accepted(model):
        inputs["attention_mask"] = torch.ones((BATCH, TOKENS), dtype=torch.long)
    if "bbox" in _accepted(model):
        inputs["bbox"] = boxes(random)
    return inputs


def _ids(model: PreTrainedModel, random: torch.Generator) -> torch.Tensor:
    config = model.config
    try:
        size = getattr(config.get_text_config(), "vocab_size", None)
    except ValueError:  # an encoder and a decoder of different kinds
        size = None
    if type(size) is not int:
        size = Sizes(config, "text").get("vocab_size", "text_vocab_size", "num_embeddings", default=100)
    special = special_tokens(config)
    words = torch.tensor([i for i in range(min(size, 1000)) if i not in special and (i > 2 or size < 6)] or [0])
    return words[torch.randint(0, len(words), (BATCH, TOKENS), generator=random)]


def _completed(model: PreTrainedModel, inputs: Inputs, random: torch.Generator) -> Iterator[Inputs]:
    """With the arguments that the model insists on, where all of them are known."""
    parameters = _accepted(model)
    inputs = {name: value for name, value in inputs.items() if name in parameters}
    sizes = Sizes(model.config, "text")
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]  # fmt: skip
    wanted = [name for name in WANTED if name in parameters]
    if "query_embeds" in parameters:  # a Q-Former reads nothing else
        wanted.append("encoder_hidden_states")
    if not inputs and model.main_input_name in parameters:
        required.append(model.main_input_name)
    for name in dict.fromkeys((*required, *wanted)):
        if name not in inputs:
            value = argument(name, sizes, lambda: _ids(model, random), random)
            if value is None:
                return
            inputs[name] = value
    if inputs:
        yield _placed(inputs, model)
    codebooks = sizes.get(
        "num_codebooks", default=getattr(getattr(model.config, "decoder_config", None), "num_channels", 1)
    )
    if "decoder_input_ids" in inputs and codebooks > 1:  # a token of each at every position, or rows of their own
        ids = inputs["decoder_input_ids"]
        for tokens in (ids[..., None].repeat(1, 1, codebooks), ids.repeat(codebooks, 1)):
            yield _placed({**inputs, "decoder_input_ids": tokens}, model)


def _accepted(model: PreTrainedModel) -> dict[str, inspect.Parameter]:
    """The arguments of a model; also those about images that it hands on unnamed (DiffusionGemma)."""
    parameters = dict(inspect.signature(model.forward).parameters)
    unnamed = any(each.kind == each.VAR_KEYWORD for each in parameters.values())
    if unnamed and not any(name in parameters for name in IMAGES) and (inner := reader(model, "image")) is not None:
        return {**inspect.signature(inner.forward).parameters, **parameters}
    return parameters


def _placed(inputs: Inputs, model: PreTrainedModel) -> Inputs:
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
