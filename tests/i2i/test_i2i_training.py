"""What the loop owns for all trainers: phases, averages, lazy terms, accumulation, resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from i2i_domains import make_domains
from modelsoup_i2i.training.players import Player, Updates, optimiser
from modelsoup_i2i.training.state import State
from own_trainer import Toy, ToyOptions

import modelsoup

torch.set_num_threads(1)
SIZES = {"load_size": 18, "crop_size": 16, "epochs": 2, "sheet_every": 0, "lr": 1e-3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_domains(tmp_path_factory.mktemp("domains"))


def session(data: Path, work: Path | None = None, **options):
    return Toy().session(ToyOptions(data=data, **(SIZES | options)), None, seed=1, work=work)


def flat(own: State) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, network in own.networks.items() for key, value in network.state_dict().items()
    }  # fmt: skip


def silent(*_: object) -> None:
    pass


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_run_that_goes_on_in_any_phase_ends_with_the_same_bits(
    data: Path, tmp_path: Path, accumulate: int, at: int
):
    options = {"accumulate": accumulate, "checkpoint_every": at, "epochs": 3}
    whole = session(data, **options)
    whole.run(silent, silent)
    early = session(data, tmp_path, **options)
    steps = early.batches()
    for _ in range(at):
        early.optimise(next(steps))
    early.keep()
    later = session(data, tmp_path, **options)
    later.run(silent, silent)
    assert later.steps == whole.steps > at
    assert all(torch.equal(value, flat(whole)[name]) for name, value in flat(later).items())


def test_players_move_in_their_turns(data: Path):
    own = session(data)
    batches = own.batches()
    moved = []
    for _ in range(4):
        before = flat(own)
        losses = own.optimise(next(batches))
        moved.append({n.partition(".")[0] for n, v in flat(own).items()
                      if not torch.equal(v, before[n])})  # fmt: skip
        moved.append(set(losses))
    assert moved == [
        {"G", "G_ema"}, {"copy"}, {"G", "G_ema"}, {"copy"},
        {"G", "G_ema", "D"}, {"judge", "gan", "copy", "make"},
        {"G", "G_ema", "D"}, {"judge", "penalty", "gan", "copy", "make"},
    ]  # fmt: skip


def test_an_average_after_one_step_is_what_one_computes_by_hand(data: Path):
    own = session(data)
    before = flat(own)
    own.optimise(next(own.batches()))
    after = flat(own)
    for name in [name for name in after if name.startswith("G.")]:
        averaged = name.replace("G.", "G_ema.")
        assert torch.equal(before[averaged], before[name])
        wanted = 0.9 * before[name].double() + 0.1 * after[name].double()
        assert torch.allclose(after[averaged].double(), wanted, rtol=1e-6, atol=1e-9)


def test_averages_are_told_saved_and_gone_on_from(data: Path, tmp_path: Path):
    own = session(data)
    own.run(silent, silent)
    own.save(tmp_path / "out.safetensors")
    options = ToyOptions(data=data, **SIZES)
    made = modelsoup.open_checkpoint(tmp_path / "out.safetensors")
    assert {n: (i.dtype, i.shape) for n, i in made.tensors.items()} == Toy().tensors(options)
    again = Toy().session(options, tmp_path / "out.safetensors", seed=2)
    assert all(torch.equal(value, flat(own)[name]) for name, value in flat(again).items())
    # A start without averages begins them with the weights that it has.
    from safetensors.numpy import save_file

    part = {name: made[name] for name in made if not name.startswith("G_ema.")}
    save_file(part, tmp_path / "part.safetensors")
    fresh = flat(Toy().session(options, tmp_path / "part.safetensors", seed=2))
    assert all(
        torch.equal(fresh[name.replace("G.", "G_ema.")], fresh[name])
        for name in fresh if name.startswith("G.")
    )  # fmt: skip


def test_what_is_drawn_depends_on_neither_workers_nor_what_came_before(data: Path):
    drawn = [list(session(data, threads=threads).batches()) for threads in (0, 1, 3)]
    late = session(data)
    late.steps = 4
    for single, *others in zip(*drawn, list(late.batches()), strict=False):
        for other in others[:2]:
            assert all(torch.equal(other[0][name], values) for name, values in single[0].items())
    for again, first in zip(late.batches(), drawn[0][4:], strict=True):
        assert again[0].keys() == {"x", "y", "z", "c"}
        assert all(torch.equal(again[0][name], values) for name, values in first[0].items())
    noises = torch.stack([group[0]["z"] for group in drawn[0]])
    assert len(torch.unique(noises)) == noises.numel()
    assert {int(group[0]["c"]) for group in drawn[0]} <= set(range(5))


def test_a_trainer_of_ones_own_is_one_in_a_plan(data: Path, tmp_path: Path):
    """By its module and class, from a folder beside the plan."""
    train = {"trainer": "own_trainer:Toy", "data": str(data), **SIZES}
    models = {name: {"train": {**train, "lr": lr}} for name, lr in (("a", 1e-3), ("b", 2e-3))}
    tree, _ = modelsoup.parse_tree(
        __import__("json").dumps({"soup": 1, "models": models, "tree": {"of": ["a", "b"]},
                                  "defaults": {"finetune": train}})
    )  # fmt: skip
    report = modelsoup.run(tree, tmp_path / "root.safetensors", store=tmp_path / "store")
    (root,) = [r for r in report.records.values() if r["operation"] == "finetune"]
    assert root["metrics"]["steps"] == 12 and root["metrics"]["diverged"] == 0
    assert np.isfinite(modelsoup.open_checkpoint(report.output)["G_ema.model.1.weight"]).all()


def test_an_optimiser_that_torch_lacks_is_told_with_the_nearest():
    with pytest.raises(modelsoup.TrainerError, match=r"no optimiser 'Adm'; did you mean 'Adam'"):
        optimiser("Adm")
    parameters = {"w": torch.nn.Parameter(torch.zeros(2))}
    with pytest.raises(
        modelsoup.TrainerError, match=r"torch's SGD takes no such settings: .*betas"
    ):
        Updates(Player(("G",), 1e-3, "SGD", {"betas": (0, 1)}), parameters, early=False)
    with pytest.raises(
        modelsoup.TrainerError, match=r"torch's Adam takes no such settings: .*beta"
    ):
        Updates(Player(("G",), 1e-3, settings={"betas": (2, 1)}), parameters, early=False)
