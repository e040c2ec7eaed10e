"""What a trainer must tell so that one of its networks can be quantised; and asking it.

Any trainer of a plan can, with four things beside `train`; nothing here knows one by name.
`session` gives a training that has not begun: which of its networks are used afterwards
(`deployed`), each as it is used, also where it is joined of several; and `run`, the trainer's own
loop with its own losses, before which one is given quantisers. `inputs` gives what such a network
is called with in use; `options_of` what a checkpoint says of the options; `multiple`, of which
heights and widths must be, where a network has no `multiple` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from modelsoup import (
    ParameterError,
    Trainer,
    TrainerError,
    build_options,
    digest_files,
    get_trainer,
    nearest,
    options_as_json,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

Report = Callable[[float | None, Mapping[str, float]], None]
Log = Callable[[str], None]

ASKED = ("session", "inputs", "options_of", "multiple")


IMAGE, CLASS = "image", "class"
Inputs = Mapping[str, "torch.Tensor"]
"""What a network is called with, in that order, by the names that an exported model has for it.

First `image`, 1 × C × H × W in [−1, 1]; then what else it takes, each 1 × …, such as `z`.
"""


class Used(Protocol):
    """A network as it is used.

    Attributes:
        module: of one network, or joined of several; with averages of weights, where there are.
    """

    module: nn.Module

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the classes, by the indices that it takes as `class`, if it takes such."""

    @property
    def noise(self) -> tuple[str, ...]:
        """Which of its inputs are noise, each number from N(0, 1)."""


class Session(Protocol):
    """A training in progress.

    Attributes:
        deployed: names of the networks that are used after the training, also of such as are joined
            of several; the first one by default.
    """

    deployed: tuple[str, ...]

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All networks by name, and those that are joined of several."""

    def in_use(self, name: str) -> Used:
        """One of those that are deployed, as it is used."""

    def as_used(self, name: str) -> nn.Module:
        """The module of one, to be given quantisers before the first step.

        Its networks are trained as they are used, in evaluation mode, and its quantisers with them.
        """

    def names_in(self, name: str) -> dict[str, str]:
        """What tensors are called in that module, by their names in the checkpoint."""

    def save(self, path: Path, *, lineage: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint of all networks, without quantisers."""

    def run(
        self, report: Report, log: Log, after_epoch: Callable[[int], None] | None = None
    ) -> dict[str, float]:
        """Train to the end, from where the work folder's state is; the last figures.

        `after_epoch(n)` is called when epoch n, from 1, has ended, before its state is kept.
        """


class Deployable(Protocol):
    """A trainer one of whose networks can be quantised."""

    name: str
    options: Any
    multiple: int

    def session(
        self, options: Any, start: Path | None, *, seed: int, frozen: Sequence[str] = (),
        work: Path | None = None,
    ) -> Session:  # fmt: skip
        """A training that has not begun. Its options have `epochs` and `lr`."""

    def inputs(self, session: Session, network: str, part: str = "train") -> Iterator[Inputs]:
        """What it is called with for each image of `train` or `test`, at the size of training.

        Sides need not be multiples of `multiple`: they are continued by reflection, and what comes
        out is cut back. Noise and classes are the same each time.
        """

    def options_of(self, checkpoint: Path) -> dict[str, Any]:
        """The options that a checkpoint decides."""


def deployable(name: str) -> Deployable:
    """A trainer by its name, one of whose networks can be quantised.

    Raises:
        TrainerError: there is none of that name, or it does not tell what is needed.
    """
    trainer = get_trainer(name)
    lacking = [asked for asked in ASKED if not hasattr(trainer, asked)]
    if lacking:
        raise TrainerError(
            f"the trainer {name!r} cannot be quantised: it does not tell {', '.join(lacking)}"
        )
    return cast(Deployable, trainer)


def identity(trainer: Deployable, options: Any) -> dict[str, Any]:
    """What of a trainer's options decides its result: by the trainer, or all of them."""
    tell = getattr(trainer, "identity", None)
    return options_as_json(options) if tell is None else dict(tell(options))


def files(trainer: Deployable, options: Any) -> list[Path]:
    """The files whose content decides the result, as far as the trainer tells them.

    Those of its training (`files`), and those that candidates are compared on (`tested_on`).
    """
    told = [getattr(trainer, name, None) for name in ("files", "tested_on")]
    return [file for tell in told if tell is not None for file in tell(options)]


def content(trainer: Deployable, options: Any) -> str:
    """One XXH3-128 of the names and the bytes of `files`.

    Raises:
        ParameterError: one of them cannot be read.
    """
    try:
        return digest_files(files(trainer, options))
    except OSError as error:
        raise ParameterError(
            f"{error.filename or 'an image'} cannot be read: {error.strerror}"
        ) from error


def must_measure(trainer: Deployable, names: Sequence[str]) -> None:
    """Check that a trainer knows some metrics of its translations; it need not know any.

    A trainer that does has `metric_names()` and `quality(options, network, images, names, part=…,
    first=…)`: values by name, of outputs (uint8, H × W × channels) for neighbours among the images
    that `inputs` gives for that part, from the one at that place on.

    Raises:
        TrainerError: it knows none.
        ParameterError: it does not know one of these.
    """
    if not names:
        return
    if not hasattr(trainer, "quality") or not hasattr(trainer, "metric_names"):
        raise TrainerError(f"the trainer {trainer.name!r} knows no metrics of its networks")
    known = trainer.metric_names()
    for name in names:
        if name not in known:
            raise ParameterError(
                f"the trainer {trainer.name!r} knows no metric {name!r}{nearest(name, known)} "
                f"(it knows {', '.join(known)})"
            )


_EPOCHS_ALONE = {"steps": None, "decay_epochs": 0, "decay_steps": 0, "halve_every": None}
"""Steps would go before epochs; and what follows a training from nothing follows no other one."""


def options_for(
    trainer: Deployable, start: Path | None, given: Mapping[str, Any], *, epochs: int, rate: float,
    folder: Path | None = None,
) -> Any:  # fmt: skip
    """A trainer's options for the epochs after quantisation.

    What the start decides (its width, say) need not be given; what is given counts.

    Args:
        trainer: whose options they are.
        start: the checkpoint that is quantised; None where it is not there yet.
        given: names and values, as in a plan.
        epochs: of the training; 0 leaves the trainer's default, for none will be made.
        rate: the learning rate; of all that are called so (`d_lr`), where they are not given.
        folder: what its paths are relative to; None is the current folder.

    Raises:
        TrainerError: an unknown option, or a value of the wrong type.
        SoupError: the start is no checkpoint of this trainer.
    """
    for name, instead in (("epochs", "epochs"), ("lr", "rate")):
        if name in given:
            raise TrainerError(
                f"{name!r} of the trainer {trainer.name!r} is what openvino-qat calls {instead!r}: "
                f"give that"
            )
    known = {} if start is None else trainer.options_of(start)
    names = {option.name for option in fields(trainer.options)}
    usual: dict[str, Any] = {name: rate for name in names if name.endswith("_lr")}
    of_training: dict[str, Any] = {"lr": rate}
    if epochs:
        of_training["epochs"] = epochs
        usual |= {name: value for name, value in _EPOCHS_ALONE.items() if name in names}
    return build_options(cast(Trainer, trainer), {**usual, **known, **given, **of_training}, folder)


def chosen_network(session: Session, wanted: str | None) -> str:
    """Which network is quantised: the one that is wanted, or the first that is deployed.

    Raises:
        TrainerError: it is none of those that are deployed.
    """
    if wanted is None:
        return session.deployed[0]
    if wanted not in session.deployed:
        raise TrainerError(
            f"no deployed network is called {wanted!r}{nearest(wanted, session.deployed)} (there "
            f"are {', '.join(session.deployed)})"
        )
    return wanted
