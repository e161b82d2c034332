"""The gate: a pruned model counts only if it computes what the original does with those layers bypassed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from transformers import GenerationMixin, PreTrainedModel

from ..errors import PruningError, VerificationError
from ..stacks import LayerStack, bypassed

# Largest |difference| / max(1, |output|); bit-equal is the rule, the margin is for other kernels after a reload.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
TOKENS = 12
NEW_TOKENS = 5


def verify(stack: LayerStack, removed: Sequence[int], pruned: PreTrainedModel) -> None:
    """Compares a pruned model with the original whose removed layers are bypassed, on generated inputs.

    Args:
        stack: Stack of the original model.
        removed: Layers that the pruned model does not have.
        pruned: The pruned model, reloaded or as built.

    Raises:
        VerificationError: Outputs differ, or cached generation differs from uncached although the original's does not.
        PruningError: No inputs are known for this model's modality.
    """
    original = stack.model
    inputs = example_inputs(original)
    modes = original.training, pruned.training
    original.eval(), pruned.eval()
    try:
        with torch.no_grad():
            with bypassed(stack, removed):
                expected = _float_outputs(original(**inputs))
            if not all(torch.isfinite(tensor).all() for tensor in expected):
                raise PruningError(
                    f"{type(original).__name__} itself gives NaN or infinite outputs with layers {list(removed)} bypassed; "
                    "check its weights."
                )
            found = _float_outputs(pruned(**inputs))
            difference = _largest_difference(expected, found)
            limit = TOLERANCE.get(original.dtype, 1e-4)
            if not difference <= limit:  # also when it is NaN
                raise VerificationError(
                    f"The pruned {type(pruned).__name__} (layers {list(removed)} of {stack.path!r} removed) does not compute "
                    f"what the original does with those layers bypassed: largest relative difference {difference:.2g}, "
                    f"allowed {limit:.0e}. This architecture ties a layer's function to its position or to the number of "
                    "layers, or something else reads the removed layers."
                )
            if (
                original.can_generate()
                and not _cache_agrees(pruned, inputs, limit)
                and _cache_agrees(original, inputs, limit)
            ):
                raise VerificationError(
                    f"The pruned {type(pruned).__name__} generates other tokens with its cache than without, which the "
                    f"original does not (layers {list(removed)} of {stack.path!r} removed)."
                )
    finally:
        original.train(modes[0]), pruned.train(modes[1])


def example_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Small random inputs for text, image and audio models, the same at every call.

    Raises:
        PruningError: A modality for which none can be made.
    """
    generator = torch.Generator().manual_seed(0)
    config, accepted = model.config, inspect.signature(model.forward).parameters
    name = model.main_input_name
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    tokens = lambda: torch.randint(3, max(vocabulary, 4), (2, TOKENS), generator=generator)  # noqa: E731
    if name == "input_ids" and vocabulary:
        inputs = {"input_ids": tokens(), "attention_mask": torch.ones((2, TOKENS), dtype=torch.long)}
    elif name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        size, channels = config.image_size, getattr(config, "num_channels", 3)
        inputs = {"pixel_values": torch.rand((2, channels, size, size), generator=generator, dtype=torch.float32)}
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
    if "decoder_input_ids" in accepted and vocabulary:
        inputs["decoder_input_ids"] = tokens()
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else None) for key, value in inputs.items()
    }


def _float_outputs(output) -> list[torch.Tensor]:
    """Floating-point tensors of a model output, caches left out."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = [value for key, value in output.items() if key != "past_key_values"]
    return [t for part in output for t in _float_outputs(part)] if isinstance(output, (list, tuple)) else []


def _largest_difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    if [t.shape for t in expected] != [t.shape for t in found] or not expected:
        return float("inf")
    return max(
        ((a.float() - b.float()).abs().max() / a.float().abs().max().clamp_min(1)).item()
        for a, b in zip(expected, found, strict=True)
    )


def _cache_agrees(model: PreTrainedModel, inputs: dict[str, torch.Tensor], limit: float) -> bool:
    """Whether greedy generation has the same logits with a cache as without, up to the first differing token."""
    prompt = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    runs = []
    for use_cache in (True, False):
        try:
            # The mixin's own generate: Whisper's override expects real audio and a tuned generation config.
            runs.append(
                GenerationMixin.generate(
                    model,
                    **prompt,
                    use_cache=use_cache,
                    do_sample=False,
                    num_beams=1,
                    min_new_tokens=NEW_TOKENS,
                    max_new_tokens=NEW_TOKENS,
                    pad_token_id=0,  # never used: no sequence ends before the others
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            )
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            return False
    for cached, plain in zip(*(run.logits for run in runs), strict=True):
        if _largest_difference([cached], [plain]) > limit:
            return False
        if not torch.equal(cached.argmax(-1), plain.argmax(-1)):
            return True  # a tie within the tolerance: the runs read different tokens from here on
    return True
