"""The inner loop of DOCS: both ways of finding partners, in one tile and in many, find the same."""

import pytest
import torch

from hf_layerprobe.scores import matching


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16 search"])
def search(request, monkeypatch):
    monkeypatch.setattr(matching, "_bfloat16_is_faster", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("m, p, n", [(300, 300, 64), (1000, 150, 32), (130, 700, 200), (20, 300, 16)])
@pytest.mark.parametrize("tile", [256, 2048])
def test_best_matches_are_the_largest_cosines(search, tile, m, p, n, monkeypatch):
    monkeypatch.setattr(matching, "TILE", tile)
    generator = torch.Generator().manual_seed(0)
    X, Y = (matching.unit_vectors(torch.randn(size, n, generator=generator), "out") for size in (m, p))
    cosines = (X.double() @ Y.double().T).abs()
    for found, expected in zip(matching.best_matches(X, Y), (cosines.amax(1), cosines.amax(0)), strict=True):
        assert found.shape == expected.shape
        assert (found <= expected + 1e-6).all()  # the cosine of a real pair, not an estimate
        assert (found - expected).abs().max() < (4e-3 if search else 1e-6)
        assert abs((found - expected).mean()) < (2e-5 if search else 1e-7)


def test_long_vectors_come_in_small_tiles():
    assert matching._step(576) == matching._step(4096) == matching.TILE
    assert matching._step(14336) == 512 and matching._step(10**9) == 256


def test_the_precision_of_products_is_put_back():
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    with pytest.raises(KeyboardInterrupt), matching._bfloat16_products(True):
        raise KeyboardInterrupt
    assert [backend.fp32_precision for backend in backends] == before


def test_unit_vectors():
    matrix = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]])
    assert torch.equal(matching.unit_vectors(matrix, "out"), torch.tensor([[0.6, 0.8], [0.0, -1.0]]))
    torch.testing.assert_close(matching.unit_vectors(matrix, "in").norm(dim=1), torch.ones(2))
    assert matching.unit_vectors(torch.zeros(600, 3), "out").shape == (0, 3)
    torch.testing.assert_close(matching.unit_vectors(torch.full((2, 4), 1e30), "out"), torch.full((2, 4), 0.5))
