"""Runs a model as if some of its layers were not there, without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps

import torch
from torch import nn

from .find import LayerStack, find_stacks

# Layers that return what is to be added to the stream, for the code around them to add.
UPDATES = frozenset(["SuperGlueAttentionalPropagation"])
NORMS = (nn.LayerNorm, nn.GroupNorm)
# Layers that return, besides the stream, what is to be added to another one outside: its place in the output.
ADDED_OUTSIDE = {"AutoformerDecoderLayer": 1}
STREAM_NAMES = ("hidden_states", "hidden_state", "prev_attn_output")


def hidden_input(args: tuple, kwargs: dict) -> torch.Tensor:
    """The residual stream entering a layer: its first argument, or by name."""
    return args[0] if args else next(kwargs[name] for name in STREAM_NAMES if name in kwargs)


def hidden_output(output) -> torch.Tensor:
    """The residual stream leaving a layer: layers return a tensor, or a tuple that starts with one."""
    return output if isinstance(output, torch.Tensor) else hidden_output(output[0])


@contextmanager
def bypassed(stack: LayerStack, layers: Iterable[int]) -> Iterator[set[int]]:
    """Within the context, the named layers (0-based) hand their input on unchanged.

    The layer still runs and only its outputs are replaced by the inputs that they continue: the residual stream, and
    further streams of the same form (`[batch, tokens, features]`) of layers that have several. What else it returns (a
    position bias that later layers reuse) and what it writes to a cache stay as they are. Lists that lose the same entries
    (`ConfigBinding.siblings`) are bypassed as well.

    Yields:
        The bypassed layers that have run so far.
    """
    layers, ran = list(layers), set()
    siblings = stack.siblings
    lists = [stack.layers, *(sibling.layers for sibling in siblings)]
    # Lists of layers pass a stream on; of others (prediction heads) what they add is left out.
    stacks = {each.path for each in find_stacks(stack.model)} if siblings else {stack.path}
    passing = [stack.layers, *(sibling.layers for sibling in siblings if sibling.path in stacks)]
    # Where norms are a list of their own, the residual connection is outside of the modules.
    is_parts = any(isinstance(each[0], NORMS) for each in lists)

    def hand_on(index, module, output, args, kwargs):
        if module is stack.layers[index]:
            ran.add(index)
        output = _continued(output, [hidden_input(args, kwargs), *args, *kwargs.values()])
        if (place := ADDED_OUTSIDE.get(type(module).__name__)) is not None:
            output = _without_part(output, place)
        return output

    def add_nothing(index, module, output, _args, _kwargs):
        if module is stack.layers[index]:
            ran.add(index)
        return (
            torch.zeros_like(output) if isinstance(output, torch.Tensor) else (torch.zeros_like(output[0]), *output[1:])
        )

    # Not by hooks: what collects hidden states has to see the stream without the layer, and in Transformers 5.0 it replaces
    # `forward` itself, which runs before any hook.
    replaced = []
    for modules in lists:
        for i in layers:
            is_layer = any(modules is each for each in passing) and type(modules[i]).__name__ not in UPDATES
            change = hand_on if isinstance(modules[i], NORMS) or (is_layer and not is_parts) else add_nothing
            replaced.append((modules[i], vars(modules[i]).get("forward")))
            modules[i].forward = _changed(modules[i].forward, partial(change, i, modules[i]))
    try:
        yield ran
    finally:
        for module, own in reversed(replaced):
            del module.forward
            if own is not None:  # one that was there before, such as accelerate's
                module.forward = own


def _without_part(output: tuple, place: int) -> tuple:
    """With zeros for one of the outputs; Transformers 5.0 has them in a tuple of their own, before the attention maps."""
    if isinstance(output[0], tuple):
        return (_without_part(output[0], place), *output[1:])
    return (*output[:place], torch.zeros_like(output[place]), *output[place + 1 :])


def _changed(forward: Callable, change: Callable) -> Callable:
    """`forward`, with `change(output, args, kwargs)` as what it returns."""

    @wraps(forward)
    def changed(*args, **kwargs):
        return change(forward(*args, **kwargs), args, kwargs)

    return changed


def _continued(output, inputs: list):
    """A layer's output with the streams in it replaced by those that entered the layer, first the residual stream."""
    streams = [each for each in inputs if isinstance(each, torch.Tensor) and each.is_floating_point()]
    first, rest = streams[0], [each for each in streams[1:] if each is not streams[0]]

    def replace(part, is_first: bool):
        if isinstance(part, torch.Tensor):
            if is_first:
                return first
            matching = next((k for k, each in enumerate(rest) if part.dim() == 3 and each.shape == part.shape), None)
            return part if matching is None else rest.pop(matching)
        if isinstance(part, (tuple, list)):
            parts = [replace(each, is_first and k == 0) for k, each in enumerate(part)]
            return type(part)(*parts) if hasattr(part, "_fields") else type(part)(parts)
        return part

    return replace(output, True)
