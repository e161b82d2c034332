"""EAVSS (our own definition) against a transcription on recorded activations."""

import numpy as np
import pytest
import torch
from test_activation_scores import FakeTokenizer, recorded
from tiny import tiny_model

from hf_layerprobe import LayerProbeError, eavss

PAIRS = [
    {"prompt": "what?", "factual": "an apple a day", "hallucinated": "pears"},
    {"prompt": "", "factual": "seven", "hallucinated": "eight and a half"},
    {"prompt": "who was it, after all?", "factual": "nobody", "hallucinated": "somebody"},
]


def transcription(model, eps=0.05):
    variance, sparsity = {}, {}
    for kind in ("factual", "hallucinated"):
        values = [[] for _ in model.model.layers]
        for pair in PAIRS:
            prompt, answer = (FakeTokenizer()(pair[name])["input_ids"] for name in ("prompt", kind))
            before, after = recorded(model, [{"input_ids": torch.tensor([prompt + answer])}])
            for i in range(len(values)):
                x, y = before[i][0].astype(float), after[i][0].astype(float)
                update = (y - x) / np.sqrt((x**2).mean(-1, keepdims=True))
                values[i].append(update[0, -len(answer) :].ravel())
        values = [np.concatenate(v) for v in values]
        variance[kind] = np.array([v.var() for v in values])
        sparsity[kind] = np.array([(np.abs(v) < eps).mean() for v in values])
    hsav = np.abs(variance["hallucinated"] - variance["factual"])
    hss = np.abs(sparsity["hallucinated"] - sparsity["factual"])
    return (hsav / hsav.sum()) / (hss / hss.sum()), variance["hallucinated"] - variance["factual"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answer_tokens_only(batch_size):
    model = tiny_model("llama")
    found = eavss(model, PAIRS, FakeTokenizer(), batch_size=batch_size)
    expected, difference = transcription(model)
    np.testing.assert_allclose(found.values, expected, rtol=1e-4)
    np.testing.assert_allclose(found.details["variance_difference"], difference, rtol=1e-4, atol=1e-7)
    assert (found.details["low"] <= found.details["high"]).all()
    assert "our own definition" in found.source


def test_equal_answers_cover_zero():
    pairs = [{**pair, "hallucinated": pair["factual"]} for pair in PAIRS[:2]]
    pairs += [
        {"prompt": "x", "factual": "one", "hallucinated": "two"},
        {"prompt": "x", "factual": "two", "hallucinated": "one"},
    ]
    assert eavss(tiny_model("llama"), pairs, FakeTokenizer()).details["covers_zero"].all()


@pytest.mark.parametrize(
    "pairs, message",
    [
        (PAIRS[:1], "at least two pairs to compare, got 1"),
        ([PAIRS[0], {"prompt": "x", "factual": "y"}], r"Pair 1 has no text under \['hallucinated'\]"),
        ([PAIRS[0], {**PAIRS[1], "factual": ""}], "has no tokens"),
    ],
)
def test_unusable_pairs(pairs, message):
    with pytest.raises(LayerProbeError, match=message):
        eavss(tiny_model("llama"), pairs, FakeTokenizer())
