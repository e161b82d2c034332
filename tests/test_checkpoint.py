"""Matrices read from files must be those of the live model, in a fraction of its memory, and bad files must be named."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, GQA, TEXT, tiny_model

from hf_layerprobe import LayerProbeError, find_stacks
from hf_layerprobe.weights import Checkpoint, layer_matrices, one_matrix, open_checkpoint, shards

MOE = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16)
# Models whose files differ from their modules: experts on their own, fused projections, renamed modules.
CONVERTED = {
    "qwen3_moe": (tf.Qwen3MoeForCausalLM, lambda: tf.Qwen3MoeConfig(**GQA, **MOE, head_dim=8)),
    "qwen2_moe": (
        tf.Qwen2MoeForCausalLM,
        lambda: tf.Qwen2MoeConfig(**GQA, **MOE, shared_expert_intermediate_size=16, mlp_only_layers=[0]),
    ),
    "deepseek_v3": (
        tf.DeepseekV3ForCausalLM,
        lambda: tf.DeepseekV3Config(
            **TEXT, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
            kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1,
        ),
    ),
}  # fmt: skip
if "nomic_bert" in tf.CONFIG_MAPPING:  # which Transformers 5.0 does not have
    CONVERTED["nomic_bert"] = (tf.NomicBertForMaskedLM, lambda: tf.NomicBertConfig(**TEXT))


def matrix(checkpoint: Checkpoint, layer: int, kind: str) -> torch.Tensor:
    return one_matrix(checkpoint.parts(layer, kind), kind)


def assert_same_matrices(folder: Path, model: tf.PreTrainedModel) -> None:
    for stack in find_stacks(model):
        checkpoint = open_checkpoint(folder, stack=stack.path)
        assert checkpoint.num_layers == stack.num_layers
        kinds = set()
        for index, layer in enumerate(stack.layers):
            live = layer_matrices(layer, model.config)
            kinds |= set(live)
            for kind in checkpoint.kinds:
                if kind not in live:
                    assert checkpoint.shapes(index, kind) == checkpoint.parts(index, kind) == []
                    continue
                found = matrix(checkpoint, index, kind)
                assert found.dtype == live[kind].dtype
                assert checkpoint.shapes(index, kind) == [tuple(part.shape) for part in checkpoint.parts(index, kind)]
                assert torch.equal(found, live[kind]), (stack.path, index, kind)
        assert set(checkpoint.kinds) == kinds


@pytest.mark.parametrize("size", ["1GB", "30KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_as_the_live_model(family, size, tmp_path):
    model = tiny_model(family).to({"1GB": torch.bfloat16, "30KB": torch.float16}[size])
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors").exists() == (size == "1GB")
    assert_same_matrices(tmp_path, model)


def test_float32_is_given_as_stored(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    assert_same_matrices(tmp_path, tiny_model("llama"))


@pytest.mark.parametrize("family", CONVERTED)
def test_models_whose_files_differ_from_their_modules(family, tmp_path):
    model_class, config = CONVERTED[family]
    model_class(config()).save_pretrained(tmp_path, max_shard_size="30KB")
    model = model_class.from_pretrained(tmp_path)
    stored = {key for file in tmp_path.glob("*.safetensors") for key in load_file(file)}
    assert not stored <= set(model.state_dict())
    assert_same_matrices(tmp_path, model)


def test_more_experts_than_ten_keep_their_order(tmp_path):
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**GQA, num_local_experts=12))
    model.save_pretrained(tmp_path)
    assert_same_matrices(tmp_path, model)


@pytest.mark.parametrize("saved", ["base", "head"])
def test_the_prefix_of_the_base_model_may_be_missing_or_too_much(saved, tmp_path):
    model = tiny_model("llama")
    base = model.model
    (base if saved == "base" else model).save_pretrained(tmp_path)
    other = "LlamaForCausalLM" if saved == "base" else "LlamaModel"
    edit(tmp_path / "config.json", architectures=[other])
    assert_same_matrices(tmp_path, model if saved == "base" else base)


def test_layers_that_lack_a_kind(tmp_path):
    """Mamba layers of Jamba have no q; the attention layers have."""
    config = tf.JambaConfig(
        **GQA, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2,
        mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip
    tf.JambaForCausalLM(config).save_pretrained(tmp_path)
    assert_same_matrices(tmp_path, tf.JambaForCausalLM.from_pretrained(tmp_path))
    assert open_checkpoint(tmp_path).parts(0, "q") == []


def test_parameters_that_layers_share(tmp_path):
    """Zamba saves the transformer block that its hybrid layers share once."""
    config = tf.ZambaConfig(
        **TEXT | dict(num_hidden_layers=5), attn_layer_period=2, attn_layer_offset=1, n_mamba_heads=2, pad_token_id=0,
        mamba_dt_rank=4, attention_hidden_size=64, attention_head_dim=16, num_key_value_heads=4,
    )  # fmt: skip
    tf.ZambaForCausalLM(config).save_pretrained(tmp_path)
    assert_same_matrices(tmp_path, tf.ZambaForCausalLM.from_pretrained(tmp_path))
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(matrix(checkpoint, 2, "q"), matrix(checkpoint, 4, "q"))


# 8-bit floats


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def save_float8(folder: Path, scale_of, ending: str, quantization: dict, dtype=torch.bfloat16) -> dict:
    """Saves a tiny Llama with its projections in 8-bit floats; the exact values by tensor name come back."""
    model = tiny_model("llama").to(dtype)
    model.save_pretrained(folder)
    edit(folder / "config.json", quantization_config=quantization)
    tensors, exact = load_file(folder / "model.safetensors"), {}
    for key in [key for key in tensors if "_proj" in key]:
        full = tensors[key].float()
        scale, wide = scale_of(full)
        stored = (full / wide).to(torch.float8_e4m3fn)
        exact[key] = (stored.float() * wide).to(dtype)
        tensors |= {key: stored, key + ending: scale}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return exact


def block_scale(size):
    def scale_of(full):
        rows, columns = full.shape
        scale = torch.rand(math.ceil(rows / size), math.ceil(columns / size)) + 0.5
        wide = torch.stack([scale[i // size, torch.arange(columns) // size] for i in range(rows)])
        return scale, wide

    return scale_of


FLOAT8_CASES = {
    "blocks": (block_scale(16), "_scale_inv", {"quant_method": "fp8", "weight_block_size": [16, 16]}),
    "last block cut short": (block_scale(20), "_scale_inv", {"quant_method": "fp8", "weight_block_size": [20, 20]}),
    "one block": (block_scale(128), "_scale_inv", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "blocks of unknown size": (block_scale(8), "_scale_inv", {"quant_method": "fp8"}),
    "tensor": (
        lambda full: (torch.tensor(0.7), torch.full_like(full, 0.7)),
        "_scale",
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
    ),
    "tensor [1]": (lambda full: (torch.tensor([0.7]), torch.full_like(full, 0.7)), "_scale", {"quant_method": "fp8"}),
    "rows": (
        lambda full: ((s := torch.rand(len(full), 1) + 0.5), s.expand_as(full)),
        "_scale",
        {"quant_method": "fbgemm_fp8"},
    ),
    "rows [out]": (
        lambda full: ((s := torch.rand(len(full)) + 0.5), s[:, None].expand_as(full)),
        "_scale",
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
    ),
}


@pytest.mark.parametrize("case", FLOAT8_CASES)
def test_8_bit_floats_are_multiplied_by_their_scales(case, tmp_path):
    exact = save_float8(tmp_path, *FLOAT8_CASES[case])
    checkpoint = open_checkpoint(tmp_path)
    for layer in range(checkpoint.num_layers):
        for kind in checkpoint.kinds:
            room = "self_attn" if kind in "qkvo" else "mlp"
            expected = exact[f"model.layers.{layer}.{room}.{kind}_proj.weight"]
            found = matrix(checkpoint, layer, kind)
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, expected), (layer, kind)


def test_8_bit_experts_are_dequantised_one_by_one(tmp_path):
    """Scales belong to the experts' own tensors, so they are applied before the experts are stacked."""
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for key in [key for key in tensors if ".experts." in key]:
        scale = torch.rand(()) + 0.5
        stored = (tensors[key] / scale).to(torch.float8_e4m3fn)
        tensors |= {key: stored, key + "_scale_inv": scale}
    save_file(tensors, tmp_path / "model.safetensors")
    edit(tmp_path / "config.json", quantization_config={"quant_method": "fp8"})
    checkpoint = open_checkpoint(tmp_path)
    for kind in ("gate", "up", "down"):
        found, live = matrix(checkpoint, 1, kind), layer_matrices(model.model.layers[1], model.config)[kind]
        assert found.shape == live.shape
        assert (found - live).abs().max() < live.abs().max() / 8


def test_8_bit_floats_without_their_scale(tmp_path):
    save_float8(tmp_path, *FLOAT8_CASES["blocks"])
    drop_tensor(tmp_path / "model.safetensors", "model.layers.2.mlp.up_proj.weight_scale_inv")
    with pytest.raises(LayerProbeError, match=r"layers\.2\.mlp\.up_proj\.weight'.*scale is not in the checkpoint"):
        matrix(open_checkpoint(tmp_path), 2, "up")


@pytest.mark.parametrize("scale", [torch.ones(5, 5), torch.ones(2, 2, 2), torch.ones(2, 2, dtype=torch.uint8)])
def test_scales_that_do_not_fit(scale, tmp_path):
    save_float8(tmp_path, *FLOAT8_CASES["blocks"])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight_scale_inv"] = scale
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(LayerProbeError, match="q_proj.weight_scale_inv.*does not fit"):
        matrix(open_checkpoint(tmp_path), 0, "q")


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ],
)
def test_other_quantised_checkpoints_are_refused_by_name(quantization, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    edit(tmp_path / "config.json", quantization_config=quantization)
    with pytest.raises(
        LayerProbeError, match=f"quantised with '{quantization['quant_method']}'.*Load the model and pass"
    ):
        open_checkpoint(tmp_path)


def test_integer_weights_are_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.1.self_attn.q_proj.weight"
    save_file(tensors | {key: tensors[key].to(torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(LayerProbeError, match=r"q_proj.weight' is quantised \(torch.int8\).*dequantised"):
        matrix(open_checkpoint(tmp_path), 1, "q")


# The Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository in a local cache, as downloads leave it; returns its id and the files asked for."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / commit
    tiny_model("llama").save_pretrained(snapshot, max_shard_size="10KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    asked = []

    def fetch(name, file, **kwargs):
        if file.startswith("model-"):  # once the commit is known, all files are of that commit
            assert kwargs["revision"] == commit
        asked.append(file)
        return tf.utils.cached_file(name, file, **kwargs)

    monkeypatch.setattr(shards, "cached_file", fetch)
    return "some/model", snapshot, asked


def test_only_files_with_matrices_that_are_read_are_fetched(hub):
    name, snapshot, asked = hub
    weight_map = json.loads((snapshot / "model.safetensors.index.json").read_text())["weight_map"]
    checkpoint = open_checkpoint(name)
    assert asked == ["model.safetensors", "model.safetensors.index.json"]
    asked.clear()
    live = tiny_model("llama")
    assert torch.equal(matrix(checkpoint, 1, "up"), live.model.layers[1].mlp.up_proj.weight)
    assert asked == [weight_map["model.layers.1.mlp.up_proj.weight"]]
    for layer in range(4):
        for kind in checkpoint.kinds:
            checkpoint.parts(layer, kind)
    needed = {shard for key, shard in weight_map.items() if "_proj" in key}
    assert set(asked) == needed
    assert len(asked) == len(needed)  # each once
    assert weight_map["model.embed_tokens.weight"] not in needed  # or this test shows nothing


def test_a_repository_that_is_not_there_offline(hub):
    with pytest.raises(LayerProbeError, match="Cannot open the checkpoint 'some/other'.*taken as a Hub id"):
        open_checkpoint("some/other")


def test_a_shard_that_cannot_be_fetched(hub):
    name, snapshot, _ = hub
    weight_map = json.loads((snapshot / "model.safetensors.index.json").read_text())["weight_map"]
    shard = weight_map["model.layers.1.mlp.up_proj.weight"]
    (snapshot / shard).unlink()
    with pytest.raises(LayerProbeError, match=f"index.json of 'some/model' names the file '{shard}'"):
        matrix(open_checkpoint(name), 1, "up")


# Bad input


def drop_tensor(path: Path, key: str) -> None:
    tensors = load_file(path)
    del tensors[key]
    save_file(tensors, path)


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    return tmp_path


def shard_of(folder: Path, key: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][key]


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", Path("/nothing")])
def test_no_such_folder(name):
    with pytest.raises(LayerProbeError, match="There is no folder"):
        open_checkpoint(name)


def test_only_pickled_weights(folder):
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(LayerProbeError, match="found pytorch_model.bin.*can run code.*save_pretrained"):
        open_checkpoint(folder)


def test_no_weights_and_no_config(tmp_path):
    with pytest.raises(LayerProbeError, match="Cannot open the checkpoint.*config.json"):
        open_checkpoint(tmp_path)
    tiny_model("llama").config.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", architectures=["LlamaForCausalLM"])
    with pytest.raises(LayerProbeError, match="neither model.safetensors nor model.safetensors.index.json"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named_at_once(folder):
    shard = shard_of(folder, Q)
    shard.unlink()
    with pytest.raises(LayerProbeError, match=f"names the file '{shard.name}'"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}', "[]"])
def test_an_index_that_is_none(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(LayerProbeError, match="index.json is no index.*weight_map"):
        open_checkpoint(folder)


def test_a_tensor_that_the_index_does_not_have(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][Q]
    path.write_text(json.dumps(index))
    with pytest.raises(LayerProbeError, match=f"no tensor for 1 of the 28 matrices of LlamaForCausalLM, such as '{Q}'"):
        open_checkpoint(folder)


def test_a_tensor_that_its_shard_does_not_hold(folder):
    shard = shard_of(folder, Q)
    drop_tensor(shard, Q)
    with pytest.raises(LayerProbeError, match=f"Cannot read the tensor '{Q}' from .*{shard.name}"):
        matrix(open_checkpoint(folder), 1, "q")


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: b"\xff" * 64, lambda data: b""])
def test_damaged_files(folder, damage, tmp_path):
    shard = shard_of(folder, Q)
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(LayerProbeError, match=f"Cannot read the tensor '{Q}' from .*{shard.name}.*damaged"):
        matrix(open_checkpoint(folder), 1, "q")


def test_a_damaged_single_file(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(LayerProbeError, match="Cannot read .*model.safetensors.*damaged"):
        open_checkpoint(tmp_path)


def test_another_shape_than_the_config_says(folder):
    edit(folder / "config.json", intermediate_size=40)
    with pytest.raises(
        LayerProbeError, match=r"layers.0.mlp.up_proj.weight' is \(48, 32\) in the files.*\(40, 32\) by"
    ):
        matrix(open_checkpoint(folder), 0, "up")


def test_an_expert_that_is_missing(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        key = next(key for key in file.keys() if "layers.1" in key and ".experts.2.w2" in key)  # noqa: SIM118
    drop_tensor(tmp_path / "model.safetensors", key)
    with pytest.raises(LayerProbeError, match=r"experts.down_proj' is \(2, 32, 48\) in the files.*\(3, 32, 48\) by"):
        matrix(open_checkpoint(tmp_path), 1, "down")


def test_experts_that_cannot_be_stacked(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = next(key for key in tensors if "layers.1" in key and ".experts.2.w2" in key)
    save_file(tensors | {key: torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(LayerProbeError, match="experts.down_proj' cannot be made from the 3 tensors"):
        matrix(open_checkpoint(tmp_path), 1, "down")


@pytest.mark.parametrize("names, message", [(None, "'no class'"), (["NoSuchModel"], "'NoSuchModel'")])
def test_classes_that_transformers_lacks(folder, names, message):
    edit(folder / "config.json", architectures=names)
    with pytest.raises(LayerProbeError, match=message):
        open_checkpoint(folder)


def test_code_in_the_checkpoint_is_not_run(folder):
    edit(folder / "config.json", model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    (folder / "configuration_own.py").write_text("raise SystemExit")
    with pytest.raises(LayerProbeError, match="Cannot open the checkpoint"):
        open_checkpoint(folder)


def test_a_model_without_a_stack(tmp_path):
    config = tf.AlbertConfig(**TEXT, embedding_size=16)
    tf.AlbertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(LayerProbeError, match="has no repeated list of layers"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("layer, kind", [(4, "q"), (-1, "q"), (0, "qq")])
def test_layers_and_kinds_that_are_not_there(folder, layer, kind):
    with pytest.raises(LayerProbeError, match="has layers 0 to 3 with matrices q, k, v, o, gate, up, down"):
        matrix(open_checkpoint(folder), layer, kind)


def test_values_that_are_not_finite(tmp_path):
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(LayerProbeError, match="the up matrix of layer 2.*NaN"):
        matrix(open_checkpoint(tmp_path), 2, "up")


# Memory

PEAK = """
import sys
from pathlib import Path
from hf_layerprobe.weights.checkpoint import open_checkpoint

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field + ":"))

def read(folder):
    checkpoint = open_checkpoint(folder)
    for layer in range(checkpoint.num_layers):
        for kind in checkpoint.kinds:
            checkpoint.parts(layer, kind)

read(sys.argv[2])  # imports and thread pools are not the checkpoint's
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
before = kilobytes("VmRSS")
read(sys.argv[1])
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_a_few_matrices(tmp_path):
    """200 MB of layers in one file, the largest matrix 6 MB. The peak counts mapped pages of the file too."""
    sizes = dict(GQA, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_key_value_heads=4)
    config = tf.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    large, small = tmp_path / "large", tmp_path / "small"
    with torch.device("meta"):
        empty = tf.LlamaForCausalLM(config).state_dict()
    config.save_pretrained(large)
    tensors = {name: torch.ones(tensor.shape, dtype=torch.bfloat16) for name, tensor in empty.items()}
    save_file(tensors, large / "model.safetensors")
    del tensors
    assert (large / "model.safetensors").stat().st_size > 190e6
    tiny_model("llama").save_pretrained(small)
    command = [sys.executable, "-c", PEAK, str(large), str(small)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 64_000
