"""A tiny CycleGAN on tiny pictures, quantised once, and what the tests of this folder share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SIZES = {
    "load_size": 36, "crop_size": 32, "device": "cpu", "threads": 0, "sheet_every": 0,
    "pool_size": 2,
}  # fmt: skip
SHAPE = {"width": 8, "blocks": 2, "d_width": 4, "d_layers": 2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What NNCF and torch.compile warn of among themselves.

    NNCF leaves a thread pool open when it looks for its extension, which is found much later. Its
    own operations are compiled, and the compiler looks at gradients with warnings hidden, which is
    no hiding where they are errors.
    """
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
            item.add_marker(
                pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
            )
            item.add_marker(
                pytest.mark.filterwarnings(
                    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
                )
            )


@pytest.fixture(scope="session", autouse=True)
def small_machine(clean_environment: None) -> Iterator[None]:
    """One thread, so that sums have one order; no compiler, so that nothing is compiled."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "/bin/false")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`trainA` … `testB` with pictures of coloured squares."""
    from modelsoup_i2i.pictures.images import save_png

    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part, count in (("trainA", 4), ("trainB", 3), ("testA", 2), ("testB", 2)):
        (root / part).mkdir()
        for n in range(count):
            squares = rng.integers(0, 256, (6, 6, 3))
            picture = np.kron(squares, np.ones((6, 6, 1))).astype(np.uint8)
            save_png(picture, root / part / f"{n}.png")
    return root


@pytest.fixture(scope="session")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of all four networks, with weights large enough for pictures with contrast."""
    from modelsoup_i2i.trainers.cyclegan import CycleGAN, CycleGANOptions

    options = CycleGANOptions(data=data, **SIZES, **SHAPE)
    session = CycleGAN().session(options, None, seed=0)
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    session.save(path)
    return path


def device_plan(path: Path, start: Path, data: Path, **options: Any) -> Path:
    """A tree that quantises a checkpoint; `path` is where it is written."""
    training = {"data": str(data), **SIZES, **SHAPE}
    node = {"trainer": "openvino-qat", "of": "cyclegan", "training": training, **options}
    tree = {"of": ["start"], "finetune": node}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"soup": 1, "models": {"start": str(start)}, "tree": tree}))
    return path


@dataclass(frozen=True)
class Made:
    """A run of `quantise_to`."""

    out: Path
    told: dict[str, Any]
    lines: list[str]


@pytest.fixture(scope="session")
def quantise(data: Path, start: Path) -> Callable[..., Made]:
    """`quantise(folder, **options)`: a run with its output in `folder/out`."""
    from modelsoup_openvino.trainer import OpenVinoQat, quantise_to

    import modelsoup

    def run(
        folder: Path, *, frozen: tuple[str, ...] = (), say: Callable[[str], None] = lambda _: None,
        model: Path = start, force: bool = True, sizes: dict[str, Any] = SIZES, **given: Any,
    ) -> Made:  # fmt: skip
        lines: list[str] = []

        def log(line: str) -> None:
            lines.append(line)
            say(line)

        out, work = folder / "out", folder / "work"
        work.mkdir(exist_ok=True)
        training = {"data": str(data), **sizes, **given.pop("training", {})}
        values = {"of": "cyclegan", "out": str(out), "rounds": 0, "training": training, **given}
        options = modelsoup.build_options(OpenVinoQat(), values)
        told = quantise_to(
            options, model, out, seed=5, frozen=frozen, work=work,
            report=lambda done, figures: None, log=log, force=force,
        )  # fmt: skip
        return Made(out, told, lines)

    return run


@pytest.fixture(scope="session")
def made(quantise: Callable[..., Made], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Calibrated, trained for two epochs at a rate that changes much, exported, measured."""
    return quantise(tmp_path_factory.mktemp("made"), epochs=2, rate=1e-3, rounds=1)
