"""Activations inside layers, found by structure and names, against hooks on modules named by hand."""

import numpy as np
import oracles
import pytest
import torch
import transformers as tf
from test_activation_scores import assert_same, recorded
from test_token_masks import AUDIO, lengths_mask, lively
from tiny import GQA, TEXT, tiny_model
from transformers.models.vit import modeling_vit

from hf_layerprobe import LayerProbeError, avss, find_stacks, score_layers
from hf_layerprobe.activations import LayerStream
from hf_layerprobe.scores.registry import SCORES

EPS = 0.05
GPT2 = ("attn.c_proj", "mlp", "mlp.c_proj")
BERT = ("attention.output.dense", "output.dense", "output.dense")
LLAMA = ("self_attn", "mlp", "mlp.down_proj")
BART = ("self_attn", "fc2", "fc2")
QWEN_MOE = dict(GQA, num_experts=3, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts_per_tok=2)
IMAGES = [{"pixel_values": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}]

# family → stack → where attention, MLP and (its input) the down projection are
PLACES = {
    "llama": [LLAMA],
    "gemma3": [LLAMA],
    "gpt2": [GPT2],
    "falcon": [("self_attention", "mlp", "mlp.dense_4h_to_h")],
    "falcon, new architecture": [("self_attention", "mlp", "mlp.dense_4h_to_h")],
    "gpt_neox": [("attention", "mlp", "mlp.dense_4h_to_h")],
    "bert": [BERT],
    "t5": [
        ("layer.0.SelfAttention", "layer.1.DenseReluDense", "layer.1.DenseReluDense.wo"),
        ("layer.0.SelfAttention", "layer.2.DenseReluDense", "layer.2.DenseReluDense.wo"),
    ],
    "bart": [BART, BART],
    "vit": [("attention", "mlp", "mlp.fc2") if hasattr(modeling_vit, "ViTMLP") else BERT],  # older ones
    "whisper": [BART, BART],
    "wav2vec2": [("attention", "feed_forward", "feed_forward.output_dense")],
    "mixtral": [("self_attn", "mlp", None)],
    "qwen2_moe": [("self_attn", "mlp", None)],
}


def model_and_batches(family, token_batches):
    if family == "wav2vec2":
        model, samples = lively(tf.Wav2Vec2Model(tf.Wav2Vec2Config(**AUDIO))), lengths_mask([61, 30], 61)
        return model, [{"input_values": torch.randn(2, 61) * samples, "attention_mask": samples}]
    if family == "qwen2_moe":
        return lively(tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**QWEN_MOE))), token_batches
    if family.startswith("falcon"):  # whose layers write into what the MLP has handed on
        form = dict(new_decoder_architecture=True, num_kv_heads=2) if "," in family else dict(multi_query=True)
        return lively(tf.FalconForCausalLM(tf.FalconConfig(**TEXT, **form))), token_batches
    model = tiny_model(family)
    if family == "vit":
        return model, IMAGES
    ids = {"decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])}
    if family == "whisper":
        return model, [{"input_features": torch.rand(2, 16, 48, generator=torch.Generator().manual_seed(0)), **ids}]
    return model, [{**batch, **ids} for batch in token_batches] if family in ("t5", "bart") else token_batches


def by_hand(model, batches, stack, name, *, inward=False):
    """[layer][batch] what leaves, or enters, the module of that name in every layer."""
    kept = [[] for _ in stack.layers]
    handles = []
    for layer, values in zip(stack.layers, kept, strict=True):

        def keep(_module, args, kwargs, output, values=values):
            taken = (args[0] if args else next(iter(kwargs.values()))) if inward else output
            values.append((taken[0] if isinstance(taken, tuple) else taken).float().numpy().copy())

        handles.append(layer.get_submodule(name).register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.filterwarnings("ignore:divide by zero")  # the transcription also divides what is padding
@pytest.mark.parametrize("family", PLACES)
def test_sublayers_are_found(family, token_batches):
    model, batches = model_and_batches(family, token_batches)
    stacks = find_stacks(model)
    for stack, (attention, mlp, down) in zip(stacks, PLACES[family], strict=True):
        before, after = recorded(model, batches, stack)
        masks = Masks.of(stack, batches)
        update = [[y - x for x, y in zip(xs, ys, strict=True)] for xs, ys in zip(before, after, strict=True)]
        places = {"layer": after, "update": update, "attention": by_hand(model, batches, stack, attention)}
        places["mlp"] = by_hand(model, batches, stack, mlp)
        if down:
            places["mlp-inner"] = by_hand(model, batches, stack, down, inward=True)
        for site, values in places.items():
            # Experts hand on one row of tokens.
            values = [
                [v.reshape(*x.shape[:2], -1) for v, x in zip(*pair, strict=True)]
                for pair in zip(values, before, strict=True)
            ]
            found = avss(model, batches, variant="published", eps=EPS, site=site, stack=stack)
            assert_same({site: found.values}, {site: oracles.published(values, masks, EPS)})
            assert found.data["site"] == site
            if site in ("attention", "mlp"):
                scaled = [
                    [v / np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True)) for v, x in zip(*pair, strict=True)]
                    for pair in zip(values, before, strict=True)
                ]
                found = score_layers(model, batches, by="avss-relative", site=site, stack=stack)
                assert_same({site: found.values}, {site: oracles.published(scaled, masks, EPS)})


class Masks:
    """An accumulator that keeps the mask of each batch."""

    def __init__(self):
        self.masks = []

    def update(self, layer, before, after, mask):
        if layer == 0:
            self.masks.append((torch.ones(before.shape[:2]) if mask is None else mask).numpy())

    @classmethod
    def of(cls, stack, batches):
        found = cls()
        with LayerStream(stack, [found]), torch.no_grad():
            for batch in batches:
                stack.model(**batch)
        return found.masks


def test_the_relative_variant_is_about_the_update(token_batches):
    model = tiny_model("llama")
    by_default = avss(model, token_batches)
    for site in ("layer", "update"):
        np.testing.assert_array_equal(avss(model, token_batches, site=site).values, by_default.values)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(by="avss-relative", site="mlp-inner"),
            "can be measured at 'update', 'layer', 'attention', 'mlp', not at",
        ),
        (dict(by="avss-published", site="atention"), "not at 'atention'. Did you mean 'attention'"),
        (dict(by="avss-released", site="mlp"), "can be measured at 'layer', not at 'mlp'"),
        (dict(by=["avss-published", "influence"], site="mlp"), "influence has no choice of sites"),
        (dict(by="docs", site="mlp"), "docs has no choice of sites"),
    ],
)
def test_a_score_says_the_sites_it_accepts(options, message, token_batches):
    with pytest.raises(LayerProbeError, match=message):
        score_layers(tiny_model("llama"), token_batches, **options)


def test_several_scores_at_one_site(token_batches):
    model = tiny_model("llama")
    both = score_layers(model, token_batches, by=["avss-published", "avss-relative"], site="mlp")
    assert [scores.data["site"] for scores in both.values()] == ["mlp", "mlp"]
    alone = avss(model, token_batches, site="mlp")
    np.testing.assert_array_equal(both["avss-relative"].values, alone.values)


def test_inner_activations_of_experts_are_refused(token_batches):
    with pytest.raises(LayerProbeError, match=r"layers \[0, 1, 2, 3\] \(MixtralDecoderLayer\): a mixture of experts"):
        avss(tiny_model("mixtral"), token_batches, variant="published", site="mlp-inner")


def test_layers_without_a_sublayer_are_named(token_batches):
    config = tf.Mamba2Config(
        hidden_size=32, num_hidden_layers=2, vocab_size=64, num_heads=4, head_dim=16, expand=2, state_size=8, n_groups=1
    )
    with pytest.raises(LayerProbeError, match=r"'mlp' cannot be measured in 'backbone.layers': layers \[0, 1\]"):
        avss(tf.Mamba2ForCausalLM(config), token_batches, site="mlp")


def test_a_module_that_runs_piecewise_is_refused(token_batches):
    model = lively(tf.BertForMaskedLM(tf.BertConfig(**TEXT, chunk_size_feed_forward=1)))
    batch = {"input_ids": token_batches[0]["input_ids"]}
    with pytest.raises(LayerProbeError, match="'output.dense' was expected to run once .* it ran 7 times"):
        avss(model, [batch], site="mlp")


def test_nothing_is_left_on_the_sublayers(token_batches):
    model = tiny_model("llama")
    count = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    before = count()

    class Fails:
        sites = ("attention", "mlp-inner")

        def update(self, layer, before, after, mask, **sites):
            assert set(sites) == {"attention", "mlp-inner"} and count() > 0
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), LayerStream(find_stacks(model)[0], [Fails()]):
        model(**token_batches[0])
    assert count() == before


def test_every_score_names_its_sites():
    assert {name: score.sites for name, score in SCORES.items() if score.sites} == {
        "avss-published": ("layer", "update", "attention", "mlp", "mlp-inner"),
        "avss-released": ("layer",),
        "avss-relative": ("update", "layer", "attention", "mlp"),
        "avss-robust": ("update", "layer", "attention", "mlp"),
    }
