"""What `LayerProbeCallback` sends to trackers, read back from the trackers' own files."""

import io
import json
import os
import sqlite3
import struct
import tempfile
from pathlib import Path

# Trackio reads it once, when it is first imported.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_model
from training import LAYERS, rows
from transformers import Trainer, TrainingArguments

from hf_layerprobe import LayerProbeCallback
from hf_layerprobe.callbacks.trackers import GREY, picture

SERIES = ("avss", "docs/q", "drift/norm", "drift/docs")


@pytest.fixture
def run(tmp_path):
    """A short training that reports to one tracker; returns its layerprobe entries, one a snapshot."""

    def train(tracker):
        # Nothing is to be published; early versions do not offer it.
        name = "trackio_static_space_id"
        options = {name: False} if hasattr(TrainingArguments, name) else {}
        args = TrainingArguments(
            str(tmp_path / "out"),
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            learning_rate=0.05,
            per_device_train_batch_size=2,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            report_to=[tracker],
            run_name="one",
            project="probed",
            trackio_space_id=None,
            **options,
        )
        callback = LayerProbeCallback(("avss", "docs", "drift"), maps=True, kinds=["q"])
        trainer = Trainer(
            tiny_model("llama"), args, train_dataset=rows(8, 1), eval_dataset=rows(4, 2), callbacks=[callback]
        )
        trainer.train()
        found = [e for e in trainer.state.log_history if "layerprobe/avss/layer_00" in e]
        assert [e["step"] for e in found] == [2, 4]
        return [{k: v for k, v in e.items() if k.startswith("layerprobe/")} for e in found]

    return train


def test_tensorboard(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    first, second = run("tensorboard")
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"images": 0, "histograms": 0}).Reload()
    for name in first:
        points = events.Scalars(f"train/{name}")
        assert [p.step for p in points] == [2, 4]
        assert [p.value for p in points] == pytest.approx([first[name], second[name]], rel=1e-6)
    for name in SERIES:
        images = events.Images(f"train/layerprobe/{name}/by_step")
        assert [image.step for image in images] == [2, 4]
        pixels = [np.asarray(Image.open(io.BytesIO(image.encoded_image_string))) for image in images]
        assert pixels[1].shape[1] == pytest.approx(480) and pixels[1].dtype == np.uint8
        histogram = events.Histograms(f"train/layerprobe/{name}/histogram")[1].histogram_value
        assert histogram.num == (LAYERS - 1 if name == "docs/q" else LAYERS)
    histogram = events.Histograms("train/layerprobe/avss/histogram")[1].histogram_value
    assert histogram.max == pytest.approx(max(v for k, v in second.items() if "/avss/" in k))
    (shape,) = {(i.height, i.width) for i in events.Images("train/layerprobe/docs/q/map")}
    assert shape == (480, 480)


def test_trackio(run):
    run_logs = run("trackio")
    folder = Path(os.environ["TRACKIO_DIR"])
    with sqlite3.connect(folder / "probed.db") as database:
        entries = [json.loads(metrics) for (metrics,) in database.execute("SELECT metrics FROM metrics ORDER BY id")]
    for entry, step in zip(run_logs, (2, 4), strict=True):
        at_step = [e for e in entries if e.get("train/global_step") == step]
        logged = {name: value for e in at_step for name, value in e.items()}
        for name, value in entry.items():
            assert logged[f"train/{name}"] == pytest.approx(value)
        for name in SERIES:
            image = logged[f"train/layerprobe/{name}/by_step"]
            assert image["_type"] == "trackio.image"
            assert Image.open(folder / "media" / image["file_path"]).width == 480
            assert logged[f"train/layerprobe/{name}/histogram"]["_type"] == "trackio.histogram"


def wandb_records(data):
    """The records of an offline run: protobuf messages in the log format of LevelDB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too short for a header: the rest of the block is padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def test_wandb_offline(run, tmp_path, monkeypatch):
    import wandb

    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    try:
        entries = run("wandb")
    finally:
        wandb.teardown()  # waits until all is written
    logged = {}
    for record in wandb_records(next(tmp_path.glob("wandb/offline-run-*/run-*.wandb")).read_bytes()):
        items = {}
        for item in record.history.item:  # media are one item for each of their fields
            name, *inner = item.nested_key or [item.key]
            value = json.loads(item.value_json)
            items[name] = {**items.get(name, {}), inner[0]: value} if inner else value
        logged.setdefault(items.get("train/global_step"), {}).update(items)
    for entry, step in zip(entries, (2, 4), strict=True):
        for name, value in entry.items():
            assert logged[step][f"train/{name}"] == pytest.approx(value)
        for name in SERIES:
            assert logged[step][f"train/layerprobe/{name}/by_step"]["_type"] == "image-file"
            assert logged[step][f"train/layerprobe/{name}/histogram"]["_type"] == "histogram"
    files = tmp_path.glob("wandb/offline-run-*/files/media/images/train/layerprobe/docs/q/map_*.png")
    assert [Image.open(file).size for file in files] == [(480, 480)] * 2


def test_mlflow(run, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    mlflow.set_tracking_uri(None)
    first, second = run("mlflow")
    folder = next((tmp_path / "mlruns").glob("*/*/metrics")).parent
    mlflow.flush_async_logging()
    with mlflow.start_run(run_id=folder.name):
        mlflow.flush_artifact_async_logging()
    for name in first:
        lines = [line.split() for line in (folder / "metrics" / name).read_text().splitlines()]
        assert [(int(step), float(value)) for _, value, step in lines] == [
            (2, pytest.approx(first[name])),
            (4, pytest.approx(second[name])),
        ]
    images = [path.name for path in (folder / "artifacts" / "images").iterdir()]
    for name in SERIES:
        key = f"train_layerprobe_{name}_by_step".replace("/", "_")
        assert sum(image.startswith(key) and image.endswith(".png") for image in images) == 2


def test_a_tracker_that_takes_no_pictures_ends_no_training(run, tmp_path, monkeypatch, caplog):
    def refuses(*_args, **_kwargs):
        raise OSError("no space left")

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_image", refuses)
    with caplog.at_level("WARNING", "hf_layerprobe"):
        run("tensorboard")
    assert "TensorBoardCallback takes no pictures: OSError: no space left" in caplog.text
    assert "train/layerprobe/avss/layer_00" in EventAccumulator(str(tmp_path / "events")).Reload().Tags()["scalars"]


def test_a_picture_shows_each_value_as_a_block():
    pixels = picture(np.array([[0.0, 1.0, np.nan], [0.5, 0.0, 1.0]]))
    assert pixels.shape == (480, 480, 3)
    blocks = pixels[120::240, 80::160]
    assert tuple(blocks[0, 2]) == GREY
    assert (blocks[0, 0] == blocks[1, 1]).all() and (blocks[0, 1] == blocks[1, 2]).all()
    assert blocks[0, 1].sum() > blocks[1, 0].sum() > blocks[0, 0].sum()  # viridis: from dark to light
    assert picture(np.full((2, 2), 3.0)).shape == (480, 480, 3)
