"""What a training takes, found by some of its first steps: time, and memory at the most."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from .session import Session

_WARM, _BLOCK = 2, 5  # steps that are not counted, and those after which the clock is looked at


@dataclass(frozen=True)
class Probe:
    """What steps took.

    Attributes:
        steps: how many were counted.
        seconds: of one, on average, with the images that it waited for.
        memory: bytes: of the process at the most, or of the GPU where one computes.
    """

    steps: int
    seconds: float
    memory: int


def probe(session: Session, seconds: float) -> Probe:
    """Make steps for some seconds, or to the end of a training; nothing is kept.

    Raises:
        DivergedError: a loss or gradient is not finite.
    """
    batches = session.batches()
    try:
        _made(session, islice(batches, _WARM if session.total_steps > _WARM else 0))
        steps, took, begun = 0, 0.0, time.perf_counter()
        while took < seconds and (made := _made(session, islice(batches, _BLOCK))):
            steps, took = steps + made, time.perf_counter() - begun
    finally:
        batches.close()
    return Probe(steps, took / steps, _most(session.device))


def _made(session: Session, batches: Iterator[list[dict[str, torch.Tensor]]]) -> int:
    """How many steps were made."""
    before = session.steps
    for group in batches:
        session.take(group)
    for _ in session.read():  # which waits for a GPU
        pass
    return session.steps - before


def _most(device: torch.device) -> int:
    if device.type == "cuda":
        own: int = torch.cuda.max_memory_allocated(device)
        return own
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
