"""The callback under DDP and FSDP: the numbers are those of one process, and one process writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel
from train_in_processes import built
from training import LAYERS, entries, logged, rows
from transformers import default_data_collator

from hf_layerprobe import LayerProbeCallback, LayerProbeHistory, docs, score_layers

TESTS = Path(__file__).parent


def train(kind, tmp_path):
    """Trains in two processes; returns what each has logged, and what was printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, str(TESTS / "train_in_processes.py"), kind, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return *(json.loads((tmp_path / f"log-{rank}.json").read_text()) for rank in (0, 1)), run.stderr


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2-lora"])
def test_several_processes_log_what_one_would(tmp_path, kind):
    log, other, printed = train(kind, tmp_path)
    assert "Drift will not be logged" in printed and "Drift is not logged at step 1" in printed
    assert not [entry for entry in other if any(name.startswith("layerprobe/") for name in entry)]
    (entry,) = [entry for entry in log if "layerprobe/avss/layer_00" in entry]
    start, model = built(kind), built(kind)
    model.load_state_dict(torch.load(tmp_path / "state.pt"))
    label = ""
    if kind == "fsdp2-lora":
        start, model, label = start.merge_and_unload(), model.merge_and_unload(), "merged/"
    batches = [default_data_collator(list(rows(5, 2, padding=2)))]
    for name in ("avss", "influence"):
        values = score_layers(model, batches, by=name).values
        assert logged(entry, f"layerprobe/{name}/") == pytest.approx(values.tolist(), rel=1e-5)
    similarity = docs(model).mean_neighbour("up")
    assert entry[f"layerprobe/docs/{label}up/mean_neighbour"] == pytest.approx(similarity, abs=1e-6)
    history = LayerProbeHistory.load(tmp_path)
    for layer in range(LAYERS):
        before, now = (m.model.layers[layer].mlp.up_proj.weight for m in (start, model))
        norm = ((now - before).norm() / before.norm()).item()
        assert history[f"drift/{label}norm/up"][0, layer] == pytest.approx(norm, rel=1e-4) and norm > 0.01
    assert np.isfinite(history[f"drift/{label}docs"]).all()


def test_fsdp1_is_refused_in_one_line_and_trains_on(make_trainer, caplog):
    trainer = make_trainer(
        LayerProbeCallback(every=2), eval_strategy="steps", eval_steps=2, remove_unused_columns=False
    )
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        model = FullyShardedDataParallel(tiny_model("llama"), device_id=torch.device("cpu"), use_orig_params=True)
        trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model
        with caplog.at_level("WARNING", "hf_layerprobe"):
            trainer.train()
    finally:
        distributed.destroy_process_group()
    assert trainer.state.global_step == 4 and not entries(trainer)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "not watched: FSDP1 flattens" in line and "Use FSDP2 (fsdp_config={'version': 2})" in line
