"""What the loop owns for all trainers: phases, averages, lazy terms, accumulation, resume."""

from __future__ import annotations

import csv
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from i2i_domains import make_domains
from i2i_states import flat, silent
from modelsoup_i2i.measuring.evaluation import find_sets
from modelsoup_i2i.pictures.draws import Unpaired
from modelsoup_i2i.pictures.images import save_png
from modelsoup_i2i.training import estimates
from modelsoup_i2i.training.curves import Curve
from modelsoup_i2i.training.players import Player, Updates, backward, optimiser
from modelsoup_i2i.training.turns import Turn
from modelsoup_i2i.use.generators import load_generator
from own_trainer import Toy, ToyOptions

import modelsoup

torch.set_num_threads(1)
SIZES = {"load_size": 18, "crop_size": 16, "epochs": 2, "sheet_every": 0, "lr": 1e-3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_domains(tmp_path_factory.mktemp("domains"))


def session(data: Path, work: Path | None = None, **options):
    return Toy().session(ToyOptions(data=data, **(SIZES | options)), None, seed=1, work=work)


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


def test_averaged_weights_are_those_that_are_used(data: Path, tmp_path: Path):
    modelsoup.register_trainer(Toy())
    own = session(data, load_size=36, crop_size=32)
    own.run(silent, silent)
    own.save(tmp_path / "out.safetensors")
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        made = load_generator(tmp_path / "out.safetensors")(image)
        averaged, last = (own.networks[name].eval()(image) for name in ("G_ema", "G"))
    assert torch.allclose(made, averaged, atol=1e-6) and not torch.allclose(made, last, atol=1e-4)


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


class Renewed(Toy):
    version = "2"


def test_a_state_of_another_version_or_of_other_phases_is_refused(data: Path, tmp_path: Path):
    own = session(data, tmp_path)
    own.optimise(next(own.batches()))
    own.keep()
    renewed = Renewed().session(ToyOptions(data=data, **SIZES), None, seed=1, work=tmp_path)
    with pytest.raises(
        modelsoup.TrainerError, match=r"with other options.*: trainer 'toy 1' → 'toy"
    ):
        renewed.resume()
    with pytest.raises(modelsoup.TrainerError, match=r"with other options.*: warm_up 2 → 1$"):
        session(data, tmp_path, warm_up=1).resume()


class OfOtherSets(Toy):
    def draws(self, o):
        return [Unpaired(("x", "y"), ("X", "Z"))]


class OfOtherNetworks(Toy):
    def players(self, o):
        return super().players(o) | {"D": Player(("D", "Ge"), o.lr)}


class OfOtherPlayers(Toy):
    def turns(self, o, step):
        return [Turn("copy", ("Gs",), (self.copy,))]


class ThatCallsOthers(Toy):
    def copy(self, s, b):
        return {"copy": s["Gr"](b.x).mean()}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (OfOtherSets, "toy draws of the set 'Z' (there are X, Y)"),
        (OfOtherNetworks, "the player 'D' moves the network 'Ge'; did you mean 'G' or "
                          "'G_ema'? (there are G, D, G_ema)"),
        (OfOtherPlayers, "the turn 'copy' moves the player 'Gs'; did you mean 'G'? (there are G, "
                         "D)"),
        (ThatCallsOthers, "a loss calls the network 'Gr'; did you mean 'G'? (there are G, D, "
                          "G_ema)"),
    ],
)  # fmt: skip
def test_what_a_trainer_names_and_does_not_have_is_told(kind: type[Toy], said: str, data: Path):
    own = kind().session(ToyOptions(data=data, **SIZES), None, seed=0)
    with pytest.raises(modelsoup.TrainerError) as told:
        own.optimise(next(own.batches()))
    assert str(told.value) == said


@pytest.mark.parametrize("early", [False, True])
def test_some_tensors_of_a_player_may_learn_more_slowly(early: bool):
    names = ("G.style.1.bias", "G.to_rgb.bias", "G.style.3.bias")
    parameters = {name: torch.nn.Parameter(torch.zeros(2)) for name in names}
    player = Player(("G",), 0.5, "SGD", shares={"G.style.": 0.01})
    updates = Updates(player, parameters, early=early)
    updates.set_pace(0.5)
    backward(sum(own.sum() for own in parameters.values()), [updates])
    updates.apply()
    slow, fast = torch.full((2,), -0.0025), torch.full((2,), -0.25)
    for name, moved in zip(names, (slow, fast, slow), strict=True):
        torch.testing.assert_close(parameters[name].detach(), moved)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def trained(folder: Path, data: Path, *, until: int | None = None, **options) -> Told:
    """Train as a plan does; or, with `until`, as one that is killed in that step."""
    told, work = Told(), folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    made = ToyOptions(data=data, **(SIZES | {"samples": folder / "shown"} | options))
    job = modelsoup.Job(
        None, folder / "out.safetensors", work, (), 1, made, told.report, told.lines.append,
        told.notes.update,
    )  # fmt: skip
    if until is None:
        Toy().train(job)
        return told

    class Killed(Toy):
        def turns(self, o, step):
            if step == until:
                raise KeyboardInterrupt
            return super().turns(o, step)

    with pytest.raises(KeyboardInterrupt):
        Killed().train(job)
    return told


class Told:
    """What a trainer reports, logs and notes."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.lines: list[str] = []
        self.notes: dict[str, object] = {}

    def report(self, done, metrics) -> None:
        self.metrics |= metrics


def weights(folder: Path) -> dict[str, np.ndarray]:
    opened = modelsoup.open_checkpoint(folder / "out.safetensors")
    return {name: opened[name] for name in opened}


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(value, second[name]) for name, value in first.items()
    )


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every test image has its truth."""
    return make_domains(tmp_path_factory.mktemp("paired"), 4, 4)


def test_metrics_while_training_change_nothing_of_it(paired: Path, tmp_path: Path):
    told = trained(tmp_path / "with", paired, evaluate=["psnr"], evaluate_every=3)
    trained(tmp_path / "without", paired)
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))
    shown = tmp_path / "with" / "shown" / "work"
    rows = table(shown / "metrics.csv")
    assert [row["step"] for row in rows] == ["3", "6", "8"]
    assert all(float(row["psnr"]) > 0 for row in rows)
    # The last one is of the result, as what is measured after the training is.
    assert float(rows[-1]["psnr"]) == pytest.approx(told.metrics["psnr"], rel=1e-5)
    assert f"step 3: psnr {float(rows[0]['psnr']):.4g}" in told.lines
    assert not (tmp_path / "without" / "shown" / "work" / "metrics.csv").exists()


def test_curves_of_a_run_that_goes_on_are_those_of_one_that_did_not(paired: Path, tmp_path: Path):
    options = {
        "evaluate": ["psnr"], "evaluate_every": 2, "log_every": 3, "checkpoint_every": 4,
        "epochs": 3,
    }  # fmt: skip
    trained(tmp_path / "whole", paired, **options)
    # Rows of steps 5 and 6 are there when it goes on after step 4.
    trained(tmp_path / "cut", paired, until=7, **options)
    trained(tmp_path / "cut", paired, **options)
    for name in ("losses.csv", "metrics.csv"):
        whole, cut = (table(tmp_path / n / "shown" / "work" / name) for n in ("whole", "cut"))
        assert whole == cut and len(whole) >= 4
    losses = table(tmp_path / "whole" / "shown" / "work" / "losses.csv")
    assert [row["step"] for row in losses] == ["3", "6", "9", "12"]
    assert losses[0]["copy"] and losses[0]["judge"]


def test_a_figure_that_comes_later_is_a_column_more(tmp_path: Path):
    curve = Curve(tmp_path / "sub" / "x.csv", 0)
    curve.add(1, {"a": 0.5})
    curve.add(2, {"a": 0.25, "b": 3})
    curve.add(3, {"b": 1e-9})
    lines = (tmp_path / "sub" / "x.csv").read_text().splitlines()
    assert [",".join(line.split(",")[:1] + line.split(",")[2:]) for line in lines] == [
        "step,a,b", "1,0.5,", "2,0.25,3", "3,,1e-09"
    ]  # fmt: skip
    # Seconds go on from the last row that is kept.
    rows = "step,seconds,a\n1,2.0,0\n2,50.0,0\n3,90.0,0\n"
    (tmp_path / "y.csv").write_text(rows)
    Curve(tmp_path / "y.csv", 2).add(4, {"a": 1})
    *_, last = (tmp_path / "y.csv").read_text().splitlines()
    assert last.startswith("4,5") and len((tmp_path / "y.csv").read_text().splitlines()) == 4
    # What is not such a table is written anew.
    for text in ("", "st", "name,step\nx,1\n", "step,seconds\n1"):
        (tmp_path / "z.csv").write_text(text)
        Curve(tmp_path / "z.csv", 9).add(10, {"a": 1})
        assert table(tmp_path / "z.csv") == [{"step": "10", "a": "1"}], text
    # A last row that a crash cut short is not one.
    with (tmp_path / "sub" / "x.csv").open("a") as file:
        file.write("4,0.")
    later = Curve(tmp_path / "sub" / "x.csv", 4)
    later.add(5, {"a": 1})
    assert [row["step"] for row in table(tmp_path / "sub" / "x.csv")] == ["1", "2", "3", "5"]


def test_the_best_one_is_the_result_and_the_last_one_stays_beside_it(paired: Path, tmp_path: Path):
    """At a rate that is far too high, what comes later is worse."""
    options = {
        "evaluate": ["psnr"], "evaluate_every": 1, "keep": {"best": "psnr"}, "lr": 0.3,
        "epochs": 2, "warm_up": 0,
    }  # fmt: skip
    trained(tmp_path, paired, **options)
    rows = table(tmp_path / "shown" / "work" / "metrics.csv")
    best = max(rows, key=lambda row: float(row["psnr"]))
    assert best["step"] != rows[-1]["step"]
    folders = paired / "testA", paired / "testB"
    made = ToyOptions(data=paired, **SIZES)
    sets = find_sets(folders, transform=made.transform())
    own = Toy().session(made, tmp_path / "out.safetensors", seed=0)
    own.options = ToyOptions(data=paired, evaluate=["psnr"], **SIZES)
    own.begin()
    assert own.evaluate(sets)["psnr"] == pytest.approx(float(best["psnr"]), rel=1e-5)
    last = modelsoup.open_checkpoint(tmp_path / "shown" / "work" / "last.safetensors")
    assert not np.array_equal(last["G.model.1.weight"], weights(tmp_path)["G.model.1.weight"])
    # Killed after the best one was found: it is known when the training goes on.
    trained(tmp_path / "cut", paired, until=5, checkpoint_every=1, **options)
    trained(tmp_path / "cut", paired, checkpoint_every=1, **options)
    assert same(weights(tmp_path / "cut"), weights(tmp_path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"evaluate_every": 5}, "evaluate_every needs metrics: evaluate, a list"),
        ({"keep": {"best": "psnr"}}, "best psnr, which is not evaluated .*evaluate has none"),
        ({"keep": {"best": "psn"}, "evaluate": ["psnr"], "evaluate_every": 1}, "mean 'psnr'"),
        ({"keep": {"best": "psnr"}, "evaluate": ["psnr"]}, "evaluate_every is 0"),
        ({"keep": {"worst": "psnr"}}, "'keep"),
        ({"keep": {}}, r"keep is \{\}, but must be last, or \{best: METRIC\}"),
        ({"evaluate_n": 1}, "'evaluate_n' .* must be at least 2"),
        (
            {"stop_on_collapse": 2, "evaluate": ["psnr"], "evaluate_every": 1},
            "stop_on_collapse is 2, .* distance of sets, such as fd-st-alex .evaluate has psnr;",
        ),
        ({"stop_on_collapse": 2, "evaluate": ["kid"]}, "evaluate has kid; evaluate_every is 0"),
        ({"log_every": 0}, "'log_every' .* must be at least 1"),
    ],
)
def test_what_is_kept_must_be_evaluated(options: dict, said: str, paired: Path):
    with pytest.raises(modelsoup.TrainerError, match=said):
        modelsoup.build_options(Toy(), {"data": str(paired), **options})


def test_a_test_picture_that_is_gone_costs_no_training_but_where_it_chooses(tmp_path: Path):
    data = make_domains(tmp_path / "domains", 4, 4)
    picture = data / "testA" / "1.png"
    whole = picture.read_bytes()

    def spoil(folder: Path, **options) -> Told:
        told, work = Told(), folder / "work"
        work.mkdir(parents=True)
        made = ToyOptions(data=data, evaluate=["psnr"], evaluate_every=1, **SIZES, **options)

        def log(line: str) -> None:
            told.lines.append(line)
            if line.startswith("step 2: psnr"):
                picture.write_bytes(b"nothing")

        job = modelsoup.Job(None, folder / "out.safetensors", work, (), 1, made, told.report, log)
        try:
            Toy().train(job)
        finally:
            picture.write_bytes(whole)
        return told

    told = spoil(tmp_path / "told")
    assert any(line.startswith("not evaluated at step 3: ") and "1.png" in line
               for line in told.lines)  # fmt: skip
    assert told.metrics["steps"] == 8
    with pytest.raises(modelsoup.SoupError, match=r"1\.png"):
        spoil(tmp_path / "chosen", keep={"best": "psnr"})


def test_what_was_found_last_is_known_when_a_training_goes_on(data: Path):
    own, later = session(data), session(data)
    own.sound, own.collapsed, own.best = 7, 2, {"step": 3.0, "value": 0.5}
    later.load_state_dict(own.state_dict())
    assert (later.sound, later.collapsed, later.best) == (7, 2, {"step": 3.0, "value": 0.5})


def test_what_chooses_the_result_is_part_of_its_key(paired: Path):
    plain = ToyOptions(data=paired, evaluate=["psnr"], evaluate_every=2)
    often = dataclasses.replace(plain, evaluate_every=3)
    assert Toy().identity(plain) == Toy().identity(often)
    best, other = (dataclasses.replace(o, keep={"best": "psnr"}) for o in (plain, often))
    assert Toy().identity(best) != Toy().identity(other) != Toy().identity(plain)
    tests = {file for file in paired.rglob("*.png") if file.parent.name.startswith("test")}
    assert set(Toy().files(best)) == {*Toy().files(plain), *tests} > set(Toy().files(plain))
    seen = dataclasses.replace(plain, evaluate=["fd-st-alex"])
    stops = dataclasses.replace(seen, stop_on_collapse=2)
    assert Toy().identity(seen) == Toy().identity(plain) != Toy().identity(stops)
    other = dataclasses.replace(stops, evaluate=["kid"])  # other features
    assert Toy().identity(other) != Toy().identity(stops)
    assert set(Toy().files(stops)) == {*Toy().files(plain), *tests}


@pytest.mark.needs("offline")
def test_a_collapse_is_told_when_it_happens(tmp_path: Path):
    """A generator whose last layer is 0 makes one grey of everything."""
    data = make_domains(tmp_path / "domains", 6, 6, size=32)
    options = {"load_size": 24, "crop_size": 24, "evaluate": ["kd-st-alex"], "evaluate_every": 1}

    told, work = Told(), tmp_path / "work"
    work.mkdir()
    made = ToyOptions(data=data, **(SIZES | options | {"epochs": 1}))
    session = Toy().session(made, None, seed=1, work=work)
    session.sets = find_sets((data / "testA", data / "testB"), transform=made.transform())
    session.begin()
    with torch.no_grad():
        session.networks["G_ema"].model[-2].weight.zero_()
    figures = session.evaluate(session.sets)
    assert figures["collapse"] == 3 and figures["diversity"] < 0.01  # dead, here
    figures = session._evaluated(told.report, told.lines.append, session._watch())
    assert told.metrics["collapse"] == 3
    assert any("collapsed: G makes few pictures out of many (diversity 0.00" in line
               for line in told.lines)  # fmt: skip
    assert "last found sound never" in told.lines[-1]
    assert (session.collapsed, session.sound) == (1, 0)
    with torch.no_grad():  # what it makes now differs, and is beside itself
        session.networks["G_ema"].model[-2].weight.normal_(0, 0.3)
    (tmp_path / "made").mkdir()
    for n, picture in enumerate(session.sets.read(session.sets.inputs)):
        save_png(session._translated("G", picture=picture)[-1], tmp_path / "made" / f"{n}.png")
    session.sets = find_sets((data / "testA", tmp_path / "made"), transform=made.transform())
    session._evaluated(told.report, told.lines.append, session._watch())
    assert told.metrics["collapse"] == 0 and (session.collapsed, session.sound) == (0, 0)


@pytest.mark.needs("offline")
def test_a_training_that_is_found_collapsed_so_often_in_a_row_ends_and_keeps_its_result(
    tmp_path: Path,
):
    """At no rate to speak of, a fresh generator stays as grey as it is."""
    data = make_domains(tmp_path / "domains", 8, 8, size=32)
    options = {
        "load_size": 24, "crop_size": 24, "lr": 1e-12, "evaluate": ["kd-st-alex"],
        "evaluate_every": 2, "stop_on_collapse": 2, "checkpoint_every": 1,
    }  # fmt: skip
    told = trained(tmp_path / "whole", data, **options)
    assert told.metrics["collapsed_at"] == told.metrics["steps"] == 4
    assert told.metrics["diverged"] == 0
    (line,) = [line for line in told.lines if "stop_on_collapse" in line]
    assert line.startswith("ended at step 4 of 16: 2 evaluations in a row found a collapse")
    # Killed between the two, it knows of the first; and in the end it is as one of four steps.
    trained(tmp_path / "cut", data, until=3, **options)
    assert trained(tmp_path / "cut", data, **options).metrics["collapsed_at"] == 4
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    short = trained(tmp_path / "short", data, **options | {"steps": 4, "epochs": 1})
    assert "collapsed_at" not in short.metrics  # it had ended anyway
    assert same(weights(tmp_path / "short"), weights(tmp_path / "whole"))


PEAK = """
import sys, torch, modelsoup
from pathlib import Path
from modelsoup_i2i.pictures.draws import Sampler
from modelsoup_i2i.training import estimates

def told(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

torch.set_num_threads(1)
torch.nn.Conv2d(3, 8, 3)(torch.zeros(1, 3, 16, 16)).sum().backward()  # oneDNN's own
before, size = told("VmRSS"), int(sys.argv[2])
trainer = modelsoup.get_trainer("cyclegan")
given = {"data": sys.argv[1], "load_size": size, "crop_size": size, "width": 32, "blocks": 6}
options = modelsoup.build_options(trainer, given | {"device": "cpu"})
session = trainer.session(options, None, seed=0)
drawn = next(session.batches())[0]
for _ in range(3):
    session.optimise([drawn])
peak = told("VmHWM") - before
needed = estimates.memory(trainer, options, session.weights, drawn, device=session.device,
                          early=session.early, last=0)
print(needed.total / peak)
"""


@pytest.mark.parametrize("size", [64, 160])
def test_the_estimated_memory_is_within_a_quarter_of_the_peak(size: int, data: Path):
    if not Path("/proc/self/status").exists():
        pytest.skip("platform: no /proc")
    made = subprocess.run(
        [sys.executable, "-c", PEAK, str(data), str(size)], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert 0.75 < float(made.stdout) < 1.25


def test_more_memory_than_is_free_is_told_before_the_first_step(data: Path):
    needed = estimates.Memory(lasting=3 << 30, passing=5 << 30, pools=0)
    said = r"about 8\.7 GB of memory are needed on cpu, and 4\.0 GB are free: a smaller crop_size"
    with pytest.raises(modelsoup.TrainerError, match=said):
        estimates.must_suffice(needed, 4_000_000_000, "cpu")
    assert estimates.must_suffice(needed, 9_000_000_000, "cpu").endswith("9.0 GB are free")
    assert estimates.must_suffice(needed, None, "cpu") == "about 8.7 GB of memory are needed"
    there = estimates.free(torch.device("cpu"))
    assert there is not None and 1 << 24 < there < 1 << 50


def test_large_trainings_say_what_they_need_and_small_ones_say_nothing(data: Path):
    lines: list[str] = []
    large = session(data, load_size=130, crop_size=128, epochs=1)
    large._pictures = session(data, load_size=130, crop_size=128).pictures
    lines += large._needs()
    assert re.fullmatch(r"about 0\.\d GB of memory are needed, [\d.]+ GB are free", lines[0])
    assert list(session(data)._needs()) == []


def test_a_loss_that_asks_for_values_is_trained_without_an_estimate(data: Path, tmp_path: Path):
    class Asks(Toy):
        def copy(self, s, b):
            loss = super().copy(s, b)["copy"]
            return {"copy": loss * (2 if loss.item() > 1 else 1)}

    options = ToyOptions(data=data, **(SIZES | LARGE | {"epochs": 1, "warm_up": 2}))
    small = session(data, **(LARGE | {"epochs": 1}))
    own = Asks().session(options, None, seed=1)
    own._pictures = small.pictures
    (line,) = own._needs()
    assert line == "how much memory is needed is not known: a loss asks for the values of tensors"
    assert own.optimise(next(own.batches()))["copy"] > 0


def test_how_long_it_will_take_is_said_once(data: Path):
    lines: list[str] = []
    own = session(data, epochs=20, warm_up=1000)
    own.run(silent, lines.append)
    (line,) = [line for line in lines if line.startswith("about ")]
    assert re.fullmatch(r"about \d+ s for the 70 steps to come", line)


@pytest.fixture(scope="module")
def other(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of another training."""
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    session(data, init=7).save(path)
    return path


def test_networks_begin_with_those_of_another_checkpoint(data: Path, other: Path):
    there = {name: torch.from_numpy(values) for name, values in read(other).items()}
    scratch = flat(session(data))
    for place in (other, Path(f"{other}:G"), Path(f"{other}:G_ema")):
        own = flat(session(data, init_from={"G": place}))
        of = "G_ema" if str(place).endswith("ema") else "G"
        for name, value in own.items():
            network, _, rest = name.partition(".")
            wanted = scratch[name] if network == "D" else there[f"{of}.{rest}"]
            assert torch.equal(value, wanted), name
    lines: list[str] = []
    session(data, init_from={"G": other}).run(silent, lines.append)
    assert lines[0] == "G begins with other.safetensors"
    assert lines[1] == "initialised 6 of 22 tensors (init 0)"


def read(path: Path) -> dict[str, np.ndarray]:
    opened = modelsoup.open_checkpoint(path)
    return {name: opened[name] for name in opened}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"E": "{other}"}, r"init_from has 'E', which is no network .*\(there are G, D\)"),
        ({"G": "{other}:Q"}, r"has no network 'Q' for G .*\(it has D, G, G_ema\)"),
        ({"D": "{other}:G"}, r"lacks G\.model\.0\.weight \[4, 3, 4, 4\]"),
        ({"G": "{wide}"}, r"G\.model\.1\.weight has the shape \[8, .*, but in G it is \[4, "),
        ({"G": "nowhere.safetensors"}, "nowhere.safetensors"),
    ],
)
def test_what_a_network_cannot_begin_with_is_told(
    given: dict, said: str, data: Path, other: Path, tmp_path: Path
):
    wide = tmp_path / "wide.safetensors"
    session(data, width=8).save(wide)
    places = {n: Path(p.format(other=other, wide=wide)) for n, p in given.items()}
    with pytest.raises(modelsoup.SoupError, match=said):
        session(data, init_from=places)


def test_a_frozen_network_begins_with_the_start_alone(data: Path, other: Path):
    options = ToyOptions(data=data, init_from={"G": other}, **SIZES)
    frozen = ["G.model.1.weight"]
    with pytest.raises(modelsoup.ParameterError, match=r"G\.model\.1\.weight is frozen"):
        Toy().session(options, other, seed=1, frozen=frozen)


def test_a_key_depends_on_what_networks_begin_with(data: Path, other: Path, tmp_path: Path):
    """On the file's content and on which network it is, not on where it lies."""
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(other.read_bytes())

    def told(**given: Path):
        options = ToyOptions(data=data, init_from=given, **SIZES)
        return Toy().identity(options), [
            f.name for f in Toy().files(options) if f.suffix[1:] != "png"
        ]

    assert told() == (told()[0], [])
    assert told(G=other)[0] == told(G=moved)[0] != told()[0]
    assert told(G=other)[1] == ["other.safetensors"]
    assert told(G=other)[0] != told(G=Path(f"{other}:G_ema"))[0]
    # In a plan it is relative to the plan, as all paths are.
    given = {"data": str(data), "init_from": {"G": "moved.safetensors:G"}}
    made = modelsoup.build_options(Toy(), given, tmp_path)
    assert made.init_from == {"G": tmp_path / "moved.safetensors:G"}


THREADS = """
import os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import modelsoup
from own_trainer import Toy, ToyOptions

given = {"data": sys.argv[1], "load_size": 18, "crop_size": 16, "epochs": 1, "sheet_every": 0}
job = modelsoup.Job(None, Path("out.safetensors"), Path.cwd(), (), 1,
                    modelsoup.build_options(Toy(), given | {"device": "cpu"}),
                    lambda *_: None, lambda _: None, lambda told: noted.update(told))
noted = {}
import torch
torch.set_num_threads(2)
Toy().train(job)
print(noted["device"], torch.get_num_threads())
"""


def test_a_small_training_takes_one_thread_and_gives_the_others_back(data: Path, tmp_path: Path):
    here = Path(__file__).parent
    made = subprocess.run(
        [sys.executable, "-c", THREADS, str(data), str(here)], cwd=tmp_path, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert made.stdout.splitlines()[-1] == "cpu, 1 threads 2"
    large = Toy().session(ToyOptions(data=data, width=64, **(SIZES | LARGE)), None, seed=1)
    assert large.effort > 1e8 > session(data).effort


LARGE = {"load_size": 130, "crop_size": 128}
