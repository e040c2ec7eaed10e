"""A step as one CUDA graph: launched once, where its thousands of kernels were one by one.

A step is recorded, which makes nothing, and then replayed: the same kernels on the same memory. So
all that differs from one step to the next lies in that memory. What was drawn is copied into what
the recording read; a pool's places and coins are drawn by the host and copied in; learning rates
are tensors; and torch's generator is seeded before each replay, as before each step. What a
recording cannot follow is Python: steps whose turns differ have a recording each.

Before it is recorded a step of its kind is made some times as ever. Those make what lives longer
than a step, such as an optimiser's state, and show whether it waits for the GPU, which no recording
may. Where one cannot be, that is said once, and steps are made as ever.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from .pool import ImagePool
from .turns import Turn

REHEARSED = 2  # steps of a kind before it is recorded
MOST = 8  # recordings, each of which has memory
_KINDS = 4 * MOST  # after so many that differ none is waited for any more

Drawn = Sequence[Mapping[str, torch.Tensor]]
Told = tuple[tuple[str, ...], torch.Tensor]
"""Names, and numbers on the device."""


class UnrecordableError(RuntimeError):
    """A replay would not be the step."""


class Recorder(Protocol):
    """What can make a step again without Python."""

    def rehearse(self, step: Callable[[], Told]) -> tuple[Told, str | None]:
        """Make a step as ever, where it will be recorded; and say why it cannot be, if so."""

    def record(self, step: Callable[[], Told]) -> tuple[Told, Callable[[], object]]:
        """Where a step will tell, and what makes it; nothing is made yet.

        Raises:
            RuntimeError: it cannot be recorded, and nothing was made.
        """


@dataclass(frozen=True)
class Recording:
    """A step that can be made again.

    Attributes:
        drawn: the memory of what was drawn.
        rows: that of what is drawn for pools.
        told: where it tells.
        replay: makes it.
    """

    drawn: Drawn
    rows: Mapping[str, torch.Tensor]
    told: Told
    replay: Callable[[], object]


class Recordings:
    """The recordings of a training.

    Args:
        recorder: makes them.
        pools: of the training.
        placed: puts a tensor on the device, for which nobody waits.

    Attributes:
        refused: why there are none; None where there may be some.
        recording: whether a step is being recorded.
    """

    def __init__(
        self, recorder: Recorder, pools: Mapping[str, ImagePool],
        placed: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:  # fmt: skip
        self.refused: str | None = None
        self.recording = False
        self._recorder, self._pools, self._placed = recorder, pools, placed
        # Of each kind, how many images its rehearsals asked each pool about.
        self._rehearsals: dict[Hashable, list[dict[str, int]]] = {}
        self._recorded: dict[Hashable, Recording] = {}
        self._news: list[str] = []

    def news(self) -> Iterator[str]:
        """What there is to say, once."""
        while self._news:
            yield self._news.pop(0)

    def refuse(self, why: str) -> None:
        """Make no recordings any more."""
        self.refused = why
        self._recorded.clear()
        self._news.append(f"steps are not replayed as CUDA graphs: {why}")

    def made(self, kind: Hashable, drawn: Drawn, step: Callable[[Drawn], Told]) -> Told:
        """A step, by its recording if there is one.

        Args:
            kind: of all steps that have one recording.
            drawn: what it is made of, on the device.
            step: makes it as ever.
        """
        if self.refused is not None:
            return step(drawn)
        shapes = tuple((n, v.shape, v.dtype) for batch in drawn for n, v in batch.items())
        own = self._recorded.get((kind, shapes))
        if own is None:
            rehearsals = self._rehearsals.setdefault((kind, shapes), [])
            if len(rehearsals) < REHEARSED:
                return self._rehearsed(rehearsals, drawn, step)
            if len(self._recorded) == MOST:
                return step(drawn)
            try:
                own = self._record(rehearsals[-1], drawn, step)
            except RuntimeError as error:
                self.refuse(str(error).strip().partition("\n")[0])
        if own is None:
            return step(drawn)
        self._recorded[kind, shapes] = own
        return self._replayed(own, drawn)

    def _rehearsed(
        self, rehearsals: list[dict[str, int]], drawn: Drawn, step: Callable[[Drawn], Told]
    ) -> Told:
        before = {name: pool.queried for name, pool in self._pools.items()}
        told, why = self._recorder.rehearse(partial(step, drawn))
        rehearsals.append({name: n for name, pool in self._pools.items()
                           if (n := pool.queried - before[name])})  # fmt: skip
        if why is None and len(self._rehearsals) > _KINDS:
            why = "the turns of nearly each step are others"
        if why is not None:
            self.refuse(why)
        return told

    def _record(
        self, queried: Mapping[str, int], drawn: Drawn, step: Callable[[Drawn], Told]
    ) -> Recording:
        memory = [{name: values.clone() for name, values in batch.items()} for batch in drawn]
        rows = {name: self._placed(torch.zeros((count, 3), dtype=torch.int64))
                for name, count in queried.items()}  # fmt: skip
        with ExitStack() as following:
            for name, own in rows.items():
                following.enter_context(self._pools[name].following(own))
            following.enter_context(self._as_recording())
            told, replay = self._recorder.record(partial(step, memory))
        recorded = len(self._recorded) + 1
        if recorded == 1:
            self._news.append("steps are replayed as CUDA graphs")
        if recorded == MOST:
            self._news.append(f"{MOST} kinds of steps are; others are made kernel by kernel")
        return Recording(memory, rows, told, replay)

    def _replayed(self, own: Recording, drawn: Drawn) -> Told:
        for batch, values in zip(own.drawn, drawn, strict=True):
            for name, place in batch.items():
                place.copy_(values[name])
        for name, rows in own.rows.items():
            rows.copy_(self._placed(torch.tensor(self._pools[name].plan(len(rows)))))
        own.replay()
        names, told = own.told
        return names, told.clone()

    @contextmanager
    def _as_recording(self) -> Iterator[None]:
        self.recording = True
        try:
            yield
        finally:
            self.recording = False


def kind_of(turns: Sequence[Turn], *more: Hashable) -> Hashable:
    """What is equal for steps with the same turns.

    Losses are, if they are one function, or partials of one with equal arguments. One that is made
    anew at each step is another one each time.
    """
    return (*((turn.name, turn.players, *map(_kind_of, turn.losses)) for turn in turns), *more)


def _kind_of(loss: Any) -> Hashable:
    made = loss
    if isinstance(loss, partial):
        made = (_kind_of(loss.func), *loss.args, *sorted(loss.keywords.items()))
    try:
        hash(made)
    except TypeError:  # of a list, say, nobody knows whether it is as it was
        return object()
    known: Hashable = made
    return known


class CudaGraphs:
    """Records steps as CUDA graphs.

    Args:
        device: of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def rehearse(self, step: Callable[[], Told]) -> tuple[Told, str | None]:
        """See `Recorder`."""
        here, before = torch.cuda.current_stream(self._device), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(here)
        with warnings.catch_warnings(record=True) as said, torch.cuda.stream(self._stream):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                told = step()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        here.wait_stream(self._stream)
        waits = [one for one in said if "called a synchronizing" in str(one.message)]
        for one in said:
            if one not in waits and "prototype feature" not in str(one.message):
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        if not waits:
            return told, None
        return told, f"a step waits for the GPU at {waits[0].filename}, line {waits[0].lineno}"

    def record(self, step: Callable[[], Told]) -> tuple[Told, Callable[[], object]]:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)  # torch's allocator goes on asking one that failed
        drawn = torch.get_rng_state()
        try:
            # Where recording fails, torch does not leave its stream.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(
                    graph, pool=self._memory, stream=self._stream,
                    capture_error_mode="thread_local",
                ),
            ):  # fmt: skip
                told = step()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                self._graphs.remove(graph)  # it ended, and gives its memory back
            # Nor does its generator learn that the recording is over.
            own = torch.cuda.default_generators[self._device.index]
            own.graphsafe_set_state(own.clone_state())
            raise
        if not torch.equal(drawn, torch.get_rng_state()):
            raise UnrecordableError("a loss draws numbers on the host")
        return told, graph.replay
