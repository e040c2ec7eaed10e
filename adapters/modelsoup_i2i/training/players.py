"""Who is updated: some networks, by which optimiser, at which rate, averaged over steps or not.

On a CPU, for a plain step, each parameter is updated inside the last backward pass, as soon as its
gradient is complete. Where gradients are first summed over batches or averaged over processes, and
on a GPU, where one fused update of everything is faster, it comes afterwards. The arithmetic is the
same.

What lives long is made before the first step. Among short-lived activations it would leave a heap
full of holes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Any

from modelsoup import TrainerError, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn


_UNFUSED_ON_GPU = ("Adagrad",)  # which torch fuses on a CPU alone


@dataclass(frozen=True)
class Player:
    """Networks that are updated together.

    Attributes:
        networks: their names.
        rate: the learning rate, before a schedule.
        optimiser: its name in `torch.optim`.
        settings: what else that takes, by its own names.
        ema: the share of the old average that each step keeps, in [0, 1); None for no average.
        shares: of the rate, for tensors whose names in the checkpoint begin so; 1 for the others.
        within: ranges into which an update puts tensors back, by patterns over those names.
    """

    networks: tuple[str, ...]
    rate: float
    optimiser: str = "Adam"
    settings: Mapping[str, Any] = field(default_factory=dict)
    ema: float | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    within: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def share(self, name: str) -> float:
        """Of the rate, for a tensor."""
        own = (share for begins, share in self.shares.items() if name.startswith(begins))
        return next(own, 1.0)

    def limits(self, name: str) -> tuple[float, float] | None:
        """Of a tensor, where there are such."""
        own = (limits for pattern, limits in self.within.items() if fnmatchcase(name, pattern))
        return next(own, None)


class NonfiniteGradientError(ArithmeticError):
    """NaN or infinity in a gradient; the parameters were not updated with it."""


class Updates:
    """A player's optimiser over named parameters, which are those that are not frozen.

    Args:
        player: whose.
        parameters: by their names in the checkpoint.
        early: update each parameter within the backward pass.
        summed: with `early`, gradients come from several backward passes, and have memory that is
            theirs; otherwise each is freed at once.
        recorded: updates may be replayed: rates are tensors, which a recording finds changed.

    Attributes:
        recordable: whether they can be: all that the optimiser counts is on the device.
    """

    def __init__(
        self, player: Player, parameters: Mapping[str, nn.Parameter], *, early: bool,
        summed: bool = False, recorded: bool = False,
    ) -> None:  # fmt: skip
        import torch

        self.player = player
        self.parameters = dict(parameters)
        self.early = early
        self._summed = early and summed
        self._complete = True
        self._waiting: dict[int, nn.Parameter] = {}
        self._limits = {id(parameter): limits for name, parameter in parameters.items()
                        if (limits := player.limits(name)) is not None}  # fmt: skip
        own = list(self.parameters.values())
        by_share: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            by_share.setdefault(player.share(name), []).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": several, "share": share} for share, several in by_share.items()
        ]
        together = [groups] if groups else []
        if early:
            together = [[{**group, "params": [parameter]}] for group in groups
                        for parameter in group["params"]]  # fmt: skip
        make = optimiser(player.optimiser)
        settings = dict(player.settings)
        on_gpu = any(parameter.is_cuda for parameter in own)
        if "fused" in _arguments(make) and not (on_gpu and player.optimiser in _UNFUSED_ON_GPU):
            settings.setdefault("fused", True)
        if recorded and on_gpu and "capturable" in _arguments(make):
            settings.setdefault("capturable", True)
        self.recordable = bool(settings.get("fused") or settings.get("capturable"))
        self._pace: float | None = None
        try:
            self._optimizers = [make(groups, lr=0.0, **settings) for groups in together]
        except (TypeError, ValueError) as error:
            raise TrainerError(f"torch's {player.optimiser} takes no such settings: {error}") from (
                error
            )
        for one in self._optimizers if recorded and self.recordable else ():
            one._warned_capturable_if_run_uncaptured = True  # it is, until it is recorded
            for group in one.param_groups:
                group["lr"] = torch.zeros((), device=group["params"][0].device)
        self._of = {id(p): one for one in self._optimizers for group in one.param_groups
                    for p in group["params"]}  # fmt: skip
        averages = player.optimiser in ("Adam", "AdamW")
        counts = None if settings.get("fused") or settings.get("capturable") else "cpu"
        for parameter in own:
            if self._summed:
                parameter.grad = torch.zeros_like(parameter)
            if averages and not settings.get("amsgrad"):
                self._of[id(parameter)].state[parameter] = {
                    # Where Adam wants its count: another one would ask a GPU for it.
                    "step": torch.zeros((), dtype=torch.float32, device=counts or parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            if early:
                parameter.register_post_accumulate_grad_hook(self._update)

    def finite(self) -> torch.Tensor:
        """Whether no gradient is NaN or infinite: 0-dimensional and, where that is, on a GPU."""
        import torch

        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not gradients:
            return torch.tensor(True)
        # A sum is finite only if all of its terms are, and reads them once.
        return torch.stack(torch._foreach_norm(gradients, 1)).isfinite().all()

    def apply(self, *, unless: torch.Tensor | None = None) -> None:
        """Update, and forget the gradients; with `early` that has been done.

        But for parameters that the turn's last loss does not depend on: they have waited.

        Args:
            unless: 0-dimensional, bool: where it is true nothing is updated. It is never read by
                the host.

        Raises:
            NonfiniteGradientError: with `early`, a gradient is NaN or infinite.
        """
        if self.early:
            self._complete = True
            for parameter in list(self._waiting.values()):
                self._update(parameter)
            return
        for one in self._optimizers:
            if unless is None:
                one.step()
            else:
                self._step_unless(one, unless)
        for parameter in self.parameters.values():
            self._put_within(parameter)
        self.forget()

    def _step_unless(self, one: torch.optim.Optimizer, unless: torch.Tensor) -> None:
        import torch

        # A fused SGD that skips its very first step would leave its momentum unmade.
        unmade = bool(one.defaults.get("momentum")) and not any(one.state.values())
        if getattr(one, "_step_supports_amp_scaling", False) and not unmade:
            one.found_inf = unless.float()  # a fused one looks at it itself, as torch.amp asks it
            one.step()
            return
        # Others have what they changed put back; counts that they keep on the CPU go on.
        held = [p.detach() for p in self.parameters.values()]
        held += [
            value for kept in one.state.values() for value in kept.values()
            if isinstance(value, torch.Tensor) and value.device == unless.device
        ]  # fmt: skip
        before = [tensor.clone() for tensor in held]
        for parameter in self.parameters.values():
            if parameter.grad is not None:  # what it is yet to make has no NaN in it
                parameter.grad.masked_fill_(unless, 0.0)
        one.step()
        for tensor, was in zip(held, before, strict=True):
            tensor.copy_(torch.where(unless, was, tensor))

    def forget(self) -> None:
        """Free the gradients, or make them 0."""
        self._waiting.clear()
        for parameter in self.parameters.values():
            self._forget(parameter)

    def set_pace(self, pace: float) -> None:
        """The learning rate from now on, as a share of the player's."""
        if pace == self._pace:
            return
        self._pace = pace
        for one in self._optimizers:
            for group in one.param_groups:
                rate = self.player.rate * pace * group["share"]
                if isinstance(group["lr"], float):
                    group["lr"] = rate
                else:
                    group["lr"].fill_(rate)

    def state_dict(self) -> dict[str, Any]:
        """What the optimiser keeps, such as Adam's averages and counts, by parameter."""
        return {
            name: dict(self._of[id(parameter)].state.get(parameter, {}))
            for name, parameter in self.parameters.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state; on this device, in this memory format."""
        import torch

        for name, parameter in self.parameters.items():
            own = self._of[id(parameter)].state[parameter]
            for key, value in state[name].items():
                if key in own and isinstance(value, torch.Tensor):
                    own[key].copy_(value)
                elif isinstance(value, torch.Tensor):
                    shaped = value.shape == parameter.shape
                    like = torch.empty_like(parameter) if shaped else torch.empty_like(value)
                    own[key] = like.copy_(value)
                else:
                    own[key] = value

    def _update(self, parameter: nn.Parameter) -> None:
        if not self._complete:
            self._waiting[id(parameter)] = parameter
            return
        self._waiting.pop(id(parameter), None)
        # A sum is finite only if all of its terms are, and reads them once.
        if not parameter.grad.sum().isfinite():
            self.forget()
            raise NonfiniteGradientError
        self._of[id(parameter)].step()
        self._put_within(parameter)
        self._forget(parameter)

    def _put_within(self, parameter: nn.Parameter) -> None:
        if id(parameter) in self._limits:
            parameter.detach().clamp_(*self._limits[id(parameter)])

    def _forget(self, parameter: nn.Parameter) -> None:
        if self._summed and parameter.grad is not None:
            parameter.grad.zero_()
        else:
            parameter.grad = None


def backward(loss: torch.Tensor, players: Iterable[Updates], *, complete: bool = True) -> None:
    """Gradients for the parameters of some players and no others; where early, the update too.

    Args:
        loss: of which the gradients are added to those that are there.
        players: whose parameters.
        complete: whether this is the last loss of the step, and early updates are made.

    Raises:
        NonfiniteGradientError: where updates are early, and a gradient is NaN or infinite.
    """
    import torch

    own: list[nn.Parameter] = []
    for updates in players:
        updates._complete = complete
        own += updates.parameters.values()
    if own:
        torch.autograd.backward(loss, inputs=own)


@cache
def optimiser(name: str) -> Any:
    """A class of `torch.optim`, by its name.

    Raises:
        TrainerError: there is none; the message has the nearest one.
    """
    import torch

    every = {
        known: kind for known, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
    }  # fmt: skip
    if name not in every:
        raise TrainerError(
            f"torch has no optimiser {name!r}{nearest(name, every)} (of {', '.join(sorted(every))})"
        )
    return every[name]


def _arguments(make: Any) -> Mapping[str, Any]:
    return inspect.signature(make.__init__).parameters
