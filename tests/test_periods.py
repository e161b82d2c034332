"""Sets that can be expressed because a rule of position is one of several that the config can hold."""

from importlib.metadata import version
from types import SimpleNamespace

import pytest
from conformance.trial import Runnable, _try_set
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_layerprobe import find_stacks, supported
from hf_layerprobe.stacks.periods import period_edits

# Early versions of Transformers 5 cannot build these so tiny, or run them otherwise: there the check may refuse.
NOT_EARLY = {"jamba", "recurrent_gemma", "dab-detr", "autoformer"}


@given(st.integers(1, 6), st.integers(0, 5), st.sets(st.integers(0, 11), min_size=1))
@settings(deadline=None)
def test_a_period_and_an_offset_are_found_where_there_are_some(period, offset, keep):
    keep = sorted(keep)
    node = SimpleNamespace(attn_layer_period=period, attn_layer_offset=offset % period)
    special = [i % period == offset % period for i in keep]
    edits = period_edits(node, "num_hidden_layers", 12, keep)
    fitting = [
        (p, o) for p in range(1, 14) for o in range(p) if [j % p == o for j in range(len(keep))] == special
    ]  # fmt: skip
    assert bool(edits) == bool(fitting)
    if edits:
        p, o = edits["attn_layer_period"], edits["attn_layer_offset"]
        assert o < p and [j % p == o for j in range(len(keep))] == special
    if (period, offset % period) in fitting:
        assert (p, o) == (period, offset % period)


@pytest.mark.parametrize(
    "node, field, keep, edits",
    [
        ({"cross_attention_frequency": 2}, "num_hidden_layers", [0, 2, 4], {"cross_attention_frequency": 1}),
        ({"cross_attention_frequency": 2}, "num_hidden_layers", [0, 1, 3], {"cross_attention_frequency": 3}),
        ({"cross_attention_frequency": 2}, "num_hidden_layers", [1, 2], {}),
        # NLLB-MoE: the last layer of every period; the other side's step stays.
        ({"encoder_sparse_step": 2, "decoder_sparse_step": 3}, "encoder_layers", [1, 3], {"encoder_sparse_step": 1}),
        ({"encoder_sparse_step": 2, "decoder_sparse_step": 3}, "decoder_layers", [0, 1], {"decoder_sparse_step": 3}),
        # Switch Transformers: the second one; a step of 0 is none.
        ({"encoder_sparse_step": 2, "num_sparse_encoder_layers": 3}, "num_layers", [1, 3, 5], {"encoder_sparse_step": 1}),
        ({"encoder_sparse_step": 2, "num_sparse_encoder_layers": 3}, "num_layers", [0, 2, 4], {"encoder_sparse_step": 0}),
        ({"stagger_local_blocks": True}, "encoder_layers", [0, 2], {"stagger_local_blocks": False}),
        ({"stagger_local_blocks": True}, "encoder_layers", [0, 3], {"stagger_local_blocks": True}),
        ({"block_types": ["a", "a", "b"]}, "num_hidden_layers", [1, 2, 5], {"block_types": ["a", "b", "b"]}),
        ({"hidden_size": 8}, "num_hidden_layers", [1], {}),
    ],
)  # fmt: skip
def test_the_rule_of_the_kept_layers(node, field, keep, edits):
    assert period_edits(SimpleNamespace(**node), field, 6, keep) == edits


SETS = [
    ("jamba", "model.layers", (0, 3, 5)),
    ("recurrent_gemma", "model.layers", (0, 3, 5)),
    ("blip_2_qformer", "encoder.layer", (1, 3, 5)),
    ("pegasus_x", "model.encoder.layers", (1, 3, 5)),
    ("switch_transformers", "encoder.block", (1, 3, 5)),
    ("nllb-moe", "model.decoder.layers", (0, 4, 5)),
    # Taps that nothing reads, or that read another stack.
    ("mllama", "model.vision_model.global_transformer.layers", (0, 5)),
    ("dpt", "encoder.layer", (0, 3, 5)),
    ("dab-detr", "decoder.layers", (1, 3)),
    ("sam_hq_vision_model", "vision_encoder.layers", (3, 5)),
    # The layer's second output is added to another stream outside.
    ("autoformer", "decoder.layers", (0, 3, 5)),
    # Layers in a Sequential.
    ("cvt", "cvt.encoder.stages.2.layers", (0, 5, 9)),
]
if version("transformers").startswith("5.0."):
    # There Jamba runs on CUDA alone, RecurrentGemma's layers keep states of their own, and DAB-DETR needs timm.
    SETS = [each for each in SETS if each[0] not in ("jamba", "recurrent_gemma", "dab-detr")]


@pytest.mark.parametrize("model_type, path, removed", SETS)
def test_sets_that_can_be_expressed_at_second_sight(model_type, path, removed):
    found = Runnable()
    found.search(model_type)
    early = model_type in NOT_EARLY and supported.versions() != supported.read()["versions"]
    if found.model is None:
        assert early
        return
    stack = next(stack for stack in find_stacks(found.model) if stack.path == path)
    outcome, why = _try_set(found.model, [stack], removed)
    assert (outcome, why) == ("equal", None) or (early and outcome.startswith("refused: ")), outcome
