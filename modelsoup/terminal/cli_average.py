"""`soup average`: one checkpoint out of a training's snapshots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .cli_shared import (
    GivenPath,
    dry_run_option,
    force_option,
    json_option,
    on_integer_option,
    progress_shown,
    quiet_option,
    say,
    tell_merge,
    workers_option,
)


@click.command(no_args_is_help=True)
@click.argument("snapshots", nargs=-1, required=True, metavar="SNAPSHOT…", type=GivenPath())
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    required=True,
    type=GivenPath(),
    help="A .safetensors file; or a folder, where config and tokenizer come along.",
)
@click.option("--swa", is_flag=True, help="All count the same.  [default]")
@click.option(
    "--ema",
    type=float,
    metavar="DECAY",
    help="An exponential moving average over them, in the natural order of their names: 0.999.",
)
@click.option(
    "--post-hoc",
    type=float,
    metavar="STD",
    help="The average of this relative width, out of averages by power functions whose names end "
    "in step and width: ema-0008192-0.050.",
)
@click.option(
    "--dtype",
    metavar="DTYPE",
    help="Stored dtype of float tensors: f32, f16, bf16, ….  [default: the first snapshot's]",
)
@on_integer_option
@workers_option
@dry_run_option
@force_option
@json_option
@quiet_option
def average(
    snapshots: tuple[str, ...], output: str, swa: bool, ema: float | None,
    post_hoc: float | None, **options: Any,
) -> None:  # fmt: skip
    """Average the snapshots of a training, each read once, in the memory of a few slices.

    A pattern in quotes is expanded here, in natural order: step-2 comes before step-10.

    \b
    soup average 'run/*.safetensors' --ema 0.999 -o ema.safetensors
    """  # noqa: D301
    from ..merging import merge as engine
    from ..merging import snapshots as of
    from ..merging.recipe import Recipe

    if swa + (ema is not None) + (post_hoc is not None) > 1:
        raise click.UsageError("give one of --swa, --ema and --post-hoc")
    paths = of.found(snapshots)
    recipe: dict[str, Any] = {}
    notes = []
    if ema is not None:
        recipe["weights"] = of.ema_weights(len(paths), ema)
    elif post_hoc is not None:
        names = [path.name.removesuffix(".safetensors") for path in paths]
        recipe["weights"], apart = of.post_hoc_weights(names, post_hoc)
        notes.append(f"the average of width {post_hoc:g} is met up to {apart:.2%} of its profile")
    talks = not (options["quiet"] or options["as_json"])
    with progress_shown("averaging", shown=talks and not options["dry_run"]) as progress:
        report = engine.merge(
            paths, Path(output),
            Recipe(dtype=options["dtype"], on_integer=options["on_integer"], **recipe),
            force=options["force"], workers=options["workers"], dry_run=options["dry_run"],
            progress=progress,
        )  # fmt: skip
    tell_merge(report, options)
    for note in notes if talks else ():
        say("note", note)
