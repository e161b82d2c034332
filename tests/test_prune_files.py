"""Pruning the files of a checkpoint: byte for byte what is kept, and the model that pruning in memory gives."""

import dataclasses
import json
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import run
from test_hub import TOKEN, hub, store  # noqa: F401
from tiny import tiny_folder, tiny_model

from hf_layerprobe import LayerProbeError, PruningError, PruningPlan, plan_pruning, prune_checkpoint, prune_layers
from hf_layerprobe.embedded import embedded_model
from hf_layerprobe.errors import VerificationError
from hf_layerprobe.surgery import gate

CASES = {  # family → what to remove
    "llama": [1], "qwen3": [0, 3], "gemma3": [2], "mixtral": [1], "gpt2": [1], "opt": [3], "gpt_neox": [0], "bert": [1, 2],
    "vit": [1], "t5": {"encoder.block": [1]}, "bart": {"model.decoder.layers": [4], "model.encoder.layers": [0]},
    "whisper": {"model.decoder.layers": [1]},
}  # fmt: skip


def stored(folder):
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def assert_same_model(one, other):
    assert type(one) is type(other)
    left, right = (model.config.to_dict() | {"_name_or_path": ""} for model in (one, other))
    assert left == right
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("family", CASES)
def test_the_same_model_as_in_memory(family, tmp_path):
    model, remove = tiny_model(family), CASES[family]
    model.save_pretrained(tmp_path / "in", max_shard_size="40KB")
    prune_checkpoint(tmp_path / "in", remove=remove, output_dir=tmp_path / "out")
    in_memory = prune_layers(model, remove=remove, output_dir=tmp_path / "other")
    assert_same_model(type(model).from_pretrained(tmp_path / "out"), in_memory)
    # On disk too: the same names, and the tensors' bytes.
    found, expected = stored(tmp_path / "out"), stored(tmp_path / "other")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert (tmp_path / "out" / "pruning_plan.json").is_file() and (tmp_path / "out" / "README.md").is_file()
    plans = [PruningPlan.load(tmp_path / name) for name in ("out", "other")]
    assert [part.remove for part in plans[0].parts] == [part.remove for part in plans[1].parts]
    # The layers that a plan was made for have one checksum, in files and in memory.
    assert [part.model["checksum"] for part in plans[0].parts] == [part.model["checksum"] for part in plans[1].parts]
    assert all(part.model["checksum"] for part in plans[0].parts)


def test_one_file_stays_one_and_empty_files_go(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "one")
    prune_checkpoint(tmp_path / "one", keep=[0, 3], output_dir=tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").glob("*.safetensors")] == ["model.safetensors"]
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    prune_checkpoint(tmp_path / "many", keep=[3], output_dir=tmp_path / "b")
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "b").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and 1 < len(files) < len(
        list((tmp_path / "many").glob("*.safetensors"))
    )
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(tmp_path / "b").values())
    assert sorted(files)[-1].endswith(f"-of-{len(files):05d}.safetensors")


def test_names_on_disk_are_respected(tmp_path):
    """A base model's file, without the head's prefix, opened as the model with the head."""
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    model.config.architectures = ["GPT2LMHeadModel"]  # saving the part has changed it
    assert "h.0.attn.c_attn.weight" in stored(tmp_path / "in")
    prune_checkpoint(tmp_path / "in", remove=[0], output_dir=tmp_path / "out")
    assert {key.split(".")[1] for key in stored(tmp_path / "out") if key.startswith("h.")} == {"0", "1", "2"}
    assert_same_model(tf.GPT2LMHeadModel.from_pretrained(tmp_path / "out"), prune_layers(model, remove=[0]))


def test_whatever_lies_beside_the_weights(tmp_path):
    base = tiny_folder(tmp_path / "in")
    for name in ("LICENSE", "pytorch_model.bin", ".secret", "chat_template.jinja"):
        (base / name).write_text(name)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (base / "trainer_state.json").write_text('{"best_model_checkpoint": "/home/ada/run"}')
    prune_checkpoint(base, remove=[1], output_dir=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "chat_template.jinja", "tokenizer.json", "generation_config.json"} <= names
    assert not {"pytorch_model.bin", ".secret", "trainer_state.json"} & names
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template["tools"] == "tools"
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "out")("abc") == tf.AutoTokenizer.from_pretrained(base)("abc")


@pytest.mark.parametrize(
    ("remove", "left"),
    [
        ({"model.decoder.layers": [1]}, [[1, 0], [2, 1]]),
        ({"model.decoder.layers": [0], "model.encoder.layers": [1]}, [[0, 3], [1, 0], [2, 1]]),
        ({"model.encoder.layers": [1]}, [[1, 3], [2, 0], [3, 1]]),
        ({"model.decoder.layers": [1, 2, 3]}, None),
    ],
)
def test_alignment_heads_follow_their_layers(remove, left, tmp_path):
    """Pairs of decoder layer and head, which Whisper's token timestamps are read from."""
    model = tiny_model("whisper")
    model.generation_config = tf.GenerationConfig(decoder_start_token_id=1, alignment_heads=[[1, 3], [2, 0], [3, 1]])
    model.save_pretrained(tmp_path / "in")
    prune_checkpoint(tmp_path / "in", remove=remove, output_dir=tmp_path / "out")
    from_files = tf.GenerationConfig.from_pretrained(tmp_path / "out")
    for config in (from_files, prune_layers(model, remove=remove).generation_config):
        assert getattr(config, "alignment_heads", None) == left
        assert hasattr(config, "alignment_heads") == (left is not None)
    assert model.generation_config.alignment_heads == [[1, 3], [2, 0], [3, 1]]


def test_the_parts_of_a_sentence_transformer(hub, tmp_path):  # noqa: F811
    base = tiny_folder(tmp_path / "in")
    parts = [{"name": "0", "path": ""}, {"name": "1", "path": "1_Pooling"}, {"name": "2", "path": "2_Dense"}]
    (base / "modules.json").write_text(json.dumps(parts))
    for each, file in (("1_Pooling", "config.json"), ("2_Dense", "model.safetensors"), ("onnx", "model.onnx")):
        (base / each).mkdir()
        (base / each / file).write_text("{}")
    store(hub, "ada/embeds", base)
    for name, token in ((base, None), ("ada/embeds", TOKEN)):
        out = tmp_path / f"out-{token}"
        prune_checkpoint(name, remove=[1], output_dir=out, token=token)
        assert (out / "1_Pooling" / "config.json").is_file() and (out / "2_Dense" / "model.safetensors").is_file()
        assert (out / "modules.json").is_file() and not (out / "onnx").exists()


def test_what_predicts_further_tokens_stays_behind_the_last_layer(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "in")
    tensors = {key: tensor.clone() for key, tensor in load_file(tmp_path / "in" / "model.safetensors").items()}
    further = {"model.layers.4.eh_proj.weight": torch.ones(2), "model.layers.5.eh_proj.weight": torch.zeros(2)}
    save_file(tensors | further, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    prune_checkpoint(tmp_path / "in", remove=[0, 2], output_dir=tmp_path / "out")
    found = stored(tmp_path / "out")
    assert {int(key.split(".")[2]) for key in found if "layers" in key} == {0, 1, 2, 3}
    assert found["model.layers.2.eh_proj.weight"].sum() == 2 and found["model.layers.3.eh_proj.weight"].sum() == 0


def test_from_the_hub(hub, tmp_path):  # noqa: F811
    base = tiny_folder(tmp_path / "base")
    store(hub, "ada/base", base, private=True)
    plan = plan_pruning(tiny_model("llama"), remove=[2])
    prune_checkpoint("ada/base", plan, output_dir=tmp_path / "out", token=TOKEN)
    assert_same_model(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), prune_layers(base, remove=[2]))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    hub.requests.clear()
    repo = hub.repos["ada/base"]
    repo.commit("main", dict(repo.commits[repo.branches["main"]]), "the same, so that the cache does not have it")
    with pytest.raises(PruningError, match="layers 0 to 3"):
        prune_checkpoint("ada/base", remove=[9], output_dir=tmp_path / "other", token=TOKEN)
    for name in ("ada/private", tmp_path / "nowhere"):
        with pytest.raises((LayerProbeError, OSError), match="not a valid model identifier|There is no folder"):
            prune_checkpoint(name, remove=[1], output_dir=tmp_path / "other")
    assert not any(path.startswith("/storage/") for _, path, _ in hub.requests)  # before any download of weights


def test_float8_weights_stay_as_they_are(tmp_path):
    """Scales move with their matrices, and the settings name the layers by their new numbers."""
    folder = tiny_folder(tmp_path / "in")
    # Copies: what is loaded is a map of the file, which is written anew.
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    for key in [key for key in tensors if "proj" in key and "layers.3" not in key]:
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    skipped = ["lm_head", "model.layers.3.mlp", "model.layers.1.self_attn"]
    config["quantization_config"] = {"quant_method": "fp8", "modules_to_not_convert": skipped}
    (folder / "config.json").write_text(json.dumps(config))
    runs = True
    try:
        import_module("transformers.integrations.finegrained_fp8")
    except ImportError:  # early versions need a GPU's kernels for it
        with pytest.raises(PruningError, match="could not be compared with it; verify=False"):
            prune_checkpoint(folder, remove=[1], output_dir=tmp_path / "out")
        runs = False
    prune_checkpoint(folder, remove=[1], output_dir=tmp_path / "out", verify=runs)
    found = stored(tmp_path / "out")
    for new, old in ((0, 0), (1, 2), (2, 3)):
        for key in [key for key in tensors if key.startswith(f"model.layers.{old}.")]:
            same = found.pop(key.replace(f"layers.{old}.", f"layers.{new}."))
            assert same.dtype == tensors[key].dtype and torch.equal(
                same.view(torch.uint8), tensors[key].view(torch.uint8)
            )
    assert not any("layers" in key for key in found)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["quantization_config"]["modules_to_not_convert"] == ["lm_head", "model.layers.2.mlp"]


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Of a model of 540 MB, nothing is held in memory; with the check, only pages of the files are."""
    script = f"""
import re, hf_layerprobe, transformers, matplotlib.figure, optimum.exporters.tasks
from transformers import LlamaForCausalLM
def peak(name): return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
before = peak("VmHWM")
hf_layerprobe.prune_checkpoint({str(embedded_model())!r}, remove=[3, 12], output_dir={str(tmp_path / "out")!r}, verify=False)
print("MB:", peak("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(re.search(r"MB: (\d+)", done.stdout)[1]) < 150


def test_the_command(tmp_path):
    base = tiny_folder(tmp_path / "in")
    found = json.loads(run("prune-files", base, "--remove", "1,-1", "--output", tmp_path / "out", "--json").stdout)
    assert found["remove"] == [1, 3] and found["verified"]
    assert "Removed 1, 3" in run("prune-files", base, "--plan", tmp_path / "out", "--output", tmp_path / "again").stdout
    assert stored(tmp_path / "out").keys() == stored(tmp_path / "again").keys()
    run("prune-files", base, "--remove", "9", "--output", tmp_path / "no", code=2)
    assert not (tmp_path / "no").exists()


def test_a_plan_for_other_weights(hub, tmp_path):  # noqa: F811
    """Of the same shape, but not the ones that the plan was made for."""
    base, other = tiny_folder(tmp_path / "base"), tiny_folder(tmp_path / "other", seed=1)
    store(hub, "ada/other", other)
    made = plan_pruning(tiny_model("llama"), remove=[1])
    prune_checkpoint(base, remove=[1], output_dir=tmp_path / "pruned")
    for plan in (made, PruningPlan.load(tmp_path / "pruned")):
        for name in (other, "ada/other"):
            with pytest.raises(PruningError, match=r"made for another model: .*remove=\[1\]"):
                prune_checkpoint(name, plan, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    half = tiny_model("llama").to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")  # another dtype is the same model
    prune_checkpoint(tmp_path / "half", made, output_dir=tmp_path / "out", verify=False)


def test_what_cannot_be_done_on_files(tmp_path, monkeypatch):
    base = tiny_folder(tmp_path / "in")
    out = tmp_path / "out"
    with pytest.raises(PruningError, match="not both"):
        prune_checkpoint(base, plan_pruning(tiny_model("llama"), remove=[1]), keep=[0], output_dir=out)
    with pytest.raises(PruningError, match="made for 5 layers"):
        bart = plan_pruning(tiny_model("bart"), remove={"model.decoder.layers": [1]})
        prune_checkpoint(base, dataclasses.replace(bart, stack="model.layers"), output_dir=out)
    with monkeypatch.context() as patch, pytest.raises(VerificationError, match="does not compute"):
        patch.setitem(gate.TOLERANCE, torch.float32, -1.0)
        prune_checkpoint(base, remove=[1], output_dir=out)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(LayerProbeError, match="no whole safetensors file|damaged"):
        prune_checkpoint(base, remove=[1], output_dir=out)
    (base / "model.safetensors").unlink()
    with pytest.raises(LayerProbeError, match="neither model.safetensors nor"):
        prune_checkpoint(base, remove=[1], output_dir=out)
    tiny_model("t5").save_pretrained(tmp_path / "t5")
    with pytest.raises(PruningError, match="relative_attention_bias.*not done on files|relative_attention_bias"):
        prune_checkpoint(tmp_path / "t5", remove={"encoder.block": [0]}, output_dir=out)
    assert not out.exists() and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
