"""`soup i2i compare`: several trainers on a user's own pictures, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from modelsoup import ParameterError, parse_yaml, print_json, printable

from .cli_shared import DEVICE, FORCE, PATH, needed, say


@click.command(no_args_is_help=True)
@click.argument("a", metavar="A", type=PATH)
@click.argument("b", metavar="B", type=PATH)
@click.option(
    "--trainers", required=True, metavar="NAME,NAME,…",
    help="Which; CALLED=NAME calls one otherwise, so that a trainer may come twice.",
)  # fmt: skip
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), metavar="M",
    help="How long each trains: so many steps as fit in, by a measurement first.",
)  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(min=1), metavar="N", help="In place of it, how many steps."
)
@click.option("-o", "--output", required=True, metavar="PAGE.html", type=PATH, help="The page.")
@click.option(
    "--seeds", type=click.IntRange(min=1), default=1, show_default=True, metavar="K",
    help="Train each so often, by the seeds from 0 on.",
)  # fmt: skip
@click.option(
    "--size", type=click.IntRange(min=8), default=256, show_default=True, metavar="N",
    help="Pictures come to N × N, in training and in tests.",
)  # fmt: skip
@click.option(
    "--set", "settings", multiple=True, metavar="[NAME.]OPTION=VALUE",
    help="An option of one of them, or of all that have it: cut.width=16, batch=4.",
)  # fmt: skip
@click.option(
    "--test-a", type=PATH, metavar="DIR",
    help="Test pictures of A.  [default: testA beside trainA, or else A]",
)  # fmt: skip
@click.option("--test-b", type=PATH, metavar="DIR", help="Likewise of B.")
@click.option(
    "--metrics", metavar="NAME,NAME,…",
    help="See docs/i2i_metrics.md.  [default: those that need no weights but a package's]",
)  # fmt: skip
@click.option(
    "--extractor", type=PATH, metavar="FILE",
    help="A classifier (soup train classifier), for fd-NAME and kd-NAME. NAME is the file's.",
)  # fmt: skip
@click.option(
    "--store", type=PATH, default=".soup-store", show_default=True, metavar="DIR",
    help="Where finished trainings are kept.",
)  # fmt: skip
@DEVICE
@FORCE
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON, too.")
def compare(
    a: Path,
    b: Path,
    trainers: str,
    minutes: float | None,
    steps: int | None,
    output: Path,
    seeds: int,
    size: int,
    settings: Sequence[str],
    test_a: Path | None,
    test_b: Path | None,
    metrics: str | None,
    extractor: Path | None,
    store: Path,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    """Train several trainers on two folders of pictures, alike, and write a page on them.

    Run it again after any interruption, and it goes on.

    \b
    soup i2i compare A B --trainers cyclegan,munit --minutes 30 -o report.html
    """  # noqa: D301
    called = _trainers(trainers)
    names = None if metrics is None else [n for name in metrics.split(",") if (n := name.strip())]
    if names is not None and not names:
        raise ParameterError("--metrics names none: leave it out for those that need no weights")
    with needed("i2i"):
        from .measuring.comparison import compare as run
        from .measuring.comparison_plan import Asked
    asked = Asked(
        a, b, called, minutes, steps, size, _settings(settings, called), test_a, test_b, device
    )  # fmt: skip
    rows = run(
        asked, output, seeds=seeds, metrics=names, extractor=extractor, store=store, force=force,
        say=say,
    )  # fmt: skip
    if as_json:
        print_json([row.as_json() for row in rows])
    else:
        click.echo(printable(f"{output}"))


def _trainers(text: str) -> dict[str, str]:
    """What each is called → the trainer's name."""
    found: dict[str, str] = {}
    for word in text.split(","):
        called, equals, name = (part.strip() for part in word.partition("="))
        name = name if equals else called
        if not called or not name:
            raise ParameterError(f"--trainers has {word!r}, but must be NAME or CALLED=NAME")
        if called in found:
            raise ParameterError(
                f"--trainers has {called!r} twice: call one of them otherwise, as in "
                f"other={found[called]}"
            )
        if not called.replace("-", "").replace("_", "").isalnum():
            raise ParameterError(
                f"--trainers calls one {called!r}, but files are called so: letters, digits, - "
                f"and _ are expected, as in own={name}"
            )
        found[called] = name
    return found


def _settings(settings: Sequence[str], called: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Options by what their trainer is called, or by nothing for all."""
    found: dict[str, dict[str, Any]] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        whose, dot, option = (part.strip() for part in name.rpartition("."))
        if not equals or not option or (dot and not whose):
            raise ParameterError(f"--set has {setting!r}, but must be [NAME.]OPTION=VALUE")
        found.setdefault(whose, {})[option] = parse_yaml(text, f"--set {name}").content
    return found
