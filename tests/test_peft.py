"""Models with PEFT adapters: what is read of them, and what of the adapters is left when layers go."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers as tf
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from tiny import tiny_folder, tiny_model, tiny_tokenizer

from hf_layerprobe import (
    LayerProbeError,
    PruningError,
    docs,
    eavss,
    evaluate_model,
    find_stacks,
    plan_pruning,
    prune_layers,
    score_layers,
)
from hf_layerprobe.stacks import bypassed

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
REMOVED = [1]  # so that layers 2 and 3 become 1 and 2
LAYER = "model.layers"

CONFIGS = {
    "lora": LoraConfig(target_modules=["q_proj", "down_proj"], r=3),
    "dora": LoraConfig(target_modules=["v_proj", "up_proj"], r=2, use_dora=True, use_rslora=True),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(target_modules=["o_proj"], r=2),
    "vera": VeraConfig(target_modules=["q_proj", "o_proj"], r=4),
    "bias and a saved head": LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"], bias="lora_only"),
    "single tokens": LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices=[3, 9]),
    "embeddings": LoraConfig(target_modules=["embed_tokens", "gate_proj"], r=2),
    "some layers": LoraConfig(target_modules=["q_proj"], layers_to_transform=[1, 2], layers_pattern="layers"),
    "one layer": LoraConfig(target_modules=["q_proj"], layers_to_transform=3),
    "ranks by layer": LoraConfig(
        target_modules=["q_proj", "v_proj"],
        r=2,
        rank_pattern={r"layers\.3\.self_attn\.q_proj": 4, "v_proj": 3},
        alpha_pattern={r"layers.[12].*_proj": 5},
    ),
    "names": LoraConfig(target_modules=[f"{LAYER}.{i}.mlp.up_proj" for i in (0, 1, 3)]),
    "a pattern": LoraConfig(target_modules=r".*layers\.(1|2)\.self_attn\.[qk]_proj"),
    "all but": LoraConfig(target_modules="all-linear", exclude_modules=[f"{LAYER}.2.self_attn.q_proj"]),
    "pissa": LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="pissa"),
}


def adapted(name="lora", model=None, **adapters):
    """A model with adapters that matter."""
    model = get_peft_model(model or tiny_model("llama"), copy.deepcopy(CONFIGS[name]))
    for adapter, config in adapters.items():
        model.add_adapter(adapter, copy.deepcopy(CONFIGS[config]))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("default", *adapters)) and "lora_magnitude" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def logits(model, removed=()):
    with torch.no_grad(), bypassed(find_stacks(model)[0], removed):
        return model(input_ids=IDS).logits


def state(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, {name: p.requires_grad for name, p in model.named_parameters()}, list(model.active_adapters)


def assert_same_state(one, other):
    assert one[0].keys() == other[0].keys() and all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[1:] == other[1:]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_goes_along(name, tmp_path):
    """In memory, from disk, and merged before: all are the model before with those layers bypassed."""
    model = adapted(name)
    before, expected = state(model), logits(model, REMOVED)
    pruned = prune_layers(model, remove=REMOVED, output_dir=tmp_path / "out")
    assert_same_state(before, state(model))
    assert type(pruned) is type(model) and find_stacks(pruned)[0].num_layers == 3
    torch.testing.assert_close(logits(pruned), expected, rtol=1e-5, atol=1e-5)

    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert base.config.num_hidden_layers == 3
    without = logits(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out" / "adapters" / "default")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(without, expected, atol=1e-3)  # the adapter does something

    merged = prune_layers(copy.deepcopy(model).merge_and_unload(), remove=REMOVED)
    assert type(merged) is tf.LlamaForCausalLM
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    shared = {t.data_ptr() for t in model.state_dict().values()} & {t.data_ptr() for t in pruned.state_dict().values()}
    assert not shared


def test_the_config_stays_as_short_as_it_was(tmp_path):
    def saved(name):
        prune_layers(adapted(name), remove=REMOVED, output_dir=tmp_path / name)
        return json.loads((tmp_path / name / "adapters" / "default" / "adapter_config.json").read_text())

    assert sorted(saved("lora")["target_modules"]) == ["down_proj", "q_proj"]
    assert saved("bias and a saved head")["target_modules"] == ["q_proj"]
    some = saved("some layers")
    assert some["target_modules"] == ["q_proj"] and some["layers_to_transform"] == [1]
    ranks = saved("ranks by layer")["rank_pattern"]
    assert ranks[f"{LAYER}.2.self_attn.q_proj"] == 4 and ranks[f"{LAYER}.1.self_attn.v_proj"] == 3
    assert sorted(saved("names")["target_modules"]) == [f"{LAYER}.{i}.mlp.up_proj" for i in (0, 2)]
    for file in tmp_path.rglob("*.json"):
        assert str(tmp_path) not in file.read_text()


def test_several_adapters(tmp_path):
    model = adapted("lora", other="some layers", third="dora")
    model.set_adapter("other")
    before = state(model)
    expected = {}
    for name in ("default", "third", "other"):
        model.set_adapter(name)
        expected[name] = logits(model, REMOVED)
    pruned = prune_layers(model, remove=REMOVED, output_dir=tmp_path / "out")
    assert_same_state(before, state(model))
    assert pruned.active_adapters == ["other"]
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    loaded = PeftModel.from_pretrained(base, tmp_path / "out" / "adapters" / "default")
    for name in ("other", "third"):
        loaded.load_adapter(tmp_path / "out" / "adapters" / name, adapter_name=name)
    for name, outputs in expected.items():
        for found in (pruned, loaded):
            found.set_adapter(name)
            torch.testing.assert_close(logits(found), outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_layers_are_not_scored_without_the_virtual_tokens_before_their_input(config):
    model = get_peft_model(tiny_model("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    pairs = [{"prompt": "a", "factual": " b c", "hallucinated": " d e"}] * 2
    for scored in (
        lambda: score_layers(model, [{"input_ids": IDS}], by="avss"),
        lambda: eavss(model, pairs, tiny_tokenizer()),
    ):
        with pytest.raises(LayerProbeError, match="puts virtual tokens before the input"):
            scored()


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig])
def test_prompts_before_the_input_go_along(config, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    expected = logits(model, REMOVED)
    pruned = prune_layers(model, remove=REMOVED, output_dir=tmp_path / "out")
    torch.testing.assert_close(logits(pruned), expected, rtol=1e-5, atol=1e-5)
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    loaded = PeftModel.from_pretrained(base, tmp_path / "out" / "adapters" / "default").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(base), expected[:, -IDS.shape[1] :], atol=1e-3)


def test_training_goes_on_after_pruning():
    model = adapted("lora").train()
    pruned = prune_layers(model, remove=REMOVED)
    assert pruned.training
    pruned(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, p in pruned.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in pruned.named_parameters() if "lora_" in name} != set()
    assert all(p.grad is None for p in model.parameters())


def test_half_precision_adapters_keep_their_dtypes():
    model = adapted("lora", tiny_model("llama").to(torch.bfloat16))
    pruned = prune_layers(model, remove=REMOVED)
    dtypes = {name: p.dtype for name, p in pruned.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}  # PEFT's choice
    assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "loha", "vera", "bias and a saved head", "pissa"])
def test_scores_are_those_of_the_merged_model(name):
    model = adapted(name)
    merged, data = copy.deepcopy(model).merge_and_unload(), [{"input_ids": IDS}]
    one, other = docs(model), docs(merged)
    assert one.kinds == other.kinds
    for kind in one.kinds:
        np.testing.assert_allclose(one[kind], other[kind], rtol=1e-5, atol=1e-6)
    by = ["avss", "influence"]
    found, expected = score_layers(model, data, by=by), score_layers(merged, data, by=by)
    for rule in by:
        np.testing.assert_allclose(found[rule].values, expected[rule].values, rtol=1e-3)
    assert np.abs(docs(model.get_base_model())["q"] - docs(model.unload())["q"]).max() > 0.01 or name not in (
        "lora",
        "pissa",
    )


def test_plans_and_perplexity():
    model, tokenizer = adapted("lora"), tiny_tokenizer()
    texts = [f"text number {i} of many, and some more words" for i in range(8)]
    plan = plan_pruning(model, texts, num_layers=1, tokenizer=tokenizer, pack=False)
    assert plan.stack == LAYER and plan.model["class"] == "LlamaForCausalLM"
    assert plan.model["checksum"] == plan_pruning(tiny_model("llama"), remove=[1]).model["checksum"]
    pruned = prune_layers(model, plan)
    merged = prune_layers(copy.deepcopy(model).merge_and_unload(), remove=plan.remove)
    found, expected = (evaluate_model(each, texts, tokenizer=tokenizer).loss for each in (pruned, merged))
    assert found == pytest.approx(expected, rel=1e-4)


def test_an_encoder_decoder(tmp_path):
    # With the name of the list: early PEFT takes the numbers of a block's parts for those of blocks.
    config = LoraConfig(target_modules=["q", "v"], layers_to_transform=[1, 2], layers_pattern="block")
    model = get_peft_model(tiny_model("t5"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    pruned = prune_layers(model.eval(), remove={"decoder.block": [1, 3]}, output_dir=tmp_path / "out")
    tuned = {name.split(".lora_A")[0] for name, _ in pruned.named_parameters() if "lora_A" in name}
    assert {name.split("block.")[1][0] for name in tuned if ".decoder." in name} == {"1"}
    assert {name.split("block.")[1][0] for name in tuned if ".encoder." in name} == {"1", "2"}


def refused(model, message, tmp_path, remove=REMOVED):
    with pytest.raises(PruningError, match=message):
        prune_layers(model, remove=remove, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_that_cannot_go_along(tmp_path):
    prefix = get_peft_model(tiny_model("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    refused(prefix, r"'default' \(PREFIX_TUNING\) cannot go along.*of every layer in one tensor", tmp_path)
    refused(adapted("one layer"), r"'default' is on removed layers only; kept are \[0, 1, 2\]", tmp_path, remove=[3])
    merged = adapted("lora")
    merged.merge_adapter()
    refused(merged, r"\['default'\] are merged into the weights", tmp_path)
    copied = LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 3], [2, 4]])
    refused(get_peft_model(tiny_model("llama"), copied), "copies layers; merge it first", tmp_path)


def test_an_adapter_for_another_base(tmp_path):
    one, other = (tf.AutoModelForCausalLM.from_pretrained(tiny_folder(tmp_path / name)) for name in ("one", "other"))
    get_peft_model(one, CONFIGS["lora"]).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(other, tmp_path / "adapter")
    refused(model, "'default' is for another base model: its config names .*one', and it is on .*other'", tmp_path)
    model.peft_config[
        "default"
    ].base_model_name_or_path = other.config.name_or_path  # the way out that the message names
    assert find_stacks(prune_layers(model, remove=REMOVED))[0].num_layers == 3


def test_an_adapter_without_its_base(tmp_path):
    get_peft_model(tiny_model("llama"), CONFIGS["lora"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(LayerProbeError, match="holds a PEFT adapter without its base model"):
        prune_layers(tmp_path / "adapter", remove=REMOVED)
