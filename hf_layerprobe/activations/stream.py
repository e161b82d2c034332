"""Hands each layer's input and output, and which tokens count, to accumulators while a model runs.

The one place that adds and removes hooks. A hook on the model opens the layer hooks for one forward pass and closes
them after it, also when the pass fails, so that nothing is left on the layers between passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import nn
from transformers.utils import logging

from ..errors import LayerProbeError
from ..stacks import LayerStack
from ..stacks.bypass import hidden_input, hidden_output
from .form import StreamForm
from .masks import TokenMasks
from .sites import find_taps

logger = logging.get_logger(__name__)


class Accumulator(Protocol):
    """Statistics of the residual stream around each layer, and of its sublayers if the attribute `sites` names some.

    Those with a higher attribute `asks` (0 without one) are fed first: they ask for more numbers of the same activations,
    among which the others find theirs.
    """

    def update(
        self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None, **sites: torch.Tensor
    ) -> None:
        """Takes one layer of one batch.

        Args:
            layer: Index of the layer.
            before: What enters the layer, `[batch, tokens, hidden]`.
            after: What leaves it, `[batch, tokens, hidden]`.
            mask: `[batch, tokens]` on the same device, true for the tokens that count; `None` when all do.
            sites: Activations at each site that the attribute `sites` names (a tuple of `SUBLAYERS`), by its name,
                `[batch, tokens, width]`.
        """


class LayerStream:
    """Feeds accumulators from every forward pass of a model while open.

    A copy of the model, or a file of it, gets a stream that does nothing: who watches one model does not watch another.

    Args:
        stack: The layers to watch; `None` for a stream that does nothing.
        accumulators: Who gets the activations.
        guest: The passes are somebody else's: take only those in evaluation mode (or, if `training` is set, in training
            mode), and warn where a pass cannot be measured instead of stopping it.
    """

    training = False

    def __init__(self, stack: LayerStack | None, accumulators: Sequence[Accumulator] = (), *, guest: bool = False):
        self.stack = stack
        self.accumulators = sorted(accumulators, key=lambda each: -getattr(each, "asks", 0))
        self.guest = guest
        self._form = StreamForm(stack) if stack is not None else None
        self._taps = {site: find_taps(stack, site) for site in _sites(accumulators)}
        self._model_hooks: list = []
        self._layer_hooks: list = []

    def __reduce__(self):
        # Hooks travel with a module through copy.deepcopy and torch.save; the accumulators must not.
        return LayerStream, (None,)

    def open(self) -> LayerStream:
        if not self._model_hooks:
            model = self.stack.model
            self._masks = TokenMasks(self.stack)
            self._model_hooks = [
                model.register_forward_pre_hook(self._before_pass, with_kwargs=True),
                model.register_forward_hook(self._after_pass, always_call=True),
            ]
        return self

    def close(self) -> None:
        for handle in self._model_hooks:
            handle.remove()
        self._model_hooks = []
        self._end_pass()

    def __enter__(self) -> LayerStream:
        return self.open()

    def __exit__(self, *_exception) -> None:
        self.close()

    def _before_pass(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self._end_pass()  # a pass that failed in another hook before the model ran has left its layer hooks
        if self.stack is None or (self.guest and model.training != self.training):
            return
        self._masks.begin(args, kwargs)
        self._taken: list[dict[str, list[torch.Tensor]]] = [{} for _ in self.stack.layers]
        self._layer_hooks = [
            layer.register_forward_hook(self._layer_hook(index), with_kwargs=True)
            for index, layer in enumerate(self.stack.layers)
        ] + [
            tap.register(partial(self._take, self._taken[index].setdefault(site, [])))
            for site, taps in self._taps.items()
            for index, tap in enumerate(taps)
        ]

    def _after_pass(self, *_args) -> None:
        self._end_pass()

    def _end_pass(self) -> None:
        for handle in self._layer_hooks:
            handle.remove()
        if self._layer_hooks:
            self._masks.end()
        self._layer_hooks, self._taken, self._left = [], [], (None, None, None)

    def _entering(self, state: torch.Tensor) -> torch.Tensor:
        """What enters a layer: the same tensor that left the one before, so that what is known of it need not be found again."""
        left, version, after = self._left
        return (
            after
            if state is left and version is not None and _version(state) == version
            else self._form.as_batch(state.detach())
        )

    def _take(self, taken: list[torch.Tensor], values: torch.Tensor) -> None:
        taken.append(values.transpose(0, 1) if self._form.tokens_first and values.dim() == 3 else values)

    def _layer_hook(self, index: int):
        def take(_layer, args, kwargs, output):
            state = hidden_output(output)
            try:
                after = self._form.as_batch(state.detach())
                # A layer that lives on another device than the one before it moves its input only inside.
                before = self._entering(hidden_input(args, kwargs)).to(after.device)
                self._left = state, _version(state), after
                mask = self._masks.fit(before)
                sites = {site: self._taps[site][index].fit(taken, before) for site, taken in self._taken[index].items()}
            except LayerProbeError as error:
                if not self.guest:
                    raise
                logger.warning_once(f"The activations of this pass are not measured: {error}")
                return
            for accumulator in self.accumulators:
                wanted = {site: sites[site] for site in getattr(accumulator, "sites", ())}
                accumulator.update(index, before, after, mask, **wanted)

        return take


def _version(tensor: torch.Tensor) -> int | None:
    """Changes with every write to the tensor; `None` where that is not tracked."""
    return None if tensor.is_inference() else tensor._version


def _sites(accumulators: Sequence[Accumulator]) -> list[str]:
    return list(dict.fromkeys(site for each in accumulators for site in getattr(each, "sites", ())))
