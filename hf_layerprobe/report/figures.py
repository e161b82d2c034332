"""Heat maps of layer similarity, scores by depth, and one page with both, as PNG files.

Figures are made without pyplot, so that no global state of matplotlib is read or changed. Colours are those of viridis
and the Okabe-Ito palette, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from ..errors import LayerProbeError
from ..files import write_atomically
from ..scores import LayerScores, SimilarityMatrix
from ..scores.registry import OURS
from ..search import Curve

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#D9D9D9"
# Diagonals (a layer with itself) and pairs that cannot be compared.
COLOURS = colormaps["viridis"].with_extremes(bad=GREY)
# White is zero.
SIGNED = colormaps["PuOr_r"].with_extremes(bad=GREY)
# Values that span more than this factor are drawn on a log scale.
WIDE = 30
# The least range of a colour scale, as a share of the index's own, so that noise around chance does not look like structure.
NARROWEST = 0.05
COLUMNS = 4
FACE = dict(dpi=150, facecolor="white")


def heat_map(similarity: SimilarityMatrix, kind: str, path: str | Path) -> Path:
    """Draws the layer × layer similarity of one kind of weight matrix; differences in two colours around zero.

    Args:
        similarity: From [`docs`], or the difference of two.
        kind: One of its kinds.
        path: The PNG file to write.

    Raises:
        KeyError: `similarity` has no such kind.
    """
    values = _off_diagonal(similarity[kind])
    low, high = _limits(similarity, kind, values)
    # Only DOCS has a chance level, and a difference of two has none.
    has_chance = similarity.index == "docs" and low != -high
    what = "difference" if similarity.is_difference else "similarity"
    digits = ".3g" if similarity.index == "hsic" else ".3f"
    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    axes = figure.add_subplot()
    image = _draw_map(axes, values, low=low, high=high)
    # The layers' own numbers: a map may hold some of them only, or experts.
    for axis, names in ((axes.yaxis, similarity.rows[kind]), (axes.xaxis, similarity.columns[kind])):
        axis.set_major_formatter(lambda at, _, names=names: names[int(at)] if 0 <= at < len(names) else "")
    axes.set_title(
        f"{similarity.index.upper()} {what} of {kind} (axis={similarity.axis!r})\n"
        + (f"chance {low:.3f}, " if has_chance else "")
        + f"mean of neighbours {similarity.mean_neighbour(kind):{digits}}",
        fontsize=11,
    )
    axes.set(xlabel="layer", ylabel="layer")
    figure.colorbar(
        image, ax=axes, shrink=0.85, extend="min" if has_chance else "neither",
        label="DOCS index, from chance upwards" if has_chance else f"{similarity.index} {what}",
    )  # fmt: skip
    return _write(figure, path)


def depth_plot(scores: Sequence[LayerScores], path: str | Path) -> Path:
    """Draws every score by depth, one panel each, with the least important quarter of the layers marked.

    Args:
        scores: From [`score_layers`].
        path: The PNG file to write.
    """
    figure = Figure(figsize=(7.5, 0.5 + 1.75 * len(scores)), layout="constrained")
    panels = figure.subplots(len(scores), 1, sharex=True, squeeze=False)[:, 0]
    for axes, score in zip(panels, scores, strict=True):
        _draw_scores(axes, score)
        # Most fit on one line; a combination names the sources of all that it is made of.
        axes.set_title(textwrap.fill(f"{score.name}  —  {score.source}", 90), loc="left", fontsize=10)
    panels[-1].set_xlabel("layer")
    _legend(figure)
    return _write(figure, path)


def difference_plot(scores: LayerScores, path: str | Path) -> Path:
    """Draws by depth how differently the layers treat hallucinated and factual answers, and the EAVSS that comes of it.

    Above, the difference in variance with its bootstrap interval; layers whose interval covers zero are grey.

    Args:
        scores: From [`eavss`].
        path: The PNG file to write.

    Raises:
        KeyError: Scores without such an interval.
    """
    difference, low, high, covers = (
        scores.details[name] for name in ("variance_difference", "low", "high", "covers_zero")
    )
    layers, covers = np.arange(len(scores)), covers > 0
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.axhline(0, color="black", linewidth=0.8)
    for which, colour in ((covers, "#8C8C8C"), (~covers, ORANGE)):
        top.vlines(layers[which], low[which], high[which], color=colour, linewidth=2)
        top.plot(layers[which], difference[which], linestyle="none", marker="o", markersize=5, color=colour)
        bottom.plot(layers[which], scores.values[which], linestyle="none", marker="o", markersize=5, color=colour)
    # Layers differ by orders of magnitude; linear around zero, logarithmic beyond the middle one.
    top.set_yscale("symlog", linthresh=float(np.median(np.abs(difference))) or 1)
    bottom.set_yscale("log")
    top.set_title(
        f"Variance of the update, hallucinated − factual\n({scores.data['pairs']} pairs, {scores.data['confidence']:.0%} "
        f"interval excludes zero for {(~covers).sum()} of {len(scores)} layers)",
        loc="left", fontsize=10,
    )  # fmt: skip
    bottom.set_title(f"{scores.name}  —  {scores.source}", loc="left", fontsize=10)
    bottom.set_xlabel("layer")
    for axes in (top, bottom):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    marks = [Line2D([], [], color=colour, marker="o", linestyle="none") for colour in (ORANGE, "#8C8C8C")]
    figure.legend(
        marks, ["interval excludes zero", "interval covers zero"], loc="outside lower center", ncols=2, frameon=False,
        fontsize=9,
    )  # fmt: skip
    return _write(figure, path)


def loss_curve(curve: Curve, path: str | Path) -> Path:
    """Draws the loss against the number of layers removed, with the knee marked.

    Args:
        curve: From [`PruningPlan.curve`].
        path: The PNG file to write.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(curve.numbers, curve.losses, marker="o", markersize=4, color=BLUE)
    at = curve.numbers.index(curve.knee)
    axes.plot(
        curve.knee, curve.losses[at], marker="o", markersize=11, markerfacecolor="none", markeredgewidth=2, color=ORANGE
    )
    axes.set_title(
        f"Knee at {curve.knee} of {curve.numbers[-1]} layers measured:\n{curve.losses[at]:.3f} nats a token, "
        f"{curve.losses[0]:.3f} with all layers",
        loc="left", fontsize=10,
    )  # fmt: skip
    axes.set(xlabel="layers removed (greedy)", ylabel="loss on calibration text, nats a token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return _write(figure, path)


def overview(similarity: SimilarityMatrix, scores: Sequence[LayerScores], path: str | Path) -> Path:
    """Draws every heat map, on one scale, above every score by depth.

    The maps show the similarity above chance, `(S − chance) / (1 − chance)`, so that kinds of different shapes compare.

    Args:
        similarity: From [`docs`].
        scores: From [`score_layers`].
        path: The PNG file to write.

    Raises:
        LayerProbeError: Maps of another index, or of differences, which have no such level.
    """
    if similarity.index != "docs" or similarity.is_difference:
        raise LayerProbeError(
            f"overview draws DOCS above chance, and got the index {similarity.index!r} ({similarity.source}). Draw its maps "
            "with similarity.plot(folder)."
        )
    maps = {kind: _off_diagonal(similarity.excess(kind)) for kind in similarity.kinds}
    map_rows, score_rows = math.ceil(len(maps) / COLUMNS), math.ceil(len(scores) / COLUMNS)
    figure = Figure(figsize=(12, 3.1 * map_rows + 2.4 * score_rows + 0.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.1 * map_rows, 2.4 * score_rows + 0.6])
    cells = top.subplots(map_rows, COLUMNS, squeeze=False)
    high = max(_highest(values, 0) for values in maps.values())
    for axes, (kind, values) in zip(cells.flat[: len(maps)], maps.items(), strict=True):
        image = _draw_map(axes, values, low=0, high=high)
        neighbours = np.diagonal(values, offset=1)
        known = neighbours[~np.isnan(neighbours)]
        axes.set_title(f"{kind}  (neighbours {known.mean():+.3f})" if len(known) else kind, fontsize=10)
    for axes in cells.flat[len(maps) :]:
        axes.set_axis_off()
    top.colorbar(image, ax=cells, shrink=0.6, extend="min", label="similarity above chance (1: identical)")
    top.suptitle(f"Layers that resemble each other: DOCS of each kind of matrix (axis={similarity.axis!r})")
    panels = bottom.subplots(score_rows, COLUMNS, sharex=True, squeeze=False)
    for axes, score in zip(panels.flat[: len(scores)], scores, strict=True):
        _draw_scores(axes, score)
        axes.set_title(f"{score.name} ({'ours' if _is_ours(score) else 'paper'})", fontsize=10)
        axes.set_xlabel("layer")
    for axes in panels.flat[len(scores) :]:
        axes.set_axis_off()
    bottom.suptitle("Layers that matter: scores by depth, more important layers higher up")
    _legend(bottom)
    return _write(figure, path)


def _off_diagonal(values: np.ndarray) -> np.ndarray:
    """The values without a layer's comparison with itself, which is 1 by definition and says nothing."""
    values = values.copy()
    diagonal = np.diagonal(values)
    if values.shape[0] == values.shape[1] and np.all((diagonal == 1) | np.isnan(diagonal)):
        np.fill_diagonal(values, np.nan)
    return values


def _limits(similarity: SimilarityMatrix, kind: str, values: np.ndarray) -> tuple[float, float]:
    """The ends of the colour scale: from chance or the lowest value upwards, or as far below zero as above it."""
    # HSIC alone has no scale of its own: it grows with the weights.
    largest = float(np.nanmax(np.abs(values), initial=0))
    unit = largest if similarity.index == "hsic" else 1.0
    if similarity.is_difference or (values < 0).any():
        high = max(largest, NARROWEST * unit)
        return -high, high
    low = float(np.nanmean(similarity.chance[kind]) if similarity.index == "docs" else np.nanmin(values))
    return low, _highest(values, low, unit)


def _highest(values: np.ndarray, low: float, unit: float = 1.0) -> float:
    return max(float(np.nanmax(values, initial=low)), low + NARROWEST * unit)


def _draw_map(axes: Axes, values: np.ndarray, *, low: float, high: float):
    colours = SIGNED if low == -high else COLOURS
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, origin="upper", interpolation="nearest")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=8)
    return image


def _draw_scores(axes: Axes, score: LayerScores) -> None:
    layers = np.arange(len(score))
    weakest = score.least_important(max(1, len(score) // 4))
    colour = BLUE if _is_ours(score) else "black"
    axes.plot(layers, score.values, color=colour, linewidth=1.2, marker="o", markersize=3.5)
    axes.plot(weakest, score.values[weakest], linestyle="none", marker="s", markersize=6, color=ORANGE)
    low, high = score.values.min(), score.values.max()
    if low > 0 and high / low > WIDE:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if not score.higher_is_more_important:
        axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _is_ours(score: LayerScores) -> bool:
    return score.source.startswith(OURS)


def _legend(figure) -> None:
    marks = (("black", "o", "-"), (BLUE, "o", "-"), (ORANGE, "s", "none"))
    lines = [Line2D([], [], color=colour, marker=shape, linestyle=line) for colour, shape, line in marks]
    figure.legend(
        lines,
        ["defined by a paper", "our own definition", "the least important quarter"],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )


def _write(figure: Figure, path: str | Path) -> Path:
    path, picture = Path(path), io.BytesIO()
    figure.savefig(picture, format="png", **FACE)
    write_atomically(path, picture.getvalue())
    return path
