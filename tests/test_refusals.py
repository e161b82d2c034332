"""What is refused is refused for a reason that is true, and what only looks as if it could not be expressed is not."""

import re

import pytest
import torch
import transformers
from conformance import refute
from conformance.tiny_config import tiny_configs
from conformance.trial import Runnable, _mattering
from conformance.types import classes_of

from hf_layerprobe import PruningError, find_stacks, prune_layers
from hf_layerprobe.errors import VerificationError
from hf_layerprobe.surgery.gate import verify


def tiny(model_type, **fields):
    config_class, classes = classes_of(model_type)
    config = next(tiny_configs(config_class))
    for name, value in fields.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return _mattering(classes[0](config))


@pytest.mark.parametrize(
    "model_type, paths",
    [
        ("dac", []),  # stages of different widths, and codebooks
        ("levit", []),  # attentions and MLPs in turn
        ("univnet", []),  # convolutions alone
        ("pvt", [f"pvt.encoder.block.{i}" for i in range(4)]),
        ("cvt", [f"cvt.encoder.stages.{i}.layers" for i in (1, 2)]),
    ],
)
def test_what_hands_no_stream_on_is_no_stack(model_type, paths):
    assert [stack.path for stack in find_stacks(tiny(model_type))] == paths


def test_both_towers_of_bridgetower_together():
    model = tiny("bridgetower")
    text, vision = find_stacks(model)
    with pytest.raises(PruningError, match="Remove as many of both in the same call, by a dict"):
        text.check([1, 2, 3, 4, 5])
    # The last two feed a fusing layer each, beside the first; any before can go, not the same in both.
    pruned = prune_layers(model, remove={text.path: [0, 3], vision.path: [1, 2]})
    assert pruned.config.text_config.num_hidden_layers == pruned.config.vision_config.num_hidden_layers == 4
    with pytest.raises(
        PruningError, match=r"layers \[4, 5\] of 'text_model.encoder.layer' each feed a layer that fuses"
    ):
        prune_layers(model, remove={text.path: [0, 4], vision.path: [1, 2]})


def test_lightglue_has_thresholds_by_depth():
    stack = find_stacks(tiny("lightglue"))[0]
    with pytest.raises(PruningError, match="computes from a layer's index and the number of layers") as refused:
        stack.check([0, 1, 2, 5])
    assert not refused.value.nearest


def test_zamba_needs_two_copies_of_its_shared_block():
    model = tiny(
        "zamba", layers_block_type=["hybrid", "linear_attention", "hybrid", "linear_attention"], num_hidden_layers=4
    )
    stack = find_stacks(model)[0]
    with pytest.raises(PruningError, match=r"layers \[0, 2\] .* share one attention block") as refused:
        stack.check([0, 1, 3])
    assert refused.value.nearest[0] == (0, 1, 2)
    stack.check([0, 2])


def test_a_part_that_no_forward_pass_runs_is_checked_by_itself():
    """CSM's depth decoder runs in generation, its codec's decoder after it."""
    model = tiny("csm")
    stack = next(stack for stack in find_stacks(model) if stack.path == "depth_decoder.model.layers")
    pruned = prune_layers(model, stack=stack.path, remove=[0, 5])
    with torch.no_grad():
        pruned.depth_decoder.model.layers[1].mlp.up_proj.weight[3] += 0.1
    with pytest.raises(VerificationError, match="does not compute what the original does"):
        verify({stack: [0, 5]}, pruned)


def test_a_wrong_refusal_is_refuted(monkeypatch):
    """The judge of refusals is judged: it finds the config of a set that can be expressed, and none of one that cannot."""
    found = Runnable()
    found.search("recurrent_gemma")
    stack = find_stacks(found.model)[0]
    how = refute._refutation(found.model, stack, [0, 3, 5])
    assert "'block_types': ['recurrent', 'attention', 'recurrent']" in how
    monkeypatch.setattr(refute, "PATTERN", re.compile("period"))  # it is not to take long
    found.search("yolos")
    assert refute._refutation(found.model, find_stacks(found.model)[0], [5]) is None


def test_the_neck_of_dpt_reads_four_layers():
    """The bare model hands on its last state alone."""
    config = tiny("dpt").config
    with torch.device("meta"):
        models = [transformers.DPTModel(config), transformers.DPTForDepthEstimation(config)]
    bare, whole = (find_stacks(model)[0] for model in models)
    bare.check([1, 2, 4])
    with pytest.raises(PruningError, match="backbone_out_indices=.* reads the output of single layers") as refused:
        whole.check([1, 2, 4])
    for keep in refused.value.nearest:
        whole.check(keep)
