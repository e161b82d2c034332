"""Which kept sets an architecture can express: asked before any data moves, in words, with the nearest ones that it can."""

from importlib import import_module

import numpy as np
import pytest
import torch
import transformers as tf
from test_prune import assert_same_outputs, outputs
from test_prune_composites import hybrid, qwen3_vl
from tiny import FAMILIES, GQA, redrawn, tiny_model
from torch import nn
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig

from hf_layerprobe import PruningError, PruningPlan, find_stacks, plan_pruning, prune_layers
from hf_layerprobe.scores import LayerScores
from hf_layerprobe.stacks import admissible, bypassed, edit, kinds
from hf_layerprobe.stacks.admissible import first_admissible, least_worth
from hf_layerprobe.stacks.bind import ConfigBinding
from hf_layerprobe.stacks.taps import check_taps, tap_edits
from hf_layerprobe.surgery.outputs import difference, float_outputs, without_removed

GEMMA4 = pytest.mark.model_type("gemma4")
SIX = {**GQA, "num_hidden_layers": 6}


def jamba():
    return tf.JambaForCausalLM(
        tf.JambaConfig(**{**GQA, "num_hidden_layers": 16}, num_experts=2, mamba_d_state=4, use_mamba_kernels=False)
    )


def switch():
    return tf.SwitchTransformersForConditionalGeneration(
        tf.SwitchTransformersConfig(
            d_model=32, d_kv=8, d_ff=48, num_layers=6, num_decoder_layers=8, num_heads=4, vocab_size=64, num_experts=2
        )
    )


def modernbert():
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    config = tf.ModernBertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4, vocab_size=64, **ids
    )
    return tf.ModernBertForMaskedLM(config)


def gemma4(**options):
    config = tf.Gemma4TextConfig(
        **{**GQA, "num_hidden_layers": 12}, head_dim=8, global_head_dim=8, vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8, sliding_window=4, **{"num_kv_shared_layers": 4} | options,
    )  # fmt: skip
    return tf.Gemma4ForCausalLM(config)


def on_meta(make):
    with torch.device("meta"):
        return make()


def removed(model, keep, part=0):
    return [i for i in range(find_stacks(model)[part].num_layers) if i not in keep]


@pytest.mark.parametrize(
    "make, layers, reason, nearest",
    [
        (jamba, [1], "repeats every 2 layers", [[15], [1, 2]]),
        (switch, [1], "repeats every 2 layers", [[5], [1, 2]]),
        (modernbert, [0, 3], "only layer 0 is of its kind", [[3, 4], [3], [2, 3, 4]]),
        pytest.param(
            gemma4, [11], "forces layer_types of the last layer to be 'full_attention'", [[10], [9, 10]], marks=GEMMA4
        ),
        pytest.param(
            gemma4, [7], r"the last layers .* read the keys and values of layers \[7\], which must stay", [[8], [6, 8]],
            marks=GEMMA4,
        ),
        (lambda: hybrid(["linear_attention", "full_attention"] * 2), [1, 3], "at least one layer with attention", [[2, 3], [3]]),
        (qwen3_vl, [2], "Keep layers 0 to 2", [[3], [3, 4]]),
    ],
)  # fmt: skip
def test_why_not_and_what_instead(make, layers, reason, nearest):
    model = on_meta(make)
    stack = find_stacks(model)[0]
    with pytest.raises(PruningError, match=reason) as refused:
        stack.check([i for i in range(stack.num_layers) if i not in layers])
    assert [removed(model, keep) for keep in refused.value.nearest][: len(nearest)] == nearest
    assert f"remove {nearest[0]}" in str(refused.value) and f"layers {layers} of {stack.path!r}" in str(refused.value)
    for keep in refused.value.nearest:
        stack.check(keep)


@pytest.mark.parametrize(
    "make, layers",
    [
        (jamba, range(8)),
        (switch, [0, 1]),
        (modernbert, [1, 5]),
        pytest.param(gemma4, [0], marks=GEMMA4),
        pytest.param(gemma4, [8], marks=GEMMA4),
    ],
)
def test_whole_periods_and_free_layers_can_go(make, layers):
    model = on_meta(make)
    stack = find_stacks(model)[0]
    stack.check(i for i in range(stack.num_layers) if i not in layers)


def test_checking_needs_no_data():
    model_class, config = FAMILIES["llama"]
    model = on_meta(lambda: model_class(config()))
    assert find_stacks(model)[0].check([0, 2]) is None


@pytest.mark.parametrize("keep", [[], [0, 0], [4], [-1], ["a"], 3, [1.5]])
def test_what_is_no_kept_set(keep):
    with pytest.raises(PruningError, match="keep "):
        find_stacks(tiny_model("llama"))[0].check(keep)


def test_a_plan_can_be_carried_out(caplog):
    """The least important layers of a rule, among those that can go: layer 1 alone cannot, nor can 0 and 3."""
    stack = find_stacks(on_meta(switch))[0]
    removed, note = least_worth(stack, [0.0, 9.0, 0.1, 5.0, 0.2, 6.0], 2)
    assert removed == [2, 5] or sum([0.0, 9.0, 0.1, 5.0, 0.2, 6.0][i] for i in removed) <= 5.1
    stack.check(i for i in range(6) if i not in removed)
    assert note.startswith("layers [0, 2] are worth least, but cannot go together")
    assert least_worth(stack, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 2) == ([0, 1], "")


def test_the_first_proposal_that_can_be_carried_out():
    stack = find_stacks(on_meta(modernbert))[0]
    assert first_admissible(stack, [[3, 4], [0, 1]]) == ([3, 4], "")
    found, note = first_admissible(stack, [[0, 1], [3, 4]])
    assert found == [3, 4] and note.startswith("layers [0, 1] cannot go together: ")
    with pytest.raises(PruningError, match=r"cannot lose layers \[0, 1\]"):
        first_admissible(stack, [[0, 1], [0, 2]])


def test_the_choice_is_the_best_of_all_that_can_go():
    """Against trying every set."""
    from itertools import combinations

    stack = find_stacks(on_meta(switch))[0]
    worth = np.random.default_rng(0).random(6).tolist()
    for number in (1, 2, 3):
        possible = []
        for layers in combinations(range(6), number):
            if admissible._refusal(stack, [i for i in range(6) if i not in layers]) is None:
                possible.append(layers)
        best = min(possible, key=lambda layers: sum(worth[i] for i in layers))
        assert tuple(least_worth(stack, worth, number)[0]) == best


def test_plans_ask(monkeypatch):
    model = redrawn(modernbert())
    scores = LayerScores("last", np.array([0.0, 3, 1, 2, 4, 5]), True, "model.layers", "a test")
    monkeypatch.setattr(import_module("hf_layerprobe.search.choose"), "score_layers", lambda *_, **__: scores)
    plan = plan_pruning(model, num_layers=2, by="last")
    assert plan.remove == (2, 3) and "layers [0, 2] are worth least" in plan.note
    with pytest.raises(PruningError, match="only layer 0 is of its kind") as refused:
        plan_pruning(model, remove=[0])
    assert refused.value.nearest[0] == (0, 2, 3, 4, 5)


@pytest.mark.parametrize("options", [dict(num_layers=5), dict(ratio=0.9)])
def test_no_set_of_that_size(options):
    """Of two kinds of layers that alternate and a cache that needs one of them, any size works; of deepstack layers not."""
    with pytest.raises(PruningError, match="Keep layers 0 to 2"):
        plan_pruning(on_meta(qwen3_vl), by="last", **options)


def same_as_bypassed(model, layers, part=0):
    stack = find_stacks(model)[part]
    pruned = prune_layers(model, remove=layers, stack=stack)
    assert_same_outputs(outputs(model, layers, stack), outputs(pruned))
    return pruned


@pytest.mark.parametrize("part", [0, 1])
def test_t5_moves_its_position_bias(part):
    pruned = same_as_bypassed(tiny_model("t5"), [0, 2], part)
    block = (pruned.encoder, pruned.decoder)[part].block[0]
    assert block.layer[0].SelfAttention.relative_attention_bias.weight.shape == (32, 4)


@pytest.mark.model_type("minicpm3")
def test_minicpm3_corrects_its_scale():
    config = tf.MiniCPM3Config(
        **{**SIX, "num_key_value_heads": 4},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )
    pruned = same_as_bypassed(redrawn(tf.MiniCPM3ForCausalLM(config)), [0, 3])
    assert pruned.config.scale_depth == pytest.approx(1.4 * (4 / 6) ** 0.5)


def test_diffllama_folds_its_constant():
    config = tf.DiffLlamaConfig(**FAMILIES["llama"][1]().to_diff_dict() | dict(head_dim=8))
    same_as_bypassed(redrawn(tf.DiffLlamaForCausalLM(config)), [0, 2])


def test_gpt2_folds_its_scale():
    model = redrawn(
        tf.GPT2LMHeadModel(
            tf.GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=64, scale_attn_by_inverse_layer_idx=True)
        )
    )
    same_as_bypassed(model, [0, 2])


def test_sparse_layers_are_named():
    config = tf.Qwen3MoeConfig(
        **SIX, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=2,
        mlp_only_layers=[5],
    )  # fmt: skip
    pruned = same_as_bypassed(redrawn(tf.Qwen3MoeForCausalLM(config)), [0, 3])
    assert (pruned.config.decoder_sparse_step, pruned.config.mlp_only_layers) == (1, [1, 2, 3])


@GEMMA4
def test_gemma4_keeps_each_layers_settings_and_its_part_of_the_embeddings():
    model = redrawn(gemma4())
    pruned = same_as_bypassed(model, [0, 6, 9])
    old, new = (each.model.embed_tokens_per_layer.weight.unflatten(1, (-1, 8)) for each in (model, pruned))
    assert torch.equal(new, old[:, [i for i in range(12) if i not in (0, 6, 9)]])
    assert pruned.config.num_kv_shared_layers == 3


def test_yolos_adds_the_positions_of_lost_layers():
    config = tf.YolosConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, image_size=[16, 16],
        patch_size=4, num_detection_tokens=3, use_mid_position_embeddings=True,
    )  # fmt: skip
    model = redrawn(tf.YolosModel(config))
    same_as_bypassed(model, [0, 2])
    with pytest.raises(PruningError, match="the last layer must stay"):
        prune_layers(model, remove=[4])


def test_a_bias_of_the_last_layer_alone():
    config = tf.GPTNeoXJapaneseConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, vocab_size=64, intermediate_multiple_size=2
    )
    model = redrawn(tf.GPTNeoXJapaneseForCausalLM(config))
    torch.nn.init.normal_(model.gpt_neox_japanese.layers[3].attention.dense_bias)
    same_as_bypassed(model, [0, 3])


@pytest.mark.parametrize(
    "family, layers",
    [
        ("t5", {"encoder.block": [0, 2], "decoder.block": [1]}),
        ("bart", {"model.encoder.layers": [1], "model.decoder.layers": [0, 4]}),
        ("whisper", {"model.decoder.layers": [2], "model.encoder.layers": [-1]}),
    ],
)
def test_several_stacks_at_once(family, layers, tmp_path):
    model = tiny_model(family)
    prune_layers(model, remove=layers, output_dir=tmp_path / "out")
    reloaded = type(model).from_pretrained(tmp_path / "out")
    one, two = find_stacks(model)
    by_path = {stack.path: stack for stack in (one, two)}
    chosen = {by_path[path]: [i % by_path[path].num_layers for i in indices] for path, indices in layers.items()}
    with bypassed(two, chosen[two]):
        expected = outputs(model, chosen[one], one)
    assert_same_outputs(expected, outputs(reloaded))
    plan = PruningPlan.load(tmp_path / "out")
    assert {part.stack: list(part.remove) for part in plan.parts} == {s.path: v for s, v in chosen.items()}
    assert str(plan).count("(0-based)") == 2
    again = prune_layers(model, plan)
    assert_same_outputs(expected, outputs(again))


def test_both_stacks_of_a_vision_language_model():
    model = qwen3_vl()
    text, vision = find_stacks(model)
    pruned = prune_layers(model, keep={text.path: range(5), vision.path: [1, 2, 3, 4]})
    assert [stack.num_layers for stack in find_stacks(pruned)] == [5, 4]
    assert pruned.config.vision_config.deepstack_visual_indexes == [0, 2, 3]


def test_a_share_of_several_stacks():
    plan = plan_pruning(
        tiny_model("bart"), ratio=0.25, by="last", stack=["model.encoder.layers", "model.decoder.layers"]
    )
    assert [(part.stack, part.remove) for part in plan.parts] == [
        ("model.encoder.layers", (3,)),
        ("model.decoder.layers", (4,)),
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(remove={"encoder.block": [1]}, stack="decoder.block"), "names its stacks itself"),
        (dict(remove={"encoder.block": [1]}, keep={"decoder.block": [1]}), "names its stacks itself"),
        (dict(remove={}), "at least one stack"),
        (dict(remove=[1], stack=["encoder.block", "decoder.block"]), "a dict of lists by path"),
        (dict(num_layers=1, by="last", stack=["encoder.block"] * 2), "each once"),
        (dict(remove={"encoder.layers": [1]}), "has no stack 'encoder.layers'"),
        (dict(remove={"encoder.block": [9]}), r"layers \[9\] do not exist"),
        (dict(remove={"encoder.block": [1], "decoder.block": []}), "removes no layer"),
    ],
)
def test_contradicting_stacks(options, message):
    with pytest.raises(ValueError, match=message):
        plan_pruning(tiny_model("t5"), **options)


def test_the_model_of_an_edit_is_on_meta():
    model = tiny_model("llama")
    found = edit.edit_stacks({find_stacks(model)[0]: [0, 3]})
    assert all(parameter.is_meta for parameter in found.model.parameters())
    assert found.source("model.layers.1.mlp.up_proj.weight") == "model.layers.3.mlp.up_proj.weight"


def funnel():
    config = tf.FunnelConfig(
        vocab_size=64, block_sizes=[2, 3], num_decoder_layers=2, d_model=32, n_head=4, d_head=8, d_inner=48
    )
    return redrawn(tf.FunnelForMaskedLM(config))


def eomt():
    config = tf.EomtConfig(
        hidden_size=32, num_hidden_layers=6, num_attention_heads=4, image_size=64, patch_size=16, num_blocks=3,
        num_queries=5, num_upscale_blocks=1,
    )  # fmt: skip
    return redrawn(tf.EomtForUniversalSegmentation(config))


def test_the_layer_of_a_block_that_halves_the_sequence_stays():
    model = funnel()
    stack = find_stacks(model)[1]
    assert (stack.path, stack.config_path) == ("funnel.encoder.blocks.1", "block_sizes[1]")
    same_as_bypassed(model, [1, 2], 1)
    with pytest.raises(PruningError, match="halves the sequence, so it must stay") as refused:
        stack.check([1, 2])
    assert refused.value.nearest[0] == (0, 2)


def informer(**options):
    config = tf.InformerConfig(
        prediction_length=8, context_length=32, d_model=16, encoder_layers=3, decoder_layers=4, encoder_ffn_dim=24,
        decoder_ffn_dim=24, **options,
    )  # fmt: skip
    return redrawn(tf.InformerModel(config))


def test_convolutions_between_layers_keep_their_places():
    """Informer's list of them ends with None; its attention samples keys at random, the same whatever was removed."""
    model = informer()
    assert [stack.path for stack in find_stacks(model)] == ["encoder.layers", "decoder.layers"]
    with pytest.raises(PruningError, match="a convolution that halves the sequence stands between") as refused:
        prune_layers(model, remove=[1])
    assert refused.value.nearest == ()
    assert len(prune_layers(model, remove=[0, 2], stack="decoder.layers").decoder.layers) == 2
    assert len(prune_layers(informer(distil=False), remove=[0]).encoder.layers) == 2


@pytest.mark.parametrize("layers, blocks", [([0], 3), ([4], 2), ([1, 5], 2)])
def test_the_layers_that_read_queries_stay_the_last(layers, blocks):
    model = eomt()
    model.attn_mask_probs.copy_(torch.tensor([1.0, 0.0, 1.0]))
    pruned = same_as_bypassed(model, layers)
    assert pruned.config.num_blocks == blocks == len(pruned.attn_mask_probs)


def test_t5_generates_with_a_shorter_encoder(tmp_path):
    """Transformers takes the encoder's number of layers for the decoder's, where the config does not say better."""
    model_class, config = FAMILIES["t5"]
    config = config()
    config.num_layers = config.num_decoder_layers = 4
    model = redrawn(model_class(config))
    prune_layers(model, remove=[0, 1], output_dir=tmp_path / "out")
    pruned = model_class.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[5, 6, 7]])
    runs = [pruned.generate(ids, use_cache=cache, max_new_tokens=6, do_sample=False) for cache in (True, False)]
    assert torch.equal(*runs)
    twice = prune_layers(pruned, remove=[2], stack="decoder.block")
    assert (twice.config.num_layers, twice.config.num_decoder_layers, twice.config.decoder_layers) == (2, 3, 3)


def test_prophetnet_cannot_generate_with_a_shorter_encoder():
    config = tf.ProphetNetConfig(
        hidden_size=32, encoder_ffn_dim=48, decoder_ffn_dim=48, num_encoder_layers=3, num_decoder_layers=3,
        num_encoder_attention_heads=4, num_decoder_attention_heads=4, vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    model = on_meta(lambda: tf.ProphetNetForConditionalGeneration(config))
    with pytest.raises(
        PruningError, match="left with 2 layers and the decoder with 3.*Remove at least 1 layers of the decoder"
    ):
        plan_pruning(model, remove=[1])
    encoder, decoder = (stack.path for stack in find_stacks(model))
    plan = plan_pruning(model, num_layers=1, by="last", stack=[encoder, decoder])
    assert [part.remove for part in plan.parts] == [(2,), (2,)]
    plan_pruning(model, remove={encoder: [0], decoder: [1]})


def test_outputs_of_every_layer_are_compared_without_the_removed_ones():
    old = {
        "stacked": torch.arange(6.0).view(1, 6),
        "each": tuple(torch.full((2,), float(i)) for i in range(7)),
        "x": torch.ones(2),
    }
    new = {
        "stacked": torch.tensor([[0.0, 2, 5]]),
        "each": tuple(torch.full((2,), float(i)) for i in (0, 1, 3, 6)),
        "x": torch.ones(2),
    }
    kept = [(6, [0, 2, 5])]
    found = [float_outputs(without_removed(old, new, kept)), float_outputs(new)]
    assert difference(*found, 0) is None
    new["stacked"][0, 1] = 3
    assert "largest relative difference" in difference(
        float_outputs(without_removed(old, new, kept)), float_outputs(new), 0
    )
    del new["x"]
    assert difference(float_outputs(without_removed(old, new, kept)), float_outputs(new), 9) is not None


@pytest.mark.parametrize("stable, layers", [(False, [0, 2]), (False, [1, 3]), (True, [0, 2])])
def test_states_that_become_one_weigh_what_both_did(stable, layers):
    config = tf.Wav2Vec2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, conv_dim=(8,) * 3,
        conv_kernel=(3,) * 3, conv_stride=(2,) * 3, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        use_weighted_layer_sum=True, do_stable_layer_norm=stable, classifier_proj_size=8,
    )  # fmt: skip
    model = redrawn(tf.Wav2Vec2ForSequenceClassification(config))
    torch.nn.init.normal_(model.layer_weights)
    assert same_as_bypassed(model, layers).layer_weights.shape == (3,)
    if stable:
        with pytest.raises(PruningError, match="layer_weights weighs .* so the last layer must stay"):
            prune_layers(model, remove=[3])


@GEMMA4
def test_packed_tensors_belong_to_the_stack_beside_them():
    """Text and vision with as many layers each, pruned in one call."""
    text = dict(
        **SIX,
        head_dim=8,
        global_head_dim=8,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
    )
    config = tf.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    model = redrawn(tf.Gemma4ForConditionalGeneration(config))
    text, vision = find_stacks(model)
    old = model.model.language_model.embed_tokens_per_layer.weight.unflatten(1, (6, 8))
    pruned = prune_layers(model, keep={vision.path: [0, 1, 2, 3], text.path: [1, 2, 4, 5]}, verify=False)
    new = pruned.model.language_model.embed_tokens_per_layer.weight.unflatten(1, (4, 8))
    assert torch.equal(new, old[:, [1, 2, 4, 5]])


def test_the_number_of_layers_told_to_each_is_no_difference():
    config = tf.MiniMaxConfig(
        **{**GQA, "num_hidden_layers": 3}, head_dim=8, num_local_experts=2, block_size=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    model = on_meta(lambda: tf.MiniMaxForCausalLM(config))
    assert model.model.layers[0].self_attn.num_hidden_layers == 3
    find_stacks(model)[0].check([1, 2])


def test_the_name_of_a_cache_slot_is_no_difference():
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    for i, layer in enumerate(layers):
        layer.cache_key = f"conv.{i}"
    assert len({tuple(kind.items()) for kind in kinds.layer_kinds(layers)}) == 1


def test_taps_may_repeat_a_state_and_stay_behind_the_last_layer():
    config = MllamaVisionConfig(num_hidden_layers=6, intermediate_layers_indices=[0, 2, 3, 5, 9])
    binding = ConfigBinding((), "num_hidden_layers")
    check_taps(None, config, binding, 6, [0, 2, 4, 5])
    assert tap_edits(config, binding, 6, [0, 2, 4, 5]) == {(): {"intermediate_layers_indices": [0, 1, 1, 3, 4]}}
    with pytest.raises(PruningError, match="none is left before one of them"):
        check_taps(None, config, binding, 6, [1, 2])
