"""The claims of DeepI2I and TransferI2I on Fashion-MNIST, as rows of `soup train` commands.

    soup i2i data fashion fashion --pretrain 30000
    python examples/deepi2i/rows.py --data fashion P D1 D2
    python examples/deepi2i/rows.py --data fashion --print D3-EGD T3
    python examples/deepi2i/rows.py --data fashion --table

A row is one or several trainings of small networks (`size: 32s`, 12 channels), each with a command
that can be copied; what a row begins with is made first. It is then measured on test pictures that
no row is trained on. The last command puts all that was measured, the seeds of a row together, into
a table.
"""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fashion import EXTRACTOR, JUDGE, arguments, carry_out, classifier, file_of, make, spread

NETWORKS = {"size": "32s", "ch": 12, "chunk": 16, "shared": 64, "attention": 0}
TRAINING = {
    "batch": 32, "lr": 2e-4, "d_lr": 4e-4, "ema": 0.99, "average": "instead", "sheet_every": 500,
    "threads": 0,
}  # fmt: skip
METRICS = ("mfd-fmnist-cnn64", "mkd-fmnist-cnn64", "rc", "fc", "st-lpips_over_noise", "collapse",
           "diversity", "source_use", "source_rank")  # fmt: skip
WATCHED = {
    "evaluate_every": 250, "evaluate_n": 100, "evaluate": [METRICS[0], "rc", "source_use"],
    "extractor": f"{EXTRACTOR}.safetensors", "classifier": f"{JUDGE}.safetensors",
}  # fmt: skip
CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle-boot",
)  # fmt: skip
OF_VIEWS = (METRICS[0], "rc", "collapse", "diversity", "source_use", "source_rank")
# Of a row, whether anything is translated, and what.
VIEWS = {
    "control": ("--control",),
    "boots": ("--sources", CLASSES[-1]),
    "others": ("--sources", ",".join(CLASSES[:-1])),
}
TOLD = {"": "", "control": ", G alone", "boots": ", of boots", "others": ", of the others"}
# TransferI2I is tried across a gap: pretrained on some classes, a translator between the others.
BEFORE = ("T-shirt", "trouser", "dress", "sandal", "sneaker", "bag")
AFTER = ("pullover", "coat", "shirt", "ankle-boot")
UNSEEN = ("boots", "others")  # D9 never saw the first; D1 saw all


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        trainer: whose.
        options: beside those that all have.
        start: the row that it begins with.
        starts: networks that begin with those of another row: `init_from`.
        told: what it shows.
        measured: whether it makes pictures of classes.
        watched: whether some of it is measured while it trains, for curves.
        also: of `VIEWS`, how it is measured beside its control.
    """

    trainer: str
    options: dict[str, Any]
    start: str | None = None
    starts: dict[str, str] = field(default_factory=dict)
    told: str = ""
    measured: bool = True
    watched: bool = False
    also: tuple[str, ...] = ()


def rows() -> dict[str, Row]:
    """All of them by name."""
    transfer = {"per_class": 50, "steps": 2000, "phase1": 300}
    scratch = {"per_class": 50, "steps": 2000, "scratch": True}
    found = {
        "P": Row("gan", {"part": "pretrain", "steps": 1500}, told="the GAN that others begin with"),
        "D1": Row("deepi2i", transfer, "P", told="transfer", watched=True, also=UNSEEN),
        "D2": Row("deepi2i", scratch, told="from scratch", watched=True),
        "D2+": Row(
            "deepi2i", scratch | {"steps": 3500}, told="from scratch, with P's steps too",
            watched=True,
        ),
        "D2d": Row(
            "deepi2i", scratch | {"d_data": "pretrain"}, told="from scratch, P's pictures for D",
            watched=True,
        ),
        "D6": Row("deepi2i", transfer | {"train_encoder": True}, "P", told="E trained too"),
        "D7-no-rec": Row("deepi2i", transfer | {"lambda_rec": 0}, "P", told="no reconstruction"),
        "D7-official": Row(
            "deepi2i", transfer | {"rec_pairs": "official", "rec": "mse"}, "P",
            told="the published code's pairs",
        ),
        "D9": Row(
            "deepi2i", transfer | {"exclude": ["ankle-boot"], "rows": 10}, "P",
            told="ankle-boots left out", also=UNSEEN,
        ),
    }  # fmt: skip
    for each in (10, 500, 3000):
        found[f"D1-{each}"] = Row("deepi2i", transfer | {"per_class": each}, "P", told="transfer")
        found[f"D2-{each}"] = Row("deepi2i", scratch | {"per_class": each}, told="from scratch")
    for pretrained in product((True, False), repeat=3):
        names = "".join(n for n, own in zip("EGD", pretrained, strict=True) if own) or "none"
        encoder, generator, judge = pretrained
        options = (transfer if generator else scratch) | {"train_encoder": not encoder}
        starts = {"E": "P:D"} if encoder else {}
        starts |= {n: "P" for n, own in (("G", generator), ("D", judge)) if own}
        found[f"D3-{names}"] = Row("deepi2i", options, starts=starts, told=f"pretrained: {names}")
    for adaptor in ("identity", [8], [4]):
        name = adaptor if isinstance(adaptor, str) else adaptor[0]
        found[f"D4-{name}"] = Row(
            "deepi2i", transfer | {"adaptor": adaptor}, "P", told=f"adaptor {name}"
        )
    for mode in ("taps", "bottleneck"):
        options = scratch | {"n_down": 2, "n_down_mode": mode}
        found[f"D5-{mode}"] = Row("deepi2i", options, told=f"two halvings, {mode}")
    found["D8-softplus"] = Row("deepi2i", scratch | {"gan": "softplus"}, told="softplus")
    only_ssim = {"lambda_gan": 0, "lambda_rec": 0, "lambda_ssim": 1}
    found["D8-ssim"] = Row("deepi2i", scratch | only_ssim, told="SSIM alone")
    return found | transfers()


def transfers() -> dict[str, Row]:
    """Those of TransferI2I: step 1a adapts the GAN, 1b the adaptor, the auxiliary helps."""
    few = {"classes": list(AFTER), "per_class": 20}
    second = few | {"steps": 1500, "phase1": 0}
    plain = second | {"lambda_aux": 0}
    fits = {"steps": 500, "batch": 32, "rows": len(AFTER)}
    other = {"class_rows": "resize"}
    found = {
        "P2": Row(
            "gan", {"part": "pretrain", "steps": 1500, "classes": list(BEFORE)},
            told="a GAN of other classes", measured=False,
        ),
        "1a": Row("gan", few | other | {"steps": 500}, "P2", told="that GAN on the few pictures"),
        "1a-random": Row("gan", few | {"steps": 500}, told="the same from nothing"),
        "P2-fits": Row("self-init", fits | other, "P2", told="1b without 1a", measured=False),
        "1b": Row("self-init", fits, "1a", told="1b after 1a", measured=False),
        "1b-random": Row("self-init", fits, "1a-random", told="likewise", measured=False),
        "T0": Row("transferi2i", plain | other, "P2", told="neither 1a nor 1b"),
        "T0+": Row("transferi2i", plain | other | {"steps": 2000}, "P2", told="T0, 1a's steps too"),
        "T1": Row("transferi2i", plain, "1a", told="1a"),
        "T2": Row("transferi2i", plain, "P2-fits", told="1b"),
        "T3": Row("transferi2i", plain, "1b", told="1a and 1b"),
        "T1g": Row("transferi2i", plain, "1b-random", told="1a and 1b, nothing pretrained"),
        "T8": Row("transferi2i", second | {"scratch": True, "common": 3}, told="from scratch"),
    }  # fmt: skip
    for common in range(4):
        found[f"T{4 + common}"] = Row(
            "transferi2i", second | {"common": common}, "1b", told=f"1a, 1b, {common} in common"
        )
    return found


def command(name: str, data: Path, seed: int | None) -> list[str]:
    """The `soup train` command of a row, in the folder of results."""
    row = rows()[name]
    options = NETWORKS | TRAINING | row.options
    if row.trainer == "self-init":
        options = {n: v for n, v in options.items() if n not in ("sheet_every", "threads")}
        options |= {"d_lr": 1e-4, "ema": None, "average": "beside"}
    else:
        options["data"] = options.pop("part", "train")
        if row.watched:
            options |= {"test": "test"} | WATCHED
        for option in ("data", "d_data", "test"):
            if option in options:
                options[option] = str((data / f"{options[option]}.h5").resolve())
    words = ["soup", "train", row.trainer, "-o", file_of(name, seed)]
    words += [] if seed is None else ["--seed", str(seed)]
    if row.start is not None:
        words += ["--start", file_of(row.start, seed)]
    if row.starts:
        places = {n: file_of(of.partition(":")[0], seed) for n, of in row.starts.items()}
        places |= {n: f"{places[n]}:D" for n, of in row.starts.items() if ":" in of}
        options["init_from"] = places
    for option, value in options.items():
        words += ["--set", f"{option}={value if isinstance(value, str) else json.dumps(value)}"]
    return words


def evaluation(name: str, data: Path, seed: int | None) -> list[str]:
    """The `soup i2i evaluate` command of a row, or of a view of it, such as `D1-control`."""
    row, view = viewed(name)
    words = ["soup", "i2i", "evaluate", file_of(row, seed), "--data", str(data / "test.h5")]
    words += ["--extractor", f"{EXTRACTOR}.safetensors"]
    words += ["--train", str(data / "train.h5")] if view in ("", "control") else []
    words += ["--classifier", f"{JUDGE}.safetensors", "--count", "200", "--json"]
    metrics = METRICS if view in ("", "control") else OF_VIEWS
    return [*words, "--metrics", ",".join(metrics), *VIEWS.get(view, ())]


def viewed(name: str) -> tuple[str, str]:
    """The row, and how it is looked at, or nothing."""
    row, _, view = name.rpartition("-")
    return (row, view) if view in VIEWS else (name, "")


def views(name: str) -> list[str]:
    """All that is measured of a row, itself first."""
    row = rows()[name]
    if not row.measured:
        return []
    every = () if row.trainer == "gan" else ("control", *row.also)
    return [name, *(f"{name}-{view}" for view in every)]


def needed(name: str) -> Iterator[str]:
    """The rows that a row begins with, the first ones first, and itself."""
    row = rows()[name]
    for before in dict.fromkeys([row.start, *(of.partition(":")[0] for of in row.starts.values())]):
        if before is not None:
            yield from needed(before)
    yield name


def fluctuation(name: str, seed: int | None) -> list[str]:
    """The command that says how far the G of TransferI2I moved from where it began, if it did."""
    row = rows()[name]
    if row.trainer != "transferi2i" or row.start is None or "class_rows" in row.options:
        return []
    start = row.start
    return ["soup", "i2i", "fluctuation", file_of(start, seed), file_of(name, seed), "--json"]


def measuring(name: str, data: Path, seed: int | None) -> Iterator[tuple[str, list[str]]]:
    """The file of all that is measured of a row, and the command that prints what it holds."""
    for own in views(name):
        yield file_of(own, seed, ".json"), evaluation(own, data, seed)
    if moved := fluctuation(name, seed):
        yield file_of(name, seed, "-moved.json"), moved


def table(folder: Path) -> str:
    """What was measured: mean and standard deviation over the seeds of a row."""
    every = rows()
    shown = [metric for metric in METRICS if metric != "collapse"]  # a verdict, no figure
    lines = headed(["row", ""], [*shown, "seeds"])
    for name in (own for row in every for own in views(row)):
        files = of_seeds(folder, name, ".json")
        if not files:
            continue
        found = [
            {one["name"]: float(one["value"]) for one in json.loads(file.read_text("utf-8"))}
            for file in files
        ]
        row, view = viewed(name)
        cells = [spread([own[metric] for own in found if metric in own]) for metric in shown]
        lines.append(cells_of(name, f"{every[row].told}{TOLD[view]}", *cells, str(len(found))))
    return "\n".join(lines)


def tables(folder: Path) -> str:
    """All three, those that are not empty."""
    return "\n\n".join(filter(None, (table(folder), curves(folder), moves(folder))))


def moves(folder: Path) -> str:
    """Weight fluctuation of the blocks of TransferI2I's generators, sums, by row."""
    lines: list[str] = []
    for name in rows():
        found = [
            json.loads(file.read_text("utf-8")) for file in of_seeds(folder, name, "-moved.json")
        ]
        if not found:
            continue
        blocks = [block for block in found[0] if block.startswith("blocks.")]
        lines = lines or headed(["row", ""], blocks)
        cells = [spread([own[block]["sum"] for own in found], ".3g") for block in blocks]
        lines.append(cells_of(name, rows()[name].told, *cells))
    return "\n".join(lines)


def curves(folder: Path) -> str:
    """What was measured of watched rows while they trained, by step."""
    lines: list[str] = []
    watched = {name: row for name, row in rows().items() if row.watched}
    every = WATCHED["evaluate_every"]
    steps = range(every, max(row.options["steps"] for row in watched.values()) + 1, every)
    for name, row in watched.items():
        files = of_seeds(folder, name, f"-shown/{row.trainer}/metrics.csv")
        found = [list(csv.DictReader(file.read_text("utf-8").splitlines())) for file in files]
        for metric in WATCHED["evaluate"] if found else ():
            lines = lines or headed(["row", ""], map(str, steps))
            of_step = [{int(own["step"]): float(own[metric]) for own in one} for one in found]
            cells = [spread([own[step] for own in of_step if step in own]) for step in steps]
            lines.append(cells_of(name, metric, *cells))
    return "\n".join(lines)


def of_seeds(folder: Path, name: str, suffix: str) -> list[Path]:
    """What there is of a row, a file a seed."""
    return [*folder.glob(f"{name}{suffix}"), *sorted(folder.glob(f"{name}-seed-*[0-9]{suffix}"))]


def headed(words: Sequence[str], figures: Iterable[str]) -> list[str]:
    """The first two lines of a table."""
    figures = list(figures)
    return [cells_of(*words, *figures), "|" + "---|" * len(words) + "--:|" * len(figures)]


def cells_of(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = arguments(__doc__, rows(), "deepi2i-results")
    given = parser.parse_args()
    if unknown := [name for name in given.rows if name not in rows()]:
        parser.error(f"there is no row {unknown[0]!r} (there are {', '.join(rows())})")
    if given.table:
        print(tables(given.results))
        return
    if not given.print and not (given.data / "pretrain.h5").exists():
        parser.error(
            f"{given.data} has no pretrain.h5: soup i2i data fashion {given.data} --pretrain 30000"
        )
    given.results.mkdir(parents=True, exist_ok=True)
    trainings = [classifier(name, given.data) for name in (EXTRACTOR, JUDGE)]
    for seed in given.seeds:
        of_seed = dict.fromkeys(own for name in given.rows for own in needed(name))
        trainings += [command(name, given.data, seed) for name in of_seed]
    make(trainings, given.results, printed=given.print)
    for seed, name in product(given.seeds, given.rows):
        for file, words in measuring(name, given.data.resolve(), seed):
            if given.print:
                print(shlex.join(words))
            elif not (given.results / file).exists():
                made = carry_out(words, given.results, stdout=subprocess.PIPE)
                (given.results / file).write_text(made.stdout, "utf-8")
    if not given.print:
        print(tables(given.results))


if __name__ == "__main__":
    main()
