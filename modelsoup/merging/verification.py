"""Whether a checkpoint is sound, and still made of what its lineage says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ParameterError, must_be_several, nearest
from ..files.checkpoint import Checkpoint, StrPath, TensorInfo, open_checkpoint
from ..files.dtypes import DTYPES, count_nonfinite, has_nonfinite, numpy_dtype
from .forms import BLOCK
from .lineage import InputCheck, check_inputs, read_lineage
from .threads import default_workers

_CHUNK = 16 * BLOCK


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; the header and byte ranges were sound, or it would have raised.

    Attributes:
        checkpoint: what was verified.
        nonfinite: (name, how many elements are NaN or infinite), for each tensor that has any.
        noted: the same, as the lineage says that they were made and may be.
        has_lineage: whether it says what it was made of.
        inputs: the lineage's inputs, and whether they are at hand and unchanged.
    """

    checkpoint: Checkpoint
    nonfinite: tuple[tuple[str, int], ...]
    noted: tuple[tuple[str, int], ...]
    has_lineage: bool
    inputs: tuple[InputCheck, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong with the checkpoint itself, whatever became of its inputs.

        NaN and infinity are right where the lineage says that as many were made.
        """
        return dict(self.nonfinite) == dict(self.noted)

    @property
    def changed(self) -> tuple[InputCheck, ...]:
        """The inputs that are at hand, and not what they were."""
        return tuple(check for check in self.inputs if check.intact is False)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "path": str(self.checkpoint.path),
            "sound": self.sound,
            "tensors": len(self.checkpoint),
            "nonfinite": dict(self.nonfinite),
            "noted_nonfinite": dict(self.noted),
            "has_lineage": self.has_lineage,
            "changed": [check.name for check in self.changed],
            "inputs": [
                {
                    "name": check.name,
                    "found": None if check.found is None else str(check.found),
                    "intact": check.intact,
                }
                for check in self.inputs
            ],
        }


def verify(path: StrPath | Checkpoint, *, folders: Sequence[StrPath] | None = None) -> VerifyReport:
    """Check headers, byte ranges, values, and the digests of the inputs where they are at hand.

    Args:
        path: a path or an open checkpoint.
        folders: where to look for the inputs; None looks beside the checkpoint and in the current
            folder.

    Raises:
        CheckpointError: it is damaged, or its lineage cannot be read.
        ParameterError: one of the folders is none, or they are no list.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    if folders is None:
        folders = [checkpoint.path.resolve().parent, Path.cwd()]
    must_be_several("folders", folders)
    for folder in map(Path, folders):
        _must_be_folder(folder)
    floats = [i for i in checkpoint.tensors.values() if DTYPES[i.dtype].kind == "float"]
    with ThreadPoolExecutor(default_workers()) as pool:
        counts = list(pool.map(lambda info: _nonfinite(checkpoint, info), floats))
    lineage = read_lineage(checkpoint)
    return VerifyReport(
        checkpoint,
        tuple((info.name, n) for info, n in zip(floats, counts, strict=True) if n),
        tuple((lineage or {}).get("nonfinite", {}).items()),
        lineage is not None,
        tuple(check_inputs(checkpoint, [Path(folder) for folder in folders])),
    )


def _must_be_folder(folder: Path) -> None:
    if os.path.isdir(folder):
        return
    what = "is no folder" if os.path.exists(folder) else "does not exist"
    around = folder.parent
    beside = [p.name for p in around.iterdir() if p.is_dir()] if os.path.isdir(around) else []
    raise ParameterError(f"the folder {folder} of the inputs {what}{nearest(folder.name, beside)}")


def _nonfinite(checkpoint: Checkpoint, info: TensorInfo) -> int:
    found = 0
    buffer = np.empty(min(_CHUNK, info.nbytes), np.uint8)
    with checkpoint.reading(info) as read:
        for start in range(0, info.nbytes, _CHUNK):
            part = buffer[: min(_CHUNK, info.nbytes - start)]
            read(part.data, start)
            values = part.view(numpy_dtype(info.dtype))
            if has_nonfinite(values, info.dtype):
                found += count_nonfinite(values)
    return found
