"""Weights of a training's snapshots in an average: known before any is read, so it is one merge."""

from __future__ import annotations

import glob
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import ParameterError, listed, option
from ..files.names import natural_key

_STEP_AND_STD = re.compile(r".*?(\d+)-(\d*\.\d+)")
_WIDEST = 1 / math.sqrt(12)
"""Relative width of the plain mean, which is the power function with the exponent 0."""


def found(patterns: Sequence[str]) -> list[Path]:
    """The checkpoints that are meant, in natural order: `step-2` before `step-10`.

    Args:
        patterns: paths, or globs in which `**` crosses folders.

    Raises:
        ParameterError: a pattern that matches nothing, a path that is there twice, or a single one.
    """
    paths: list[Path] = []
    for pattern in patterns:
        is_glob = glob.has_magic(pattern) and not Path(pattern).exists()
        matching = glob.glob(pattern, recursive=True) if is_glob else [pattern]
        if not matching:
            raise ParameterError(f"no file or folder matches {pattern!r}")
        paths += map(Path, matching)
    twice = [str(path) for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise ParameterError(f"given twice: {listed(sorted(twice))}")
    if len(paths) < 2:
        raise ParameterError(f"an average is of several checkpoints, but there is {paths[0]} alone")
    return sorted(paths, key=lambda path: natural_key(str(path)))


def ema_weights(count: int, decay: float) -> list[float]:
    """Of an exponential moving average that begins with the first snapshot.

    After each further one it is decay·average + (1 − decay)·snapshot.

    Raises:
        ParameterError: a decay that is not between 0 and 1.
    """
    if not 0 < decay < 1:
        raise ParameterError(f"the decay of an EMA is {decay:g}, but must be between 0 and 1")
    first, *others = [decay ** (count - 1 - k) for k in range(count)]
    return [first, *((1 - decay) * power for power in others)]


def post_hoc_weights(names: Sequence[str], std: float) -> tuple[list[float], float]:
    """Of stored averages by power functions, so that they add up to one of another width.

    Karras et al., Analyzing and improving the training dynamics of diffusion models, CVPR 2024,
    section 3.2 and appendix C.2: an average over a training up to t₁ with weights in proportion to
    tᵞ has the relative width σ, σ² = (γ + 1)/((γ + 2)²·(γ + 3)); the weights are those with which
    the stored ones' profiles come nearest to the wanted one. A merge divides them by their sum,
    which is nearly 1: snapshots that are all the same are their average.

    Args:
        names: of the averages; each ends in the step at which it was stored and its width, as in
            `ema-0008192-0.050`.
        std: the wanted width, at the last step.

    Returns:
        the weights, and how far the profile is from the wanted one, relative to its norm.

    Raises:
        ParameterError: a name that tells neither, two of the same step and width, or a width that
            no power function has.
    """
    told = []
    for name in names:
        match = _STEP_AND_STD.fullmatch(name)
        if match is None:
            raise ParameterError(
                f"{name} does not end in a step and a width, as ema-0008192-0.050 does: "
                f"{option('post_hoc', 'STD')} is made of averages that were stored in a training"
            )
        told.append((float(match[1]), float(match[2])))
    if len(set(told)) < len(told):
        raise ParameterError("two of the averages have the same step and the same width")
    if not max(step for step, _ in told):
        raise ParameterError("the averages are all of step 0, of which there is no profile")
    profiles = [(step, exponent(width)) for step, width in told]
    wanted = max(step for step, _ in told), exponent(std)
    products = np.array([[profile_product(a, b) for b in profiles] for a in profiles])
    with_wanted = np.array([profile_product(a, wanted) for a in profiles])
    weights = np.linalg.solve(products, with_wanted)
    rest = 1 - float(with_wanted @ weights) / profile_product(wanted, wanted)
    return weights.tolist(), math.sqrt(max(0.0, rest))


def exponent(std: float) -> float:
    """γ of the power function of a relative width.

    Raises:
        ParameterError: a width that is not between 0 and that of the plain mean.
    """
    if not 0 < std < _WIDEST:
        raise ParameterError(
            f"the width of an average is {std:g}, but must be between 0 and {_WIDEST:.3f}, which "
            f"is that of the plain mean"
        )
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(roots.real.max())


def profile_product(a: tuple[float, float], b: tuple[float, float]) -> float:
    """∫ of the product of two profiles (γ + 1)·tᵞ/T^(γ+1) on 0 to T, each given as T and γ."""
    (early, low), (late, high) = sorted((a, b))
    ratio = float((early / late) ** high)
    return (low + 1) * (high + 1) * ratio / ((low + high + 1) * late)
