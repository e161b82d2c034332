"""The notebooks run from top to bottom on the embedded default."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
# What each has to print, as patterns.
PRINTED = {
    "quickstart.ipynb": (
        "wreck the model.*avss-published",
        r"perplexity [\d.]+ -> [\d.]+, parameters 135 M -> 110 M",
    ),
    "hallucination.ipynb": (
        "TruthfulQA is left out",
        r"Layers that stand out: \{'summaries': \[[\d, ]*\], 'summaries, half of them swapped': \[[\d, ]*\]\}",
    ),
    "training.ipynb": (
        r"bert.encoder.layer: remove 1 of 6 layers by influence",
        r"docs/q .*drift/norm .*influence",
        r"accuracy 0\.\d+ -> 0\.\d+ without layer \d",
    ),
}


@pytest.mark.parametrize("name", PRINTED)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERPROBE_QUICK", "1")
    monkeypatch.delenv("LAYERPROBE_TRUTHFULQA", raising=False)
    notebook = nbformat.read(FOLDER / name, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    for pattern in PRINTED[name]:
        assert re.search(pattern, text)


@pytest.mark.parametrize("name", PRINTED)
def test_stored_outputs_name_no_place_on_a_machine(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert not re.search(r"(?<![\w.:/])/\w[\w.-]*/", text)


def test_every_notebook_is_run():
    assert sorted(path.name for path in FOLDER.glob("*.ipynb")) == sorted(PRINTED)
