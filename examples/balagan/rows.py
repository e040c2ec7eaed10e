"""The claims of BalaGAN on Fashion-MNIST, as rows of `soup train` commands.

    soup i2i data fashion fashion --pretrain 30000
    python examples/balagan/rows.py --data fashion k1 k4
    python examples/balagan/rows.py --data fashion --print random cut
    python examples/balagan/rows.py --data fashion --table

A, the rich domain, are T-shirts, dresses, coats and shirts, 500 of each, which nobody is told; B,
the poor one, are pullovers. A row's name says what it is, and after a colon how many pictures B
has: `k4` is `k4:200`. Of rows called `shoes-`, which take no count, both domains are rich: 375
pictures of each of those kinds, and 500 of sandals, of sneakers and of boots. What a row begins
with is made first. It is measured on test pictures.
"""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fashion import (
    EXTRACTOR,
    JUDGE,
    arguments,
    carry_out,
    classifier,
    figures,
    file_of,
    make,
    save_pictures,
    spread,
)

RICH, POOR = ("T-shirt", "dress", "coat", "shirt"), ("pullover",)
SHOES = ("sandal", "sneaker", "ankle-boot")
EACH = 500  # pictures of a kind
TESTED = 1000  # test pictures of a domain
USUAL = 200  # pictures of B, where a row does not say
STEPS = 3000
TRANSLATOR = {
    "size": 32, "width": 16, "downs": 2, "style_downs": 3, "latent": 16, "mlp": 64,
    "d_most": 128, "batch": 8, "ema": 0.99,
}  # fmt: skip
ENCODER = {
    "encoder": "small", "size": 32, "batch": 128, "steps": 800, "augment": ["crop", "flip", "blur"],
}  # fmt: skip
CYCLES = {"load_size": 35, "crop_size": 32, "width": 16, "d_layers": 2, "d_width": 32}
MEASURED = ("fd", "kd", "rc", "diversity", "duplicates", "source_rank")


@dataclass(frozen=True)
class Row:
    """One training of a translator, or of an encoder.

    Attributes:
        trainer: whose.
        options: beside those that all have.
        start: the row that it begins with, with as many pictures of B.
        told: what it shows.
        exported: the row whose modalities are its classes, as folders.
    """

    trainer: str
    options: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    told: str = ""
    exported: str | None = None


def rows() -> dict[str, Row]:
    """All of them by name."""
    found = {
        "encoder": Row("modality", ENCODER | {"k": 4}, told="contrastive, k 4"),
        "encoder-vae": Row(
            "modality", {"encoder": "vae", "size": 64, "batch": 144, "epochs": 20, "lr": 5e-3,
                         "gamma": 0.95, "weight_decay": 0, "k": 4}, told="VAE, k 4",
        ),
        "k1": Row("balagan", told="one class each"),
        "k4": Row("balagan", {"k": 4, "encoder": "small"}, "encoder", told="4 modalities"),
        "vae": Row("balagan", {"k": 4, "encoder": "vae"}, "encoder-vae", told="4, of a VAE"),
        "labels": Row("balagan", {"modalities": "labels"}, told="4, the true kinds"),
        "random": Row("balagan", {"modalities": "random.csv"}, told="4, dealt out at random"),
        "one-head": Row(
            "balagan", {"k": 4, "encoder": "small", "heads": 1, "cls_weight": 0}, "encoder",
            told="without D_cls",
        ),
        "excluded": Row(
            "balagan", {"modalities": "labels", "heads": 1, "cls_weight": 0,
                        "exclude_target": True}, told="without B, of the true kinds",
        ),
        "per-sample": Row(
            "balagan", {"k": 4, "encoder": "small", "r1": "per_sample"}, "encoder",
            told="R1 of each picture",
        ),
        "balanced": Row(
            "balagan", {"k": 4, "encoder": "small", "class_balanced": True}, "encoder",
            told="classes drawn equally often",
        ),
        "cyclegan": Row("cyclegan", CYCLES | {"blocks": 6}, told="CycleGAN"),
        "cut": Row("cut", CYCLES | {"blocks": 6, "f_width": 64, "decay_epochs": 0}, told="CUT"),
        "munit": Row(
            "munit", CYCLES | {"blocks": 2, "mlp": 64, "d_layers": 3, "d_scales": 2,
                               "d_width": 16, "halve_every": None}, told="MUNIT",
        ),
    }  # fmt: skip
    for k in (2, 8, 16, 40):
        more = {"k": k, "encoder": "small"}
        again = {"k": k, "encoder": "small", "size": 32, "recluster": True, "steps": 1,
                 "batch": 128}  # fmt: skip
        found[f"encoder-{k}"] = Row("modality", again, "encoder", told=f"the same, k {k}")
        found[f"k{k}"] = Row("balagan", more, f"encoder-{k}", told=f"{k} modalities")
    both = {"k": 4, "k_b": 3}
    styles = {"size": 32, "width": 16, "most": 128, "hidden": 64, "style": 16}
    return found | {
        "shoes-encoder": Row("modality", ENCODER | both, told="contrastive, k 4 and 3"),
        "shoes-k1": Row("balagan", told="one class each, both rich"),
        "shoes-k7": Row(
            "balagan", both | {"encoder": "small"}, "shoes-encoder", told="4 and 3 modalities",
        ),
        "shoes-starganv2-2": Row("starganv2", styles, told="StarGAN v2, both rich"),
        "shoes-starganv2-7": Row(
            "starganv2", styles, exported="shoes-encoder", told="StarGAN v2, 7 modalities",
        ),
    }  # fmt: skip


def domains(name: str) -> tuple[str, tuple[str, ...]]:
    """How the folders of a row's pictures begin, and the kinds of B."""
    return ("shoes-", SHOES) if name.startswith("shoes-") else ("", POOR)


def parted(name: str) -> tuple[Row, int]:
    """A row by its name, and how many pictures of B it has."""
    own, _, count = name.partition(":")
    return rows()[own], int(count or of_b(own))


def of_b(name: str) -> int:
    """How many pictures of B a row has that does not say."""
    poor = domains(name)[1]
    return USUAL if poor == POOR else EACH * len(poor)


def file_name(name: str, seed: int | None, suffix: str = ".safetensors") -> str:
    """A row's checkpoint, or what was measured of it."""
    return file_of(name.replace(":", "-of-"), seed, suffix)


def pictures(data: Path, folder: Path) -> None:
    """Folders of A, by kinds, and of B, for training and tests; and kinds dealt out at random."""
    import numpy as np

    for row, of_a, of_b in (("", EACH, EACH), ("shoes-", 3 * EACH // len(RICH), EACH)):
        start, poor = domains(row)
        for domain, kinds, each in (("A", RICH, of_a), ("B", poor, of_b)):
            for part in ("train", "test"):
                count = each if part == "train" else TESTED // len(kinds)
                save_pictures(data / f"{part}.h5", kinds, count, folder / f"{start}{part}{domain}")
    if (folder / "random.csv").exists():
        return
    rng = np.random.default_rng(0)
    with (folder / "random.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(["path", "label"])
        for name, n in product(RICH, range(EACH)):
            writer.writerow([f"{name}/{n}.png", rng.integers(4)])


def command(name: str, seed: int | None, steps: int = STEPS) -> list[str]:
    """The `soup train` command of a row, in the folder of results."""
    (row, count), (start, poor) = parted(name), domains(name)
    options: dict[str, Any] = {"data_a": f"{start}trainA", "data_b": f"{start}trainB"}
    options |= {"count_b": count} if poor == POOR else {}
    if row.exported is not None:
        options = {"data": exported(row.exported, seed)}
    options |= {"threads": 0, "sheet_every": 0 if row.trainer == "modality" else 500}
    if row.trainer != "modality":
        options |= {"steps": steps} | (TRANSLATOR if row.trainer == "balagan" else {})
    options |= row.options
    words = ["soup", "train", row.trainer, "-o", file_name(name, seed)]
    words += [] if seed is None else ["--seed", str(seed)]
    if row.start is not None:
        words += ["--start", file_name(_with(row.start, name), seed)]
    for option, value in options.items():
        words += ["--set", f"{option}={value if isinstance(value, str) else json.dumps(value)}"]
    return words


def exported(name: str, seed: int | None) -> str:
    """The folder of a row's modalities, a folder for each, as classes for another trainer."""
    return file_name(name, seed, "-classes")


def commands(name: str, seed: int | None, steps: int = STEPS) -> Iterator[list[str]]:
    """All that makes a row: what its classes are exported by, and its training."""
    row, (start, _) = parted(name)[0], domains(name)
    if row.exported is not None:
        words = ["soup", "i2i", "modalities", file_name(row.exported, seed), f"{start}trainA"]
        words += ["--b", f"{start}trainB", "-o", exported(row.exported, seed), "--as", "folders"]
        yield words
    yield command(name, seed, steps)


def translation(name: str, seed: int | None) -> list[str]:
    """The command that translates the test pictures of A, each like one of B's where that helps."""
    row, (start, poor) = parted(name)[0], domains(name)
    words = ["soup", "i2i", "translate", file_name(name, seed), f"{start}testA"]
    words += [file_name(name, seed, "-made"), "--device", "cpu"]
    if row.trainer == "balagan":
        words += ["--reference", f"{start}testB"]
    if row.trainer == "starganv2":  # whose styles are of a class; pictures have a noise each
        every = [f"B_{n:02d}" for n in range(len(poor))] if row.exported else ["B"]
        words += ["--classes", ",".join(every)]
    return words


def needed(name: str) -> list[str]:
    """The rows that a row begins with, the first ones first, and itself."""
    row = parted(name)[0]
    before = row.start or row.exported
    return [*([] if before is None else needed(_with(before, name))), name]


def _with(start: str, name: str) -> str:
    """A row that has as many pictures of B as another."""
    return ":".join([start, *name.partition(":")[2:]]) if ":" in name else start


def measure(name: str, folder: Path, seed: int | None) -> None:
    """Keep what is measured of a row, once: distances, share seen as B, collapse, rank."""
    kept, made = folder / file_name(name, seed, ".json"), folder / file_name(name, seed, "-made")
    if kept.exists():
        return
    if not made.exists():
        carry_out(translation(name, seed), folder)
    start, poor = domains(name)
    told = figures(made, folder / f"{start}testB", folder / f"{start}testA", poor, folder)
    kept.write_text(json.dumps({n: told[n] for n in MEASURED if n in told}), "utf-8")


def table(folder: Path) -> str:
    """What was measured: mean and standard deviation over the seeds of a row."""
    lines = ["| row | | \\|B\\| | " + " | ".join(MEASURED) + " | seeds |"]
    lines.append("|---|---|" + "--:|" * (len(MEASURED) + 2))
    for own, row in rows().items():
        of_count: dict[int, list[dict[str, float]]] = {}
        for file in sorted(folder.glob("*.json")):
            name = file.stem.partition("-seed-")[0]
            name, _, count = name.partition("-of-")
            if name == own:
                told = json.loads(file.read_text("utf-8"))
                of_count.setdefault(int(count or of_b(own)), []).append(told)
        for count, found in sorted(of_count.items()):
            cells = [spread([one[metric] for one in found if metric in one]) for metric in MEASURED]
            cells = [own, row.told, str(count), *cells, str(len(found))]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, rows(), "balagan-results")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a translator")
    given = parser.parse_args()
    known = rows()
    if unknown := [name for name in given.rows if name.partition(":")[0] not in known]:
        parser.error(f"there is no row {unknown[0]!r} (there are {', '.join(known)})")
    if counted := [name for name in given.rows if ":" in name and domains(name)[1] != POOR]:
        name, _, count = counted[0].partition(":")
        parser.error(f"{name} takes no count ({count}): its B has {of_b(name):,} pictures")
    for name in given.rows:
        own, colon, count = name.partition(":")
        if colon and not (count.isdecimal() and 0 < int(count) <= EACH):
            parser.error(f"{own} has {count!r} pictures of B, where 1 to {EACH} are expected")
    if given.table:
        print(table(given.results))
        return
    given.results.mkdir(parents=True, exist_ok=True)
    trainings = [classifier(name, given.data) for name in (EXTRACTOR, JUDGE)]
    for seed in given.seeds:
        of_seed = dict.fromkeys(own for name in given.rows for own in needed(name))
        trainings += [words for name in of_seed for words in commands(name, seed, given.steps)]
    if not given.print:
        pictures(given.data, given.results)
    make(trainings, given.results, printed=given.print)
    for seed, name in product(given.seeds, given.rows):
        if known[name.partition(":")[0]].trainer == "modality":
            continue
        if given.print:
            print(shlex.join(translation(name, seed)))
        else:
            measure(name, given.results, seed)
    if not given.print:
        print(table(given.results))


if __name__ == "__main__":
    main()
