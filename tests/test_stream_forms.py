"""Layers whose states are not [batch, tokens, channels]: images place by place, and what cannot be told apart refused."""

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset
from tiny import GQA, redrawn
from training import entries

from hf_layerprobe import LayerProbeCallback, LayerProbeError, avss, find_stacks, score_layers
from hf_layerprobe.activations import LayerStream

SMALL = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=4, window_size=4)


def sam():
    config = tf.SamVisionConfig(**SMALL, global_attn_indexes=[1], mlp_dim=48, output_channels=8)
    return redrawn(tf.SamVisionModel(config))


def vitdet(**changes):
    config = tf.VitDetConfig(**(SMALL | changes), window_block_indices=[0, 2], residual_block_indices=[1])
    return redrawn(tf.VitDetModel(config))


def convnext():
    config = tf.ConvNextConfig(hidden_sizes=[12, 16, 20, 24], depths=[3, 2, 2, 2], layer_scale_init_value=1.0)
    return redrawn(tf.ConvNextModel(config))


def gemma3n():
    """Four streams side by side."""
    small = dict(head_dim=8, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, laurel_rank=4)
    config = tf.Gemma3nTextConfig(
        **GQA, **small, num_kv_shared_layers=0, activation_sparsity_pattern=None, layer_types=["full_attention"] * 4
    )
    return redrawn(tf.Gemma3nForCausalLM(config))


def images(count=3):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Keeps:
    def __init__(self):
        self.after = []

    def update(self, layer, before, after, mask):
        assert mask is None and before.shape == after.shape
        self.after.append(after.clone())


@pytest.mark.parametrize("build, channels", [(sam, -1), (vitdet, 1), (convnext, 1)])
def test_every_place_of_an_image_is_a_token(build, channels):
    model = build()
    stack, keeps, expected = find_stacks(model)[0], Keeps(), []
    for layer in stack.layers:
        layer.register_forward_hook(lambda _m, _a, out: expected.append(out if torch.is_tensor(out) else out[0]))
    with LayerStream(stack, [keeps]), torch.no_grad():
        model(pixel_values=images())
    assert len(keeps.after) == stack.num_layers
    for found, state in zip(keeps.after, expected, strict=True):
        assert torch.equal(found, state.movedim(channels, -1).reshape(3, -1, found.shape[-1]))
    names = ["avss", "avss-published", "influence", "angular"]
    whole = score_layers(model, [{"pixel_values": images()}], by=names)
    by_row = score_layers(model, [{"pixel_values": image[None]} for image in images()], by=names)
    for name in names:
        assert whole[name].data["tokens"] == 3 * keeps.after[0].shape[1] and (whole[name].values != 0).all()
        np.testing.assert_allclose(by_row[name].values, whole[name].values, rtol=1e-4)


def test_windows_of_an_image_are_no_rows_of_tokens():
    """Their tokens are in another order than the stream's."""
    batches = [{"pixel_values": images()}]
    assert np.isfinite(avss(sam(), batches, site="mlp").values).all()
    with pytest.raises(LayerProbeError, match=r"once on the \[3, 64, 24\] states .* on \[12, 4, 4, 24\]"):
        avss(sam(), batches, site="attention")


def test_a_form_that_cannot_be_told_is_refused():
    with pytest.raises(LayerProbeError, match=r"'encoder.layer' hand on states of shape \[3, 8, 8, 8\]"):
        avss(vitdet(hidden_size=8), [{"pixel_values": images()}])
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    for by in ("avss", "angular", "cka", "taylor", "bypass"):
        with pytest.raises(LayerProbeError, match=r"states of shape \[4, 2, 6, 32\].*'docs' scores its layers"):
            score_layers(gemma3n(), [{"input_ids": ids}], by=by)


def test_it_does_not_stop_training(make_trainer, caplog):
    model = gemma3n()
    ids = torch.randint(3, 60, (4, 6), generator=torch.Generator().manual_seed(0)).tolist()
    evaluation = Dataset.from_dict({"input_ids": ids, "labels": ids})
    trainer = make_trainer(
        LayerProbeCallback(("avss", "docs")), model=model, evaluation=evaluation, eval_strategy="steps", eval_steps=2
    )
    with caplog.at_level("WARNING", "hf_layerprobe"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert "not measured: The layers of 'model.layers' hand on states of shape" in caplog.text
    assert not entries(trainer, "layerprobe/avss") and len(entries(trainer, "layerprobe/docs")) == 2
