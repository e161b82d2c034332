"""Quantised models, as their packages make and load them: read as what their weights stand for, pruned in their files."""

import copy
import json
import re
from contextlib import suppress
from importlib import import_module

import numpy as np
import pytest
import torch
import transformers as tf
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization import apply_quantization_config as apply_compression
from compressed_tensors.quantization.utils import calculate_qparams
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_prune_files import stored
from tiny import GQA, redrawn, tiny_folder, tiny_tokenizer
from torch import nn
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig

from hf_layerprobe import LayerProbeError, PruningError, docs, find_stacks, prune_checkpoint, prune_layers, score_layers
from hf_layerprobe.stacks import bypassed
from hf_layerprobe.weights.checksum import sign_checksum
from hf_layerprobe.weights.read import read_matrices

IDS = torch.randint(3, 60, (8, 64), generator=torch.Generator().manual_seed(1))
SKIPPED = "model.layers.2.mlp.up_proj"
FOUR_BIT = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "dense"
    sizes = {**GQA, "hidden_size": 64, "intermediate_size": 128}
    redrawn(tf.LlamaForCausalLM(tf.LlamaConfig(**sizes))).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder, settings=None):
    return tf.LlamaForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32).eval()


def torchao(dense, folder):
    # Its format cannot be saved by every version; it is the weights in memory that count here.
    return loaded(dense, tf.TorchAoConfig(Int8WeightOnlyConfig(version=2)))


def bnb_int8(dense, folder):
    loaded(dense, tf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[SKIPPED])).save_pretrained(folder)
    return loaded(folder)


def bnb_nf4(dense, folder):
    settings = tf.BitsAndBytesConfig(**FOUR_BIT, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=[SKIPPED])
    loaded(dense, settings).save_pretrained(folder)
    return loaded(folder)


def compressed(dense, folder, form, **weights):
    """A model as llm-compressor writes it."""
    model = loaded(dense)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(symmetric=True, **weights))
    settings = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head", SKIPPED], format=form)
    apply_compression(model, settings)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            groups = module.weight.detach().unflatten(1, (-1, weights.get("group_size", module.in_features)))
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return loaded(folder)


def compressed_int4(dense, folder):
    return compressed(dense, folder, "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)


def compressed_fp8(dense, folder):
    return compressed(dense, folder, "float-quantized", num_bits=8, type="float", strategy="channel")


def fine_grained_fp8(dense, folder):
    """A model as DeepSeek's are published: 8-bit floats with a scale for each block."""
    tiny = loaded(dense)
    tiny.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if "proj" in key and SKIPPED not in key]:
        scale = tensors[key].unflatten(0, (-1, 32)).unflatten(2, (-1, 32)).abs().amax((1, 3)) / 448
        spread = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
        tensors[key], tensors[f"{key}_scale_inv"] = (tensors[key] / spread).to(torch.float8_e4m3fn), scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = dict(quant_method="fp8", weight_block_size=[32, 32], modules_to_not_convert=["lm_head", SKIPPED])
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return loaded(folder)


MAKERS = [torchao, bnb_int8, bnb_nf4, compressed_int4, compressed_fp8]
with suppress(ModuleNotFoundError):  # early Transformers 5 cannot load the last without triton
    import_module("transformers.integrations.finegrained_fp8")
    MAKERS.append(fine_grained_fp8)


@pytest.fixture(scope="module", params=MAKERS, ids=lambda make: make.__name__)
def made(request, dense, tmp_path_factory):
    """The name of the format, the model, its folder, and the plain model of the values that its weights stand for."""
    folder = tmp_path_factory.mktemp("quantised") / "model"
    model = request.param(dense, folder)
    return request.param.__name__, model, folder, dequantised(request.param(dense, folder.parent / "again"))


def dequantised(model):
    """The plain model, by the packages' own dequantisation of the whole."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    twin = tf.LlamaForCausalLM(config).eval()
    if any(hasattr(module, "quantization_scheme") for module in model.modules()):
        model(input_ids=IDS)  # compressed-tensors unpacks all its weights at the first run
    elif hasattr(model, "hf_quantizer") and "Bnb" in type(model.hf_quantizer).__name__:
        model = model.dequantize(dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            values = model.get_parameter(name)
            parameter.copy_(values if type(values) is nn.Parameter else values.dequantize())
    return twin


def test_read_as_what_the_weights_stand_for(made, dense):
    name, model, _, twin = made
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found, expected, original = docs(model), docs(twin), docs(dense)
    assert found.kinds == expected.kinds == ("q", "k", "v", "o", "gate", "up", "down")
    for kind in found.kinds:
        np.testing.assert_allclose(found[kind], expected[kind], rtol=1e-5)
    assert_same_matrices(model, twin)  # DOCS does not see lengths
    assert max(np.abs(found[kind] - original[kind]).max() for kind in found.kinds) > 1e-6  # not the dense weights
    after = model.state_dict()  # reading changes nothing
    assert before.keys() == after.keys() and all(
        torch.equal(
            *(
                values[key].dequantize() if type(values[key]) is Int8Tensor else values[key]
                for values in (before, after)
            )
        )
        for key in before
    )
    # bitsandbytes also rounds activations, which shows in shares of very few values.
    names = ["avss", "influence", "docs", "update-norm" if "bnb" in name else "avss-published"]
    data = [{"input_ids": IDS}]
    found, expected = (score_layers(each, data, by=names) for each in (model, twin))
    tolerance = 0.1 if "bnb" in name else 1e-3
    for score in names:
        np.testing.assert_allclose(found[score].values, expected[score].values, rtol=tolerance, atol=1e-6)
    # Kernels may pack their weights anew when they run; that of bitsandbytes rounds scales to 16 bits.
    assert_same_matrices(model, twin, rtol=1e-2)


def assert_same_matrices(one, other, rtol=1e-5, atol=1e-6):
    pairs = zip(*(read_matrices(find_stacks(each)[0]) for each in (one, other)), strict=True)
    for (*where, found), (*_, expected) in pairs:
        torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=atol, msg=str(where))


def test_pruned_in_files_with_every_weight_as_it_is(made, tmp_path):
    name, model, folder, _ = made
    if name != "fine_grained_fp8":  # without a GPU, Transformers loads these as plain weights
        with pytest.raises(
            PruningError, match=r"is quantised .*Quantizer.; prune the unquantised model.*prune_checkpoint"
        ):
            prune_layers(model, remove=[1], output_dir=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    if name == "torchao":
        return
    tensors = stored(folder)
    prune_checkpoint(folder, remove=[1], output_dir=tmp_path / "out")  # compared by running both
    found = stored(tmp_path / "out")
    for new, old in ((0, 0), (1, 2), (2, 3)):
        for key in [key for key in tensors if key.startswith(f"model.layers.{old}.")]:
            same = found.pop(key.replace(f"layers.{old}.", f"layers.{new}."))
            assert same.dtype == tensors[key].dtype
            assert torch.equal(same.view(torch.uint8), tensors[key].view(torch.uint8)), key
    assert not any("layers" in key for key in found)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    names = ("ignore", "llm_int8_skip_modules", "modules_to_not_convert")
    skipped = {module for name in names for module in settings.get(name) or ()}
    assert "model.layers.1.mlp.up_proj" in skipped and SKIPPED not in skipped
    small, whole = loaded(tmp_path / "out"), loaded(folder)
    with torch.no_grad(), bypassed(find_stacks(whole)[0], [1]):
        torch.testing.assert_close(small(input_ids=IDS).logits, whole(input_ids=IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dora, bits", [(False, FOUR_BIT), (True, FOUR_BIT), (False, dict(load_in_8bit=True))])
def test_adapters_on_packed_weights_are_read_as_they_act(dora, bits, dense):
    """QLoRA. Merging would round the sum to the few bits of the weight."""
    settings = tf.BitsAndBytesConfig(**bits, bnb_4bit_compute_dtype=torch.float32)
    model, plain = loaded(dense, settings), dequantised(loaded(dense, settings))
    config = LoraConfig(target_modules=["q_proj", "up_proj"], r=4, use_dora=dora)
    adapted, twin = get_peft_model(model, config).eval(), get_peft_model(plain, config).eval()
    with torch.no_grad():
        for (name, one), (_, other) in zip(*(lora_parameters(each) for each in (adapted, twin)), strict=True):
            one.copy_(other.normal_(std=0.2) if "magnitude" not in name else other)
    merged = twin.merge_and_unload()
    assert_same_matrices(adapted, merged, rtol=1e-4)
    with torch.no_grad():
        adapted(input_ids=IDS)
    assert_same_matrices(adapted, merged, rtol=1e-2, atol=5e-3)


def lora_parameters(model):
    return [(name, parameter) for name, parameter in model.named_parameters() if "lora_" in name]


class GptqLike(nn.Module):
    """A linear layer that holds codes and scales in buffers and no weight, as GPTQ's and AWQ's kernels do."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = torch.arange(self.out_features).float()
        self.register_buffer("scales", linear.weight.detach().abs().amax(1) / 7)
        self.register_buffer("qweight", (linear.weight.detach() / self.scales[:, None]).round().to(torch.int32).T)

    def forward(self, x):
        return x @ (self.qweight * self.scales) + self.bias


def test_weights_that_are_no_parameters(dense):
    model, plain = loaded(dense), loaded(dense)
    for layer, twin in zip(model.model.layers, plain.model.layers, strict=True):
        for block in ("self_attn", "mlp"):
            for name, linear in list(layer.get_submodule(block).named_children()):
                if isinstance(linear, nn.Linear):
                    packed = GptqLike(linear)
                    layer.get_submodule(block).set_submodule(name, packed)
                    twin.get_submodule(f"{block}.{name}").weight.data = (packed.qweight * packed.scales).T
    found, expected = docs(model), docs(plain)
    for kind in found.kinds:
        np.testing.assert_allclose(found[kind], expected[kind], rtol=1e-5)
    assert [stack.path for stack in find_stacks(model)] == ["model.layers"]
    assert sign_checksum(find_stacks(model)[0]) is None  # and not that of nothing


def test_a_quantisation_that_is_not_known(dense, tmp_path):
    folder = tiny_folder(tmp_path / "in")
    # None named, no such one, and two whose package is missing.
    for method, reason in (
        (None, "quant_method"),
        ("secret", "secret"),
        ("awq", "gptqmodel"),
        ("gptq", "Install the package"),
    ):
        config = json.loads((folder / "config.json").read_text())
        settings = {"quant_method": method, "bits": 4, "modules_to_not_convert": ["lm_head"]}
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        with pytest.raises(LayerProbeError, match=f"quantised with '?{method}'?"):
            docs(folder)
        with pytest.raises(PruningError, match=f"cannot be run here.*{reason}.*verify=False"):
            prune_checkpoint(folder, remove=[1], output_dir=tmp_path / "out")
        with pytest.raises(LayerProbeError, match=f"quantised with '?{method}'? and cannot be run here.*{reason}"):
            prune_layers(folder, remove=[1], output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["re:.*layers[.]1[.]mlp.*", "layers.3.mlp", r"+:model\.layers\.(1|2)\..*", r"-:.*\.[0-2]\..*gate.*"]
)
def test_layers_named_in_a_way_that_cannot_be_renumbered(name, dense, tmp_path):
    compressed_fp8(dense, tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    # The first two mean all layers.
    config["quantization_config"]["ignore"] += ["re:.*layers.*norm", r"re:.*\.\d+\.mlp\..*_proj", name]
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PruningError, match=f"name layers by {re.escape(repr(name))}.*new numbers"):
        prune_checkpoint(tmp_path / "in", remove=[1], output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_and_types_beside_the_weights(tmp_path):
    """What each tensor is, torchao writes into the files' metadata by name; other tools have settings in files of their own."""
    folder, types = tiny_folder(tmp_path / "in"), {"model.layers.0.mlp.up_proj.weight": "{}", "lm_head.weight": "{}"}
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    of_layer_2 = "model.layers.2.mlp.up_proj.weight"
    metadata = {"format": "pt", "tensor_names": json.dumps([*types, of_layer_2]), **types, of_layer_2: "[]"}
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    skipped = ["lm_head", "model.layers.0.mlp", "model.layers.2.mlp"]
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"exclude_modules": skipped}}))
    prune_checkpoint(folder, remove=[0], output_dir=tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        found = file.metadata()
    new = "model.layers.1.mlp.up_proj.weight"
    assert found.pop("tensor_names") == json.dumps(["lm_head.weight", new])
    assert found == {"format": "pt", "lm_head.weight": "{}", new: "[]"}
    content = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert content == {"quantization": {"exclude_modules": ["lm_head", "model.layers.1.mlp"]}}


def test_a_pruned_model_quantises_like_any_other(tmp_path):
    prune_layers(tiny_folder(tmp_path / "dense"), remove=[1], output_dir=tmp_path / "out")
    settings = tf.TorchAoConfig(Int8WeightOnlyConfig(version=2))
    small = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=settings, dtype=torch.float32)
    dense = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found, expected = (model.eval()(input_ids=IDS).logits for model in (small, dense))
    assert small.config.num_hidden_layers == 3
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()
