"""Adam over the parameters of some networks, and when it is applied.

On a CPU, for a plain step, each parameter is updated inside the last backward pass, as soon as its
gradient is complete. Where gradients are first summed over batches or averaged over processes, and
on a GPU, where one fused update of everything is faster, it comes afterwards. The arithmetic is the
same.

What lives long is made before the first step. Among short-lived activations it would leave a heap
full of holes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

BETAS = (0.5, 0.999)


class NonfiniteGradientError(ArithmeticError):
    """NaN or infinity in a gradient; the parameters were not updated with it."""


class Updates:
    """Adam (0.5, 0.999) over named parameters, which are those that are not frozen.

    Args:
        parameters: by their names in the checkpoint.
        early: update each parameter within the backward pass.
        summed: with `early`, gradients come from several backward passes, and have memory that is
            theirs; otherwise each is freed at once.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, early: bool, summed: bool = False
    ) -> None:
        self.parameters = dict(parameters)
        self.early = early
        self._summed = early and summed
        self._complete = True
        own = list(self.parameters.values())
        groups = [[parameter] for parameter in own] if early else [own] if own else []
        self._optimizers = [
            torch.optim.Adam(group, lr=0.0, betas=BETAS, fused=True) for group in groups
        ]
        self._of = {id(p): adam for adam, group in zip(self._optimizers, groups, strict=True)
                    for p in group}  # fmt: skip
        for parameter in own:
            if self._summed:
                parameter.grad = torch.zeros_like(parameter)
            self._of[id(parameter)].state[parameter] = {
                # Where the fused Adam wants its count.
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            if early:
                parameter.register_post_accumulate_grad_hook(self._update)

    def backward(self, loss: torch.Tensor, *, complete: bool = True) -> None:
        """Gradients for these parameters and no others; with `early`, the update too.

        Args:
            loss: of which the gradients are added to those that are there.
            complete: whether this is the last loss of the step, and `early` updates are made.

        Raises:
            NonfiniteGradientError: with `early`, where a gradient is NaN or infinite.
        """
        self._complete = complete
        if self.parameters:
            torch.autograd.backward(loss, inputs=list(self.parameters.values()))

    def apply(self) -> None:
        """Update, and forget the gradients; with `early` that has been done.

        Raises:
            NonfiniteGradientError: a gradient is NaN or infinite; nothing was updated.
        """
        if self.early:
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if gradients and not torch.stack([g.sum() for g in gradients]).isfinite().all():
            self.forget()
            raise NonfiniteGradientError
        for adam in self._optimizers:
            adam.step()
        self.forget()

    def forget(self) -> None:
        """Free the gradients, or make them 0."""
        for parameter in self.parameters.values():
            self._forget(parameter)

    def set_rate(self, rate: float) -> None:
        """The learning rate from now on."""
        for adam in self._optimizers:
            for group in adam.param_groups:
                group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """Adam's averages and counts, by parameter."""
        return {
            name: dict(self._of[id(parameter)].state.get(parameter, {}))
            for name, parameter in self.parameters.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state; on this device, in this memory format."""
        for name, parameter in self.parameters.items():
            own = self._of[id(parameter)].state[parameter]
            for key, value in state[name].items():
                own[key].copy_(value)

    def _update(self, parameter: nn.Parameter) -> None:
        if not self._complete:
            return
        # A sum is finite only if all of its terms are, and reads them once.
        if not parameter.grad.sum().isfinite():
            self.forget()
            raise NonfiniteGradientError
        self._of[id(parameter)].step()
        self._forget(parameter)

    def _forget(self, parameter: nn.Parameter) -> None:
        if self._summed and parameter.grad is not None:
            parameter.grad.zero_()
        else:
            parameter.grad = None
