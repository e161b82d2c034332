"""DOCS and drift of the weights at one step, in a bounded slice of time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers.utils import logging

from ..scores.bounded import TimeSlice, docs_of_pairs
from ..scores.drift import Start, drift
from ..weights import LiveWeights
from .measurement import PREFIX, Measurement, per_layer

logger = logging.get_logger(__name__)


def docs_now(
    weights: LiveWeights, label: Sequence[str], time_slice: TimeSlice, *, maps: bool, sample: int | None
) -> list[Measurement]:
    """Similarity of adjacent layers, or of all.

    Args:
        weights: The weights.
        label: Further parts of the names.
        time_slice: How long it may take.
        maps: Compare all pairs.
        sample: See [`docs_of_pairs`].

    Raises:
        LayerProbeError: Weights that cannot be read.
    """
    layers = weights.stack.num_layers
    pairs = [(i, j) for i in range(layers) for j in range(i + 1, layers if maps else min(i + 2, layers))]
    found = docs_of_pairs(weights, pairs, time_slice, sample=sample)
    _say("DOCS", found.compared, found.wanted, "pairs of matrices", time_slice, sample)
    measurements = []
    seconds = time_slice.spent
    for kind in weights.kinds:
        name, known = "/".join(["docs", *label, kind]), np.isfinite(found.values[kind])
        logs = {}
        for part, array in (("mean_neighbour", found.values[kind]), ("mean_neighbour_excess", found.excess[kind])):
            adjacent = np.diagonal(array, offset=1)
            if not np.isnan(adjacent).all():
                logs[f"{PREFIX}/{name}/{part}"] = float(np.nanmean(adjacent))
        if logs:
            about = {"sample": sample, "seconds": seconds, "compared": int(known.sum()) // 2, "pairs": len(pairs)}
            measurements.append(Measurement(name, found.values[kind], logs, about))
    return measurements


def drift_now(
    weights: LiveWeights,
    start: Start | None,
    layers: list[int],
    label: Sequence[str],
    time_slice: TimeSlice,
    width: int,
) -> list[Measurement]:
    """Each layer against its own start: the mean over the kinds for the trackers, each kind for the file.

    Args:
        weights: The weights.
        start: What they were; `None` on a process that only helps to gather them.
        layers: The number that each layer had then.
        label: Further parts of the names.
        time_slice: How long it may take.
        width: Digits of a layer's number.

    Raises:
        LayerProbeError: Weights that cannot be read.
    """
    found, measured = drift(weights, start, layers, time_slice)
    if start is None:
        return []
    _say("Drift", measured, len(layers) * len(weights.kinds), "matrices", time_slice, start.sample)
    about = {"sample": start.sample, "seconds": time_slice.spent, "since_step": start.step}
    measurements = []
    for measure, kinds in found.items():
        name = "/".join(["drift", *label, measure])
        stacked = np.stack(list(kinds.values()))
        known = np.isfinite(stacked).sum(0)
        mean = np.nansum(stacked, 0) / np.where(known, known, np.nan)
        measurements.append(per_layer(name, mean, layers, width, **about))
        measurements += [Measurement(f"{name}/{kind}", values, {}, about) for kind, values in kinds.items()]
    return measurements


def _say(what: str, done: int, wanted: int, unit: str, time_slice: TimeSlice, sample: int | None) -> None:
    rows = "all vectors" if sample is None else f"{sample} vectors of each matrix"
    line = f"{what}: {done} of {wanted} {unit} in {time_slice.spent:.2f} s, {rows}."
    logger.info(line)
    if done < wanted:
        logger.warning_once(
            f"{line} max_seconds={time_slice.seconds} allows no more; means are over those, the same ones each time as far "
            "as the time suffices. Raise max_seconds, lower sample, or name fewer kinds."
        )
