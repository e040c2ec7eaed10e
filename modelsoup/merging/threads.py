"""How many threads a merge has."""

from __future__ import annotations

import os

from ..errors import ParameterError, said

MOST_WORKERS = 1024
"""To start many threads takes long, and each has buffers."""
_MAX_WORKERS = 8  # more do not read faster


def default_workers() -> int:
    """As many as there are cores for this process, at least 2 (to read while computing)."""
    return max(2, min(_MAX_WORKERS, usable_cores()))


def check_workers(workers: int | None) -> int:
    """A number of workers that was asked for, or what there is where none was.

    Raises:
        ParameterError: no integer, or more than any machine has use for.
    """
    if workers is None:
        return default_workers()
    if isinstance(workers, bool) or not isinstance(workers, int) or not 0 < workers <= MOST_WORKERS:
        raise ParameterError(
            f"workers is {said(workers)}, but must be an integer from 1 to {MOST_WORKERS:,}"
        )
    return workers


def usable_cores() -> int:
    """How many cores this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
