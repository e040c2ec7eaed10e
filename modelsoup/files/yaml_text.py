"""YAML that a stranger may have written: plain data only, with the place of every value.

Tags, duplicate keys and documents that swell when their aliases are followed are refused; `2e-4`
is a number and `no` a word, as YAML 1.2 has it and PyYAML alone does not. Every limit counts while
the text is read, and what an alias stands for is read once: the time is that of the bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import PlanError, nearest, said
from .reading import read_small

MAX_BYTES = 10_000_000
MAX_VALUES = 200_000
_MAX_DEPTH = 100
_MAX_BITS = 64
_MAX_DIGITS = 25  # of what may be an integer of 64 bits, however it is written

Place = tuple[int, int]
"""Line and column, both from 1."""

# The scalars of YAML 1.2's core schema that are no texts.
_WORDS: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # thirty times as fast, where it is


@dataclass(frozen=True)
class YamlText:
    """A document's content, and where each value of it stands.

    Attributes:
        name: what the document is called in errors.
        content: mappings, lists, strings, numbers, truth values and None. What an alias stands for
            is there as often as it is named, one object each time.
    """

    name: str
    content: Any
    _root: _Value | None = None

    def at(self, *path: str | int) -> str:
        """`file:line:column` of a value, or of the nearest one around it.

        Args:
            path: keys and indices. The place of a mapping's value is that of its key.
        """
        if self._root is None:
            return self.name
        value, place = self._root, self._root.place
        for part in path:
            found = value.inside.get(part)
            if found is None:
                break
            place, value = found
        return f"{self.name}:{place[0]}:{place[1]}"


@dataclass(slots=True)
class _Value:
    """A value, with the place of each that it holds, and what is counted with aliases followed."""

    place: Place
    content: Any
    inside: dict[str | int, tuple[Place, _Value]] = field(default_factory=dict)
    values: int = 1
    characters: int = 0
    height: int = 0


@dataclass(slots=True)
class _Open:
    """A mapping or list that is being read."""

    value: _Value
    anchor: str | None
    values: int  # that were counted before it
    characters: int
    key: tuple[str, Place] | None = None  # of a mapping, until the value that belongs to it is read


def read_yaml(path: Path) -> YamlText:
    """Read a file.

    Raises:
        PlanError: it cannot be read, or `parse_yaml` refuses it.
    """
    return parse_yaml(_text_of(path), str(path))


def read_documents(path: Path) -> list[YamlText]:
    """Read a file of one or several documents, with lines between them that begin with `---`.

    Raises:
        PlanError: as in `read_yaml`.
    """
    return _documents(_text_of(path), str(path), several=True)


def _text_of(path: Path) -> str:
    try:
        return read_small(path, MAX_BYTES).decode("utf-8")
    except FileNotFoundError as error:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise PlanError(f"{path} does not exist{nearest(path.name, beside)}") from error
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{path} is not UTF-8: byte {error.start}") from error


def parse_yaml(text: str, name: str) -> YamlText:
    """Plain data from one YAML document.

    Raises:
        PlanError: not YAML, a tag, a duplicate key, a key that is no text, a number that no
            computer has, or too much of it.
    """
    return _documents(text, name, several=False)[0]


def _documents(text: str, name: str, *, several: bool) -> list[YamlText]:
    reader = _Reader(name, several=several)
    try:
        for event in yaml.parse(text, Loader=_Parser):
            reader.take(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise PlanError(f"{where}: {error.problem or error.context}") from error
    # The last two: an escape such as \U00110000, for which there is no character.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise PlanError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    roots = reader.roots or [None]
    return [YamlText(name, None if root is None else root.content, root) for root in roots]


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what either version of YAML would take for something other than a text."""

    def ignore_aliases(self, data: object) -> bool:
        return True


for _tag, _scalars in (("int", _INTEGER), ("float", _FLOAT)):
    _Dumper.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_scalars.pattern})$"), list("-+.0123456789")
    )


def dump_yaml(content: object) -> str:
    """Plain data as YAML that `parse_yaml` reads back, mappings in their order."""
    text = _dumped(content, allow_unicode=True)
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return _dumped(content, allow_unicode=False)  # what would drive a terminal stands escaped


def _dumped(content: object, *, allow_unicode: bool) -> str:
    text: str = yaml.dump(
        content, Dumper=_Dumper, sort_keys=False, allow_unicode=allow_unicode,
        default_flow_style=None,
    )  # fmt: skip
    return text


class _Reader:
    """Builds values from the parser's events, with a stack of those that are open."""

    def __init__(self, name: str, *, several: bool = False) -> None:
        self.name = name
        self.several = several
        self.roots: list[_Value | None] = []  # of the documents
        self.open: list[_Open] = []
        self.anchors: dict[str, _Value | None] = {}  # None while it is open
        self.values = 0
        self.characters = 0

    def take(self, event: Any) -> None:
        """Take the parser's next event."""
        if getattr(event, "tag", None) is not None:
            raise self._refuse(
                event, f"the tag {said(event.tag)} is not allowed: plans are plain data"
            )
        if isinstance(event, yaml.ScalarEvent):
            self._scalar(event)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._begin(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            self._end(event)
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event)
        elif isinstance(event, yaml.DocumentStartEvent):
            if self.roots and not self.several:
                raise self._refuse(event, "a second document begins, where one is expected")
            self.anchors = {}

    def _refuse(self, event: yaml.Event, reason: str) -> PlanError:
        line, column = _place(event)
        return PlanError(f"{self.name}:{line}:{column}: {reason}")

    def _scalar(self, event: Any) -> None:
        text, is_key = event.value, self._is_key()
        self._count(event, 0 if is_key else 1, len(text))
        if not text.isprintable() and not all(c.isprintable() or c in "\n\t" for c in text):
            raise self._refuse(event, f"{said(text)} has control characters")
        content = self._plain(event, text) if event.implicit[0] and not is_key else text
        value = _Value(_place(event), content, characters=len(text))
        if event.anchor is not None:
            self.anchors[event.anchor] = value
        if is_key:
            self._key(event, text)
        else:
            self._put(value, value.place)

    def _count(self, event: yaml.Event, values: int, characters: int) -> None:
        self.values += values
        self.characters += characters
        for count, most, what in (
            (self.values, MAX_VALUES, "values"), (self.characters, MAX_BYTES, "characters"),
        ):  # fmt: skip
            if count > most:
                raise self._refuse(event, f"more than {most:,} {what}, aliases followed")

    def _plain(self, event: yaml.Event, text: str) -> Any:
        """What a scalar without quotes is."""
        if text in _WORDS:
            return _WORDS[text]
        if text[0] not in "-+.0123456789":
            return text
        if _INTEGER.fullmatch(text):
            number = int(text, _base(text)) if len(text) <= _MAX_DIGITS else 1 << _MAX_BITS
            if number.bit_length() > _MAX_BITS:
                raise self._refuse(
                    event,
                    f"{said(text)} is an integer of more than {_MAX_BITS} bits (a text stands in "
                    f"quotes)",
                )
            return number
        if not _FLOAT.fullmatch(text):
            return text
        if text[-3:].lower() in ("inf", "nan"):
            return float(text.replace(".", ""))
        if math.isinf(found := float(text)):
            raise self._refuse(event, f"{said(text)} is too large for a number")
        return found

    def _is_key(self) -> bool:
        if not self.open:
            return False
        return isinstance(self.open[-1].value.content, dict) and self.open[-1].key is None

    def _key(self, event: yaml.Event, key: str) -> None:
        if not key.isprintable():
            raise self._refuse(event, f"the key {said(key)} has control characters")
        if key in self.open[-1].value.content:
            raise self._refuse(event, f"the key {said(key)} occurs twice")
        self.open[-1].key = (key, _place(event))

    def _begin(self, event: Any) -> None:
        if self._is_key():
            raise self._refuse(event, "a key is no plain text")
        self._deep(event, 0)
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        content: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
        value = _Value(_place(event), content)
        self.open.append(_Open(value, event.anchor, self.values, self.characters))
        self._count(event, 1, 0)

    def _end(self, event: yaml.Event) -> None:
        done = self.open.pop()
        done.value.values = self.values - done.values
        done.value.characters = self.characters - done.characters
        if done.anchor is not None:
            self.anchors[done.anchor] = done.value
        self._put(done.value, done.value.place)

    def _alias(self, event: Any) -> None:
        if self._is_key():
            raise self._refuse(event, "a key is no plain text")
        if event.anchor not in self.anchors:
            raise self._refuse(event, f"nothing before this is called &{event.anchor}")
        value = self.anchors[event.anchor]
        if value is None:
            raise self._refuse(event, f"*{event.anchor} stands for something that it is part of")
        self._deep(event, value.height)
        self._count(event, value.values, value.characters)
        self._put(value, _place(event))

    def _deep(self, event: yaml.Event, height: int) -> None:
        if len(self.open) + height > _MAX_DEPTH:
            raise self._refuse(event, f"nested more than {_MAX_DEPTH} deep")

    def _put(self, value: _Value, place: Place) -> None:
        """Put a value that is whole where it belongs."""
        if not self.open:
            self.roots.append(value)
            return
        around = self.open[-1].value
        around.height = max(around.height, value.height + 1)
        if self.open[-1].key is None:
            around.inside[len(around.content)] = (place, value)
            around.content.append(value.content)
        else:
            key, of_key = self.open[-1].key
            self.open[-1].key = None
            around.inside[key] = (of_key, value)
            around.content[key] = value.content


def _place(event: Any) -> Place:
    return event.start_mark.line + 1, event.start_mark.column + 1


def _base(text: str) -> int:
    """As YAML 1.2 reads integers: `010` is ten."""
    return 0 if text.startswith(("0o", "0x")) else 10
