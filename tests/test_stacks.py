"""Finding stacks and the config fields that they are bound to."""

import pytest
import torch
import transformers as tf
from tiny import FAMILIES, tiny_model

from hf_layerprobe import LayerProbeError, find_stacks
from hf_layerprobe.stacks import bypassed, resolve_stack

# family → (path, number of layers, config field) of every stack, in order
EXPECTED = {
    "llama": [("model.layers", 4, "num_hidden_layers")],
    "qwen3": [("model.layers", 4, "num_hidden_layers")],
    "gemma3": [("model.layers", 4, "num_hidden_layers")],
    "mistral": [("model.layers", 4, "num_hidden_layers")],
    "mixtral": [("model.layers", 4, "num_hidden_layers")],
    "gpt2": [("transformer.h", 4, "n_layer")],
    "opt": [("model.decoder.layers", 4, "num_hidden_layers")],
    "gpt_neox": [("gpt_neox.layers", 4, "num_hidden_layers")],
    "bert": [("bert.encoder.layer", 4, "num_hidden_layers")],
    "t5": [("encoder.block", 4, "num_layers"), ("decoder.block", 5, "num_decoder_layers")],
    "bart": [("model.encoder.layers", 4, "encoder_layers"), ("model.decoder.layers", 5, "decoder_layers")],
    "vit": [("vit.layers", 4, "num_hidden_layers")],
    "whisper": [("model.encoder.layers", 4, "encoder_layers"), ("model.decoder.layers", 5, "decoder_layers")],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_stacks_of_every_family(family):
    stacks = find_stacks(tiny_model(family))
    assert [(s.path, s.num_layers, s.config_path) for s in stacks] == EXPECTED[family]


def test_equal_counts_are_bound_by_effect_not_by_value():
    config = FAMILIES["t5"][1]()
    config.num_decoder_layers = config.num_layers = 4
    stacks = find_stacks(tf.T5ForConditionalGeneration(config))
    assert [s.config_path for s in stacks] == ["num_layers", "num_decoder_layers"]


def test_the_language_model_comes_before_its_tower():
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=50)
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**text), vision_config=tf.CLIPVisionConfig(**vision), image_token_id=5
    )
    stacks = find_stacks(tf.LlavaForConditionalGeneration(config))
    assert [(s.num_layers, s.config_path) for s in stacks] == [
        (3, "text_config.num_hidden_layers"),
        (2, "vision_config.num_hidden_layers"),
    ]


def test_experts_are_not_stacks_and_convolutions_neither():
    config = tf.Wav2Vec2Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, conv_dim=(8,) * 3,
        conv_kernel=(3,) * 3, conv_stride=(2,) * 3, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    assert [s.path for s in find_stacks(tf.Wav2Vec2Model(config))] == ["encoder.layers"]


def test_a_shared_layer_is_refused_with_the_reason():
    config = tf.AlbertConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=12,
        num_attention_heads=2,
        vocab_size=50,
        embedding_size=8,
    )
    model = tf.AlbertModel(config)
    assert find_stacks(model) == []
    with pytest.raises(LayerProbeError, match="counts 12 layers, but they share their weights"):
        resolve_stack(model)


def test_a_model_without_layers_is_refused():
    with pytest.raises(LayerProbeError, match="no repeated list of layers"):
        resolve_stack(torch.nn.Linear(2, 2))


def test_an_unknown_path_names_the_known_ones():
    with pytest.raises(LayerProbeError, match=r"'encoder.block' \(4 layers\), 'decoder.block' \(5 layers\)"):
        resolve_stack(tiny_model("t5"), "model.layers")


def test_find_stacks_wants_a_model():
    with pytest.raises(TypeError, match="expects a model"):
        find_stacks("model")


def test_an_unbound_stack_says_what_was_tried():
    """A list that no config field sets: the user added layers by hand."""
    model = tiny_model("llama")
    model.model.layers.append(type(model.model.layers[0])(model.config, 4))
    with pytest.raises(LayerProbeError, match="No config field of LlamaForCausalLM sets the length"):
        _ = find_stacks(model)[0].config_path


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_bypassing_every_layer_leaves_the_embeddings(family, token_batches):
    """Layers that return tensors and layers that return tuples; the hooks are gone afterwards."""
    model = tiny_model(family)
    stack = find_stacks(model)[0]
    body = model.model if family == "llama" else model.encoder
    final_norm = body.norm if family == "llama" else body.final_layer_norm
    with torch.no_grad():
        with bypassed(stack, range(stack.num_layers)):
            found = body(**token_batches[0]).last_hidden_state
        torch.testing.assert_close(found, final_norm(body.get_input_embeddings()(token_batches[0]["input_ids"])))
        assert not torch.allclose(body(**token_batches[0]).last_hidden_state, found)
