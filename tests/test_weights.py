"""Which matrix is which: what the split matrices compute must be what the model computes."""

import numpy as np
import pytest
import torch
import transformers as tf
from tiny import FAMILIES, GQA, redrawn, tiny_model
from torch import nn

from hf_layerprobe import LayerProbeError, docs, find_stacks, score_layers
from hf_layerprobe.weights import KINDS, LiveWeights, find_modules, layer_matrices, read_matrices
from hf_layerprobe.weights.read import matrix_parts

GATED = {"llama", "qwen3", "gemma3", "mistral", "mixtral", "t5"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_kinds_in_every_layer(family):
    expected = {"q", "k", "v", "o", "up", "down"} | ({"gate"} if family in GATED else set())
    for stack in find_stacks(tiny_model(family)):
        found = {}
        for layer, kind, matrix in read_matrices(stack):
            assert matrix.dim() == 2
            found.setdefault(layer, set()).add(kind)
        assert found == dict.fromkeys(range(stack.num_layers), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_out_by_in(family):
    """[out, in] whatever the storage: hidden 32, MLP 48 (GPT-2: 128; Mixtral: 3 experts of 48), half the keys in GQA."""
    inner = {"gpt2": 128, "mixtral": 144}.get(family, 48)
    keys = 16 if family in ("llama", "qwen3", "gemma3", "mistral", "mixtral") else 32
    shapes = {"q": (32, 32), "k": (keys, 32), "v": (keys, 32), "o": (32, 32)}
    shapes |= {"gate": (inner, 32), "up": (inner, 32), "down": (32, inner)}
    for stack in find_stacks(tiny_model(family)):
        for _, kind, matrix in read_matrices(stack):
            assert tuple(matrix.shape) == shapes[kind], kind


def test_gpt2_fused_conv1d_is_split_as_the_model_does():
    attention = tiny_model("gpt2").transformer.h[0].attn
    x = torch.randn(3, 32)
    parts = layer_matrices(tiny_model("gpt2").transformer.h[0], tiny_model("gpt2").config)
    expected = (attention.c_attn(x) - attention.c_attn.bias).split(32, dim=-1)
    for kind, y in zip("qkv", expected, strict=True):
        torch.testing.assert_close(x @ parts[kind].T, y)


def test_gpt_neox_fused_heads_are_split_as_the_model_does():
    model = tiny_model("gpt_neox")
    layer = model.gpt_neox.layers[0]
    x = torch.randn(3, 32)
    fused = (layer.attention.query_key_value(x) - layer.attention.query_key_value.bias).view(
        3, 4, 24
    )  # [rows, heads, 3·8]
    parts = layer_matrices(layer, model.config)
    for kind, y in zip("qkv", fused.chunk(3, dim=-1), strict=True):
        torch.testing.assert_close(x @ parts[kind].T, y.reshape(3, 32))


def test_phi3_fused_grouped_query_is_split_by_group():
    config = tf.Phi3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    layer = tf.Phi3ForCausalLM(config).model.layers[0]
    parts = layer_matrices(layer, config)
    assert {kind: len(matrix) for kind, matrix in parts.items()} == dict(
        q=32, k=16, v=16, o=32, gate=48, up=48, down=32
    )
    assert torch.equal(torch.cat([parts[kind] for kind in "qkv"]), layer.self_attn.qkv_proj.weight)


@pytest.mark.parametrize("form", ["new_decoder_architecture", "multi_query", "heads"])
def test_falcon_is_split_as_the_model_does(form):
    grouped = dict(new_decoder_architecture=True, num_kv_heads=2) if form == "new_decoder_architecture" else {}
    config = tf.FalconConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        multi_query=form == "multi_query",
        **grouped,
    )
    layer = tf.FalconForCausalLM(config).transformer.h[0]
    attention = layer.self_attention
    x = torch.randn(1, 3, 32)
    query, key, value = attention._split_heads(attention.query_key_value(x))
    parts = layer_matrices(layer, config)
    torch.testing.assert_close(x @ parts["q"].T, query.reshape(1, 3, -1))
    keys = x @ parts["k"].T
    if form == "new_decoder_architecture":  # Falcon repeats each group's key for its query heads
        key, value = key[:, :, ::2], value[:, :, ::2]
    torch.testing.assert_close(keys, key.reshape(1, 3, -1)[..., : keys.shape[-1]])
    torch.testing.assert_close(x @ parts["v"].T, value.reshape(1, 3, -1)[..., : keys.shape[-1]])


def test_mixtral_experts_are_one_wide_mlp():
    """With every expert chosen at weight 1, the experts are the dense MLP that their matrices form side by side."""
    model = tiny_model("mixtral")
    experts, parts = model.model.layers[0].mlp.experts, layer_matrices(model.model.layers[0], model.config)
    x = torch.randn(5, 32)
    found = experts(x, torch.arange(3).expand(5, 3), torch.ones(5, 3))
    expected = (torch.nn.functional.silu(x @ parts["gate"].T) * (x @ parts["up"].T)) @ parts["down"].T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gpt_bigcode_packs_by_head():
    config = tf.GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=64, multi_query=False)
    layer = tf.GPTBigCodeForCausalLM(config).transformer.h[0]
    x = torch.randn(3, 32)
    fused = (layer.attn.c_attn(x) - layer.attn.c_attn.bias).view(3, 4, 24)
    parts = layer_matrices(layer, config)
    for kind, y in zip("qkv", fused.chunk(3, dim=-1), strict=True):
        torch.testing.assert_close(x @ parts[kind].T, y.reshape(3, 32))


def test_a_language_model_inside_another_is_split_by_its_own_config():
    text = tf.Phi3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = tf.LlavaForConditionalGeneration(tf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=5))
    found = {kind: len(matrix) for _, kind, matrix in read_matrices(find_stacks(model)[0], ["q", "k", "v"])}
    assert found == dict(q=32, k=16, v=16)


@pytest.mark.parametrize("model", ["codegen", "llama4"])
def test_packings_that_are_not_known_are_refused(model, tmp_path):
    if model == "codegen":
        config = tf.CodeGenConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=64, rotary_dim=4)
        stack, kind = find_stacks(tf.CodeGenForCausalLM(config))[0], "q"
    else:
        config = tf.Llama4TextConfig(
            hidden_size=32, intermediate_size=16, intermediate_size_mlp=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, vocab_size=64, num_local_experts=2,
        )  # fmt: skip
        stack, kind = find_stacks(tf.Llama4ForCausalLM(config))[0], "up"
    with pytest.raises(LayerProbeError, match="is not known|is not supported"):
        list(read_matrices(stack, [kind]))
    assert len(list(read_matrices(stack, ["o"]))) == 2
    # Not asked for, they are left out.
    left_out = ["q", "k", "v"] if model == "codegen" else ["gate", "up", "down"]
    found = docs(stack.model)
    absent = {"gate"} if model == "codegen" else set()
    assert set(found.kinds) == set(LiveWeights(stack).kinds) == set(KINDS) - set(left_out) - absent
    assert [note.split(":")[0] for note in found.notes] == [f"{kind} is left out" for kind in left_out]
    stack.model.save_pretrained(tmp_path)
    assert docs(tmp_path).kinds == found.kinds and docs(tmp_path).notes == found.notes
    assert np.isfinite(score_layers(stack.model, by="docs").values).all()


def test_a_model_of_which_nothing_can_be_read_is_refused():
    config = tf.CodeGenConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=64, rotary_dim=4)
    stack = find_stacks(tf.CodeGenForCausalLM(config))[0]
    for layer in stack.layers:
        del layer.attn.out_proj, layer.mlp.fc_in, layer.mlp.fc_out
    with pytest.raises(LayerProbeError, match="is not known"):
        LiveWeights(stack)


def test_one_kind_and_letters_as_text():
    stack = find_stacks(tiny_model("llama"))[0]
    assert LiveWeights(stack, "up").kinds == ("up",) and LiveWeights(stack, "qkvo").kinds == ("q", "k", "v", "o")
    with pytest.raises(LayerProbeError, match="Unknown matrix kinds 'q,up'; the kinds are q, k"):
        LiveWeights(stack, "q,up")


def test_modernbert_fuses_gate_and_up():
    config = tf.ModernBertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, pad_token_id=0
    )
    layer = tf.ModernBertModel(config).layers[1]
    x, parts = torch.randn(3, 32), layer_matrices(layer, config)
    expected = (torch.nn.functional.gelu(x @ parts["gate"].T) * (x @ parts["up"].T)) @ parts["down"].T
    torch.testing.assert_close(layer.mlp(x), expected)


def test_cross_attention_is_not_mistaken_for_self_attention():
    decoder = find_stacks(tiny_model("bart"))[1]
    for layer, kind, matrix in read_matrices(decoder, ["q"]):
        assert kind == "q"
        assert torch.equal(matrix, decoder.layers[layer].self_attn.q_proj.weight)


# Early versions run Qwen3-Next with a layer of either kind only.
GATED_QUERIES = {"qwen3_next": dict(
    layer_types=["full_attention", "linear_attention"] * 2, linear_num_key_heads=2, linear_num_value_heads=2,
    linear_key_head_dim=8, linear_value_head_dim=8,
), "qwen3_5_text": {}, "qwen3_5_moe_text": {}, "qwen4_exp_text": dict(
    indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=4
)}  # fmt: skip


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=pytest.mark.model_type(t)) for t in GATED_QUERIES])
def test_queries_without_the_gate_in_their_projection(model_type, tmp_path):
    """The norm on the queries gets what the matrix read as q computes."""
    small = dict(GQA, head_dim=16, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=2)
    layers = {"layer_types": ["full_attention"] * 4} | GATED_QUERIES[model_type]
    config = tf.AutoConfig.for_model(model_type, **small, num_experts_per_tok=1, **layers)
    model = redrawn(tf.AutoModelForCausalLM.from_config(config))
    stack, queries, x = find_stacks(model)[0], [], []
    attention = stack.layers[0].self_attn
    attention.q_norm.register_forward_pre_hook(lambda _module, args: queries.append(args[0].flatten(2)))
    attention.q_proj.register_forward_pre_hook(lambda _module, args: x.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None])
    found = layer_matrices(stack.layers[0], config)["q"]
    assert found.shape == (64, 32)
    torch.testing.assert_close(x[0] @ found.T, queries[0])
    model.save_pretrained(tmp_path)
    np.testing.assert_allclose(docs(tmp_path, kinds=["q"])["q"], docs(model, kinds=["q"])["q"], rtol=1e-5)


@pytest.mark.model_type("afmoe")
def test_the_gate_of_an_attention_is_not_that_of_the_mlp():
    config = tf.AfmoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_dense_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=64, num_experts=3, num_shared_experts=1,
    )  # fmt: skip
    model = tf.AfmoeForCausalLM(config)
    dense, mixture = model.model.layers
    assert torch.equal(layer_matrices(dense, config)["gate"], dense.mlp.gate_proj.weight)
    assert len(matrix_parts(mixture, config, "gate")) == len(matrix_parts(mixture, config, "up")) == 4


def test_the_output_of_a_second_attention_is_not_that_of_the_mlp():
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = tf.TimesformerModel(tf.TimesformerConfig(**small, image_size=16, patch_size=4))
    layer = model.encoder.layer[0]
    (down,) = matrix_parts(layer, model.config, "down")
    assert torch.equal(down, layer.output.dense.weight)


@pytest.mark.parametrize(
    "kinds, message",
    [(["qq"], "Unknown matrix kinds"), ([], "Unknown matrix kinds"), (["gate"], "have no matrix known as gate")],
)
def test_unknown_and_missing_kinds(kinds, message):
    with pytest.raises(LayerProbeError, match=message):
        list(read_matrices(find_stacks(tiny_model("gpt2"))[0], kinds))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = value
    with pytest.raises(LayerProbeError, match="the up matrix of layer 2"):
        list(read_matrices(find_stacks(model)[0]))


def test_weights_that_are_not_in_memory_are_named():
    with torch.device("meta"):
        model = FAMILIES["llama"][0](FAMILIES["llama"][1]())
    with pytest.raises(LayerProbeError, match=r"q matrix of layer 0.*meta device"):
        list(read_matrices(find_stacks(model)[0]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype):
    model = tiny_model("llama")
    projection = model.model.layers[1].self_attn.q_proj
    projection.weight = torch.nn.Parameter(projection.weight.to(dtype), requires_grad=False)
    with pytest.raises(LayerProbeError, match=r"q matrix of layer 1.*quantised"):
        list(read_matrices(find_stacks(model)[0]))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_adapters_are_merged_on_the_fly(options):
    from peft import LoraConfig, get_peft_model

    plain = tiny_model("llama")
    lora = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, **options)
    model = get_peft_model(tiny_model("llama"), lora)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged, base = (LiveWeights(find_stacks(model)[0], adapters=adapters) for adapters in ("merged", "base"))
    found = {kind: [side.parts(1, kind)[0].clone() for side in (merged, base)] for kind in ("q", "k", "up")}
    assert merged.shapes(1, "up") == [(48, 32)]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    alone = layer_matrices(model.merge_and_unload().model.layers[1])
    for kind, (with_adapter, without) in found.items():
        torch.testing.assert_close(with_adapter, alone[kind])
        assert torch.equal(without, layer_matrices(plain.model.layers[1])[kind])
    assert not torch.equal(*found["q"]) and torch.equal(*found["k"])


def test_adapters_of_experts_are_merged_on_the_fly():
    from peft import LoraConfig, get_peft_model

    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(tiny_model("mixtral"), LoraConfig(target_parameters=targets, init_lora_weights=False))
    found = {k: m.clone() for k, m in layer_matrices(find_stacks(model)[0].layers[1], model.config).items()}
    alone = layer_matrices(model.merge_and_unload().model.layers[1], model.config)
    assert found.keys() == alone.keys()
    for kind in alone:
        torch.testing.assert_close(found[kind], alone[kind])


def test_an_adapter_that_cannot_be_merged_is_named(monkeypatch):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear

    def refuses(self, *args, **kwargs):
        raise ValueError("no")

    monkeypatch.setattr(Linear, "merge", refuses)
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(LayerProbeError, match="of q cannot be merged on the fly .ValueError: no.*adapters='base'"):
        LiveWeights(find_stacks(model)[0]).parts(0, "q")


def test_weights_partitioned_by_zero_3_are_refused_with_the_reason():
    model = tiny_model("llama")
    for parameter in model.parameters():  # as DeepSpeed leaves them: empty, the shape in an attribute
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    stack = find_stacks(model)[0]
    assert LiveWeights(stack).shapes(0, "gate") == [(48, 32)]
    with pytest.raises(LayerProbeError, match=r"A weight of \[32, 32\] has no values here: DeepSpeed ZeRO-3"):
        next(read_matrices(stack))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("feed_forward.w1", ("gate",)),  # LFM2
        ("feed_forward.w2", ("down",)),
        ("mlp.linear_fc1", ("up",)),  # the towers of Qwen's vision models
        ("feed_forward1.linear2", ("down",)),  # Parakeet
        ("ffn.linear_1", ("up",)),  # Funnel
        ("mlp.proj_out", ("down",)),  # SAM 2
        ("ff.layer_2", ("down",)),  # XLNet
        ("self_attn.projection_layer", ("o",)),  # InternVL
        ("attention.attn.o", ("o",)),  # MPNet
        ("self_attn.q_proj.linear", ("q",)),  # Gemma 4's towers
        ("layer.0.LocalSelfAttention.k", ("k",)),  # LongT5
        ("attn.att_proj", ("q", "k", "v")),  # Bark
        ("shared_mlp.input_linear", ("gate", "up")),  # Granite
        ("ada_rms_norm.linear1", None),  # Voxtral: no MLP
        ("adapter_modules.en.dense1", None),  # X-MOD: no MLP either
    ],
)
def test_names_of_less_common_layers(name, kinds):
    layer = nn.Module()
    parent = layer
    *parents, last = name.split(".")
    for part in parents:
        parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(last, nn.Linear(2, 2))
    assert [weight.kinds for weight in find_modules(layer)] == ([kinds] if kinds else [])
