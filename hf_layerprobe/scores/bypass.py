"""The truth that other scores approximate: how much the loss rises when a layer is bypassed."""

from __future__ import annotations

import numpy as np
import torch
from transformers.utils import logging

from ..activations.processes import sum_of_all
from ..activations.text import Batch
from ..precision import widest
from ..stacks import LayerStack, bypassed
from ..stacks.prefix import PrefixBypass
from .batch_loss import BatchLoss, check_counted
from .registry import OURS, register

logger = logging.get_logger(__name__)
# Both ways run the same kernels on the same numbers; experts are summed in an order that may differ.
SAME = 1e-4


class BypassLoss:
    """Mean loss without each layer, minus the mean loss with all of them, in nats a label.

    Runs the model once for each layer, on every batch. The layers before the bypassed one are not run again, which
    halves the work; where that changes the loss (layers that read what earlier ones have left somewhere else), the
    model is run whole. Both ways are compared on the first sequence of the data, for every layer.

    Args:
        stack: The layers.
        prefix: False runs the whole model for each layer.

    Raises:
        LayerProbeError: Batches without labels for a model that is not a causal language model.
    """

    def __init__(self, stack: LayerStack, *, prefix: bool = True):
        self.stack = stack
        self.prefix = prefix
        self._loss = BatchLoss(stack.model)
        self._checked = not prefix
        device = stack.model.device
        self._sums = torch.zeros(
            stack.num_layers + 1, dtype=widest(device), device=device
        )  # without each, and with all
        self._labels = torch.zeros((), dtype=torch.long, device=device)

    def measure(self, batch: Batch) -> None:
        with torch.no_grad():
            if not self._checked:
                self._check(batch)
            total, labels = self._loss(batch)
            sums = torch.stack([*(self._with_prefix if self.prefix else self._whole)(batch), total])
        self._sums += sums.to(self._sums)
        self._labels += labels.to(self._labels)

    def add_up(self) -> None:
        sum_of_all(self._sums)
        sum_of_all(self._labels)

    def compute(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        means = (self._sums / check_counted(self._labels)).cpu().double().numpy()
        return means[:-1] - means[-1], {"loss": means[:-1]}

    def _with_prefix(self, batch: Batch) -> list[torch.Tensor]:
        with PrefixBypass(self.stack) as runs:
            return [self._loss(batch)[0] for _ in runs]

    def _whole(self, batch: Batch) -> list[torch.Tensor]:
        sums = []
        for layer in range(self.stack.num_layers):
            with bypassed(self.stack, [layer]):
                sums.append(self._loss(batch)[0])
        return sums

    def _check(self, batch: Batch) -> None:
        self._checked = True
        rows = {len(value) for value in batch.values()}
        first = {name: value[:1] for name, value in batch.items()} if len(rows) == 1 else batch
        whole = torch.stack(self._whole(first))
        try:
            difference = (torch.stack(self._with_prefix(first)) - whole).abs().max()
            self.prefix = bool(difference <= SAME * whole.abs().max())
        except Exception as error:  # whatever a layer raises that misses what a skipped one leaves behind
            self.prefix = False
            difference = f"{type(error).__name__}: {error}"
        if not self.prefix:
            logger.warning(
                f"Layers of {self.stack.path} depend on earlier ones by more than their input ({difference}): bypass runs "
                "the whole model for each layer."
            )


register("bypass", BypassLoss, source=OURS, higher_is_more_important=True, needs_data=True, own_runs=True)
