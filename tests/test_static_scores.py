"""Scores of the weights and the cheap baselines."""

import numpy as np
import pytest
from tiny import tiny_model

from hf_layerprobe import LayerProbeError, docs, score_layers


def test_redundancy_is_the_excess_over_the_nearer_neighbour():
    model = tiny_model("llama")
    model.model.layers[2].load_state_dict(model.model.layers[1].state_dict())
    found, similarity = score_layers(model, by="docs"), docs(model)
    expected = np.mean(
        [
            [max(similarity.excess(k)[i, j] for j in (i - 1, i + 1) if 0 <= j < 4) for i in range(4)]
            for k in similarity.kinds
        ],
        axis=0,
    )
    np.testing.assert_allclose(found.values, expected)
    assert not found.higher_is_more_important
    assert found.least_important(2) == [1, 2]
    assert "our own definition" in found.source


def test_last_removes_from_the_end():
    found = score_layers(tiny_model("llama"), by="last")
    assert found.least_important(2) == [2, 3] and found.least_important(0) == []
    for number in (-1, 4):
        with pytest.raises(LayerProbeError, match=f"must be between 0 and 3 of 4; got {number}"):
            found.least_important(number)


def test_random_is_seeded():
    first, again, other = (score_layers(tiny_model("llama"), by="random", seed=s) for s in (0, 0, 1))
    assert first.values.tolist() == again.values.tolist() != other.values.tolist()
    assert sorted(first.values) == [0, 1, 2, 3]


def test_nan_scores_cannot_rank():
    scores = score_layers(tiny_model("llama"), by="last")
    scores.values[1] = np.nan
    with pytest.raises(LayerProbeError, match=r"NaN for layers \[1\]"):
        scores.least_important(1)
