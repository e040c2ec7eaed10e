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
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictInt,
    Tag,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from ..errors import PlanError, SoupError, counted, listed, nearest, said, speaking
from ..files.checkpoint import StrPath
from ..files.yaml_text import YamlText, parse_yaml, read_yaml
from ..merging.methods import get_method
from ..merging.recipe import Recipe, plain_keys, recipe_from_mapping
from ..merging.rules import BASE
from .operations import (
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
from .trainer import (
    COMMAND,
    Trainer,
    build_options,
    expected,
    get_trainer,
    place_of,
    trainer_estimates,
    trainer_groups,
)

_SHARES = ("beta", "weights")  # of several models
_OF_THE_METHOD = {"method", "parameters", *_SHARES}
_ANY_METHOD = {f.name for f in fields(Recipe)} - _OF_THE_METHOD | {"subnetwork", "base", "lora"}
RESERVED = ("trainer", "resources", "seed")
"""What stands beside a trainer's own options."""

_MAX_DEPTH = 1000
_MAX_FAULTS = 100
_MAX_GIVEN = 500_000  # values of merges and trainings, defaults counted for each node
_TEXT = 64  # so many characters count as a value
_WAY = 10  # models of a circle that are told
_TRIED = 50  # keys that are tried for being at fault


def _exactly(wanted: bool | int) -> BeforeValidator:
    """Python takes 0 and 0.0 for false, and true for 1; whoever writes a plan does not."""

    def check(value: object) -> object:
        if value == wanted and type(value) is not type(wanted):
            raise PydanticCustomError("literal_error", f"Input should be {wanted}")
        return value

    return BeforeValidator(check)


_False = Annotated[Literal[False], _exactly(False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class _FileLeaf(_Strict):
    """A checkpoint that exists."""

    path: str = Field(description="A safetensors file or a model folder, relative to the plan.")
    xxh3_128: str | None = Field(
        None, pattern="^[0-9a-f]{32}$", description="The digest that its content must have."
    )
    lora: Any = Field(
        None, description="Low-rank adapters that are folded in: paths, or path → weight."
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
    finetune: dict[str, Any] | _False | None = Field(
        None, description="Over `defaults.finetune`; false leaves the merged model as it is."
    )


class _OfNode(_Node):
    """Several models, merged."""

    of: list[_Item] = Field(min_length=1, description="Names of models, or nodes.")


class _PairNode(_Node):
    """Models that are paired level by level until one is left."""

    pair: list[_Item] = Field(min_length=2, description="Names of models, or nodes.")
    shuffle: StrictInt | _False = Field(False, description="Seeds the pairing at each level.")
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
        custom_error_message="a model's name, or a node with `of` or `pair`",
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
        custom_error_message="a path, or a mapping with `path`, `train`, `of` or `pair`",
    ),
]


class _Defaults(_Strict):
    """What holds for every node that does not say otherwise."""

    merge: dict[str, Any] = Field(default_factory=dict)
    finetune: dict[str, Any] | None = None
    train: dict[str, Any] = Field(default_factory=dict)


class PlanFile(_Strict):
    """A tree of merges and fine-tunings (modelsoup, schema version 1)."""

    soup: Annotated[Literal[1], _exactly(1)] = Field(description="The version of this schema.")
    seed: StrictInt = Field(0, description="What the trainers' seeds are derived from.")
    models: dict[str, _Model] = Field(min_length=1, description="Leaves, and named subtrees.")
    groups: dict[str, list[str]] = Field(
        default_factory=dict, max_length=1000, description="Layer groups: name → patterns."
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
    tree, warnings = _Expander(read_yaml(file), file.parent).expand()
    return replace(tree, file=file), warnings


def parse_tree(
    text: str, *, folder: StrPath = ".", name: str = "the plan"
) -> tuple[Tree, list[str]]:
    """A tree from a text, and warnings; paths in it are relative to `folder`.

    Raises:
        PlanError: see `read_tree`.
    """
    return _Expander(parse_yaml(text, name), Path(folder)).expand()


class _EndError(PlanError):
    """What ends the reading at once: a plan that swells without end, or too many faults."""


def _run(step: Generator[Any, Any, Any]) -> Any:
    """The end of a function that calls itself by `yield`, however deep that goes."""
    stack, value = [step], None
    while stack:
        try:
            stack.append(stack[-1].send(value))
            value = None
        except StopIteration as end:
            stack.pop()
            value = end.value
    return value


_Step = Generator[Any, Any, str | None]  # yields steps, and is sent the nodes that they added

_DIGEST = "32 hexadecimal digits in quotes"
_KINDS: Mapping[str | None, type[_Strict]] = {
    "<of>": _OfNode, "<pair>": _PairNode, "<train>": _TrainLeaf, "<path>": _FileLeaf,
}  # fmt: skip


class _Expander:
    """Spells a plan's file out into operations."""

    def __init__(self, text: YamlText, folder: Path) -> None:
        self.text = text
        self.folder = folder
        self.file = self._validated()
        self.builder = Builder(self.file.seed)
        self.used: set[str] = set()
        self.within: dict[str, None] = {}  # names of subtrees, the outermost first
        self.named: dict[str, tuple[str | int, ...]] = {}  # a node's own name → where it is written
        self.as_they_are: dict[tuple[str, ...], list[str]] = {}  # defaults not applied → nodes
        self.faults: dict[str, None] = {}  # in order, each once
        self.items = 0
        self.given = 0.0

    def _validated(self) -> PlanFile:
        if not isinstance(self.text.content, dict):
            raise PlanError(f"{self.text.name}: a plan is a mapping with soup, models and tree")
        try:
            return PlanFile.model_validate(self.text.content)
        except ValidationError as error:
            # Of a value that may be of several kinds, there is a fault for each.
            found: dict[tuple[str | int, ...], list[Any]] = {}
            for fault in error.errors(include_url=False):
                found.setdefault(place_of(fault, self.text.content), []).append(fault)
            told = [self._sentence(*fault) for fault in list(found.items())[:_MAX_FAULTS]]
            more = len(found) - len(told)
            if more:
                told.append(f"and {counted(more, 'fault')} more")
            raise PlanError(*told) from None

    def _sentence(self, path: tuple[str | int, ...], faults: Sequence[Mapping[str, Any]]) -> str:
        """Pydantic's faults of one value as a sentence with its place."""
        where, name = self.text.at(*path), ".".join(map(str, path)) or "the plan"
        first = faults[0]
        given = first["input"]
        if first["type"] == "extra_forbidden":
            kind = _kind(self._value(path[:-1])) if len(path) > 1 else None
            of = _KINDS.get(kind, _Defaults if path[:1] == ("defaults",) else PlanFile)
            names = list(of.model_fields)
            return (
                f"{where}: unknown key {path[-1]!r}{nearest(str(path[-1]), names)} "
                f"(expected {', '.join(names)})"
            )
        if first["type"] == "missing":
            return f"{where}: {'.'.join(map(str, path[:-1])) or 'the plan'} has no {path[-1]!r}"
        if name == "soup":
            return f"{where}: soup is {said(given)}, but this version reads schema 1"
        hint = ""
        if first["type"] == "shape" and isinstance(given, Mapping):
            kinds = [kind.strip("<>") for kind in _KINDS if kind]
            hints = ((key, nearest(str(key), kinds, limit=1)) for key in list(given)[:_TRIED])
            key, hint = next(((key, hint) for key, hint in hints if hint), (None, ""))
            where = self.text.at(*path, key) if key is not None else where
        wanted = _DIGEST if first["type"] == "string_pattern_mismatch" else expected(faults)
        return f"{where}: {name} is {said(given)}, but must be {wanted}{hint}"

    def _value(self, path: Sequence[str | int]) -> Any:
        content = self.text.content
        for part in path:
            content = content[part]
        return content

    def expand(self) -> tuple[Tree, list[str]]:
        root = _run(self._item(self.file.tree, ("tree",), ROOT))
        if self.faults or root is None:
            raise PlanError(*self.faults)
        unused = [name for name in self.file.models if name not in self.used]
        warnings = [
            f"{self.text.at('models', name)}: the model {name!r} is not used" for name in unused
        ]
        warnings += [
            f"{of[0]}{f' (and {listed(of[1:])})' if len(of) > 1 else ''}: one model is taken as it "
            f"is, without what `defaults.merge` says of {', '.join(keys)} (a `merge` of the node's "
            f"own merges one model, too)"
            for keys, of in self.as_they_are.items()
        ]
        return self.builder.tree(root), warnings

    def _item(self, item: Any, path: tuple[str | int, ...], name: str) -> _Step:
        """Add a model or a node, and all that it is made of; None where something is wrong."""
        self.items += 1
        if self.items > MAX_NODES:
            raise _EndError(f"the tree has more than {MAX_NODES:,} nodes")
        try:
            if isinstance(item, str):
                return (yield from self._named(item, path))
            return (yield from self._node(item, path, name))
        except PlanError as error:
            self._fault(error)
            return None

    def _fault(self, error: PlanError) -> None:
        if isinstance(error, _EndError):
            raise error
        self.faults.update(dict.fromkeys(error.args))
        if len(self.faults) > _MAX_FAULTS:
            raise _EndError(*self.faults, "no further faults were looked for")

    def _node(self, item: _OfNode | _PairNode, path: tuple[str | int, ...], name: str) -> _Step:
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
            self._fault(error)
        try:
            merge = self._merge(item, path, models=len(inside))
        except PlanError as error:
            self._fault(error)
        found = []
        for index, inner in enumerate(inside):
            found.append((yield self._item(inner, (*path, key, index), f"{name}.{index + 1}")))
        names = [made for made in found if made is not None]
        if merge is None or len(names) < len(found):
            return None
        self.builder.place = self.text.at(*path)
        try:
            if isinstance(item, _OfNode):
                own = bool(item.merge)
                if len(names) == 1 and not own and (keys := _would_change_one(merge)):
                    node = name if finetune is not None else names[0]
                    where = "" if self.as_they_are.get(keys) else f"{self.builder.place}: "
                    self.as_they_are.setdefault(keys, []).append(f"{where}{node}")
                return self.builder.join(name, names, merge, finetune, merge_one=own)
            models = {self.builder.model(name): name for name in reversed(names)}
            return pair_levels(
                self.builder, names, merge, finetune, odd=models.get(item.odd, item.odd), name=name,
                shuffle=None if item.shuffle is False else item.shuffle,
            )  # fmt: skip
        except PlanError as error:
            raise PlanError(f"{self.text.at(*path)}: {error}") from None

    def _named(self, name: str, path: tuple[str | int, ...]) -> _Step:
        where = self.text.at(*path)
        model = self.file.models.get(name)
        if model is None:
            known = list(self.file.models)
            raise PlanError(
                f"{where}: no model is called {name!r}"
                f"{nearest(name, known) or f' (there are {listed(known)})'}"
            )
        if name in self.within:
            way = list(self.within)
            way = way[way.index(name) :]
            way = [*way[:_WAY], *(["…"] if len(way) > _WAY else []), name]
            raise PlanError(f"{where}: the model {name!r} is made of itself: {' → '.join(way)}")
        self.used.add(name)
        free = self.builder.free_name(name)
        at = ("models", name)
        self.builder.place = self.text.at(*at)
        if isinstance(model, str | _FileLeaf):
            file = model if isinstance(model, str) else model.path
            if not file:
                raise PlanError(f"{self.builder.place}: the path of {name!r} is empty")
            digest = None if isinstance(model, str) else model.xxh3_128
            leaf = Load(self.folder / file, digest)
            if isinstance(model, str) or model.lora is None:
                return self.builder.add(free, leaf)
            adapters = self._adapters(model.lora, self.text.at(*at, "lora"))
            return self.builder.folded(free, leaf, adapters)
        if isinstance(model, _TrainLeaf):
            given = _over(self.file.defaults.train, model.train)
            training = self._training(given, self._places("train", model.train, at))
            if model.start == "":
                raise PlanError(f"{self.text.at(*at, 'start')}: start is '', not a path")
            start = None if model.start is None else self.folder / model.start
            return self.builder.add(free, Train(training, start))
        if len(self.within) >= _MAX_DEPTH:
            raise PlanError(f"{where}: subtrees are nested more than {_MAX_DEPTH} deep")
        self.within[name] = None
        made: str | None = yield self._item(model, at, free)
        del self.within[name]
        return made

    def _merge(self, item: _Node, path: tuple[str | int, ...], *, models: int) -> Merge:
        places = self._places("merge", item.merge, path)
        own = self._tried(_merge_keys, item.merge or {}, places)
        given = self._tried(_merge_keys, self.file.defaults.merge, places)
        if "method" in own and own["method"] != given.get("method", "linear"):
            given = {k: v for k, v in given.items() if k in _ANY_METHOD}  # not its parameters
        if models == 1 or any(name in own for name in _SHARES):
            given = {k: v for k, v in given.items() if k not in _SHARES}
        if "layers" in own:
            given.pop("rest", None)  # it belongs to the layers that are replaced
        elif "rest" in own and isinstance(given.get("layers"), dict):
            given["layers"] = {k: v for k, v in given["layers"].items() if k != "rest"}
        given |= own
        self._count(given)
        base = given.pop("base", None)
        if base is not None and not (isinstance(base, str) and base):
            raise PlanError(f"{places('base')}: base is {said(base)}, not a path")
        lora, aux = given.pop("lora", None), given.pop("aux", None)
        adapters = () if lora is None else self._adapters(lora, places("lora"))
        beside = () if aux is None else self._auxiliary(aux, places("aux"))
        own_groups = given.get("groups", {})
        if _names_groups(given.get("layers")) and isinstance(own_groups, dict):
            tuned = self._trainer(self._tuned(item))
            groups = {**(trainer_groups(*tuned) if tuned else {}), **self.file.groups, **own_groups}
            if groups:
                self._count(groups)
                given["groups"] = groups
        if "estimates" not in given and models > 1:
            known = self._trainer(self._tuned(item) or self._trained(item))
            if known and (estimates := trainer_estimates(*known)):
                self._count(estimates)
                given["estimates"] = estimates
        recipe = self._tried(_recipe, given, places)
        return Merge(recipe, None if base is None else self.folder / base, adapters, beside)

    def _adapters(self, given: object, place: str) -> tuple[tuple[Path, float], ...]:
        """Adapters, from a path, a list of paths, or a mapping from paths to weights."""
        pairs: list[tuple[Any, Any]] = []
        if isinstance(given, Mapping):
            pairs = list(given.items())
        elif isinstance(given, str | list):
            pairs = [(path, 1.0) for path in ([given] if isinstance(given, str) else given)]
        if not pairs or not all(_is_path(path) and _is_weight(weight) for path, weight in pairs):
            raise PlanError(
                f"{place}: lora is {said(given)}, not a path, a list of paths or a mapping from "
                f"paths to weights"
            )
        twice = [path for k, (path, _) in enumerate(pairs) if (path, 1.0) in pairs[:k]]
        if twice:
            raise PlanError(f"{place}: the adapter {twice[0]!r} is there twice")
        return tuple((self.folder / path, float(weight)) for path, weight in pairs)

    def _auxiliary(self, given: object, place: str) -> tuple[tuple[str, tuple[Path, ...]], ...]:
        """Auxiliary inputs: for each name a path a model."""
        found = []
        for name, paths in given.items() if isinstance(given, Mapping) else ((None, None),):
            several = [paths] if isinstance(paths, str) else paths
            if not isinstance(several, list) or not several or not all(map(_is_path, several)):
                raise PlanError(
                    f"{place}: aux is {said(given)}, not a mapping from names to a path for each "
                    f"model"
                )
            found.append((str(name), tuple(self.folder / path for path in several)))
        return tuple(found)

    def _count(self, given: object) -> None:
        """Refuse defaults that swell because every node has them."""
        self.given += _weight(given)
        if self.given > _MAX_GIVEN:
            raise _EndError(
                f"{self.text.name}: the nodes' merges and trainings, spelt out with their "
                f"defaults, have more than {_MAX_GIVEN:,} values"
            )

    def _places(
        self, kind: str, own: Mapping[str, Any] | Literal[False] | None, path: tuple[str | int, ...]
    ) -> Callable[[str | None], str]:  # fmt: skip
        """Where a key of a node's options is written, or with None where all of them are."""
        defaults = getattr(self.file.defaults, kind)
        around = [((*path, kind), own or {}), (("defaults", kind), defaults or {})]

        def place(key: str | None) -> str:
            wanted = None if key is None else key.replace("-", "_")
            for where, options in around:
                for name in options:
                    if name.replace("-", "_") == wanted:
                        return self.text.at(*where, name)
            return self.text.at(*around[0 if own or not defaults else 1][0])

        return place

    def _tried(
        self, make: Callable[[Mapping[str, Any]], Any], given: Mapping[str, Any],
        places: Callable[[str | None], str],
    ) -> Any:  # fmt: skip
        """`make(given)`; a fault is told at the key without which it would be another or none."""
        try:
            return make(given)
        except SoupError as error:
            where = places(key_at_fault(make, given, error))
            raise PlanError(*(f"{where}: {line}" for line in error.args)) from None

    def _finetune_options(self, item: _Node) -> dict[str, Any] | None:
        defaults = self.file.defaults.finetune
        if item.finetune is False or (item.finetune is None and defaults is None):
            return None
        return _over(defaults or {}, item.finetune or {})

    def _finetune(self, item: _Node, path: tuple[str | int, ...]) -> FineTune | None:
        given = self._finetune_options(item)
        if given is None:
            return None
        return FineTune(self._training(given, self._places("finetune", item.finetune, path)))

    def _training(
        self, given: Mapping[str, Any], places: Callable[[str | None], str]
    ) -> Training:  # fmt: skip
        self._count(given)
        training: Training = self._tried(lambda g: training_from(g, self.folder), given, places)
        return training

    def _tuned(self, item: _Node) -> dict[str, Any] | None:
        """The options of what trains the results of merges."""
        return self._finetune_options(item) or self.file.defaults.finetune

    def _trained(self, item: Any) -> dict[str, Any] | None:
        """Those of a training among what a node is made of, the first that is found."""
        pending, seen = [item], set[str]()
        while pending:
            item = pending.pop()
            if isinstance(item, str):
                if item not in seen:
                    seen.add(item)
                    pending.append(self.file.models.get(item))
            elif isinstance(item, _TrainLeaf):
                return _over(self.file.defaults.train, item.train)
            elif isinstance(item, _OfNode | _PairNode):
                if item.finetune:
                    return self._finetune_options(item)
                pending += reversed(item.of if isinstance(item, _OfNode) else item.pair)
        return None

    def _trainer(self, given: Mapping[str, Any] | None) -> tuple[Trainer, Any] | None:
        """A trainer and its options; None where there is none, or `_training` says its fault."""
        if given is None or not isinstance(given.get("trainer"), str):
            return None
        try:
            trainer = get_trainer(given["trainer"])
            options = {k: v for k, v in given.items() if k not in RESERVED}
            return trainer, build_options(trainer, options, self.folder.absolute())
        except SoupError:
            return None


def training_from(given: Mapping[str, Any], folder: Path) -> Training:
    """A training from `trainer` (or `command`), its options, and what stands beside them, checked.

    Raises:
        PlanError: what stands beside the options is malformed.
        TrainerError: the trainer is not there, or its options do not fit.
    """
    resources = given.get("resources", {})
    if not isinstance(resources, dict) or not all(
        isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < math.inf
        for v in resources.values()
    ):
        raise PlanError(f"resources is {said(resources)}, not a mapping to numbers from 0 on")
    seed = given.get("seed")
    if seed is not None and (
        isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63
    ):
        raise PlanError(f"seed is {said(seed)}, not an integer from 0 to 2^63 - 1")
    options = {k: v for k, v in given.items() if k not in RESERVED}
    name = given.get("trainer", COMMAND if "command" in given else None)
    if name is None:
        raise PlanError("there is no 'trainer' and no 'command'")
    if not isinstance(name, str):
        raise PlanError(f"trainer is {said(name)}, not a name")
    if name == COMMAND:
        own = options.get("folder", ".")
        if not isinstance(own, str) or not os.path.isdir(folder / own):
            raise PlanError(f"the command's folder {said(own)} is no folder")
        # Absolute: a worker may be elsewhere.
        options["folder"] = str((folder / own).absolute())
    training = Training(name, options, resources, seed, folder.absolute())
    build_options(get_trainer(name), options, training.folder)
    return training


def key_at_fault(
    make: Callable[[Mapping[str, Any]], object], given: Mapping[str, Any], error: SoupError
) -> str | None:
    """The key without which `make(given)`, which raised an error, raises none; or another one."""
    changes = None
    for key in sorted(given, key=_is_what_is_made) if len(given) <= _TRIED else ():
        if changes is not None and _is_what_is_made(key):
            break
        try:
            make({name: value for name, value in given.items() if name != key})
        except SoupError as other:
            if changes is None and other.args != error.args:
                changes = key
        else:
            return key
    return changes


def _merge_keys(given: Mapping[str, Any]) -> dict[str, Any]:
    return plain_keys(given, "merge")


def _recipe(given: Mapping[str, Any]) -> Recipe:
    with speaking("plan"):
        return recipe_from_mapping(given, "merge", ("aux", "base", "lora"))


def _would_change_one(merge: Merge) -> tuple[str, ...]:
    """What of a merge would make of a single model something else than it is."""
    recipe = merge.recipe
    method = get_method(recipe.method_name)
    found = ["method"] if method.base and method.models[0] == 1 else []
    found += ["dtype"] if recipe.dtype is not None else []
    found += ["lora"] if merge.lora else []
    found += [name for name in ("renames", "slices") if getattr(recipe, name)]
    if any(r.action == "drop" or r.frozen or r.source == BASE for r in recipe.layers):
        found.append("layers")
    if recipe.layers and recipe.rest in ("drop", "base"):
        found.append("rest")
    return tuple(found)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_what_is_made(key: str) -> bool:
    """Whether all other keys are options of what a key names: it is at fault if none of them is."""
    return key in ("method", "trainer", "command")


def _over(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A node's training over the defaults, which do not hold for another trainer."""

    def name(given: Mapping[str, Any]) -> object:
        return given.get("trainer", COMMAND if "command" in given else None)

    if name(own) is not None and name(own) != name(defaults):
        return dict(own)
    return {**defaults, **own}


def _names_groups(layers: object) -> bool:
    """Whether rules may ask for a group: `group:…`, or `low-level` and `frozen`."""
    return any(word in repr(layers) for word in ("group:", "low-level", "low_level", "frozen"))


def _weight(value: object) -> float:
    """How many values there are in one, aliases followed; a long text counts as several."""
    if isinstance(value, Mapping):
        return 1 + sum(_weight(key) + _weight(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return 1 + sum(map(_weight, value))
    return 1 + len(value) / _TEXT if isinstance(value, str) else 1
