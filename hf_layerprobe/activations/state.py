"""Storing, resuming and adding up what accumulators have seen."""

from __future__ import annotations

from typing import Any

import torch


class Resumable:
    """An accumulator whose attributes, or the entries of its dicts, are statistics that can be added up.

    Those have `state_dict`, `load_state_dict` and `merge` themselves, as `RunningStatistics` and `TokenMean` do; everything
    else is how the accumulator was built, and is not stored.
    """

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All sums, on the CPU, by name."""
        return {f"{name}.{key}": value for name, part in self._parts() for key, value in part.state_dict().items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on from what `state_dict` of an accumulator built in the same way has given."""
        for name, part in self._parts():
            part.load_state_dict({key: state[f"{name}.{key}"] for key in part.state_dict()})

    def merge(self, other: Any) -> None:
        """Adds what another one, built in the same way, has seen."""
        for (_, mine), (_, theirs) in zip(self._parts(), other._parts(), strict=True):
            mine.merge(theirs)

    def _parts(self) -> list[tuple[str, Any]]:
        attributes = [
            (f"{name}.{key}" if key else name, value)
            for name, entry in vars(self).items()
            for key, value in (entry.items() if isinstance(entry, dict) else [("", entry)])
        ]
        return [(name, value) for name, value in attributes if hasattr(value, "merge")]


class Sum:
    """A sum of numbers or tensors of one shape; nothing here waits for the device."""

    def __init__(self):
        self.value: torch.Tensor | float = 0.0

    def add(self, value: torch.Tensor | float) -> None:
        self.value = self.value + value

    def merge(self, other: Sum) -> None:
        here = self.value.device if isinstance(self.value, torch.Tensor) else "cpu"
        self.add(other.value.to(here) if isinstance(other.value, torch.Tensor) else other.value)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"value": torch.as_tensor(self.value).cpu()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.value = state["value"].clone()
