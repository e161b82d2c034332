"""What DOCS and its rivals hand on: a map of layers × layers for each kind of matrix."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..errors import LayerProbeError
from ..files import write_atomically

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
DIFFERENCE = "difference of two maps by "


@dataclass
class SimilarityMatrix:
    """Layer × layer similarity, one matrix for each kind of weight.

    Attributes:
        values: kind → `[rows, columns]` float64 array; NaN where two layers cannot be compared, see `notes`.
        chance: kind → the value expected of independent random weights of the same shapes: one number where all layers
            have one shape, else an array like `values`; NaN for indices other than DOCS.
        axis: Which vectors were compared, `"out"` (one for each output neuron) or `"in"`.
        stack: Path of the stack.
        source: Where the index is defined, and whether these are differences of two maps.
        index: Name of the index.
        rows: kind → names of the rows: the layer's number (0-based), or `layer.expert`.
        columns: kind → names of the columns.
        standard_error: kind → array like `values`, for sampled results.
        notes: What is missing, and why.
    """

    values: dict[str, np.ndarray]
    chance: dict[str, float | np.ndarray]
    axis: str
    stack: str
    source: str
    index: str
    rows: dict[str, list[str]]
    columns: dict[str, list[str]]
    standard_error: dict[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.values)

    def __getitem__(self, kind: str) -> np.ndarray:
        if kind not in self.values:
            raise KeyError(f"no kind {kind!r} here; computed: {', '.join(self.values)}")
        return self.values[kind]

    @property
    def is_difference(self) -> bool:
        """Whether one map was subtracted from another."""
        return self.source.startswith(DIFFERENCE)

    def excess(self, kind: str) -> np.ndarray:
        """Similarity above chance, `(S − chance) / (1 − chance)`: 0 at chance, 1 when identical (our own definition)."""
        chance = self.chance[kind]
        return (self[kind] - chance) / (1 - chance)

    def mean_neighbour(self, kind: str) -> float:
        """Mean similarity of adjacent layers; NaN if no two can be compared."""
        neighbours = np.diagonal(self[kind], offset=1)
        return float(neighbours[~np.isnan(neighbours)].mean()) if not np.isnan(neighbours).all() else float("nan")

    def per_layer(self, kind: str) -> np.ndarray:
        """Each layer of the first model against the same layer of the second: the diagonal."""
        return np.diagonal(self[kind]).copy()

    def to_pandas(self) -> dict[str, pd.DataFrame]:
        """kind → data frame with the names of rows and columns."""
        import pandas as pd

        return {k: pd.DataFrame(v, index=self.rows[k], columns=self.columns[k]) for k, v in self.values.items()}

    def plot(self, folder: str | Path) -> list[Path]:
        """Draws a heat map for each kind into a folder, `<index>_<kind>.png`; the scale starts at the chance level.

        Of a difference it goes as far below zero as above it.
        """
        # The one arrow that points back: a result that people want to see draws itself.
        from ..report.figures import heat_map

        Path(folder).mkdir(parents=True, exist_ok=True)
        return [heat_map(self, kind, Path(folder) / f"{self.index}_{kind}.png") for kind in self.kinds]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers, for JSON."""
        return {
            **self._names(),
            "values": {kind: matrix.tolist() for kind, matrix in self.values.items()},
            "chance": {kind: np.asarray(level).tolist() for kind, level in self.chance.items()},
            "excess": {kind: self.excess(kind).tolist() for kind in self.kinds},
            "standard_error": {kind: matrix.tolist() for kind, matrix in self.standard_error.items()},
        }

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file with the arrays, and all names as JSON in its header."""
        groups = {"values": self.values, "chance": self.chance, "standard_error": self.standard_error}
        arrays = {
            f"{group}.{kind}": np.ascontiguousarray(array, dtype=np.float64)
            for group, members in groups.items()
            for kind, array in members.items()
        }
        metadata = {"hf_layerprobe": json.dumps({"format": FORMAT, "kinds": self.kinds, **self._names()})}
        write_atomically(Path(path), save(arrays, metadata))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> SimilarityMatrix:
        """Reads what `save` wrote.

        Raises:
            LayerProbeError: No such file, not one of these, or one of a newer version.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                names = json.loads((file.metadata() or {})["hf_layerprobe"])
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise LayerProbeError(
                f"{path} is not a saved SimilarityMatrix ({type(error).__name__}: {error})."
            ) from error
        if names.pop("format") > FORMAT:
            raise LayerProbeError(f"{path} was written by a newer version of hf_layerprobe; upgrade to read it.")
        kinds = names.pop("kinds")
        groups = {
            group: {kind: arrays[f"{group}.{kind}"] for kind in kinds if f"{group}.{kind}" in arrays}
            for group in ("values", "chance", "standard_error")
        }
        groups["chance"] = {kind: level if level.ndim else float(level) for kind, level in groups["chance"].items()}
        return cls(**groups, **{**names, "notes": tuple(names["notes"])})

    def __add__(self, other: SimilarityMatrix) -> SimilarityMatrix:
        return self._with(other, operator.add)

    def __sub__(self, other: SimilarityMatrix) -> SimilarityMatrix:
        difference = self._with(other, operator.sub)
        return difference if self.is_difference else replace(difference, source=DIFFERENCE + self.source)

    def __truediv__(self, number: float) -> SimilarityMatrix:
        return replace(
            self,
            values={kind: array / number for kind, array in self.values.items()},
            chance={kind: level / number for kind, level in self.chance.items()},
            standard_error={},
        )

    def _with(self, other: SimilarityMatrix, operation: Callable) -> SimilarityMatrix:
        """Both maps entry by entry, chance levels alike; the mean of two is `(a + b) / 2`."""
        mine, theirs = ((m.index, m.axis, m.rows, m.columns) for m in (self, other))
        if mine != theirs:
            what = ("index", "axis", "rows", "columns")
            differ = [name for name, a, b in zip(what, mine, theirs, strict=True) if a != b]
            raise LayerProbeError(f"These maps cannot be combined: they differ in {', '.join(differ)}.")
        return replace(
            self,
            values={kind: operation(self.values[kind], other.values[kind]) for kind in self.kinds},
            chance={kind: operation(self.chance[kind], other.chance[kind]) for kind in self.kinds},
            standard_error={},
            notes=(*self.notes, *(note for note in other.notes if note not in self.notes)),
        )

    def _names(self) -> dict[str, Any]:
        names = ("index", "axis", "stack", "source", "rows", "columns", "notes")
        return {name: getattr(self, name) for name in names}
