"""The baseline indices against their transcriptions, their invariances, and what they say of orthogonal matrices."""

import index_oracles
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_layerprobe import LayerProbeError, docs_similarity
from hf_layerprobe.scores import chance_level
from hf_layerprobe.scores.indices import INDICES, Features, cca, cka_debiased, hsic, linear_regression, svcca

# Few vectors, many vectors and square matrices; 10 coordinates keep the sum over all 4-tuples short.
SHAPES = st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(4, 10), st.integers(0, 10_000))
ORACLES = {name: getattr(index_oracles, name.replace("-", "_")) for name in INDICES}
BOUNDED = [name for name in INDICES if name != "hsic"]
EVERY = pytest.mark.parametrize("name", INDICES)
properties = settings(deadline=None, max_examples=30)


def pair(shape):
    """Two related matrices [m, n] and [p, n], float64."""
    m, p, n, seed = shape
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(m, n, generator=generator, dtype=torch.float64)
    noise = torch.randn(p, n, generator=generator, dtype=torch.float64)
    return X, noise + X[torch.randint(m, (p,), generator=generator)], generator


def orthogonal(n, generator):
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()  # Haar


def unique_weights(shape):
    """Whether at most one canonical correlation of generic matrices is 1, or all are: PWCCA has one value then."""
    m, p, n, _ = shape
    return m + p <= n or max(m, p) >= n - 1


@EVERY
@given(shape=SHAPES)
@properties
def test_the_transcription(name, shape):
    if name == "pwcca" and not unique_weights(shape):
        return
    X, Y, _ = pair(shape)
    expected = ORACLES[name](X.T.numpy(), Y.T.numpy())
    assert INDICES[name].function(X, Y) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in INDICES if name != "cka-debiased"])  # too many 4-tuples
def test_real_weights_match_the_transcription(name, smollm2):
    k = [smollm2.model.layers[i].self_attn.k_proj.weight.detach() for i in (3, 4)]  # 192 vectors of 576
    expected = ORACLES[name](*(w.T.double().numpy() for w in k))
    assert INDICES[name].function(*k) == pytest.approx(expected, rel=1e-5)


@EVERY
@given(shape=SHAPES)
@properties
def test_symmetry_bounds_and_self_value(name, shape):
    X, Y, _ = pair(shape)
    index = INDICES[name]
    value = index.function(X, Y)
    assert isinstance(value, float)
    if index.symmetric:
        assert index.function(Y, X) == pytest.approx(value, abs=1e-9)
    if name == "hsic":
        assert value >= 0
        assert index.self_value is None
    else:
        assert (-1 if name == "cka-debiased" else 0) <= value <= 1
        assert index.function(X, X) == pytest.approx(index.self_value, abs=1e-9)


def test_those_not_symmetric():
    X, Y, _ = pair((3, 6, 20, 0))
    for index in INDICES.values():
        assert (abs(index.function(X, Y) - index.function(Y, X)) < 1e-9) == index.symmetric, index.name


@EVERY
@given(shape=SHAPES)
@properties
def test_order_sign_and_scale(name, shape):
    if name == "pwcca" and not unique_weights(shape):
        return
    X, Y, generator = pair(shape)
    index = INDICES[name].function
    expected = pytest.approx(index(X, Y), abs=1e-7)
    order = torch.randperm(len(X), generator=generator)
    signs = torch.randint(0, 2, (len(X), 1), generator=generator) * 2.0 - 1
    assert index((X * signs)[order], Y) == expected
    assert index(X + 5, Y - 7) == expected
    coordinates = torch.randperm(X.shape[1], generator=generator)
    assert index(X[:, coordinates], Y[:, coordinates]) == expected
    if name != "hsic":
        assert index(X * 40, Y * 0.3) == expected
    else:
        assert index(X * 40, Y * 0.3) == pytest.approx(index(X, Y) * 144)


@pytest.mark.parametrize("name", ["regression", "cca", "svcca", "hsic", "cka", "cka-debiased"])
@given(shape=SHAPES)
@properties
def test_orthogonal_maps_of_the_vectors(name, shape):
    X, Y, generator = pair(shape)
    index = INDICES[name].function
    turned = index(orthogonal(len(X), generator) @ X, orthogonal(len(Y), generator) @ Y)
    assert turned == pytest.approx(index(X, Y), abs=1e-7)


@given(shape=SHAPES)
@properties
def test_invertible_maps_of_the_vectors(shape):
    X, Y, generator = pair(shape)

    def mixed(a):
        skew = torch.randn(len(a), len(a), generator=generator, dtype=torch.float64)
        return (orthogonal(len(a), generator) * 3 + 0.3 * skew / len(a) ** 0.5) @ a

    assert cca(mixed(X), mixed(Y)) == pytest.approx(cca(X, Y), abs=1e-7)
    assert linear_regression(X, mixed(Y)) == pytest.approx(linear_regression(X, Y), abs=1e-7)
    assert svcca(mixed(X), mixed(Y), variance=1) == pytest.approx(cca(X, Y), abs=1e-7)


def test_orthogonal_matrices_are_all_alike_but_for_docs():
    """Two independent Haar matrices, centred as all else: both span what centring leaves, and have the same Gram
    matrix, so the three indices are 1 to rounding. The paper's reason for DOCS."""
    generator = torch.Generator().manual_seed(0)
    A, B = orthogonal(256, generator), orthogonal(256, generator)
    for name in ("regression", "cca", "pwcca", "cka"):
        assert INDICES[name].function(A, B) == pytest.approx(1, abs=1e-9), name
    assert svcca(A, B) > 0.97  # 99 % of equal variances are an arbitrary choice of directions
    assert cka_debiased(A, B) == 0 == cka_debiased(A, A)  # 0 / 0
    assert docs_similarity(A, B) == pytest.approx(chance_level(256, 256, 256), rel=0.03)
    assert docs_similarity(A, A[torch.randperm(256, generator=generator)]) == 1


def test_full_rank_leaves_nothing_to_tell_apart():
    X, *_ = pair((40, 30, 20, 0))
    independent = torch.randn(30, 20, generator=torch.Generator().manual_seed(1))
    for name in ("regression", "cca", "pwcca"):
        assert INDICES[name].function(X, independent) == pytest.approx(1), name


def test_debiased_cka_of_independent_matrices_is_near_zero():
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(200, 50, generator=generator) for _ in range(2))
    assert abs(cka_debiased(X, Y)) < 0.1
    assert INDICES["cka"].function(X, Y) > 0.7


@pytest.mark.parametrize("name", BOUNDED)
def test_rank_deficient_and_constant_vectors(name):
    X, Y, _ = pair((5, 4, 12, 0))
    index = INDICES[name].function
    # A vector twice, a sum of two, and constants that float32 cannot centre exactly: the span is that of X.
    deficient = torch.cat([X, X[:1], X[1:2] + X[2:3], torch.full((2, 12), 1e6 / 3)])
    assert np.isfinite(index(deficient, Y))
    assert index(torch.cat([X, torch.full((2, 12), 0.1)]), Y) == pytest.approx(index(X, Y))
    if name in ("cca", "regression"):
        assert index(Y, deficient) == pytest.approx(index(Y, X))
    one = X[:1]
    assert np.isfinite(index(one, Y))
    assert index(one, -2 * one + 3) == pytest.approx(1)


@EVERY
def test_no_variation_shares_nothing(name):
    X, *_ = pair((5, 4, 12, 0))
    for nothing in (torch.zeros(3, 12), torch.full((30, 12), 1 / 3)):
        assert INDICES[name].function(X, nothing) == 0
        assert INDICES[name].function(nothing, X) == 0
        assert INDICES[name].function(nothing, nothing) == 0


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("shape", [(5, 4, 12, 0), (20, 15, 12, 0)])
def test_extreme_scales_and_half_precision(name, shape):
    X, Y, _ = pair(shape)
    X, Y = X.bfloat16(), Y.bfloat16()
    index = INDICES[name].function
    assert index(X, Y) == pytest.approx(index(X.double(), Y.double()), abs=1e-12)
    assert index(X.float() * 2.0**100, Y.float() * 2.0**-100) == pytest.approx(index(X, Y), abs=1e-9)


@EVERY
def test_prepared_features_give_the_same(name):
    for shape in ((5, 4, 12, 0), (20, 15, 12, 0)):
        X, Y, _ = pair(shape)
        index = INDICES[name].function
        assert index(Features(X), Y) == index(X, Features(Y)) == index(X, Y)


@EVERY
@pytest.mark.parametrize(
    "X, Y, message",
    [
        (torch.ones(3), torch.ones(3, 3), r"got \(3,\)"),
        (torch.ones(3, 3), [[1.0]], "got list"),
        (torch.ones(3, 1), torch.ones(3, 1), r"coordinates >= 2\], got \(3, 1\)"),
        (torch.ones(0, 4), torch.ones(3, 4), r"got \(0, 4\)"),
        (torch.ones(3, 3), torch.ones(3, 4), "X has vectors of 3, Y of 4"),
        (torch.full((2, 2), float("nan")), torch.ones(2, 2), "holds NaN"),
    ],
)
def test_unusable_matrices(name, X, Y, message):
    with pytest.raises(LayerProbeError, match=message):
        INDICES[name].function(X, Y)


def test_unusable_options():
    with pytest.raises(LayerProbeError, match="at least 4 coordinates, got 3"):
        cka_debiased(torch.ones(3, 3), torch.ones(3, 3))
    for variance in (0, 1.5):
        with pytest.raises(LayerProbeError, match="share of the variance"):
            svcca(torch.eye(3), torch.eye(3), variance=variance)


def test_hsic_grows_with_the_scale():
    X, Y, _ = pair((5, 4, 12, 0))
    assert hsic(3 * X, Y) == pytest.approx(9 * hsic(X, Y))
