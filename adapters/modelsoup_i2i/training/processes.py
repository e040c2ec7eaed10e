"""Several processes, usually one a GPU, that train one model: gradients are averaged over them."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modelsoup import TrainerError

from ..networks.devices import gpus

PATIENCE = timedelta(minutes=30)  # for one whose step or whose state takes long
JOINING = timedelta(seconds=20)  # for those that have said that they are ready
_LOOK = 0.05  # seconds between two looks whether all have come


def _alone() -> None:
    pass


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is; rank 0 reports and writes.

    Attributes:
        rank: from 0.
        world: how many there are.
        meet: called when all is ready for the first step: waits for the others.
    """

    rank: int = 0
    world: int = 1
    meet: Callable[[], None] = _alone

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors by their means over all processes."""
        if self.world == 1:
            return
        waits = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        for wait in waits:
            wait.wait()
        for tensor in tensors:
            tensor.div_(self.world)

    def gathered(self, value: Any) -> list[Any]:
        """Each process's value, in the order of ranks; on rank 0, elsewhere only its own."""
        if self.world == 1:
            return [value]
        every = [None] * self.world if self.rank == 0 else None
        dist.gather_object(value, every)
        return [value] if every is None else every

    def agreed(self, value: bool) -> bool:
        """What rank 0 says, for all."""
        if self.world == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]


ALONE = Place()
_JOIN = (
    "import pickle, sys; from modelsoup_i2i.training.processes import joined; "
    "joined(*pickle.loads(sys.stdin.buffer.read()))"
)


@contextlib.contextmanager
def together(world: int, device: str, work: Path, arguments: tuple[Any, ...]) -> Iterator[Place]:
    """Start the other processes of a training, each of which runs the same session.

    Args:
        world: how many there are together.
        device: where they train; a GPU each, unless it is `cpu`.
        work: a folder, for the file by which they meet.
        arguments: (trainer, options, start, seed, frozen), which can be pickled.

    Raises:
        TrainerError: there are more processes than GPUs, or one of the others failed; its last line
            is told.
    """
    there = 0 if device == "cpu" else gpus()
    if there < world and (there or device not in ("cpu", "auto")):
        raise TrainerError(
            f"processes is {world}, a GPU each, but there {'is' if there == 1 else 'are'} {there} "
            f"here"
        )
    meeting = work / f"meeting-{uuid.uuid4().hex}"
    others: list[subprocess.Popen[bytes]] = []

    def meet() -> None:
        """Join the others when all of them are ready; the group itself would wait for a dead one.

        Raises:
            TrainerError: one of them has ended before.
            RuntimeError: one of them has not joined.
        """
        store = dist.FileStore(str(meeting), world)
        while not store.check([_ready(rank) for rank in range(1, world)]):
            for rank, process in enumerate(others, 1):
                if process.poll() is not None and not store.check([_ready(rank)]):
                    raise _failed(work, rank)
            time.sleep(_LOOK)
        _set_up(0, device)
        _join(0, world, device, store)

    try:
        for rank in range(1, world):
            with (
                (work / f"process-{rank}.log").open("wb") as log,
                tempfile.TemporaryFile(dir=work) as given,
            ):
                given.write(pickle.dumps((rank, world, device, str(meeting), arguments)))
                given.seek(0)
                others.append(
                    subprocess.Popen(  # noqa: S603  # this interpreter, and a text of ours
                        [sys.executable, "-c", _JOIN], stdin=given, stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip
        try:
            yield Place(0, world, meet)
        except RuntimeError as error:
            raise _failure(others, work) or error from error
        finally:
            _leave()
        for rank, process in enumerate(others, 1):
            if process.wait():
                raise _failed(work, rank)
    finally:
        for process in others:
            process.kill()
            process.wait()
        meeting.unlink(missing_ok=True)


def joined(rank: int, world: int, device: str, meeting: str, arguments: tuple[Any, ...]) -> None:
    """What another process does: the same training, with nothing told or written."""

    def meet() -> None:
        _set_up(rank, device)
        store = dist.FileStore(meeting, world)
        store.set(_ready(rank), b"")
        _join(rank, world, device, store)

    trainer, options, start, seed, frozen = arguments
    try:
        session = trainer.session(
            options, start, seed=seed, frozen=frozen, work=Path(meeting).parent,
            place=Place(rank, world, meet),
        )  # fmt: skip
        session.run(lambda _done, _metrics: None, lambda _line: None)
    finally:
        _leave()


def _ready(rank: int) -> str:
    """What a process writes into the file where all meet, as the last thing before it joins."""
    return f"process {rank} is ready"


def _set_up(rank: int, device: str) -> None:
    if _on_gpus(device):
        torch.cuda.set_device(rank)


def _join(rank: int, world: int, device: str, store: Any) -> None:
    # A group waits for a process that cannot join as long as for one whose step takes long: so a
    # first one, of little patience, finds out whether all can.
    for name, patience in (("trial", JOINING), ("training", PATIENCE)):
        _leave()
        dist.init_process_group(
            "nccl" if _on_gpus(device) else "gloo", store=dist.PrefixStore(name, store), rank=rank,
            world_size=world, timeout=patience,
        )  # fmt: skip


def _on_gpus(device: str) -> bool:
    return device != "cpu" and torch.cuda.is_available()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _failure(others: Sequence[subprocess.Popen[bytes]], work: Path) -> TrainerError | None:
    """The error of the first process that ended with one."""
    for rank, process in enumerate(others, 1):
        try:
            if process.wait(5):
                return _failed(work, rank)
        except subprocess.TimeoutExpired:
            continue
    return None


def _failed(work: Path, rank: int) -> TrainerError:
    lines = (work / f"process-{rank}.log").read_text("utf-8", "replace").strip().splitlines()
    said = lines[-1] if lines else "it printed nothing"
    return TrainerError(f"process {rank} of the training failed: {said}")
