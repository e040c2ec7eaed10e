"""Clusters of directions are those that were planted, and their figures those of textbooks."""

import numpy as np
import pytest
from modelsoup_i2i.measuring.clusters import mutual_information, purity, spherical_kmeans

import modelsoup


def planted(k: int = 5, each: int = 60, width: int = 32, seed: int = 0):
    """Directions about k others, and whose each is."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((k, width))
    labels = np.repeat(np.arange(k), each)
    rows = centres[labels] + 0.15 * rng.standard_normal((k * each, width))
    order = rng.permutation(k * each)
    return rows[order].astype(np.float32), labels[order], centres


def test_planted_directions_are_found():
    rows, labels, centres = planted()
    found = spherical_kmeans(rows, 5, restarts=8)
    assert mutual_information(found.labels, labels) == pytest.approx(1)
    assert np.allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-5)
    cosines = found.centroids @ (centres / np.linalg.norm(centres, axis=1, keepdims=True)).T
    assert (cosines.max(1) > 0.99).all()
    own = (rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ found.centroids.T
    assert np.allclose(own.max(1), found.cosines, atol=1e-5)
    assert np.array_equal(own.argmax(1), found.labels)


def test_lengths_decide_no_cluster_unless_they_are_asked_for():
    rows, _, _ = planted()
    lengths = np.random.default_rng(1).uniform(0.1, 10, (len(rows), 1)).astype(np.float32)
    plain, scaled = (spherical_kmeans(own, 5, restarts=4) for own in (rows, rows * lengths))
    assert np.array_equal(plain.labels, scaled.labels)
    assert np.allclose(plain.centroids, scaled.centroids, atol=1e-4)
    weighed = spherical_kmeans(rows * lengths, 5, restarts=4, normalise=False)
    assert not np.allclose(plain.centroids, weighed.centroids, atol=1e-4)


def test_a_centroid_is_the_mean_direction_of_its_rows():
    rows = np.array([[1, 0], [0, 1], [3, 3]], np.float32)
    one = spherical_kmeans(rows, 1)
    assert np.allclose(one.centroids, 1 / np.sqrt(2))
    assert np.allclose(one.cosines, [1 / np.sqrt(2), 1 / np.sqrt(2), 1], atol=1e-6)
    rows[0] *= 10
    longer = spherical_kmeans(rows, 1, normalise=False)
    assert np.allclose(longer.centroids[0], np.array([13, 4]) / np.hypot(13, 4))


def test_the_same_seed_finds_the_same_and_another_may_not():
    rows = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    first, again, other = (spherical_kmeans(rows, 9, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.centroids, again.centroids)
    assert not np.array_equal(first.centroids, other.centroids)
    assert spherical_kmeans(rows, 9, seed=1, restarts=6).cosines.sum() >= first.cosines.sum()


def test_an_empty_cluster_gets_a_half_of_a_large_one():
    """Forty copies of a direction, and five others: wherever it begins, none stays empty."""
    rng = np.random.default_rng(0)
    copies = np.tile(rng.standard_normal((1, 16)), (40, 1)) + 1e-3 * rng.standard_normal((40, 16))
    rows = np.concatenate([copies, rng.standard_normal((5, 16))]).astype(np.float32)
    for seed in range(10):
        found = spherical_kmeans(rows, 6, seed=seed)
        assert (np.bincount(found.labels, minlength=6) > 0).all()


def test_of_rows_that_are_all_the_same_there_is_one_cluster_and_it_ends():
    found = spherical_kmeans(np.ones((20, 4), np.float32), 3)
    assert sorted(np.bincount(found.labels, minlength=3).tolist()) == [0, 0, 20]
    assert np.isfinite(found.centroids).all()


def test_centroids_are_found_on_a_sample_and_all_rows_are_assigned():
    rows, labels, _ = planted(each=400)
    found = spherical_kmeans(rows, 5, restarts=30, per_centroid=20)
    assert len(found.labels) == 2000
    assert mutual_information(found.labels, labels) == pytest.approx(1)
    whole = spherical_kmeans(rows, 5, restarts=30, per_centroid=400)
    assert not np.allclose(found.centroids, whole.centroids, atol=1e-5)


def test_more_clusters_than_rows_are_refused():
    with pytest.raises(modelsoup.ParameterError, match=r"4 clusters .* there are 3 pictures"):
        spherical_kmeans(np.eye(3, dtype=np.float32), 4)
    assert sorted(spherical_kmeans(np.eye(3, dtype=np.float32), 3).labels) == [0, 1, 2]


def test_purity_and_mutual_information_by_hand():
    """Two clusters of four, three and one of classes 0 and 1, and the other way round."""
    clusters, classes = np.array([0] * 4 + [1] * 4), np.array([0, 0, 0, 1, 1, 1, 1, 0])
    assert purity(clusters, classes) == 0.75
    shared = 2 * (3 / 8) * np.log(3 / 2) + 2 * (1 / 8) * np.log(1 / 2)
    assert mutual_information(clusters, classes) == pytest.approx(shared / np.log(2))
    assert mutual_information(clusters, np.array([0, 1] * 4)) == pytest.approx(0, abs=1e-12)
    assert mutual_information(clusters, 7 - clusters) == pytest.approx(1)
    assert mutual_information(np.zeros(3), np.zeros(3)) == 1
    halves = np.array([0, 0, 1, 1, 2, 2, 3, 3])  # a finer partition
    assert mutual_information(clusters, halves) == pytest.approx(np.log(2) / (1.5 * np.log(2)))
    assert purity(halves, clusters) == 1 and purity(clusters, halves) == 0.5
