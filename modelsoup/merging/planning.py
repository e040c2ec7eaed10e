"""The plan that a recipe makes of given models: each tensor of the output, from headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

from ..errors import (
    MismatchError,
    ParameterError,
    are_counted,
    auxiliary_option,
    counted,
    layer_option,
    listed,
    option,
    sized,
)
from ..files import low_rank, quantized
from ..files.checkpoint import Checkpoint, TensorInfo
from ..files.dtypes import DTYPES, compute_dtype
from ..files.names import layers_of
from ..files.quantized import (
    Scales,
    is_activation_scale,
    packed_weights,
    scaled_weights,
    tells_of_codes,
)
from .folding import Adapted
from .forms import Tensor, WeightedSum
from .hints import done, in_place, instead
from .layout import Layout, laid_out
from .methods import Method, Outline, outline
from .methods.spectral import is_table
from .plan import Level, Made, MergePlan, Notice, Step, Unmade, model_called
from .preparation import Preparation, Prepared
from .proposals import proposal
from .recipe import UNION, OnInteger, Recipe
from .renames import parse_model
from .rules import (
    BASE,
    Assignment,
    Rule,
    assign,
    matching,
    names_of,
    plainly,
)
from .sources import Source, Stored
from .vocabularies import Retokenized, in_one_order

_COUNTER = "num_batches_tracked"
_RUNNING = ("running_mean", "running_var")
_STORED = ("stored_mean", "stored_var")  # BigGAN's
_SPECTRAL = ("weight_u", "weight_v", "weight.0._u", "weight.0._v")
_SPECTRAL_STARTS = ("w", "_", "u", "s")
_SINGULAR = re.compile(r"(?:u|sv)\d+")  # BigGAN's vectors and values

Remedy = Literal["first or drop", "second or drop", "drop", "named"]
_KEEPING: dict[int, Remedy] = {0: "first or drop", 1: "second or drop"}


def plan_merge(
    models: Sequence[Checkpoint], recipe: Recipe, *, base: Checkpoint | None = None,
    aux: Mapping[str, Sequence[Checkpoint]] | None = None,
) -> MergePlan:  # fmt: skip
    """Decide for every tensor how it is made, and find every fault that headers can show.

    Args:
        models: the models, the first of which gives the output's dtypes.
        recipe: what to do with them.
        base: the base model, for methods and rules that use one.
        aux: auxiliary inputs of methods: for each name a checkpoint a model.

    Raises:
        ParameterError: a method, parameter or count that does not fit.
        RuleError: a rule that matches nothing.
        MismatchError: names, shapes or dtypes do not fit together under the rules; or what is to be
            merged are codes or factors, which mean nothing one by one.
    """
    given = tuple(models)
    layout = laid_out(given, base, recipe.renames, recipe.slices)
    tokens = None
    if recipe.tokenizer_from is not None:
        layout, tokens = in_one_order(layout, given, base, recipe.tokenizer_from, recipe.files_from)
    beside = {name: tuple(found) for name, found in (aux or {}).items()}
    for name, found in beside.items():
        if len(found) != len(given):
            raise ParameterError(
                f"there is one {name!r} for each model, but {counted(len(found), 'checkpoint')} "
                f"for {counted(len(given), 'model')}"
            )
    if beside and recipe.slices:
        raise ParameterError("slices stack layers anew, and auxiliary inputs go by the old ones")
    if beside and tokens is not None:
        raise ParameterError(
            "rows of embeddings are put in another order, and auxiliary inputs go by the old one"
        )
    return _Planner(given, base, layout, recipe, beside, tokens).plan()


class _Planner:
    """Plans a merge of models as a layout has them; `given` are those that are read."""

    def __init__(
        self, given: tuple[Checkpoint, ...], given_base: Checkpoint | None, layout: Layout,
        recipe: Recipe, aux: Mapping[str, tuple[Checkpoint, ...]], tokens: Retokenized | None,
    ) -> None:  # fmt: skip
        self.aux = aux
        self.tokens = tokens
        self.used_aux: set[str] = set()  # of which a tensor is read
        self.given = given, given_base
        places = {**dict(enumerate(layout.models)), BASE: layout.base}
        self.origins = {id(places[k]): found for k, found in layout.origins.items()}
        self.gathered = {(id(places[k]), name): of for (k, name), of in layout.gathered.items()}
        self.layout = layout
        self.models = models = layout.models
        self.recipe = recipe
        self.base = base = layout.base
        self.rules: tuple[Rule, ...] = ()
        self.names: list[str] = []
        self.layers: Mapping[str, tuple[int, int]] = {}
        self.estimates: set[str] = set()
        self.prepared: dict[int, Prepared] = {}
        self.is_merged = False  # whether any tensor is, and is not the copy of one
        # What is wrong, and what can be done about it → with which tensors.
        self.faults: dict[tuple[str, Remedy], list[str]] = {}
        self.details: dict[str, str] = {}  # name → how the models differ
        self.notices: dict[tuple[str, str, Level], list[str]] = {}
        self.adapted = [model for model in models if isinstance(model, Adapted)]
        # What rules call the first model, the second: of adapters, the one that they are for.
        self.called = (self.adapted[0].base,) if self.adapted else models
        self.every = every = [*models, *([] if base is None else [base])]  # the base's names last
        self.scaled = {id(model): _scaled(model) for model in every}
        scales = {s.name for found in self.scaled.values() for s in found.values()}
        with_scales = [model for model in every if self.scaled[id(model)]]
        self.is_quantized = bool(with_scales)
        # What is not merged for itself: scales go with their codes, and so does what tells of them.
        self.followers = scales | {
            name for model in with_scales for name in model.tensors if tells_of_codes(name)
        }
        # Most models have no such names, which one look at all of them shows.
        text = "\n".join(dict.fromkeys(n for model in every for n in model.tensors)).lower()
        with_codes = every if any(word in text for word in quantized.WORDS) else []
        with_factors = every if any(word in text for word in low_rank.WORDS) else []
        self.packed = {n: s for m in with_codes for n, s in packed_weights(m.tensors).items()}
        self.packed_homes = {name.rpartition(".")[0] for name in self.packed}
        self.factors = {name for m in with_factors for name in low_rank.factors(m.tensors)}
        self.outlines: dict[Any, Outline] = {}  # of tensors that are alike
        self.has_codes = False  # in the output
        self.matrices: list[Notice] = []

    def plan(self) -> MergePlan:
        if not self.models:
            raise ParameterError("a merge needs at least one model")
        recipe, first = self.recipe, self.models[0]
        names = dict.fromkeys(name for model in self.every for name in model.tensors)
        self.names = [name for name in names if name not in self.followers]
        self.layers = {**layers_of(self.names), **self.layout.layers}
        assignment = assign(
            self.names, recipe.layers, rest=recipe.rest or "first", groups=recipe.groups,
            fractions=recipe.low_level, slices=self.layout.slices,
        )  # fmt: skip
        self.assignment, self.rules = assignment, assignment.rules
        self.estimates.update(
            *(names_of(pattern, self.names, recipe.groups) for pattern in recipe.estimates)
        )
        if recipe.low_level and not any(rule.low_level for rule in self.rules):
            raise ParameterError(
                f"low-level has a depth, but no rule uses it (add the rule low-level: "
                f"{option('layers', 'low-level')})"
            )
        self._check_sources()
        self.preparation = Preparation(
            recipe, self.names, self.layers, count=len(self.models),
            has_base=self.base is not None, are_adapters=bool(self.adapted),
        )  # fmt: skip
        for index, rule in enumerate(self.rules):
            if rule.action == "merge":
                self.prepared[index] = self.preparation.prepare(rule)
        if recipe.parameters and self.prepared and all(p.is_own for p in self.prepared.values()):
            raise ParameterError(
                f"{', '.join(recipe.parameters)} has no use: every rule that merges has a method "
                f"of its own (say it in the rule)"
            )
        self._check_base()
        self._check_aux()
        steps: list[Step] = []
        dropped: list[str] = []
        for name in self.names:
            made = self._steps(name, assignment.chosen[name])
            steps += made
            if not made:
                dropped.append(name)
        if self.is_quantized:
            steps += self._followers_of(steps)
        self.has_codes = self.has_codes or any(step.name in self.packed for step in steps)
        self._raise_faults()
        self._must_use_aux()
        self._must_merge(assignment)
        if not steps:
            raise MismatchError("the output would have no tensors: every one is dropped")
        nonfinite: set[str] = set()
        if recipe.allow_nonfinite:
            there = [step.name for step in steps]
            nonfinite = matching(recipe.allow_nonfinite, there, recipe.groups)
        added = tuple(step.name for step in steps if step.name not in first.tensors)
        lost = set(dropped)
        frozen = tuple(
            name for name, index in assignment.chosen.items()
            if self.rules[index].frozen and name not in lost
        )  # fmt: skip
        self._notice_steps(assignment, steps, added)
        return MergePlan(
            *self.given, recipe, assignment, tuple(steps), tuple(dropped), added, frozen,
            self._collected(), self.layout, frozenset(nonfinite), self.has_codes, self.aux,
            self.tokens,
        )  # fmt: skip

    def _check_sources(self) -> None:
        models, base = self.given
        count = 1 if self.adapted else len(models)
        for name in ("files_from", "tokenizer_from"):
            word = getattr(self.recipe, name) or "first"
            wanted = 0 if word == UNION else parse_model(name, word)
            if wanted >= count or (wanted == BASE and base is None):
                raise ParameterError(
                    f"{name} is {model_called(wanted)}, but there "
                    f"{'is none' if wanted == BASE else f'are {count}'}"
                )
        for rule in self.rules:
            if rule.action != "keep":
                continue
            if rule.source == BASE and self.base is None:
                raise ParameterError(
                    f"the rule {str(rule)!r} wants a base model ({option('base', 'BASE')})"
                )
            if rule.source >= len(self.called):
                raise ParameterError(
                    f"the rule {str(rule)!r} wants model {rule.source + 1}, but there are "
                    f"{len(self.called)}"
                )

    def _check_base(self) -> None:
        methods = [prepared.method for prepared in self.prepared.values()]
        uses_base = any(method.base is not False for method in methods) or any(
            rule.source == BASE for rule in self.rules if rule.action == "keep"
        )
        if self.base is not None and not uses_base:
            named = ", ".join(sorted({method.name for method in methods})) or "no method"
            raise ParameterError(f"a base model was given, but {named} uses none")

    def _check_aux(self) -> None:
        """Whether there is just what methods ask for beside the models."""
        methods = {prepared.method.name: prepared.method for prepared in self.prepared.values()}
        wanted = {name: method for method in methods.values() for name in method.aux}
        for name in self.aux:
            if name not in wanted:
                for method in methods.values():
                    method.auxiliary(name)
                raise ParameterError(f"{name!r} was given, but nothing is merged that uses it")
        for name, method in wanted.items():
            if name not in self.aux:
                raise ParameterError(
                    f"{method.name!r} needs {name!r} for each model "
                    f"({auxiliary_option(name)}): {method.aux[name].doc}"
                )

    def _must_use_aux(self) -> None:
        for name in self.aux.keys() - self.used_aux:
            there = list(dict.fromkeys(n for model in self.aux[name] for n in model.tensors))
            raise MismatchError(
                f"no tensor that is merged has the name of one in {name!r}: {listed(there)}"
            )

    def _must_merge(self, assignment: Assignment) -> None:
        """Whether what was asked for is done at all: a copy would look like a merge."""
        asked = self.recipe.asks_to_merge
        if asked and not any(assignment.taken(index) for index in self.prepared):
            last = self.rules[-2]
            how = f"{option('rest', 'merge')} merges those that no rule matches"
            if not assignment.taken(len(self.rules) - 1):
                how = f"{layer_option([(last.pattern, 'merge')])} in place of {str(last)!r} does"
            raise ParameterError(
                f"{' and '.join(asked)} {'was' if len(asked) == 1 else 'were'} given, but by the "
                f"rules no tensor is merged ({how})"
            )
        recipe = self.recipe
        changes = recipe.layers or recipe.dtype or recipe.renames or recipe.slices
        if len(self.models) == 1 and not self.is_merged and not changes:
            raise ParameterError(
                "one model alone is not merged: give more, or say what else is to be done with it"
            )

    def _notice(self, kind: str, what: str, name: str, level: Level = "warning") -> None:
        self.notices.setdefault((kind, what, level), []).append(name)

    def _fault(self, what: str, name: str, remedy: Remedy = "first or drop") -> list[Step]:
        self.faults.setdefault((what, remedy), []).append(name)
        return []

    def _steps(self, name: str, index: int) -> list[Step]:
        """How a tensor is made: not at all if it is left out, with its scales if it has some."""
        rule = self.rules[index]
        if rule.action == "drop":
            return []
        if rule.action == "keep":
            return self._keep(name, index, rule)
        if name in self.estimates and len(self.models) > 1:
            return self._leave_estimates(name)
        if self.adapted and not any(name in model.changes for model in self.adapted):
            return self._copy(name, index, self.called[0], self.called[0].tensors[name])
        infos = [model.tensors.get(name) for model in self.models]
        absent = [k for k, info in enumerate(infos) if info is None] if None in infos else []
        if len(absent) == len(infos):
            return self._leave_out("only in the base model", name)
        if name in self.packed:
            what = (
                f"packed by {self.packed[name]}, and codes cannot be merged (dequantise the models "
                f"first)"
            )
            return self._fault(what, name, self._keeping(name))
        if name in self.factors and not low_rank.are_named(rule.pattern):
            what = (
                "part of low-rank updates: a mean of factors is no factor of the mean (soup lora "
                "merge merges adapters, and soup merge BASE --lora applies them)"
            )
            return self._fault(what, name, "named")
        if absent:
            who = " and ".join(f"{self.models[k].name}, {model_called(k)}" for k in absent)
            return self._fault(f"missing from {who}", name, self._keeping(name))
        return self._merge(name, index, cast("list[TensorInfo]", infos))

    def _keep(self, name: str, index: int, rule: Rule) -> list[Step]:
        """A tensor that a rule, or what is done with the rest, keeps from one model."""
        model = self.base if rule.source == BASE else self.called[rule.source]
        assert model is not None  # _check_sources saw to it
        info = model.tensors.get(name)
        if info is not None:
            return self._copy(name, index, model, info)
        if name in self.estimates:  # as of a model that is a merge itself
            return self._leave_estimates(name)
        if not any(name in model.tensors for model in self.models):
            return self._leave_out("only in the base model", name)
        if index < len(self.rules) - 1:  # asked for by a rule, not by what is left
            what = f"not in {model_called(rule.source)}, from which a rule keeps"
            return self._fault(what, name, self._keeping(name))
        return self._leave_out(f"not in {model_called(rule.source)}", name)

    def _keeping(self, name: str) -> Remedy:
        """What can be done about a tensor that is not merged, by which model has it."""
        has = next(k for k, model in enumerate(self.models) if name in model.tensors)
        if has and name.rpartition(".")[0] in self.packed_homes:
            return "drop"  # else the output would have the weights twice: packed, and as values
        return _KEEPING.get(has, "drop")

    def _leave_out(self, why: str, name: str) -> list[Step]:
        self._notice("dropped", f"left out ({why})", name)
        return []

    def _leave_estimates(self, name: str) -> list[Step]:
        what = "left out: estimates, which are found anew where the result is loaded"
        self._notice("estimates", what, name, "note")
        return []

    def _source(self, model: Checkpoint, info: TensorInfo) -> Source | Made:
        """Where the values of a tensor come from, of a model as rules see it."""
        if rows := self.gathered.get((id(model), info.name)):
            return rows
        if self.origins:
            index, info = self.origins[id(model)][info.name]
            models, base = self.given
            model = base if index == BASE and base is not None else models[index]
        return model.source(info) if isinstance(model, Adapted | Unmade) else Stored(model, info)

    def _scales(self, model: Checkpoint, name: str) -> Scales | None:
        return self.scaled[id(model)].get(name) if self.is_quantized else None

    def _stored_scales(self, model: Checkpoint, name: str) -> Scales | None:
        """The same, by the name that they have in their file."""
        scales = self._scales(model, name)
        if scales is None or not self.origins:
            return scales
        return replace(scales, name=self.origins[id(model)][scales.name][1].name)

    def _copy(
        self, name: str, index: int, model: Checkpoint, info: TensorInfo, dtype: str | None = None
    ) -> list[Step]:
        """A tensor of one model, with its scales, or without where it is stored as a wider one."""
        source, scales = (self._source(model, info),), self._scales(model, name)
        if name not in self.packed:  # of which every part is read as it was stored
            dtype = self._output_dtype(dtype or info.dtype)
        dtype = dtype or info.dtype
        if scales is None or dtype != info.dtype:
            of_codes = () if scales is None else (self._stored_scales(model, name),)
            if of_codes:
                self._notice("quantized", f"quantised: stored as {dtype}", name, "note")
            return [Step(name, dtype, info.shape, "copy", index, source, scales=of_codes)]
        beside = model.tensors[scales.name]
        with_it = (self._source(model, beside),)
        return [
            Step(name, dtype, info.shape, "copy", index, source),
            Step(scales.name, beside.dtype, beside.shape, "copy", index, with_it),
        ]

    def _output_dtype(self, dtype: str) -> str:
        wanted: str | None = self.recipe.dtype
        return wanted if wanted is not None and DTYPES[dtype].kind == "float" else dtype

    def _merge(self, name: str, index: int, infos: list[TensorInfo]) -> list[Step]:
        prepared = self.prepared[index]
        method = prepared.method
        base = None if method.base is False else self.base
        based = None if base is None else base.tensors.get(name)
        every = [*infos, *([] if based is None else [based])]
        if len({info.shape for info in every}) > 1:
            self.details[name] = " and ".join(str(list(info.shape)) for info in every)
            return self._fault("of different shapes", name)
        dtypes = {info.dtype for info in every}
        kinds = {DTYPES[dtype].kind for dtype in dtypes}
        sources: tuple[Source | Made, ...] = tuple(map(self._source, self.models, infos))
        if kinds != {"float"}:
            if len(dtypes) > 1:
                self.details[name] = " and ".join(info.dtype for info in every)
                return self._fault("of different dtypes, which cannot be merged", name)
            default: OnInteger = "max" if name.rpartition(".")[2] == _COUNTER else "error"
            self._notice_carried(name)
            return [
                Step(
                    name, infos[0].dtype, infos[0].shape, "integer", index, sources,
                    policy=self.recipe.on_integer or default,
                )
            ]  # fmt: skip
        if base is not None and based is None:
            return self._fault("missing from the base model", name)
        merged = self.models
        if base is not None and based is not None:
            merged, sources = (base, *merged), (self._source(base, based), *sources)
        scales: tuple[Scales | None, ...] = ()
        if self.is_quantized:
            scales = tuple(self._stored_scales(model, name) for model in merged)
        beside = self._beside(method, name, infos[0].shape)
        if beside is None:
            return []
        sources = (*sources, *(source for found in beside.values() for source in found))
        if scales:
            scales = (*scales, *[None] * (len(sources) - len(scales)))
        dtype = self._output_dtype(infos[0].dtype)
        if len(dtypes) > 1 and not any(scales):
            self._notice("dtype", f"stored in different dtypes; the output has {dtype}", name)
        parameters = self.preparation.parameters(prepared, name)
        tensor = Tensor(
            name, infos[0].shape, len(infos), based is not None,
            compute_dtype(tuple(s.info.dtype for s in sources)), self.recipe.seed,
            self.layers.get(name),
            not any(scales) and not beside and all(isinstance(s, Stored) for s in sources),
            tuple(beside),
        )  # fmt: skip
        asked = self._outline(method, tensor, parameters)
        if not any(scales) and self._is_replaced(asked, sources):  # codes need their scale
            self.is_merged = True
            return [Step(name, dtype, infos[0].shape, "copy", index, sources[-1:])]
        if asked.only is not None:
            copied = merged[asked.only]
            if self._is_alike(name, infos[0], copied):
                return self._copy(name, index, copied, copied.tensors[name], infos[0].dtype)
        else:
            self.is_merged = True
        step = Step(
            name, dtype, infos[0].shape, "merge", index, sources, method, parameters, tensor, asked
        )
        return self._of_codes(step, scales, infos[0].dtype) if any(scales) else [step]

    def _outline(self, method: Method, x: Tensor, parameters: Mapping[str, Any]) -> Outline:
        """What a method asks of a tensor; where it must know something of it, as of those like it.

        What it yields may depend on parameters and shapes only, and on whether it is a table by its
        name. What it does without asking may depend on the name in other ways.
        """
        depth = x.layer if method.layers else None
        key = (
            id(method),
            id(parameters),
            x.shape,
            x.has_base,
            x.dtype,
            x.can_be_sampled,
            x.aux,
            depth,
            len(x.shape) > 1 and is_table(x.name),
        )
        if key not in self.outlines:
            asked = outline(method, x, parameters)
            if not asked.rounds:
                return asked
            self.outlines[key] = asked
        return self.outlines[key]

    def _beside(
        self, method: Method, name: str, shape: tuple[int, ...]
    ) -> dict[str, list[Source]] | None:
        """The auxiliary inputs for a tensor, by name; None if something about them is wrong."""
        found: dict[str, list[Source]] = {}
        for what, models in self.aux.items():
            wanted = method.aux[what].shape(shape) if what in method.aux else None
            infos = [model.tensors.get(name) for model in models]
            there = [info for info in infos if info is not None]
            if wanted is None or not there:
                if wanted is not None:
                    self._notice("aux", f"merged without {what}, which has none", name, "note")
                continue
            if len(there) < len(models):
                lacking = models[infos.index(None)].name
                self._fault(f"missing from {lacking}, {what} of a model", name)
                return None
            if any(info.shape != wanted or DTYPES[info.dtype].kind != "float" for info in there):
                self.details[name] = " and ".join(f"{i.dtype} {list(i.shape)}" for i in there)
                self._fault(f"without {what} of floats and the shape {list(wanted)}", name)
                return None
            self.used_aux.add(what)
            found[what] = [*map(Stored, models, there)]
        return found

    def _of_codes(self, step: Step, scales: tuple[Scales | None, ...], dtype: str) -> list[Step]:
        """A merge of the values that codes stand for, quantised as the first model is."""
        own = self._scales(self.called[0], step.name) if step.dtype == dtype else None
        how = f"stored as {step.dtype}" if own is None else "quantised again"
        self._notice("quantized", f"quantised: merged as values, and {how}", step.name, "note")
        step = step._replace(scales=scales, quantized=own)
        if own is None:
            return [step]
        beside = Step(
            own.name, own.dtype, own.shape, "scales", step.rule, (),
            quantized=own,
        )  # fmt: skip
        return [step, beside]

    def _is_replaced(self, asked: Outline, sources: Sequence[Source | Made]) -> bool:
        """Whether what one adapter alone has in the place of a tensor is all of the result."""
        form = asked.form
        is_sum = not asked.rounds and isinstance(form, WeightedSum) and form.of_deltas
        return (
            len(self.adapted) == 1
            and isinstance(sources[-1], Stored)
            and is_sum
            and tuple(form.coefficients) == (1,)  # type: ignore[union-attr]
        )

    def _is_alike(self, name: str, first: TensorInfo, copied: Checkpoint) -> bool:
        """Whether a copy of a model's tensor is stored as the first model's is."""
        as_stored = self._output_dtype(first.dtype) == first.dtype
        return not as_stored or self._scales(copied, name) == self._scales(self.called[0], name)

    def _notice_carried(self, name: str) -> None:
        if self.recipe.on_integer is None:
            what = "carried over and not averaged, as only floats are"
            self._notice("carried", what, name, "note")

    def _followers_of(self, steps: Sequence[Step]) -> list[Step]:
        """What tells of codes, where the output still has some: ranges of activations, markers."""
        there = {step.name for step in steps}
        self.has_codes = any(s.name in there for of in self.scaled.values() for s in of.values())
        rest = len(self.rules) - 1
        made: list[Step] = []
        for name in dict.fromkeys(n for model in self.models for n in model.tensors):
            if not (self.has_codes and tells_of_codes(name) and name in self.followers):
                continue
            sources = tuple(
                self._source(model, model.tensors[name]) for model in self.called
                if name in model.tensors
            )  # fmt: skip
            info, kinds = sources[0].info, {(s.info.dtype, s.info.shape) for s in sources}
            if not is_activation_scale(name) or len(kinds) > 1:
                made.append(Step(name, info.dtype, info.shape, "copy", rest, sources[:1]))
                continue
            self._notice(
                "recalibrate", "of the ranges of activations, the largest: calibrate anew", name
            )
            made.append(Step(name, info.dtype, info.shape, "integer", rest, sources, policy="max"))
        return made

    def _raise_faults(self) -> None:
        """One sentence for each way in which the models do not fit, all at once."""
        if not self.faults:
            return
        are_missing = any(what.startswith("missing") for what, _ in self.faults)
        if are_missing and not (self.recipe.renames or self.recipe.slices):
            otherwise = proposal(self.models, self.base)
            if otherwise is not None:
                raise MismatchError(f"the models call the same tensors otherwise: {otherwise}")
        told = [
            f"{are_counted(len(names), 'tensor')} {what}: "
            f"{listed([self._detailed(name) for name in names])} ({self._remedy(names, remedy)})"
            for (what, remedy), names in self.faults.items()
        ]
        raise MismatchError("the models do not fit together: " + "; ".join(told))

    def _detailed(self, name: str) -> str:
        return f"{name} ({self.details[name]})" if name in self.details else name

    def _remedy(self, names: Sequence[str], remedy: Remedy) -> str:
        """What to do about tensors, so that it is done and all others are merged as before."""
        if remedy == "named":
            return f"to merge the factors all the same, name them: {self._naming(names)}"
        first, _, other = remedy.partition(" or ")
        words = [first, *([other] if other else [])]
        said = "leave them out" if first == "drop" else "keep them"
        return f"{said} with {instead(self.recipe, self.assignment, names, *words)}"

    def _naming(self, factors: Sequence[str]) -> str:
        """Rules that speak of factors, and have done with them what was to be done."""
        chosen = self.assignment.chosen
        rules: dict[str, str] = {}
        taken = set(factors)
        for name in factors:
            if any(fnmatchcase(name, pattern) for pattern in rules):
                continue
            pattern = low_rank.pattern_for(name)
            alike = [n for n in chosen if fnmatchcase(n, pattern)]
            if len({chosen[n] for n in alike}) > 1:  # other rules have their say there
                pattern, alike = plainly(name), [name]
            taken.update(alike)
            words = [w for w in self.rules[chosen[name]].words if w != "low-level"]
            rules[pattern] = ";".join(words)
        return in_place(self.recipe, self.assignment, rules, taken)

    def _notice_steps(
        self, assignment: Assignment, steps: Sequence[Step], added: tuple[str, ...]
    ) -> None:
        rest = len(self.rules) - 1
        for name in added:
            if assignment.chosen.get(name) == rest:
                self._notice("added", "not in the first model and added", name)
        if self.recipe.layers:
            for name in assignment.taken(rest):
                what = f"matched by no rule and {done(self.rules[rest])}"
                self._notice("rest", what, name, "note")
        for step in steps:
            if not step.elements:
                self._notice("empty", "without elements", step.name)
            if step.kind != "merge":
                continue
            last = step.name.rpartition(".")[2]
            of = None
            if last in _RUNNING or last.startswith(_STORED):
                of = "BatchNorm's statistics"
            elif last[:1] in _SPECTRAL_STARTS and self._is_spectral(step.name):
                of = "spectral normalisation"
            if of is not None:
                self._notice("recalibrate", f"of {of} and averaged: estimate them anew", step.name)

        self._notice_matrices([step for step in steps if step.method is not None])

    def _notice_matrices(self, steps: Sequence[Step]) -> None:
        """Which tensors took which way, where a method has one for matrices and one for others."""
        by_method: dict[str, list[Step]] = {}
        for step in steps:
            assert step.method is not None
            by_method.setdefault(step.method.name, []).append(step)
        for name, own in by_method.items():
            whole = [step for step in own if step.whole_bytes]
            if not whole and not any(step.method and step.method.matrices for step in own):
                continue
            other = [step for step in own if not step.whole_bytes]
            need = max((step.whole_bytes for step in whole), default=0)
            told = f"{name} takes {_sized_up(whole)} as matrices"
            told += f", in up to {sized(need)} of memory" if whole else ""
            told += f", and {_sized_up(other)} otherwise" if other else ""
            self.matrices.append(Notice("matrices", told, tuple(s.name for s in other), "note"))

    def _is_spectral(self, name: str) -> bool:
        """Whether a tensor is a singular vector that spectral normalisation keeps.

        `weight_v` beside `weight_g` is a direction of weight normalisation, a weight like any.
        """
        home, dot, last = name.rpartition(".")
        if last == "weight_v" and f"{home}{dot}weight_g" in self.models[0].tensors:
            return False
        return name.endswith(_SPECTRAL) or _SINGULAR.fullmatch(last) is not None

    def _collected(self) -> tuple[Notice, ...]:
        notices = [
            Notice(
                kind, f"{are_counted(len(names), 'tensor')} {what}: {listed(names)}",
                tuple(names), level,
            )
            for (kind, what, level), names in self.notices.items()
        ]  # fmt: skip
        unmatched = [Notice("parameters", said, ()) for said in self.preparation.unmatched]
        unmatched += self._of_tokens()
        taken = [Notice("taken", note, (), "note") for m in self.every for note in m.notes]
        return (*taken, *unmatched, *notices, *self.matrices)

    def _of_tokens(self) -> list[Notice]:
        """What was gathered anew, and what models lacked of it."""
        if self.tokens is None:
            return []
        names = list(dict.fromkeys(name for _, name in self.layout.gathered))
        told = (
            f"{are_counted(len(names), 'tensor')} put in the order of the output's "
            f"{counted(self.tokens.numbers.after, 'token')}: {listed(names)}"
        )
        lacking = [
            f"{model_called(k)} lacks {count:,}" for k, count in self.tokens.filled.items() if count
        ]
        more = f" ({' and '.join(lacking)})" if lacking else ""
        return [Notice("tokens", told + more, tuple(names), "note")]


def _sized_up(steps: Sequence[Step]) -> str:
    """How many tensors there are, and parameters in them."""
    parameters = sum(step.elements for step in steps)
    return f"{counted(len(steps), 'tensor')} ({parameters:,} parameters)"


def _scaled(model: Checkpoint) -> dict[str, Scales]:
    """The codes of a model that have scales; what an adapter changes is computed as values."""
    changed = model.changes if isinstance(model, Adapted) else {}
    return {n: s for n, s in scaled_weights(model.tensors).items() if n not in changed}
