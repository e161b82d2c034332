"""Inputs that the check makes for itself: they run, they reach every part, they are the same at every call."""

import pytest
import torch
import transformers as tf
from tiny import GQA, TEXT, redrawn, tiny_model

from hf_layerprobe import PruningError, find_stacks
from hf_layerprobe.surgery.inputs import example_inputs, example_prompt

SIX = {**GQA, "num_hidden_layers": 6, "pad_token_id": 0}
TOWER = {**TEXT, "num_hidden_layers": 3, "image_size": 16, "patch_size": 4}
TOWER.pop("vocab_size")
ROPE = dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=10000.0)


def qwen2_audio():
    audio = dict(
        d_model=32,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        num_mel_bins=16,
        max_source_positions=24,
    )
    return tf.Qwen2AudioForConditionalGeneration(
        tf.Qwen2AudioConfig(
            text_config={**SIX, "model_type": "qwen2"},
            audio_config={"model_type": "qwen2_audio_encoder", **audio},
            audio_token_index=63,
        )
    )


def qwen2_vl():
    return tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(
            text_config={**SIX, "rope_parameters": ROPE},
            vision_config=dict(depth=3, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=4),
            image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
        )
    )  # fmt: skip


def phi4():
    sound = dict(
        hidden_size=32, intermediate_size=48, num_blocks=3, num_attention_heads=4, ext_pw_out_channel=32,
        depthwise_separable_out_channel=32, nemo_conv_channels=8, input_size=16, audio_token_id=62,
    )  # fmt: skip
    vision = {**TOWER, "crop_size": 16, "image_token_id": 63}
    return tf.Phi4MultimodalForCausalLM(
        tf.Phi4MultimodalConfig(**SIX, vision_config=vision, audio_config=sound, bos_token_id=1, eos_token_id=2)
    )


def diffusion_gemma():
    text = {
        **SIX,
        "head_dim": 8,
        "global_head_dim": 8,
        "num_experts": 2,
        "top_k_experts": 1,
        "moe_intermediate_size": 16,
    }
    vision = dict(
        model_type="gemma4_vision", hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, head_dim=8, patch_size=4,
    )  # fmt: skip
    return tf.DiffusionGemmaForBlockDiffusion(
        tf.DiffusionGemmaConfig(text_config=text, vision_config=vision, image_token_id=63, canvas_length=8)
    )


MODELS = {
    "image and video beside text": (
        qwen2_vl,
        {"pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"},
    ),
    "sound beside text": (qwen2_audio, {"input_features"}),
    "image in parts and sound beside text": (
        phi4,
        {"image_pixel_values", "image_attention_mask", "audio_input_features"},
    ),
    "image that is handed on unnamed": pytest.param(
        diffusion_gemma, {"pixel_values", "image_position_ids"}, marks=pytest.mark.model_type("diffusion_gemma")
    ),
    "image and text, each by itself": (
        lambda: tf.CLIPModel(tf.CLIPConfig(text_config=TEXT, vision_config=TOWER)),
        {"input_ids", "pixel_values"},
    ),
    "boxes of a document": (lambda: tf.LayoutLMModel(tf.LayoutLMConfig(**TEXT)), {"input_ids", "bbox"}),
    "video": (
        lambda: tf.VideoMAEModel(tf.VideoMAEConfig(**TOWER, num_frames=4, tubelet_size=2)),
        {"pixel_values"},
    ),
    "samples of sound": (
        lambda: tf.Wav2Vec2Model(
            tf.Wav2Vec2Config(
                **TEXT,
                conv_dim=[16, 16],
                conv_stride=[5, 4],
                conv_kernel=[10, 8],
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=4,
            )
        ),
        {"input_values"},
    ),
    "a spectrogram": (
        lambda: tf.ASTModel(
            tf.ASTConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_mel_bins=32,
                max_length=64,
            )
        ),
        {"input_values"},
    ),
    "a time series": (
        lambda: tf.PatchTSTModel(
            tf.PatchTSTConfig(d_model=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48, context_length=32)
        ),
        {"past_values"},
    ),
    "flattened patches": (
        lambda: tf.Pix2StructVisionModel(
            tf.Pix2StructVisionConfig(
                hidden_size=32,
                patch_embed_hidden_size=192,
                d_ff=48,
                d_kv=8,
                num_hidden_layers=3,
                num_attention_heads=4,
                patch_size=8,
            )
        ),
        {"flattened_patches"},
    ),
    "encoder and decoder of text": (lambda: tiny_model("t5"), {"input_ids", "decoder_input_ids"}),
    "encoder of sound, decoder of text": (lambda: tiny_model("whisper"), {"input_features", "decoder_input_ids"}),
}


@pytest.mark.parametrize(("make", "names"), MODELS.values(), ids=MODELS)
def test_every_layer_of_every_stack_runs(make, names):
    model = redrawn(make())
    layers = [layer for stack in find_stacks(model) for layer in stack.layers]
    ran = set()
    inputs = example_inputs(model, layers)
    handles = [layer.register_forward_hook(lambda module, *_: ran.add(module)) for layer in layers]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    assert names <= inputs.keys() and ran == set(layers)
    again = example_inputs(model, layers)
    assert inputs.keys() == again.keys() and all(torch.equal(inputs[name], again[name]) for name in inputs)


def test_every_medium_changes_what_the_text_model_says():
    model = redrawn(qwen2_vl())
    inputs = example_inputs(model)
    with torch.no_grad():
        said = model(**inputs).logits
        for name in ("pixel_values", "pixel_values_videos"):
            assert not torch.allclose(model(**{**inputs, name: inputs[name].flip(-1)}).logits, said, atol=1e-3)


def test_the_prompt_has_no_placeholders():
    model = redrawn(qwen2_vl())
    prompt = example_prompt(model, example_inputs(model))
    assert prompt.keys() == {"input_ids", "attention_mask"} and not set(range(60, 64)) & set(
        prompt["input_ids"].flatten().tolist()
    )


def test_the_state_of_random_numbers_is_left_alone():
    model = redrawn(
        tf.ViTMAEForPreTraining(tf.ViTMAEConfig(**TOWER, decoder_num_hidden_layers=2, decoder_hidden_size=32))
    )
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    example_inputs(model)
    assert torch.equal(torch.rand(3), expected)


def test_a_form_that_does_not_exist_is_named():
    model = redrawn(qwen2_vl())
    model.config.vision_config.patch_size = 5  # not the model's
    with pytest.raises(PruningError, match=r"No inputs could be made for Qwen2VL.*verify=False.*pixel_values"):
        example_inputs(model)
