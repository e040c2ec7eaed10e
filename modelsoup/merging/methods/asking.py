"""A method at work on a tensor: what it asks for, before any value is read and while they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ParameterError
from ..forms import Block, Merging, Rows, Tensor, WeightedSum, Whole
from ..reductions import Gathering, Products, Reduction, Total, takes_whole
from ..thresholds import PART, Largest, Ranked, sampled
from .registry import Method


@dataclass(frozen=True)
class Outline:
    """What a method asks of a tensor, and the form of what it does, before any value is read.

    Attributes:
        rounds: of reductions.
        form: what it does; for its form alone, where reductions come first.
    """

    rounds: tuple[tuple[Reduction, ...], ...]
    form: Merging

    @property
    def is_elementwise(self) -> bool:
        """Whether a block of the result takes nothing but the same block of the inputs."""
        return not self.rounds and not isinstance(self.form, Rows | Whole)

    @property
    def only(self) -> int | None:
        """The one input that the result equals exactly, whatever the values, where it does."""
        is_sum = not self.rounds and isinstance(self.form, WeightedSum)
        return self.form.only if is_sum else None  # type: ignore[union-attr]

    def passes(self, x: Tensor) -> int:
        """How often the inputs are read; for thresholds as a rule."""
        rounds = [(n, asked) for n, asked in enumerate(self.rounds) if asked]
        return 1 + sum(max(r.passes(x) for r in a) * self._times(n) for n, a in rounds)

    @property
    def totals(self) -> int:
        """How often it must know something of all tensors before it can go on with one."""
        return sum(map(_is_of_model, self.rounds))

    def _times(self, n: int) -> int:
        """How often a round is gathered: again after each that all tensors were waited for."""
        return 1 if _is_of_model(self.rounds[n]) else 1 + sum(map(_is_of_model, self.rounds[n:]))

    def sampled(self, x: Tensor) -> int:
        """How many elements of each input are read for samples."""
        if not x.is_sampled:
            return 0
        rounds = sum(
            self._times(n)
            for n, asked in enumerate(self.rounds)
            if any(isinstance(r, Largest | Ranked) and not r.rows for r in asked)
        )
        return rounds * len(sampled(x)) * PART

    def state_bytes(self, x: Tensor) -> int:
        """How much memory what is gathered takes at most."""
        return sum(r.state_bytes(x) for asked in self.rounds for r in asked)


def _is_of_model(asked: Sequence[Reduction]) -> bool:
    return any(isinstance(reduction, Total) for reduction in asked)


def outline(chosen: Method, x: Tensor, parameters: Mapping[str, Any]) -> Outline:
    """What a method will ask of a tensor, by asking it with guesses for an answer."""
    asking, rounds = chosen.ask(x, parameters), []
    try:
        asked = next(asking)
        while True:
            _must_be_alike(chosen, x, asked)
            rounds.append(tuple(asked))
            asked = asking.send([reduction.guess(x) for reduction in asked])
    except StopIteration as end:
        return Outline(tuple(rounds), end.value)


def _must_be_alike(chosen: Method, x: Tensor, asked: Sequence[Reduction]) -> None:
    if not isinstance(asked, Sequence):
        raise ParameterError(
            f"the method {chosen.name!r} yields {type(asked).__name__} for {x.name}, and no list "
            f"of reductions"
        )
    for told, kinds in (
        ("by blocks and by rows", {(r.rows, takes_whole(r)) for r in asked}),
        ("and for the whole model", {isinstance(r, Total) for r in asked}),
    ):
        if len(kinds) > 1:
            raise ParameterError(
                f"the method {chosen.name!r} asks for {x.name} {told} at once: yield them one "
                f"after the other"
            )


@dataclass(frozen=True)
class _Known:
    """A reduction of which the value is known."""

    value: Any
    needs_pass = False

    def add(self, b: Block) -> None: ...

    def end_pass(self) -> None: ...


class Asked:
    """A method at work on a tensor: the reductions under way, then what is to be done.

    Args:
        chosen: the method.
        x: the tensor.
        parameters: checked ones.
        planned: what it was found to ask for.
        stored: the dtypes in which the inputs are stored, where compiled loops are worth loading.
        totals: what is known of the whole model, by name; where that is not enough, it ends with
            what the tensor adds in `adds`. None takes the tensor for the model.

    Attributes:
        rows: whether the blocks that it takes are whole rows.
        wide: whether their values are in float64, whatever the arithmetic is in.
        whole: whether its one block is the whole tensor.
        takes_stored: whether they are in the dtypes in which they are stored.
        adds: what the tensor adds to sums over the model that are not known yet.

    Raises:
        ParameterError: later, where it asks for something else than was planned.
    """

    def __init__(
        self, chosen: Method, x: Tensor, parameters: Mapping[str, Any], planned: Outline,
        stored: tuple[str, ...] = (), *, totals: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._method = chosen
        self._x = x
        self._planned = list(planned.rounds)
        self._asking = chosen.ask(x, parameters)
        self._gathering: list[Gathering] = []
        self._stored = stored
        self._totals = totals
        self._lacking: list[str] = []
        self.adds: dict[str, Any] = {}
        self.rows = self.whole = self.wide = self.takes_stored = self._is_new = False
        self.merging: Merging | None = None
        self._go_on(None)
        self._settle()

    @property
    def needs_pass(self) -> bool:
        """Whether another pass over the inputs is needed."""
        return self.merging is None and not self.adds

    @property
    def wants_sample(self) -> bool:
        """Whether some elements of all parts of the tensor would spare a pass."""
        return self._is_new and self._x.is_sampled and bool(self._sampling)

    @property
    def _sampling(self) -> list[Any]:
        if self.rows:
            return []
        return [gathering for gathering in self._gathering if hasattr(gathering, "sample")]

    def sample(self, blocks: Sequence[Block]) -> None:
        """Take in some elements of all parts of the tensor."""
        self._is_new = False
        for gathering in self._sampling:
            gathering.sample(blocks)

    def add(self, b: Block) -> None:
        """Take in a block."""
        for gathering in self._gathering:
            if gathering.needs_pass:
                gathering.add(b)

    def end_pass(self) -> None:
        """All blocks were added."""
        for gathering in self._gathering:
            if gathering.needs_pass:
                gathering.end_pass()
        self._settle()

    def _settle(self) -> None:
        """Go on as far as is known."""
        while self.merging is None and not any(g.needs_pass for g in self._gathering):
            values = [gathering.value for gathering in self._gathering]
            if self._lacking:
                self.adds = dict(zip(self._lacking, values, strict=True))
                return
            self._go_on(values)

    def _go_on(self, values: Sequence[Any] | None) -> None:
        try:
            asked = next(self._asking) if values is None else self._asking.send(values)
        except StopIteration as end:
            self._gathering = []
            if self._planned:
                self._differs()
            self.merging = end.value
            return
        expected = self._planned.pop(0) if self._planned else ()
        if [(type(r), r.rows) for r in asked] != [(type(r), r.rows) for r in expected]:
            self._differs()
        self.rows = any(reduction.rows for reduction in asked)
        self.whole = any(map(takes_whole, asked))
        self.wide = all(reduction.wide for reduction in asked)
        totals, of_model = self._totals, [r.name for r in asked if isinstance(r, Total)]
        if totals is not None and of_model and all(name in totals for name in of_model):
            self._gathering, self.takes_stored = [_Known(totals[name]) for name in of_model], False
            return
        self._lacking = [] if totals is None else of_model
        self._gathering = [reduction.begin(self._x) for reduction in asked]
        self._find_loops()
        self._is_new = True

    def _find_loops(self) -> None:
        """Have what is stored summed up by compiled loops: all that is asked for, or nothing."""
        products = [one for one in self._gathering if isinstance(one, Products)]
        self.takes_stored = False
        if self._stored and len(products) == len(self._gathering):
            loops = [one.loop_over(self._stored) for one in products]
            self.takes_stored = None not in loops
            for one, loop in zip(products, loops, strict=True):
                one.loop = loop if self.takes_stored else None

    def _differs(self) -> None:
        raise ParameterError(
            f"the method {self._method.name!r} asks of {self._x.name} something else than it did "
            f"before its values were known: what it yields may depend on parameters and shapes only"
        )
