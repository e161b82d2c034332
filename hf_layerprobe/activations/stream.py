"""Hands each layer's input and output, and which tokens count, to accumulators while a model runs.

The one place that adds and removes hooks. A hook on the model opens the layer hooks for one forward pass and closes
them after it, also when the pass fails, so that nothing is left on the layers between passes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from ..stacks import LayerStack
from ..stacks.bypass import hidden_input, hidden_output


class Accumulator(Protocol):
    """Statistics of the residual stream around each layer."""

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Takes one layer of one batch.

        Args:
            layer: Index of the layer.
            before: What enters the layer, `[batch, tokens, hidden]`.
            after: What leaves it, `[batch, tokens, hidden]`.
            mask: `[batch, tokens]`, true for the tokens that count; `None` when all do.
        """


class LayerStream:
    """Feeds accumulators from every forward pass of a model while open.

    Args:
        stack: The layers to watch.
        accumulators: Who gets the activations.
        only_in_eval: Ignore passes in training mode.
    """

    def __init__(self, stack: LayerStack, accumulators: Sequence[Accumulator], *, only_in_eval: bool = False):
        self.stack = stack
        self.accumulators = accumulators
        self.only_in_eval = only_in_eval
        self._model_hooks: list = []
        self._layer_hooks: list = []
        self._masks: list[torch.Tensor] = []

    def open(self) -> LayerStream:
        if not self._model_hooks:
            model = self.stack.model
            self._signature = inspect.signature(model.forward)
            self._model_hooks = [
                model.register_forward_pre_hook(self._before_pass, with_kwargs=True),
                model.register_forward_hook(self._after_pass, always_call=True),
            ]
        return self

    def close(self) -> None:
        for handle in (*self._model_hooks, *self._layer_hooks):
            handle.remove()
        self._model_hooks, self._layer_hooks, self._masks = [], [], []

    def __enter__(self) -> LayerStream:
        return self.open()

    def __exit__(self, *_exception) -> None:
        self.close()

    def _before_pass(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self._after_pass()  # a pass that failed in another hook before the model ran has left its layer hooks
        if self.only_in_eval and model.training:
            return
        sequence_to_sequence = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self._masks = _token_masks(
            self._signature.bind_partial(*args, **kwargs).arguments,
            decoder=sequence_to_sequence and "decoder" in self.stack.path.split("."),
        )
        self._layer_hooks = [
            layer.register_forward_hook(self._layer_hook(index), with_kwargs=True)
            for index, layer in enumerate(self.stack.layers)
        ]

    def _after_pass(self, *_args) -> None:
        for handle in self._layer_hooks:
            handle.remove()
        self._layer_hooks, self._masks = [], []

    def _layer_hook(self, index: int):
        def take(_layer, args, kwargs, output):
            before, after = hidden_input(args, kwargs).detach(), hidden_output(output).detach()
            if before.dim() == 2:  # packed sequences: [tokens, hidden]
                before, after = before[None], after[None]
            mask = next((m for m in self._masks if m.shape == before.shape[:2]), None)
            for accumulator in self.accumulators:
                accumulator.update(index, before, after, mask)

        return take


def _token_masks(inputs: dict, *, decoder: bool) -> list[torch.Tensor]:
    """Boolean `[batch, tokens]` masks that may describe the stack's tokens."""
    inputs = inputs | inputs.get("kwargs", {})
    if decoder:
        masks, labels = [inputs.get("decoder_attention_mask")], inputs.get("labels")
        if inputs.get("decoder_input_ids") is None and isinstance(labels, torch.Tensor):
            masks.append(labels != -100)  # the decoder reads the labels shifted by one: as many tokens count
    else:
        masks = [inputs.get("attention_mask")]
    return [mask.bool() for mask in masks if isinstance(mask, torch.Tensor) and mask.dim() == 2]
