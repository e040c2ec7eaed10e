"""A checked merge: how each tensor of the output is made, and what the user should know of it.

A merge of merges can be made in one pass: each slice of an inner result is computed, rounded to its
stored dtype as if it had been written, and merged at once. The bytes are those of one merge after
the other; what is saved is writing and reading everything in between. An inner merge is then
`Unmade`, a checkpoint that is planned and never written, and its tensors are sources as any other.
Those that nothing takes are never computed: the lineage lacks how many of them are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from ..files.checkpoint import Checkpoint, TensorInfo
from ..files.dtypes import DTYPES, compute_dtype
from ..files.placing import LINEAGE_KEY
from ..files.quantized import (
    Scales,
)
from ..files.writer import OutputTensor, layout_parts
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
from .sources import Computed, Source, Stored
from .vocabularies import Retokenized

Kind = Literal["merge", "copy", "integer", "scales"]
Level = Literal["warning", "note"]


class Step(NamedTuple):
    """How one tensor of the output is made.

    Attributes:
        name, dtype, shape: of the output tensor.
        kind: `merge`, `copy` (of one source, perhaps to another dtype), `integer`, or `scales`.
        rule: index of its rule.
        sources: what is merged, read or computed; the base's is first.
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
    sources: tuple[Source | Made, ...]
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
        at_hand = sum(source.memory for source in self.computed)
        if self.outline is None or self.tensor is None:
            return at_hand
        return at_hand + self.outline.state_bytes(self.tensor)

    @property
    def is_undecided(self) -> bool:
        """Whether only the values can tell if a tensor can be made at all."""
        is_max = self.policy == "max" and DTYPES[self.dtype].kind == "opaque"
        return self.kind == "integer" and (self.policy == "error" or is_max)

    @property
    def streamed(self) -> list[Stored]:
        """The stored tensors of which the same elements are streamed for it."""
        return [source for source in self._leaves if isinstance(source, Stored)]

    @property
    def computed(self) -> list[Computed]:
        """What is computed for it beside the streaming."""
        return [source for source in self._leaves if not isinstance(source, Stored)]

    @property
    def _leaves(self) -> Iterable[Source]:
        if Made not in map(type, self.sources):  # as nearly always
            return cast("tuple[Source, ...]", self.sources)
        return [
            leaf for source in self.sources
            for leaf in (source.step._leaves if isinstance(source, Made) else (source,))
        ]  # fmt: skip


@dataclass(frozen=True)
class Notice:
    """Something the user did not ask for and should know.

    Attributes:
        kind: `taken`, `dropped`, `added`, `rest`, `carried`, `quantized`, `recalibrate`,
            `estimates`, `empty`, `dtype`, `aux`, `tokens`, `matrices`, `unrelated`, `config`,
            `metadata`, `nonfinite` or `output`.
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
        return sum(stored.info.nbytes for stored in step.streamed)

    def bytes_at_hand(self, step: Step) -> int:
        """Bytes that are read beside the streaming: for sources that are computed, and samples."""
        computed = sum(one.at_hand + step.passes * one.on_demand for one in step.computed)
        if step.outline is None or step.tensor is None:
            return computed
        bits = sum(DTYPES[source.info.dtype].bits for source in step.sources)
        return computed + step.outline.sampled(step.tensor) * bits // 8

    def called(self, word: str) -> Checkpoint:
        """A model by what a recipe calls it: `first`, `second`, `3`, `base`."""
        index = parse_model("the model", word)
        if index != BASE:
            return self.given[index]
        assert self.base is not None
        return self.base

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        """All that it is made of: the models, the base, and the auxiliary inputs."""
        beside = (model for models in self.aux.values() for model in models)
        return (*self.models, *(() if self.base is None else (self.base,)), *beside)

    @cached_property
    def stored(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that are read, those of merges on the way among them, each once."""
        found: dict[int, Checkpoint] = {}
        for model in self.inputs:
            of = model.plan.stored if isinstance(model, Unmade) else (model,)
            found.update((id(one), one) for one in of)
        return tuple(found.values())

    def name_of(self, model: Checkpoint) -> str:
        """How a sentence calls an input."""
        names = [*map(model_called, range(len(self.models)))]
        names += [] if self.base is None else [model_called(BASE)]
        names += [
            f"{name} of model {k + 1}" for name, of in self.aux.items() for k in range(len(of))
        ]
        return next(n for n, one in zip(names, self.inputs, strict=True) if one is model)

    @property
    def given(self) -> tuple[Checkpoint, ...]:
        """The models; where they are adapters, the one that these are for."""
        first = self.models[0]
        return (first.base,) if isinstance(first, Adapted) else self.models

    @property
    def can_be_unmade(self) -> bool:
        """Whether every tensor is made element by element, from the same elements of the inputs.

        And whether the first model's folder would have come along as it is but for a dtype: what
        else changes in one, such as a config's number of layers, is known only once it is written.
        """
        recipe = self.recipe
        if recipe.slices or self.dropped or recipe.files_from or recipe.tokenizer_from:
            return False
        first, made = (
            {name.rpartition("/")[0] for name in names}
            for names in (self.layout.models[0].tensors, (step.name for step in self.steps))
        )
        if made - first:  # a part that the first model has not, which brings a folder along
            return False
        return recipe.chat_template is None and self.takes_unmade and all(
            (step.outline is None or step.outline.is_elementwise) and step.quantized is None
            for step in self.steps
        )  # fmt: skip

    @property
    def takes_unmade(self) -> bool:
        """Whether it takes its inputs element by element, and none of them before it begins.

        Scales are read before the codes that they are for, and so is what must be compared.
        """
        return self.tokens is None and not any(
            step.is_undecided or any(step.scales) for step in self.steps
        )

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


class Unmade(Checkpoint):
    """What a merge would write, as an input of another merge; its tensors cannot be read.

    Args:
        plan: the merge, one that `can_be_unmade`.
        name: what the checkpoint would be called.
        node: what errors call it.
        key: what stands for it in lineages, in place of a digest.
        plan_name: what lineages call it.

    Attributes:
        plan, node: as given.
        steps: tensor name → how it is made.
    """

    key: str
    is_stored = True

    def __init__(
        self, plan: MergePlan, *, name: str, node: str, key: str, plan_name: str | None = None
    ) -> None:
        path, start = Path(name), 0
        tensors = {}
        outputs = [OutputTensor(step.name, step.dtype, step.shape) for step in plan.steps]
        first = plan.models[0]
        for file in layout_parts(outputs, first.parts, shard_size=None):
            for tensor in file.tensors:  # in the order in which they would lie in the file
                info = TensorInfo(*tensor, path, start, tensor.nbytes)
                tensors[tensor.name] = info
                start += tensor.nbytes
        metadata = {name: text for name, text in first.metadata.items() if name != LINEAGE_KEY}
        super().__init__(path, (), tensors, metadata, is_folder=first.is_folder, parts=first.parts)
        self.plan = plan
        self.node = node
        self.key = key
        self.plan_name = plan_name
        self.steps = {step.name: step for step in plan.steps}

    def source(self, info: TensorInfo) -> Made:
        """Where the values of a tensor come from."""
        return Made(self, info, self.steps[info.name])

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that its config would have named, one merge on the way after the other."""
        first, own = self.plan.models[0], self.plan.recipe.dtype
        before = first.dtypes if isinstance(first, Unmade) else ()
        return before if own is None else (*before, own)

    @property
    def companions(self) -> Path | None:
        """The folder whose config and other files would have come along."""
        return self.plan.files_from.companions


class Made(NamedTuple):
    """A tensor that another merge makes on the way.

    Attributes:
        model: the checkpoint that it would be in.
        info: what it would be there.
        step: how it is made.
    """

    model: Unmade
    info: TensorInfo
    step: Step

    @property
    def may_be_nonfinite(self) -> bool:
        """Whether it is only copied there, or may hold NaN or infinity although it is merged."""
        return self.step.kind == "copy" or self.step.name in self.model.plan.may_be_nonfinite
