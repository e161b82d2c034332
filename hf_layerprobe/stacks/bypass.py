"""Runs a model as if some of its layers were not there, without changing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from .find import LayerStack


def hidden_input(args: tuple, kwargs: dict) -> torch.Tensor:
    """The residual stream entering a layer: its first argument, or `hidden_states` by name."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_output(output) -> torch.Tensor:
    """The residual stream leaving a layer: layers return a tensor, or a tuple that starts with one."""
    return output if isinstance(output, torch.Tensor) else output[0]


@contextmanager
def bypassed(stack: LayerStack, layers: Iterable[int]) -> Iterator[set[int]]:
    """Within the context, the named layers (0-based) hand their input on unchanged.

    The layer still runs and only its residual output is replaced: what else it returns (a position bias that later
    layers reuse) and what it writes to a cache stay as they are.

    Yields:
        The bypassed layers that have run so far.
    """
    ran: set[int] = set()

    def hand_on(index, _module, args, kwargs, output):
        ran.add(index)
        hidden = hidden_input(args, kwargs)
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    # Before other hooks: those that collect hidden states have to see the stream without the layer.
    handles = [
        stack.layers[i].register_forward_hook(partial(hand_on, i), with_kwargs=True, prepend=True) for i in layers
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()
