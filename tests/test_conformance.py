"""A part of the conformance run, for every day; all types are tried by `python -m tests.conformance`."""

import pytest
import torch
from conformance.compare import difference, entries_of_kept
from conformance.tiny_config import tiny_configs
from conformance.trial import try_type
from conformance.types import model_types
from tiny import tiny_model

from hf_layerprobe import supported

# Every way in which architectures differ: heads, modalities, hybrids, experts, rules of position, old and new code.
REPRESENTATIVE = """
    albert audio-spectrogram-transformer bamba bart beit bert bloom canine clip cohere2 colqwen2 csm deberta-v2 deepseek_v3
    detr dia diffllama dinov2 falcon fsmt fuyu gemma2 gemma3_text gemma4 gpt2 gpt_neo gpt_neox gpt_oss granite_speech
    granitemoehybrid idefics3 jamba layoutlm llama llama4_text llava longformer mamba2 minicpm3 mistral mixtral modernbert
    musicflamingo nemotron_h openai-gpt opt patchtst phi3 pix2struct qwen2_moe qwen3 qwen3_next smollm3 swin t5 videomae vit
    wav2vec2 whisper xlm
""".split()  # noqa: SIM905
TYPES = [name for name in REPRESENTATIVE if name in model_types()]
# Of which the run's tiny configs and inputs are not those that early versions of Transformers 5 need.
NOT_EARLY = {"colqwen2", "detr", "gpt_neo", "granitemoehybrid", "jamba", "pix2struct"}


def test_enough_types_are_known():
    assert len(REPRESENTATIVE) == 60 and len(TYPES) >= 45


@pytest.mark.parametrize("model_type", TYPES)
def test_what_is_saved_is_what_was_meant_or_nothing(model_type):
    record = try_type(model_type)
    if model_type in NOT_EARLY and record["outcome"] in ("not built", "not run"):
        assert supported.versions() != supported.read()["versions"]
        return
    assert record["outcome"] == ("no stack" if model_type == "albert" else "pruned"), record
    assert not [name for stack in record["stacks"] for name in stack["sets"].values() if name.startswith("equal to")]


def test_the_comparison_sees_what_differs():
    """The judge of the run is judged: one changed weight, a missing output, another shape, an infinity."""
    model, ids = tiny_model("llama"), torch.arange(5)[None] + 7
    with torch.no_grad():
        before = {"logits": model(ids).logits}
        model.model.layers[2].mlp.up_proj.weight[3] += 0.1
        after = {"logits": model(ids).logits}
    assert difference(before, dict(before)) == 0 and difference(before, after) > 1e-3
    infinite = {"logits": torch.full_like(before["logits"], torch.inf)}
    for other in ({}, {**before, "more": before["logits"]}, {"logits": before["logits"][:, :2]}, infinite):
        assert difference(before, other) == float("inf")


def test_predictions_of_every_layer_are_compared_without_those_of_removed_ones():
    six, logits = torch.randn(2, 6, 5), torch.randn(2, 6)
    expected, found = {"every": six, "last": logits}, {"every": six[:, [1, 2, 4]], "last": logits}
    assert difference(entries_of_kept(expected, found, 6, (0, 3, 5)), found) == 0
    assert difference(entries_of_kept(expected, found, 6, (0, 3, 4)), found) > 0.1
    cut = {**found, "last": logits[:, :2]}  # not by as many as there are removed layers
    assert difference(entries_of_kept(expected, cut, 6, (0, 3, 5)), cut) == float("inf")


def test_a_tiny_config_is_tiny_and_whole():
    from transformers import AutoConfig, Qwen3Config

    config = next(tiny_configs(Qwen3Config))
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (6, 64, 4)
    assert config.num_key_value_heads == 4 and len(config.layer_types) == 6
    assert AutoConfig.for_model(**config.to_dict()).num_hidden_layers == 6
