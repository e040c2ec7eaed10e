"""A checked merge: how each tensor of the output is made, and what the user should know of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from ..files.checkpoint import Checkpoint
from ..files.dtypes import DTYPES, compute_dtype
from ..files.quantized import (
    Scales,
)
from .folding import Adapted
from .forms import Tensor, Whole
from .layout import Layout
from .methods import Method, Outline
from .recipe import OnInteger, Recipe
from .renames import parse_model
from .rules import (
    BASE,
    Assignment,
    source_name,
)
from .sources import Source, Stored
from .vocabularies import Retokenized

Kind = Literal["merge", "copy", "integer", "scales"]
Level = Literal["warning", "note"]


class Step(NamedTuple):
    """How one tensor of the output is made.

    Attributes:
        name, dtype, shape: of the output tensor.
        kind: `merge`, `copy` (of one source, perhaps to another dtype), `integer`, or `scales`.
        rule: index of its rule.
        sources: what is merged, read or computed; the base has the index `BASE` and is first.
        method: for `merge`.
        parameters: for `merge`, checked, by the names of the method's arguments.
        tensor: for `merge`, what the method sees of it.
        outline: for `merge`, what the method asks for.
        policy: for `integer`, what to take where they differ.
        scales: for each source, where its scales are, if it holds quantised codes.
        quantized: where the scales of the result are, if it is quantised. For `scales`, which are
            written with the codes that they are for, themselves.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: Kind
    rule: int
    sources: tuple[Source, ...]
    method: Method | None = None
    parameters: Mapping[str, Any] | None = None
    tensor: Tensor | None = None
    outline: Outline | None = None
    policy: OnInteger = "error"
    scales: tuple[Scales | None, ...] = ()
    quantized: Scales | None = None

    @property
    def elements(self) -> int:
        """How many elements the tensor has."""
        return math.prod(self.shape)

    @property
    def compute_dtype(self) -> np.dtype[Any]:
        """The dtype of the arithmetic."""
        return compute_dtype(tuple(source.info.dtype for source in self.sources))

    @property
    def passes(self) -> int:
        """How often the sources are read: for thresholds as a rule, nearly equal values cost more.

        A gram takes one pass before the merge itself; an exact threshold two; restoring a norm one;
        the scales of a quantised result one.
        """
        quantized = self.quantized is not None
        if self.outline is None or self.tensor is None:
            return 1 + quantized
        return self.outline.passes(self.tensor) + quantized

    @property
    def whole_bytes(self) -> int:
        """How much memory its method takes where it merges whole tensors, 0 where it does not."""
        form = None if self.outline is None else self.outline.form
        if not isinstance(form, Whole):
            return 0
        stored = self.elements * DTYPES[self.dtype].bits // 8
        stored += sum(source.info.nbytes for source in self.sources)
        wide = form.memory * self.elements + sum(source.info.elements for source in self.sources)
        return stored + round(wide * self.compute_dtype.itemsize)

    @property
    def state_bytes(self) -> int:
        """How much memory what is gathered of its inputs takes at most, and what computes them."""
        at_hand = sum(s.memory for s in self.sources if not isinstance(s, Stored))
        if self.outline is None or self.tensor is None:
            return at_hand
        return at_hand + self.outline.state_bytes(self.tensor)


@dataclass(frozen=True)
class Notice:
    """Something the user did not ask for and should know.

    Attributes:
        kind: `taken`, `dropped`, `added`, `rest`, `carried`, `quantized`, `recalibrate`, `empty`,
            `dtype`, `aux`, `tokens`, `matrices`, `config`, `metadata`, `nonfinite` or `output`.
        message: one sentence.
        names: the tensors it is about.
        level: a `warning` is an error under `strict`; a `note` only says what was done.
    """

    kind: str
    message: str
    names: tuple[str, ...]
    level: Level = "warning"


@dataclass(frozen=True)
class RuleCount:
    """What one rule took: how many tensors and parameters."""

    rule: str
    tensors: int
    parameters: int


@dataclass(frozen=True)
class MergePlan:
    """A checked merge: what is done for each tensor of the output, from headers alone.

    Attributes:
        models: the models, the first of which gives dtypes and metadata.
        base: the base model, if there is one.
        recipe: what was planned.
        assignment: which rule each tensor falls under.
        steps: one for each output tensor, in the first model's order.
        dropped: names of the models' tensors that are not in the output.
        added: names in the output that the first model has not.
        frozen: names that a trainer must not change afterwards.
        notices: what the user should know before anything is read.
        layout: the models as its rules see them.
        may_be_nonfinite: names of tensors that may hold NaN or infinity although they are merged.
        has_codes: whether tensors of the output are codes, of which a config tells.
        aux: auxiliary inputs of methods: for each name a checkpoint a model.
        tokens: the vocabulary of the output, where models have several.
    """

    models: tuple[Checkpoint, ...]
    base: Checkpoint | None
    recipe: Recipe
    assignment: Assignment
    steps: tuple[Step, ...]
    dropped: tuple[str, ...]
    added: tuple[str, ...]
    frozen: tuple[str, ...]
    notices: tuple[Notice, ...]
    layout: Layout
    may_be_nonfinite: frozenset[str] = frozenset()
    has_codes: bool = False
    aux: Mapping[str, tuple[Checkpoint, ...]] = field(default_factory=dict)
    tokens: Retokenized | None = None

    @property
    def files_from(self) -> Checkpoint:
        """The model whose config and other files go along."""
        return self.called(self.recipe.files_from or "first")

    @property
    def bytes_written(self) -> int:
        """The output's tensor bytes."""
        return sum(step.elements * DTYPES[step.dtype].bits // 8 for step in self.steps)

    @property
    def bytes_read(self) -> int:
        """Tensor bytes that are read at least once."""
        return sum(self.bytes_to_read(step) + self.bytes_at_hand(step) for step in self.steps)

    def bytes_to_read(self, step: Step) -> int:
        """Bytes that one pass over a step's sources reads."""
        return sum(
            self.model(source.model).bytes_to_read(source.info)
            for source in step.sources if isinstance(source, Stored)
        )  # fmt: skip

    def bytes_at_hand(self, step: Step) -> int:
        """Bytes that are read beside the streaming: for sources that are computed, and samples."""
        computed = sum(
            source.at_hand + step.passes * source.on_demand
            for source in step.sources if not isinstance(source, Stored)
        )  # fmt: skip
        if step.outline is None or step.tensor is None:
            return computed
        bits = sum(DTYPES[source.info.dtype].bits for source in step.sources)
        return computed + step.outline.sampled(step.tensor) * bits // 8

    def model(self, index: int) -> Checkpoint:
        """A model by its index, `rules.BASE` for the base; auxiliary inputs come after models."""
        model = self.base if index == BASE else (*self.models, *self.beside)[index]
        assert model is not None
        return model

    def called(self, word: str) -> Checkpoint:
        """A model by what a recipe calls it: `first`, `second`, `3`, `base`."""
        index = parse_model("the model", word)
        return self.model(index) if index == BASE else self.given[index]

    @property
    def beside(self) -> tuple[Checkpoint, ...]:
        """The auxiliary inputs, in the order of their indices."""
        return tuple(model for models in self.aux.values() for model in models)

    def name_of(self, index: int) -> str:
        """How a sentence calls an input."""
        number, k = divmod(index - len(self.models), len(self.models))
        return model_called(index) if number < 0 else f"{list(self.aux)[number]} of model {k + 1}"

    @property
    def given(self) -> tuple[Checkpoint, ...]:
        """The models; where they are adapters, the one that these are for."""
        first = self.models[0]
        return (first.base,) if isinstance(first, Adapted) else self.models

    @property
    def bytes_streamed(self) -> int:
        """Tensor bytes read, over all passes, and written."""
        read = sum(
            step.passes * self.bytes_to_read(step) + self.bytes_at_hand(step) for step in self.steps
        )
        return read + self.bytes_written

    def rule_counts(self) -> list[RuleCount]:
        """Per rule, how many tensors and parameters it took."""
        sizes = {step.name: step.elements for step in self.steps}
        seen = self.layout
        for model in (*([] if seen.base is None else [seen.base]), *reversed(seen.models)):
            sizes.update({n: model.tensors[n].elements for n in self.dropped if n in model.tensors})
        counts = []
        for index, rule in enumerate(self.assignment.rules):
            taken = self.assignment.taken(index)
            if taken or index < len(self.assignment.rules) - 1:
                counts.append(RuleCount(str(rule), len(taken), sum(sizes[n] for n in taken)))
        return counts


def model_called(index: int) -> str:
    """How a sentence calls an input: `the first model`, `model 3`, `the base model`."""
    name = source_name(index)
    return name if index > 1 else f"the {name} model"
