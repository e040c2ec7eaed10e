"""What a training tells of itself: mean losses, speed, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .session import Session

_REPORT_EVERY = 0.5  # seconds

Step = TypeVar("Step")
Report = Callable[[float | None, Mapping[str, float]], None]


class Losses:
    """Means of losses over an epoch; a part of a training's state."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0
        self._last: dict[str, float] = {}

    def add(self, losses: Mapping[str, float]) -> None:
        """Those of a step."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def means(self) -> dict[str, float]:
        """Of the epoch that is going on, or of the last one where none has begun."""
        if self._count:
            return {name: total / self._count for name, total in self._sums.items()}
        return dict(self._last)

    def next_epoch(self) -> None:
        """What is added from now on belongs to another epoch."""
        self._last = self.means()
        self._sums, self._count = {}, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"sums": dict(self._sums), "count": self._count, "last": dict(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from such data."""
        self._sums, self._count, self._last = state["sums"], state["count"], state["last"]


class Watch:
    """Speed and time left, and where they and the losses are told."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._begun = self._told = time.monotonic()
        self._first = session.steps
        self._waited = 0.0
        self._writer = None
        options, shown = session.options, session.shown
        if options.tensorboard and shown is not None and not session.place.rank:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(shown / "tensorboard"), purge_step=session.steps)

    def waiting(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The same, with the time that they were waited for."""
        while True:
            begun = time.perf_counter()
            group = next(steps, None)
            self._waited += time.perf_counter() - begun
            if group is None:
                return
            yield group

    def add(self, losses: Mapping[str, float], rate: float) -> None:
        """The losses of a step, and the rate that it was made with."""
        self._session.losses.add(losses)
        if self._writer is not None:
            for name, value in (*losses.items(), ("rate", rate)):
                self._writer.add_scalar(name, value, self._session.steps)

    def line(self, epoch: int) -> str:
        """The line of the log at the end of an epoch, counted from 0."""
        options = self._session.options
        losses = " ".join(f"{n} {value:.4f}" for n, value in self._session.losses.means().items())
        share = self._waited / max(time.monotonic() - self._begun, 1e-9)
        return (
            f"epoch {epoch + 1} of {options.epochs + options.decay_epochs}: {losses}; "
            f"{self.speed():.2f} steps a second, {share:.1%} of the time waiting for images"
        )

    def speed(self) -> float:
        """Steps a second."""
        return (self._session.steps - self._first) / max(time.monotonic() - self._begun, 1e-9)

    def tell(self, report: Report) -> None:
        """Report progress, not more often than every half second."""
        now = time.monotonic()
        if now - self._told < _REPORT_EVERY:
            return
        self._told = now
        session = self._session
        left = (session.total_steps - session.steps) / max(self.speed(), 1e-9)
        figures = {**session.losses.means(), "seconds_left": round(left, 1)}
        report(session.steps / session.total_steps, figures)

    def close(self) -> None:
        """The events' file is whole."""
        if self._writer is not None:
            self._writer.close()
