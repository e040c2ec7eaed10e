"""The names of metrics, and what each of them needs. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from math import isnan
from pathlib import Path

from modelsoup import ParameterError, nearest

from ..pictures.arrays import LOOKS

DIMENSIONS = (64, 192, 768, 2048)
_READINGS = ("pairs", "to_real", "to_input", "to_truth")
_FAMILIES = {"lpips": "lpips-alex", "st-lpips": "st-alex"}
METRICS = (
    *(f"fid-{dimension}" for dimension in DIMENSIONS), "kid", "fd-st-alex", "kd-st-alex",
    *(f"{family}_{reading}" for family in _FAMILIES for reading in _READINGS),
    "psnr", "ssim",
)  # fmt: skip
OFFLINE = (
    "fd-st-alex", "kd-st-alex", "st-lpips_pairs", "st-lpips_to_real", "st-lpips_to_input",
    "st-lpips_to_truth", "psnr", "ssim",
)  # fmt: skip
"""Those that need no weights but a package's."""
OVER_NOISE = "over_noise"
USE = ("source_use", "noise_use", "source_rank")
COLLAPSE = ("collapse", "diversity", "duplicates", "spread", *USE)
CLASS_METRICS = (
    *(f"m{name}" for name in METRICS if name.startswith(("f", "k"))), "rc", "fc",
    *(f"{family}_{OVER_NOISE}" for family in _FAMILIES), *COLLAPSE,
)  # fmt: skip
"""Those of a translator to classes."""
ANY_CHANNELS = ("psnr", "ssim")  # of pictures that nobody can look at, these alone
_OF_SETS = ("fid", "kid", "fd-", "kd-")
_HIGHER = ("psnr", "ssim", "rc", "fc", "diversity", "spread", *USE)


def own_names(file: Path | None, *, by_class: bool = False) -> tuple[str, ...]:
    """The metrics that look through a classifier of one's own: its file's name follows.

    Raises:
        ParameterError: it has the name of another network.
    """
    if file is None:
        return ()
    if file.stem in _FAMILIES.values() or file.stem.startswith("inception-"):
        raise ParameterError(
            f"the extractor {file} would lend its distances the name of another network: rename it"
        )
    return tuple(f"{'m' * by_class}{kind}d-{file.stem}" for kind in "fk")


def must_be_looked_at(names: Sequence[str], channels: int) -> None:
    """Raise a ParameterError for a metric that looks at colours, where pictures have none."""
    for name in names:
        if channels not in LOOKS and name not in ANY_CHANNELS:
            raise ParameterError(
                f"the metric {name} looks at colours, and pictures of {channels} channels have "
                f"none: {' and '.join(ANY_CHANNELS)}, which need the truth, compare any"
            )


def through_features(names: Sequence[str]) -> str | None:
    """The extractor of the first metric that compares features of sets; None if none does."""
    return next((extractor_of(name) for name in names if is_of_sets(name)), None)


def finds_collapse(names: Collection[str]) -> bool:
    """Whether an evaluation of such metrics looks for a collapse."""
    return "collapse" in names or any(map(is_of_sets, names))


def is_of_sets(name: str) -> bool:
    """Whether a metric compares features of whole sets, or of those of each class."""
    return name.removeprefix("m").startswith(_OF_SETS)


def is_better(name: str, value: float, other: float) -> bool:
    """Whether a value of a metric is better than another one; NaN is worse than any."""
    if isnan(value) or isnan(other):
        return isnan(other) and not isnan(value)
    higher = name in _HIGHER or reading_of(name) in ("pairs", OVER_NOISE)
    return value > other if higher else value < other


def must_be_known(names: Sequence[str], own: Path | None = None, *, by_class: bool = False) -> None:
    """Raise a ParameterError for a name that is no metric.

    Args:
        names: of metrics.
        own: the file of a classifier, through which distances are made, too.
        by_class: of those of a translator to classes.
    """
    known = (*(CLASS_METRICS if by_class else METRICS), *own_names(own, by_class=by_class))
    for name in names:
        if name in known:
            continue
        there = f"{nearest(name, known)} (of {', '.join(known)})"
        if own is None and name.removeprefix("m").startswith(("fd-", "kd-")):
            there += f"; a classifier's features are seen with extractor, a file {_file_of(name)}"
        raise ParameterError(f"there is no metric {name!r}{there}")


def _file_of(name: str) -> str:
    return f"{name.partition('-')[2]}.safetensors"


def must_have(names: Sequence[str], roles: Collection[str]) -> None:
    """Raise a ParameterError for a metric that needs what is not there: real, inputs or truth."""
    for name in names:
        needed = needs(name)
        if needed == "truth" and needed not in roles:
            raise ParameterError(
                f"the metric {name} needs the truth: a picture in the other folder for each "
                f"translation, of the same name"
            )
        if needed not in roles:
            raise ParameterError(f"the metric {name} needs {needed}, and none were given")


LEAST = {"st-alex": 21, "lpips-alex": 31, "ssim": 6}
"""Pixels that a picture's sides must have, or the last layers, or a window, see nothing."""


def must_suffice(name: str, sizes: Mapping[str, tuple[int, int]], n_real: int) -> None:
    """Raise a ParameterError for a metric that such pictures, or so few, cannot give.

    Args:
        name: of the metric.
        sizes: height and width of each translation, by what an error calls it.
        n_real: how many real pictures, where the metric needs some.
    """
    through, n_fake = extractor_of(name), len(sizes)
    # An extractor gets all at the size of the first one, and pixels are compared at each one's own.
    for called, size in islice(sizes.items(), None if through is None else 1):
        must_be_seen(through or name, called, size, said=name)
    must_be_many(name, n_fake, n_real)


def must_be_many(name: str, n_fake: int, n_real: int) -> None:
    """Raise a ParameterError for a metric that so few translations or real pictures cannot give."""
    if reading_of(name) == "pairs" and n_fake < 2:
        raise ParameterError(f"{name} needs at least 2 translations")
    if is_of_sets(name) and min(n_fake, n_real) < 2:
        raise ParameterError(
            f"{name} needs at least 2 pictures of each set, not {min(n_fake, n_real)}"
        )


def must_be_seen(through: str, called: str, size: tuple[int, int], *, said: str = "") -> None:
    """Raise a ParameterError for a picture that is too small for an extractor or a window."""
    least = LEAST.get(through, 1)
    if min(size) < least:
        raise ParameterError(
            f"{said or through} needs pictures of at least {least} pixels a side, and {called} is "
            f"{size[0]} × {size[1]}"
        )


def reading_of(name: str) -> str:
    """Which distances a perceptual metric is the mean of; empty for another one."""
    family, _, reading = name.partition("_")
    return reading if family in _FAMILIES else ""


def extractor_of(name: str) -> str | None:
    """The extractor that a metric looks through.

    None for those that compare pixels, or that look through a classifier which is given.
    """
    if reading_of(name):
        return _FAMILIES[name.partition("_")[0]]
    if not is_of_sets(name):
        return None
    kind, _, through = name.removeprefix("m").partition("-")
    if kind in ("fd", "kd"):
        return through
    return f"inception-{through or DIMENSIONS[-1]}"


def needs(name: str) -> str:
    """Beside translations: `real`, `inputs` or `truth`; `fake` where they suffice."""
    if name in ("psnr", "ssim") or reading_of(name) == "to_truth":
        return "truth"
    if reading_of(name) == "to_input" or name == "source_rank":
        return "inputs"
    alone = reading_of(name) in ("pairs", OVER_NOISE)
    return "fake" if alone else "real"
