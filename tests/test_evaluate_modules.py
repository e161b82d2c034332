"""AVSS, DOCS and perplexity through the library `evaluate`, without a network."""

import evaluate
import numpy as np
import pytest
import transformers as tf
from tiny import tiny_folder, tiny_model, tiny_tokenizer

from hf_layerprobe import LayerProbeError, avss, docs, evaluate_model, metric_path

TEXTS = [f"paragraph {i}: the quick brown fox jumps over the lazy dog {i * 7919} times." for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """`evaluate` keeps what it is given in files until it computes."""
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_CACHE", tmp_path)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")


def test_perplexity(folder):
    module = evaluate.load(metric_path("perplexity"))
    expected = evaluate_model(tiny_model("llama"), TEXTS, tokenizer=tiny_tokenizer())
    found = module.compute(predictions=TEXTS, model=folder)
    assert found == {
        "perplexity": pytest.approx(expected.perplexity),
        "bits_per_byte": pytest.approx(expected.bits_per_byte),
        "loss": pytest.approx(expected.loss),
    }
    for part in (TEXTS[:2], TEXTS[2:]):
        module.add_batch(predictions=part)
    assert module.compute(model=tiny_model("llama"), tokenizer=tiny_tokenizer()) == pytest.approx(found)


@pytest.mark.parametrize("variant", ["relative", "published", "released"])
def test_avss(folder, variant):
    found = evaluate.load(metric_path("avss"), variant).compute(predictions=TEXTS, model=folder)
    expected = avss(tiny_model("llama"), TEXTS, tokenizer=tiny_tokenizer(), variant=variant).values
    assert list(found) == [f"avss/layer_0{i}" for i in range(4)]
    np.testing.assert_allclose(list(found.values()), expected)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_docs(folder, axis):
    found = evaluate.load(metric_path("docs"), axis).compute(model=folder)
    expected = docs(tiny_model("llama"), axis=axis)
    for kind in expected.kinds:
        assert found[f"docs/{kind}/mean_neighbour"] == pytest.approx(expected.mean_neighbour(kind))
        excess = np.diagonal(expected.excess(kind), offset=1).mean()
        assert found[f"docs/{kind}/mean_neighbour_excess"] == pytest.approx(excess)


def test_combined_in_a_trainer(tmp_path):
    combined = evaluate.combine([evaluate.load(metric_path(name)) for name in ("avss", "docs", "perplexity")])
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    rows = [
        dict(tokenizer(text, return_token_type_ids=False), labels=tokenizer(text)["input_ids"]) for text in TEXTS[:2]
    ]
    trainer = tf.Trainer(
        model,
        tf.TrainingArguments(tmp_path / "out", use_cpu=True, report_to="none", per_device_eval_batch_size=1),
        eval_dataset=rows,
        compute_metrics=lambda _: combined.compute(predictions=TEXTS, model=model, tokenizer=tokenizer),
    )
    found = trainer.evaluate()
    expected = evaluate_model(model, TEXTS, tokenizer=tokenizer)
    assert found["eval_perplexity"] == pytest.approx(expected.perplexity)
    assert found["eval_avss/layer_03"] == pytest.approx(avss(model, TEXTS, tokenizer=tokenizer).values[3])
    assert found["eval_docs/q/mean_neighbour"] == pytest.approx(docs(model).mean_neighbour("q"))
    assert all(isinstance(value, (int, float)) for value in found.values())


def test_predictions_of_a_trainer(folder):
    """NumPy arrays, and for what reads none of them also numbers."""
    found = evaluate.load(metric_path("docs")).compute(predictions=np.array([3, 4]), model=folder)
    assert found == evaluate.load(metric_path("docs")).compute(model=folder)
    combined = evaluate.combine([evaluate.load(metric_path(name)) for name in ("docs", "perplexity")])
    expected = evaluate.load(metric_path("perplexity")).compute(predictions=TEXTS, model=folder)
    assert combined.compute(predictions=np.array(TEXTS), model=folder) == {**found, **expected}


@pytest.mark.parametrize("name", ["avss", "perplexity"])
def test_one_string_is_no_list_of_its_characters(name, folder):
    module = evaluate.load(metric_path(name))
    for text in (TEXTS[0], np.str_(TEXTS[0])):
        with pytest.raises(LayerProbeError, match="Expected a list of texts, got one string"):
            module.compute(predictions=text, model=folder)
        with pytest.raises(LayerProbeError, match="got one string"):
            module.add_batch(predictions=text)
    assert module.compute(predictions=TEXTS[:1], model=folder)  # nothing of it was kept


def test_what_cannot_be_computed(folder):
    with pytest.raises(LayerProbeError, match="no module 'acc' for evaluate; there are avss, docs, perplexity"):
        metric_path("acc")
    with pytest.raises(ValueError, match="configurations relative, published, released; got 'new'"):
        evaluate.load(metric_path("avss"), "new")
    with pytest.raises(LayerProbeError, match="a model itself with tokenizer="):
        evaluate.load(metric_path("perplexity")).compute(predictions=TEXTS, model=tiny_model("llama"))
    with pytest.raises(ValueError, match="Pass model="):
        evaluate.load(metric_path("docs")).compute()
