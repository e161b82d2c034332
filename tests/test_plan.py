"""Plans: what is removed, by which rule, and that a stored plan is the plan."""

import dataclasses
import json
import math

import numpy as np
import pytest
import transformers as tf
from datasets import Dataset
from test_activation_scores import FakeTokenizer
from tiny import redrawn, tiny_model

from hf_layerprobe import LayerProbeError, PruningError, PruningPlan, plan_pruning, score_layers


@pytest.mark.parametrize(
    "request_, removed",
    [
        (dict(remove=[2]), [2]),
        (dict(remove=[-1, 0]), [0, 3]),
        (dict(remove=np.array([1, 2])), [1, 2]),
        (dict(keep=[3, 0]), [1, 2]),
        (dict(keep=range(3)), [3]),
        (dict(ratio=0.25, by="last"), [3]),
        (dict(ratio=0.7, by="last"), [2, 3]),
        (dict(num_layers=3, by="last"), [1, 2, 3]),
    ],
)
def test_what_goes(request_, removed):
    plan = plan_pruning(tiny_model("llama"), **request_)
    assert list(plan.remove) == removed
    assert list(plan.keep) == [i for i in range(4) if i not in removed]
    assert plan.num_layers == 4 and plan.stack == "model.layers"


def test_a_quarter_of_thirty_layers_is_seven(smollm2):
    assert len(plan_pruning(smollm2, ratio=0.25, by="last").remove) == 7


def test_by_score(token_batches):
    model = tiny_model("llama")
    plan = plan_pruning(model, token_batches, num_layers=2, by="influence")
    scores = score_layers(model, token_batches, by="influence")
    assert list(plan.remove) == scores.least_important(2)
    assert plan.by == "influence" and plan.scores["values"] == scores.values.tolist()
    assert plan.scores["data"]["fingerprint"] == scores.data["fingerprint"]
    assert str(plan).startswith("model.layers: remove 2 of 4 layers by influence (0-based): remove [")


def test_auto_keeps_the_plan_that_measures_best():
    texts = [f"text number {i} of many, and some more words" for i in range(8)]
    plan = plan_pruning(tiny_model("llama"), texts, num_layers=1, by="auto", tokenizer=FakeTokenizer(), pack=False)
    losses = {c["by"]: c["held_out_loss"] for c in plan.candidates}
    assert set(losses) == {"avss-relative", "influence", "docs", "last", "combined", "contiguous"}
    best = min(plan.candidates, key=lambda c: c["held_out_loss"])
    assert list(plan.remove) == best["remove"] and plan.by == "auto"
    assert plan.scores.get("name", "contiguous") == best["by"]
    assert len(set(losses.values())) > 1


@pytest.mark.parametrize(
    "request_, message",
    [
        (dict(), "exactly one of ratio, num_layers, remove and keep; got none"),
        (dict(ratio=0.5, remove=[1]), "got ratio, remove"),
        (dict(ratio=0), "between 0 and 1; got 0"),
        (dict(ratio=1.0), "between 0 and 1; got 1.0"),
        (dict(ratio=0.1), "less than one layer; use at least 0.250"),
        (dict(num_layers=0), "between 1 and 3 of 4; got 0"),
        (dict(num_layers=4), "between 1 and 3 of 4; got 4"),
        (dict(remove=[4]), r"layers \[4\] do not exist; the stack has layers 0 to 3"),
        (dict(remove=[-5]), r"layers \[-5\] do not exist"),
        (dict(remove=[1.5]), r"layers \[1.5\] do not exist"),
        (dict(remove=[1, 1]), "names a layer twice"),
        (dict(remove=[1, -3]), "names a layer twice"),
        (dict(remove=[]), "removes no layer of 4"),
        (dict(remove=[0, 1, 2, 3]), "removes all 4 layers"),
        (dict(keep=[]), "removes all 4 layers; at least one must stay"),
        (dict(keep=[0, 1, 2, 3]), "removes no layer"),
        (dict(keep=[7]), r"keep: layers \[7\] do not exist"),
        (dict(remove=3), "remove is a list of layers, such as .*; got 3"),
        (dict(keep="01"), "keep is a list of layers, such as .*; got '01'"),
        (dict(num_layers=1.5), "between 1 and 3 of 4; got 1.5"),
        (dict(num_layers=True), "between 1 and 3 of 4; got True"),
        (dict(ratio="0.5"), "between 0 and 1; got '0.5'"),
    ],
)
def test_impossible_requests(request_, message):
    with pytest.raises(PruningError, match=message):
        plan_pruning(tiny_model("llama"), **request_)


@pytest.mark.parametrize("by", [None, ["last", "docs"], 3])
def test_by_is_one_rule(by):
    with pytest.raises(LayerProbeError, match="by is one rule"):
        plan_pruning(tiny_model("llama"), num_layers=1, by=by)


def test_options_without_effect_are_refused():
    with pytest.raises(LayerProbeError, match=r"Unused options \['foo'\]"):
        plan_pruning(tiny_model("llama"), remove=[1], foo=1)
    with pytest.raises(LayerProbeError, match=r"\['batch_size'\]"):
        plan_pruning(tiny_model("llama"), keep=[1], batch_size=2)


@pytest.mark.parametrize("kind", [list, iter, lambda texts: Dataset.from_dict({"text": list(texts)})])
def test_auto_reads_any_texts(kind):
    texts = [f"text number {i} of many, and some more words" for i in range(8)]
    plan = plan_pruning(tiny_model("llama"), kind(texts), num_layers=1, tokenizer=FakeTokenizer(), pack=False)
    assert len(plan.candidates) == 6


def test_auto_leaves_out_a_rule_that_cannot_read_the_model():
    """DOCS knows no attention matrices in a Mamba."""
    model = redrawn(
        tf.MambaForCausalLM(tf.MambaConfig(hidden_size=32, num_hidden_layers=4, vocab_size=64, state_size=8))
    )
    texts = [f"text number {i} of many, and some more words" for i in range(8)]
    plan = plan_pruning(model, texts, num_layers=1, tokenizer=FakeTokenizer(), pack=False)
    assert {candidate["by"] for candidate in plan.candidates} == {"avss-relative", "influence", "last", "contiguous"}


def test_auto_needs_something_to_predict():
    class OneToken(FakeTokenizer):
        def __call__(self, text, **_):
            return {"input_ids": [5]}

    with pytest.raises(LayerProbeError, match="No text to measure on"):
        plan_pruning(tiny_model("llama"), ["a", "b"], num_layers=1, tokenizer=OneToken(), pack=False)


@pytest.mark.parametrize("data", [None, [], ["one text"], ["one text", ""], [{"input_ids": [1]}, {"input_ids": [2]}]])
def test_auto_needs_texts_to_measure_on(data):
    with pytest.raises(LayerProbeError, match="at least two texts"):
        plan_pruning(tiny_model("llama"), data, num_layers=1, tokenizer=FakeTokenizer())


def test_auto_measures_causal_models_only():
    with pytest.raises(LayerProbeError, match="BertForMaskedLM is not a causal language model"):
        plan_pruning(tiny_model("bert"), ["one text", "another"], num_layers=1, tokenizer=FakeTokenizer())


def test_unknown_rule():
    with pytest.raises(LayerProbeError, match=r"Unknown rule by='lasst'\. Did you mean 'last'"):
        plan_pruning(tiny_model("llama"), num_layers=1, by="lasst")


def test_a_stored_plan_is_the_plan(tmp_path, token_batches):
    plan = plan_pruning(tiny_model("llama"), token_batches, num_layers=2, by="avss")
    path = plan.save(tmp_path)
    assert path.name == "pruning_plan.json"
    assert PruningPlan.load(tmp_path) == PruningPlan.load(path) == plan


def test_a_stored_plan_is_strict_json(tmp_path):
    """Attention layers that stand apart have no neighbour to compare q with, and a search meets sets without a finite loss."""
    config = tf.Lfm2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, full_attn_idxs=[1, 3],
    )  # fmt: skip
    plan = plan_pruning(redrawn(tf.Lfm2ForCausalLM(config)), num_layers=1, by="docs")
    candidates = [{"by": "last", "remove": [4], "held_out_loss": loss} for loss in (math.inf, -math.inf, 2.5)]
    plan = dataclasses.replace(plan, candidates=candidates)
    assert np.isnan(plan.scores["details"]["q"]).any()
    path = plan.save(tmp_path)

    def refuse(constant):
        raise AssertionError(constant)

    stored = json.loads(path.read_text(), parse_constant=refuse)
    assert [each["held_out_loss"] for each in stored["candidates"]] == ["Infinity", "-Infinity", 2.5]
    loaded = PruningPlan.load(path)
    assert loaded.candidates == candidates and loaded.checksum() == plan.checksum()
    np.testing.assert_equal(loaded.scores, plan.scores)


def test_a_changed_plan_is_refused(tmp_path):
    path = plan_pruning(tiny_model("llama"), remove=[1]).save(tmp_path)
    content = json.loads(path.read_text())
    content["remove"] = [2]
    path.write_text(json.dumps(content))
    with pytest.raises(LayerProbeError, match="was changed after it was written"):
        PruningPlan.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checksum": 1, "remove": 3}'])
def test_what_is_no_plan_is_refused(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(LayerProbeError, match="is not a pruning plan"):
        PruningPlan.load(path)
    with pytest.raises(LayerProbeError, match="No pruning plan at"):
        PruningPlan.load(tmp_path / "nothing.json")
