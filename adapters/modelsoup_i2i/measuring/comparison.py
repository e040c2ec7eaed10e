"""Several trainers on a user's own pictures: equal budgets, one evaluation, one table.

Each trainer and seed is a plan of one leaf, which the runner carries out: what is finished is in
the store, and what was interrupted goes on. What decides the leaves, such as the steps that the
minutes were turned into, is written down before the first of them begins.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from modelsoup import (
    Event,
    OutputError,
    ParameterError,
    build_options,
    cache_folder,
    check_apart,
    check_output,
    counted,
    get_trainer,
    open_checkpoint,
    options_as_json,
    placed,
    run,
)

from ..networks.described import parameters
from ..pictures.images import NonfiniteImageError, list_images, read_image, save_png
from ..pictures.picture import Picture
from ..pictures.transforms import Transform
from ..use.generators import find
from ..use.translate import translate
from .comparison_page import Row, page
from .comparison_plan import Asked, described, planned, save_text
from .evaluation import Sets, find_sets, paired
from .kept import Kept
from .metric_names import OFFLINE, must_be_known, must_be_many, own_names
from .metrics import Result, evaluate

RESULTS = "results.json"
_MINUTE = 60.0  # seconds

Say = Callable[[str], None]


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
    leaves = planned(asked, folder, force=force, say=say)
    say(f"{counted(len(leaves) * seeds, 'training')} of {asked.budget}: about "
        f"{_long(sum(leaf.seconds * leaf.total for leaf in leaves.values()) * seeds)}")  # fmt: skip
    built = {
        n: build_options(get_trainer(leaf.trainer), leaf.options) for n, leaf in leaves.items()
    }
    remarks = {n: described(leaf.trainer).remarks(built[n]) for n, leaf in leaves.items()}
    for remark in (f"{n}: {told}" for n, every in remarks.items() for told in every):
        say(remark)
    inputs, real = _written(sets, folder)
    rows = []
    for name, leaf in leaves.items():
        own = built[name]
        row = Row(
            name, leaf.trainer, options_as_json(own), tuple(leaf.options), leaf.total,
            leaf.seconds, leaf.memory, parameters(described(leaf.trainer).tensors(own)),
            remarks=[*remarks[name]],
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
                device=asked.device, kept=Kept(cache_folder("features"), say),
            )  # fmt: skip
            row.add(results)
            row = dataclasses.replace(row, pictures=row.pictures or made)
            say(f"{place}: {_told(results)}")
        rows.append(row)
    text = page(
        rows, inputs, real, title=f"{asked.a.name} to {asked.b.name}", budget=asked.budget,
        seeds=seeds, metrics=names, remarks=asked.remarks, command=asked.words(seeds),
    )  # fmt: skip
    save_text(folder / RESULTS, json.dumps([row.as_json() for row in rows], indent=2))
    with placed(output, force=force) as partial:
        partial.write_text(text, "utf-8")
    return rows


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
    if how.wants_reference:
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
