"""What the callback hands on at one step: arrays for the files and, under stable names, numbers for the trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PREFIX = "layerprobe"


@dataclass(frozen=True)
class Measurement:
    """One score at one step.

    Attributes:
        name: What was measured, such as `"avss"`, `"avss/near"` (on the evaluation data set near), `"docs/q"` or
            `"drift/norm"`.
        values: One value a layer, `[layers]`; or `[layers, layers]` with NaN for pairs that were not compared.
        logs: Numbers for `log_history` and the trackers, by their full names.
        about: How it was measured, for the file.
    """

    name: str
    values: np.ndarray
    logs: dict[str, float] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def per_layer(name: str, values: np.ndarray, layers: Sequence[int], width: int, **about: Any) -> Measurement:
    """A score with one number a layer; `layers` has the number that each layer had at the start of the run."""
    logs = {
        f"{PREFIX}/{name}/layer_{layer:0{width}}": float(value)
        for layer, value in zip(layers, values, strict=True)
        if np.isfinite(value)  # JSON has no NaN
    }
    return Measurement(name, np.asarray(values, dtype=np.float64), logs, about)


def neighbours(values: np.ndarray) -> np.ndarray:
    """Of a layer × layer map, each layer with the next: `[layers − 1]`; of anything else, itself."""
    return np.diagonal(values, offset=1) if values.ndim == 2 else values


def data_set(metrics: Mapping[str, Any]) -> str:
    """The name of the evaluated data set, from the prefix of its metrics; empty for the only one."""
    # The Trainer itself adds <prefix>_runtime, after the user's metrics.
    prefixes = [name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime")] or ["eval"]
    return "" if prefixes[-1] == "eval" else prefixes[-1].removeprefix("eval_")
