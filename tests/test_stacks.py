"""Finding stacks and the config fields that they are bound to."""

import pytest
import torch
import transformers as tf
from tiny import FAMILIES, redrawn, tiny_model

from hf_layerprobe import LayerProbeError, PruningError, find_stacks, prune_layers
from hf_layerprobe.stacks import bypassed, resolve_stack

VIT = "vit.layers" if hasattr(tf.ViTModel(FAMILIES["vit"][1]()), "layers") else "vit.encoder.layer"  # of older versions
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
    "vit": [(VIT, 4, "num_hidden_layers")],
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
    (stack,) = find_stacks(tf.Wav2Vec2Model(config))
    assert stack.path == "encoder.layers"
    stack.check([0, 2])  # the lists of the convolutions have as many entries as there are layers


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


def swin():
    config = tf.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[2, 4], num_heads=[2, 4], window_size=4, hidden_size=16
    )
    return redrawn(tf.SwinForImageClassification(config))


def test_the_stages_of_a_pyramid_are_stacks():
    model = swin()
    stacks = find_stacks(model)
    assert [(s.path, s.num_layers, s.config_path) for s in stacks] == [
        ("swin.encoder.layers.0.blocks", 2, "depths[0]"),
        ("swin.encoder.layers.1.blocks", 4, "depths[1]"),
    ]
    pruned = prune_layers(model, remove={stacks[0].path: [1], stacks[1].path: [1, 2]})
    assert list(pruned.config.depths) == [1, 2]
    with pytest.raises(
        PruningError, match="shift_size: 0 becomes 2.*repeats every 2 layers|repeats every 2 layers.*shift_size"
    ):
        stacks[1].check([0, 2, 3])


@pytest.mark.parametrize("part", [0, 1])
def test_one_field_that_drives_several_lists(part):
    """XLM keeps attention, MLP and norms in lists of their own."""
    config = tf.XLMConfig(emb_dim=32, n_layers=4, n_heads=4, n_words=64, max_position_embeddings=64, dropout=0.0)
    model = redrawn(tf.XLMWithLMHeadModel(config))
    stack = find_stacks(model)[part]
    paths = {f"transformer.{name}" for name in ("attentions", "ffns", "layer_norm1", "layer_norm2")}
    assert {stack.path, *(sibling.path for sibling in stack.siblings)} == paths
    pruned = prune_layers(model, remove=[0, 2], stack=stack)
    assert pruned.config.n_layers == 2 and len(pruned.transformer.layer_norm1) == 2
    with pytest.raises(PruningError, match="n_layers sets the length of .* so they lose the same layers"):
        prune_layers(model, remove={"transformer.attentions": [1], "transformer.ffns": [2]})
    prune_layers(model, remove={"transformer.attentions": [1], "transformer.ffns": [1]})


@pytest.mark.model_type("nemotron_h")
def test_a_list_whose_length_is_the_number_of_layers():
    kinds = ["mamba", "full_attention", "mlp", "mamba"]
    config = tf.NemotronHConfig(
        hidden_size=32, intermediate_size=48, layers_block_type=kinds, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=8,
    )  # fmt: skip
    stack = find_stacks(tf.NemotronHForCausalLM(config))[0]
    assert stack.config_path == "layers_block_type"
    kept = prune_layers(stack.model, remove=[0], verify=False).config.layers_block_type
    assert kept == config.layers_block_type[1:]


def test_both_streams_of_a_layer_are_bypassed():
    """LiLT passes text and layout on side by side, LXMERT language and vision."""
    config = tf.LiltConfig(
        hidden_size=48, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=64,
        channel_shrink_ratio=2, max_2d_position_embeddings=32,
    )  # fmt: skip
    model = redrawn(tf.LiltModel(config))
    stack = find_stacks(model)[0]
    inputs = dict(input_ids=torch.tensor([[5, 6, 7]]), bbox=torch.ones((1, 3, 4), dtype=torch.long))
    pruned = prune_layers(model, remove=[0], verify=False)
    with torch.no_grad(), bypassed(stack, [0]):
        expected = model(**inputs).last_hidden_state
    torch.testing.assert_close(pruned(**inputs).last_hidden_state, expected)


def test_bypassed_layers_that_return_what_is_to_be_added_add_nothing():
    config = tf.SuperGlueConfig(
        hidden_size=16, keypoint_encoder_sizes=[8, 16], gnn_layers_types=["self", "cross"] * 2, num_attention_heads=2
    )
    model = redrawn(tf.SuperGlueForKeypointMatching(config))
    keypoints = torch.randn(2, 5, 16)
    with torch.no_grad(), bypassed(find_stacks(model)[0], range(4)):
        assert torch.equal(model.gnn(keypoints)[0], keypoints)
