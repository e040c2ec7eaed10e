"""`soup experts`: several tuned models in one file, and each of them out of it."""

from __future__ import annotations

from typing import Any

import click

from ..errors import counted, sized
from .cli_shared import (
    GivenPath,
    echo,
    force_option,
    json_option,
    print_json,
    progress_shown,
    quiet_option,
    say,
    settings_given,
    tell_merge,
    workers_option,
)


@click.group(no_args_is_help=True)
def experts() -> None:
    """Put several models that were tuned from one base into one file, and have each back."""


@experts.command(no_args_is_help=True)
@click.argument("models", nargs=-1, required=True, metavar="A B [C …]", type=GivenPath())
@click.option(
    "--base", metavar="BASE", type=GivenPath(), required=True, help="What they were tuned from."
)
@click.option(
    "-o", "--output", metavar="OUT", type=GivenPath(), required=True, help="A .safetensors file."
)
@click.option(
    "--method", metavar="emr|consensus", default="emr", show_default=True,
    help="By what is shared: elected signs and largest magnitudes, or the sum under TALL masks.",
)  # fmt: skip
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE",
    help="A parameter of the method: threshold=0.4, or one a model: 0.4,0.5.",
)  # fmt: skip
@click.option("--dtype", metavar="DTYPE", help="Of what is shared.  [default: the first model's]")
@force_option
@click.option("--no-fsync", is_flag=True, help="Do not wait for the disk.")
@json_option
def pack(
    models: tuple[str, ...], base: str, output: str, method: str, settings: tuple[str, ...],
    dtype: str | None, force: bool, no_fsync: bool, as_json: bool,
) -> None:  # fmt: skip
    """Put what several models were tuned to into one file.

    \b
    soup experts pack a.safetensors b.safetensors --base base.safetensors -o experts.safetensors
    """  # noqa: D301
    from ..merging.experts import pack_experts
    from ..merging.values import parse_value

    parameters = {n: parse_value(n, value) for n, value in settings_given(settings).items()}
    report = pack_experts(
        models, output, base=base, method=method, parameters=parameters, dtype=dtype, force=force,
        fsync=not no_fsync,
    )  # fmt: skip
    if as_json:
        print_json(report.as_json())
        return
    echo(
        f"{report.output}: {counted(len(report.experts), 'expert')} in "
        f"{sized(report.bytes_written)}, by themselves {sized(report.bytes_of_models)}"
    )
    for number, name in enumerate(report.experts, 1):
        echo(f"  {number}  {name}")
    for notice in report.notices:
        say(notice.level, notice.message)


@experts.command(no_args_is_help=True)
@click.argument("packed", metavar="EXPERTS", type=GivenPath())
@click.option(
    "--base", metavar="BASE", type=GivenPath(), required=True, help="What they were packed over."
)
@click.option("--expert", metavar="N|NAME", required=True, help="Which: its number, or its name.")
@click.option(
    "-o", "--output", metavar="OUT", type=GivenPath(), required=True,
    help="A .safetensors file; or a folder, where the base's config and tokenizer come along.",
)  # fmt: skip
@click.option("--dtype", metavar="DTYPE", help="Stored dtype of floats.  [default: the base's]")
@click.option("--shard-size", metavar="SIZE", help="Divide a folder's weights: 5GB, 500MB.")
@workers_option
@force_option
@click.option("--no-fsync", is_flag=True, help="Do not wait for the disk.")
@json_option
@quiet_option
def get(packed: str, no_fsync: bool, **options: Any) -> None:
    """Have one expert back, as a model.

    \b
    soup experts get experts.safetensors --base base.safetensors --expert 2 -o b.safetensors
    """  # noqa: D301
    from ..merging.experts import get_expert

    told = {name: options.pop(name) for name in ("as_json", "quiet")}
    with progress_shown("unpacking", shown=not any(told.values())) as progress:
        report = get_expert(packed, fsync=not no_fsync, progress=progress, **options)
    tell_merge(report, told)
