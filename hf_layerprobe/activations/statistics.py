"""Exact, mergeable mean and variance, and the share of small values, for each layer."""

from __future__ import annotations

import torch


class RunningStatistics:
    """Count, mean, sum of squared deviations and number of small values for each layer, merged by Chan's formula.

    Rows of activations come in as their own mean and variance; everything across rows is float64, so that neither many
    tokens nor a large mean costs precision. Nothing here waits for the device.

    Args:
        num_layers: Number of layers.
    """

    def __init__(self, num_layers: int):
        self.count = torch.zeros(num_layers, dtype=torch.float64)
        self.mean = torch.zeros(num_layers, dtype=torch.float64)
        self.deviation = torch.zeros(num_layers, dtype=torch.float64)  # sum of squared deviations from the mean
        self.small = torch.zeros(num_layers, dtype=torch.float64)

    def update(
        self, layer: int, means: torch.Tensor, variances: torch.Tensor, small: torch.Tensor, weight: torch.Tensor
    ) -> None:
        """Adds rows of activations.

        Args:
            layer: Index of the layer.
            means: Mean of each row, `[rows]`.
            variances: Population variance of each row, `[rows]`.
            small: Number of small values in each row, `[rows]`.
            weight: Number of values in each row, `[rows]`; 0 leaves a row (padding) out.
        """
        if self.count.device != means.device and means.device.type != "mps":
            self._move(means.device)
        # One after the other: MPS cannot convert to float64.
        weight, means, variances, small = (t.to(self.count.device).double() for t in (weight, means, variances, small))
        # A row of padding may hold anything; NaN times zero is NaN.
        used = weight > 0
        means, variances, small = (torch.where(used, t, 0) for t in (means, variances, small))
        count = weight.sum()
        mean = (weight * means).sum() / count.clamp_min(1)
        deviation = (weight * (variances + (means - mean).square())).sum()
        self._merge_layer(layer, count, mean, deviation, small.sum())

    def _merge_layer(self, layer, count, mean, deviation, small) -> None:
        total = (self.count[layer] + count).clamp_min(1)
        delta = mean - self.mean[layer]
        self.mean[layer] += delta * count / total
        self.deviation[layer] += deviation + delta.square() * self.count[layer] * count / total
        self.count[layer] += count
        self.small[layer] += small

    def merge(self, other: RunningStatistics) -> None:
        """Adds what another instance has seen."""
        self._move(other.count.device)
        for layer in range(len(self.count)):
            self._merge_layer(layer, other.count[layer], other.mean[layer], other.deviation[layer], other.small[layer])

    def variance(self) -> torch.Tensor:
        """Population variance of each layer's values, `[num_layers]` float64."""
        return self.deviation / self.count

    def share_small(self) -> torch.Tensor:
        """Share of small values in each layer, at least the smallest share that this many values can show, 1 / count."""
        return self.small.clamp_min(1) / self.count

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`count`, `mean`, `deviation` and `small`, `[num_layers]` float64 on the CPU."""
        return {name: getattr(self, name).cpu() for name in ("count", "mean", "deviation", "small")}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name].clone())

    def _move(self, device: torch.device) -> None:
        for name, tensor in self.state_dict().items():
            setattr(self, name, tensor.to(device))
