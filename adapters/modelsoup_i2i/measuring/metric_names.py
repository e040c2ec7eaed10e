"""The names of metrics, and what each of them needs. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from math import isnan

from modelsoup import ParameterError, nearest

DIMENSIONS = (64, 192, 768, 2048)
_READINGS = ("pairs", "to_real", "to_input", "to_truth")
METRICS = (
    *(f"fid-{dimension}" for dimension in DIMENSIONS), "kid", "fd-st-alex", "kd-st-alex",
    *(f"{family}_{reading}" for family in ("lpips", "st-lpips") for reading in _READINGS),
    "psnr", "ssim",
)  # fmt: skip
OFFLINE = (
    "fd-st-alex", "kd-st-alex", "st-lpips_pairs", "st-lpips_to_real", "st-lpips_to_input",
    "st-lpips_to_truth", "psnr", "ssim",
)  # fmt: skip
"""Those that need no weights but a package's."""


def through_features(names: Sequence[str]) -> str | None:
    """The extractor of the first metric that compares features of sets; None if none does."""
    return next((extractor_of(name) for name in names if name.startswith(("f", "k"))), None)


def is_better(name: str, value: float, other: float) -> bool:
    """Whether a value of a metric is better than another one; NaN is worse than any."""
    if isnan(value) or isnan(other):
        return isnan(other) and not isnan(value)
    higher = name in ("psnr", "ssim") or name.endswith("_pairs")
    return value > other if higher else value < other


def must_be_known(names: Sequence[str]) -> None:
    """Raise a ParameterError for a name that is no metric."""
    for name in names:
        if name not in METRICS:
            raise ParameterError(
                f"there is no metric {name!r}{nearest(name, METRICS)} (of {', '.join(METRICS)})"
            )


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
    least = LEAST.get(through or name, 1)
    # An extractor gets all at the size of the first one, and pixels are compared at each one's own.
    for called, size in islice(sizes.items(), None if through is None else 1):
        if min(size) < least:
            raise ParameterError(
                f"{name} needs pictures of at least {least} pixels a side, and {called} is "
                f"{size[0]} × {size[1]}"
            )
    if name.endswith("_pairs") and n_fake < 2:
        raise ParameterError(f"{name} needs at least 2 translations")
    if name.startswith(("f", "k")) and min(n_fake, n_real) < 2:
        raise ParameterError(
            f"{name} needs at least 2 pictures of each set, not {min(n_fake, n_real)}"
        )


def extractor_of(name: str) -> str | None:
    """The extractor that a metric looks through; None for those that compare pixels."""
    if name in ("psnr", "ssim"):
        return None
    family = name.partition("_")[0]
    if family in ("lpips", "st-lpips"):
        return "lpips-alex" if family == "lpips" else "st-alex"
    if name.endswith("st-alex"):
        return "st-alex"
    return f"inception-{name.removeprefix('fid-') if name.startswith('fid-') else DIMENSIONS[-1]}"


def needs(name: str) -> str:
    """Beside translations: `real`, `inputs` or `truth`; `fake` where they suffice."""
    if name in ("psnr", "ssim") or name.endswith("_to_truth"):
        return "truth"
    if name.endswith("_to_input"):
        return "inputs"
    return "fake" if name.endswith("_pairs") else "real"
