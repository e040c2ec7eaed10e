"""What `soup methods` tells: what methods are for, what they cost, what they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...errors import ParameterError
from ..forms import Rows, Tensor, Whole
from .asking import outline
from .parameters import Parameter
from .registry import Method, build_parameters, code_version

if TYPE_CHECKING:
    pass

PURPOSES = (
    "average", "interpolate", "task vectors", "matrices", "experts", "after a merge", "two models",
    "one model",
)  # fmt: skip
"""What methods are for, in the order in which `soup methods` has them; others follow."""

_LARGE = (4096, 4096)


@dataclass(frozen=True)
class Cost:
    """What a merge of a large matrix costs.

    Attributes:
        passes: how often the inputs are read, as a rule.
        at_once: what must be in memory at a time: a `block`, a `row`, or the `tensor`.
    """

    passes: int
    at_once: Literal["block", "row", "tensor"]


def cost(chosen: Method) -> Cost | None:
    """What a method costs where it keeps half of what it may keep, else with its defaults.

    What has no default is ½. None of a method that refuses such parameters.
    """
    low, high = chosen.models
    count = max(low, min(2, high or 2))
    x = Tensor("", _LARGE, count, chosen.base is True, layer=(0, 2), can_be_sampled=True)
    for thinned in (True, False):
        given = {name: _usual(own, thinned) for name, own in chosen.parameters.items()}
        try:
            planned = outline(chosen, x, build_parameters(chosen, given, count))
        except ParameterError:
            continue
        passes = planned.passes(x)
        if isinstance(planned.form, Whole):
            return Cost(passes, "tensor")
        asked = [reduction for several in planned.rounds for reduction in several]
        by_rows = isinstance(planned.form, Rows) or any(reduction.rows for reduction in asked)
        return Cost(passes, "row" if by_rows else "block")
    return None


def _usual(own: Parameter, thinned: bool) -> Any:
    if own.words:
        return own.words[0] if own.is_required else own.default
    is_share = own.kind in ("number", "numbers") and own.default == own.high == 1
    if own.is_required or (is_share and thinned):
        return 1 if own.kind in ("integer", "truth") else 0.5
    return own.default


def sorted_by_purpose(described: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Descriptions by what methods are for, then the cheaper first; what is not loaded is last."""

    def place(one: Mapping[str, Any]) -> tuple[bool, int, str, int, str]:
        purpose = one.get("purpose", "")
        known = PURPOSES.index(purpose) if purpose in PURPOSES else len(PURPOSES)
        return "from" in one, known, purpose, one.get("passes") or 0, one["name"]

    return sorted(described, key=place)


def describe(chosen: Method) -> dict[str, Any]:
    """A method as plain data, for `soup methods`."""
    costs = cost(chosen)
    return {
        "name": chosen.name,
        "summary": chosen.summary,
        "source": chosen.source,
        "purpose": chosen.purpose,
        "passes": None if costs is None else costs.passes,
        "at_once": None if costs is None else costs.at_once,
        "models": list(chosen.models),
        "base": chosen.base,
        "beta": chosen.from_beta is not None,
        "aux": {name: aux.doc for name, aux in chosen.aux.items()},
        "version": code_version(chosen),
        "parameters": [
            {
                "name": own.name,
                "kind": own.kind,
                "required": own.is_required,
                "default": None if own.is_required else own.default,
                "per_model": own.kind == "numbers",
                "low": own.low,
                "high": own.high,
                "words": list(own.words),
                "doc": own.doc,
            }
            for own in chosen.parameters.values()
        ],
    }
