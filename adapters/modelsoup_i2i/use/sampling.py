"""Pictures that a model makes of noise alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from modelsoup import MismatchError, ParameterError

from ..pictures.images import CHANNELS, save_picture
from .generators import load_model
from .models import ALL, AT_ONCE, Wanted
from .pages import must_be_page, sampled
from .places import pictures_in
from .translate import channels_of, device_called, folder_of, must_be_batch


def sample(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    classes: str | Sequence[str] | None = None,
    count: int = 16,
    seed: int = 0,
    without_source: bool = False,
    sheet: bool = False,
    batch: int = AT_ONCE,
    device: str = "auto",
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Have a model make pictures of noise, in a folder as `1.png` and so on, or on one page.

    What PNG cannot hold, for it has other channels than 1, 3 or 4, is `1.npy`. Only one batch is in
    memory, but for a page. They are put in place when all are made.

    Args:
        model: a checkpoint with a generator.
        output: a folder; for a page a `.png` file, beside which a `.csv` tells what is on it.
        classes: of a model of classes, which one; or a list, or `all`, each of which becomes a
            folder in the output, or a row of the page.
        count: of each class.
        seed: of the noise; the n-th picture of each class has the same.
        without_source: of a model that translates, its generator alone: nothing is added to what
            it makes of noise.
        sheet: one page.
        batch: how many are made at a time.
        device: where, as torch names it; `auto` is a GPU where there is one.
        force: replace pictures that exist.
        progress: is told how many are done, and of how many.

    Returns:
        the files that were written.

    Raises:
        ParameterError: a count or a batch below 1, a device that is not there, or a class that is
            lacking, unknown, or named though there are none.
        OutputError: an output exists, or cannot be written.
        MismatchError: the model makes no pictures of noise.
    """
    output = Path(output)
    if count < 1:
        raise ParameterError(f"the number of pictures is {count}, where at least 1 is expected")
    must_be_batch(batch)
    place = device_called(device)
    if sheet:
        must_be_page(output, force=force)
    suffix = ".png" if channels_of(model) in CHANNELS else ".npy"
    own = load_model(str(model))
    if without_source:
        own = own.without_source()
    if own.how.source is not None:
        raise MismatchError(
            f"{own.called} translates pictures, and makes none of noise alone"
            + (": --source none has its generator make some" if own.how.alone else "")
        )
    if not own.how.has_noise:
        raise MismatchError(f"{own.called} takes no noise: it makes one picture")
    labels = own.labels(classes)
    own.to(place)
    if sheet:
        sampled(own, labels, count, seed=seed).save(output, model=str(model), force=force)
        return [output]
    flat = classes is None or (isinstance(classes, str) and classes != ALL)
    named = [
        (Path("" if flat else folder_of(own, label)) / f"{n + 1}{suffix}", label, n)
        for label in labels or [0] for n in range(count)
    ]  # fmt: skip
    wanted = (Wanted(None, own.given([""], label, seed=seed, sample=n)) for _, label, n in named)
    with pictures_in(output, [name for name, _, _ in named], force=force) as partials:
        results = own.each(wanted, batch)
        for done, (partial, result) in enumerate(zip(partials, results, strict=True), 1):
            save_picture(result, partial)
            if progress is not None:
                progress(done, len(named))
    return [output / name for name, _, _ in named]
