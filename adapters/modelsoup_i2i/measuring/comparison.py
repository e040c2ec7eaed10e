"""Several trainers on a user's own pictures: equal budgets, one evaluation, one table.

Each trainer and seed is a plan of one leaf, which the runner carries out: what is finished is in
the store, and what was interrupted goes on. What decides the leaves, such as the steps that the
minutes were turned into, is written down before the first of them begins.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelsoup import (
    Event,
    OutputError,
    ParameterError,
    SoupError,
    Train,
    Training,
    Tree,
    binary_tree,
    build_options,
    check_apart,
    check_output,
    counted,
    get_trainer,
    nearest,
    open_checkpoint,
    options_as_json,
    placed,
    run,
    trainer_names,
)

from ..networks.described import parameters
from ..pictures.images import NonfiniteImageError, list_images, read_image, save_png
from ..pictures.picture import Picture
from ..pictures.transforms import Transform
from ..use.generators import find
from ..use.translate import translate
from .comparison_page import Row, page
from .cost import cost
from .evaluation import Sets, find_sets, paired
from .kept import Kept, features_folder
from .metric_names import OFFLINE, must_be_known, must_be_many, own_names
from .metrics import Result, evaluate

PLAN, RESULTS = "plan.json", "results.json"
_FORMAT = 1
_OURS = ("data_a", "data_b", "steps", "epochs", "decay_steps", "decay_epochs", "halve_every",
         "load_size", "crop_size", "size", "device")  # fmt: skip
_LOADED = 286 / 256  # of the size, by which pictures are larger before they are cropped
_MINUTE = 60.0  # seconds
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


def compare(
    asked: Asked, output: Path, *, seeds: int = 1, metrics: Sequence[str] | None = None,
    extractor: Path | None = None, store: Path = Path(".soup-store"), force: bool = False,
    say: Say = lambda _: None,
) -> list[Row]:  # fmt: skip
    """Train, translate the test pictures from A to B, measure, and write a page.

    Beside the page, in a folder of its name, are the plan, the models, their translations, and the
    results as JSON. Called again after an interruption, it goes on.

    Args:
        asked: what is compared.
        output: the page, `.html`.
        seeds: how often each is trained, by the seeds from 0 on.
        metrics: see `metrics.evaluate`; None for those that need no weights but a package's.
        extractor: likewise.
        store: of finished trainings.
        force: replace a page, and a plan of something else.
        say: is told how far it is.

    Raises:
        ParameterError: a trainer that cannot take part, or an option that none has.
        SoupError: folders, pictures, weights of a metric or the output are not as they must be; or
            a training failed.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"the page {output} must end in .html")
    check_output(output, force=force, kind="file")
    sets = find_sets(asked.tests, transform=_transform(asked.size))
    names = _metrics(metrics, extractor, has_truth=sets.truth is not None)
    _must_suffice(sets, names)
    sets.must_allow([name for name in names if name not in own_names(extractor)])
    folder = output.with_suffix("")
    check_apart(folder, [asked.a, asked.b, *asked.tests], what="folder beside the page,")
    leaves = _planned(asked, folder, force=force, say=say)
    say(f"{counted(len(leaves) * seeds, 'training')} of {asked.budget}: about "
        f"{_long(sum(leaf.seconds * leaf.total for leaf in leaves.values()) * seeds)}")  # fmt: skip
    inputs, real = _written(sets, folder)
    rows = []
    for name, leaf in leaves.items():
        own = build_options(get_trainer(leaf.trainer), leaf.options)
        row = Row(
            name, leaf.trainer, options_as_json(own), tuple(leaf.options), leaf.total,
            leaf.seconds, leaf.memory, parameters(_described(leaf.trainer).tensors(own)),
        )  # fmt: skip
        for seed in range(seeds):
            place = f"{name}-{seed}"
            model = folder / "models" / f"{place}.safetensors"
            model.parent.mkdir(exist_ok=True)
            report = run(
                leaf.tree(name, seed), model, store=store, force=True,
                shown=folder / "shown" / place, watch=_watch(place, say),
            )  # fmt: skip
            record = report.records[name]
            row.took.append(float(record["seconds"]))
            if record["metrics"].get("diverged"):
                row.remarks.append(f"seed {seed} diverged")
            try:
                made = _translated(model, inputs, real, folder / "translations" / place, asked)
            except NonfiniteImageError:
                row.remarks.append(f"translations of seed {seed} hold NaN or infinity")
                continue
            truth = paired(list_images(made), made, real)
            results = evaluate(
                made, real, inputs=inputs, metrics=names, extractor=extractor,
                truth=None if truth is None else [read_image(file) for file in truth],
                device=asked.device, kept=Kept(features_folder(), say),
            )  # fmt: skip
            row.add(results)
            row = dataclasses.replace(row, pictures=row.pictures or made)
            say(f"{place}: {_told(results)}")
        rows.append(row)
    text = page(
        rows, inputs, real, title=f"{asked.a.name} to {asked.b.name}", budget=asked.budget,
        seeds=seeds, metrics=names, remarks=asked.remarks, command=asked.words(seeds),
    )  # fmt: skip
    _save(folder / RESULTS, json.dumps([row.as_json() for row in rows], indent=2))
    with placed(output, force=force) as partial:
        partial.write_text(text, "utf-8")
    return rows


# The plan


def _planned(asked: Asked, folder: Path, *, force: bool, say: Say) -> dict[str, Leaf]:
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
        found = cost(trainer, _scheduled(trainer, options, look))
        total = asked.steps or max(1, int((asked.minutes or 0) * 60 / found.seconds))
        leaves[name] = Leaf(
            trainer, _scheduled(trainer, options, total), found.seconds, found.memory, total
        )
        say(f"{name}: {found.seconds:.3g} s a step, {found.memory / 1e9:.2f} GB; "
            f"{counted(total, 'step')}")  # fmt: skip
    folder.mkdir(exist_ok=True)
    plain = {name: dataclasses.asdict(leaf) for name, leaf in leaves.items()}
    _save(place, json.dumps({"format": _FORMAT, "asked": told, "leaves": plain}, indent=2))
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
        _described(trainer).images(built)
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


def _scheduled(trainer: str, options: Mapping[str, Any], total: int) -> dict[str, Any]:
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


def _fields(trainer: str) -> set[str]:
    return {own.name for own in dataclasses.fields(get_trainer(trainer).options)}


# Measuring


def _metrics(
    metrics: Sequence[str] | None, extractor: Path | None, *, has_truth: bool
) -> Sequence[str]:
    """Those that are asked for, or that need no weights but a package's."""
    own = own_names(extractor)
    if metrics is None:
        without = () if has_truth else ("_to_truth", "psnr", "ssim")
        metrics = [*(name for name in OFFLINE if not name.endswith(without)), *own]
    must_be_known(metrics, extractor)
    if extractor is not None:
        open_checkpoint(extractor)
    return metrics


def _must_suffice(sets: Sets, names: Sequence[str]) -> None:
    """Raise a ParameterError for metrics of more pictures than there are, with what would do."""
    said, enough = [], []
    for name in names:
        try:
            must_be_many(name, len(sets.inputs), len(sets.real))
            enough.append(name)
        except ParameterError as error:
            said.append(str(error))
    if said:
        fewer = f", or measure what needs fewer: --metrics {','.join(enough)}" if enough else ""
        raise ParameterError(
            f"{said[0]}: name folders of more test pictures with --test-a and --test-b{fewer}"
        )


def _transform(size: int) -> Transform:
    return Transform(load=(size, size), crop=(size, size), flip=False)


def _written(sets: Sets, folder: Path) -> tuple[Path, Path]:
    """The test pictures at the size of training: what is translated, and what is real."""
    made = []
    every = [[Path(str(file)).relative_to(root) for file in files] for files, root in
             zip((sets.inputs, sets.real), sets.folders, strict=True)]  # fmt: skip
    # Beside a.jpg, a.png keeps its suffix, and so do all others, that pairs stay pairs.
    keep = any(len({own.with_suffix("") for own in names}) < len(names) for names in every)
    for name, files, names in zip(("inputs", "real"), (sets.inputs, sets.real), every, strict=True):
        with placed(folder / name, force=True) as partial:
            partial.mkdir()
            for own, picture in zip(names, _read(sets, files), strict=True):
                called = f"{own.name}.png" if keep else f"{own.stem}.png"
                place = partial / own.with_name(called)
                place.parent.mkdir(parents=True, exist_ok=True)
                save_png(picture, place)
        made.append(folder / name)
    return made[0], made[1]


def _read(sets: Sets, files: Sequence[Picture]) -> Iterator[Any]:
    return (own for file in files for own in sets.read([file]))


def _translated(model: Path, inputs: Path, real: Path, output: Path, asked: Asked) -> Path:
    """Test pictures of A as such of B; of what must see a reference, each like a real one."""
    how = find(model).how
    options: dict[str, Any] = {"classes": "B"} if how.classes else {}
    if how.style is not None and not how.style.noise:
        options["reference"] = real
    output.parent.mkdir(exist_ok=True)
    with placed(output, force=True) as partial:  # none of other test pictures stay
        translate(model, inputs, partial, device=asked.device, **options)
    return output


def _told(results: Sequence[Result]) -> str:
    return ", ".join(f"{result.name} {result.value:.4g}" for result in results)


def _watch(place: str, say: Say) -> Callable[[Event], None]:
    """Tells states, and once a minute how far a training is."""
    last: tuple[str, float] = "", 0.0

    def told(event: Event) -> None:
        nonlocal last
        now = time.monotonic()
        if event.state == last[0] and now - last[1] < _MINUTE:
            return
        last = event.state, now
        done = "" if event.done is None else f", {event.done:.0%}"
        left = "" if event.seconds_left is None else f", {_long(event.seconds_left)} left"
        say(f"{place}: {event.state}{done}{left}")

    return told


def _long(seconds: float) -> str:
    """In the unit that fits."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _save(place: Path, text: str) -> None:
    with placed(place, force=True) as partial:
        partial.write_text(f"{text}\n", "utf-8")
