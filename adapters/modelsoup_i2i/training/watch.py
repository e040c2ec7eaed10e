"""What a training tells of itself: mean losses, speed, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

_REPORT_EVERY = 0.5  # seconds
_STEPS, _SECONDS = 50, 60.0  # after either of them it is said how long all will take

Step = TypeVar("Step")
Report = Callable[[float | None, Mapping[str, float]], None]


class Losses:
    """Means of losses over an epoch, each over the steps that had it; a part of the state."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._last: dict[str, float] = {}

    def add(self, losses: Mapping[str, float]) -> None:
        """Those of a step."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Of the epoch that is going on, or of the last one where none has begun."""
        if self._sums:
            return {name: total / self._counts[name] for name, total in self._sums.items()}
        return dict(self._last)

    def next_epoch(self) -> None:
        """What is added from now on belongs to another epoch."""
        self._last = self.means()
        self._sums, self._counts = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        counts = dict(self._counts)
        return {"sums": dict(self._sums), "counts": counts, "last": dict(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from such data."""
        self._sums, self._counts, self._last = state["sums"], state["counts"], state["last"]


class Watch:
    """Speed and time left, and where they and the losses are told.

    Args:
        first: how many steps were made before.
        total: how many there are.
        events: the folder for tensorboard's events; None for none.
    """

    def __init__(self, first: int, total: int, events: Path | None) -> None:
        self._begun = self._told = time.monotonic()
        self._first = self._now = first
        self._total = total
        self._waited = 0.0
        self._expected = False
        self._writer = None
        if events is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(events), purge_step=first)

    def waiting(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The same, with the time that they were waited for."""
        while True:
            begun = time.perf_counter()
            group = next(steps, None)
            self._waited += time.perf_counter() - begun
            if group is None:
                return
            yield group

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """A step was made, which had such losses and such a rate."""
        self._now = step
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)

    def speed(self) -> float:
        """Steps a second."""
        return (self._now - self._first) / max(time.monotonic() - self._begun, 1e-9)

    def speed_told(self) -> str:
        """That, and how much of the time went into waiting."""
        share = self._waited / max(time.monotonic() - self._begun, 1e-9)
        return f"{self.speed():.2f} steps a second, {share:.1%} of the time waiting for images"

    def expected(self) -> str | None:
        """How long all will take, once, when some steps have shown it; None before and after."""
        took = time.monotonic() - self._begun
        if self._expected or (self._now - self._first < _STEPS and took < _SECONDS):
            return None
        self._expected = True
        left = self._total - self._now
        if not left:
            return None
        return f"about {_duration(left / max(self.speed(), 1e-9))} for the {left} steps to come"

    def tell(self, report: Report, losses: Callable[[], Mapping[str, float]]) -> None:
        """Report progress, not more often than every half second."""
        now = time.monotonic()
        if now - self._told < _REPORT_EVERY:
            return
        self._told = now
        left = (self._total - self._now) / max(self.speed(), 1e-9)
        report(self._now / self._total, {**losses(), "seconds_left": round(left, 1)})

    def close(self) -> None:
        """The events' file is whole."""
        if self._writer is not None:
            self._writer.close()


def _duration(seconds: float) -> str:
    """In the largest two units, or in seconds."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return f"{hours} h" if hours < 48 else f"{hours // 24} d {hours % 24} h"
