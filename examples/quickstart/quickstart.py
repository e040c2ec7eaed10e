"""The whole idea in half a minute: train leaves, merge and fine-tune up a tree, compare.

    python examples/quickstart/quickstart.py [FOLDER]        (default: runs)

Leaves the leaves, their start, the plain average, the tree's root and a picture in the folder, and
every result in the store of the current folder, where `soup run` finds them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
from digits import Options, accuracy, start, train_epoch
from safetensors.numpy import save_file

import modelsoup
from modelsoup.terminal.picture import svg
from modelsoup.trees.store import DEFAULT_STORE

HERE = Path(__file__).parent
WORKERS = 2


def main() -> None:
    """Run the tree, and what it is compared with."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(start(), folder / "start.safetensors")
    tree, _ = modelsoup.read_tree(HERE / "tree.yaml")

    def say(event: modelsoup.Event) -> None:
        if event.state in ("done", "kept"):
            figures = " ".join(f"{name} {value:.3f}" for name, value in event.metrics.items())
            print(f"{event.state:>5}  {event.node}  {figures}")

    with modelsoup.ProcessExecutor(WORKERS) as executor:
        report = modelsoup.run(
            tree, folder / "root.safetensors", force=True, watch=say, executor=executor
        )  # fmt: skip

    store = modelsoup.Store(DEFAULT_STORE)
    networks = {node: store.entry(record["key"]).path for node, record in report.records.items()}
    leaves = [folder / f"{node}.safetensors" for node in networks if node.startswith("rate-")]
    for leaf in leaves:
        shutil.copyfile(networks[leaf.stem], leaf)
    modelsoup.merge(leaves, folder / "average.safetensors", force=True)

    print("\n  accuracy on the held-out digits")
    for leaf in leaves:
        print(f"  {accuracy(leaf):.1%}  leaf, learning {leaf.stem.replace('-', ' ')}")
    print(f"  {accuracy(folder / 'average.safetensors'):.1%}  plain average of the leaves")
    print(f"  {accuracy(folder / 'root.safetensors'):.1%}  root of the tree")
    epochs = sum(
        Options(**operation.training.options).epochs
        for _, operation in tree.operations()
        if isinstance(operation, modelsoup.Train | modelsoup.FineTune)
    )
    print(f"  {accuracy(one_model(epochs)):.1%}  one model, trained for as many epochs ({epochs})")

    shown = {node: f"{accuracy(path):.1%}" for node, path in networks.items()}
    picture = folder / "tree.svg"
    picture.write_text(svg(report.plan, shown), "utf-8")
    print(f"\nThe tree with accuracies: {picture}")


def one_model(epochs: int) -> dict[str, np.ndarray]:
    """A network trained alone, at the rate of the fine-tunings."""
    weights = start()
    for epoch in range(epochs):
        train_epoch(weights, 0.1, np.random.default_rng([0, epoch]))
    return weights


if __name__ == "__main__":
    main()
