"""Perplexity and bits per byte against a token-by-token transcription."""

import math
from pathlib import Path

import pytest
import torch
import transformers as tf
from datasets import Dataset
from tiny import TEXT as TINY
from tiny import redrawn, tiny_model, tiny_tokenizer

from hf_layerprobe import LayerProbeError, PruningPlan, evaluate_model, plan_pruning, prune_layers
from hf_layerprobe.evaluation import overlap
from hf_layerprobe.repair import ClosedForm

TEXTS = ["hello there, world", "naïve café", "a much longer text that needs several windows of tokens to be read", "x"]


class Bytes:
    """One token a byte, and its own BOS."""

    bos_token_id = 1
    eos_token_id = 2

    def __call__(self, text, **_):
        return {"input_ids": [3 + byte % 60 for byte in text.encode()]}


def transcription(model, texts, max_length):
    total, tokens = 0.0, 0
    for text in texts:
        ids = Bytes()(text)["input_ids"]
        for i, wanted in enumerate(ids):
            start = i // max_length * max_length  # windows overlap by the one token that starts the next
            context = ([1, *ids])[start : i + 1]
            with torch.no_grad():
                logits = model(torch.tensor([context])).logits[0, -1]
            total -= torch.log_softmax(logits.double(), -1)[wanted].item()
            tokens += 1
    return total, tokens


@pytest.mark.parametrize("max_length, batch_size", [(512, 4), (16, 3), (1, 1)])
def test_every_token_is_predicted_once(max_length, batch_size):
    model = tiny_model("llama")
    found = evaluate_model(model, TEXTS, tokenizer=Bytes(), max_length=max_length, batch_size=batch_size).after
    total, tokens = transcription(model, TEXTS, max_length)
    size = sum(len(text.encode()) for text in TEXTS)
    assert (found.tokens, found.bytes) == (tokens, size)
    assert found.loss == pytest.approx(total / tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / size, rel=1e-5)


def test_before_and_after():
    model = tiny_model("llama")
    pruned = prune_layers(model, remove=[1])
    found = evaluate_model(pruned, TEXTS, tokenizer=Bytes(), baseline=model)
    alone, dense = (evaluate_model(m, TEXTS, tokenizer=Bytes()) for m in (pruned, model))
    assert found.after == alone.after and found.before == dense.after and alone.before is None
    assert found.perplexity == alone.perplexity and found.bits_per_byte == alone.bits_per_byte
    assert found.perplexity_ratio == pytest.approx(alone.perplexity / dense.perplexity)
    assert found.retained == pytest.approx(dense.loss / alone.loss)
    assert found.after.parameters < found.before.parameters
    assert evaluate_model(pruned, TEXTS, tokenizer=Bytes(), baseline=dense.after) == found
    assert found.to_dict()["after"]["perplexity"] == found.perplexity


@pytest.mark.parametrize("other", [dict(max_length=4), dict(data=[text[::-1] for text in TEXTS])])
def test_a_baseline_of_other_windows_or_text(other):
    model = tiny_model("llama")
    dense = evaluate_model(model, TEXTS, tokenizer=Bytes()).after
    with pytest.raises(LayerProbeError, match="evaluated on other text or in other windows"):
        evaluate_model(model, **{"data": TEXTS, **other}, tokenizer=Bytes(), baseline=dense)


@pytest.mark.parametrize("reading", [{}, {"max_length": 16}, {"pack": False}])
@pytest.mark.parametrize("by", ["influence", "contiguous", "auto"])
def test_evaluating_on_the_calibration_texts_is_said(by, reading, monkeypatch):
    texts = [f"text {i}: the quick brown fox {i * 7919} jumps" for i in range(12)]
    model, tokenizer, said = tiny_model("llama"), tiny_tokenizer(), []
    monkeypatch.setattr(overlap.logger, "warning", said.append)
    plan = plan_pruning(model, texts, num_layers=1, by=by, tokenizer=tokenizer, **reading)
    pruned = prune_layers(model, plan)
    evaluate_model(pruned, [f"other {each}" for each in texts], tokenizer=tokenizer, plan=plan)
    assert said == []
    evaluate_model(pruned, texts, tokenizer=tokenizer, plan=plan)
    assert len(said) == 1 and "the plan's own" in said[0]
    # As the command does: a plan from every other text.
    half = plan_pruning(model, texts[::2], num_layers=1, by=by, tokenizer=tokenizer, **reading)
    evaluate_model(pruned, texts, tokenizer=tokenizer, plan=half)
    assert len(said) == 2


def test_evaluating_on_the_texts_of_a_loader_is_said(monkeypatch):
    model, tokenizer, said = tiny_model("llama"), tiny_tokenizer(), []
    monkeypatch.setattr(overlap.logger, "warning", said.append)
    loader = [tokenizer(TEXTS[i : i + 2], padding=True, return_tensors="pt") for i in range(0, len(TEXTS), 2)]
    plan = plan_pruning(model, [dict(batch) for batch in loader], num_layers=1, by="influence")
    evaluate_model(model, ["nothing of it", "nor this"], tokenizer=tokenizer, plan=plan)
    assert said == []
    evaluate_model(model, TEXTS, tokenizer=tokenizer, plan=plan)
    assert len(said) == 1


def test_evaluating_on_the_texts_of_a_repair_is_said(monkeypatch, tmp_path):
    texts = [f"text {i}: the quick brown fox {i * 7919} jumps over the lazy dog" for i in range(40)]
    model, tokenizer, said = tiny_model("llama"), tiny_tokenizer(), []
    monkeypatch.setattr(overlap.logger, "warning", said.append)
    settings = ClosedForm(max_length=24, batch_size=2, max_tokens=1000)
    pruned = prune_layers(
        model, remove=[1], data=texts, tokenizer=tokenizer, repair=settings, output_dir=tmp_path / "smaller"
    )
    plan = PruningPlan.load(tmp_path / "smaller")
    evaluate_model(pruned, texts[20:], tokenizer=tokenizer, plan=plan)
    assert said == []
    evaluate_model(pruned, texts, tokenizer=tokenizer, plan=plan)
    assert len(said) == 1 and "the plan's own repair data" in said[0]
    evaluate_model(pruned, texts, tokenizer=tokenizer, plan=tmp_path / "smaller")
    assert said[1:] == said[:1]
    with pytest.raises(LayerProbeError, match="plan is a dict; expected a PruningPlan"):
        evaluate_model(pruned, texts, tokenizer=tokenizer, plan={"remove": [1]})


def test_a_data_set_of_texts():
    model = tiny_model("llama")
    dataset = Dataset.from_dict({"text": TEXTS})
    assert evaluate_model(model, dataset, tokenizer=Bytes()) == evaluate_model(model, TEXTS, tokenizer=Bytes())


def test_windows_are_no_longer_than_the_model():
    model = tiny_model("gpt2")  # 64 positions
    found = evaluate_model(model, ["a long text " * 20], tokenizer=Bytes())
    assert found == evaluate_model(model, ["a long text " * 20], tokenizer=Bytes(), max_length=64)
    with pytest.raises(LayerProbeError, match="batch_size must be a positive whole number, got 0"):
        evaluate_model(model, TEXTS, tokenizer=Bytes(), batch_size=0)


def test_the_mode_is_left_as_it_was():
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    evaluate_model(model, TEXTS, tokenizer=Bytes())
    assert [module.training for module in model.modules()] == before


def test_a_model_that_sees_the_next_token_has_no_perplexity():
    """BERT with a language model head reads both ways unless its config makes it a decoder."""
    encoder, decoder = (
        redrawn(tf.BertLMHeadModel(tf.BertConfig(**TINY, is_decoder=is_decoder))) for is_decoder in (False, True)
    )
    with pytest.raises(LayerProbeError, match="BertLMHeadModel sees the tokens that it is to predict"):
        evaluate_model(encoder, TEXTS, tokenizer=Bytes())
    assert evaluate_model(decoder, TEXTS, tokenizer=Bytes()).perplexity > 1


@pytest.mark.parametrize(
    "model, data, tokenizer, message",
    [
        ("llama", [], Bytes(), "no text to evaluate on"),
        ("llama", ["", ""], Bytes(), "no text to evaluate on"),
        ("llama", "text", Bytes(), "got one string"),
        ("llama", None, Bytes(), "got nothing"),
        ("llama", [{"input_ids": [1]}], Bytes(), "Expected texts"),
        ("llama", TEXTS, None, "needs tokenizer="),
        ("bert", TEXTS, Bytes(), "BertForMaskedLM is not a causal language model"),
        ("t5", TEXTS, Bytes(), "T5ForConditionalGeneration is not a causal language model"),
    ],
)
def test_unusable_input(model, data, tokenizer, message):
    with pytest.raises(LayerProbeError, match=message):
        evaluate_model(tiny_model(model), data, tokenizer=tokenizer)


def test_what_is_no_model():
    model = tiny_model("llama")
    comparison = evaluate_model(model, TEXTS[:1], tokenizer=Bytes())
    for given, baseline, message in [
        ("folder", None, r"model is a str; expected a loaded model\. Load it first, .*from_pretrained\('folder'\)"),
        (None, None, "model is a NoneType; expected a loaded model"),
        (comparison.after, model, "model is a Evaluation; expected a loaded model"),
        (model, Path("folder"), "baseline is a .*Path; expected a loaded model or Evaluation. Load it first"),
        (
            model,
            comparison,
            "baseline is a Comparison; expected a loaded model or Evaluation. Pass baseline=comparison.after",
        ),
    ]:
        with pytest.raises(LayerProbeError, match=message):
            evaluate_model(given, TEXTS, tokenizer=Bytes(), baseline=baseline)


def test_smollm2_predicts_english(smollm2, smollm2_tokenizer, english):
    """About one bit a byte on Wikipedia text, for the 4-bit approximation of the real model."""
    found = evaluate_model(smollm2, english[:8], tokenizer=smollm2_tokenizer)
    assert 0.6 < found.bits_per_byte < 1.3
