"""The mixin: attached or inherited, a model stays what it was for everybody else."""

import copy
import inspect
import json
import pickle

import numpy as np
import pytest
import torch
import transformers as tf
from test_activation_scores import FakeTokenizer
from tiny import FAMILIES, tiny_model, tiny_tokenizer

import hf_layerprobe
from hf_layerprobe import LayerProbe, avss, docs, find_stacks, score_layers
from hf_layerprobe.loading import load_model

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
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear.*attach to the model inside"):
        LayerProbe.attach(torch.nn.Linear(2, 2))


def test_detach_takes_off_nothing_that_came_later():
    """FSDP2 gives a model a class of its own, made from the one it finds."""
    model = attached()
    model.__class__ = sharded = type("FSDPLlamaForCausalLM", (type(model),), {})
    with pytest.raises(TypeError, match="FSDPLlamaForCausalLM was made from the class with LayerProbe attached"):
        LayerProbe.detach(model)
    assert type(model) is sharded


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


def same(one, other, **inputs):
    inputs = inputs or {"input_ids": IDS}
    with torch.no_grad():
        torch.testing.assert_close(one(**inputs).logits, other(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", ["a wrapper", "in place"])
def test_compiled_side_by_side(compiled):
    """The methods stay, and work on what is compiled."""
    torch._dynamo.reset()
    plain, probed = tiny_model("llama"), attached()
    if compiled == "in place":
        plain.compile(backend="eager")
        probed.compile(backend="eager")
        same(plain, probed)
        assert isinstance(probed, LayerProbe)
    else:
        wrapped = torch.compile(probed, backend="eager")
        same(torch.compile(plain, backend="eager"), wrapped)
        assert wrapped.docs(kinds=["q"]).kinds == ("q",)
    torch._dynamo.reset()


def test_a_state_dict_fits_both_ways():
    plain, probed = tiny_model("llama", seed=1), attached()
    assert plain.state_dict().keys() == probed.state_dict().keys()
    assert probed.load_state_dict(plain.state_dict()).missing_keys == []
    same(plain, probed)
    assert isinstance(probed, LayerProbe) and not isinstance(plain, LayerProbe)


def test_generate_side_by_side():
    plain, probed = tiny_model("llama"), attached()
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(plain.generate(IDS, **options), probed.generate(IDS, **options))
    mixed = MyModel(FAMILIES["llama"][1]()).eval()
    mixed.load_state_dict(plain.state_dict())
    assert torch.equal(plain.generate(IDS, **options), mixed.generate(IDS, **options))


def test_pipelines_side_by_side():
    tokenizer = tiny_tokenizer()
    results = [
        tf.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")(
            "the quick brown", max_new_tokens=4, do_sample=False
        )
        for model in (tiny_model("llama"), attached())
    ]
    assert results[0] == results[1]


def test_peft_side_by_side(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    tuned = get_peft_model(attached(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    same(plain, tuned)
    assert isinstance(tuned.base_model.model, LayerProbe)
    merged = tuned.merge_and_unload()
    assert isinstance(merged, LayerProbe) and type(LayerProbe.detach(merged)) is tf.LlamaForCausalLM


def test_accelerate_side_by_side():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # which all tests share, before and after
    plain, probed = tiny_model("llama"), attached()
    prepared = [Accelerator(cpu=True, mixed_precision="bf16").prepare(model) for model in (plain, probed)]
    same(*prepared)
    assert isinstance(prepared[1], LayerProbe) and prepared[1].find_stacks()[0].path == "model.layers"
    unwrapped = Accelerator(cpu=True).unwrap_model(prepared[1], keep_fp32_wrapper=False)
    assert type(LayerProbe.detach(unwrapped)) is tf.LlamaForCausalLM
    AcceleratorState._reset_state(reset_partial_state=True)


def test_from_pretrained_and_back(tmp_path):
    """A mixin saves what its plain class loads, and the other way round."""
    attached().save_pretrained(tmp_path / "attached")
    mixed = MyModel.from_pretrained(tmp_path / "attached")
    mixed.save_pretrained(tmp_path / "mixed")
    plain = tf.LlamaForCausalLM.from_pretrained(tmp_path / "mixed")
    same(tiny_model("llama"), plain)
    same(mixed, plain)
    assert type(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")) is tf.LlamaForCausalLM


def architectures(folder):
    return json.loads((folder / "config.json").read_text())["architectures"]


def test_a_mixin_saves_a_plain_model(tmp_path):
    """Whoever loads the folder by its config has no such class."""
    model = MyModel(FAMILIES["llama"][1]()).eval()
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert architectures(tmp_path / "saved") == ["LlamaForCausalLM"] and type(model) is MyModel
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    same(load_model(tmp_path / "saved"), model)
    assert docs(tmp_path / "saved", kinds=["q"])["q"].shape == (4, 4)
    pruned = model.prune_layers(remove=[1], output_dir=tmp_path / "pruned")
    assert architectures(tmp_path / "pruned") == ["LlamaForCausalLM"] and type(pruned) is MyModel
    same(load_model(tmp_path / "pruned"), pruned)
    assert inspect.signature(model.save_pretrained) == inspect.signature(tiny_model("llama").save_pretrained)


class Mine(tf.LlamaForCausalLM):
    """A user's own class without the mixin."""


class Coded(LayerProbe, tf.LlamaForCausalLM):
    """One that is saved with its code."""


def test_a_class_that_is_to_be_loaded_by_its_own_name_keeps_it(tmp_path):
    LayerProbe.attach(Mine(FAMILIES["llama"][1]())).save_pretrained(tmp_path / "attached")
    assert architectures(tmp_path / "attached") == ["Mine"]
    Coded.register_for_auto_class("AutoModelForCausalLM")
    Coded(FAMILIES["llama"][1]()).save_pretrained(tmp_path / "coded")
    assert architectures(tmp_path / "coded") == ["Coded"]


def test_copies_and_pickles_of_a_mixin():
    model = MyModel(FAMILIES["llama"][1]()).eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is MyModel
        same(twin, model)
