"""The README's Python runs as printed; only the Hub id and the pushing are replaced."""

import re
from pathlib import Path

import pytest
import torch
import transformers as tf
from datasets import Dataset
from tiny import tiny_folder, tiny_model, tiny_tokenizer

from hf_layerprobe import plan_pruning, prune_layers

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
TEXTS = [f"the quick brown fox jumps over the lazy dog {i} times" for i in range(8)]


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (16, 8), generator=generator)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return {
        "model": tiny_model("llama"),
        "tokenizer": tiny_tokenizer(),
        "texts": TEXTS,
        "held_out_texts": TEXTS,
        "loader": [{"input_ids": ids}],
        "train": rows,
        "held_out": rows,
        "LlamaForCausalLM": tf.LlamaForCausalLM,
    }


def test_the_trainer_block(names):
    block = next(block for block in BLOCKS if "LayerProbeCallback" in block)
    block = block.replace("eval_steps=100", "eval_steps=2, max_steps=4, use_cpu=True")
    *lines, last = block.strip().splitlines()
    exec("\n".join(lines), names)
    assert len(eval(last.replace("layer_07", "layer_03"), names)) == 2
    history = next(block for block in BLOCKS if "LayerProbeHistory" in block)
    exec(history.replace("drift/norm", "docs/q"), names)
    assert names["history"]["avss"].shape == (2, 4) and Path("history.png").is_file()
    pruning = next(block for block in BLOCKS if "ProgressivePruningCallback" in block)
    exec(pruning.replace("{200: 1, 400: 1}", "{2: 1, 3: 1}"), names)
    assert names["model"].config.num_hidden_layers == 2
    assert tf.AutoModelForCausalLM.from_pretrained("out/pruned-4").config.num_hidden_layers == 1


def test_the_pruning_block(names, tmp_path, monkeypatch):
    folder, pushed = tiny_folder(tmp_path / "model"), []
    monkeypatch.setattr("hf_layerprobe.push_model", lambda *arguments: pushed.append(arguments))
    block = next(block for block in BLOCKS if "push_model" in block)
    block = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(folder)).replace("ratio=0.1", "ratio=0.25")
    exec(block, names)
    assert type(names["smaller"]) is tf.LlamaForCausalLM
    assert pushed == [("smaller", "me/smaller")]
    assert type(tf.AutoModelForCausalLM.from_pretrained("smaller")) is tf.LlamaForCausalLM


def test_the_block_of_maps(names, tmp_path):
    block = next(block for block in BLOCKS if 'resume="rows"' in block).replace(
        "org/name", str(tiny_folder(tmp_path / "m"))
    )
    exec(
        "from hf_layerprobe import docs\n" + block,
        names | {"base": tiny_model("llama"), "tuned": tiny_model("llama", 1)},
    )
    assert (tmp_path / "maps.safetensors").is_file() and any((tmp_path / "rows").iterdir())


def test_the_block_of_functions(names):
    block = next(block for block in BLOCKS if "docs_similarity" in block)
    exec(block.replace("remove=[3, 12]", "remove=[3, 1]"), names)
    assert names["maps"]["q"].shape == (4, 4)


def test_the_block_of_measurements(names):
    rows = [{"question": f"what {i}", "options": [" a", " b"], "label": i % 2} for i in range(4)]
    task = dict(
        task="piqa", custom_dataset=lambda **_: {"test": Dataset.from_list(rows)}, test_split="test", num_fewshot=0,
        output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice="{{options}}", doc_to_target="{{label}}",
    )  # fmt: skip
    block = next(block for block in BLOCKS if "evaluate_choices" in block)
    block = block.replace('smaller, "piqa"', "smaller, task").replace(
        "measure_speed(smaller,", "measure_speed(smaller, prompt_tokens=8,"
    )
    exec(block, names | {"rows": rows, "task": task, "smaller": prune_layers(names["model"], remove=[1])})


def test_the_block_of_evaluate_modules(names):
    exec(next(block for block in BLOCKS if "metric_path" in block), names)
    found = names["compute_metrics"](None)
    assert {"avss/layer_00", "docs/q/mean_neighbour", "perplexity"} <= found.keys()


def test_the_block_of_repairs(names):
    texts = ["the quick brown fox jumps over the lazy dog"] * 300
    block = next(block for block in BLOCKS if "Lora(" in block)
    block = block.replace("minutes=30", "steps=2, max_tokens=5000").replace('"bf16": True', '"use_cpu": True')
    plan = plan_pruning(names["model"], remove=[1])
    exec(block, names | {"prune_layers": prune_layers, "plan": plan, "texts": texts})
