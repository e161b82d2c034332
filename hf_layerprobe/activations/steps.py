"""Runs the layers of a stack one at a time, each called as the whole model called it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import LayerProbeError
from ..stacks import LayerStack
from ..stacks.bypass import hidden_input, hidden_output
from .forward import one_logit, without_cache
from .masks import TokenMasks


class Steps:
    """One batch on its way through a stack: what enters it, and what else each layer is called with.

    Args:
        stack: The stack; its model is run once on the batch, in the mode it is in.
        batch: Model inputs on any device.

    Attributes:
        start: The residual stream before the first layer, `[batch, tokens, hidden]`.
        mask: `[batch, tokens]`, true for the tokens that count; `None` when all do.

    Raises:
        LayerProbeError: The model does something to the stream between its layers, so they cannot be run alone.
    """

    def __init__(self, stack: LayerStack, batch: Mapping[str, torch.Tensor]):
        self._stack = stack
        self._calls: list[tuple[tuple, dict]] = []
        self._tails: list[tuple | None] = []
        inputs = {name: value.to(stack.model.device) for name, value in batch.items()}
        self._inputs = {**inputs, **without_cache(stack.model)}
        masks = TokenMasks(stack)
        masks.begin((), inputs)
        written: torch.Tensor | None = None

        def note(index: int, _layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            nonlocal written
            entered = hidden_input(args, kwargs)
            if index == 0:
                self.start = entered
                self.mask = masks.fit(entered)
            elif len(self._calls) != index or not torch.equal(entered, written.to(entered.device)):
                raise LayerProbeError(
                    f"Layer {index} of {stack.path!r} does not read what layer {index - 1} wrote: the model changes the "
                    "stream between them, so its layers cannot be run one at a time."
                )
            written = hidden_output(output)
            self._tails.append(None if isinstance(output, torch.Tensor) else tuple(output[1:]))
            self._calls.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))

        handles = [
            layer.register_forward_hook(partial(note, index), with_kwargs=True)
            for index, layer in enumerate(stack.layers)
        ]
        try:
            stack.model(**self._inputs, **one_logit(stack.model, inputs))
        finally:
            for handle in handles:
                handle.remove()
        if len(self._calls) != stack.num_layers:
            raise LayerProbeError(
                f"{len(self._calls)} of {stack.num_layers} layers of {stack.path!r} ran on this batch."
            )

    def run(self, layer: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What a layer makes of a stream, called as layer `index` of the stack was."""
        args, kwargs = self._calls[index]
        return hidden_output(layer(hidden, *args, **kwargs))

    def finish(self, hidden: torch.Tensor) -> Any:
        """What the model makes of a stream that leaves the stack; no layer runs."""
        layers = list(self._stack.layers)
        own = [layer.__dict__.get("forward") for layer in layers]

        def standing_in(index: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                stream = hidden if index == len(layers) - 1 else hidden_input(args, kwargs)
                return stream if self._tails[index] is None else (stream, *self._tails[index])

            return forward

        try:
            for index, layer in enumerate(layers):
                layer.forward = standing_in(index)
            return self._stack.model(**self._inputs)
        finally:
            for layer, forward in zip(layers, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward
