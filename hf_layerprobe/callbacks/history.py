"""The run on disk: one file a step in a `layerprobe` folder, and all of them read back as arrays."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..errors import LayerProbeError
from ..files import write_atomically
from .measurement import Measurement, neighbours

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "layerprobe"
FORMAT = 1
START = "start.safetensors"
_FILE = re.compile(r"step-(\d+)\.safetensors")


class SnapshotFolder:
    """Writes what is measured, one file a step.

    Args:
        path: The folder; made when something is written.
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def start(self) -> Path:
        """Where the weights at the start are, for drift."""
        return self.path / START

    def begin(self, step: int) -> str | None:
        """Makes room for a training that begins, or goes on, at this step.

        What a run that goes on has written after that step is removed: it is measured again. Another run's files are
        moved aside.

        Returns:
            What was done with files that were there, in words, if there were some.
        """
        later = [file for at, file in _files(self.path) if at > step]
        if not later:
            return None
        if step > 0:
            for file in later:
                file.unlink()
            return f"removed {len(later)} snapshots of steps after {step}, which are measured again"
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(aside)
        return f"moved the snapshots of another run to {aside.name}"

    def add(
        self,
        step: int,
        epoch: float | None,
        stack: str,
        layers: Sequence[int],
        found: Iterable[Measurement],
        *,
        replace: bool = True,
    ) -> None:
        """Adds measurements to the file of a step; of one name the latest counts, or the first without `replace`."""
        path = self.path / f"step-{step:08}.safetensors"
        arrays, header = _read(path) if path.is_file() else ({}, {"format": FORMAT, "step": step, "about": {}})
        for measurement in found:
            if measurement.name in arrays and not replace:
                continue
            arrays[measurement.name] = np.ascontiguousarray(measurement.values, dtype=np.float64)
            header["about"][measurement.name] = {**measurement.about, "stack": stack, "layers": list(layers)}
        header["epoch"] = epoch
        write_atomically(path, save(arrays, {"hf_layerprobe": json.dumps(header)}))


@dataclass(frozen=True)
class LayerProbeHistory:
    """Everything that [`LayerProbeCallback`] has measured in a run.

    Layers have the numbers that they had at the start of the run (0-based): after layers were removed in training, their
    places are NaN.

    Attributes:
        steps: name → global steps, ascending, `[snapshots]`. Names are `"avss"`, `"avss/near"` for one of several
            evaluation data sets, `"docs/q"`, `"drift/norm"`, `"drift/docs/q"`.
        epochs: name → epochs, `[snapshots]`.
        values: name → `[snapshots, layers]` float64, or `[snapshots, layers, layers]` for DOCS; NaN for what was not
            measured or compared.
        about: name → how it was measured at the last step.
    """

    steps: dict[str, np.ndarray]
    epochs: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    about: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, path: str | Path) -> LayerProbeHistory:
        """Reads a run.

        Args:
            path: The Trainer's `output_dir`, or the `layerprobe` folder in it.

        Raises:
            LayerProbeError: No snapshots there, a damaged file, or one of a newer version.
        """
        path = Path(path)
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        files = _files(folder)
        if not files:
            raise LayerProbeError(
                f"{path} has no snapshots of LayerProbeCallback (step-….safetensors, in a folder {FOLDER!r} of the Trainer's "
                "output_dir)."
            )
        steps: dict[str, list[int]] = {}
        epochs: dict[str, list[float]] = {}
        rows: dict[str, list[tuple[list[int], np.ndarray]]] = {}
        about: dict[str, dict[str, Any]] = {}
        for step, file in files:
            arrays, header = _read(file)
            for name, array in arrays.items():
                about[name] = header["about"][name]
                steps.setdefault(name, []).append(step)
                epochs.setdefault(name, []).append(float("nan") if header["epoch"] is None else header["epoch"])
                rows.setdefault(name, []).append((about[name]["layers"], array))
        return cls(
            steps={name: np.array(found) for name, found in steps.items()},
            epochs={name: np.array(found) for name, found in epochs.items()},
            values={name: _aligned(found) for name, found in rows.items()},
            about=about,
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.values)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.values:
            raise KeyError(f"no {name!r} in this run; measured: {', '.join(self.values)}")
        return self.values[name]

    def to_pandas(self, name: str) -> pd.DataFrame:
        """Steps × layers; for DOCS each layer with the next, the columns named `"0-1"`, `"1-2"`…"""
        import pandas as pd

        values = self[name]
        layers = range(values.shape[1])
        columns = [f"{i}-{i + 1}" for i in layers[:-1]] if values.ndim == 3 else list(layers)
        index = pd.Index(self.steps[name], name="step")
        return pd.DataFrame([neighbours(row) for row in values], index=index, columns=columns)

    def plot(self, path: str | Path, names: Sequence[str] | None = None) -> Path:
        """Draws layers × steps, one panel a name; for DOCS each layer with the next.

        Args:
            path: The PNG file to write.
            names: Which ones; all by default.

        Raises:
            KeyError: No such name.
        """
        # Points back, as in SimilarityMatrix: a result that people want to see draws itself.
        from ..report.history_figure import history_figure

        frames = {name: self.to_pandas(name) for name in (self.names if names is None else names)}
        return history_figure(frames, self.about, path)


def _files(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) in order."""
    found = [(match, file) for file in folder.glob("step-*") if (match := _FILE.fullmatch(file.name))]
    return sorted((int(match[1]), file) for match, file in found)


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})["hf_layerprobe"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise LayerProbeError(f"{path} is not a snapshot ({type(error).__name__}: {error}).") from error
    if header["format"] > FORMAT:
        raise LayerProbeError(f"{path} was written by a newer version of hf_layerprobe; upgrade to read it.")
    return arrays, header


def _aligned(rows: list[tuple[list[int], np.ndarray]]) -> np.ndarray:
    """One array with a place for every layer that the run ever had."""
    number = 1 + max(max(layers) for layers, _ in rows)
    result = np.full((len(rows), *[number] * rows[0][1].ndim), np.nan)
    for at, (layers, array) in enumerate(rows):
        result[(at, *np.ix_(*[layers] * array.ndim))] = array
    return result
