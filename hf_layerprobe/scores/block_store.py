"""Finished rows of a similarity run on disk, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..errors import LayerProbeError


class BlockStore:
    """A folder of JSON lines, one file a process; each line is one finished row.

    Args:
        folder: Where to keep them; made if missing.
        run_id: What the rows belong to: weights and options.

    Raises:
        LayerProbeError: The folder holds rows of another run.
    """

    def __init__(self, folder: str | Path, run_id: str):
        self.folder = Path(folder)
        self.run_id = run_id
        self.folder.mkdir(parents=True, exist_ok=True)

    def load(self) -> dict[str, list[list[float]]]:
        """key → row, of every process of earlier runs; a line that was cut off while being written is left out."""
        rows = {}
        for path in sorted(self.folder.glob("rows-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if entry["run"] != self.run_id:
                    raise LayerProbeError(
                        f"{path} holds rows of another run (other weights or arguments); nothing was computed. Name another "
                        "folder, or remove this one to start again."
                    )
                rows[entry["key"]] = entry["row"]
        return rows

    def save(self, key: str, row: list[list[float]]) -> None:
        # A leading newline: after a line that was cut off, the next one still stands alone.
        line = "\n" + json.dumps({"run": self.run_id, "key": key, "row": row}) + "\n"
        with (self.folder / f"rows-{os.environ.get('RANK', '0')}.jsonl").open("a", encoding="utf-8") as file:
            file.write(line)
