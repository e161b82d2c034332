"""The callback under DDP and FSDP2: the numbers are those of one process, and one process writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model
from training import LAYERS, logged, rows
from transformers import default_data_collator

from hf_layerprobe import LayerProbeHistory, docs, score_layers

TESTS = Path(__file__).parent


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_several_processes_log_what_one_would(tmp_path, kind):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, str(TESTS / "train_in_processes.py"), kind, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    log, other = (json.loads((tmp_path / f"log-{rank}.json").read_text()) for rank in (0, 1))
    assert not [entry for entry in other if any(name.startswith("layerprobe/") for name in entry)]
    (entry,) = [entry for entry in log if "layerprobe/avss/layer_00" in entry]
    start, model = tiny_model("llama"), tiny_model("llama")
    model.load_state_dict(torch.load(tmp_path / "state.pt"))
    batches = [default_data_collator(list(rows(5, 2, padding=2)))]
    for name in ("avss", "influence"):
        values = score_layers(model, batches, by=name).values
        assert logged(entry, f"layerprobe/{name}/") == pytest.approx(values.tolist(), rel=1e-5)
    assert entry["layerprobe/docs/up/mean_neighbour"] == pytest.approx(docs(model).mean_neighbour("up"), abs=1e-6)
    history = LayerProbeHistory.load(tmp_path)
    for layer in range(LAYERS):
        before, now = (m.model.layers[layer].mlp.up_proj.weight for m in (start, model))
        norm = ((now - before).norm() / before.norm()).item()
        assert history["drift/norm/up"][0, layer] == pytest.approx(norm, rel=1e-4) and norm > 0.01
    assert np.isfinite(history["drift/docs"]).all()
