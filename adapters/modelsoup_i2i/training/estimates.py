"""How much memory a training will need, before its first step.

A step is made with fake tensors, which have shapes and no values: what it keeps for its backward
passes is counted. To that comes what lasts: weights, averages, optimisers' states, gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelsoup import TrainerError

from .cast import how_trained
from .description import Description
from .players import Player
from .pool import ImagePool
from .stage import Stage, prepare
from .turns import Batch, Loss

KEPT_BY_OPTIMISERS = {"SGD": 0, "RMSprop": 1, "Adagrad": 1}
"""Numbers for each parameter; others keep two, as Adam does."""
_MEANWHILE = 4  # times the largest thing that is kept: gradients on their way, and workspace
_LARGE, _MANY = 128 * 128, 4_000_000  # pixels of a batch, parameters
_LOADED = 150 << 20  # bytes that torch and its kernels take beside all that


@dataclass(frozen=True)
class Memory:
    """Bytes that a training needs.

    Attributes:
        lasting: weights, averages, optimisers' states and gradients.
        passing: what a step keeps until it has gone back through it, at the highest.
        pools: images that were made before.
    """

    lasting: int
    passing: int
    pools: int

    @property
    def total(self) -> int:
        """With what torch itself takes."""
        return self.lasting + self.passing + self.pools + _LOADED


def memory(
    trainer: Description, options: Any, weights: Mapping[str, float],
    drawn: Mapping[str, torch.Tensor], *, device: torch.device, early: bool, last: int,
) -> Memory | None:  # fmt: skip
    """What a training will need; None where a loss cannot be made without values.

    Args:
        trainer: tells what there is.
        options: of the training.
        weights: of the losses' terms.
        drawn: a batch, of which the shapes count.
        device: where it will run.
        early: optimisers are applied within the backward pass.
        last: the number of the last step, whose turns may be others than the first one's.
    """
    # Their import takes a second.
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )

    players = trainer.players(options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        networks = {name: network.build() for name, network in trainer.networks(options).items()}
        stage = Stage(options, weights, {name: ImagePool(0, 0) for name in trainer.pools(options)})
        for name, network in networks.items():
            prepare(network.train(), **how_trained(options, device))
            stage.put(name, network)
        for name, one in trainer.joined(options).items():
            stage.put(name, one.build(networks))
        passing = 0
        several: set[str] = set()
        for step in (0, last):
            batch = Batch({name: torch.empty_like(values) for name, values in drawn.items()})
            for turn in trainer.turns(options, step):
                if len(turn.losses) > 1:
                    several |= {*turn.players}
                for loss in turn.losses:
                    try:
                        with torch.autocast("cpu", torch.bfloat16, options.precision == "bf16"):
                            passing = max(passing, _kept(loss, stage, batch))
                    except (DataDependentOutputException, DynamicOutputShapeException):
                        return None
    lasting = sum(
        _lasting(player, networks, early=early, summed=name in several)
        for name, player in players.items()
    )
    moved = {name for player in players.values() for name in player.networks}
    lasting += sum(
        tensor.nbytes for name, network in networks.items() if name not in moved
        for tensor in network.state_dict().values()
    )  # fmt: skip
    images = [values for values in drawn.values() if values.ndim == 4]
    image = max((values[0].numel() * 4 for values in images), default=0)
    kept = sum(trainer.pools(options).values()) * image
    return Memory(lasting, passing, kept)


def _kept(loss: Loss, stage: Stage, batch: Batch) -> int:
    """Bytes of what a loss keeps for its backward pass, each once, and of what that needs."""
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(stage, batch)
    return sum(found.values()) + _MEANWHILE * max(found.values(), default=0)


def _lasting(
    player: Player, networks: Mapping[str, nn.Module], *, early: bool, summed: bool
) -> int:
    own = [p for name in player.networks for p in networks[name].parameters()]
    held = [t for name in player.networks for t in networks[name].state_dict().values()]
    weights: int = sum(tensor.nbytes for tensor in held)
    sizes: list[int] = [parameter.nbytes for parameter in own]
    gradients = max(sizes, default=0) if early and not summed else sum(sizes)
    state = KEPT_BY_OPTIMISERS.get(player.optimiser, 2) * sum(sizes)
    return weights * (1 + (player.ema is not None)) + gradients + state


def free(device: torch.device) -> int | None:
    """Bytes that a training may still take; None where nobody tells."""
    if device.type == "cuda":
        there: int = torch.cuda.mem_get_info(device)[0]
        return there
    limits = [_number(Path("/proc/meminfo"), "MemAvailable:", 1 << 10)]
    container = Path("/sys/fs/cgroup")
    most = _number(container / "memory.max", "", 1)
    if most is not None:
        limits.append(most - (_number(container / "memory.stat", "anon ", 1) or 0))
    return min((limit for limit in limits if limit is not None), default=None)


def _number(path: Path, before: str, unit: int) -> int | None:
    """What a line that begins so says; None where there is no such file, line or number."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    words = [line.removeprefix(before).split() for line in lines if line.startswith(before)]
    return int(words[0][0]) * unit if words and words[0][0].isdigit() else None


def is_worth_telling(networks: Mapping[str, nn.Module], pixels: int) -> bool:
    """Whether a training may need so much that it is worth the second that an estimate takes."""
    return pixels >= _LARGE or sum(p.numel() for n in networks.values() for p in n.parameters()) > (
        _MANY
    )


def must_suffice(needed: Memory, there: int | None, where: str) -> str:
    """What the log says of it.

    Raises:
        TrainerError: there is less; the message says what needs less.
    """
    said = f"about {needed.total / 1e9:.1f} GB of memory are needed"
    if there is None:
        return said
    if needed.total > there:
        raise TrainerError(
            f"{said} on {where}, and {there / 1e9:.1f} GB are free: a smaller crop_size, batch "
            f"(with accumulate in its place) or width needs less"
        )
    return f"{said}, {there / 1e9:.1f} GB are free"
