"""Steps that are replayed: the same bits, and nobody waits; where they cannot be, it is said.

There is no GPU here: a tape records what CUDA graphs record, operations on memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from i2i_domains import drawing, make_domains
from i2i_tape import Taped
from modelsoup_i2i.pictures.images import save_png
from modelsoup_i2i.trainers.cyclegan import CycleGAN
from modelsoup_i2i.trainers.gan import Gan
from modelsoup_i2i.trainers.pix2pix import Pix2Pix
from modelsoup_i2i.training import graphs
from modelsoup_i2i.training.graphs import kind_of
from modelsoup_i2i.training.pool import ImagePool
from modelsoup_i2i.training.session import Session
from modelsoup_i2i.training.step import DivergedError
from modelsoup_i2i.training.turns import Turn
from own_trainer import Toy
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

torch.set_num_threads(1)
SIZES = {"load_size": 18, "crop_size": 16, "epochs": 1, "decay_epochs": 3, "sheet_every": 0}
SMALL = SIZES | {"width": 4, "d_width": 4}
SAID = "steps are replayed as CUDA graphs"


class Own(Toy):
    """By optimisers that are fused on a CPU too."""

    def players(self, o):
        return {name: replace(own, optimiser="Adam") for name, own in super().players(o).items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_domains(tmp_path_factory.mktemp("domains"), count_b=6)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classes")
    for name, kind in (("disc", "A"), ("square", "B")):
        (root / name).mkdir()
        for n in range(6):
            save_png(drawing(kind, n, 64), root / name / f"{n}.png")
    return root


def taped(trainer, data: Path, *, kind: type[Session] = Taped, **options) -> Session:
    own = kind(trainer, trainer.options(data=data, **options), None, seed=1)
    own.begin()
    return own


def as_ever(trainer, data: Path, **options) -> Session:
    """With rates as tensors, whose rounding is another one."""
    own = taped(trainer, data, **options)
    own.recordings.refuse("of a test")
    return own


def moved(own: Session, count: int) -> list[dict[str, float]]:
    for group in islice(own.batches(), count):
        own.take(group)
    return [losses for _, losses in own.read()]


def flat(own: Session) -> dict[str, torch.Tensor]:
    every = {
        f"{name}.{key}": value.clone()
        for name, network in own.networks.items() for key, value in network.state_dict().items()
    }  # fmt: skip
    for name, pool in own.pools.items():
        every |= {f"{name}.{n}": image.clone() for n, image in enumerate(pool.images)}
    return every


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


BIGGAN = {"size": 32, "ch": 8, "accumulate": 1, "batch": 2, "sheet_every": 0, "steps": 20}


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        (CycleGAN(), SMALL | {"blocks": 1, "d_layers": 1, "pool_size": 3, "accumulate": 2}),
        (CycleGAN(), SMALL | {"blocks": 1, "d_layers": 1, "pool_size": 3, "batch": 2,
                              "precision": "bf16"}),
        (Pix2Pix(), SMALL | {"downs": 4, "patch": 16, "batch": 2}),
        (Own(), SIZES | {"accumulate": 2}),
        (Gan(), BIGGAN | {"augment": ["color"], "ada": 0.6, "ada_every": 2, "ada_images": 20}),
    ],
    ids=["cyclegan", "cyclegan-bf16", "pix2pix-dropout", "phases-lazy-ema", "ada"],
)  # fmt: skip
def test_replayed_steps_make_the_bits_that_they_make_as_ever(
    data: Path, classes: Path, trainer, options: dict
):
    """Rates fall, pools are filled and exchanged, noise is drawn, phases and lazy terms come."""
    where = classes if "size" in options else data
    own, plain = taped(trainer, where, **options), as_ever(trainer, where, **options)
    told = [moved(each, 11) for each in (own, plain)]
    assert list(own.recordings.news()) == [SAID]
    assert told[0] == told[1] and same(flat(own), flat(plain))


def test_a_training_that_goes_on_makes_the_same_bits(data: Path):
    options = SMALL | {"blocks": 1, "d_layers": 1, "pool_size": 2}
    own = taped(CycleGAN(), data, **options)
    moved(own, 5)
    later = taped(CycleGAN(), data, **options)
    later.load_state_dict(own.state_dict())
    assert own.steps == later.steps == 5
    assert moved(own, 4) == moved(later, 4) and same(flat(own), flat(later))
    # So does one that has its recordings already.
    state = later.state_dict()
    kept = {n: own.clone() for n, own in flat(later).items()}
    other = taped(CycleGAN(), data, **options)
    other.load_state_dict(state)
    moved(own, 2)
    assert not same(flat(own), kept)
    own.load_state_dict(other.state_dict())
    assert same(flat(own), kept) and moved(own, 3) == moved(other, 3)


def test_a_replayed_step_that_is_not_finite_is_told_and_moves_nothing(data: Path):
    options = SMALL | {"downs": 4, "patch": 16}  # its norms have statistics
    own = taped(Pix2Pix(), data, **options)
    moved(own, 4)
    before = flat(own)
    assert any("running_mean" in name for name in before)
    (group,) = islice(own.batches(), 1)
    group[0]["x"] = group[0]["x"] * float("nan")
    own.take(group)
    own.take(group)
    with pytest.raises(DivergedError):
        list(own.read())
    assert own.steps == 4 and same(flat(own), before)


class Again:
    """Records nothing, for tensors without values."""

    def rehearse(self, step):
        return step(), None

    def record(self, step):
        return step(), lambda: None


class Unheard(Taped):
    def recorder(self):
        return Again()


def test_nobody_waits_for_a_recorded_step(data: Path):
    """Fake tensors have no values, and refuse."""
    own = taped(
        CycleGAN(), data, kind=Unheard, **(SMALL | {"blocks": 1, "d_layers": 1, "pool_size": 2})
    )
    drawn = list(islice(own.batches(), 6))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for group in drawn:
            own.take([{n: torch.empty_like(v) for n, v in batch.items()} for batch in group])
        assert list(own.recordings.news()) == [SAID]
        with pytest.raises(DataDependentOutputException):
            list(own.read())


class Asks(Own):
    """A loss that does what no recording follows."""

    what = "value"

    def copy(self, s, b):
        terms = super().copy(s, b)
        if self.what == "value":
            assert terms["copy"].item() > 0
        else:
            assert s.steps < 100
        return terms


@pytest.mark.parametrize(
    ("what", "why"),
    [("value", "a value is asked for while a step is recorded"),
     ("step", "a loss asks which step it is, which `turns` is told")],
)  # fmt: skip
def test_where_a_step_cannot_be_recorded_it_is_said_once_and_made_as_ever(
    data: Path, what: str, why: str
):
    trainer = Asks()
    trainer.what = what
    options = SIZES | {"warm_up": 99}
    own, plain = taped(trainer, data, **options), as_ever(Own(), data, **options)
    assert moved(own, 3) == moved(plain, 3)
    assert list(own.recordings.news()) == [f"steps are not replayed as CUDA graphs: {why}"]
    assert moved(own, 3) == moved(plain, 3) and same(flat(own), flat(plain))
    assert not list(own.recordings.news())


class Anew(Own):
    """Its turns have another loss at each step."""

    def turns(self, o, step):
        def loss(s, b):
            return self.copy(s, b)

        return [Turn("copy", ("G",), (loss,))]


def test_turns_that_are_others_at_each_step_are_not_waited_for(data: Path, monkeypatch):
    monkeypatch.setattr(graphs, "_KINDS", 3)
    own = taped(Anew(), data, **SIZES)
    moved(own, 6)
    assert list(own.recordings.news()) == [
        "steps are not replayed as CUDA graphs: the turns of nearly each step are others"
    ]


def test_so_many_recordings_are_made_and_no_more(data: Path, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 1)
    own, plain = taped(Own(), data, **SIZES), as_ever(Own(), data, **SIZES)
    assert moved(own, 12) == moved(plain, 12) and same(flat(own), flat(plain))
    assert list(own.recordings.news()) == [
        SAID, "1 kinds of steps are; others are made kernel by kernel"
    ]  # fmt: skip


def test_trainings_that_cannot_be_recorded_say_why_before_the_first_step(data: Path):
    said = {
        "torch's RMSprop counts on the host": taped(Toy(), data, **SIZES),
        "the images are of many sizes": taped(Own(), data, **(SIZES | {"mode": "none"})),
    }
    kept = Taped(Own(), Own.options(data=data, **SIZES), None, seed=1)
    kept.as_used("G")
    kept.begin()
    said["G has modules of others in it"] = kept
    for why, own in said.items():
        assert list(own.recordings.news()) == [f"steps are not replayed as CUDA graphs: {why}"]


def test_the_log_says_what_is_replayed_and_the_option_has_none(data: Path):
    lines: list[str] = []
    taped(Own(), data, **SIZES).run(lambda *_: None, lines.append)
    assert lines.count(SAID) == 1
    none = taped(Own(), data, graphs=False, **SIZES)
    none.run(lambda *_: None, lines.append)
    assert none.recordings is None and lines.count(SAID) == 1


def loss(s, b, weight=1.0):
    return {"loss": weight * b.x.mean()}


def test_steps_are_of_one_kind_if_their_turns_are_the_same_functions_of_the_same_numbers():
    def kind(name="t", players=("G",), own=loss, *more):
        return kind_of([Turn(name, players, (own,))], *more)

    trainer = Own()
    assert kind() == kind() and kind(own=trainer.make) == kind(own=trainer.make)
    assert kind(own=partial(loss, weight=2.0)) == kind(own=partial(loss, weight=2.0))
    others = [
        kind(), kind("u"), kind(players=("D",)), kind(own=trainer.make), kind(own=Own().make),
        kind(own=partial(loss, weight=2.0)), kind(own=partial(loss, weight=3.0)),
        kind(own=lambda s, b: {}), kind(own=lambda s, b: {}), kind("t", ("G",), loss, True),
        *(kind(own=partial(loss, weight=[2.0])) for _ in range(2)),
    ]  # fmt: skip
    assert len(set(others)) == len(others)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_pool_that_follows_rows_of_the_host_gives_and_keeps_what_it_does_alone(batch: int):
    images = torch.randn(12, batch, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    alone, own = ImagePool(4, seed=3), ImagePool(4, seed=3)
    for n, several in enumerate(images):
        wanted = alone.query(several)
        if n < 1:
            made = own.query(several)
        else:
            rows = torch.zeros(batch, 3, dtype=torch.int64)
            with own.following(rows):
                rows.copy_(torch.tensor(own.plan(batch)))
                made = own.query(several)
        assert torch.equal(made, wanted)
        assert all(map(torch.equal, own.images, alone.images))
    assert len(own.images) == 4 and own.queried == alone.queried == 12 * batch
    # As ever again, and from a state.
    assert torch.equal(own.query(images[0] + 1), alone.query(images[0] + 1))
    later = ImagePool(4, seed=9)
    later.load_state_dict(own.state_dict())
    own.load_state_dict(later.state_dict())
    for several in images + 2:
        assert torch.equal(own.query(several), later.query(several))
