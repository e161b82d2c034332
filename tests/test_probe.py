"""The mixin: attached or inherited, a model stays what it was for everybody else."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import transformers as tf
from test_activation_scores import FakeTokenizer
from tiny import FAMILIES, tiny_model

import hf_layerprobe
from hf_layerprobe import LayerProbe, avss, docs, find_stacks, score_layers

IDS = torch.arange(3, 11)[None]


class MyModel(LayerProbe, tf.LlamaForCausalLM):
    """A user's own class."""


def attached():
    return LayerProbe.attach(tiny_model("llama"))


@pytest.mark.parametrize("make", [attached, lambda: MyModel(FAMILIES["llama"][1]())])
def test_methods_forward_to_the_functions(make, token_batches):
    model = make()
    np.testing.assert_array_equal(model.docs(kinds=["q"])["q"], docs(model, kinds=["q"])["q"])
    np.testing.assert_array_equal(model.avss(token_batches, variant="published").values,
                                  avss(model, token_batches, variant="published").values)  # fmt: skip
    assert model.score_layers(by="last").values.tolist() == score_layers(model, by="last").values.tolist()
    assert model.find_stacks()[0].path == find_stacks(model)[0].path
    plan = model.plan_pruning(token_batches, num_layers=1, by="influence")
    pruned = model.prune_layers(plan)
    assert type(pruned) is type(model) and pruned.config.num_hidden_layers == 3
    pairs = [{"prompt": "a", "factual": "b c", "hallucinated": "d"}] * 2
    assert len(pruned.eavss(pairs, FakeTokenizer())) == 3


def test_attach_and_detach():
    model = tiny_model("llama")
    assert LayerProbe.attach(model) is model
    assert isinstance(model, LayerProbe) and isinstance(model, tf.LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    once = type(model)
    assert type(LayerProbe.attach(model)) is once and type(attached()) is once
    assert LayerProbe.detach(model) is model
    assert type(model) is tf.LlamaForCausalLM and not isinstance(model, LayerProbe)
    assert type(LayerProbe.detach(model)) is tf.LlamaForCausalLM


def test_detach_leaves_a_users_own_class_alone():
    model = MyModel(FAMILIES["llama"][1]())
    assert type(LayerProbe.attach(model)) is MyModel
    assert type(LayerProbe.detach(model)) is MyModel


def test_attach_wants_a_pretrained_model():
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        LayerProbe.attach(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_copies_are_attached_models(protocol):
    model = attached()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model, protocol))):
        assert type(twin) is type(model)
        assert torch.equal(twin(IDS).logits, model(IDS).logits)
        assert twin.model.layers[0] is not model.model.layers[0]


def test_saved_configs_name_the_plain_class(tmp_path):
    attached().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is tf.LlamaForCausalLM
    assert isinstance(MyModel.from_pretrained(tmp_path), MyModel)


def test_generate_compile_and_peft_work():
    from peft import LoraConfig, get_peft_model

    model = attached()
    expected = tiny_model("llama")(IDS).logits
    torch.testing.assert_close(torch.compile(model, backend="eager")(IDS).logits, expected)
    assert model.generate(IDS, max_new_tokens=2, min_new_tokens=2, pad_token_id=0).shape == (1, 10)
    torch.testing.assert_close(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))(IDS).logits, expected)


def test_trainer_accepts_an_attached_model(tmp_path):
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    args = tf.TrainingArguments(tmp_path, max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    assert tf.Trainer(attached(), args, train_dataset=rows).train().global_step == 1


def test_the_public_names():
    for name in hf_layerprobe.__all__:
        assert getattr(hf_layerprobe, name) is not None
