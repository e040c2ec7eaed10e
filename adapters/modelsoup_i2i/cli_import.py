"""`soup i2i import`: official checkpoints, by their kinds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import click

from modelsoup import nearest

from .cli_shared import DIRECTION, FORCE, PATH, needed, say


class _Kinds(click.Group):
    """Kinds of checkpoints; without the word it is CycleGAN's or pix2pix's.

    So it was before there were kinds. A folder that is called like one is named `./biggan`.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            positional = [word for word in args if not word.startswith("-")]
            near = nearest(args[0], self.commands)
            if near and not Path(args[0]).exists() and len(positional) > 2:
                raise click.UsageError(f"there is no kind {args[0]!r}{near}", ctx)
            args = ["cyclegan", *args]
        return super().parse_args(ctx, args)


@click.group(name="import", cls=_Kinds)
def import_() -> None:
    """Read an official checkpoint; without a kind, one of CycleGAN, pix2pix or CUT.

    Weights alone are read, and no code is run.
    """


_IMPORTED = click.argument("output", metavar="OUT.safetensors", type=PATH)
_SUFFIX = click.option(
    "--suffix", default="", metavar="WORD", help="Which files: best0 takes G_ema_best0.pth."
)
_CLASS_ROWS = click.option(
    "--class-rows", type=click.Choice(["keep", "resize"]), default="keep", show_default=True,
    help="Keep the rows of classes, or draw as many new ones as --classes says.",
)  # fmt: skip
_CLASSES = click.option("--classes", type=click.IntRange(min=1), metavar="N", help="How many.")
_SEED = click.option("--seed", default=0, show_default=True, help="Of new rows.")
_STEP = click.option(
    "--step", type=click.IntRange(min=0), metavar="N", help="Whose files.  [default: the last]"
)
_STYLEGAN_SIZE = click.option(
    "--size", type=int, metavar="N", help="Of a StyleGAN's pictures.  [default: what was trained]"
)


@click.command(no_args_is_help=True)
@click.argument("folder", type=PATH)
@_IMPORTED
@click.option(
    "--epoch", default="latest", show_default=True, help="Which files of the folder: 20, iter_5000."
)
@DIRECTION
@FORCE
def _official(folder: Path, output: Path, epoch: str, direction: str, force: bool) -> None:
    """CycleGAN, pix2pix and CUT: their folder, or the file of a generator."""
    with needed("i2i"):
        from .use.official_cyclegan import import_folder
    _tell(import_folder(folder, output, force=force, epoch=epoch, direction=direction))


for _name in ("cut", "cyclegan", "pix2pix"):
    import_.add_command(_official, _name)


@click.command(no_args_is_help=True)
@click.pass_context
@click.argument("folder", metavar="DIR", type=PATH)
@_IMPORTED
@_STEP
@FORCE
def _funit(
    context: click.Context, folder: Path, output: Path, step: int | None, force: bool
) -> None:
    """BalaGAN's or FUNIT's folder: gen_00100000.pt, and dis_00100000.pt."""
    with needed("i2i"):
        from .use.official_funit import import_funit
    kind: Any = context.info_name
    _tell(import_funit(folder, output, kind, force=force, step=step, say=say))


for _name in ("balagan", "funit"):
    import_.add_command(_funit, _name)


@import_.command(no_args_is_help=True)
@click.argument("folder", metavar="DIR", type=PATH)
@_IMPORTED
@_SUFFIX
@_CLASS_ROWS
@_CLASSES
@_SEED
@FORCE
def biggan(
    folder: Path, output: Path, suffix: str, class_rows: Literal["keep", "resize"],
    classes: int | None, seed: int, force: bool,
) -> None:  # fmt: skip
    """BigGAN-PyTorch's folder: G_ema.pth or G.pth, and D.pth."""
    with needed("i2i"):
        from .use.official_gan import import_biggan
    _tell(
        import_biggan(
            folder, output, force=force, suffix=suffix, class_rows=class_rows, classes=classes,
            seed=seed, say=say,
        )
    )  # fmt: skip


@import_.command(no_args_is_help=True)
@click.argument("file", metavar="FILE", type=PATH)
@_IMPORTED
@_STYLEGAN_SIZE
@FORCE
def stylegan(file: Path, output: Path, size: int | None, force: bool) -> None:
    """A file of style-based-gan-pytorch: g_running or generator, and discriminator."""
    with needed("i2i"):
        from .use.official_gan import import_stylegan
    _tell(import_stylegan(file, output, force=force, size=size, say=say))


@import_.command(no_args_is_help=True)
@click.argument("source", metavar="DIR|FILE", type=PATH)
@_IMPORTED
@_SUFFIX
@_CLASS_ROWS
@_CLASSES
@_SEED
@click.option(
    "--from-scratch", is_flag=True,
    help="It was trained without pre-trained networks, and adds features ten times as strongly.",
)  # fmt: skip
@_STYLEGAN_SIZE
@FORCE
def deepi2i(
    source: Path, output: Path, suffix: str, class_rows: Literal["keep", "resize"],
    classes: int | None, seed: int, from_scratch: bool, size: int | None, force: bool,
) -> None:  # fmt: skip
    """DeepI2I's folder, G.pth, D.pth, E1.pth and A1.pth; or its one file, on StyleGAN."""
    with needed("i2i"):
        from .use.official_gan import import_deepi2i
    _tell(
        import_deepi2i(
            source, output, force=force, suffix=suffix, class_rows=class_rows, classes=classes,
            seed=seed, from_scratch=from_scratch, size=size, say=say,
        )
    )  # fmt: skip


@import_.command(no_args_is_help=True)
@click.argument("folder", metavar="DIR", type=PATH)
@_IMPORTED
@_STEP
@click.option(
    "--attributes", metavar="NAME,NAME,…",
    help="What it was trained on, in its order, where a picture may have several.",
)  # fmt: skip
@FORCE
def stargan(
    folder: Path, output: Path, step: int | None, attributes: str | None, force: bool
) -> None:
    """StarGAN's folder: 200000-G.ckpt and 200000-D.ckpt."""
    with needed("i2i"):
        from .use.official_stargan import import_stargan
    names = [] if attributes is None else [name.strip() for name in attributes.split(",")]
    _tell(import_stargan(folder, output, force=force, step=step, attributes=names, say=say))


@import_.command(no_args_is_help=True)
@click.argument("folder", metavar="DIR", type=PATH)
@_IMPORTED
@_STEP
@FORCE
def starganv2(folder: Path, output: Path, step: int | None, force: bool) -> None:
    """StarGAN v2's folder: 100000_nets_ema.ckpt and 100000_nets.ckpt, without faces' branch."""
    with needed("i2i"):
        from .use.official_starganv2 import import_starganv2
    _tell(import_starganv2(folder, output, force=force, step=step, say=say))


@import_.command(no_args_is_help=True)
@click.argument("file", metavar="FILE", type=PATH)
@_IMPORTED
@FORCE
def ugatit(file: Path, output: Path, force: bool) -> None:
    """A file of UGATIT-pytorch, light: genA2B, genB2A, disGA, disGB, disLA and disLB."""
    with needed("i2i"):
        from .use.official_cam import import_ugatit
    _tell(import_ugatit(file, output, force=force, say=say))


@import_.command("nice-gan", no_args_is_help=True)
@click.argument("file", metavar="FILE", type=PATH)
@_IMPORTED
@FORCE
def nice_gan(file: Path, output: Path, force: bool) -> None:
    """A file of NICE-GAN-pytorch, light: gen2A, gen2B, disA and disB."""
    with needed("i2i"):
        from .use.official_cam import import_nice_gan
    _tell(import_nice_gan(file, output, force=force, say=say))


def _tell(found: Mapping[str, int]) -> None:
    for name, parameters in found.items():
        click.echo(f"{name}: {parameters:,} parameters")
