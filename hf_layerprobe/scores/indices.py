"""The similarity indices of Kornblith et al. (arXiv 1905.00414) that the DOCS paper compares DOCS with.

How that paper orients and centres weight matrices for them was not readable, so this is our own definition: X `[m, n]`
and Y `[p, n]` hold vectors as rows, the same vectors that DOCS matches, but not normalised. The vectors are the
features and their n coordinates are the examples, so that m and p may differ; every vector is centred over its
coordinates.

A weight matrix often has as many vectors as coordinates (m >= n). Its vectors then span everything, and linear
regression on it, CCA and PWCCA are 1 whatever the other matrix holds. That is a property of these indices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from ..errors import LayerProbeError
from ..precision import widest

KORNBLITH = "arXiv 1905.00414; orientation and centring are our own definition"


class Features:
    """One matrix as the indices need it; its decompositions are computed once, for use in many pairs.

    The arithmetic is float64 (float32 on MPS).

    Attributes:
        centred: `[m, n]`, every row with mean 0. Rows that are constant but for rounding are exactly 0.
        length: n.
        eps: Relative rounding error of the arithmetic.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        """
        Args:
            matrix: `[m, n]`, m vectors of n coordinates, any floating dtype.

        Raises:
            LayerProbeError: Not 2-D, no vectors, fewer than 2 coordinates, or not finite.
        """
        if not isinstance(matrix, torch.Tensor) or matrix.dim() != 2 or len(matrix) < 1 or matrix.shape[1] < 2:
            found = tuple(matrix.shape) if isinstance(matrix, torch.Tensor) else type(matrix).__name__
            raise LayerProbeError(f"An index compares matrices [vectors, coordinates >= 2], got {found}.")
        if not torch.isfinite(matrix).all():
            raise LayerProbeError("An index compares finite matrices; this one holds NaN or infinite values.")
        rows = matrix.detach().to(widest(matrix.device))
        self.length = rows.shape[1]
        self.eps = torch.finfo(rows.dtype).eps
        centred = rows - rows.mean(1, keepdim=True)
        # What is left of a constant row is rounding noise, which a basis would take for a direction.
        varies = centred.norm(dim=1) > self.length * self.eps * rows.norm(dim=1)
        self.centred = torch.where(varies[:, None], centred, 0)

    @cached_property
    def _spectrum(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Singular values [r] and right singular vectors [r, n], without those that are zero but for rounding."""
        _, values, directions = torch.linalg.svd(self.centred, full_matrices=False)
        rank = int((values > max(self.centred.shape) * self.eps * values[0]).sum())
        return values[:rank], directions[:rank]

    @property
    def basis(self) -> torch.Tensor:
        """Orthonormal basis of what the vectors span, `[rank, n]`, strongest direction first."""
        return self._spectrum[1]

    def strongest(self, variance: float) -> torch.Tensor:
        """The fewest leading rows of `basis` that carry this share of the variance."""
        carried = self._spectrum[0].square().cumsum(0)
        if not len(carried):
            return self.basis
        return self.basis[: int((carried < variance * carried[-1]).sum()) + 1]

    @cached_property
    def gram(self) -> torch.Tensor:
        """Inner products of the coordinates, `[n, n]`."""
        return self.centred.T @ self.centred

    @cached_property
    def by_coordinate(self) -> torch.Tensor:
        """The diagonal of `gram`, `[n]`."""
        return self.centred.square().sum(0)

    @cached_property
    def self_product(self) -> float:
        """‖X Xᵀ‖²."""
        return cross_product(self, self)


Matrix = torch.Tensor | Features


def linear_regression(X: Matrix, Y: Matrix) -> float:
    """Share of the variance of X that linear regression on Y explains, R² = ‖Q_Y X‖² / ‖X‖² (arXiv 1905.00414).

    Not symmetric. Every orthogonal transform of the vectors of X, and every invertible one of those of Y, leaves it.

    Args:
        X: `[m, n]`, vectors as rows, or its `Features`.
        Y: `[p, n]`, likewise.

    Returns:
        R² in [0, 1]; 0 where a matrix has only constant vectors.

    Raises:
        LayerProbeError: Unusable matrices, or vectors of different lengths. So do all indices below.
    """
    X, Y = _pair(X, Y)
    total = _squares(X.centred)
    return min(1.0, _squares(X.centred @ Y.basis.T) / total) if total else 0.0


def cca(X: Matrix, Y: Matrix) -> float:
    """Mean squared canonical correlation, ‖Q_Y Q_Xᵀ‖² / min(rank X, rank Y) (arXiv 1905.00414, R² of CCA).

    The number of canonical correlations is the lower rank, not min(m, p): centring takes one dimension from a square
    matrix of full rank. Every invertible transform of the vectors of either matrix leaves the index.

    Args:
        X: `[m, n]`, vectors as rows, or its `Features`.
        Y: `[p, n]`, likewise.

    Returns:
        The index in [0, 1]; 0 where a matrix has only constant vectors.
    """
    X, Y = _pair(X, Y)
    return _mean_square(X.basis, Y.basis)


def svcca(X: Matrix, Y: Matrix, *, variance: float = 0.99) -> float:
    """`cca` of the strongest singular directions of each matrix (Raghu et al., arXiv 1706.05806; R² of SVCCA there).

    Args:
        X: `[m, n]`, vectors as rows, or its `Features`.
        Y: `[p, n]`, likewise.
        variance: Share of the variance that the kept directions carry.

    Returns:
        The index in [0, 1]; 0 where a matrix has only constant vectors.

    Raises:
        LayerProbeError: Also for a share outside (0, 1].
    """
    if not 0 < variance <= 1:
        raise LayerProbeError(f"svcca keeps a share of the variance in (0, 1], got {variance}.")
    X, Y = _pair(X, Y)
    return _mean_square(X.strongest(variance), Y.strongest(variance))


def pwcca(X: Matrix, Y: Matrix) -> float:
    """Mean canonical correlation, each weighted by Σ_j |⟨h_i, x_j⟩| (Morcos et al., arXiv 1806.05759).

    h_i is the i-th canonical variable of X and x_j its j-th vector, so the index is not symmetric. Where m + p > n,
    several correlations can be exactly 1; their variables, and so the weights, are then not unique.

    Args:
        X: `[m, n]`, vectors as rows, or its `Features`.
        Y: `[p, n]`, likewise.

    Returns:
        The index in [0, 1]; 0 where a matrix has only constant vectors.
    """
    X, Y = _pair(X, Y)
    if not len(X.basis) or not len(Y.basis):
        return 0.0
    left, correlations, _ = torch.linalg.svd(X.basis @ Y.basis.T, full_matrices=False)
    weights = (left.T @ X.basis @ X.centred.T).abs().sum(1)
    return min(1.0, ((weights * correlations).sum() / weights.sum()).item())


def hsic(X: Matrix, Y: Matrix) -> float:
    """Hilbert–Schmidt independence criterion with a linear kernel, ‖X Yᵀ‖² / (n − 1)² (arXiv 1905.00414).

    It grows with the scale of the matrices, so it compares pairs of like scale only.

    Args:
        X: `[m, n]`, vectors as rows, or its `Features`.
        Y: `[p, n]`, likewise.

    Returns:
        A number >= 0 without an upper bound.
    """
    X, Y = _pair(X, Y)
    return cross_product(X, Y) / (X.length - 1) ** 2


def cka(X: Matrix, Y: Matrix) -> float:
    """Linear centred kernel alignment, ‖X Yᵀ‖² / (‖X Xᵀ‖ ‖Y Yᵀ‖) (arXiv 1905.00414).

    Every orthogonal transform of the vectors and every scale of a whole matrix leaves it.

    Args:
        X: `[m, n]`, vectors as rows, or its `Features`.
        Y: `[p, n]`, likewise.

    Returns:
        The index in [0, 1]; 0 where a matrix has only constant vectors.
    """
    X, Y = _pair(X, Y)
    return _alignment(cross_product(X, Y), X.self_product, Y.self_product)


def cka_debiased(X: Matrix, Y: Matrix) -> float:
    """Linear CKA of unbiased HSIC estimates (Song et al. 2007, as the code released with arXiv 1905.00414).

    Independent random matrices score about 0 at any shape, where `cka` grows with the number of vectors.

    Args:
        X: `[m, n]`, vectors as rows, n >= 4, or its `Features`.
        Y: `[p, n]`, likewise.

    Returns:
        The index in [-1, 1]; 0 where the estimate for a matrix with itself vanishes, which leaves the ratio without a
        value: for constant vectors, and for orthogonal matrices, whose coordinates have no relation but the centring.

    Raises:
        LayerProbeError: Also for vectors of fewer than 4 coordinates.
    """
    X, Y = _pair(X, Y)
    if X.length < 4:
        raise LayerProbeError(f"cka_debiased needs vectors of at least 4 coordinates, got {X.length}.")
    own = (_debiased(a, a, a.self_product) for a in (X, Y))
    return _alignment(_debiased(X, Y, cross_product(X, Y)), *own)


def cross_product(X: Features, Y: Features) -> float:
    """‖X Yᵀ‖², which is also the inner product of the two Gram matrices."""
    # With many vectors the Gram matrices are the smaller ones, and each serves all pairs of its matrix.
    if X.length <= min(len(X.centred), len(Y.centred)):
        return (X.gram * Y.gram).sum().item()
    return _squares(X.centred @ Y.centred.T)


def _pair(X: Matrix, Y: Matrix) -> tuple[Features, Features]:
    X, Y = (a if isinstance(a, Features) else Features(a) for a in (X, Y))
    if X.length != Y.length:
        raise LayerProbeError(
            f"An index compares vectors of one length; X has vectors of {X.length}, Y of {Y.length} entries."
        )
    return X, Y


def _squares(matrix: torch.Tensor) -> float:
    return matrix.square().sum().item()


def _mean_square(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean squared correlation of two orthonormal bases [r, n] and [s, n]."""
    number = min(len(x), len(y))
    return min(1.0, _squares(x @ y.T) / number) if number else 0.0


def _debiased(X: Features, Y: Features, product: float) -> float:
    """The unbiased HSIC times n(n − 3), without n × n matrices; `product` is ‖X Yᵀ‖²."""
    n = X.length
    x, y = X.by_coordinate, Y.by_coordinate
    diagonals = n / (n - 2) * (x * y).sum().item()
    totals = x.sum().item() * y.sum().item() / ((n - 1) * (n - 2))
    value = product - diagonals + totals
    # The terms cancel; what the rounding leaves must not become the denominator of an alignment.
    return value if abs(value) > n * X.eps * (product + diagonals + totals) else 0.0


def _alignment(product: float, x: float, y: float) -> float:
    """product / √(x y) within [-1, 1]; the square roots apart, since x·y may overflow or vanish."""
    return max(-1.0, min(1.0, product / x**0.5 / y**0.5)) if x > 0 and y > 0 else 0.0


@dataclass(frozen=True)
class Index:
    """A similarity index of two matrices.

    Attributes:
        name: Unique name.
        function: `function(X, Y)` for X `[m, n]` and Y `[p, n]`, vectors as rows. Each may be a `Features`, which saves
            work where one matrix is part of many pairs.
        symmetric: Whether the order of the two is of no importance.
        source: The paper that defines it.
        self_value: The value of X with itself, unless its vectors are all constant; None where it depends on X.
    """

    name: str
    function: Callable[[Matrix, Matrix], float]
    symmetric: bool
    source: str
    self_value: float | None


INDICES: dict[str, Index] = {
    index.name: index
    for index in (
        Index("regression", linear_regression, False, f"linear regression R², {KORNBLITH}", 1.0),
        Index("cca", cca, True, f"mean squared CCA, {KORNBLITH}", 1.0),
        Index("svcca", svcca, True, f"SVCCA, arXiv 1706.05806 and {KORNBLITH}", 1.0),
        Index("pwcca", pwcca, False, f"PWCCA, arXiv 1806.05759 and {KORNBLITH}", 1.0),
        Index("hsic", hsic, True, f"linear HSIC, {KORNBLITH}", None),
        Index("cka", cka, True, f"linear CKA, {KORNBLITH}", 1.0),
        Index("cka-debiased", cka_debiased, True, f"debiased linear CKA, {KORNBLITH}", 1.0),
    )
}
