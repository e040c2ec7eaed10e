"""`soup i2i modalities`: which picture is of which modality, for people and for other trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from modelsoup import OutputError, ParameterError, check_output, counted, printable

from .cli_shared import DEVICE, FORCE, PATH, needed, say

_SIDE = 128  # of pictures on a page


@click.command(no_args_is_help=True)
@click.argument("model", type=PATH)
@click.argument("source", metavar="IN", type=PATH)
@click.option(
    "-o", "--output", metavar="OUT", type=PATH,
    help="A .json or .csv file; or a folder with a folder for each modality.",
)  # fmt: skip
@click.option("--b", "b", metavar="IN_B", type=PATH, help="Pictures of B; IN has those of A.")
@click.option(
    "--as", "kind", type=click.Choice(["json", "csv", "folders"]),
    help="What OUT is.  [default: by its suffix]",
)  # fmt: skip
@click.option("--copy", is_flag=True, help="Into folders: copies of pictures, not links.")
@click.option(
    "--montage", metavar="PAGE.png", type=PATH, help="A page with a row for each modality."
)
@click.option("--columns", default=10, show_default=True, help="Pictures of a row.")
@click.option(
    "--labels", type=PATH, metavar="FILE",
    help="Known classes of IN's pictures, path,label: how well modalities agree with them.",
)  # fmt: skip
@DEVICE
@FORCE
def modalities(
    model: Path,
    source: Path,
    output: Path | None,
    b: Path | None,
    kind: str | None,
    copy: bool,
    montage: Path | None,
    columns: int,
    labels: Path | None,
    device: str,
    force: bool,
) -> None:
    """Label a folder's pictures by modality.

    MODEL is what the trainer modality made. Or it says the modalities itself: a modalities.json, a
    CSV file path,label, or a folder with a folder for each.
    """
    with needed("i2i"):
        from .measuring.modalities import figures, told, warnings
        from .pictures.images import list_images
        from .pictures.modalities import Domain, read_modalities
        from .pictures.sheets import save
        from .use import modalities as use
    as_kind = _kind(output, kind)
    if output is None and (kind is not None or copy):
        raise ParameterError(f"{'--copy' if copy else '--as'} is for OUT: name it with -o")
    if copy and as_kind != "folders":
        raise ParameterError("--copy is for folders: a file has no pictures")
    if columns < 1:
        raise ParameterError(f"--columns is {columns}, where at least 1 is expected")
    if montage is not None and montage.suffix.lower() != ".png":
        raise OutputError(f"the page {montage} must end in .png")
    for path in (montage, None if as_kind == "folders" else output):
        if path is not None:
            check_output(path, force=force, kind="file")
    known = None
    if labels is not None:
        known = read_modalities(labels).names(list_images(source), source)
    own = use.modalities_of(model, source, b, device=device)
    folders: dict[Domain, Path] = {"A": source} if b is None else {"A": source, "B": b}
    count_b = None if b is None else len(own.of("B"))
    for line in told(own):
        click.echo(printable(line))
    numbers = figures(own, known)
    for name in ("cosine", "purity", "nmi"):
        if name in numbers:
            click.echo(f"{_CALLED[name]:<28} {numbers[name]:.4f}")
    for line in warnings(own, count_b):
        say(f"Warning: {line}")
    if output is not None:
        use.write(own, output, as_kind, folders, copy=copy, force=force)
        click.echo(printable(f"{output}: {counted(len(own.items), 'picture')}"))
    if montage is not None:
        page = use.montage(own, use.shown_at(folders, _SIDE), columns)
        save(page, montage)
        click.echo(printable(f"{montage}"))


_CALLED = {
    "cosine": "mean cosine to own centroid", "purity": "purity", "nmi": "mutual information, 0 to 1"
}  # fmt: skip


def _kind(output: Path | None, kind: str | None) -> Literal["json", "csv", "folders"]:
    """What the output is, as it is said or as its suffix tells."""
    suffix = "" if output is None else output.suffix.lower()
    if kind == "json" or (kind is None and suffix == ".json"):
        return "json"
    return "csv" if kind == "csv" or (kind is None and suffix == ".csv") else "folders"
