"""Model cards: what they say is what was done, the Hub accepts them, and they give nothing away."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import transformers as tf
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from loopback_hub import card_errors
from peft import LoraConfig, get_peft_model
from test_cli import TEXTS, run
from test_hub import TOKEN, hub, store  # noqa: F401
from tiny import tiny_folder, tiny_model, tiny_tokenizer

from hf_layerprobe import (
    Comparison,
    LayerProbeError,
    PruningPlan,
    evaluate_model,
    model_card,
    prune_layers,
    push_model,
)
from hf_layerprobe.evaluation.answers import TaskComparison, TaskResult

BASE_CARD = """---
license: other
license_name: llama3.2
license_link: LICENSE
language:
- en
- "no"
pipeline_tag: text-generation
tags: [onnx]
---
# The base
"""


@pytest.fixture(scope="module")
def auto(tmp_path_factory):
    """A folder pruned by `auto`, and its plan."""
    folder = tmp_path_factory.mktemp("auto") / "small"
    prune_layers(tiny_model("llama"), ratio=0.5, data=TEXTS, tokenizer=tiny_tokenizer(), output_dir=folder)
    return folder, PruningPlan.load(folder)


def metadata(content):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)[1])


def numbers(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_it_says_what_was_done(auto):
    folder, plan = auto
    content = (folder / "README.md").read_text()
    assert card_errors(content) == [] and content.count("{{") == content.count("{%") == 0
    rows = numbers(content)
    assert ["removed", ", ".join(map(str, plan.remove))] in rows and ["kept", ", ".join(map(str, plan.keep))] in rows
    for candidate in plan.candidates:
        removed = ", ".join(map(str, candidate["remove"]))
        assert [candidate["by"], removed, f"{candidate['held_out_loss']:.4f}"] in rows
    for layer, value in enumerate(plan.scores["values"]):
        assert [str(layer), f"{value:.5g}", "removed" if layer in plan.remove else ""] in rows
    for name, value in plan.scores.get("data", {}).items():
        assert [name, str(value)] in rows
    assert plan.checksum() in content and plan.scores["source"] in content
    assert all(f"{package} {version}" in content for package, version in plan.versions.items())
    assert (folder / "figures" / "scores_by_depth.png").read_bytes().startswith(b"\x89PNG")
    assert "](figures/scores_by_depth.png)" in content and "Nobody has measured" in content
    assert metadata(content) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["layer-pruning", "hf_layerprobe"],
    }  # fmt: skip
    assert "/tmp" not in content and str(Path.home()) not in content


def test_the_example_runs(auto, monkeypatch):
    folder, plan = auto
    content = str(model_card(folder, repo_id="me/small"))
    code = re.search(r"```python\n(.*?)```", content, re.DOTALL)[1]
    assert '"me/small"' in code and "AutoTokenizer" in code
    names = {}
    exec(code.replace("me/small", str(folder)), names)
    assert names["model"].config.num_hidden_layers == len(plan.keep)


def test_a_vision_model_without_scores(tmp_path):
    prune_layers(tiny_model("vit"), remove=[1], output_dir=tmp_path / "out")
    content = (tmp_path / "out" / "README.md").read_text()
    assert card_errors(content) == [] and not (tmp_path / "out" / "figures").exists()
    assert "AutoModelForImageClassification.from_pretrained" in content and "AutoTokenizer" not in content
    assert "None: the layers were chosen without running the model" in content and "## Scores" not in content
    assert metadata(content)["pipeline_tag"] == "image-classification" and "base_model_relation" not in content


def test_several_stacks_and_adapters(tmp_path):
    model = get_peft_model(tiny_model("t5"), LoraConfig(target_modules=["q"]))
    prune_layers(model, remove={"encoder.block": [1], "decoder.block": [2, 3]}, output_dir=tmp_path / "out")
    content = (tmp_path / "out" / "README.md").read_text()
    assert card_errors(content) == [] and "adapters/default" in content
    assert (
        "it keeps 3 of the 4 layers in `encoder.block` and 3 of the 5 layers in `decoder.block` of the model before"
        in content
    )
    rows = numbers(content)
    assert ["removed (`encoder.block`)", "1"] in rows and ["kept (`decoder.block`)", "0, 1, 4"] in rows


def test_results_are_a_model_index(auto, tmp_path):
    folder, _ = auto
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    pruned = tf.AutoModelForCausalLM.from_pretrained(folder)
    comparison = evaluate_model(pruned, TEXTS, tokenizer=tokenizer, baseline=model)
    card = model_card(folder, base_model="ada/base", results={"Quick foxes": comparison, "ada/texts": comparison})
    assert card_errors(str(card)) == []
    data = metadata(str(card))
    assert data["base_model"] == "ada/base" and data["base_model_relation"] == "finetune"
    _, found = model_index_to_eval_results(data["model-index"])
    assert {(r.dataset_type, r.metric_type, r.metric_name, r.metric_value) for r in found} == {
        (kind, metric, f"{metric.replace('_', ' ')} {which} pruning", round(getattr(side, metric), 4))
        for kind in ("quick-foxes", "ada/texts")
        for metric in ("perplexity", "bits_per_byte")
        for which, side in (("before", comparison.before), ("after", comparison.after))
    }
    row = ["Quick foxes", "before pruning", "perplexity", f"{comparison.before.perplexity:.5g}"]
    assert row in [found[:4] for found in numbers(str(card))]
    card.save(tmp_path / "README.md")
    assert ModelCard.load(tmp_path / "README.md").data.eval_results == found
    wrecked = Comparison(dataclasses.replace(comparison.after, perplexity=float("inf")))
    task = TaskComparison(TaskResult("piqa", "acc", 0.5, items=200), TaskResult("piqa", "acc", 0.6, items=200))
    card = model_card(folder, results={"x": wrecked, "PIQA": task})
    assert card_errors(str(card)) == [] and ["PIQA", "after pruning", "acc", "0.5", "200 items"] in numbers(str(card))


def test_what_a_card_cannot_say(auto, tmp_path):
    folder, _ = auto
    with pytest.raises(LayerProbeError, match="is no Hub id"):
        model_card(folder, base_model="/home/me/base")
    with pytest.raises(LayerProbeError, match="'wiki' has a float"):
        model_card(folder, results={"wiki": 12.5})
    with pytest.raises(LayerProbeError, match="No pruning plan"):
        model_card(tmp_path)


def test_the_base_models_card_is_carried_over(hub, tmp_path):  # noqa: F811
    """From the Hub with its id, from a folder without its path; a push is validated by the Hub."""
    base = tiny_folder(tmp_path / "base")
    (base / "README.md").write_text(BASE_CARD)
    store(hub, "ada/base", base)
    prune_layers("ada/base", remove=[1], output_dir=tmp_path / "small")
    expected = {
        "license": "other", "license_name": "llama3.2", "license_link": "LICENSE", "language": ["en", "no"],
        "pipeline_tag": "text-generation", "tags": ["layer-pruning", "hf_layerprobe"], "library_name": "transformers",
        "base_model": "ada/base", "base_model_relation": "finetune",
    }  # fmt: skip
    content = (tmp_path / "small" / "README.md").read_text()
    assert metadata(content) == expected and "# base pruned to 3 layers" in content
    push_model(tmp_path / "small", "ada/small", token=TOKEN)
    assert ("POST", "/api/validate-yaml", True) in hub.requests
    ModelCard.load("ada/small").validate()

    prune_layers(
        tmp_path / "small", remove=[0], output_dir=tmp_path / "smaller"
    )  # twice: the base is still that of the first, and has more layers than what was pruned now
    again = (tmp_path / "smaller" / "README.md").read_text()
    assert metadata(again)["base_model"] == "ada/base" and "# base pruned to 2 layers" in again
    assert (
        "A pruned model derived from [ada/base](https://huggingface.co/ada/base), made with hf_layerprobe: it keeps 2 of the 3 "
        "layers in `model.layers` of the model before pruning."
    ) in again
    prune_layers(base, remove=[1], output_dir=tmp_path / "local")
    local = (tmp_path / "local" / "README.md").read_text()
    assert metadata(local) == {k: v for k, v in expected.items() if not k.startswith("base_model")}
    assert str(tmp_path) not in local


def test_an_invalid_card_is_refused_before_anything_is_sent(hub, auto, tmp_path):  # noqa: F811
    folder = tmp_path / "small"
    folder.mkdir()
    for file in auto[0].iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "README.md").write_text("---\nbase_model: /home/me/base\n---\n")
    with pytest.raises(LayerProbeError, match='"base_model" with value "/home/me/base" is not valid'):
        push_model(folder, "ada/small", token=TOKEN)
    assert hub.repos["ada/small"].messages == ["initial commit"] and not hub.blobs


def test_cards_whose_metadata_cannot_be_read(tmp_path, caplog):
    base = tiny_folder(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: [bad\n: x\n---\n")
    prune_layers(base, remove=[1], output_dir=tmp_path / "out")  # it does without
    assert "license" not in metadata((tmp_path / "out" / "README.md").read_text())
    (tmp_path / "out" / "README.md").write_text("---\nlicense: [bad\n: x\n---\n")
    with pytest.raises(LayerProbeError, match="The metadata of .*README.md cannot be read"):
        model_card(tmp_path / "out")


def test_a_base_without_a_card(hub, tmp_path):  # noqa: F811
    store(hub, "ada/bare", tiny_folder(tmp_path / "bare"))
    prune_layers("ada/bare", remove=[1], output_dir=tmp_path / "out")
    data = metadata((tmp_path / "out" / "README.md").read_text())
    assert data["base_model"] == "ada/bare" and "license" not in data


def test_eval_writes_its_results_into_the_card(auto, tmp_path):
    base, text = tiny_folder(tmp_path / "base"), tmp_path / "text.txt"
    text.write_text("\n\n".join(TEXTS))
    prune_layers(base, remove=[1], output_dir=tmp_path / "out")
    result = run("eval", tmp_path / "out", "--baseline", base, "--text", text, "--card", "Foxes", "--json")
    after = json.loads(result.stdout)["after"]
    content = (tmp_path / "out" / "README.md").read_text()
    values = [m["value"] for m in metadata(content)["model-index"][0]["results"][0]["metrics"]]
    assert np.isclose(values, round(after["perplexity"], 4)).any() and "Nobody has measured" not in content
    assert "No pruning plan" in run("eval", base, "--text", text, "--card", "Foxes", code=2).stderr


@pytest.mark.parametrize("named, kept", [("/data/models/llama", None), ("[org/a, ./local]", ["org/a"]), ("12", None)])
def test_a_card_that_names_a_folder(named, kept, tmp_path, caplog):
    """Trainers write the path that they loaded; it is no reason to lose a pruned model, and not carried over."""
    folder = tiny_folder(tmp_path / "tuned")
    (folder / "README.md").write_text(f"---\nbase_model: {named}\nlanguage: en\n---\n")
    with caplog.at_level("WARNING", "hf_layerprobe"):
        prune_layers(folder, remove=[1], output_dir=tmp_path / "small")
    card = (tmp_path / "small" / "README.md").read_text()
    assert metadata(card).get("base_model") == kept and metadata(card)["language"] == "en"
    assert "that are no Hub ids; left out" in caplog.text and "/data/models" not in card


def test_a_search_has_run_the_model(tmp_path):
    prune_layers(
        tiny_model("llama"),
        num_layers=1,
        by="greedy",
        data=TEXTS,
        tokenizer=tiny_tokenizer(),
        output_dir=tmp_path / "small",
    )
    card = (tmp_path / "small" / "README.md").read_text()
    assert "fingerprint" in card and "without running the model" not in card and "unknown" not in card


@pytest.mark.parametrize("kind", ["here", "link"])
def test_any_name_of_an_empty_folder(kind, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    target = Path(".") if kind == "here" else tmp_path / "link"
    if kind == "here":
        monkeypatch.chdir(tmp_path / "empty")
    else:
        target.symlink_to(tmp_path / "empty", target_is_directory=True)
    prune_layers(tiny_model("llama"), remove=[1], output_dir=target)
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_vision_model_keeps_its_processor(tmp_path):
    tiny_model("vit").save_pretrained(tmp_path / "vit")
    tf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    run("prune", tmp_path / "vit", "--remove", "1", "--output", tmp_path / "small")
    assert (tmp_path / "small" / "preprocessor_config.json").is_file()


def test_a_file_that_is_cut_off_is_bad_input(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    run("prune", folder, "--remove", "1", "--output", tmp_path / "small", code=2)
