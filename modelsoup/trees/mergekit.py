"""mergekit's YAML → `Tree`: configurations of one merge, or of several that build on each other.

They are read as mergekit 0.1.5 reads them: which parameter holds for which tensor of which model,
where a base model stands, what a slice is. `docs/mergekit.md` says what differs. What mergekit
would pass over in silence, such as a key that it does not know, is an error here, with its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import ParameterError, PlanError, SoupError, listed, nearest, said, speaking
from ..files.hub import cache_folder, cached_model
from ..files.reading import read_small
from ..files.yaml_text import MAX_BYTES, YamlText, read_documents
from ..merging.layout import Span, slice_text
from ..merging.methods import Parameter, check_value, get_method, registered_methods
from ..merging.recipe import UNION, Recipe
from ..merging.renames import model_word
from ..merging.rules import BASE, Rule
from ..merging.values import Gradient, ParameterValue, Scalar, Single, Varying, parse_value
from .operations import ROOT, Builder, Load, Merge, Tree

_KEYS = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "name",
)  # fmt: skip
_SHAPES = ("models", "slices", "modules")
_UNUSED = ("int8_mask",)  # changes no result
_WHOLE = "default"  # mergekit's name for the module of models that have one only
_BUILT_IN = ("alpaca", "chatml", "exaone", "llama3", "mistral")  # templates that mergekit brings

_Way = tuple[str | int, ...]
_Settings = tuple[_Way, Mapping[str, Any]]
"""Where parameters are written, and what they are."""


def is_mergekit(content: object) -> bool:
    """Whether a YAML document is a configuration of mergekit's."""
    return isinstance(content, Mapping) and "merge_method" in content


def speaks_mergekit(path: Path) -> bool:
    """Whether a file is a configuration of mergekit's, and no other YAML."""
    try:
        if b"merge_method" not in read_small(path, MAX_BYTES):
            return False  # which is quicker than reading it
    except OSError:
        return False  # whoever reads it says so
    return any(is_mergekit(text.content) for text in read_documents(path))


@dataclass(frozen=True)
class Folded:
    """A model with an adapter: `MODEL+ADAPTER`."""

    model: Path
    adapter: Path

    def __str__(self) -> str:
        return f"{self.model}+{self.adapter}"


Model = Path | str | Folded
"""A path, the name of another merge of the configuration, or a model with an adapter."""


@dataclass(frozen=True)
class MergekitMerge:
    """One merge of a configuration.

    Attributes:
        models: what is merged.
        recipe: what is done with them.
        base: the base model.
    """

    models: tuple[Model, ...]
    recipe: Recipe
    base: Path | None = None


def read_mergekit(path: Path) -> tuple[Tree, list[str]] | None:
    """The tree of a mergekit configuration, and warnings; None where a file is another YAML.

    Raises:
        PlanError: it is one that cannot be carried out: a line for each fault, with its place.
    """
    if not speaks_mergekit(path):
        return None
    documents = read_documents(path)
    merges, warnings = merges_of(documents, path.parent)
    tree = _tree(merges, documents[0].name)
    return Tree(tree.graph, tree.root, tree.seed, path), warnings


def merges_of(
    documents: Sequence[YamlText], folder: Path
) -> tuple[dict[str, MergekitMerge], list[str]]:
    """The merges of a configuration by their names; the one without has none.

    Args:
        documents: of the file.
        folder: the file's, to which paths are relative where they lead somewhere from there.

    Raises:
        PlanError: see `read_mergekit`.
    """
    names = [
        str(text.content["name"])
        for text in documents
        if isinstance(text.content, Mapping) and text.content.get("name") is not None
    ]
    merges: dict[str, MergekitMerge] = {}
    warnings: dict[str, None] = {}
    for text in documents:
        reader = _Reader(text, folder, names)
        name = reader.name
        if name in merges:
            also = f"two merges are called {name!r}" if name else "two merges have no name"
            raise PlanError(f"{text.at('name')}: {also}: each but the last needs one of its own")
        merges[name] = reader.merge()
        warnings |= dict.fromkeys(reader.warnings)
    return merges, list(warnings)


def _tree(merges: Mapping[str, MergekitMerge], file: str) -> Tree:
    """The merges as one tree; the last is the one that has no name, or that no other one takes."""
    used = {model for merge in merges.values() for model in merge.models if isinstance(model, str)}
    roots = [name for name in merges if name not in used]
    if "" in merges:
        roots = [""]
    if len(roots) != 1:
        told = f"{listed(roots)}" if roots else "each is made of another"
        raise PlanError(
            f"{file}: it does not say which merge is the last ({told}): that one has no name"
        )
    builder = Builder()
    within: list[str] = []

    def add(name: str, as_name: str) -> str:
        if name in within:
            way = " → ".join([*within[within.index(name) :], name])
            raise PlanError(f"{file}: the merge {name!r} is made of itself: {way}")
        within.append(name)
        merge = merges[name]
        inputs = []
        for model in merge.models:
            if isinstance(model, str):
                inputs.append(add(model, builder.free_name(model)))
            elif isinstance(model, Folded):
                free = builder.free_name(f"{model.model.stem}+{model.adapter.stem}")
                folded = [(model.adapter, 1.0)]
                inputs.append(builder.folded(free, Load(model.model), folded))
            else:
                inputs.append(builder.add(builder.free_name(model.stem or "model"), Load(model)))
        within.pop()
        return builder.add(as_name, Merge(merge.recipe, merge.base), inputs)

    root = add(roots[0], builder.free_name(roots[0] or ROOT))
    unused = [name for name in merges if name and name not in used and name != roots[0]]
    if unused:
        raise PlanError(f"{file}: the merge {unused[0]!r} goes into no other, and is not the last")
    return builder.tree(root)


@dataclass(frozen=True)
class _Source:
    """A model as an input, or its layers as part of a slice."""

    model: Model
    settings: list[_Settings]
    way: _Way
    span: tuple[int, int] | None = None
    is_base: bool = False  # over which the others are merged


@dataclass(frozen=True)
class _Group:
    """Sources that are merged with each other: all models, or those of a slice or a module."""

    sources: list[_Source]
    settings: list[_Settings]  # what holds for all of them, the nearest first
    way: _Way
    module: str = ""
    fills: int = 0  # places of the merge that have no source here


class _Reader:
    """Reads one document."""

    def __init__(self, text: YamlText, folder: Path, stages: Sequence[str]) -> None:
        self.text = text
        self.folder = folder
        self.stages = stages
        self.warnings: list[str] = []
        content = self.text.content
        if not isinstance(content, Mapping):
            raise PlanError(f"{text.at()}: a configuration of mergekit is a mapping")
        self.content: Mapping[str, Any] = content
        self._known((), content, _KEYS)
        self.name = "" if content.get("name") is None else str(content["name"])

    def merge(self) -> MergekitMerge:
        content = self.content
        if not is_mergekit(content):
            raise PlanError(f"{self.text.at()}: there is no 'merge_method'")
        try:
            self.method = get_method(content["merge_method"])
        except SoupError as error:
            raise self._refuse(("merge_method",), str(error)) from None
        given = [key for key in _SHAPES if content.get(key)]
        if len(given) != 1:
            raise PlanError(
                f"{self.text.at(*given[1:2])}: one of models, slices and modules must be given"
                f"{f', not {listed(given)}' if given else ''}"
            )
        base = content.get("base_model")
        self.base = None if base is None else self._model(("base_model",), base)
        groups = self._groups()
        self.has_base = self.base is not None and self.method.base is not False
        if self.method.base is True and self.base is None:
            raise self._refuse(("merge_method",), f"{self.method.name!r} needs a base_model")
        if self.has_base and not isinstance(self.base, Path):
            what = "another merge of this file" if isinstance(self.base, str) else "an adapter's"
            raise self._refuse(
                ("base_model",), f"the base of task vectors cannot be {what}: make that one first"
            )
        fields = self._laid_out(groups)
        models = fields.pop("models")
        recipe = self._recipe(
            {"method": self.method.name, **fields, **self._files(models), **self._dtype()}
        )
        base_path = self.base if self.has_base and isinstance(self.base, Path) else None
        return MergekitMerge(tuple(models), recipe, base_path)

    def _recipe(self, fields: Mapping[str, Any]) -> Recipe:
        try:
            with speaking("plan"):
                return Recipe(**fields)
        except SoupError as error:
            raise PlanError(*(f"{self.text.at()}: {line}" for line in error.args)) from None

    def _refuse(self, way: _Way, reason: str) -> PlanError:
        return PlanError(f"{self.text.at(*way)}: {reason}")

    def _known(self, way: _Way, content: Mapping[str, Any], keys: Sequence[str]) -> None:
        for key in content:
            if key not in keys:
                raise self._refuse(
                    (*way, key), f"unknown key {key!r}{nearest(key, keys)} (expected "
                    f"{', '.join(keys)})"
                )  # fmt: skip

    # What is merged

    def _groups(self) -> list[_Group]:
        content = self.content
        whole = self._settings((), content)
        if content.get("models"):
            return [self._of_models((), content, whole)]
        if content.get("slices"):
            return self._of_slices((), content, whole)
        modules = content["modules"]
        if not isinstance(modules, Mapping):
            raise self._refuse(("modules",), f"modules is {said(modules)}, not a mapping")
        found: list[_Group] = []
        for name, module in modules.items():
            way: _Way = ("modules", name)
            if not isinstance(module, Mapping):
                raise self._refuse(way, f"the module {name!r} is {said(module)}, not a mapping")
            self._known(way, module, ("slices", "models", "parameters"))
            if bool(module.get("slices")) == bool(module.get("models")):
                raise self._refuse(way, f"the module {name!r} must have either slices or models")
            settings = [*self._settings(way, module), *whole]
            if module.get("models"):
                own = [self._of_models(way, module, settings)]
            else:
                own = self._of_slices(way, module, settings)
            called = "" if name == _WHOLE and len(modules) == 1 else name
            found += [replace(group, module=called) for group in own]
        return found

    def _of_models(
        self, way: _Way, content: Mapping[str, Any], settings: list[_Settings]
    ) -> _Group:  # fmt: skip
        sources = []
        for where, entry in self._entries((*way, "models"), content["models"]):
            self._known(where, entry, ("model", "parameters"))
            model = self._model((*where, "model"), entry.get("model"))
            sources.append(_Source(model, self._settings(where, entry), where))
        if self.base is not None and all(source.model != self.base for source in sources):
            sources.append(_Source(self.base, [], ("base_model",)))
        return _Group(sources, settings, (*way, "models"))

    def _of_slices(
        self, way: _Way, content: Mapping[str, Any], settings: list[_Settings]
    ) -> list[_Group]:  # fmt: skip
        groups = []
        for where, entry in self._entries((*way, "slices"), content["slices"]):
            self._known(where, entry, ("sources", "base_model", "residual_weight", "parameters"))
            if entry.get("residual_weight") is not None:
                raise self._refuse((*where, "residual_weight"), "residual_weight is not supported")
            if entry.get("base_model") is not None:
                own_base = self._model((*where, "base_model"), entry["base_model"])
                if own_base != self.base:
                    raise self._refuse(
                        (*where, "base_model"), "a base_model of a slice, other than that of the "
                        "whole, is not supported"
                    )  # fmt: skip
            sources = []
            for at, source in self._entries((*where, "sources"), entry.get("sources")):
                self._known(at, source, ("model", "layer_range", "parameters"))
                model = self._model((*at, "model"), source.get("model"))
                settings_of = self._settings(at, source)
                sources.append(_Source(model, settings_of, at, self._range(at, source)))
            lengths = [source.span[1] - source.span[0] for source in sources if source.span]
            if len(set(lengths)) > 1:
                raise self._refuse(
                    (*where, "sources"), f"the ranges have {listed(list(map(str, lengths)))} "
                    f"layers: those of a slice must be as long as each other"
                )  # fmt: skip
            groups.append(_Group(sources, [*self._settings(where, entry), *settings], where))
        return groups

    def _range(self, way: _Way, source: Mapping[str, Any]) -> tuple[int, int]:
        where, given = (*way, "layer_range"), source.get("layer_range")
        match given:
            case [int(start), int(stop)] if type(start) is type(stop) is int and 0 <= start < stop:
                return start, stop
            case [int(), int()]:
                why = "is empty: it goes from the first number up to the second, without it"
            case _:
                why = "is not [START, STOP]"
        raise self._refuse(where, f"layer_range {said(given)} {why}")

    def _entries(self, way: _Way, content: Any) -> Iterator[tuple[_Way, Mapping[str, Any]]]:
        if not isinstance(content, list) or not content:
            raise self._refuse(way, f"{way[-1]} is {said(content)}, not a list of mappings")
        for number, entry in enumerate(content):
            if not isinstance(entry, Mapping):
                raise self._refuse((*way, number), f"{said(entry)} is not a mapping")
            yield (*way, number), entry

    def _model(self, way: _Way, value: Any) -> Model:
        if not isinstance(value, str) or not value:
            raise self._refuse(way, f"a model is {said(value)}, not a path or a name of the Hub")
        if value in self.stages:
            return value
        model, _, adapter = value.partition("+")
        if model and adapter and not (self.folder / value).exists():
            return Folded(self._place(way, model), self._place(way, adapter))
        return self._place(way, value)

    def _place(self, way: _Way, value: str) -> Path:
        """Where a model or an adapter is."""
        for place in (self.folder / Path(value).expanduser(), Path(value).expanduser()):
            if place.exists():
                return place
        name, _, revision = value.partition("@")
        found = cached_model(name, revision or None)
        if found is None:
            near = nearest(value, self.stages)
            raise self._refuse(
                way, f"there is no model {value!r}{near}: neither from {self.folder} nor from the "
                f"current folder, nor in the cache of Hugging Face ({cache_folder()})"
            )  # fmt: skip
        return found

    # Where it goes

    def _laid_out(self, given: list[_Group]) -> dict[str, Any]:
        """The models, the slices, and the parameters of a recipe."""
        groups = [self._with_base_in_place(group) for group in given]
        models = list(dict.fromkeys(s.model for g in groups for s in g.sources if not s.is_base))
        if not models:
            raise self._refuse(groups[0].way, "there is no model besides the base")
        is_sliced = any(source.span for group in groups for source in group.sources)
        if is_sliced and not all(source.span for group in groups for source in group.sources):
            raise self._refuse(
                groups[0].way, "slices in some modules, and whole models in others, are not "
                "supported: give all layers as one slice"
            )  # fmt: skip
        if not is_sliced:
            return {"models": models, **self._of_modules(groups, models)}
        groups = self._filled(groups)
        slices = []
        for group in groups:
            spans = [self._span(source, models, group.module) for source in group.sources]
            slices.append(slice_text(tuple(spans)))
        every = [self._parameters(group) for group in groups]
        fields: dict[str, Any] = {"models": models, "slices": slices}
        if all(parameters == every[0] for parameters in every):
            return {**fields, "parameters": every[0]}
        rules = [
            Rule(f"slice:{number}", parameters=parameters)
            for number, parameters in enumerate(every, 1)
        ]
        return {**fields, "layers": rules}

    def _of_modules(self, groups: list[_Group], models: list[Model]) -> dict[str, Any]:
        for group in groups:
            own = [source.model for source in group.sources if not source.is_base]
            twice = [model for model in own if own.count(model) > 1]
            if twice:
                raise self._refuse(group.way, f"the model {str(twice[0])!r} is there twice")
            if set(own) != set(models):
                raise self._refuse(group.way, "modules that are made of different models are not "
                                              "supported")  # fmt: skip
        groups = [
            replace(
                group,
                sources=sorted(
                    (source for source in group.sources if not source.is_base),
                    key=lambda source: models.index(source.model),
                ),
            )
            for group in groups
        ]
        if len(groups) == 1 and not groups[0].module:
            return {"parameters": self._parameters(groups[0])}
        named = {g.module: [f"{g.module}.*", f"model.{g.module}.*"] for g in groups}
        rules = [Rule(f"group:{g.module}", parameters=self._parameters(g)) for g in groups]
        return {"groups": named, "layers": rules, "rest": "error"}

    def _with_base_in_place(self, group: _Group) -> _Group:
        """The base as what task vectors are over, or as the first of two models."""
        if self.base is None:
            return group
        own = [source for source in group.sources if source.model == self.base]
        others = [source for source in group.sources if source.model != self.base]
        if self.has_base:
            of_base = [replace(source, is_base=True) for source in own[:1]]
            return replace(group, sources=[*others, *of_base])
        return replace(group, sources=[*own, *others]) if self.method.models == (2, 2) else group

    def _span(self, source: _Source, models: Sequence[Model], module: str) -> Span:
        assert source.span is not None
        index = BASE if source.is_base else models.index(source.model)
        return Span(index, *source.span, module)

    def _filled(self, groups: Sequence[_Group]) -> list[_Group]:
        """Slices of fewer models with sources of weight 0, so that all are of as many."""
        counts = [sum(not source.is_base for source in group.sources) for group in groups]
        own = self.method.parameters.get("weight")
        filled = []
        for group, count in zip(groups, counts, strict=True):
            missing = max(counts) - count
            if missing and (own is None or own.kind != "numbers" or not count):
                raise self._refuse(
                    group.way, f"slices of different numbers of models are not supported for "
                    f"{self.method.name!r}: this one is of {count}, another of {max(counts)}"
                )  # fmt: skip
            models = [source for source in group.sources if not source.is_base]
            of_base = [source for source in group.sources if source.is_base]
            sources = [*models, *models[-1:] * missing, *of_base]
            filled.append(replace(group, sources=sources, fills=missing))
        return filled

    # Parameters

    def _settings(self, way: _Way, content: Mapping[str, Any]) -> list[_Settings]:
        settings = content.get("parameters")
        if settings is None:
            return []
        where = (*way, "parameters")
        if not isinstance(settings, Mapping):
            raise self._refuse(where, f"parameters is {said(settings)}, not a mapping")
        others = dict.fromkeys(n for m in registered_methods() for n in m.parameters)
        for name in settings:
            if name in self.method.parameters or name in _UNUSED:
                continue
            if name not in others:
                known = [*self.method.parameters, *others]
                raise self._refuse((*where, name), f"unknown parameter {name!r}"
                                                   f"{nearest(name, known)}")  # fmt: skip
            self.warnings.append(
                f"{self.text.at(*where, name)}: {self.method.name} has no parameter {name!r}; it "
                f"is passed over"
            )
        return [(where, settings)]

    def _parameters(self, group: _Group) -> dict[str, ParameterValue]:
        """What a group's merge is given, of the nearest place that says something of a tensor."""
        found: dict[str, ParameterValue] = {}
        sources = [source for source in group.sources if not source.is_base]
        for name, own in self.method.parameters.items():
            if own.kind != "numbers":
                is_one = self.method.models == (1, 1)
                of_models = [pair for source in sources for pair in source.settings]
                for where, settings in () if is_one else of_models:
                    if name in settings:
                        raise self._refuse(
                            (*where, name), f"{name!r} is the same for all models, and cannot be "
                            f"one model's parameter"
                        )  # fmt: skip
                settings_of = [*(of_models if is_one else ()), *group.settings]
                value = self._value(own, settings_of)
                if value is not None:
                    found[name] = value
                continue
            values: list[Single | None] = []
            for number, source in enumerate(sources):
                if group.fills and len(sources) - group.fills <= number and name == "weight":
                    values.append(0.0)
                    continue
                settings_of = [*source.settings, *group.settings]
                values.append(self._value(own, settings_of))
            if all(value is None for value in values):
                continue
            if None in values:
                if own.is_required or name == "weight":
                    source = sources[values.index(None)]
                    raise self._refuse(source.way, f"there is no {name!r} for this model")
                values = [own.default if value is None else value for value in values]
            single = [value for value in values if value is not None]
            found[name] = single[0] if len(set(single)) == 1 else tuple(single)
        return found

    def _value(self, own: Parameter, settings: Sequence[_Settings]) -> Single | None:
        """A parameter's value by the names of tensors; None where nothing is said."""
        parts: dict[str, Scalar | Gradient] = {}
        for where, scope in settings:
            if own.name not in scope:
                continue
            for pattern, value in self._parts((*where, own.name), own, scope[own.name]):
                if not any(fnmatchcase(pattern, known) for known in parts):
                    parts.setdefault(pattern, value)
            if "*" in parts:
                break
        if not parts:
            return None
        default = None if own.is_required else own.default
        if "*" not in parts and isinstance(default, bool | int | float | str):
            parts["*"] = float(default) if type(default) is int else default
        return parts["*"] if list(parts) == ["*"] else Varying(tuple(parts.items()))

    def _parts(
        self, way: _Way, own: Parameter, value: Any
    ) -> Iterator[tuple[str, Scalar | Gradient]]:
        """What a parameter is set to, by patterns of names."""
        if isinstance(value, Mapping):
            yield self._conditional(way, own, value)
        elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            for number, one in enumerate(value):
                if not isinstance(one, Mapping):
                    raise self._refuse((*way, number), f"{said(one)} is not a mapping with value")
                yield self._conditional((*way, number), own, one)
        elif value is None or value == []:
            return
        else:
            yield "*", self._plain(way, own, value)

    def _conditional(
        self, way: _Way, own: Parameter, content: Mapping[str, Any]
    ) -> tuple[str, Scalar | Gradient]:
        self._known(way, content, ("filter", "value"))
        if "value" not in content:
            raise self._refuse(way, "there is no 'value'")
        text = content.get("filter")
        if text is not None and not isinstance(text, str):
            raise self._refuse((*way, "filter"), f"filter is {said(text)}, not a text")
        pattern = "*"
        if text not in (None, "*", ""):
            pattern = f"*{''.join(f'[{c}]' if c in '[*?' else c for c in text)}*"
        return pattern, self._plain((*way, "value"), own, content["value"])

    def _plain(self, way: _Way, own: Parameter, value: Any) -> Scalar | Gradient:
        is_list = isinstance(value, list) and len(value) != 1
        one = value[0] if isinstance(value, list) and len(value) == 1 else value
        try:
            parsed = parse_value(own.name, {"gradient": value} if is_list else one)
            if isinstance(parsed, tuple | Varying):
                raise ParameterError(f"{said(value)} is no value of a parameter")
            for number in parsed.values if isinstance(parsed, Gradient) else (parsed,):
                check_value(self.method, own, number)
        except SoupError as error:
            raise self._refuse(way, str(error)) from None
        return parsed

    # What goes along

    def _dtype(self) -> dict[str, Any]:
        for key in ("out_dtype", "dtype"):
            value = self.content.get(key)
            if value is not None and not isinstance(value, str):
                raise self._refuse((key,), f"{key} is {said(value)}, not the name of a dtype")
        wanted = self.content.get("out_dtype") or self.content.get("dtype")
        return {} if wanted is None else {"dtype": str(wanted).removeprefix("torch.")}

    def _files(self, models: Sequence[Model]) -> dict[str, Any]:
        """Which model's config, tokenizer and chat template go along."""
        fields: dict[str, Any] = {}
        if self.base is not None and (self.has_base or self.base in models):
            fields["files_from"] = self._word(self.base, models)
        source = self.content.get("tokenizer_source")
        way: _Way = ("tokenizer_source",)
        tokenizer = self.content.get("tokenizer")
        if tokenizer is not None:
            if source is not None:
                raise self._refuse(("tokenizer",), "tokenizer and tokenizer_source exclude each "
                                                   "other")  # fmt: skip
            if not isinstance(tokenizer, Mapping):
                raise self._refuse(("tokenizer",), f"tokenizer is {said(tokenizer)}, not a mapping")
            for key in tokenizer:
                if key != "source":
                    raise self._refuse(("tokenizer", key), f"{key} of a tokenizer is not supported")
            source, way = tokenizer.get("source", "union"), ("tokenizer", "source")
        if source == UNION:
            fields["tokenizer_from"] = UNION
        elif source is not None:
            model = (self.base or models[0]) if source == "base" else self._model(way, source)
            if model not in models and not (self.has_base and model == self.base):
                raise self._refuse(way, f"{source!r} is none of the models that are merged")
            fields["tokenizer_from"] = self._word(model, models)
        template = self.content.get("chat_template")
        if template is not None:
            if not isinstance(template, str) or "{" not in template:
                known = template == "auto" or template in _BUILT_IN
                why = "is one that mergekit brings along" if known else "is no template"
                raise self._refuse(
                    ("chat_template",), f"chat_template {said(template)} {why}: give its text"
                )
            fields["chat_template"] = template
        return fields

    def _word(self, model: Model, models: Sequence[Model]) -> str:
        is_base = model == self.base and self.has_base
        return model_word(BASE if is_base else models.index(model))
