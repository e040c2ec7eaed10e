"""Who takes part in a training: networks and what they begin with, players, device, precision.

Nothing here knows a trainer by name. A trainer tells what there is (`networks`, `joined`,
`averages`, `players`, `pools`, `weights`); here it is built, loaded, frozen and put in its place.
"""

from __future__ import annotations

import copy
import shutil
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from torch import nn

from modelsoup import ParameterError, TrainerError, open_checkpoint
from modelsoup.running.torch_bridge import freeze, load_into

from ..networks.described import AVERAGED
from ..networks.devices import chosen_device
from ..networks.spectral import estimated
from ..pictures.cache import Pictures
from ..pictures.draws import Paired, epoch
from ..pictures.picture import labelled
from ..use.classes import classes_in
from ..use.models import Model, model_of
from .begun import must_have_network, values_for, with_rows
from .description import Description
from .graphs import CudaGraphs, Recorder, Recordings
from .players import Updates
from .pool import ImagePool
from .processes import ALONE, Place
from .stage import Stage, must_be_there, prepare

REMADE = "start.safetensors"
BEHIND = 16  # steps that a GPU makes before the host reads what they told


class Cast(Stage):
    """Networks in play, what they begin with, and who updates them.

    Attributes:
        trainer: whose.
        deployed: the networks that are used after the training.
        missing: names that the start lacked, and that were initialised.
        begun_as: networks that the start lacked, and that began with another one's weights.
        recordings: of steps, on a GPU; None where there are none to be.
    """

    recordings: Recordings | None = None

    def __init__(
        self, trainer: Description, options: Any, start: Path | None, *, seed: int,
        frozen: Sequence[str] = (), work: Path | None = None, shown: Path | None = None,
        place: Place = ALONE,
    ) -> None:  # fmt: skip
        """Build the networks and load the start.

        Args:
            trainer: tells what there is.
            options: of the training.
            start: a checkpoint, or a part of one; None initialises everything.
            seed: of everything that is drawn, in [0, 2⁶³).
            frozen: names that are not trained.
            work: the folder for the state; None keeps none.
            shown: the folder for pages of samples and events; None is where the options say, or
                else the work folder.
            place: which of several processes this is.

        Raises:
            MismatchError: the start has networks of another width, block count or kind.
            TrainerError: the device is not there, or a frozen name is unknown.
            ParameterError: the data are not there, or do not fit the options.
        """
        self.images = trainer.images(options)
        pools = {
            name: ImagePool(size, (2 * seed + n + 977 * place.rank) % 2**63)
            for n, (name, size) in enumerate(trainer.pools(options).items())
        }
        super().__init__(options, trainer.weights(options, self.images), pools)
        self.trainer, self.seed = trainer, seed
        self.frozen, self.work, self.place = tuple(frozen), work, place
        self.start, self._given = self._fitted(start, work), start
        self.shown = options.shown(work) or shown or work
        self.device = chosen_device(options.device, place.rank)
        self.players = trainer.players(options)
        built = {name: network.build() for name, network in trainer.networks(options).items()}
        self._averages = trainer.averages(options)
        for name, (of, _) in self._averages.items():
            built.setdefault(name, copy.deepcopy(built[of]))
        self._module = nn.ModuleDict(built)
        self._joined = {name: one.build(built) for name, one in trainer.joined(options).items()}
        self.missing = load_into(self._module, self.start, seed=options.init)
        self._begin_with(options.init_from)
        self.begun_as = {
            name: of for name, of in trainer.begin_as(options).items()
            if self._lacks(name) and not self._lacks(of)
        }  # fmt: skip
        for name, of in self.begun_as.items():
            self._follow(name, of)
        for name, (of, _) in self._averages.items():
            self._module[name].requires_grad_(False)
            if self._lacks(name) or of in options.init_from:
                self._follow(name, of)
        begun = tuple(f"{n}." for n in (*options.init_from, *self.begun_as, *self._averages))
        self.missing = tuple(name for name in self.missing if not name.startswith(begun))
        fixed = [n for n in self._module.state_dict()
                 if any(fnmatchcase(n, pattern) for pattern in trainer.fixed(options))]  # fmt: skip
        freeze(self._module, [*self.frozen, *fixed])
        kept = {n: own.clone() for n, own in self._module.named_buffers() if n in self.frozen}
        self.set_plain(())
        for name, values in kept.items():  # whatever the options say
            self._module.get_buffer(name).copy_(values)
        # Those of a start whose rows were re-made are not known any more.
        known = None if start is None or self.start != start else classes_in(start)
        self.classes = tuple(trainer.classes(options)) or known or ()
        self.attributes = trainer.has_attributes(options)
        self.deployed = tuple(trainer.translators(options))
        self._as_used: dict[str, tuple[str, ...]] = {}
        self._pictures: Pictures | None = None
        self._updates: dict[str, Updates] = {}
        self._broken = torch.zeros((), dtype=torch.bool)

    def _fitted(self, start: Path | None, work: Path | None) -> Path | None:
        """A start, with rows for the classes that there are now, where the trainer wants such."""
        rows = self.trainer.rows(self.options)
        if start is None or not rows:
            return start
        if work is None:
            work = Path(mkdtemp())
            weakref.finalize(self, shutil.rmtree, work, ignore_errors=True)
        anew = classes_in(start) not in (None, tuple(self.trainer.classes(self.options)))
        # Of each process its own: another one may be reading.
        place = work / f"{self.place.rank or ''}{REMADE}"
        return with_rows(start, rows, place, seed=self.options.init, anew=anew)

    def _lacks(self, network: str) -> bool:
        """Whether the start had nothing of a network, and neither had `init_from`."""
        names = self._module[network].state_dict()
        lacking = all(f"{network}.{name}" in self.missing for name in names)
        return lacking and network not in self.options.init_from

    def must_have_begun(self, network: str) -> None:
        """Raise a TrainerError for a network that nobody trains and nothing was loaded into."""
        own = any(True for _ in self._module[network].parameters())
        if own and network not in self._averages and self._lacks(network):
            whose = self.trainer.begin_as(self.options).get(network)
            other = f", or of {whose}" if whose else ""
            raise TrainerError(
                f"{network} is not trained here, so it must begin with weights: of a start "
                f"(--start), or of init_from ({network}: file){other}"
            )

    def _follow(self, network: str, of: str) -> None:
        """Give a network what another one has under the same names."""
        given = self._module[of].state_dict()
        own = self._module[network].state_dict()
        self._module[network].load_state_dict({n: given.get(n, value) for n, value in own.items()})

    def _begin_with(self, given: Mapping[str, Path]) -> None:
        """Give networks the weights of others; frozen ones are the start's."""
        must_have_network(given, list(self.trainer.networks(self.options)))
        for network, place in given.items():
            own = self._module[network].state_dict()
            kept = [n for n in self.frozen if n.startswith(f"{network}.")]
            if kept:
                raise ParameterError(
                    f"init_from has {network!r}, of which {kept[0]} is frozen and stays the start's"
                )
            shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
            remade = {n.partition(".")[2] for n in self.trainer.rows(self.options)
                      if n.startswith(f"{network}.")}  # fmt: skip
            found = values_for(network, place, shapes, rows=remade, seed=self.options.init)
            for name, values in found.items():
                dtype = np.float32 if own[name].is_floating_point() else None
                own[name].copy_(torch.from_numpy(np.array(values, dtype)))
            for name in own.keys() - found.keys():
                own[name].zero_()  # which `estimated` sees
            estimated(self._module[network])

    def set_plain(self, names: Collection[str]) -> None:
        """Have networks, and what is in them, do without tricks that are the CPU's, and no others.

        On a GPU all of them do.
        """
        plain = {id(own) for name in names for own in self.networks[name].modules()}
        how, on_gpu = how_trained(self.options, self.device), self.device.type != "cpu"
        for network in self._module.values():
            prepare(network, **{**how, "plain": on_gpu or id(network) in plain})

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All networks by name, averages and those that are joined of others too."""
        return {**dict(self._module.items()), **self._joined}

    def in_use(self, name: str) -> Model:
        """A translator, with the averages of its weights where there are such."""
        own = {n: self._module.get_submodule(n + AVERAGED if n + AVERAGED in self._averages else n)
               for n in self.trainer.networks(self.options)}  # fmt: skip
        how = self.trainer.translators(self.options)[name]
        every = self.trainer.joined(self.options)
        made, joined = model_of(name, how, every, own, classes=self.classes), every.get(name)
        if joined is None or any(part + AVERAGED in self._averages for part in joined.parts):
            return made
        return replace(made, module=self._joined[name])  # one may have been put in its place

    @property
    def updates(self) -> dict[str, Updates]:
        """Who updates each player's networks; made when first asked for."""
        self.begin()
        return self._updates

    def labels(self) -> Mapping[str, Sequence[int]]:
        """Those that a network finds, of the images of sets: see `Description.sorting`."""
        return self.trainer.sorting(self.options, self)

    @property
    def pictures(self) -> Pictures:
        """The training images; damaged ones are told when this is first asked for."""
        if self._pictures is None:
            options, labels = self.options, self.labels()
            for draw in self.trainer.draws(options):
                for name in getattr(draw, "sets", ()):
                    must_be_there(name, self.images, f"{self.trainer.name} draws of the set")
            images = {name: labelled(own, labels[name]) if name in labels else own
                      for name, own in self.images.items()}  # fmt: skip
            self._pictures = Pictures(
                images, options.transform(), cache_bytes=options.cache_mb << 20,
                threads=max(options.threads, 1), on_bad_image=options.on_bad_image,
                channels=options.channels, least=options.fewest,
                aligned=[d.sets for d in self.trainer.draws(options) if isinstance(d, Paired)],
            )  # fmt: skip
        return self._pictures

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which each image of the largest set, or of sets that count as one, is seen."""
        options = self.options
        seen: int = options.batch * options.accumulate * self.place.world
        return -(-epoch(self.trainer.draws(options), self.pictures) // seen)

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        options = self.options
        if options.steps is not None:
            steps: int = options.steps + options.decay_steps
            return steps
        return self.steps_per_epoch * int(options.epochs + options.decay_epochs)

    @property
    def early(self) -> bool:
        """Whether optimisers are applied within the backward pass: see `players.py`."""
        plain = self.options.accumulate == 1 and self.place.world == 1
        return plain and self.device.type == "cpu"

    @property
    def behind(self) -> int:
        """Steps that may be made before what they told is read; 0 where reading costs nothing."""
        return 0 if self.device.type == "cpu" else BEHIND

    def recorder(self) -> Recorder | None:
        """What records steps, where they are to be replayed."""
        wanted = self.options.graphs and self.device.type == "cuda"
        return CudaGraphs(self.device) if wanted else None

    @property
    def effort(self) -> float:
        """Multiplications of a pass through all networks, roughly: images are halved twice."""
        pixels = how_trained(self.options, self.device)["pixels"]
        made: float = sum(p.numel() for p in self._module.parameters()) * pixels / 16
        return made

    def as_used(self, name: str) -> nn.Module:
        """A translator's module, whose networks are trained as they are used, and as they began.

        Statistics of norms stay, nothing is dropped, and what options say of the networks' buffers
        does not count. Other modules may be added to it, such as quantisers: where it is joined of
        several networks, they move with the last of these.

        Raises:
            TrainerError: there is no such network, or steps were made.
        """
        if name not in self.networks:
            raise TrainerError(
                f"no network is called {name!r} (there are {', '.join(self.networks)})"
            )
        if self._updates:
            raise TrainerError(f"{name} can be changed before the first step only")
        self._as_used[name] = self._parts(name)
        begun = None if self.start is None else open_checkpoint(self.start)
        for part in self._as_used[name]:
            # What traces or wraps it wants one plain pass.
            prepare(self._module[part], plain=True)
            for own in {part, f"{part}{AVERAGED}"} & {*self._module}:
                for key, buffer in self._module[own].named_buffers(own):
                    if begun is not None and key in begun.tensors:
                        dtype = np.float32 if buffer.is_floating_point() else None
                        buffer.copy_(torch.from_numpy(np.array(begun[key], dtype)))
        return self.networks[name]

    def names_in(self, name: str) -> dict[str, str]:
        """What tensors are called in a translator's module, by their names in the checkpoint."""
        module = self.networks[name]
        own = {id(t): key for key, t in (*module.named_parameters(), *module.named_buffers())}
        every = (*self._module.named_parameters(), *self._module.named_buffers())
        return {key: own[id(tensor)] for key, tensor in every if id(tensor) in own}

    def _parts(self, name: str) -> tuple[str, ...]:
        """The networks that a translator is made of."""
        joined = self.trainer.joined(self.options).get(name)
        return (name,) if joined is None else joined.parts

    def _take_in(self, name: str) -> None:
        """Have what was added to a module that is joined of several networks trained and kept."""
        known = {id(tensor) for tensor in self._module.parameters()}
        beside = {n: child for n, child in self._joined[name].named_children()
                  if not any(id(tensor) in known for tensor in child.parameters())}  # fmt: skip
        owners = [owner for part in self._as_used[name] for owner, player in self.players.items()
                  if part in player.networks]  # fmt: skip
        if beside and owners:
            self._module[name] = nn.ModuleDict(beside)
            player = self.players[owners[-1]]
            self.players[owners[-1]] = replace(player, networks=(*player.networks, name))

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the training."""
        wanted = self.options.precision == "bf16"
        manager: AbstractContextManager[Any] = torch.autocast(
            self.device.type, torch.bfloat16, enabled=wanted
        )
        return manager

    def placed(self, values: torch.Tensor) -> torch.Tensor:
        """What was drawn on the device, images in the memory layout of the training."""
        wanted = self.options.channels_last and values.ndim == 4
        layout = torch.channels_last if wanted else torch.contiguous_format
        if self.device.type == "cuda" and values.device.type == "cpu":
            values = values.pin_memory()  # else the host waits until all before it is done
        return values.to(self.device, non_blocking=True, memory_format=layout)

    def begin(self) -> None:
        """Before the first step: the device, and who updates what."""
        if self._updates:
            return
        options = self.options
        for name in self._as_used:
            if name in self._joined:
                self._take_in(name)
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self._module.to(self.device, memory_format=layout).train()
        # What nobody moves is as in use: it has no gradients, and its statistics stay.
        moved = {name for player in self.players.values() for name in player.networks}
        for name, network in self._module.items():
            if hasattr(network, "lay_out"):
                network.lay_out()
            if name not in moved:
                network.requires_grad_(False)
            trained = any(parameter.requires_grad for parameter in network.parameters())
            if not trained:
                self.must_have_begun(name)
            if not trained or any(name in parts for parts in self._as_used.values()):
                network.eval()
            self.put(name, network)
        for name, network in self._joined.items():
            self.put(name, network)
        early, recorder = self.early, self.recorder()
        several = {
            name for turn in self.trainer.turns(options, 0) if len(turn.losses) > 1
            for name in turn.players
        }  # fmt: skip
        for name, player in self.players.items():
            for network in player.networks:
                must_be_there(network, self._module, f"the player {name!r} moves the network")
            own = {
                n: p for n, p in self._module.named_parameters()
                if p.requires_grad and n.partition(".")[0] in player.networks
            }  # fmt: skip
            # As tensors rates are rounded: on a GPU always, so that graphs decide nothing.
            recorded = recorder is not None or self.device.type == "cuda"
            self._updates[name] = Updates(
                player, own, early=early, summed=name in several, recorded=recorded
            )
        self._broken = torch.zeros((), dtype=torch.bool, device=self.device)
        self.adaptive = self.adaptive.to(self.device)
        if recorder is not None:
            self.recordings = Recordings(recorder, self.pools, self.placed)
            why = self._unrecordable()
            if why is not None:
                self.recordings.refuse(why)

    def _unrecordable(self) -> str | None:
        """Why no step can be replayed, where that is known before the first one."""
        if self.place.world > 1:
            return "several processes train together"
        if self._as_used:
            return f"{', '.join(self._as_used)} has modules of others in it"
        if not self.options.transform().crops:
            return "the images are of many sizes"
        for updates in self._updates.values():
            if not updates.recordable:
                return f"torch's {updates.player.optimiser} counts on the host"
        return None


def how_trained(options: Any, device: torch.device) -> dict[str, Any]:
    """What `stage.prepare` tells networks of a training."""
    height, width = options.transform().crop
    return {
        "plain": device.type != "cpu" or options.compile, "precision": options.precision,
        "pixels": options.batch * height * width,
    }  # fmt: skip
