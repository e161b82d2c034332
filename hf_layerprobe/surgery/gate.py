"""The gate: a pruned model counts only if it computes what the original does with those layers bypassed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from ..errors import PruningError, VerificationError
from ..modes import evaluating, in_own_precision
from ..stacks import LayerStack, bypassed
from .inputs import example_inputs, example_prompt
from .outputs import difference, float_outputs, largest_difference, without_removed

# Largest |difference| / max(1, |output|); bit-equal is the rule, the margin is for other kernels after a reload.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
NEW_TOKENS = 5
# Parts of a model that its forward pass does not run, but generation, or the user, one after another.
ASIDE = frozenset(["codec_model", "depth_decoder", "word_timestamp_encoder"])


def verify(removed: Mapping[LayerStack, Sequence[int]], pruned: PreTrainedModel) -> None:
    """Compares a pruned model with the original whose removed layers are bypassed, on generated inputs.

    Args:
        removed: Layers that the pruned model does not have, by stack of the original model.
        pruned: The pruned model, reloaded or as built.

    Raises:
        VerificationError: The pruned model does not run, its outputs differ, or cached generation differs from uncached
            although the original's does not.
        PruningError: No inputs are known that fit the original and run every removed layer, or its own outputs are not
            finite.
    """
    removed, pruned = _aside(removed, pruned)
    original = next(iter(removed)).model
    layers = " and ".join(f"layers {list(each)} of {stack.path!r}" for stack, each in removed.items())
    what = f"({layers} removed)"
    with evaluating(original, pruned), in_own_precision(original), torch.no_grad():
        inputs = example_inputs(original, [stack.layers[i] for stack, each in removed.items() for i in each])
        prompt = example_prompt(original, inputs)
        with ExitStack() as bypasses:
            for stack, each in removed.items():
                bypasses.enter_context(bypassed(stack, each))
                bypasses.enter_context(_drawing_nothing(stack.layers[i] for i in each))
            try:
                expected = _run(original, inputs)
            except Exception as error:  # whatever a model's code raises on inputs that were made up for it
                raise PruningError(
                    f"{type(original).__name__} does not run on the generated {', '.join(inputs)} with "
                    f"{layers} bypassed, so the pruned model cannot be compared with it. Pass "
                    f"verify=False to accept it unchecked. It raises {type(error).__name__}: {error}"
                ) from error
        # Minus infinity is how models say that something is not to be chosen.
        if any((tensor.isnan() | tensor.isposinf()).any() for tensor in float_outputs(expected).values()):
            raise PruningError(
                f"{type(original).__name__} itself gives NaN or infinite outputs with {layers} bypassed; "
                "check its weights."
            )
        try:
            found = _run(pruned, inputs)
        except Exception as error:  # a kept set that the model's code does not allow for, such as no full attention
            raise VerificationError(
                f"The pruned {type(pruned).__name__} {what} does not run: {type(error).__name__}: {error}"
            ) from error
        limit = TOLERANCE.get(original.dtype, TOLERANCE[torch.float32])
        kept = [
            (stack.num_layers, [i for i in range(stack.num_layers) if i not in each]) for stack, each in removed.items()
        ]
        expected = without_removed(expected, found, kept)
        if how := difference(float_outputs(expected), float_outputs(found), limit):
            raise VerificationError(
                f"The pruned {type(pruned).__name__} {what} does not compute what the original does with those layers "
                f"bypassed: {how}. This architecture ties a layer's function to its position or to the number of "
                "layers, or something else reads the removed layers."
            )
        # With a cache a layer may compute by another formula (a recurrence, not a convolution): rounding differs more.
        limit = min(10 * limit, max(TOLERANCE.values()))
        if (
            original.can_generate()
            and not _cache_agrees(pruned, prompt, limit)
            and _cache_agrees(original, prompt, limit)
        ):
            raise VerificationError(
                f"The pruned {type(pruned).__name__} {what} generates other tokens with its cache than without, which the "
                "original does not."
            )


def differs(one: PreTrainedModel, other: PreTrainedModel, layers: Sequence[nn.Module]) -> str | None:
    """How the outputs of two models on generated inputs differ, in words; None if they do not.

    Args:
        one: A model.
        other: One that should compute the same.
        layers: Layers of `one` that the inputs have to run.

    Raises:
        PruningError: No such inputs are known.
    """
    limit = TOLERANCE.get(one.dtype, TOLERANCE[torch.float32])
    with evaluating(one, other), torch.no_grad():
        inputs = example_inputs(one, layers)
        return difference(*(float_outputs(_run(each, inputs)) for each in (one, other)), limit)


def _aside(
    removed: Mapping[LayerStack, Sequence[int]], pruned: PreTrainedModel
) -> tuple[Mapping[LayerStack, Sequence[int]], PreTrainedModel]:
    """What to compare: the models, or where all layers are in a part that stands aside, that part of both by itself."""
    model = next(iter(removed)).model
    parts = {_part(stack.path) for stack in removed}
    if len(parts) > 1 or (part := parts.pop()) is None or not isinstance(model.get_submodule(part), PreTrainedModel):
        return removed, pruned
    alone = model.get_submodule(part)
    inner = {LayerStack(alone, stack.path.removeprefix(f"{part}.")): each for stack, each in removed.items()}
    return inner, pruned.get_submodule(part)


def _part(path: str) -> str | None:
    names = path.split(".")
    depth = next((depth for depth, name in enumerate(names, 1) if name in ASIDE), None)
    return depth and ".".join(names[:depth])


def _run(model: PreTrainedModel, inputs: dict[str, torch.Tensor]):
    """The model's outputs, the same whenever it draws random numbers (the masks of ViT-MAE)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model(**inputs)


@contextmanager
def _drawing_nothing(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context, the random numbers that these layers draw (Informer's attention samples keys) are drawn again."""
    states: list[torch.Tensor] = []
    handles = []
    for layer in layers:
        handles += [
            layer.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state())),
            layer.register_forward_hook(lambda *_: torch.set_rng_state(states.pop())),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
        if largest_difference(cached, plain) > limit:
            return False
        if not torch.equal(cached.argmax(-1), plain.argmax(-1)):
            return True  # a tie within the tolerance: the runs read different tokens from here on
    return True
