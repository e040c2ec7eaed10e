"""Has a translator collapsed: few outputs for many inputs, repeats, classes that look alike.

What is compared are features of pictures, of whatever extractor an evaluation looks through, and
distances between them: those among outputs beside those among as many real pictures. The limits are
conventions; the docs say what they were tried on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from modelsoup import ParameterError

MOST = 64  # pictures of a class that are looked at
DEAD = 0.02 * 127.5  # levels of 256: outputs that differ by less, over all their pixels, are none
CANDIDATES = 100  # inputs among which an output's own one is looked for
_QUANTILE = 0.05
_LUMINANCE = np.array([0.299, 0.587, 0.114])

Groups = Mapping[str, Sequence[np.ndarray]]

Verdict = Literal["ok", "warning", "collapsed", "dead"]


@dataclass(frozen=True)
class Collapse:
    """What an evaluation found.

    Attributes:
        verdict: `dead`: the outputs are one grey; `collapsed`: half of what real pictures differ
            by, or less, mostly repeats, or classes alike; `warning`: on the way there.
        diversity: outputs' mean distance over that of real pictures; the median over classes. Of m
            distinct real pictures, equally often, it is 1 − 1/m.
        effective: how many distinct pictures would give that, at most as many as there are.
        duplicates: the share of outputs with another one nearer than real pictures ever are, but
            for the nearest twentieth; the median over classes.
        spread: the distance of the classes' means over that of the real ones; None for one class.
        source_use: outputs' mean distance where nothing but the input differs, over that of real
            pictures of the class; None where it was not measured.
        noise_use: likewise where nothing but the noise differs. That it is 0 is no collapse.
        source_rank: see `source_rank`.
    """

    verdict: Verdict
    diversity: float
    effective: float
    duplicates: float
    spread: float | None = None
    source_use: float | None = None
    noise_use: float | None = None
    source_rank: float | None = None

    def figures(self) -> dict[str, float]:
        """For a table of metrics; `collapse` is 0 for ok, 1 a warning, 2 collapsed, 3 dead."""
        found = {
            "collapse": float(("ok", "warning", "collapsed", "dead").index(self.verdict)),
            "diversity": self.diversity, "duplicates": self.duplicates, "spread": self.spread,
            "source_use": self.source_use, "noise_use": self.noise_use,
            "source_rank": self.source_rank,
        }  # fmt: skip
        return {name: value for name, value in found.items() if value is not None}


def collapse(
    outputs: Mapping[str, np.ndarray], real: Mapping[str, np.ndarray], *,
    same_noise: Groups | None = None, same_source: Groups | None = None,
    rank: float | None = None, deviation: float = float("inf"),
) -> Collapse:  # fmt: skip
    """Judge features of outputs beside those of real pictures, by class.

    Args:
        outputs: N × d for each class, of distinct inputs.
        real: M × d for each of the same classes; the first min(N, M, 64) of both are taken.
        same_noise: features of outputs for which nothing but the input differed: by class, N × d
            for each choice of noise.
        same_source: likewise of noise, for each input.
        rank: what `source_rank` found.
        deviation: the outputs' standard deviation over all pixels, in levels of 256.

    Raises:
        ParameterError: a class has fewer than two outputs or real pictures.
    """
    ratios, repeats, means = [], [], []
    within: dict[str, float] = {}
    for name, made in outputs.items():
        there = real[name]
        count = min(len(made), len(there), MOST)
        if count < 2:
            raise ParameterError(
                f"a collapse is told from two outputs and two real pictures, but "
                f"{name or 'the set'} has {len(made)} and {len(there)}"
            )
        own, others = _distances(made[:count]), _distances(there[:count])
        wanted = within[name] = _mean(others)
        ratios.append(_over(_mean(own), wanted))
        limit = np.quantile(_nearest(others), _QUANTILE)
        repeats.append(float((_nearest(own) < limit).mean()))
        means.append((made[:count].mean(axis=0), there[:count].mean(axis=0)))
    diversity, duplicates = float(np.median(ratios)), float(np.median(repeats))
    spread = None
    if len(means) > 1:
        of_made, of_real = (_distances(np.stack(side)) for side in zip(*means, strict=True))
        spread = _over(_mean(of_made), _mean(of_real))
    use, noise = (_use(groups, within) for groups in (same_noise, same_source))
    least = min(min(len(made), len(real[name]), MOST) for name, made in outputs.items())
    effective = 1 / (1 - min(diversity, 1 - 1 / least))
    few = sum(ratio < 0.5 for ratio in ratios) >= len(ratios) / 4
    verdict: Verdict = "ok"
    if deviation < DEAD:
        verdict = "dead"
    elif diversity < 0.5 or duplicates > 0.5 or (spread is not None and spread < 0.2):
        verdict = "collapsed"
    elif diversity < 0.7 or few or (use is not None and use < 0.1):
        verdict = "warning"
    return Collapse(verdict, diversity, effective, duplicates, spread, use, noise, rank)


def source_rank(inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> float:
    """How near outputs are to what they were made of, among other inputs: 1 nearest, ½ by chance.

    Of each output, the share of the other inputs, at most 99, that are farther from it than its own
    one; those as far count half. The distance is L1 of 8 × 8 means of luminance, so that it is told
    whether masses are where they were.

    Args:
        inputs: uint8, height × width × 3, of any sizes.
        outputs: of each of them.

    Raises:
        ParameterError: there are fewer than two.
    """
    if len(inputs) < 2 or len(inputs) != len(outputs):
        raise ParameterError(
            f"a rank among inputs is told from two inputs and their outputs, not of {len(inputs)} "
            f"and {len(outputs)}"
        )
    shares: list[float] = []
    for block in np.array_split(np.arange(len(inputs)), -(-len(inputs) // CANDIDATES)):
        seen, made = (np.stack([_masses(some[at]) for at in block]) for some in (inputs, outputs))
        apart = np.abs(made[:, None] - seen[None]).sum(axis=2)
        own = apart.diagonal()[:, None]
        # Its own one is as far as itself, which takes off a half.
        farther = (apart > own).sum(axis=1) + ((apart == own).sum(axis=1) - 1) / 2
        shares += (farther / (len(block) - 1)).tolist()
    return float(np.mean(shares))


def _masses(picture: np.ndarray) -> np.ndarray:
    """64 means of luminance."""
    light = picture[..., :3].astype(np.float64) @ _LUMINANCE
    rows, columns = (_parts(side) for side in light.shape)
    means: np.ndarray = (rows @ light @ columns.T).ravel()
    return means


def _parts(side: int) -> np.ndarray:
    """8 × side: which share of each of eight means a pixel is."""
    edges = np.linspace(0, side, 9)
    pixels = np.arange(side)
    over = np.minimum(pixels + 1, edges[1:, None]) - np.maximum(pixels, edges[:-1, None])
    shares: np.ndarray = over.clip(0) * 8 / side
    return shares


def _use(groups: Groups | None, within: Mapping[str, float]) -> float | None:
    """The mean over groups of distances in them, over those of real pictures of their class."""
    if not groups:
        return None
    found = [
        _over(_mean(_distances(one)), within[name]) for name, own in groups.items() for one in own
    ]
    return float(np.mean(found))


def _distances(features: np.ndarray) -> np.ndarray:
    """N × N Euclidean distances."""
    values = features.astype(np.float64)
    found: np.ndarray = np.sqrt(((values[:, None] - values[None]) ** 2).sum(axis=2))
    return found


def _mean(distances: np.ndarray) -> float:
    """Over all pairs of two."""
    count = len(distances)
    return float(distances.sum() / (count * (count - 1)))


def _nearest(distances: np.ndarray) -> np.ndarray:
    """Of each, the distance to the nearest other one."""
    apart = distances.copy()
    np.fill_diagonal(apart, np.inf)
    nearest: np.ndarray = apart.min(axis=1)
    return nearest


def _over(value: float, other: float) -> float:
    """A ratio; 1 where both are 0, as of real pictures that are all alike."""
    if other:
        return value / other
    return float("inf") if value else 1.0
