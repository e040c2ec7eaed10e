"""A step as a GPU makes it: the host waits for nothing, and learns some steps later how it went.

There is no GPU here: the same code runs on a CPU, told to be as far behind as it would be.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from i2i_domains import drawing, make_domains
from modelsoup_i2i.pictures.images import save_png
from modelsoup_i2i.trainers.cyclegan import CycleGAN
from modelsoup_i2i.trainers.deepi2i import DeepI2I
from modelsoup_i2i.trainers.gan import Gan
from modelsoup_i2i.trainers.pix2pix import Pix2Pix
from modelsoup_i2i.training.players import Player, Updates
from modelsoup_i2i.training.session import Session
from modelsoup_i2i.training.step import DivergedError
from own_trainer import Toy, ToyOptions
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

torch.set_num_threads(1)
SIZES = {"load_size": 18, "crop_size": 16, "epochs": 2, "sheet_every": 0, "lr": 1e-3}
SMALL = SIZES | {"width": 4, "d_width": 4}


class Device(Session):
    """A session that goes on as on a GPU."""

    early, behind = False, 3
    readings = 0

    def read(self):
        self.readings += 1
        return super().read()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_domains(tmp_path_factory.mktemp("domains"), count_b=6)


def on_a_device(trainer, data: Path, work: Path | None = None, **options) -> Device:
    return Device(trainer, trainer.options(data=data, **options), None, seed=1, work=work)


def toy(data: Path, work: Path | None = None, trainer=None, **options) -> Device:
    return on_a_device(trainer or Toy(), data, work, **(SIZES | options))


def pix2pix(data: Path, **options) -> Device:
    return on_a_device(
        Pix2Pix(), data, **(SMALL | {"downs": 4, "patch": 16, "flip": False} | options)
    )


def flat(own: Session) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, network in own.networks.items() for key, value in network.state_dict().items()
    }  # fmt: skip


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "losses.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def silent(*_: object) -> None:
    pass


BIGGAN = {"size": 64, "ch": 8, "accumulate": 1, "batch": 2, "sheet_every": 0}
STYLEGAN = {
    "network": "stylegan", "size": 64, "width": 8, "code": 8, "depth": 2, "batch": 2,
    "sheet_every": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classes")
    for name, kind in (("disc", "A"), ("square", "B")):
        (root / name).mkdir()
        for n in range(6):
            save_png(drawing(kind, n, 64), root / name / f"{n}.png")
    return root


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        (CycleGAN(), SMALL | {"blocks": 1, "d_layers": 1, "precision": "bf16", "accumulate": 2}),
        (Pix2Pix(), SMALL | {"downs": 4, "patch": 16, "gan": "wgan-gp", "norm": "instance"}),
        (Toy(), SIZES),
        (Toy(), SIZES | {"accumulate": 2}),
        (Gan(), BIGGAN | {"augment": ["color", "cutout"], "ada": 0.6, "ada_every": 2}),
        (Gan(), STYLEGAN | {"lambda_r1": 1.0, "r1_every": 2}),
        (DeepI2I(), STYLEGAN | {"scratch": True, "phase1": 1, "source": "disc",
                                "target": "square"}),
    ],
    ids=[
        "cyclegan-bf16", "pix2pix-wgan-gp", "toy", "toy-accumulated", "gan-ada", "gan-stylegan",
        "deepi2i-stylegan",
    ],
)  # fmt: skip
def test_no_step_asks_the_device_for_a_value(data: Path, classes: Path, trainer, options: dict):
    """Fake tensors have none, and refuse; each trainer's plain step: `test_i2i_contract.py`."""
    own = on_a_device(trainer, classes if "size" in options else data, **(options | {"epochs": 4}))
    drawn = [group for group, _ in zip(own.batches(), range(6), strict=False)]
    own.begin()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for group in drawn:  # enough for each phase and lazy term, and for a pool that is full
            own.take([{n: torch.empty_like(v) for n, v in batch.items()} for batch in group])
        assert own.steps == 6
        assert all(len(pool.images) >= min(pool.size, 6) for pool in own.pools.values())
        with pytest.raises(DataDependentOutputException):
            list(own.read())


def test_a_device_that_decides_itself_trains_as_the_host_does(data: Path, tmp_path: Path):
    """The same bits and curves, read twice an epoch of 6 steps: at the fourth and at its end."""

    class Host(Device):
        behind = 0

    told = {}
    for kind in (Host, Device):
        work = tmp_path / kind.__name__
        work.mkdir()
        options = ToyOptions(data=data, **(SIZES | {"log_every": 2}))
        own = kind(Toy(), options, None, seed=1, work=work)
        lines: list[str] = []
        figures = own.run(silent, lines.append)
        rows = curve(work)
        for row in rows:
            del row["seconds"]
        said = [line.partition(";")[0] for line in lines if line.startswith("epoch")]
        told[kind.__name__] = (rows, figures, said, own.readings)
        if kind is Host:
            wanted = flat(own)
    assert told["Host"][:3] == told["Device"][:3] and len(told["Host"][0]) == 6
    assert (told["Host"][3], told["Device"][3]) == (12, 4)
    for name, tensor in flat(own).items():
        if name.startswith("G_ema."):
            assert torch.allclose(tensor, wanted[name], rtol=1e-5, atol=1e-8), name
        else:
            assert torch.equal(tensor, wanted[name]), name


class Breaks(Toy):
    """Its fifth step is not finite, and what is made after that must be lost."""

    where = "judge"

    def judge(self, s, b):
        return self._broken("judge", s, super().judge(s, b))

    def make(self, s, b):
        return self._broken("make", s, super().make(s, b))

    def _broken(self, where, s, terms):
        broken = s.steps == 4 and self.where == where
        return {name: value * (float("nan") if broken else 1) for name, value in terms.items()}


@pytest.mark.parametrize("where", ["judge", "make"])
def test_a_step_that_is_not_finite_is_learnt_of_later_and_leaves_the_last_finite_weights(
    data: Path, tmp_path: Path, where: str
):
    trainer = Breaks()
    trainer.where = where
    before = toy(data, trainer=trainer)
    for group, _ in zip(before.batches(), range(4), strict=False):
        before.take(group)
    lines: list[str] = []
    own = toy(data, tmp_path, trainer=trainer, log_every=1)
    figures = own.run(silent, lines.append)
    assert (figures["diverged"], figures["diverged_at"], figures["steps"]) == (1, 4, 4)
    assert "not finite at step 5 of 12" in lines[-1]
    assert [row["step"] for row in curve(tmp_path)] == list("1234")
    # The discriminator's turn comes first: the generator's loss cannot take it back.
    kept = {n for n in flat(own) if where == "judge" or n.startswith("G")}
    assert all(torch.equal(flat(own)[name], flat(before)[name]) for name in kept)
    assert all(tensor.isfinite().all() for tensor in flat(own).values())
    assert same(flat(own), flat(before)) == (where == "judge")


@pytest.mark.parametrize("behind", [0, 3])
def test_a_gradient_that_is_not_finite_updates_nothing(data: Path, behind: int):
    class Own(Device):
        pass

    Own.behind = behind
    own = Own(Toy(), ToyOptions(data=data, **(SIZES | {"warm_up": 9})), None, seed=1)
    steps = own.batches()
    own.take(next(steps))
    weight = own.networks["G"].model[1].weight
    weight.register_hook(lambda g: g * (float("inf") if own.steps == 1 else 1))
    before = flat(own)
    made = [step for step, _ in own.read()]
    with pytest.raises(DivergedError):
        for _ in range(3):
            own.take(next(steps))
        made += [step for step, _ in own.read()]
    assert made == [1] and own.steps == 1 and same(flat(own), before)
    # Whoever goes on all the same goes on from there.
    weight._backward_hooks.clear()
    own.take(next(steps))
    assert [step for step, _ in own.read()] == [2] and not same(flat(own), before)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("behind", [0, 2])
def test_a_step_that_is_not_finite_moves_no_statistics(data: Path, early: bool, behind: int):
    """Of batch norm: those of NaN are NaN, and are used after the training."""

    class Own(Device):
        pass

    Own.early, Own.behind = early and not behind, behind
    options = pix2pix(data).options
    own = Own(Pix2Pix(), options, None, seed=1)
    first, second = (group for group, _ in zip(own.batches(), range(2), strict=False))
    own.optimise(first)
    before = flat(own)
    assert any("running_mean" in name for name in before)
    second[0]["x"] = second[0]["x"] * float("nan")
    with pytest.raises(DivergedError):
        for _ in range(2):
            own.take(second)
        list(own.read())
    assert same(flat(own), before)


@pytest.mark.parametrize(
    ("optimiser", "settings"),
    [
        ("Adam", {}), ("AdamW", {}), ("SGD", {"momentum": 0.9}), ("SGD", {}),
        ("Adagrad", {}), ("RMSprop", {"momentum": 0.9}), ("NAdam", {}), ("Adadelta", {}),
        ("Adam", {"amsgrad": True, "weight_decay": 0.1}), ("Adam", {"fused": False}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("moved", [0, 2], ids=["fresh", "moved"])
def test_a_device_withholds_an_update_of_any_optimiser(optimiser: str, settings: dict, moved: int):
    """And allows one that is the same as ever."""
    pairs = []
    for _ in range(2):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 3))
        pairs.append((weight, Updates(Player(("G",), 0.1, optimiser, settings), {"w": weight},
                                      early=False)))  # fmt: skip
    for step in range(moved + 2):
        for n, (weight, updates) in enumerate(pairs):
            if n and step == moved:  # the second one is given what is not finite in between
                weight.grad = torch.full_like(weight, float("nan"))
                assert not updates.finite()
                updates.set_pace(1.0)
                held = weight.clone()
                updates.apply(unless=torch.tensor(True))
                assert torch.equal(weight, held) and weight.grad is None
            updates.set_pace(1.0)
            weight.grad = torch.sin(weight.detach() + step)
            assert updates.finite()
            updates.apply(unless=torch.tensor(False)) if n else updates.apply()
    (first, _), (second, _) = pairs
    if (optimiser, moved) != ("NAdam", 0):  # its product of momenta is made with the first update
        assert torch.allclose(first, second, rtol=1e-6)


def test_the_benchmark_for_a_gpu_runs_without_one():
    """And finds all that it checks to be right."""
    script = Path(__file__).parent.parent.parent / "benchmarks" / "gpu" / "training.py"
    small = ["--device", "cpu", "--only", "cyclegan-64", "--size", "32", "--width", "4",
             "--steps", "1", "--repeat", "1", "--compile", "1"]  # fmt: skip
    run = subprocess.run(
        [sys.executable, str(script), *small], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert cells[0] == ["cyclegan-64, batch 1", "images a second", "ratio", "kernels", "waits",
                        "wall / GPU", "loop / step"]  # fmt: skip
    rows = ["published", "float32", "kernel by kernel", "bf16", "bf16, channels-last",
            "float32, compiled", "bf16, compiled"]  # fmt: skip
    assert [row[0] for row in cells[2:]] == rows
    assert cells[2][2] == "1.00" and all(float(row[1]) > 0 for row in cells[2:])
    checks = [line for line in lines if line.startswith(("ok: ", "WRONG: "))]
    assert len(checks) == 7 and all(line.startswith("ok: ") for line in checks)
    late = "not compiled: G_A, G_B, D_A, D_B: that was not done after 1 s (compile_seconds)"
    assert sum(line.endswith(late) for line in lines) == 4
