"""What a comparison is of: how each trainer is trained, of equal budgets, before any of them is.

What decides the trainings, such as the steps that minutes were turned into, is written down, so
that a comparison that goes on is of the same ones.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelsoup import (
    OutputError,
    ParameterError,
    SoupError,
    Train,
    Training,
    Tree,
    binary_tree,
    build_options,
    counted,
    get_trainer,
    nearest,
    placed,
    trainer_names,
)

from .cost import cost

PLAN = "plan.json"
_FORMAT = 1
_OURS = ("data_a", "data_b", "steps", "epochs", "decay_steps", "decay_epochs", "halve_every",
         "load_size", "crop_size", "size", "device")  # fmt: skip
_LOADED = 286 / 256  # of the size, by which pictures are larger before they are cropped
_LONG, _LEAST = 1_000_000, 10  # steps of a training that is only looked at

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What is compared.

    Attributes:
        a: the folder of training pictures of A …
        b: … and of B.
        trainers: what each is called in the table → the trainer's name.
        minutes: that each leaf trains; or …
        steps: … its steps.
        size: the side to which pictures come, of all trainers and of the evaluation.
        settings: options by what a trainer is called; `""` is for all that have them.
        test_a: the folder of test pictures of A; None is `testA` beside `trainA`, or else A.
        test_b: likewise.
        device: where is trained and measured.
    """

    a: Path
    b: Path
    trainers: Mapping[str, str]
    minutes: float | None = None
    steps: int | None = None
    size: int = 256
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    test_a: Path | None = None
    test_b: Path | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ParameterError(
                "the budget of each training is --minutes or --steps: give one of the two"
            )
        if (self.test_a is None) != (self.test_b is None):
            raise ParameterError("--test-a and --test-b, the folders of test images, go together")

    @property
    def tests(self) -> tuple[Path, Path]:
        """The folders of test pictures."""
        if self.test_a is not None and self.test_b is not None:
            return self.test_a, self.test_b
        beside = self.a.parent / "testA", self.b.parent / "testB"
        if (self.a.name, self.b.name) == ("trainA", "trainB") and all(map(Path.is_dir, beside)):
            return beside
        return self.a, self.b

    @property
    def remarks(self) -> list[str]:
        """What whoever reads the table must know."""
        if self.tests != (self.a, self.b):
            return []
        return [
            "There are no test pictures: the models are measured on what they were trained on, and "
            "whichever remembers that is better off."
        ]

    @property
    def budget(self) -> str:
        """Of each training."""
        if self.minutes is not None:
            return f"{self.minutes:g} {'minute' if self.minutes == 1 else 'minutes'}"
        return counted(self.steps or 0, "step")

    def as_json(self) -> dict[str, Any]:
        """Plain data; folders are absolute."""
        plain = dataclasses.asdict(self)
        return {name: str(value.absolute()) if isinstance(value, Path) else value
                for name, value in plain.items()}  # fmt: skip

    def words(self, seeds: int) -> str:
        """The command that asks for it."""
        told = ["soup", "i2i", "compare", str(self.a), str(self.b), "--trainers",
                ",".join(own if own == name else f"{name}={own}"
                         for name, own in self.trainers.items())]  # fmt: skip
        told += ["--steps", str(self.steps)] if self.minutes is None else (
            ["--minutes", f"{self.minutes:g}"])  # fmt: skip
        told += ["--size", str(self.size), "--seeds", str(seeds)]
        if self.test_a is not None:
            told += ["--test-a", str(self.test_a), "--test-b", str(self.test_b)]
        for name, options in self.settings.items():
            own = f"{name}." if name else ""
            told += [word for option, value in options.items()
                     for word in ("--set", f"{own}{option}={json.dumps(value)}")]  # fmt: skip
        return shlex.join(told)


@dataclass(frozen=True)
class Leaf:
    """How one of the trainers is trained.

    Attributes:
        trainer: its name.
        options: what it is told, but for the seed.
        seconds: of a step.
        memory: bytes at the most.
        total: steps.
    """

    trainer: str
    options: Mapping[str, Any]
    seconds: float
    memory: int
    total: int

    def tree(self, name: str, seed: int) -> Tree:
        """The plan of one training; weights, too, begin by the seed."""
        options = dict(self.options)
        if "init" in _fields(self.trainer):
            options.setdefault("init", seed)
        return binary_tree({name: Train(Training(self.trainer, options, seed=seed))})


def planned(asked: Asked, folder: Path, *, force: bool, say: Say) -> dict[str, Leaf]:
    """How each is trained: as it was written down, or else measured now."""
    place, told = folder / PLAN, json.loads(json.dumps(asked.as_json()))
    _must_be_set(asked)
    given = {name: _options(asked, name) for name in asked.trainers}
    if folder.is_dir() and any(folder.iterdir()) and not place.is_file():
        raise OutputError(
            f"the folder {folder}, for what belongs to the page, holds something else: name "
            f"another page"
        )
    if place.is_file():
        try:
            kept = json.loads(place.read_text("utf-8"))
            if kept["format"] == _FORMAT and kept["asked"] == told:
                return {name: Leaf(**leaf) for name, leaf in kept["leaves"].items()}
            before = kept["asked"]
        except (ValueError, TypeError, KeyError) as error:
            raise OutputError(f"{place} is damaged: remove it to begin again ({error})") from error
        if not force:
            other = [n for n in told if before.get(n) != told[n]]
            raise OutputError(
                f"{place} is of another comparison, with other {', '.join(other)}: name another "
                f"page, or replace it with --force"
            )
    leaves = {}
    for name, trainer in asked.trainers.items():
        options = given[name]
        look = max(asked.steps or _LONG, _LEAST)
        found = cost(trainer, scheduled(trainer, options, look))
        total = asked.steps or max(1, int((asked.minutes or 0) * 60 / found.seconds))
        leaves[name] = Leaf(
            trainer, scheduled(trainer, options, total), found.seconds, found.memory, total
        )
        say(f"{name}: {found.seconds:.3g} s a step, {found.memory / 1e9:.2f} GB; "
            f"{counted(total, 'step')}")  # fmt: skip
    folder.mkdir(exist_ok=True)
    plain = {name: dataclasses.asdict(leaf) for name, leaf in leaves.items()}
    save_text(place, json.dumps({"format": _FORMAT, "asked": told, "leaves": plain}, indent=2))
    return leaves


def _options(asked: Asked, name: str) -> dict[str, Any]:
    """What a trainer is told, but for how long; checked, with its pictures."""
    trainer = asked.trainers[name]
    _must_take_part(trainer)
    fields = _fields(trainer)
    common = {n: v for n, v in asked.settings.get("", {}).items() if n in fields}
    own = {**common, **asked.settings.get(name, {})}
    for option in own:
        if option in _OURS:
            raise ParameterError(
                f"--set {option}: the comparison itself says it, so that it is one for all"
            )
    options = {
        "data_a": str(asked.a.absolute()), "data_b": str(asked.b.absolute()),
        "device": asked.device, "sheet_every": 0,
    }  # fmt: skip
    if "size" in fields:
        options["size"] = asked.size
    else:
        options |= {"load_size": round(asked.size * _LOADED), "crop_size": asked.size}
    options = {n: v for n, v in {**options, **own}.items() if n in fields or n in own}
    try:
        built = build_options(get_trainer(trainer), options)
        described(trainer).images(built)
    except SoupError as error:
        raise type(error)(*(f"{name}: {line}" for line in error.args)) from None
    return options


def _must_take_part(trainer: str) -> None:
    """Raise a ParameterError for a trainer that does not translate between two folders."""
    if _takes_part(get_trainer(trainer)):
        return
    fit = []
    for name in trainer_names():
        try:
            fit += [name] if _takes_part(get_trainer(name)) else []
        except SoupError:  # a package of somebody else's that is broken
            continue
    raise ParameterError(
        f"the trainer {trainer!r} does not learn to translate between two folders of pictures "
        f"({', '.join(fit)} do)"
    )


def _takes_part(trainer: Any) -> bool:
    fields = {own.name for own in dataclasses.fields(trainer.options)}
    if not {"data_a", "data_b", "steps"} <= fields or not hasattr(trainer, "probe"):
        return False
    own = trainer.options()
    drawn = {name for draw in trainer.draws(own) for name in getattr(draw, "sets", ())}
    return any(how.source in drawn for how in trainer.translators(own).values())


def _must_be_set(asked: Asked) -> None:
    """Raise a ParameterError for options that nobody has."""
    for name in asked.settings:
        if name and name not in asked.trainers:
            raise ParameterError(
                f"--set {name}.…: {name!r} is not compared{nearest(name, asked.trainers)} (there "
                f"are {', '.join(asked.trainers)})"
            )
    known = set().union(*map(_fields, asked.trainers.values()))
    for option in asked.settings.get("", {}):
        if option not in known:
            raise ParameterError(
                f"--set {option}: no trainer that is compared has such an option"
                f"{nearest(option, known)}"
            )


def scheduled(trainer: str, options: Mapping[str, Any], total: int) -> dict[str, Any]:
    """Options of so many steps: the rate falls in as large a part of them as it usually does."""
    o = build_options(get_trainer(trainer), options)
    whole, falling = o.epochs + o.decay_epochs, o.decay_epochs
    if o.steps is not None:
        whole, falling = o.steps + o.decay_steps, o.decay_steps
    decay = min(total * falling // whole, total - 1)
    made = {**options, "steps": total - decay}
    if o.decay_epochs:
        made["decay_epochs"] = 0
    if decay or o.decay_steps:
        made["decay_steps"] = decay
    if o.halve_every is not None:
        made["halve_every"] = max(1, total * o.halve_every // whole)
    return made


def _described(trainer: str) -> Any:
    return get_trainer(trainer)


def described(trainer: str) -> Any:
    """A trainer of images, which tells more than the core asks."""
    return get_trainer(trainer)


def _fields(trainer: str) -> set[str]:
    return {own.name for own in dataclasses.fields(get_trainer(trainer).options)}


def save_text(place: Path, text: str) -> None:
    with placed(place, force=True) as partial:
        partial.write_text(f"{text}\n", "utf-8")
