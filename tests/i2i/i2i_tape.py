"""What records a step on a CPU as CUDA graphs do on a GPU: operations on memory, and no Python."""

from __future__ import annotations

from typing import Any

import torch
from modelsoup_i2i.training.session import Session
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Operations, with the memory that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []
        self.before: dict[int, tuple[Any, Any]] = {}
        self.own: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value is asked for while a step is recorded\nand more")
        # All that it reads: batch norm says of its statistics to nobody that it moves them.
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._keep(tensor.untyped_storage())
        made = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, made))
        self.own |= {t.untyped_storage().data_ptr() for t in tree_leaves(made)
                     if isinstance(t, torch.Tensor)}  # fmt: skip
        return made

    def _keep(self, storage) -> None:
        place = storage.data_ptr()
        if place not in self.own and place not in self.before:
            self.before[place] = (storage, storage.clone())

    def put_back(self) -> None:
        """Nothing was made: what was there before is there again."""
        for storage, values in self.before.values():
            storage.copy_(values)

    def replay(self) -> None:
        for func, args, kwargs, made in self.operations:
            if func.is_view:
                continue
            again = func(*args, **kwargs)
            for place, values in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(place, torch.Tensor) and place is not values:
                    place.copy_(values)


class Tapes:
    """A recorder of the same kind as `CudaGraphs`."""

    def rehearse(self, step):
        return step(), None

    def record(self, step):
        tape = Tape()
        try:
            with tape:
                told = step()
        finally:
            tape.put_back()

        def replay() -> None:
            with torch.no_grad():
                tape.replay()

        return told, replay


class Taped(Session):
    """A session that replays its steps, and is as far behind as on a GPU."""

    early, behind = False, 3

    def recorder(self):
        return Tapes() if self.options.graphs else None
