"""How far weights moved in directions that matter to what a generator makes: weight fluctuation.

WF = Σ F_i (θ'_i − θ_i)², with the diagonal empirical Fisher information at θ, the weights before:
F_i is the mean over samples of (∂ log p / ∂θ_i)² (Kirkpatrick et al., PNAS 2017). For a GAN log p
is log σ(D(G(z))) of each sample (Li et al., "Few-shot Image Generation with Elastic Weight
Consolidation", NeurIPS 2020); TransferI2I (Wang et al., ICCV 2021) compares it by block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from modelsoup import MismatchError, ParameterError, get_trainer, open_checkpoint

from ..networks.devices import chosen_device
from ..networks.shapes import must_match, part_of
from ..use.generators import load_network

Arrays = Mapping[str, np.ndarray]
_NUMBERED = re.compile(r"^(.*?\.\d+)(\.|$)")


@dataclass(frozen=True)
class Fluctuation:
    """Of some weights.

    Attributes:
        sum: Σ F_i Δ_i².
        mean: that over how many weights there are.
        count: how many.
    """

    sum: float
    mean: float
    count: int


def information(gradients: Iterable[Arrays]) -> dict[str, np.ndarray]:
    """The diagonal empirical Fisher information, float64, of the gradient of each sample's log p.

    Args:
        gradients: one mapping a sample, name → ∂ log p / ∂θ; only one is held.

    Raises:
        ParameterError: there are none.
        MismatchError: one is of other names or shapes than the first, or is not finite.
    """
    total: dict[str, np.ndarray] = {}
    count = 0
    for own in gradients:
        if count and own.keys() != total.keys():
            raise MismatchError("the gradients of a sample are of other weights than the first's")
        for name, values in own.items():
            squared = np.square(values, dtype=np.float64)
            if not np.isfinite(squared).all():
                raise MismatchError(f"the gradient of {name} holds NaN or infinity")
            total[name] = total[name] + squared if count else squared
        count += 1
    if not count:
        raise ParameterError("the Fisher information is a mean over samples, and there are none")
    return {name: values / count for name, values in total.items()}


def fluctuation(
    before: Arrays, after: Arrays, fisher: Arrays, block: Callable[[str], str] | None = None
) -> dict[str, Fluctuation]:
    """The weight fluctuation between two states of a network, by block.

    Args:
        before: the weights at which the information was computed, by name.
        after: those of the same names.
        fisher: of `information`, by name: only these are compared.
        block: what a name belongs to; None is `block_of`.

    Returns:
        by block, in the order of names.

    Raises:
        MismatchError: a weight is missing, or of another shape.
    """
    parts: dict[str, list[tuple[float, int]]] = {}
    for name, weight in fisher.items():
        for said, own in (("before", before), ("after", after)):
            if name not in own:
                raise MismatchError(f"there is no weight {name!r} in what came {said}")
            if own[name].shape != weight.shape:
                raise MismatchError(
                    f"{name!r} is {list(own[name].shape)} in what came {said}, but its information "
                    f"{list(weight.shape)}"
                )
        moved = np.asarray(after[name], np.float64) - np.asarray(before[name], np.float64)
        value = float((weight * np.square(moved)).sum())
        parts.setdefault((block or block_of)(name), []).append((value, weight.size))
    found = {}
    for name, several in parts.items():
        total, count = sum(value for value, _ in several), sum(size for _, size in several)
        found[name] = Fluctuation(total, total / count, count)
    return found


def block_of(name: str) -> str:
    """The block that a weight is of: its name up to the first number, or without its last part.

    `blocks.0.0.conv1.weight` is of `blocks.0`, `linear.bias` of `linear`.
    """
    numbered = _NUMBERED.match(name)
    return numbered[1] if numbered else name.rpartition(".")[0] or name


def between(
    before: Path, after: Path, *, samples: int = 256, seed: int = 0, device: str = "cpu"
) -> dict[str, Fluctuation]:
    """The weight fluctuation of the generator `G` between two checkpoints, by block.

    Its information is that of the first one, whose discriminator `D` judges what it makes of noise
    and classes alone, both as in use. The weights are those that were trained, not their average.

    Args:
        before: with `G.*` and `D.*` of a GAN.
        after: with `G.*`; whatever else is in it.
        samples: how many are made.
        seed: of their noise and classes.
        device: where.

    Raises:
        ParameterError: no samples.
        CheckpointError: a file is missing or damaged, or holds NaN or infinity.
        MismatchError: one has no such networks, or the two are of other sizes.
    """
    if samples < 1:
        raise ParameterError(f"samples is {samples}, where at least 1 is expected")
    trainer: Any = get_trainer("gan")
    place = chosen_device(device)
    shapes = {name: info.shape for name, info in open_checkpoint(before).tensors.items()}
    pair = {name: shape for name, shape in shapes.items() if name.startswith(("G.", "D."))}
    if not any(name.startswith("D.") for name in pair):
        raise MismatchError(
            f"{before} has no discriminator: no name begins with 'D.', and it says what matters"
        )
    try:
        options = trainer.options(**trainer.options_in(pair))
    except MismatchError as error:
        raise MismatchError(f"{before}: {error}") from None
    networks = trainer.networks(options)
    shapes = {name: info.shape for name, info in open_checkpoint(after).tensors.items()}
    try:  # before minutes of work
        must_match(part_of(shapes, "G.", "generator")[0], networks["G"].shapes(), "its G")
    except MismatchError as error:
        raise MismatchError(f"{after}, beside {before}: {error}") from None
    first, last = (load_network(file, "G", networks["G"], averaged=False).to(place)
                   for file in (before, after))  # fmt: skip
    judge = load_network(before, "D", networks["D"], averaged=False).to(place).requires_grad_(False)
    own, how = dict(first.named_parameters()), trainer.translators(options)["G"]

    def gradients() -> Iterator[dict[str, np.ndarray]]:
        rng = np.random.default_rng(seed)
        for number in range(samples):
            label = int(rng.integers(how.classes)) if how.classes else 0
            given = [torch.from_numpy(values).to(place)
                     for values in how.given([str(number)], label, seed=seed)]  # fmt: skip
            labels = [values for values in given if not values.is_floating_point()]
            likelihood = F.logsigmoid(judge(first(*given), *labels)).sum()
            found = torch.autograd.grad(likelihood, list(own.values()), allow_unused=True)
            yield {
                name: np.zeros(parameter.shape) if one is None else one.cpu().numpy()
                for (name, parameter), one in zip(own.items(), found, strict=True)
            }

    earlier, later = (
        {name: parameter.detach().cpu().numpy() for name, parameter in one.named_parameters()}
        for one in (first, last)
    )
    return fluctuation(earlier, later, information(gradients()))
