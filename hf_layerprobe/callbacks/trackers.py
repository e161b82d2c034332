"""Sends numbers and pictures to the trackers of the Trainer whose event is being handled."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from matplotlib import colormaps
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from .measurement import PREFIX, Measurement, neighbours

logger = logging.get_logger(__name__)
T = TypeVar("T")
GREY = (217, 217, 217)
SIDE = 480  # pixels that a picture is enlarged to, about
COLUMNS = 512  # snapshots that a picture shows at most


def on_call_stack(kind: type[T]) -> T | None:
    """The nearest object of a kind whose method is being run.

    A Trainer hands its callbacks neither itself nor each other, but both it and its handler are on the call stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            return owner
        frame = frame.f_back
    return None


def log(
    found: Sequence[Measurement],
    past: dict[str, list[np.ndarray]],
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    context: Mapping[str, Any],
) -> None:
    """Logs measurements, with pictures and histograms where a tracker takes them.

    Args:
        found: What to log.
        past: name → its values so far, one row a snapshot; the new ones are appended.
        args: Of the event being handled, as are the others.
    """
    trackers = log_numbers({n: v for each in found for n, v in each.logs.items()}, args, state, control, context)
    for measurement in found:
        past.setdefault(measurement.name, []).append(neighbours(measurement.values))
    pictures, samples = None, None
    for tracker in trackers:
        send = next((SENDERS[kind.__name__] for kind in type(tracker).__mro__ if kind.__name__ in SENDERS), None)
        if send is None:
            continue
        if pictures is None:
            pictures, samples = _drawn(found, past)
        try:
            send(tracker, pictures, samples, state.global_step)
        except Exception as error:  # whatever a tracker does not like about a picture must not end a training
            logger.warning_once(f"{type(tracker).__name__} takes no pictures: {type(error).__name__}: {error}")


def log_numbers(
    logs: dict[str, float],
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    context: Mapping[str, Any],
) -> list[TrainerCallback]:
    """Does what `Trainer.log` does, for trackers alone; progress bars and printers are spared.

    Returns:
        The trackers.
    """
    if not logs:
        return []
    if state.epoch is not None:
        logs = {**logs, "epoch": state.epoch}
    state.log_history.append({**logs, "step": state.global_step})
    handler = on_call_stack(CallbackHandler)
    known = tuple(INTEGRATION_TO_CALLBACK.values())
    trackers = [callback for callback in handler.callbacks if isinstance(callback, known)] if handler else []
    for tracker in trackers:
        tracker.on_log(args, state, control, logs=dict(logs), **context)
    return trackers


def _drawn(
    found: Sequence[Measurement], past: Mapping[str, list[np.ndarray]]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Name → picture, and name → the values of all layers for a histogram."""
    pictures, samples = {}, {}
    for measurement in found:
        if not measurement.logs:
            continue
        name, rows = f"train/{PREFIX}/{measurement.name}", past[measurement.name][-COLUMNS:]
        same = [row for row in rows if row.shape == rows[-1].shape]  # since layers were last removed
        pictures[f"{name}/by_step"] = picture(np.stack(same, axis=1))  # layers × snapshots
        if measurement.values.ndim == 2 and np.isfinite(measurement.values[0, 2:]).any():  # not only neighbours
            pictures[f"{name}/map"] = picture(measurement.values)
        values = neighbours(measurement.values)
        samples[f"{name}/histogram"] = values[np.isfinite(values)]
    return pictures, samples


def picture(values: np.ndarray) -> np.ndarray:
    """A heat map as `[height, width, 3]` bytes, from the lowest value (dark) to the highest; NaN is grey."""
    known = np.isfinite(values)
    low, high = (values[known].min(), values[known].max()) if known.any() else (0.0, 0.0)
    scaled = np.where(known, (values - low) / (high - low if high > low else 1), 0)
    pixels = colormaps["viridis"](scaled, bytes=True)[..., :3]
    pixels[~known] = GREY
    return np.kron(pixels, np.ones((max(1, SIDE // values.shape[0]), max(1, SIDE // values.shape[1]), 1), np.uint8))


def _tensorboard(tracker, pictures: dict[str, np.ndarray], samples: dict[str, np.ndarray], step: int) -> None:
    for name, pixels in pictures.items():
        tracker.tb_writer.add_image(name, pixels, step, dataformats="HWC")
    for name, values in samples.items():
        tracker.tb_writer.add_histogram(name, values, step)


def _wandb(tracker, pictures: dict[str, np.ndarray], samples: dict[str, np.ndarray], step: int) -> None:
    images = {name: tracker._wandb.Image(pixels) for name, pixels in pictures.items()}
    histograms = {name: tracker._wandb.Histogram(values) for name, values in samples.items()}
    tracker._wandb.log({**images, **histograms, "train/global_step": step})


def _trackio(tracker, pictures: dict[str, np.ndarray], samples: dict[str, np.ndarray], step: int) -> None:
    images = {name: tracker._trackio.Image(pixels) for name, pixels in pictures.items()}
    histograms = {name: tracker._trackio.Histogram(values) for name, values in samples.items()}
    tracker._trackio.log({**images, **histograms, "train/global_step": step})


def _mlflow(tracker, pictures: dict[str, np.ndarray], samples: dict[str, np.ndarray], step: int) -> None:
    for name, pixels in pictures.items():  # MLflow has no histograms
        tracker._ml_flow.log_image(pixels, key=re.sub(r"[^\w-]", "_", name), step=step)


# The integration's class → how it takes pictures. Other trackers get the numbers alone.
SENDERS: dict[str, Callable[..., None]] = {
    "TensorBoardCallback": _tensorboard,
    "WandbCallback": _wandb,
    "TrackioCallback": _trackio,
    "MLflowCallback": _mlflow,
}
