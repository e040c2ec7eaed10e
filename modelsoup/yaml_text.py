"""YAML that a stranger may have written: plain data only, with the place of every value.

Tags, duplicate keys and documents that swell when their aliases are followed are refused; `2e-4`
is a number and `no` a word, as YAML 1.2 has it and PyYAML alone does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import PlanError, nearest

MAX_BYTES = 10_000_000
MAX_VALUES = 200_000
_MAX_DEPTH = 100

Place = tuple[int, int]
"""Line and column, both from 1."""


@dataclass(frozen=True)
class YamlText:
    """A document's content, and where each value of it stands.

    Attributes:
        name: what the document is called in errors.
        content: mappings, lists, strings, numbers, truth values and None.
        places: path to a value, as keys and indices → its place; that of a mapping's value is its
            key's.
    """

    name: str
    content: Any
    places: Mapping[tuple[str | int, ...], Place]

    def at(self, *path: str | int) -> str:
        """`file:line:column` of a value, or of the nearest one around it."""
        for length in range(len(path), -1, -1):
            place = self.places.get(path[:length])
            if place is not None:
                return f"{self.name}:{place[0]}:{place[1]}"
        return self.name


class _Loader(yaml.SafeLoader):
    """Scalars as YAML 1.2's core schema has them."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # the library's own way


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )
_PLAIN = {
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "map", "seq")
}


def read_yaml(path: Path) -> YamlText:
    """Read a file.

    Raises:
        PlanError: it cannot be read, or `parse_yaml` refuses it.
    """
    try:
        if not path.is_file():
            if path.exists():
                raise PlanError(f"{path} is no file")
            beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise PlanError(f"{path} does not exist{nearest(path.name, beside)}")
        if path.stat().st_size > MAX_BYTES:
            raise PlanError(f"{path} has more than {MAX_BYTES:,} bytes")
        text = path.read_text("utf-8")
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{path} is not UTF-8: byte {error.start}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> YamlText:
    """Plain data from one YAML document.

    Raises:
        PlanError: not YAML, a tag, a duplicate key, a key that is no text, or too much of it.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise PlanError(f"{where}: {error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise PlanError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    return _Reader(name).read(node)


class _Reader:
    def __init__(self, name: str) -> None:
        self.name = name
        self.places: dict[tuple[str | int, ...], Place] = {}
        self.loader = _Loader("")

    def read(self, node: yaml.Node | None) -> YamlText:
        content = None if node is None else self.value(node, ())
        return YamlText(self.name, content, self.places)

    def refuse(self, node: yaml.Node, reason: str) -> PlanError:
        mark = node.start_mark
        return PlanError(f"{self.name}:{mark.line + 1}:{mark.column + 1}: {reason}")

    def value(self, node: yaml.Node, path: tuple[str | int, ...]) -> Any:
        self.places.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
        if len(self.places) > MAX_VALUES:
            raise self.refuse(node, f"more than {MAX_VALUES:,} values, aliases followed")
        if len(path) > _MAX_DEPTH:
            raise self.refuse(node, f"nested more than {_MAX_DEPTH} deep")
        if node.tag not in _PLAIN:
            raise self.refuse(node, f"the tag {node.tag!r} is not allowed: plans are plain data")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        if not all(c.isprintable() or c in "\n\t" for c in node.value):
            raise self.refuse(node, f"{node.value!r} has control characters")
        if node.tag.endswith(":int"):
            return _integer(node.value)
        try:
            return self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise self.refuse(node, f"{node.value!r} is no value: {error}") from error

    def mapping(self, node: yaml.MappingNode, path: tuple[str | int, ...]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _PLAIN:
                raise self.refuse(key_node, "a key is no plain text")
            key = str(key_node.value)
            if not key.isprintable():
                raise self.refuse(key_node, f"the key {key!r} has control characters")
            if key in content:
                raise self.refuse(key_node, f"the key {key!r} occurs twice")
            mark = key_node.start_mark
            self.places[(*path, key)] = (mark.line + 1, mark.column + 1)
            content[key] = self.value(value_node, (*path, key))
        return content


def _integer(text: str) -> int:
    """As YAML 1.2 reads it: `010` is ten."""
    if text.startswith(("0o", "0x")):
        return int(text, 0)
    return int(text, 10)
