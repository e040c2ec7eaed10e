"""The exact state of a training: kept, gone on with, and written as a checkpoint.

Plain torch: a framework's checkpoints hold neither image pools nor what an exact resume needs of
them; what Lightning Fabric would bring (device, bf16, several GPUs) is three short functions in
`cast.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelsoup import TrainerError, digest_files, open_checkpoint
from modelsoup.running.torch_bridge import save_from

from ..networks.described import AVERAGED
from ..pictures.picture import files_of
from ..use.classes import classes_told
from .begun import files_begun_with
from .classes import by_class
from .step import Steps
from .watch import Losses

STATE = "state.pt"
LABELS = "labels.json"
FORMAT = 7


class State(Steps):
    """A training of some networks, at some step.

    Attributes:
        losses: their means over the epoch.
        recent: their means since they were last written down.
        best: the step and the value of the best evaluation, where one is kept.
        sound: the step of the last evaluation that found no collapse; 0 where there was none.
        collapsed: how many have found one since.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        """As `Cast`."""
        super().__init__(*given, **named)
        self.losses, self.recent = Losses(), Losses()
        self.best: dict[str, float] = {}
        self.sound = self.collapsed = 0

    def state_dict(self) -> dict[str, Any]:
        """All that decides the steps to come, on the CPU or not; `load_state_dict` takes it.

        Of every step that was made, `read` has read what it told.
        """
        return {
            "format": FORMAT,
            "steps": self.steps,
            "networks": {name: net.state_dict() for name, net in self._module.items()},
            "optimisers": {name: updates.state_dict() for name, updates in self.updates.items()},
            "losses": self.losses.state_dict(),
            "recent": self.recent.state_dict(),
            "best": dict(self.best),
            "sound": self.sound,
            "collapsed": self.collapsed,
            "adaptive": self.adaptive.cpu(),
            "compiled": None if self.compiled is None else [*self.compiled],
            "pools": self.place.gathered(
                {name: pool.state_dict() for name, pool in self.pools.items()}
            ),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for name, updates in self.updates.items():
            updates.load_state_dict(state["optimisers"][name])
        for name, network in self._module.items():
            network.load_state_dict(state["networks"][name])
        for name, pool in self.pools.items():
            pool.load_state_dict(state["pools"][self.place.rank][name], self.device)
        self.losses.load_state_dict(state["losses"])
        self.recent.load_state_dict(state["recent"])
        self.best = dict(state["best"])
        self.adaptive.copy_(state["adaptive"])
        self.sound, self.collapsed = state["sound"], state["collapsed"]
        compiled = state.get("compiled")
        self.compiled = None if compiled is None else tuple(compiled)
        self.steps = state["steps"]

    def keep(self) -> None:
        """Write the state into the work folder, all or nothing, in the place of the last one."""
        state = self.state_dict()
        if self.work is None or self.place.rank:
            return
        partial = self.work / f".{STATE}.partial"
        with partial.open("wb") as file:
            torch.save({**state, "training": self._training()}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.work / STATE)

    def resume(self) -> bool:
        """Go on from the state in the work folder, if there is one.

        Raises:
            TrainerError: it is damaged, or is of a training with other options; the message lists
                those.
        """
        path = None if self.work is None else self.work / STATE
        if path is None or not path.exists():
            return False
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            kept, own = state.pop("training"), self._training()
            if state["format"] != FORMAT:
                raise TrainerError(f"{path} is of another version: remove it to begin again")
        except TrainerError:
            raise
        except Exception as error:  # whatever torch's unpickler meets in a damaged file
            raise TrainerError(f"{path} is damaged: remove it to begin again ({error})") from error
        changed = [
            f"{name} {kept.get(name)!r} → {own.get(name)!r}"
            for name in sorted({*kept, *own}) if kept.get(name) != own.get(name)
        ]  # fmt: skip
        if changed:
            raise TrainerError(
                f"{path} is of a training with other options, which cannot be gone on with: "
                f"{', '.join(changed)}"
            )
        self.load_state_dict(state)
        return True

    def labels(self) -> Mapping[str, Sequence[int]]:
        """See `Cast`; what was found stays in the work folder, for a training that goes on.

        Raises:
            TrainerError: what stayed there is damaged.
        """
        kept = None if self.work is None else self.work / LABELS
        if kept is not None and kept.exists():
            try:
                told = json.loads(kept.read_text("utf-8"))
                found: Mapping[str, Sequence[int]] = told["labels"]
                if told["of"] == self.content:
                    return found
            except (ValueError, KeyError, TypeError) as error:
                raise TrainerError(
                    f"{kept} is damaged: remove it, and {STATE} beside it, to begin again ({error})"
                ) from error
        labels = super().labels()
        if labels and kept is not None and not self.place.rank:
            partial = kept.with_name(f".{LABELS}.partial")
            partial.write_text(json.dumps({"of": self.content, "labels": labels}), "utf-8")
            partial.replace(kept)
        return labels

    def save(self, path: Path, *, lineage: Mapping[str, Any] | None = None) -> None:
        """Write the checkpoint, one safetensors file with all networks.

        Of those that were trained as they are used (`as_used`) it has their own tensors, and their
        averages are these.

        Args:
            path: of the file.
            lineage: see `save_from`.
        """
        own, described = dict(self._module.items()), self.trainer.networks(self.options)
        trained = self._as_used.values() if self.steps else ()
        for part in {part for parts in trained for part in parts}:
            plain, state = described[part].build(), self._module[part].state_dict()
            plain.load_state_dict({key: state[key] for key in plain.state_dict()})
            own |= {name: plain for name in (part, f"{part}{AVERAGED}") if name in own}
        written = self.trainer.written(self.options)
        save_from(
            nn.ModuleDict({name: own[of] for name, of in written.items()}),
            path,
            like=self.start,
            frozen=self.frozen,
            lineage=lineage,
            metadata=classes_told(self.classes, attributes=self.attributes),
        )

    def _training(self) -> dict[str, Any]:
        """What a state must agree with to be gone on with."""
        return {
            "trainer": f"{self.trainer.name} {self.trainer.version}",
            **self.options.decisive(), "seed": self.seed, "frozen": list(self.frozen),
            **self.content, **by_class(self.classes, self.images),
        }  # fmt: skip

    @cached_property
    def content(self) -> dict[str, str]:
        """Digests of what is read: names do not tell whether images or the start were changed."""
        start = () if self._given is None else open_checkpoint(self._given).files
        images = {f"images of {name}": files_of(own) for name, own in self.images.items()}
        begun = {
            f"init_from of {name}": files_begun_with({name: place})
            for name, place in self.options.init_from.items()
        }
        every = {**images, "start": start, **begun}
        return {what: digest_files(files) for what, files in every.items()}
