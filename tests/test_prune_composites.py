"""Surgery where other parts of a model read single layers: vision towers, deepstack, backbones, hybrid attention."""

import pytest
import torch
import transformers as tf
from tiny import GQA, TEXT, redrawn

from hf_layerprobe import PruningError, find_stacks, prune_layers
from hf_layerprobe.errors import VerificationError
from hf_layerprobe.stacks import bypassed
from hf_layerprobe.stacks.taps import TAPS
from hf_layerprobe.surgery import gate
from hf_layerprobe.surgery.inputs import search
from hf_layerprobe.surgery.outputs import difference

SIX = {**GQA, "num_hidden_layers": 6}
VISION = {**TEXT, "num_hidden_layers": 6, "image_size": 16, "patch_size": 4}
VISION.pop("vocab_size")
IMAGE = 63
ROPE = dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=10000.0)


def llava(tap=-2):
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**SIX), vision_config=tf.CLIPVisionConfig(**VISION), image_token_index=IMAGE,
        vision_feature_layer=tap,
    )  # fmt: skip
    return redrawn(tf.LlavaForConditionalGeneration(config))


def qwen3_vl():
    config = tf.Qwen3VLConfig(
        text_config=dict(**SIX, head_dim=8, rope_parameters=ROPE),
        vision_config=dict(
            depth=6, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4, spatial_merge_size=2,
            temporal_patch_size=2, out_hidden_size=32, num_position_embeddings=64, deepstack_visual_indexes=[1, 3, 4],
        ),
        image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
    )  # fmt: skip
    return redrawn(tf.Qwen3VLForConditionalGeneration(config))


def clip():
    text = {**SIX}
    text.pop("num_key_value_heads")
    return redrawn(tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=VISION)))


def dinov2(model_class=tf.Dinov2ForImageClassification, **options):
    config = dict(hidden_size=32, num_hidden_layers=6, num_attention_heads=4, image_size=16, patch_size=4, **options)
    return redrawn(model_class(tf.Dinov2Config(**config)))


def beit():
    return redrawn(tf.BeitForImageClassification(tf.BeitConfig(**VISION)))


def hybrid(kinds):
    config = tf.Qwen3NextConfig(
        **GQA, head_dim=8, layer_types=kinds, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip
    return redrawn(tf.Qwen3NextForCausalLM(config))


def llava_inputs():
    """Four image tokens would be wrong: a 16 × 16 image in patches of 4 has 16."""
    ids = torch.tensor([[5, 6, *[IMAGE] * 16, 7, 8, 9]])
    return dict(input_ids=ids, pixel_values=torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(3)))


def qwen_inputs():
    ids = torch.tensor([[5, 62, *[60] * 4, 63, 7, 8]])
    pixels = torch.rand((16, 3 * 2 * 16), generator=torch.Generator().manual_seed(3))
    return dict(
        input_ids=ids,
        mm_token_type_ids=(ids == 60).long(),
        pixel_values=pixels,
        image_grid_thw=torch.tensor([[1, 4, 4]]),
    )


@pytest.mark.parametrize(
    "make, inputs, part, removed, tap",
    [
        (llava, llava_inputs, 1, [5], -1),
        (llava, llava_inputs, 1, [4], -2),
        (llava, llava_inputs, 1, [0], -2),
        (lambda: llava(3), llava_inputs, 1, [0], 2),
        (lambda: llava(3), llava_inputs, 1, [2, 4], 2),
        (lambda: llava([3, -2]), llava_inputs, 1, [0], [2, -2]),
        (llava, llava_inputs, 0, [0, 3], -2),
        (qwen3_vl, qwen_inputs, 1, [0], [0, 2, 3]),
        (qwen3_vl, qwen_inputs, 1, [1], [0, 2, 3]),
        (qwen3_vl, qwen_inputs, 0, [3], [1, 3, 4]),
    ],
)
def test_images_reach_the_same_layers(make, inputs, part, removed, tap, tmp_path):
    """With pixels: the library's own check is off, this is the independent one."""
    model, inputs = make(), inputs()
    stack = find_stacks(model)[part]
    with torch.no_grad(), bypassed(stack, removed) as ran:
        expected = model(**inputs).logits
    assert ran == set(removed)
    prune_layers(model, remove=removed, stack=stack, output_dir=tmp_path / "out", verify=False)
    reloaded = type(model).from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
        dense = model(**inputs).logits
    config = reloaded.config
    assert tap in (
        getattr(config, "vision_feature_layer", None),
        config.vision_config.to_dict().get("deepstack_visual_indexes"),
    )
    if removed != [5]:  # LLaVA does not read its tower's last layer
        assert not torch.allclose(dense, expected, rtol=1e-3, atol=1e-3)
    prune_layers(model, remove=removed, stack=stack)  # and the own check accepts it


@pytest.mark.parametrize(
    "make, part, removed, name",
    [(lambda: llava(3), 1, [0], "vision_feature_layer"), (qwen3_vl, 1, [0], "deepstack_visual_indexes")],
)
def test_the_check_sees_images(make, part, removed, name, monkeypatch):
    """An index that does not follow its layer passes on text alone."""
    monkeypatch.delitem(TAPS, name)
    model = make()
    with pytest.raises(VerificationError, match="does not compute what the original does"):
        prune_layers(model, remove=removed, stack=find_stacks(model)[part])


def test_layers_that_image_features_are_added_to_stay():
    with pytest.raises(PruningError, match="first 3 text layers, by their position. Keep layers 0 to 2"):
        prune_layers(qwen3_vl(), remove=[2])


def test_two_deepstack_layers_do_not_become_one():
    model = qwen3_vl()
    with pytest.raises(PruningError, match=r"deepstack_visual_indexes=\[1, 3, 4\].*two of them are the same"):
        prune_layers(model, remove=[4], stack=find_stacks(model)[1], verify=False)


def test_a_check_that_cannot_show_images_refuses(monkeypatch):
    model = llava()
    monkeypatch.setitem(search.FORMS_OF, "image", lambda *_: iter([{"pixel_values": torch.zeros(1)}]))
    with pytest.raises(PruningError, match=r"No inputs could be made.*verify=False.*pixel_values"):
        prune_layers(model, remove=[0])
    assert prune_layers(model, remove=[0], verify=False).config.text_config.num_hidden_layers == 5


def test_a_layer_that_does_not_run_is_not_accepted(monkeypatch):
    model = llava()
    text = search.example_prompt(model, {"input_ids": None})
    monkeypatch.setattr(search, "_candidates", lambda model, tried: iter([text]))
    prune_layers(model, remove=[0])
    with pytest.raises(PruningError, match=r"0 of 1 layers ran"):
        prune_layers(model, remove=[0], stack=find_stacks(model)[1])


def test_a_layer_tap_needs_a_layer_before_it():
    config = tf.DPTConfig(
        **VISION, backbone_out_indices=[0, 2, 3, 5], neck_hidden_sizes=[8] * 4, fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    model = redrawn(tf.DPTForDepthEstimation(config))
    assert prune_layers(model, remove=[2]).config.backbone_out_indices == [0, 1, 2, 4]
    with pytest.raises(PruningError, match="none is left before one of them"):
        prune_layers(model, remove=[0])


@pytest.mark.parametrize("part", [0, 1])
def test_clip(part):
    model = clip()
    stack = find_stacks(model)[part]
    assert find_stacks(prune_layers(model, remove=[1], stack=stack))[part].num_layers == 5


def test_inputs_that_do_not_fit_are_refused_by_name():
    model = redrawn(
        tf.Dinov2ForImageClassification(
            tf.Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4)
        )
    )
    model.config.num_channels = 5
    with pytest.raises(PruningError, match=r"No inputs could be made.*pixel_values \[2, 5"):
        gate.verify({find_stacks(model)[0]: [1]}, model)


@pytest.mark.parametrize("make", [dinov2, beit])
def test_classifiers_with_a_backbone_config(make, tmp_path):
    model = make()
    pixels = torch.rand((1, 3, 16, 16))
    prune_layers(model, remove=[1, 3], output_dir=tmp_path / "out")
    reloaded = type(model).from_pretrained(tmp_path / "out")
    with torch.no_grad(), bypassed(find_stacks(model)[0], [1, 3]):
        torch.testing.assert_close(reloaded(pixels).logits, model(pixels).logits, rtol=1e-5, atol=1e-5)
    config = reloaded.config
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert (config.out_indices, config.out_features) == ([4], ["stage4"])


def test_a_backbone_keeps_its_feature_maps(tmp_path):
    model = dinov2(tf.Dinov2Backbone, out_indices=[2, 3, 6])
    pixels = torch.rand((1, 3, 16, 16))
    pruned = prune_layers(model, remove=[0, 4], output_dir=tmp_path / "out")
    assert pruned.config.out_indices == [1, 2, 4]
    with torch.no_grad(), bypassed(find_stacks(model)[0], [0, 4]):
        for found, expected in zip(pruned(pixels).feature_maps, model(pixels).feature_maps, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(PruningError, match=r"out_indices=\[2, 3, 6\].*two of them are the same"):
        prune_layers(model, remove=[2])


def test_without_full_attention_a_hybrid_does_not_run():
    model = hybrid(["linear_attention"] * 3 + ["full_attention"])
    with pytest.raises(PruningError, match="at least one layer with attention must stay"):
        prune_layers(model, remove=[3])
    assert prune_layers(model, remove=[0]).config.layer_types == ["linear_attention"] * 2 + ["full_attention"]


def test_a_table_of_a_kind_that_is_gone_may_go():
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    model = redrawn(tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GQA, head_dim=8, sliding_window=4, layer_types=kinds)))
    pruned = prune_layers(model, remove=[3])
    assert "model.rotary_emb.full_attention_inv_freq" in dict(model.named_buffers())
    assert pruned.config.layer_types == kinds[:3]


@pytest.mark.parametrize("field", ["output_hidden_states", "output_attentions"])
def test_outputs_of_single_layers_are_not_compared(field):
    config = tf.LlamaConfig(**GQA, attn_implementation="eager")
    setattr(config, field, True)
    prune_layers(redrawn(tf.LlamaForCausalLM(config)), remove=[1])


def test_a_state_of_single_layers_is_not_compared():
    config = tf.RwkvConfig(hidden_size=32, num_hidden_layers=4, vocab_size=64, context_length=64)
    prune_layers(redrawn(tf.RwkvForCausalLM(config)), remove=[1])


def test_outputs_of_other_shapes_are_named():
    one, other = {"logits": torch.zeros(2, 3)}, {"logits": torch.zeros(2, 4)}
    assert difference(one, other, 1) == "its outputs are {'logits': (2, 4)}, the original's {'logits': (2, 3)}"


def test_every_module_keeps_its_mode():
    model = redrawn(tf.LlamaForCausalLM(tf.LlamaConfig(**GQA))).train()
    model.model.layers[2].eval()
    before = [module.training for module in model.modules()]
    pruned = prune_layers(model, remove=[1])
    assert [module.training for module in model.modules()] == before
    assert [layer.mlp.training for layer in pruned.model.layers] == [True, False, True] and pruned.training


def test_a_model_that_draws_random_numbers_is_compared_on_the_same_ones():
    """ViT-MAE masks random patches in every pass, in evaluation too."""
    config = tf.ViTMAEConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=16, patch_size=4,
        decoder_hidden_size=32, decoder_intermediate_size=48, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
    )  # fmt: skip
    model = tf.ViTMAEModel(config)
    state = torch.random.get_rng_state()
    prune_layers(model, remove=[1])
    assert torch.equal(torch.random.get_rng_state(), state)
