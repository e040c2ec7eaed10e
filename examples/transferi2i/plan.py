"""TransferI2I and DeepI2I as plans for `soup run`: one template, with the parameters below.

    python examples/transferi2i/plan.py > tree.yaml
    python examples/transferi2i/plan.py --network biggan --method deepi2i > tree.yaml

With the defaults it says `tree.yaml` beside it, and with the second line that of
`examples/deepi2i`: pictures of `soup i2i data fashion fashion --pretrain 30000`, and networks for
two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

SIZES: Mapping[str, dict[str, Any]] = {
    "biggan": {"size": "32s", "ch": 12, "chunk": 16, "shared": 64, "attention": 0},
    "stylegan": {"size": 64, "width": 32, "code": 64, "depth": 4},
}
CLASSES: Mapping[str, tuple[str, ...]] = {"biggan": (), "stylegan": ("T-shirt", "pullover")}
TRAINING = {"batch": 16, "ema": 0.99, "average": "instead"}
STEPS = (1500, 500, 500, 1500)


def plan(
    network: str = "stylegan", method: str = "transferi2i", *, data: str = "fashion",
    classes: Sequence[str] | None = None, per_class: int | None = 100,
    pretrained: str | None = None, beta: float | None = None, steps: Sequence[int] = STEPS,
    sizes: Mapping[str, Any] | None = None, more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The template: a `tree.yaml` as plain data.

    Args:
        network: `stylegan` translates pictures of the first class into the second; `biggan` those
            of any class into any other.
        method: `transferi2i`; or `deepi2i`, which leaves out what adapts GANs and adaptor first.
        data: a folder with `pretrain.h5` and `train.h5`; for BigGAN of ten classes, where none are
            named.
        classes: of StyleGAN the source and the target; of BigGAN those that are used, all where
            none are named. None is as above.
        per_class: pictures a class that the translator and its GANs have; None is all.
        pretrained: a checkpoint of a GAN; None trains one on `pretrain.h5`.
        beta: of StyleGAN, the share of the source's GAN in the `G` and `D` that the translation
            begins with; None is the papers' choice, the target's alone.
        steps: of the pretraining, of each GAN's fine-tuning, of the adaptor's, of the translator's.
        sizes: options of the networks, in the place of those above.
        more: options of all trainings, over those above.
    """
    classes = CLASSES[network] if classes is None else classes
    if network == "stylegan" and len(classes) != 2:
        raise ValueError("StyleGAN translates between two classes: --classes SOURCE TARGET")
    if network != "stylegan" and beta is not None:
        raise ValueError("--beta is of StyleGAN, whose networks begin with those of two GANs")
    networks = {"network": network, **(SIZES[network] if sizes is None else sizes)}
    training = {**TRAINING, **(more or {})}
    whole = {**networks, **training, "data": str(PurePath(data) / "pretrain.h5")}
    few = {**networks, **training, "data": str(PurePath(data) / "train.h5"), "per_class": per_class}
    begin = {"train": {"trainer": "gan", **whole, "steps": steps[0]}}
    models: dict[str, Any] = {"pretrained": pretrained or begin}

    def tuned(of: Sequence[str]) -> dict[str, Any]:
        """Step 1a: the GAN of all pictures, on a few of some classes."""
        own = {"trainer": "gan", **few, **named(of), "encoder": True, "steps": steps[1]}
        return {"of": ["pretrained"], "finetune": own}

    def named(of: Sequence[str]) -> dict[str, Any]:
        resized = {"class_rows": "resize"} if network == "biggan" and of else {}
        return {"classes": list(of), **resized} if of else {}

    start, between = "pretrained", named(classes)
    if network == "stylegan":
        source, target = classes
        between = {"source": source, "target": target}
        models |= {"source": tuned([source]), "target": tuned([target])}
        others = {"rest": "second"} if beta is None else {"*": beta}
        models["parts"] = {
            "of": ["source", "target"],
            "merge": {"layers": {"E.*": "first"} | others},
        }
        start = "parts"
    elif method == "transferi2i":
        models["tuned"] = tuned(classes)
        start = "tuned"
    if method == "transferi2i":
        rows = {} if network == "stylegan" else {"rows": len(classes) or 10}
        own = {"trainer": "self-init", **networks, **rows, "steps": steps[2]}
        models["fits"] = {"of": [start], "finetune": own}
        start = "fits"
    own = {"trainer": method, **few, **between, "steps": steps[3]}
    return {"soup": 1, "models": models, "tree": {"of": [start], "finetune": own}}


def text(content: Mapping[str, Any]) -> str:
    """A plan as it is written: a line for each model's training."""
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=1000)


def said(settings: Sequence[str]) -> dict[str, Any]:
    """What each `NAME=VALUE` says."""
    pairs = (setting.partition("=") for setting in settings)
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def main() -> None:
    """Print the plan that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", choices=sorted(SIZES), default="stylegan")
    parser.add_argument("--method", choices=("transferi2i", "deepi2i"), default="transferi2i")
    parser.add_argument(
        "--data", default="fashion",
        help="with pretrain.h5 and train.h5; for BigGAN of ten classes, where --classes names none",
    )  # fmt: skip
    parser.add_argument(
        "--classes", nargs="*", metavar="NAME",
        help="of StyleGAN the source and the target  [default: T-shirt pullover; BigGAN: all]",
    )  # fmt: skip
    parser.add_argument("--per-class", type=int, default=100, help="pictures a class")
    parser.add_argument("--pretrained", help="a GAN's checkpoint, in the place of a training")
    parser.add_argument("--beta", type=float, help="the source's share in G and D")
    parser.add_argument("--steps", type=int, nargs=4, default=STEPS, metavar="N")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="of the networks' sizes"
    )
    given = parser.parse_args()
    sizes = {**SIZES[given.network], **said(given.set)}
    try:
        content = plan(
            given.network, given.method, data=given.data, classes=given.classes,
            per_class=given.per_class, pretrained=given.pretrained, beta=given.beta,
            steps=given.steps, sizes=sizes,
        )  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    print(text(content), end="")


if __name__ == "__main__":
    main()
