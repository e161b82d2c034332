"""The inner loop of DOCS: every way of finding partners that this machine has finds the same.

`best_matches` is tested by each of its ways in torch, which all machines have, and by whichever way it takes by itself:
where the compiled search can be had (Linux, AMX, a C compiler), that is the one. tests/test_native.py tests how it is had.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_layerprobe.scores import matching, native
from hf_layerprobe.scores.vectors import MODERATE, Vectors


def made(m, p, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator), torch.randn(p, n, generator=generator)


def exact(X, Y):
    """The largest absolute cosines of the rows of two matrices, in float64."""
    X, Y = (m.double().numpy() for m in (X, Y))
    cosines = np.abs((X / np.linalg.norm(X, axis=1, keepdims=True)) @ (Y / np.linalg.norm(Y, axis=1, keepdims=True)).T)
    return cosines.max(1), cosines.max(0)


def assert_close(found, X, Y, *, exactly):
    for values, expected in zip(found, exact(X, Y), strict=True):
        values = values.double().numpy()
        assert values.shape == expected.shape
        assert (values <= expected + 1e-6).all()  # the cosine of a real pair, not an estimate
        assert np.abs(values - expected).max() < (1e-6 if exactly else 4e-3)
        assert abs((values - expected).mean()) < (1e-7 if exactly else 2e-5)


@pytest.fixture(params=["float32", "bfloat16 search", "by itself"])
def way(request, monkeypatch):
    if request.param != "by itself":
        monkeypatch.setattr(native, "takes", lambda rows: False)
        monkeypatch.setattr(matching, "_bfloat16_is_faster", lambda: request.param != "float32")
    return request.param


@pytest.mark.parametrize("m, p, n", [(300, 300, 150), (1000, 150, 128), (130, 700, 200), (20, 300, 16)])
@pytest.mark.parametrize("tile", [256, 2048])
def test_best_matches_are_the_largest_cosines(way, tile, m, p, n, monkeypatch):
    monkeypatch.setattr(matching, "TILE", tile)
    X, Y = made(m, p, n)
    (found,) = matching.best_matches(Vectors.of(X, "out"), [Vectors.of(Y, "out")])
    assert_close(found, X, Y, exactly=way == "float32" or min(m, p, n) < matching.SMALL)
    (found,) = matching.best_matches(Vectors.of(X.T.contiguous(), "in"), [Vectors.of(Y.T.contiguous(), "in")])
    assert_close(found, X, Y, exactly=way == "float32" or min(m, p, n) < matching.SMALL)


def test_large_matrices_are_made_to_unit_length_in_parts(way, monkeypatch):
    monkeypatch.setattr("hf_layerprobe.scores.vectors.KEPT", 0)
    monkeypatch.setattr(matching, "TILE", 256)
    X, Y = (m.bfloat16() for m in made(600, 300, 130))
    (found,) = matching.best_matches(Vectors.of(X, "out"), [Vectors.of(Y, "out")])
    assert_close(found, X, Y, exactly=way == "float32")


def test_many_at_once_are_as_one_by_one(way):
    X, Y = made(200, 300, 140)
    _, Z = made(1, 700, 140, seed=1)
    X, Y, Z = (Vectors.of(m, "out") for m in (X, Y, Z))
    together = matching.best_matches(X, [Y, Z, X])
    for found, other in zip(together, (Y, Z, X), strict=True):
        (alone,) = matching.best_matches(X, [other])
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    assert (together[2][0] > 1 - 1e-6).all()


def test_matrices_that_are_nearly_the_same(way):
    """Base against tuned: cosines near 1, where rounding would show most, and some vectors that are quite the same."""
    X, noise = made(400, 400, 160)
    Y = X + torch.linspace(0, 1e-2, 400)[:, None] * noise
    Y[::7] = -3 * X[::7]
    (found,) = matching.best_matches(Vectors.of(X, "out"), [Vectors.of(Y, "out")])
    for values, expected in zip(found, exact(X, Y), strict=True):
        np.testing.assert_allclose(values.numpy(), expected, atol=5e-7)


def test_the_search_of_a_gpu(monkeypatch):
    """Its tiles and compiled maxima, with a product that rounds as the GPU's does. It was not run on a GPU."""

    def half_product(rows, columns, out):
        torch.mm(rows.bfloat16().float(), columns.bfloat16().float().T, out=out)

    X, Y = made(500, 700, 150)
    vectors = [Vectors.of(m, "out") for m in (X, Y)]
    for tile in (256, matching.GPU_TILE):
        partners = matching._search(*vectors, product=half_product, maxima=matching.packed_maxima, tile=tile)
        found = [
            matching._cosines(a, b, partner) for a, b, partner in zip(vectors, vectors[::-1], partners, strict=True)
        ]
        assert_close(found, X, Y, exactly=False)


def test_long_vectors_come_in_small_tiles():
    assert matching._step(576, matching.TILE) == matching._step(4096, matching.TILE) == matching.TILE
    assert matching._step(14336, matching.TILE) == 512 and matching._step(10**9, matching.TILE) == 256
    assert matching._step(4096, matching.GPU_TILE) == matching.GPU_TILE


def test_the_precision_of_products_is_put_back(monkeypatch):
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision

    def dies(*_):
        assert backend.fp32_precision == "bf16"
        raise KeyboardInterrupt

    monkeypatch.setattr(matching, "_product", dies)
    with pytest.raises(KeyboardInterrupt):
        matching._parts_product(torch.eye(2), torch.eye(2), torch.eye(2))
    assert backend.fp32_precision == before


def units(matrix, axis):
    return Vectors.of(matrix, axis).units(slice(None))


def test_unit_vectors():
    matrix = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]])
    torch.testing.assert_close(units(matrix, "out"), torch.tensor([[0.6, 0.8], [0.0, -1.0]]))
    torch.testing.assert_close(units(matrix, "in").norm(dim=1), torch.ones(2))
    assert units(torch.zeros(600, 3), "out").shape == (0, 3)


@given(
    st.floats(-40, 36), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.sampled_from(["out", "in"])
)
@settings(deadline=None, max_examples=30)
def test_any_scale_becomes_unit_length(exponent, dtype, axis):
    matrix = (torch.randn(7, 300, generator=torch.Generator().manual_seed(0)).double() * 10**exponent).to(dtype)
    vectors = Vectors.of(matrix, axis)
    torch.testing.assert_close(vectors.units(slice(None)).norm(dim=1), torch.ones(len(vectors)), atol=5e-6, rtol=0)


def test_vectors_are_not_copied():
    matrix = torch.randn(50, 40)
    assert Vectors.of(matrix, "out").rows.data_ptr() == Vectors.of(matrix, "in").rows.data_ptr() == matrix.data_ptr()
    assert Vectors.of(matrix * MODERATE[1], "out").rows.data_ptr() != matrix.data_ptr()
