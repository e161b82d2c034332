"""Taylor importance of a layer's weights (Shortened LLaMA, arXiv 2402.02834)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ..activations.processes import sum_of_all
from ..activations.text import Batch
from ..errors import LayerProbeError
from ..precision import widest
from ..stacks import LayerStack
from .batch_loss import BatchLoss, check_counted
from .registry import register


class Taylor:
    """Σ |w · ∂loss/∂w| over all parameters of a layer, with the loss averaged over all the data, in nats.

    Needs one run with a backward pass on every batch, and memory for the gradients of the stack in float32. Weights and
    their `grad` are not touched.

    Args:
        stack: The layers.

    Raises:
        LayerProbeError: Quantised weights, which have no gradient, or `torch.inference_mode()`; or batches without labels for a model that is not a
            causal language model.
    """

    def __init__(self, stack: LayerStack):
        if torch.is_inference_mode_enabled():
            raise LayerProbeError("taylor needs gradients, which torch.inference_mode() rules out; call it outside.")
        self.stack = stack
        self._loss = BatchLoss(stack.model)
        self._weights = [list(layer.parameters()) for layer in stack.layers]
        for index, weights in enumerate(self._weights):
            kinds = {str(weight.dtype) for weight in weights if not weight.is_floating_point()}
            if kinds or not weights:
                raise LayerProbeError(
                    f"taylor needs gradients, and layer {index} of {stack.path} has {', '.join(kinds) or 'no'} parameters. "
                    "Load the model unquantised."
                )
        self._gradients: dict[nn.Parameter, torch.Tensor] = {}
        self._labels = torch.zeros((), dtype=torch.long, device=stack.model.device)

    def measure(self, batch: Batch) -> None:
        weights = self._distinct()
        with torch.enable_grad(), _requiring_gradients(weights):
            total, labels = self._loss(batch)
            # Nothing is written to .grad, so there is nothing to restore. Experts that saw no token have no gradient.
            gradients = torch.autograd.grad(total, weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                before = self._gradients.get(weight)
                self._gradients[weight] = gradient.float() if before is None else before.add_(gradient)
        self._labels += labels.to(self._labels)

    def add_up(self) -> None:
        for weight in self._distinct():
            seen = self._gradients.get(weight)
            self._gradients[weight] = sum_of_all(
                torch.zeros_like(weight, dtype=torch.float32) if seen is None else seen
            )
        sum_of_all(self._labels)

    def _distinct(self) -> list[nn.Parameter]:
        return list(dict.fromkeys(weight for layer in self._weights for weight in layer))

    def compute(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        labels = check_counted(self._labels)
        sums = [
            sum(
                float((weight.detach().float() * self._gradients[weight]).abs().sum(dtype=widest(weight.device)))
                for weight in weights
                if weight in self._gradients
            )
            for weights in self._weights
        ]
        return np.array(sums) / labels, {}


@contextmanager
def _requiring_gradients(weights: list[nn.Parameter]) -> Iterator[None]:
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)


register(
    "taylor",
    Taylor,
    source="Taylor, Shortened LLaMA, arXiv 2402.02834",
    higher_is_more_important=True,
    needs_data=True,
    own_runs=True,
)
