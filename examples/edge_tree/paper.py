"""The tree paper's Tables III to VII, as plans of modelsoup, and what goes beyond them.

    python examples/edge_tree/paper.py --table 3 --size small
    python examples/edge_tree/paper.py --beyond
    python examples/edge_tree/paper.py --table 4 --print-plans
    python examples/edge_tree/paper.py --table 3 --size paper --data DIR

The third prints plans for `soup plan` and `soup run`; the last wants a GPU, and the official image
sets as `DIR/apple2orange` and `DIR/horse2zebra`.

Coscia et al., "Tree-based Optimization for Image-to-Image Translation with Imbalanced Datasets on
the Edge". A row is one plan, run with several seeds; whatever rows have in common, such as leaves,
is trained once, because it is in the store. The table has our mean and standard deviation beside
the paper's single figure, which is of other images, of another size: only `--size paper` with the
canonical Inception compares with it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import modelsoup

HERE = Path(__file__).resolve().parent
LEAVES = {"very-slow": 5e-5, "slow": 1.5e-4, "fast": 1.5e-3, "very-fast": 3e-2}  # Table I
RATE = 2e-4  # of fine-tuning, and of the model without a tree
CHOSEN = {2: ("very-slow", "fast"), 3: tuple(LEAVES)}  # levels → leaves
QAT_EPOCHS = 5  # the longest training in INT8; what is measured after fewer is on its way
PICTURES = 6  # in a row of a page
OTHER = "other"  # the leaf of Table VI that was trained on another pair


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        options: of the trainer `cyclegan`.
        metrics: names of `soup i2i evaluate`.
    """

    options: dict[str, Any]
    metrics: tuple[str, ...]


SIZES = {
    # Section IV of the paper, and CycleGAN's defaults where it says nothing.
    "paper": Size(
        {"load_size": 286, "crop_size": 256, "width": 64, "blocks": 9, "d_width": 64, "epochs": 50},
        ("fid-64", "lpips_pairs"),
    ),
    # Minutes a seed on two cores.
    "small": Size(
        {
            "load_size": 36, "crop_size": 32, "width": 16, "blocks": 3, "d_width": 16,
            "d_layers": 2, "epochs": 5, "threads": 0, "sheet_every": 0,
        },
        ("fd-st-alex", "st-lpips_pairs", "st-lpips_to_truth", "psnr"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        table: 3 to 7.
        pair: from X to Y, such as `apple_to_orange`.
        imbalance: percent by which Y is smaller than X.
        levels: of the tree; 1 is a model without a tree.
        strategy: S1, all layers merged; S2-A, discriminators merged, generators from scratch.
        aware: whether the loss is the imbalance-aware one (eq. 3).
        asymmetric: three leaves, one of them trained on another pair.
        int8: epochs of training after the quantisation to INT8; None leaves it float.
        fid64: the paper's FID; None where a row is ours, INT8 by calibration alone.
        lpips: the paper's LPIPS, likewise.
    """

    table: int
    pair: str
    imbalance: int
    levels: int
    strategy: str
    aware: bool
    asymmetric: bool
    int8: int | None
    fid64: float | None
    lpips: float | None

    @property
    def name(self) -> str:
        """A file's name."""
        words = [f"table{self.table}", self.pair, f"{self.imbalance}", f"{self.levels}-levels"]
        words += ["S2-A"] * (self.strategy == "S2-A") + ["aware"] * self.aware
        words += ["asymmetric"] * self.asymmetric
        return "-".join(words if self.int8 is None else [*words, f"int8-{self.int8}-epochs"])


def paper_rows() -> list[Row]:
    """The rows of Tables III to VII with the paper's figures, from `tables.csv`."""
    with (HERE / "tables.csv").open(encoding="utf-8") as file:
        return [
            Row(
                int(r["table"]), r["pair"], int(r["imbalance"]), int(r["levels"]), r["strategy"],
                r["aware"] == "yes", r["asymmetric"] == "yes",
                *(
                    kind(r[name]) if r[name] else None
                    for name, kind in (("int8_epochs", int), ("fid64", float), ("lpips", float))
                ),
            )
            for r in csv.DictReader(file)
        ]  # fmt: skip


def small_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows that the small set can have: one pair, Noto to Twemoji, in place of all four."""
    first = {"apple_to_orange": "noto_to_twemoji", "orange_to_apple": "twemoji_to_noto"}
    return [Row(**(asdict(row) | {"pair": first[row.pair]})) for row in rows if row.pair in first]


def domains(pair: str, data: Path | None) -> dict[str, str]:
    """Where a pair's images are: options of the trainer."""
    x, _, y = pair.partition("_to_")
    if data is None:
        folder, first = HERE.parent / "emoji", "noto"
    else:
        name = next((n for n in (f"{x}2{y}", f"{y}2{x}") if (data / n).is_dir()), None)
        if name is None:
            raise modelsoup.ParameterError(f"there is neither {x}2{y} nor {y}2{x} in {data}")
        folder, first = data / name, name.partition("2")[0]
    a, b = ("A", "B") if x == first else ("B", "A")
    return {"data_a": str(folder / f"train{a}"), "data_b": str(folder / f"train{b}")}


def plan(
    row: Row, size: Size, data: Path | None, seed: int, *, beta: float = 0.5, shared: bool = True,
    finetune: bool = True, epochs: int = 1, edge: str = "edge", other: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The one template: a `tree.yaml` as plain data.

    Args:
        row: of which table.
        size: of networks, images and trainings.
        data: a folder of pairs; None is the emoji set beside this example.
        seed: of everything random.
        beta: the first of two models' share in a merge.
        shared: whether all leaves start from the same random weights.
        finetune: whether merged models are fine-tuned.
        epochs: how many times as long the model without a tree is trained.
        edge: the folder for what is quantised.
        other: the set of another pair, for Table VI's third leaf; None is horse2zebra in `data`.
    """
    options = {
        "trainer": "cyclegan", "loss": "tree-paper", **size.options,
        **domains(row.pair, data), "imbalance": row.imbalance, "subset_seed": seed,
    }  # fmt: skip
    if row.aware:
        options["balance"] = row.imbalance / 100
    names = CHOSEN.get(row.levels, ())
    if row.asymmetric:
        names = ("very-slow", "fast", OTHER)
    models: dict[str, Any] = {}
    for number, name in enumerate(names):
        own = dict(options, init=seed if shared else 1000 * (seed + 1) + number)
        if name == OTHER:
            own |= _another_pair(data, other)
        models[name] = {"train": own | {"lr": LEAVES.get(name, RATE)}}
    layers = {"D_*": "merge", "G_*": "drop"} if row.strategy == "S2-A" else "all"
    content: dict[str, Any] = {
        "soup": 1, "seed": seed, "models": models,
        "defaults": {"merge": {"beta": beta, "layers": layers}},
    }  # fmt: skip
    if not names:
        length = options["epochs"] * epochs
        content["models"] = {"alone": {"train": options | {"lr": RATE, "epochs": length}}}
        content["models"]["alone"]["train"]["init"] = seed
        if row.int8 is None:
            return content | {"tree": "alone"}
        return content | {"tree": {"of": ["alone"], "finetune": _quantised(options, edge)}}
    if finetune:
        content["defaults"]["finetune"] = options | {"lr": RATE, "init": seed}
    odd = {"odd": OTHER} if row.asymmetric else {"shuffle": seed}
    return content | {"tree": {"pair": list(names), **odd}}


def _quantised(options: dict[str, Any], edge: str) -> dict[str, Any]:
    """Table VII's training in INT8, on the same images, with outputs for all test images.

    It is one for all rows: each epoch leaves its outputs, and its rate does not depend on how many
    there are.
    """
    own = ("trainer", "epochs", "data_a", "data_b")  # what openvino-qat has in other words
    training = {name: value for name, value in options.items() if name not in own}
    x = Path(options["data_a"])
    if x.name != "trainA":
        raise modelsoup.ParameterError(
            f"Table VII wants the pair in the order of its name, not {x.parent.name} reversed"
        )
    return {
        "trainer": "openvino-qat", "of": "cyclegan", "out": edge, "epochs": QAT_EPOCHS,
        "held_out": 10_000, "rounds": 0, "pictures": True,
        "training": training | {"data": str(x.parent)},
    }  # fmt: skip


def _another_pair(data: Path | None, other: Path | None) -> dict[str, str]:
    """Images of another pair, none of which the tree is measured on or must not see."""
    if other is None and data is None:
        raise modelsoup.ParameterError(
            "a leaf of Table VI is trained on another pair: `soup i2i data day-night SET` makes "
            "one, and --other SET names it"
        )
    place = other or Path(data or "", "horse2zebra")
    if not (place / "trainA").is_dir():
        raise modelsoup.ParameterError(
            f"a leaf of Table VI is trained on another pair, and there is no folder "
            f"{place / 'trainA'}"
        )
    return {"data_a": str(place / "trainA"), "data_b": str(place / "trainB")}


# Running, measuring, showing.


def run_row(
    row: Row, size: Size, data: Path | None, seed: int, out: Path, executor: Any, *,
    other: Path | None = None, **template: Any,
) -> Path:  # fmt: skip
    """Carry a row's plan out, and give its root's checkpoint."""
    label = "-".join([row.name, f"seed{seed}", *(f"{k}={v}" for k, v in template.items())])
    edge = str(edge_of(row, size, data, seed, out))
    content = plan(row, size, data, seed, edge=edge, other=other, **template)
    tree, _ = modelsoup.parse_tree(yaml.safe_dump(content), folder=Path.cwd())

    def say(event: modelsoup.Event) -> None:
        if event.state in ("done", "failed"):
            print(f"  {label}: {event.state} {event.node} {event.message}", flush=True)

    checkpoint = out / f"{label}.safetensors"
    modelsoup.run(
        tree, checkpoint, store=out / "store", executor=executor, force=True, watch=say
    )  # fmt: skip
    return checkpoint


def edge_of(row: Row, size: Size, data: Path | None, seed: int, out: Path) -> Path:
    """The folder of a plan that ends in INT8: another plan, such as a shorter one, has another."""
    if row.int8 is None:
        return out / "none"
    text = json.dumps(plan(row, size, data, seed))
    return out / f"table{row.table}-int8-seed{seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def measure(
    checkpoint: Path, row: Row, size: Size, data: Path | None, edge: Path = Path("edge")
) -> tuple[dict[str, float], list[list[np.ndarray]]]:  # fmt: skip
    """A root's figures on all test images of X, and its first translations.

    Those of a row in INT8 are in its folder `edge`.
    """
    from modelsoup_i2i.measuring.metrics import evaluate
    from modelsoup_i2i.pictures.images import list_images, read_image
    from modelsoup_i2i.pictures.transforms import Transform
    from modelsoup_i2i.use.translate import translate_arrays

    own = domains(row.pair, data)
    trained = [Path(own[key]) for key in ("data_a", "data_b")]
    folders = [path.with_name(path.name.replace("train", "test")) for path in trained]
    side, load = size.options["crop_size"], size.options["load_size"]
    transform = Transform("resize_and_crop", (load, load), (side, side), flip=False)
    x, y = (
        [transform.for_test(read_image(file)) for file in list_images(folder)]
        for folder in folders
    )  # fmt: skip
    if row.int8 is None:
        made = list(translate_arrays(checkpoint, x, direction="x2y"))
    else:
        after = edge / "pictures" / f"int8-{row.int8}"
        made = [read_image(file) for file in list_images(after)] if after.is_dir() else []
        if len(made) != len(x):
            raise modelsoup.ParameterError(
                f"{after} has {len(made)} pictures for {len(x)} test images: if it was changed "
                f"since it was made, begin in another folder with --out"
            )
    paired = data is None  # the emoji have the same names in both styles
    wanted = [name for name in size.metrics if paired or "truth" not in name]
    results = evaluate(made, y, inputs=x, truth=y if paired else None, metrics=wanted)
    return {r.name: r.value for r in results}, [list(row) for row in zip(x, made, y, strict=False)]


def table(rows: Sequence[tuple[str, Sequence[dict[str, float]], Sequence[str]]]) -> Iterator[str]:
    """Lines of a Markdown table: label, mean ± deviation of each metric over seeds, more cells."""
    names = list(rows[0][1][0])
    heads = [
        f"{name} {'↓' if name.startswith(('f', 'k')) or 'truth' in name else '↑'}" for name in names
    ]
    more = ("paper FID₆₄ ↓", "paper LPIPS ↑")[: len(rows[0][2])]
    yield f"| | {' | '.join([*heads, *more])} |"
    yield "|---|" + "--:|" * (len(heads) + len(more))
    for label, figures, cells in rows:
        shown = []
        for name in names:
            values = [one[name] for one in figures]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            shown.append(f"{statistics.mean(values):.3f}{spread}")
        yield f"| {label} | {' | '.join([*shown, *cells])} |"


def labelled(row: Row) -> str:
    """A row in words."""
    tree = "no tree" if row.levels == 1 else f"{row.levels} levels"
    words = [row.pair.replace("_to_", " → "), f"{row.imbalance} %", tree]
    words += ["D merged, G from scratch"] * (row.strategy == "S2-A" and row.levels > 1)
    words += ["L_aware"] * row.aware + ["asymmetric"] * row.asymmetric
    if row.int8 is not None:
        words += ["INT8, " + (f"{row.int8} epochs" if row.int8 else "calibration alone")]
    return ", ".join(words)


def one_table(arguments: argparse.Namespace, size: Size) -> None:
    """Run the rows of a table, and write `tableN.md` and `tableN.png`."""
    from modelsoup_i2i.measuring.evaluation import must_have_weights
    from modelsoup_i2i.pictures.sheets import grid, save

    rows = [row for row in paper_rows() if row.table == arguments.table]
    rows = small_rows(rows) if arguments.data is None else rows
    names = [row.name for row in rows]
    rows = [row for row in rows if arguments.rows in row.name]
    if not rows:
        raise modelsoup.ParameterError(
            f"no row of table {arguments.table} has {arguments.rows!r} in its name (there are "
            f"{', '.join(names)})"
        )
    if arguments.print_plans:
        for row in rows:
            content = plan(row, size, arguments.data, arguments.seeds[0], other=arguments.other)
            print(f"# {row.name}.yaml\n{yaml.safe_dump(content, sort_keys=False)}")
        return
    out = arguments.out
    # Before hours of training, not after:
    must_have_weights(size.metrics)
    for row in rows:
        plan(row, size, arguments.data, arguments.seeds[0], other=arguments.other)
    if any(row.int8 is not None for row in rows):
        from modelsoup_openvino.versions import need

        need("nncf", "openvino")
    out.mkdir(parents=True, exist_ok=True)
    done, pages = [], []
    with modelsoup.ProcessExecutor(arguments.workers) as executor:
        for row in rows:
            figures = []
            for seed in arguments.seeds:
                root = run_row(
                    row, size, arguments.data, seed, out, executor, other=arguments.other
                )
                edge = edge_of(row, size, arguments.data, seed, out)
                found, pictures = measure(root, row, size, arguments.data, edge)
                figures.append(found)
                pages += [(labelled(row), pictures)] if seed == arguments.seeds[0] else []
            told = ("–" if f is None else f"{f:.2f}" for f in (row.fid64, row.lpips))
            done.append((labelled(row), figures, tuple(told)))
    name = f"table{arguments.table}"
    lines = [f"Table {arguments.table}, size {arguments.size}, seeds {arguments.seeds}", ""]
    finish(out, name, [*lines, *table(done)], {label: figures for label, figures, _ in done})
    shown = [[pictures[n][1] for n in range(PICTURES)] for _, pictures in pages]
    inputs = [pages[0][1][n][0] for n in range(PICTURES)]
    # Pillow's own font has no arrow.
    labels = ["input (first row's X)", *(label.replace("→", "to") for label, _ in pages)]
    save(grid([inputs, *shown], labels=labels), out / f"{name}.png")


def beyond(arguments: argparse.Namespace, size: Size) -> None:
    """What the paper leaves open, at 95 %: the start of the leaves, β, and what is a fair rival."""
    base = next(
        r for r in small_rows(paper_rows()) if (r.table, r.imbalance, r.levels) == (3, 95, 2)
    )
    alone = Row(**(asdict(base) | {"levels": 1}))
    deep = Row(**(asdict(base) | {"levels": 3}))
    cases: list[tuple[str, Row, dict[str, Any]]] = [
        ("one model, as long as a node", alone, {}),
        ("one model, as many steps as 2 levels", alone, {"epochs": 3}),
        ("one model, as many steps as 3 levels", alone, {"epochs": 7}),
        ("2 levels", base, {}),
        ("3 levels", deep, {}),
        ("plain average of 2 leaves", base, {"finetune": False}),
        ("plain average of 4 leaves", deep, {"finetune": False}),
        (
            "plain average of 2 leaves, independent starts",
            base,
            {"finetune": False, "shared": False},
        ),
        ("2 levels, independent starts", base, {"shared": False}),
        *((f"2 levels, β {beta}", base, {"beta": beta}) for beta in (0.0, 0.25, 0.75, 1.0)),
    ]
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    done = []
    with modelsoup.ProcessExecutor(arguments.workers) as executor:
        for label, row, template in cases:
            figures = [
                measure(
                    run_row(row, size, None, seed, out, executor, **template), row, size, None
                )[0]
                for seed in arguments.seeds
            ]  # fmt: skip
            done.append((label, figures, ()))
    lines = [f"Beyond the paper, size {arguments.size}, 95 %, seeds {arguments.seeds}", ""]
    finish(out, "beyond", [*lines, *table(done)], {label: figures for label, figures, _ in done})


def finish(out: Path, name: str, lines: Sequence[str], figures: Any) -> None:
    """Write a table and its figures, and print the table."""
    text = "\n".join(lines) + "\n"
    (out / f"{name}.md").write_text(text, "utf-8")
    (out / f"{name}.json").write_text(json.dumps(figures, indent=1), "utf-8")
    print(f"\n{text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", type=int, choices=(3, 4, 5, 6, 7))
    what.add_argument("--beyond", action="store_true", help="what the paper leaves open")
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--data", type=Path, help="a folder of pairs; default: the emoji")
    parser.add_argument(
        "--other", type=Path, metavar="SET",
        help="the set that Table VI's third leaf is trained on; default: horse2zebra in --data",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--rows", default="", metavar="TEXT", help="only rows with it in their name"
    )
    parser.add_argument("--workers", type=int, default=2, help="nodes at the same time")
    parser.add_argument("--out", type=Path, default=Path("runs/edge_tree"))
    parser.add_argument("--print-plans", action="store_true", help="for `soup plan`; run nothing")
    parser.add_argument("--epochs", type=int, help="of each training, in place of the size's")
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    if arguments.epochs:
        size = Size(size.options | {"epochs": arguments.epochs}, size.metrics)
    try:
        if arguments.beyond:
            beyond(arguments, size)
        else:
            one_table(arguments, size)
    except modelsoup.SoupError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        print("Interrupted: run again to go on from what is in the store", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
