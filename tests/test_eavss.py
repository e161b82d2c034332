"""EAVSS (our own definition) against a transcription on recorded activations."""

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from matplotlib.image import imread
from test_activation_scores import FakeTokenizer, recorded
from tiny import tiny_model, tiny_tokenizer

from hf_layerprobe import LayerProbeError, eavss
from hf_layerprobe.report import difference_plot
from hf_layerprobe.scores.eavss import COLUMNS

PAIRS = [
    {"prompt": "what?", "factual": "an apple a day", "hallucinated": "pears"},
    {"prompt": "", "factual": "seven", "hallucinated": "eight and a half"},
    {"prompt": "who was it, after all?", "factual": "nobody", "hallucinated": "somebody"},
]


def updates(model, kind):
    """[layer][pair]: relative updates of the answer's tokens."""
    values = [[] for _ in model.model.layers]
    for pair in PAIRS:
        prompt, answer = (FakeTokenizer()(pair[name])["input_ids"] for name in ("prompt", kind))
        before, after = recorded(model, [{"input_ids": torch.tensor([prompt + answer])}])
        for i in range(len(values)):
            x, y = before[i][0].astype(float), after[i][0].astype(float)
            update = (y - x) / np.sqrt((x**2).mean(-1, keepdims=True))
            values[i].append(update[0, -len(answer) :].ravel())
    return values


def transcription(model, eps=0.05):
    variance, sparsity = {}, {}
    for kind in COLUMNS[1:]:
        values = [np.concatenate(v) for v in updates(model, kind)]
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


def test_rows_from_data_sets_with_their_own_columns():
    model, names = tiny_model("llama"), ("article", "correct", "wrong")
    expected = eavss(model, PAIRS, FakeTokenizer())
    renamed = [dict(zip(names, (row[name] for name in COLUMNS), strict=True), source="x") for row in PAIRS]
    for data in (Dataset.from_list(renamed), IterableDataset.from_generator(lambda: iter(renamed))):
        found = eavss(model, data, FakeTokenizer(), columns=names)
        np.testing.assert_array_equal(found.values, expected.values)
        assert found.data == expected.data
    answers = sum(len(row[name]) for row in PAIRS for name in COLUMNS[1:])
    assert (
        expected.data["pairs"] == 3 and expected.data["tokens"] == answers and len(expected.data["fingerprint"]) == 64
    )
    assert expected.data["fingerprint"] != eavss(model, PAIRS[:2], FakeTokenizer()).data["fingerprint"]


def test_the_interval_is_that_of_resampled_pairs():
    """Intervals from resampling whole pairs, by hand, on the variances of each answer."""
    model, draws = tiny_model("llama"), np.random.default_rng(0).integers(0, 3, (1000, 3))
    found = eavss(model, PAIRS, FakeTokenizer(), confidence=0.9)
    values = {kind: updates(model, kind) for kind in COLUMNS[1:]}
    for layer in range(4):
        resampled = [
            np.subtract(*(
                np.concatenate([values[kind][layer][i] for i in draw]).var() for kind in ("hallucinated", "factual")
            ))
            for draw in draws
        ]  # fmt: skip
        low, high = np.quantile(resampled, [0.05, 0.95])
        assert found.details["low"][layer] == pytest.approx(low, rel=1e-4, abs=1e-7)
        assert found.details["high"][layer] == pytest.approx(high, rel=1e-4, abs=1e-7)
        assert found.details["covers_zero"][layer] == (low <= 0 <= high)


def test_a_figure_by_depth(tmp_path):
    scores = eavss(tiny_model("llama"), PAIRS, FakeTokenizer())
    scores.details["covers_zero"][:] = [0, 1, 1, 0]
    picture = imread(difference_plot(scores, tmp_path / "eavss.png"))[..., :3]
    orange = np.abs(picture - np.array([0xD5, 0x5E, 0x00]) / 255).max(-1) < 0.05
    grey = np.abs(picture - 0x8C / 255).max(-1) < 0.02
    assert min(picture.shape[:2]) > 600 and orange.sum() > 200 and grey.sum() > 200


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
        ([PAIRS[0], {**PAIRS[1], "factual": "no " * 200}],
         r"The answer 'no no .* to '' has 600 tokens, and a sequence at most 512\. Raise max_length="),
        (["a", "b"], r"Pair 0 is a str; expected a row with \['prompt'"),
        (Dataset.from_dict({"question": ["a"] * 2, "factual": ["b"] * 2, "hallucinated": ["c"] * 2}),
         r"Pair 0 has no text under \['prompt'\]; its columns are \['question', .* by columns="),
    ],
)  # fmt: skip
def test_unusable_pairs(pairs, message):
    with pytest.raises(LayerProbeError, match=message):
        eavss(tiny_model("llama"), pairs, FakeTokenizer())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(columns=("prompt", "factual")), "columns names three"),
        (dict(columns="prompt"), "columns names three, .* got 'prompt'"),
        (dict(confidence=95), "confidence is the coverage of the interval, between 0 and 1; got 95"),
    ],
)
def test_unusable_options(options, message):
    with pytest.raises(LayerProbeError, match=message):
        eavss(tiny_model("llama"), PAIRS, FakeTokenizer(), **options)


def test_models_and_tokenizers_that_do_not_fit():
    pairs = [{"prompt": "a", "factual": "b c", "hallucinated": "d e"}] * 2
    with pytest.raises(LayerProbeError, match="T5ForConditionalGeneration is an encoder-decoder model; pass a decoder"):
        eavss(tiny_model("t5"), pairs, tokenizer=tiny_tokenizer())
    model = tiny_model("llama")
    model.resize_token_embeddings(10)
    with pytest.raises(LayerProbeError, match="token"):
        eavss(model, pairs, tokenizer=tiny_tokenizer())
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(LayerProbeError, match="meta device"):
        eavss(empty, pairs, tokenizer=tiny_tokenizer())
