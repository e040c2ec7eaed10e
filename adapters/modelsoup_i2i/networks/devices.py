"""Where networks run."""

from __future__ import annotations

import torch

from modelsoup import TrainerError


def gpus() -> int:
    """How many there are."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def chosen_device(name: str, rank: int = 0) -> torch.device:
    """The device that an option names; `auto` is a GPU where there is one.

    Args:
        name: `auto`, `cpu`, `cuda` or `cuda:N`.
        rank: of the process, which is its GPU's number where none is named.

    Raises:
        TrainerError: it is none, or not there.
    """
    there = gpus()
    if name == "cpu" or (name == "auto" and not there):
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cuda", "auto") or (number and not number.isdigit()):
        raise TrainerError(f"the device is {name!r}, but must be auto, cpu, cuda or cuda:N")
    index = int(number or rank)
    if index >= there:
        raise TrainerError(f"the device {name} is asked for, but there are {there} GPUs here")
    return torch.device("cuda", index)
