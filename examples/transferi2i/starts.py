"""Where a translation begins: with the target's GAN, or with a mean of both, on Fashion-MNIST.

    soup i2i data fashion fashion --pretrain 30000
    python examples/transferi2i/starts.py --data fashion
    python examples/transferi2i/starts.py --data fashion --shares target 0.5 --seeds 0 1 2

The plans of `plan.py`, T-shirts into pullovers, that differ by their `--beta` alone: all but the
last two stages is made once. Each is measured on 1,000 test pictures of both kinds.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from fashion import (
    EXTRACTOR,
    JUDGE,
    carry_out,
    classifier,
    figures,
    file_of,
    make,
    save_pictures,
    spread,
)
from plan import CLASSES, SIZES, STEPS, plan, said, text

TESTED = 1000  # test pictures of a class
TARGET = "target"  # the papers' choice
SHARES = (TARGET, "0.25", "0.5")
MEASURED = ("fd", "kd", "rc", "diversity", "duplicates", "source_rank")


def measure(share: str, folder: Path, seed: int | None) -> None:
    """Keep what is measured of a translator, once."""
    name = f"start-{share}"
    kept, made = folder / file_of(name, seed, ".json"), folder / file_of(name, seed, "-made")
    if kept.exists():
        return
    if not made.exists():
        words = ["soup", "i2i", "translate", file_of(name, seed), "source", str(made.name)]
        carry_out([*words, "--device", "cpu"], folder)
    told = figures(made, folder / "target", folder / "source", CLASSES["stylegan"][1:], folder)
    kept.write_text(json.dumps({n: told[n] for n in MEASURED}), "utf-8")


def table(folder: Path, shares: list[str]) -> str:
    """What was measured: mean and standard deviation over seeds."""
    lines = ["| G and D begin with | " + " | ".join(MEASURED) + " | seeds |"]
    lines.append("|---|" + "--:|" * (len(MEASURED) + 1))
    for share in shares:
        files = [*folder.glob(f"start-{share}.json"), *folder.glob(f"start-{share}-seed-*.json")]
        found = [json.loads(file.read_text("utf-8")) for file in files]
        cells = [spread([own[metric] for own in found]) for metric in MEASURED]
        told = "the target's GAN" if share == TARGET else f"{share} of the source's"
        lines.append("| " + " | ".join([told, *cells, str(len(found))]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of `soup i2i data`")
    parser.add_argument("--results", type=Path, default=Path("transferi2i-results"))
    parser.add_argument("--shares", nargs="+", default=list(SHARES), metavar="SHARE",
                        help=f"of the source's GAN, or {TARGET}")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[None], metavar="N")
    parser.add_argument("--steps", type=int, nargs=4, default=STEPS, metavar="N")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="of the networks' sizes"
    )
    given = parser.parse_args()
    sizes = {**SIZES["stylegan"], **said(given.set)}
    folder: Path = given.results
    folder.mkdir(parents=True, exist_ok=True)
    for place, kind in zip(("source", "target"), CLASSES["stylegan"], strict=True):
        save_pictures(given.data / "test.h5", [kind], TESTED, folder / place)
    make([classifier(name, given.data) for name in (EXTRACTOR, JUDGE)], folder, printed=False)
    for seed, share in product(given.seeds, given.shares):
        beta = None if share == TARGET else float(share)
        content = plan(data=str(given.data.resolve()), beta=beta, steps=given.steps, sizes=sizes)
        content |= {} if seed is None else {"seed": seed}
        file = folder / file_of(f"start-{share}", seed, ".yaml")
        file.write_text(text(content), "utf-8")
        output = file.with_suffix(".safetensors").name
        make([["soup", "run", file.name, "-o", output]], folder, printed=False)
        measure(share, folder, seed)
    print(table(folder, given.shares))


if __name__ == "__main__":
    main()
