"""Clusters of directions, and how well they agree with classes that are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modelsoup import ParameterError

_AT_ONCE = 1 << 14  # rows whose cosines are in memory
_SHIFT = 1 / 1024  # by which both halves of a cluster that is split move apart


@dataclass(frozen=True)
class Clusters:
    """Directions that rows were sorted by.

    Attributes:
        centroids: float32, k × d, of length 1.
        labels: int64, of each row: its nearest centroid.
        cosines: float32, of each row to that centroid.
    """

    centroids: np.ndarray
    labels: np.ndarray
    cosines: np.ndarray


def spherical_kmeans(
    rows: np.ndarray, k: int, *, iterations: int = 25, restarts: int = 1, seed: int = 1234,
    per_centroid: int = 256, normalise: bool = True,
) -> Clusters:  # fmt: skip
    """Spherical k-means (Dhillon and Modha 2001): rows go to the centroid of the largest cosine.

    Args:
        rows: float32, N × d; their lengths decide no cluster of theirs.
        k: clusters, at most N.
        iterations: of assigning all and moving the centroids; up to twice as many while a cluster
            is empty.
        restarts: from other first centroids, of which the one with the largest cosines counts.
        seed: of those, and of the sample.
        per_centroid: the centroids are found on a sample of at most so many rows each.
        normalise: a centroid is the mean of directions; otherwise of rows as they are, among which
            long ones weigh more.

    Raises:
        ParameterError: there are fewer rows than clusters.
    """
    if not 1 <= k <= len(rows):
        raise ParameterError(f"{k} clusters are asked for, but there are {len(rows)} pictures")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(rows))[: k * per_centroid]
    sample = np.asarray(rows[chosen], np.float32)
    directions = _unit(sample)
    weighed = directions if normalise else sample
    best, found = -np.inf, directions[:k]
    for _ in range(restarts):
        centroids = directions[rng.permutation(len(sample))[:k]]
        for done in range(2 * iterations):
            labels, cosines = _assigned(directions, centroids)
            sizes = np.bincount(labels, minlength=k)
            if done >= iterations and sizes.all():
                break
            centroids = _moved(weighed, labels, sizes, rng)
        labels, cosines = _assigned(directions, centroids)
        if cosines.sum() > best:
            best, found = float(cosines.sum()), centroids
    return Clusters(found, *_assigned(_unit(np.asarray(rows, np.float32)), found))


def _moved(
    weighed: np.ndarray, labels: np.ndarray, sizes: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The mean direction of each cluster; an empty one gets a half of one that is large."""
    order = np.argsort(labels, kind="stable")
    there = np.flatnonzero(sizes)
    sums = np.zeros((len(sizes), weighed.shape[1]), np.float32)
    sums[there] = np.add.reduceat(weighed[order], np.cumsum(sizes)[there] - sizes[there], axis=0)
    centroids, left = _unit(sums), sizes.astype(np.float64)
    for empty in np.flatnonzero(sizes == 0):
        chances = np.maximum(left - 1, 0)
        large = int(rng.choice(len(sizes), p=chances / chances.sum()))
        apart = np.where(np.arange(centroids.shape[1]) % 2, -_SHIFT, _SHIFT).astype(np.float32)
        centroids[empty], centroids[large] = (
            centroids[large] * (1 + apart), centroids[large] * (1 - apart)
        )  # fmt: skip
        left[empty] = left[large] / 2
        left[large] /= 2
    return _unit(centroids)


def _assigned(directions: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels = np.empty(len(directions), np.int64)
    cosines = np.empty(len(directions), np.float32)
    for first in range(0, len(directions), _AT_ONCE):
        own = directions[first : first + _AT_ONCE] @ centroids.T
        part = own.argmax(1)
        labels[first : first + _AT_ONCE] = part
        cosines[first : first + _AT_ONCE] = own[np.arange(len(own)), part]
    return labels, cosines


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    made: np.ndarray = rows / np.maximum(lengths, np.float32(1e-12))
    return made


def purity(clusters: np.ndarray, classes: np.ndarray) -> float:
    """The share of pictures that are of the class that most of their cluster are of, in (0, 1]."""
    return float(_table(clusters, classes).max(1).sum() / len(clusters))


def mutual_information(clusters: np.ndarray, classes: np.ndarray) -> float:
    """Normalised by the mean of both entropies: 1 for the same partition, 0 for independent ones.

    Two partitions that have one part each are the same.
    """
    joint = _table(clusters, classes) / len(clusters)
    rows, columns = joint.sum(1), joint.sum(0)
    there = joint > 0
    shared = (joint[there] * np.log(joint[there] / np.outer(rows, columns)[there])).sum()
    entropies = [-(own[own > 0] * np.log(own[own > 0])).sum() for own in (rows, columns)]
    mean = sum(entropies) / 2
    return float(max(shared, 0.0) / mean) if mean > 0 else 1.0


def _table(clusters: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """How many pictures each cluster has of each class."""
    _, rows = np.unique(clusters, return_inverse=True)
    _, columns = np.unique(classes, return_inverse=True)
    counts = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(counts, (rows, columns), 1)
    return counts
