"""optimum: its command line, its knowledge of tasks, its inputs, and an export of a pruned model to ONNX."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers as tf
from optimum.commands import optimum_cli
from optimum.utils import (
    DummyAudioInputGenerator,
    DummySeq2SeqDecoderTextInputGenerator,
    DummyTextInputGenerator,
    DummyVisionInputGenerator,
    NormalizedConfigManager,
)
from test_hub import hub, store  # noqa: F401
from tiny import tiny_folder, tiny_model

from hf_layerprobe import LayerProbeError, docs, find_stacks, prune_layers
from hf_layerprobe.loading import load_model
from hf_layerprobe.stacks import bypassed


def run(monkeypatch, *args, code=0):
    monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        optimum_cli.main()
    assert ended.value.code == code


def test_the_command_is_registered(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "--help")
    assert "layerprobe" in capsys.readouterr().out
    folder = tiny_folder(tmp_path / "model")
    run(monkeypatch, "layerprobe", "docs", folder, "--kinds", "q", "--json")
    found = json.loads(capsys.readouterr().out)["values"]["q"]
    np.testing.assert_allclose(found, docs(folder, kinds=["q"])["q"])
    run(monkeypatch, "layerprobe", "prune", folder, "--remove", "9", "--output", tmp_path / "out", code=2)
    assert "layers 0 to 3" in capsys.readouterr().err


def test_the_installed_package_registers_it():
    places = find_spec("optimum.commands.register").submodule_search_locations
    # An __init__.py would hide optimum itself.
    assert [file.name for place in places for file in Path(place).glob("*.py")] == ["register_layerprobe.py"]


def test_the_task_on_the_hub_names_the_class(hub, tmp_path):  # noqa: F811
    folder = tiny_folder(tmp_path / "model", "bert")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    store(hub, "ada/bert", folder, pipeline_tag="fill-mask")
    store(hub, "ada/unknown", folder)
    assert type(load_model("ada/bert")) is tf.BertForMaskedLM
    for name in ("ada/unknown", folder):
        with pytest.raises(LayerProbeError, match="names 'no class' under architectures"):
            load_model(name)


def test_a_pruned_model_is_exported_to_onnx(tmp_path):
    prune_layers(tiny_model("llama"), remove=[1], output_dir=tmp_path / "out")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    names = dict(input_names=list(inputs), output_names=["logits"])
    torch.onnx.export(
        Logits(model).eval(), tuple(inputs.values()), tmp_path / "model.onnx", dynamo=True, verbose=False, **names
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(**inputs).logits.numpy(), rtol=1e-4, atol=1e-4)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


GENERATORS = {
    "input_ids": DummyTextInputGenerator,
    "attention_mask": DummyTextInputGenerator,
    "decoder_input_ids": DummySeq2SeqDecoderTextInputGenerator,
    "pixel_values": DummyVisionInputGenerator,
    "input_features": DummyAudioInputGenerator,
}


@pytest.mark.parametrize(
    "family, names",
    {
        "llama": ("input_ids", "attention_mask"),
        "bert": ("input_ids", "attention_mask"),
        "vit": ("pixel_values",),
        "t5": ("input_ids", "decoder_input_ids"),
        "whisper": ("input_features", "decoder_input_ids"),
    }.items(),
)
def test_a_pruned_model_on_the_inputs_of_optimum(family, names):
    """They are made by other code than the inputs of the check, so they would show what these leave out."""
    model = tiny_model(family)
    stack = find_stacks(model)[0]
    small = prune_layers(model, remove=[1])
    normalised = NormalizedConfigManager.get_normalized_config_class(model.config.model_type)(model.config)
    sizes = dict(batch_size=2, sequence_length=9, nb_max_frames=48, feature_size=16)
    inputs = {name: GENERATORS[name]("feature-extraction", normalised, **sizes).generate(name) for name in names}
    with torch.no_grad():
        plain = model(**inputs)[0]
        with bypassed(stack, [1]):
            expected = model(**inputs)[0]
        torch.testing.assert_close(small(**inputs)[0], expected, rtol=0, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3  # the removed layer did something on them
