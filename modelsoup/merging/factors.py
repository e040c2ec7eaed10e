"""Matrices given by two factors: their sums, their norms, and the nearest ones of a given rank.

Nothing here is ever as large as the product of two factors, but for what `Differences` reads of a
checkpoint, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

Factors = tuple[np.ndarray, np.ndarray]
"""up, m × r, and down, r × n: the matrix up · down."""

Blocks = Callable[[], Iterable[tuple[int, np.ndarray]]]
"""The rows of a matrix, a block after the other, each with the number of its first row."""

_MORE = 10  # columns beyond the rank that are looked at, as the reference advises
_POWERS = 2


def stacked(products: Sequence[Factors]) -> Factors:
    """The sum of products, exactly: their columns and rows side by side."""
    return np.hstack([up for up, _ in products]), np.vstack([down for _, down in products])


def norm(product: Factors) -> float:
    """The Frobenius norm of a product."""
    return float(np.linalg.norm(_core(product)[1]))


def _core(product: Factors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bases of the columns and rows of a product, and the small matrix between them."""
    up, down = (factor.astype(np.float64) for factor in product)
    left, upper = np.linalg.qr(up)
    right, lower = np.linalg.qr(down.T)
    return left, upper @ lower.T, right.T


def distance(product: Factors, other: Factors) -> float:
    """The norm of the difference of two products, as a share of the first one's."""
    whole = norm(product)
    up, down = other
    return norm(stacked([product, (-up, down)])) / whole if whole else norm(other)


def balanced(left: np.ndarray, values: np.ndarray, right: np.ndarray, rank: int) -> Factors:
    """The first `rank` of some singular triplets as factors, each with the root of the values."""
    roots = np.sqrt(values[:rank])
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def of_rank(product: Factors, rank: int) -> Factors:
    """The nearest product of a given rank (Eckart and Young, 1936)."""
    left, core, right = _core(product)
    u, values, v = np.linalg.svd(core, full_matrices=False)
    return balanced(left @ u, values, v @ right, rank)


class CoreSpace:
    """The space of the rows and columns of several products, where they are small matrices.

    Panariello et al., Accurate and efficient low-rank model merging in core space, NeurIPS 2025.
    The bases are the singular vectors of all `up` side by side and of all `down` one on the other.

    Args:
        products: each m × n.
    """

    def __init__(self, products: Sequence[Factors]) -> None:
        ups, downs = (factor.astype(np.float64) for factor in stacked(products))
        self._left = np.linalg.svd(ups, full_matrices=False)[0]
        self._right = np.linalg.svd(downs, full_matrices=False)[2]
        self.cores = [
            (self._left.T @ up.astype(np.float64)) @ (down.astype(np.float64) @ self._right.T)
            for up, down in products
        ]

    def factors(self, core: np.ndarray, rank: int | None = None) -> Factors:
        """A matrix of this space as factors, of the nearest matrix of a rank if there is one."""
        u, values, v = np.linalg.svd(core.astype(np.float64), full_matrices=False)
        return balanced(self._left @ u, values, v @ self._right, rank or len(values))


def nearest_factors(
    blocks: Blocks, shape: tuple[int, int], rank: int, random: np.random.Generator
) -> Factors:
    """Factors of nearly the nearest matrix of a rank to one that is only read by rows.

    Halko, Martinsson and Tropp, Finding structure with randomness, SIAM Review 2011, algorithms
    4.4 and 5.1: the matrix is read six times.

    Args:
        blocks: its rows.
        shape: its rows and columns.
        rank: at most the smaller of these.
        random: draws the first directions.
    """
    rows, columns = shape
    size = min(rank + _MORE, rows, columns)
    directions = random.standard_normal((columns, size)).astype(np.float32)
    basis = np.empty((rows, size), np.float32)
    for power in range(_POWERS + 1):
        for start, block in blocks():
            basis[start : start + len(block)] = block @ directions
        basis = np.linalg.qr(basis)[0]
        directions = np.zeros((columns, size), np.float32)
        for start, block in blocks():
            directions += block.T @ basis[start : start + len(block)]
        if power < _POWERS:
            directions = np.linalg.qr(directions)[0]
    u, values, v = np.linalg.svd(directions.T, full_matrices=False)
    return balanced(basis @ u, values, v, rank)


def residual(blocks: Blocks, product: Factors) -> float:
    """The norm of a matrix less a product, as a share of the matrix's own."""
    up, down = (factor.astype(np.float32) for factor in product)
    left = whole = 0.0
    for start, block in blocks():
        whole += float(np.sum(np.square(block, dtype=np.float64)))
        rest = block - up[start : start + len(block)] @ down
        left += float(np.sum(np.square(rest, dtype=np.float64)))
    return (left / whole) ** 0.5 if whole else 0.0
