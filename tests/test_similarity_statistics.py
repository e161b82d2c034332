"""Gini coefficients of known maps, the permutation test under chance and not, and segments of built maps."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_layerprobe import LayerProbeError, docs_similarity
from hf_layerprobe.scores import chance_level
from hf_layerprobe.scores.statistics import depth_segments, docs_p_value, gini


def blocks(sizes, within=0.6, between=0.1):
    label = np.repeat(np.arange(len(sizes)), sizes)
    values = np.where(label[:, None] == label, within, between)
    np.fill_diagonal(values, 1)
    return values


def spans(segments):
    return [(s.start, s.stop) for s in segments]


@pytest.mark.parametrize(
    "entries, expected",
    [
        ([[3, 3, 3]], 0),
        ([[0, 0, 0, 1]], 0.75),
        ([[1, 2, 3, 4]], 0.25),
        ([[1, 2, np.nan, 3, 4]], 0.25),
        ([[0, 0]], 0),
        ([[1, 0.2], [0.2, 1]], 0),  # symmetric: the diagonal does not count
        ([[1, 0.2], [0.3, 1]], 0.31),  # not symmetric: it does
        ([[1, 0, np.nan], [0, 1, 3], [np.nan, 3, 1]], 0.5),
    ],
)
def test_gini_of_known_maps(entries, expected):
    assert gini(np.array(entries)) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=30), st.floats(0.01, 100))
@settings(deadline=None)
def test_gini_is_the_mean_difference(entries, scale):
    values = np.array([entries])
    if values.sum() < 1e-100:
        return
    expected = np.abs(values.T - values).mean() / (2 * values.mean())
    assert gini(values) == pytest.approx(expected, abs=1e-9)
    assert gini(values * scale) == pytest.approx(expected, abs=1e-9)
    assert 0 <= gini(values) < 1


@pytest.mark.parametrize(
    "entries, message",
    [([[1.0]], "no entries"), ([[np.nan, np.nan]], "no entries"), ([[-0.1, 1]], "-0.1"), ([[np.inf, 1]], "inf")],
)
def test_maps_without_a_gini(entries, message):
    with pytest.raises(LayerProbeError, match=message):
        gini(np.array(entries))


@pytest.mark.parametrize("common", [0, 2])
def test_p_values_are_uniform_under_chance(common):
    """Also for vectors that resemble each other, which are far from independent directions."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for seed in range(100):
        X = torch.randn(12, 16, generator=generator)
        Y = torch.randn(10, 16, generator=generator) + common * torch.randn(1, 16, generator=generator)
        found.append(docs_p_value(X, Y, resamples=19, seed=seed).p_value)
    assert np.mean(found) == pytest.approx(0.525, abs=0.09)  # of 1/20, 2/20, …, 1; three standard errors
    assert np.mean(np.array(found) <= 0.1) <= 0.19


@pytest.mark.parametrize("axis", ["out", "in"])
def test_related_matrices_are_no_chance(axis):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 40, generator=generator)
    Y = X[torch.randperm(40, generator=generator)] + torch.randn(40, 40, generator=generator)
    if axis == "in":
        X, Y = X.T, Y.T
    found = docs_p_value(X, Y, axis=axis, resamples=99)
    assert found.similarity == docs_similarity(X, Y, axis=axis)
    assert found.p_value == 0.01
    assert found.interval[0] < found.chance < found.interval[1] < found.similarity
    assert found.chance == pytest.approx(chance_level(40, 40, 40), rel=0.05)
    assert found == docs_p_value(X, Y, axis=axis, resamples=99)
    assert found != docs_p_value(X, Y, axis=axis, resamples=99, seed=1)


def test_p_value_of_a_matrix_with_itself():
    X = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
    assert docs_p_value(X, X, resamples=9).p_value == 0.1


def test_unusable_resamples_and_matrices():
    with pytest.raises(LayerProbeError, match="at least one resample"):
        docs_p_value(torch.eye(3), torch.eye(3), resamples=0)
    with pytest.raises(LayerProbeError, match="Y is list"):
        docs_p_value(torch.eye(3), [[1.0]])


@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_blocks_are_found_exactly(sizes, seed):
    noise = np.random.default_rng(seed).uniform(-0.01, 0.01, (sum(sizes), sum(sizes)))
    values = blocks(sizes) + noise
    edges = [0, *np.cumsum(sizes)]
    expected = list(pairwise(edges))
    if max(sizes) > 1:
        assert spans(depth_segments(values)) == expected
        assert spans(depth_segments(values * 3 - 7)) == expected
        assert spans(depth_segments(values, number=len(sizes))) == expected


@given(st.integers(2, 7), st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_segments_against_all_ways_to_cut(layers, seed):
    values = np.random.default_rng(seed).normal(size=(layers, layers))
    values = values + values.T
    mean = np.mean([values[i, j] for i, j in combinations(range(layers), 2)])

    def gain(edges):
        return sum(values[p] - mean for a, b in pairwise(edges) for p in combinations(range(a, b), 2))

    def best(numbers):
        ways = (cuts for k in numbers for cuts in combinations(range(1, layers), k - 1))
        return max(gain([0, *cuts, layers]) for cuts in ways)

    for number in [None, *range(1, layers + 1)]:
        found = depth_segments(values, number)
        edges = [found[0].start, *(s.stop for s in found)]
        assert [layer for s in found for layer in s] == list(range(layers))
        assert number is None or len(found) == number
        assert gain(edges) == pytest.approx(best(range(1, layers + 1) if number is None else [number]))


def test_maps_without_structure_are_one_segment():
    assert depth_segments(blocks([7])) == [range(7)]
    assert depth_segments(np.ones((1, 1))) == [range(1)]


@pytest.mark.parametrize(
    "values, number, message",
    [
        (np.ones((2, 3)), None, r"shape \(2, 3\)"),
        (np.full((3, 3), np.nan), None, "NaN or infinite"),
        (np.ones((3, 3)), 4, "1 to 3 segments, not 4"),
        (np.ones((3, 3)), 0, "1 to 3 segments, not 0"),
    ],
)
def test_unusable_maps(values, number, message):
    with pytest.raises(LayerProbeError, match=message):
        depth_segments(values, number)
