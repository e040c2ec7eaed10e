"""`soup lora`: low-rank adapters merged, and made of the difference of two models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..errors import counted, sized
from .cli_shared import GivenPath, echo, json_option, print_json, say, settings_given

if TYPE_CHECKING:
    from ..merging.lora import AdapterReport

_SHOWN = 5  # modules of which the error is told, unless all are asked for


def _common(command: Any) -> Any:
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Tell every module's error."),
        json_option,
        click.option("--no-fsync", is_flag=True, help="Do not wait for the disk."),
        click.option("--force", is_flag=True, help="Replace an existing output."),
        click.option("--seed", type=int, default=0, help="Seeds what is drawn at random."),
    ):
        command = option(command)
    return command


@click.group(no_args_is_help=True)
def lora() -> None:
    """Merge low-rank adapters into one, or make one of what a model was tuned to."""


@lora.command(no_args_is_help=True)
@click.argument("adapters", nargs=-1, required=True, metavar="A[=W] B[=W] …")
@click.option(
    "-o", "--output", metavar="OUT", type=GivenPath(), required=True,
    help="A folder, for PEFT's adapters; a .safetensors file, for kohya's and diffusers'.",
)  # fmt: skip
@click.option(
    "--method", metavar="NAME", default="task_arithmetic", show_default=True,
    help="See `soup methods`; any but sums merges in the core space of the adapters.",
)  # fmt: skip
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A parameter of the method."
)
@click.option(
    "--base", metavar="BASE", type=GivenPath(),
    help="The model that they are for, where they have tensors whole, such as heads.",
)  # fmt: skip
@click.option(
    "--rank", type=int, metavar="R", help="Factorise anew, to this rank.  [default: keep all]"
)
@click.option("--dtype", metavar="DTYPE", help="Of the factors.  [default: the first adapter's]")
@_common
def merge(
    adapters: tuple[str, ...], output: str, method: str, settings: tuple[str, ...],
    base: str | None, rank: int | None, dtype: str | None, seed: int, **options: Any,
) -> None:  # fmt: skip
    """Merge low-rank adapters into one: sums exactly, others in their core space.

    \b
    soup lora merge style=0.7 subject=0.3 -o both
    """  # noqa: D301
    from ..merging.lora import merge_adapters, parse_weighted
    from ..merging.values import parse_value

    given = [parse_weighted(text) for text in adapters]
    parameters = {n: parse_value(n, value) for n, value in settings_given(settings).items()}
    report = merge_adapters(
        [path for path, _ in given], output, weights=[weight for _, weight in given],
        method=method, parameters=parameters, base=base, rank=rank, dtype=dtype, seed=seed,
        force=options["force"], fsync=not options["no_fsync"],
    )  # fmt: skip
    _tell(report, options)


@lora.command(no_args_is_help=True)
@click.argument("tuned", metavar="TUNED", type=GivenPath())
@click.argument("base", metavar="BASE", type=GivenPath())
@click.option(
    "-o", "--output", metavar="OUT", type=GivenPath(), required=True, help="A folder, for PEFT."
)
@click.option(
    "--rank", type=int, metavar="R", default=16, show_default=True, help="Of the factors."
)
@click.option(
    "--whole", multiple=True, metavar="PATTERN", help="Tensors that the adapter is to have whole."
)
@click.option("--dtype", metavar="DTYPE", default="f32", show_default=True, help="Of the factors.")
@_common
def extract(
    tuned: str, base: str, output: str, rank: int, whole: tuple[str, ...], dtype: str, seed: int,
    **options: Any,
) -> None:  # fmt: skip
    """Make a low-rank adapter of what a model was tuned to.

    \b
    soup lora extract tuned base --rank 32 -o adapter
    """  # noqa: D301
    from ..merging.extraction import extract_adapter

    report = extract_adapter(
        tuned, base, output, rank=rank, whole=whole, dtype=dtype, seed=seed,
        force=options["force"], fsync=not options["no_fsync"],
    )  # fmt: skip
    _tell(report, options)


def _tell(report: AdapterReport, options: dict[str, Any]) -> None:
    if options["as_json"]:
        print_json(report.as_json())
        return
    whole = f", {counted(len(report.whole), 'tensor')} whole" if report.whole else ""
    size = sized(report.bytes_written)
    echo(f"{report.output}: {counted(len(report.fits), 'module')}{whole}, {size}")
    worst = sorted(report.fits, key=lambda fit: -fit.error)
    shown = list(report.fits) if options["verbose"] else worst[:_SHOWN]
    if not options["verbose"] and len(worst) > _SHOWN:
        echo(f"of which the {_SHOWN} that miss most (-v tells all):")
    for fit in shown:
        echo(f"  {fit.module}  rank {fit.rank}, misses {fit.error:.2%}")
    for notice in report.notices:
        say(notice.level, notice.message)
