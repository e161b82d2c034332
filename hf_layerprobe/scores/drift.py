"""Drift: how far each layer's weights have moved from their start (our own definition)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import LayerProbeError
from ..files import write_atomically
from ..weights import LiveWeights, one_matrix
from .bounded import TimeSlice, sampled_rows, spread
from .docs import docs_index
from .matching import best_matches
from .vectors import Vectors

FORMAT = 1
MEASURES = ("docs", "norm")


def start_of(weights: LiveWeights, *, sample: int | None) -> dict[str, torch.Tensor]:
    """The rows of every matrix that drift is measured on, on the CPU.

    Args:
        weights: The weights at the start.
        sample: Rows of each matrix; `None` for all.
    """
    rows = {}
    for layer in range(weights.stack.num_layers):
        for kind in weights.kinds:
            if parts := weights.parts(layer, kind):
                matrix = one_matrix(parts, kind)
                rows[f"{layer}.{kind}"] = matrix[sampled_rows(len(matrix), sample)].to("cpu", copy=True).contiguous()
    return rows


def save_start(rows: dict[str, torch.Tensor], path: Path, *, step: int, sample: int | None) -> None:
    """Writes what [`start_of`] found, so that a resumed run goes on measuring from the same start."""
    header = {"format": FORMAT, "step": step, "sample": sample}
    write_atomically(path, save(rows, {"hf_layerprobe": json.dumps(header)}))


class Start:
    """The start of a run, read matrix by matrix from its file.

    Args:
        path: The file.

    Attributes:
        step: The global step that it was taken at.
        sample: Rows of each matrix.

    Raises:
        LayerProbeError: No such file, not one of these, or one of a newer version.
    """

    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, framework="pt")
            header = json.loads((self._file.metadata() or {})["hf_layerprobe"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise LayerProbeError(f"{path} has no weights to measure drift from ({error}).") from error
        if header["format"] > FORMAT:
            raise LayerProbeError(f"{path} was written by a newer version of hf_layerprobe; upgrade to read it.")
        self.step, self.sample = header["step"], header["sample"]
        self.names = frozenset(self._file.keys())

    def rows(self, name: str) -> torch.Tensor:
        """The kept rows of `"<layer>.<kind>"`."""
        return self._file.get_tensor(name)


def drift(
    weights: LiveWeights, start: Start | None, layers: Sequence[int], time_slice: TimeSlice
) -> tuple[dict[str, dict[str, np.ndarray]], int]:
    """How far each matrix is from its start (our own definition).

    - `"norm"`: the relative change ‖W − W₀‖ / ‖W₀‖ (Frobenius), over the kept rows.
    - `"docs"`: the DOCS index of W₀ and W (arXiv 2501.16650): 1 when equal up to order, sign and scale of the rows. With a
      sample, only the rows of W₀ in it are matched (against all of W): one location instead of the mean of two.

    Args:
        weights: The weights now.
        start: What they were; `None` on a process that only helps to gather the weights.
        layers: The number that each layer had at the start.
        time_slice: Looked at before each matrix; at least one is measured.

    Returns:
        measure → kind → one value a layer, NaN where there is nothing to compare; and the number of matrices measured.

    Raises:
        LayerProbeError: Weights that cannot be read.
    """
    result = {name: {kind: np.full(len(layers), np.nan) for kind in weights.kinds} for name in MEASURES}
    places, matches, measured = [], [], 0
    wanted = [(kind, (kind, layer)) for layer in spread(range(len(layers))) for kind in weights.kinds]
    for kind, layer in time_slice.pieces(wanted):
        measured += 1
        name, parts = f"{layers[layer]}.{kind}", weights.parts(layer, kind)
        if start is None or not parts or name not in start.names:
            continue
        now = one_matrix(parts, kind)
        before, rows = start.rows(name).to(now.device), sampled_rows(len(now), start.sample)
        kept = now[rows].float()
        if kept.shape != before.shape or not before.any():
            continue
        change = torch.linalg.vector_norm(kept - before.float()) / torch.linalg.vector_norm(before.float())
        result["norm"][kind][layer] = float(change)
        vectors = Vectors.of(now, "out")
        if len(vectors):
            there, back = best_matches(Vectors.of(before, "out"), [vectors])[0]
            places.append((kind, layer))
            matches.append((there, back if isinstance(rows, slice) else there))
    for (kind, layer), (value, _) in zip(places, docs_index(matches), strict=True):
        result["docs"][kind][layer] = value
    return result, measured
