"""Models that are quantised in memory: probed by what their weights stand for, and not pruned."""

import copy

import numpy as np
import pytest
import torch
import transformers as tf
from tiny import tiny_folder
from torchao.quantization import Int8WeightOnlyConfig

from hf_layerprobe import PruningError, docs, prune_layers, score_layers

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("dense"))
    settings = tf.TorchAoConfig(Int8WeightOnlyConfig())
    return tf.LlamaForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def dequantised(int8):
    """The plain model of the values that the quantised weights stand for."""
    config = copy.deepcopy(int8.config)
    del config.quantization_config
    model = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = int8.get_parameter(name)
            parameter.copy_(stored if type(stored) is torch.nn.Parameter else stored.dequantize())
    return model


def test_docs_of_int8_weights(int8, dequantised):
    assert type(int8.model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    found, expected = docs(int8), docs(dequantised)
    assert found.kinds == expected.kinds == ("q", "k", "v", "o", "gate", "up", "down")
    for kind in found.kinds:
        np.testing.assert_allclose(found[kind], expected[kind], rtol=1e-5)
    dense = docs(int8.config.name_or_path)
    assert max(np.abs(found[kind] - dense[kind]).max() for kind in found.kinds) > 1e-6  # they are not the dense weights


def test_scores_of_an_int8_model(int8, dequantised):
    names, data = ["avss", "avss-published", "influence", "docs"], [{"input_ids": IDS}]
    found, expected = (score_layers(model, data, by=names) for model in (int8, dequantised))
    for name in names:
        np.testing.assert_allclose(found[name].values, expected[name].values, rtol=1e-3)


def test_pruning_says_what_to_do_first(int8, tmp_path):
    with pytest.raises(
        PruningError, match="is quantised .TorchAoHfQuantizer.; prune the unquantised model and quantise"
    ):
        prune_layers(int8, remove=[1], output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pruned_model_quantises_like_any_other(tmp_path):
    prune_layers(tiny_folder(tmp_path / "dense"), remove=[1], output_dir=tmp_path / "out")
    settings = tf.TorchAoConfig(Int8WeightOnlyConfig())
    small = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=settings, dtype=torch.float32)
    dense = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found, expected = (model.eval()(input_ids=IDS).logits for model in (small, dense))
    assert small.config.num_hidden_layers == 3
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()
