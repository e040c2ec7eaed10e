"""`tree.yaml` → `Tree`: the shorthands of a plan's file, spelt out; every fault with its place.

    soup: 1
    models:
      slow: runs/slow.safetensors
      fast: {train: {trainer: digits, rate: 0.4}, start: runs/start.safetensors}
    defaults:
      merge: {beta: 0.5}
      finetune: {trainer: digits, rate: 0.1}
    tree: {pair: [slow, fast]}

`docs/plans.md` describes the whole of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from .checkpoint import StrPath
from .errors import PlanError, SoupError, nearest
from .recipe import recipe_from_mapping
from .trainer import COMMAND, build_options, get_trainer, trainer_groups
from .tree import (
    MAX_NODES,
    ROOT,
    Builder,
    FineTune,
    Load,
    Merge,
    Train,
    Training,
    Tree,
    pair_levels,
)
from .yaml_text import YamlText, parse_yaml, read_yaml

_ANY_METHOD = (
    "layers", "rest", "groups", "low_level", "subnetwork", "base", "dtype", "seed", "on_integer",
)  # fmt: skip
_MAX_DEPTH = 100
_RESERVED = ("trainer", "resources", "seed")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class _FileLeaf(_Strict):
    """A checkpoint that exists."""

    path: str = Field(description="A safetensors file or a model folder, relative to the plan.")
    xxh3_128: str | None = Field(
        None, pattern="^[0-9a-f]{32}$", description="The digest that its content must have."
    )


class _TrainLeaf(_Strict):
    """A checkpoint that a trainer makes."""

    train: dict[str, Any] = Field(description="`trainer` (or `command`) and its options.")
    start: str | None = Field(None, description="The checkpoint to begin with.")


class _Node(_Strict):
    name: str | None = Field(None, description="What the node is called in reports.")
    merge: dict[str, Any] | None = Field(
        None, description="Over `defaults.merge`: method, beta, weights, layers, base, …"
    )
    finetune: dict[str, Any] | Literal[False] | None = Field(
        None, description="Over `defaults.finetune`; false leaves the merged model as it is."
    )


class _OfNode(_Node):
    """Several models, merged."""

    of: list[_Item] = Field(min_length=1, description="Names of models, or nodes.")


class _PairNode(_Node):
    """Models that are paired level by level until one is left."""

    pair: list[_Item] = Field(min_length=2, description="Names of models, or nodes.")
    shuffle: int | Literal[False] = Field(False, description="Seeds the pairing at each level.")
    odd: str = Field(
        "random", description="Which of an odd count goes up alone: random, last, or a name."
    )


def _kind(value: object) -> str | None:
    """Which kind of node or leaf a value is, as pydantic's tag: no key of a plan looks so."""
    if isinstance(value, str):
        return "<name>"
    keys = value if isinstance(value, Mapping) else getattr(value, "model_fields_set", ())
    return next((f"<{kind}>" for kind in ("of", "pair", "train", "path") if kind in keys), None)


_Name = Annotated[str, Tag("<name>")]
_Of = Annotated[_OfNode, Tag("<of>")]
_Pair = Annotated[_PairNode, Tag("<pair>")]
_Item = Annotated[
    _Name | _Of | _Pair,
    Discriminator(
        _kind,
        custom_error_type="shape",
        custom_error_message="expected a model's name, or a node with `of` or `pair`",
    ),
]
_Model = Annotated[
    _Name
    | Annotated[_FileLeaf, Tag("<path>")]
    | Annotated[_TrainLeaf, Tag("<train>")]
    | _Of
    | _Pair,
    Discriminator(
        _kind,
        custom_error_type="shape",
        custom_error_message="expected a path, or a mapping with `path`, `train`, `of` or `pair`",
    ),
]


class _Defaults(_Strict):
    """What holds for every node that does not say otherwise."""

    merge: dict[str, Any] = Field(default_factory=dict)
    finetune: dict[str, Any] | None = None
    train: dict[str, Any] = Field(default_factory=dict)


class PlanFile(_Strict):
    """A tree of merges and fine-tunings (modelsoup, schema version 1)."""

    soup: Literal[1] = Field(description="The version of this schema.")
    seed: int = Field(0, description="What the trainers' seeds are derived from.")
    models: dict[str, _Model] = Field(min_length=1, description="Leaves, and named subtrees.")
    groups: dict[str, list[str]] = Field(
        default_factory=dict, description="Layer groups: name → patterns."
    )
    defaults: _Defaults = Field(default_factory=_Defaults)
    tree: _Item = Field(description="The root: `of` or `pair`, or one model's name.")


for _model in (_OfNode, _PairNode, PlanFile):
    _model.model_rebuild()


def json_schema() -> dict[str, Any]:
    """The JSON Schema of `tree.yaml`, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **PlanFile.model_json_schema(),
        "title": "modelsoup plan",
    }


def read_tree(path: StrPath) -> tuple[Tree, list[str]]:
    """A tree from a file, and warnings; paths in it are relative to the file.

    Raises:
        PlanError: with one line for each fault, each with file, line and column.
    """
    file = Path(path)
    return _Expander(read_yaml(file), file.parent).expand()


def parse_tree(
    text: str, *, folder: StrPath = ".", name: str = "the plan"
) -> tuple[Tree, list[str]]:
    """A tree from a text, and warnings; paths in it are relative to `folder`.

    Raises:
        PlanError: see `read_tree`.
    """
    return _Expander(parse_yaml(text, name), Path(folder)).expand()


class _TooLargeError(PlanError):
    """What names stand for swells without end."""


class _Expander:
    """Spells a plan's file out into operations."""

    def __init__(self, text: YamlText, folder: Path) -> None:
        self.text = text
        self.folder = folder
        self.file = self._validated()
        self.builder = Builder(self.file.seed)
        self.used: set[str] = set()
        self.within: list[str] = []
        self.named: dict[str, tuple[str | int, ...]] = {}  # a node's own name → where it is written
        self.faults: dict[str, None] = {}  # in order, each once
        self.items = 0

    def _validated(self) -> PlanFile:
        if not isinstance(self.text.content, dict):
            raise PlanError(f"{self.text.name}: a plan is a mapping with soup, models and tree")
        try:
            return PlanFile.model_validate(self.text.content)
        except ValidationError as error:
            faults = [self._sentence(fault) for fault in error.errors()]
            raise PlanError(*dict.fromkeys(faults)) from None

    def _sentence(self, fault: Mapping[str, Any]) -> str:
        """One of pydantic's faults as a sentence with its place."""
        path = tuple(part for part in fault["loc"])
        content, real = self.text.content, []
        for part in path:  # without the tags of unions, which pydantic puts among the keys
            if (isinstance(content, dict) and part in content) or (
                isinstance(content, list) and isinstance(part, int) and part < len(content)
            ):
                content = content[part]
            elif part is not path[-1] or fault["type"] not in ("extra_forbidden", "missing"):
                continue
            real.append(part)
        where, name = self.text.at(*real), ".".join(map(str, real)) or "the plan"
        if fault["type"] == "extra_forbidden":
            kind = _kind(self._value(real[:-1])) if len(real) > 1 else None
            known: dict[str, type[_Strict]] = {
                "<of>": _OfNode, "<pair>": _PairNode, "<train>": _TrainLeaf, "<path>": _FileLeaf,
            }  # fmt: skip
            of = known.get(kind or "", _Defaults if real[:1] == ["defaults"] else PlanFile)
            names = list(of.model_fields)
            return (
                f"{where}: unknown key {real[-1]!r}{nearest(str(real[-1]), names)} "
                f"(expected {', '.join(names)})"
            )
        if fault["type"] == "missing":
            return f"{where}: {'.'.join(map(str, real[:-1])) or 'the plan'} has no {real[-1]!r}"
        if name == "soup":
            return f"{where}: soup is {fault['input']!r}, but this version reads schema 1"
        return f"{where}: {name} is {fault['input']!r}: {fault['msg']}"

    def _value(self, path: Sequence[str | int]) -> Any:
        content = self.text.content
        for part in path:
            content = content[part]
        return content

    def expand(self) -> tuple[Tree, list[str]]:
        tree = self.file.tree
        root = self._item(tree, ("tree",), ROOT)
        if self.faults or root is None:
            raise PlanError(*self.faults)
        unused = [name for name in self.file.models if name not in self.used]
        warnings = [
            f"{self.text.at('models', name)}: the model {name!r} is not used" for name in unused
        ]
        return self.builder.tree(root), warnings

    def _item(self, item: Any, path: tuple[str | int, ...], name: str) -> str | None:
        """Add a model or a node, and all that it is made of; None where something is wrong."""
        self.items += 1
        if self.items > MAX_NODES:
            raise _TooLargeError(f"the tree has more than {MAX_NODES:,} nodes")
        try:
            if isinstance(item, str):
                return self._named(item, path)
            return self._node(item, path, name)
        except _TooLargeError:
            raise
        except PlanError as error:
            self.faults[str(error)] = None
            return None

    def _node(
        self, item: _OfNode | _PairNode, path: tuple[str | int, ...], name: str
    ) -> str | None:
        if item.name:
            again = self.named.get(item.name) == path  # it is part of a model that is used again
            self.named.setdefault(item.name, path)
            name = self.builder.free_name(item.name) if again else item.name
        inside = item.of if isinstance(item, _OfNode) else item.pair
        key = "of" if isinstance(item, _OfNode) else "pair"
        merge: Merge | None = None
        finetune: FineTune | None = None
        try:  # and go on: what is inside may be wrong, too
            finetune = self._finetune(item, path)
        except PlanError as error:
            self.faults[str(error)] = None
        try:
            merge = self._merge(item, path)
        except PlanError as error:
            self.faults[str(error)] = None
        found = [
            self._item(inner, (*path, key, index), f"{name}.{index + 1}")
            for index, inner in enumerate(inside)
        ]
        names = [made for made in found if made is not None]
        if merge is None or len(names) < len(found):
            return None
        self.builder.place = self.text.at(*path)
        try:
            if isinstance(item, _OfNode):
                return self.builder.join(name, names, merge, finetune)
            models = {self.builder.model(name): name for name in reversed(names)}
            return pair_levels(
                self.builder, names, merge, finetune, odd=models.get(item.odd, item.odd), name=name,
                shuffle=None if item.shuffle is False else item.shuffle,
            )  # fmt: skip
        except PlanError as error:
            raise PlanError(f"{self.text.at(*path)}: {error}") from None

    def _named(self, name: str, path: tuple[str | int, ...]) -> str | None:
        where = self.text.at(*path)
        model = self.file.models.get(name)
        if model is None:
            known = list(self.file.models)
            raise PlanError(
                f"{where}: no model is called {name!r}"
                f"{nearest(name, known) or f' (there are {chr(44).join(known)})'}"
            )
        if name in self.within:
            way = " → ".join([*self.within[self.within.index(name) :], name])
            raise PlanError(f"{where}: the model {name!r} is made of itself: {way}")
        self.used.add(name)
        free = self.builder.free_name(name)
        at = ("models", name)
        self.builder.place = self.text.at(*at)
        if isinstance(model, str | _FileLeaf):
            file = model if isinstance(model, str) else model.path
            if not file:
                raise PlanError(f"{self.builder.place}: the path of {name!r} is empty")
            digest = None if isinstance(model, str) else model.xxh3_128
            return self.builder.add(free, Load(self.folder / file, digest))
        if isinstance(model, _TrainLeaf):
            given = _over(self.file.defaults.train, model.train)
            training = self._training(given, (*at, "train"))
            start = None if model.start is None else self.folder / model.start
            return self.builder.add(free, Train(training, start))
        if len(self.within) >= _MAX_DEPTH:
            raise PlanError(f"{where}: subtrees are nested more than {_MAX_DEPTH} deep")
        self.within.append(name)
        made = self._item(model, at, free)
        self.within.pop()
        return made

    def _merge(self, item: _Node, path: tuple[str | int, ...]) -> Merge:
        own = dict(item.merge or {})
        given = dict(self.file.defaults.merge)
        if "method" in own and own["method"] != given.get("method", "linear"):
            given = {k: v for k, v in given.items() if k in _ANY_METHOD}  # not its parameters
        for name, other in (("beta", "weights"), ("weights", "beta")):
            if name in own:
                given.pop(other, None)
        if "layers" in own:
            given.pop("rest", None)  # it belongs to the layers that are replaced
        given |= own
        base = given.pop("base", None)
        where = self.text.at(*path, "merge") if item.merge else self.text.at("defaults", "merge")
        layers = given.get("layers")
        if isinstance(layers, dict) and "rest" in layers:
            given["layers"] = {k: v for k, v in layers.items() if k != "rest"}
            if layers["rest"] == "merge":
                given["layers"].setdefault("*", "merge")
            else:
                given["rest"] = layers["rest"]
        if layers == "subnetwork" and "subnetwork" in given:
            given["layers"] = {"subnetwork": given.pop("subnetwork")}
        own_groups = given.get("groups", {})
        if not isinstance(own_groups, dict):
            raise PlanError(f"{where}: groups is {own_groups!r}, not a mapping from names")
        own_groups = {
            name: [patterns] if isinstance(patterns, str) else patterns
            for name, patterns in own_groups.items()
        }
        for name, patterns in own_groups.items():
            if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
                raise PlanError(f"{where}: the group {name!r} is no list of patterns: {patterns!r}")
        groups = {**self.file.groups, **own_groups}
        if _names_groups(given.get("layers")):
            groups = {**self._trainer_groups(item), **groups}
        if groups and _names_groups(given.get("layers")):
            given["groups"] = {name: list(patterns) for name, patterns in groups.items()}
        try:
            recipe = recipe_from_mapping(given, "merge")
        except SoupError as error:
            raise PlanError(f"{where}: {error}") from None
        if base is not None and not isinstance(base, str):
            raise PlanError(f"{where}: base is {base!r}, not a path")
        return Merge(recipe, None if base is None else self.folder / base)

    def _finetune_options(self, item: _Node) -> dict[str, Any] | None:
        defaults = self.file.defaults.finetune
        if item.finetune is False or (item.finetune is None and defaults is None):
            return None
        return _over(defaults or {}, item.finetune or {})

    def _finetune(self, item: _Node, path: tuple[str | int, ...]) -> FineTune | None:
        given = self._finetune_options(item)
        if given is None:
            return None
        at = (*path, "finetune") if item.finetune else ("defaults", "finetune")
        return FineTune(self._training(given, at))

    def _training(self, given: Mapping[str, Any], path: tuple[str | int, ...]) -> Training:
        where = self.text.at(*path)
        resources = given.get("resources", {})
        if not isinstance(resources, dict) or not all(
            isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < math.inf
            for v in resources.values()
        ):
            raise PlanError(
                f"{where}: resources is {resources!r}, not a mapping to numbers from 0 on"
            )
        seed = given.get("seed")
        if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**63):
            raise PlanError(f"{where}: seed is {seed!r}, not an integer from 0 to 2^63 - 1")
        options = {k: v for k, v in given.items() if k not in _RESERVED}
        name = given.get("trainer", COMMAND if "command" in given else None)
        if not isinstance(name, str):
            raise PlanError(f"{where}: there is no 'trainer' and no 'command'")
        if name == COMMAND:
            folder = options.get("folder", ".")
            if not isinstance(folder, str) or not (self.folder / folder).is_dir():
                raise PlanError(f"{where}: the command's folder {folder!r} is no folder")
            # Absolute: a worker may be elsewhere.
            options["folder"] = str((self.folder / folder).absolute())
        training = Training(name, options, resources, seed, self.folder.absolute())
        try:
            build_options(get_trainer(name), options, training.folder)
        except SoupError as error:
            raise PlanError(f"{where}: {error}") from None
        return training

    def _trainer_groups(self, item: _Node) -> dict[str, Sequence[str]]:
        given = self._finetune_options(item) or self.file.defaults.finetune
        if given is None or not isinstance(given.get("trainer"), str):
            return {}
        try:
            trainer = get_trainer(given["trainer"])
            options = {k: v for k, v in given.items() if k not in _RESERVED}
            built = build_options(trainer, options, self.folder.absolute())
        except SoupError:
            return {}  # `_training` says it, with its place
        return trainer_groups(trainer, built)


def _over(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A node's training over the defaults, which do not hold for another trainer."""

    def name(given: Mapping[str, Any]) -> object:
        return given.get("trainer", COMMAND if "command" in given else None)

    if name(own) is not None and name(own) != name(defaults):
        return dict(own)
    return {**defaults, **own}


def _names_groups(layers: object) -> bool:
    """Whether rules may ask for a group: `group:…`, or `low-level` and `frozen`."""
    return any(word in repr(layers) for word in ("group:", "low-level", "frozen"))
