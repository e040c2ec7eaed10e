"""What a trainer says of itself: its options, and the tensors that it writes. Without torch."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import GroupedMetadata

from ..errors import SoupError, TrainerError, how_to_install, worded
from ..files.checkpoint import Checkpoint
from .trainer import EXTRAS, Trainer, get_trainer, telling, trainer_names, trainer_tensors
from .virtual import virtual

_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_KINDS: Mapping[Any, str] = {
    int: "integer", float: "number", str: "text", bool: "true or false", Path: "path",
    NoneType: "null", dict: "mapping", Mapping: "mapping", Any: "anything",
}  # fmt: skip
_ATTRIBUTE = re.compile(r"    (\w+(?:, \w+)*)(?: \([^)]*\))?: ?(.*)")


def describe_all() -> list[dict[str, Any]]:
    """A row for each trainer: its name, and what it does, needs, or why it cannot be imported."""
    return [_described_shortly(name) for name in trainer_names()]


def _described_shortly(name: str) -> dict[str, Any]:
    try:
        told = {"name": name, "summary": _summary(get_trainer(name))}
    except SoupError as error:  # which says what brings it
        return {"name": name, "summary": None, "error": str(error)}
    extra = EXTRAS.get(name)
    return told if extra is None or _is_there(extra) else {**told, "needs": how_to_install(extra)}


def _is_there(extra: str) -> bool:
    """Whether every package of one of our extras is installed."""
    try:
        for line in metadata.requires("modelsoup") or ():
            package, _, marker = line.partition(";")
            if f"extra == '{extra}'" in marker.replace('"', "'"):
                metadata.version(re.split(r"[^\w.-]", package.strip())[0])
    except metadata.PackageNotFoundError:
        return False
    return True


def _summary(trainer: Trainer) -> str:
    return (type(trainer).__doc__ or "").strip().partition("\n")[0]


def describe(trainer: Trainer) -> dict[str, Any]:
    """A trainer and its options as plain data.

    Raises:
        TrainerError: its options' annotations cannot be read.
    """
    kind = type(trainer)
    with telling(trainer, "options"):
        hints = get_type_hints(trainer.options, include_extras=True)
    told = _attributes(trainer.options)
    return {
        "name": trainer.name,
        "summary": _summary(trainer),
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "version": str(getattr(trainer, "version", "")),
        "options": [
            {
                "name": field.name, "type": _kind(hints[field.name]), **_default(field),
                "range": ", ".join(dict.fromkeys(map(_words, _limits(hints[field.name])))),
                "doc": told.get(field.name, ""),
            }
            for field in dataclasses.fields(trainer.options) if field.init
        ],
    }  # fmt: skip


def needed(trainer: Trainer) -> list[str]:
    """The options that have no default."""
    fields = dataclasses.fields(trainer.options)
    return [field.name for field in fields if field.init and _default(field)["required"]]


def _default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    from pydantic_core import to_jsonable_python

    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    required = value is dataclasses.MISSING
    plain = None if required else to_jsonable_python(value, inf_nan_mode="constants", fallback=str)
    return {"default": plain, "required": required}


def _kind(hint: Any) -> str:
    """A type in the words of errors: `integer or null`."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _kind(parts[0])
    if origin is Literal:
        return " or ".join(map(worded, parts))
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_kind, parts)))
    if hint in _KINDS or origin in _KINDS:
        return _KINDS.get(hint) or _KINDS[origin]
    if dataclasses.is_dataclass(hint):
        return "mapping"
    if inspect.isclass(origin or hint) and issubclass(origin or hint, list | tuple | set):
        inner = dict.fromkeys(_kind(part) for part in parts if part is not ...)
        return f"list of {' or '.join(inner)}" if inner else "list"
    return str(getattr(hint, "__name__", hint))


def _limits(hint: Any) -> Iterator[tuple[str, Any]]:
    """The bounds that annotations tell, those within a union too: `Weight | None`."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for part in parts:
            yield from _limits(part)
    if origin is Annotated:
        yield from _limits(parts[0])
        for told in parts[1:]:
            each = told if isinstance(told, GroupedMetadata) else [told]
            for one in each:
                yield from ((n, getattr(one, n)) for n in _LIMITS if hasattr(one, n))


def _words(limit: tuple[str, Any]) -> str:
    name, value = limit
    if name == "lt" and value == float("inf"):
        return "finite"
    return f"{_LIMITS[name]} {worded(value)}"


def _attributes(options: type) -> dict[str, str]:
    """What the section `Attributes:` of a docstring says of each, inherited ones included."""
    found: dict[str, str] = {}
    for kind in reversed(options.__mro__):
        text = inspect.cleandoc(kind.__doc__ or "")
        _, _, section = text.partition("\nAttributes:\n")
        names: list[str] = []
        for line in section.split("\n"):
            attribute = _ATTRIBUTE.fullmatch(line)
            if attribute:
                names = attribute[1].split(", ")
                found |= dict.fromkeys(names, attribute[2].strip())
            elif line.startswith(" " * 5):
                found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
            elif line.strip():
                break  # another section
    return found


def written(trainer: Trainer, options: Any) -> Checkpoint:
    """What a checkpoint of a trainer will hold; it has names and shapes, and no file.

    Raises:
        TrainerError: the trainer does not tell.
    """
    tensors = trainer_tensors(trainer, options)
    if tensors is None:
        raise TrainerError(f"the trainer {trainer.name!r} does not tell which tensors it writes")
    return virtual(trainer.name, tensors)


def contents(checkpoint: Checkpoint, buffers: Collection[str] = ()) -> dict[str, Any]:
    """Tensors, and the sums of each network, the first part of their names, as plain data.

    Args:
        checkpoint: what is written.
        buffers: the names of what is not trained, and so no parameter.
    """
    networks: dict[str, dict[str, int]] = {}
    for info in checkpoint.tensors.values():
        own = networks.setdefault(info.name.partition(".")[0], {"tensors": 0, "parameters": 0})
        own["tensors"] += 1
        own["parameters"] += 0 if info.name in buffers else info.elements
    return {
        "parameters": sum(own["parameters"] for own in networks.values()),
        "nbytes": checkpoint.nbytes,
        "networks": networks,
        "tensors": [
            {"name": info.name, "dtype": info.dtype, "shape": list(info.shape)}
            for info in checkpoint.tensors.values()
        ],
    }
