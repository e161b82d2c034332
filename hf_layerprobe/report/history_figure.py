"""Layers × steps of a training, one panel a score, as a PNG file."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..files import write_atomically
from .figures import COLOURS, FACE

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = 3


def history_figure(frames: Mapping[str, pd.DataFrame], about: Mapping[str, dict[str, Any]], path: str | Path) -> Path:
    """Draws how scores of layers changed with training.

    Args:
        frames: name → steps × layers (or pairs of layers), as of [`LayerProbeHistory.to_pandas`].
        about: name → how it was measured.
        path: The PNG file to write.
    """
    rows = math.ceil(len(frames) / COLUMNS)
    figure = Figure(figsize=(4.2 * min(COLUMNS, len(frames)), 3.2 * rows + 0.3), layout="constrained")
    panels = figure.subplots(rows, min(COLUMNS, len(frames)), squeeze=False)
    for axes, (name, frame) in zip(panels.flat[: len(frames)], frames.items(), strict=True):
        values = np.ma.masked_invalid(frame.to_numpy().T)  # [layers, snapshots]
        image = axes.imshow(values, cmap=COLOURS, aspect="auto", origin="upper", interpolation="nearest")
        sample = about[name].get("sample")
        axes.set_title(f"{name}{f'  ({sample} vectors a matrix)' if sample else ''}", loc="left", fontsize=10)
        axes.set(xlabel="step", ylabel="pair of layers" if isinstance(frame.columns[0], str) else "layer")
        names = [str(column) for column in frame.columns]
        steps = [str(step) for step in frame.index]
        for axis, labels in ((axes.xaxis, steps), (axes.yaxis, names)):
            axis.set_major_locator(MaxNLocator(nbins=7, integer=True))
            axis.set_major_formatter(lambda at, _, labels=labels: labels[int(at)] if 0 <= at < len(labels) else "")
        axes.tick_params(labelsize=8)
        figure.colorbar(image, ax=axes, shrink=0.9)
    for axes in panels.flat[len(frames) :]:
        axes.set_axis_off()
    path, drawn = Path(path), io.BytesIO()
    figure.savefig(drawn, format="png", **FACE)
    write_atomically(path, drawn.getvalue())
    return path
