"""A greedy soup: add the runs one by one, the best first, and keep those that help.

Run `examples/quickstart/quickstart.py` first: this works on the runs that it leaves in `runs/`.
For a real project, choose by a validation set and report on a test set; here one held-out set
is both.

    python examples/quickstart/greedy_soup.py [FOLDER]

Source: Wortsman et al., Model soups, ICML 2022, recipe 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

from digits import accuracy

import modelsoup


def main() -> None:
    """Print what each run adds."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    runs = sorted(folder.glob("rate-*.safetensors"), key=accuracy, reverse=True)
    if not runs:
        raise SystemExit(f"no runs in {folder}: run examples/quickstart/quickstart.py first")
    soup, trial = folder / "greedy.safetensors", folder / "trial.safetensors"
    chosen = [runs[0]]
    best = accuracy(runs[0])
    print(f"{runs[0].name}: {best:.1%}")
    for run in runs[1:]:
        modelsoup.merge([*chosen, run], trial, force=True)
        reached = accuracy(trial)
        kept = reached >= best
        print(f"with {run.name}: {reached:.1%}, {'kept' if kept else 'left out'}")
        if kept:
            chosen.append(run)
            best = reached
    trial.unlink(missing_ok=True)
    if len(chosen) > 1:
        modelsoup.merge(chosen, soup, force=True)
        print(f"{soup}: {best:.1%}, of {len(chosen)} runs")


if __name__ == "__main__":
    main()
