"""Bypasses one layer after another without running the layers before it again."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .bypass import hidden_input, hidden_output
from .find import LayerStack


class PrefixBypass:
    """While open, the model computes the same inputs with layer 0 bypassed, then with layer 1 and so on.

    Of the layers, the run without layer i computes only layer i, for the runs to come, and those behind it: L(L + 1)/2
    of L² in all. Everything around the layers is computed in each run, so that masks, position embeddings and what is
    added between layers are the model's own. One hidden state is kept, not one a layer.

    It is exact where a layer's result depends on the layers before it by its arguments alone.
    """

    def __init__(self, stack: LayerStack):
        self.stack = stack
        self._layer: int | None = None
        self._kept: torch.Tensor | None = None  # what the layer before the bypassed one returned
        self._others: dict[int, tuple] = {}  # what the layers returned besides their hidden states

    def __enter__(self) -> PrefixBypass:
        self._restore = []
        for index, layer in enumerate(self.stack.layers):
            self._restore.append((layer, layer.__dict__.get("forward")))
            layer.forward = self._forward_of(index, layer.forward)
        return self

    def __exit__(self, *_exception) -> None:
        for layer, forward in self._restore:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward

    def __iter__(self) -> Iterator[int]:
        """The layers in order; the model is to be run once, on the same inputs, for each."""
        self._kept, self._others = None, {}
        try:
            for layer in range(self.stack.num_layers):
                self._layer = layer
                yield layer
                self._kept = self._next
        finally:
            self._layer = None

    def _forward_of(self, index: int, forward):
        @torch.compiler.disable  # which layers are skipped changes with every run
        def run(*args, **kwargs):
            if self._layer is None or index > self._layer:
                return forward(*args, **kwargs)
            hidden = hidden_input(args, kwargs)
            if index == self._layer:
                output = forward(*args, **kwargs)
                self._next = hidden_output(output)
                if not isinstance(output, torch.Tensor):
                    self._others[index] = output[1:]
            elif index == self._layer - 1:
                hidden = self._kept
            return (hidden, *self._others[index]) if index in self._others else hidden

        return run
