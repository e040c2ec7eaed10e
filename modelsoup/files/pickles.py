"""What a pickle would have its reader do, told from its instructions before one is carried out.

torch's weights-only loader runs no code of a file's, but a few bytes can make it take any amount
of memory or time: `bytearray(10**12)`, the set of a tensor whose 2^40 elements lie in one place,
a tuple of twice a tuple of twice a tuple, whose hash takes 2^100 steps. So its instructions are
gone through first with a stack that holds sizes in place of values, and what they would copy,
hash and allocate is added up. Nothing is imported, called or built.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final, Literal

RATIO: Final = 16
"""How many times a file's bytes it may take to load it, and what is made of it."""

_LEAST_LIMIT: Final = 100_000_000
_DEEPEST: Final = 100  # a tuple's hash calls itself for each level
_MOST_NAMES: Final = 256
_SHORT: Final = "it ends in the middle"
_LONGEST_NAME: Final = 1000
_WORD: Final = 8  # what a reference takes

_INSTRUCTIONS: Final = frozenset(each.code.encode("latin1") for each in pickletools.opcodes)
_PUT: Final = (pickle.BINPUT, pickle.LONG_BINPUT)
_GET: Final = (pickle.BINGET, pickle.LONG_BINGET)
_NUMBERS: Final = (pickle.BININT1, pickle.BININT, pickle.BININT2, pickle.BINFLOAT)
_OPERANDS: Final = {
    code: struct.Struct(form)
    for form, codes in {
        "<B": (pickle.BINPUT, pickle.BINGET, pickle.BININT1, pickle.LONG1, pickle.SHORT_BINSTRING,
               pickle.PROTO),
        "<H": (pickle.BININT2,),
        "<I": (pickle.LONG_BINPUT, pickle.LONG_BINGET, pickle.BINUNICODE),
        "<i": (pickle.BININT,),
        ">d": (pickle.BINFLOAT,),
    }.items()
    for code in codes
}  # fmt: skip
_ATOMS: Final = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False}
_EMPTY: Final = {pickle.EMPTY_LIST: "list", pickle.EMPTY_DICT: "dict", pickle.EMPTY_SET: "set"}
_TUPLES: Final = {pickle.EMPTY_TUPLE: 0, pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}

# Nothing would run these, but no training has them in its state either: whoever trusts the file
# should hear of it.
_HOSTILE: Final = re.compile(
    r"(os|posix|nt|sys|subprocess|pty|shutil|socket|importlib|runpy|ctypes|webbrowser)\..*"
    r"|builtins\.(eval|exec|compile|open|breakpoint|__import__)|(io|_io|codecs)\.open"
)
# What the loader itself calls, by what arguments can make it do: go through them one by one,
# allocate as much as a number says, or compute on tensors.
_ITERATES: Final = frozenset(
    ["collections.OrderedDict", "collections.Counter", "builtins.set", "builtins.complex",
     "builtins.bytearray", "torch.Size", "torch.device", "_codecs.encode"]
)  # fmt: skip
_ALLOCATES: Final = re.compile(r"torch\.((cuda\.)?sparse\.|cuda\.|storage\.)?\w*(Tensor|Storage)")
_COMPUTES: Final = re.compile(
    r"torch\._utils\._rebuild_(device_tensor\w*|sparse_tensor|nested_tensor|qtensor)"
)
_ORDERED: Final = "collections.OrderedDict"
_FROM_TYPE: Final = "torch._tensor._rebuild_from_type_v2"
_SPARSE: Final = "torch._utils._rebuild_sparse_tensor"
_PLAIN_TENSORS: Final = ("torch.Tensor", "torch.nn.parameter.Parameter")
_SHAPE_AT: Final = {  # which argument is the shape of what they make
    "torch._utils._rebuild_tensor": 2, "torch._utils._rebuild_tensor_v2": 2,
    "torch._utils._rebuild_tensor_v3": 2, "torch._utils._rebuild_qtensor": 2,
    "torch._utils._rebuild_meta_tensor_no_storage": 1,
    "torch._utils._rebuild_wrapper_subclass": 2,
}  # fmt: skip
_OF_BYTES: Final = ("_codecs.encode", "builtins.bytearray")
_WIDEST: Final = 16  # bytes of an element
_ITEM_SIZES: Final = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2,
    "ComplexDouble": 16, "ComplexFloat": 8, "QInt32": 4,
}  # fmt: skip


class PickleError(Exception):
    """Why a pickle is not given to the loader.

    Attributes:
        kind: `code` if it holds more than data, `size` if it is a bomb, `damage` if it is no sound
            pickle.
    """

    def __init__(self, kind: Literal["code", "size", "damage"], reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def most_bytes(size: int) -> int:
    """How many bytes may be made of a file of `size` bytes."""
    return max(RATIO * size, _LEAST_LIMIT)


class _Global(str):
    """A class or function, by its full name."""

    __slots__ = ()


class _Tuple:
    __slots__ = ("depth", "elements", "filled", "items", "weight")

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.weight, self.depth, self.elements = _WORD, 1, 0
        self.filled: list[_Made] = []
        for item in items:
            kind = type(item)
            if kind is str:
                self.weight += _WORD + len(item)
            elif kind is _Tuple:
                self.weight += item.weight
                self.depth = max(self.depth, item.depth + 1)
                self.elements += item.elements
            else:
                self.weight += _WORD
                if kind is _Made:
                    self.elements += item.elements
                    self.filled.append(item)
        if self.depth > _DEEPEST:
            raise PickleError("size", f"it has tuples nested more than {_DEEPEST} deep")

    @property
    def size(self) -> int:
        """What it takes to copy its items, and theirs if they are lists and the like."""
        return self.weight + sum(made.size for made in self.filled)


class _Made:
    """A list, dict, set or storage, or what a call makes."""

    __slots__ = ("by", "elements", "filled", "size")

    def __init__(self, by: str, *, size: int = 0, elements: int = 0) -> None:
        self.by = by
        self.size = size  # what a copy of its items takes
        self.elements = elements  # of a tensor
        self.filled: list[_Made] = []  # a list's tensors


def _weight(value: Any) -> int:
    """What it takes to refer to a value, and to hash it."""
    if type(value) is _Tuple:
        return value.weight
    return _WORD + len(value) if type(value) is str else _WORD


def _is_tensor(value: Any) -> bool:
    """Whether to go through a value is to make an object of each of its elements or rows."""
    return type(value) is _Made and (value.elements > 0 or value.by == "storage")


def _has_tensors(value: Any) -> bool:
    """Whether to take a value for pairs is to go through a tensor."""
    return _is_tensor(value) or (
        type(value) in (_Tuple, _Made) and any(map(_is_tensor, value.filled))
    )


def _is_part(value: Any) -> bool:
    """Whether a value is a part of a tensor: another, or numbers; and no list to make one of."""
    if type(value) is _Tuple:
        return all(type(item) is int for item in value.items)
    return type(value) is not _Made or value.by not in _EMPTY.values()


def _are_latin(given: Sequence[Any]) -> bool:
    """Whether a call makes bytes as pickles do: of a text, or of nothing, or of bytes so made."""
    if given and type(given[0]) is str:
        return given[1:] in (["latin1"], ["latin-1"])
    return not given or (len(given) == 1 and getattr(given[0], "by", "") in _OF_BYTES)


def _count(shape: Any) -> int:
    """The elements of a tensor of that shape; far too many where no plain tuple says it."""
    lengths: list[Any] = shape.items if type(shape) is _Tuple else [None]
    return math.prod(lengths) if all(type(n) is int for n in lengths) else 1 << 64


@dataclass
class Survey:
    """What the pickles of one file would do; `read` goes through one of them.

    Attributes:
        size: bytes of the file.
        cost: bytes that would be copied, hashed or computed on, roughly.
        names: the classes and functions that are asked for, as they are spelt → as Python 3 does.
        filled: what is filled like a `list` or a `dict`, by the name of what made it.
        storages: how many bytes each storage must have, by its key.
        spread: by what objects were made whose state has tensors for items.
    """

    size: int
    cost: int = 0
    names: dict[str, str] = field(default_factory=dict)
    filled: dict[str, Literal["list", "dict"]] = field(default_factory=dict)
    storages: dict[str, int] = field(default_factory=dict)
    spread: set[str] = field(default_factory=set)

    def read(self, file: BinaryIO) -> None:
        """Go through one pickle, up to its end.

        Raises:
            PickleError: it should not be loaded.
        """
        try:
            self._read(file)
        except (IndexError, KeyError, ValueError, AttributeError, struct.error):
            raise PickleError("damage", "its instructions do not fit together") from None

    def _read(self, file: BinaryIO) -> None:
        read = file.read
        stack: list[Any] = []
        below: list[list[Any]] = []  # what lay on the stack at each mark
        memo: dict[int, Any] = {}
        while True:
            code = read(1)
            form = _OPERANDS.get(code)
            operand: Any = form.unpack(read(form.size))[0] if form else None
            if code in _PUT:
                memo[operand] = stack[-1]
            elif code in _GET:
                stack.append(memo[operand])
            elif code == pickle.BINUNICODE:
                stack.append(str(self._bytes(read, operand), "utf-8", "surrogatepass"))
            elif code in _NUMBERS:
                stack.append(operand)
            elif code == pickle.MARK:
                below.append(stack)
                stack = []
            elif code == pickle.TUPLE:
                items, stack = stack, below.pop()
                stack.append(_Tuple(items))
            elif code in _TUPLES:
                stack.append(_Tuple(_popped(stack, _TUPLES[code])))
            elif code in _ATOMS:
                stack.append(_ATOMS[code])
            elif code in (pickle.REDUCE, pickle.NEWOBJ):
                arguments = stack.pop()
                stack.append(self._call(stack.pop(), arguments))
            elif code == pickle.BINPERSID:
                stack.append(self._storage(stack.pop()))
            elif code in _EMPTY:
                stack.append(_Made(_EMPTY[code]))
            elif code in (pickle.APPENDS, pickle.SETITEMS):
                items, stack = stack, below.pop()
                self._fill(stack[-1], items, pairs=code == pickle.SETITEMS)
            elif code in (pickle.APPEND, pickle.SETITEM):
                items = _popped(stack, 1 if code == pickle.APPEND else 2)
                self._fill(stack[-1], items, pairs=code == pickle.SETITEM)
            elif code == pickle.BUILD:
                state = stack.pop()
                self._build(stack[-1], state)
            elif code == pickle.GLOBAL:
                stack.append(self._global(_line(file), _line(file)))
            elif code == pickle.SHORT_BINSTRING:
                stack.append(str(self._bytes(read, operand), "utf-8"))
            elif code == pickle.LONG1:
                stack.append(pickle.decode_long(self._bytes(read, operand)))
            elif code == pickle.STOP:
                stack.pop()
                break
            elif code in _INSTRUCTIONS:
                if code != pickle.PROTO:
                    raise PickleError(
                        "code", f"has the instruction {code[0]}, unknown to torch's loader"
                    )
            else:
                raise PickleError("damage", "it has what is no instruction" if code else _SHORT)
        # A dict's state is taken for pairs.
        if any(by == _ORDERED or self.filled.get(by) == "dict" for by in self.spread):
            raise PickleError("size", "it would go through a tensor as a dict's state")

    def _bytes(self, read: Callable[[int], bytes], count: int) -> bytes:
        # Before they are read: room for as many as it says would be made at once.
        data = read(count) if count <= self.size else b""
        if len(data) != count:
            raise PickleError("damage", _SHORT)
        return data

    def _add(self, cost: int) -> None:
        self.cost += cost
        if self.cost > most_bytes(self.size):
            raise PickleError("size", f"with more than {most_bytes(self.size):,} bytes")

    def _search(self) -> int:
        """What it takes the loader to look whether it may make an object."""
        return len(self.names) * _WORD // 2

    def _global(self, module: str, name: str) -> _Global:
        spelt = f"{module}.{name}"
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[module, name]
        full = f"{IMPORT_MAPPING.get(module, module)}.{name}"
        if _HOSTILE.fullmatch(full):
            raise PickleError(
                "code", f"asks for the Python object {full!r}, which could run code when loaded"
            )
        self.names[spelt] = full
        self._add(self._search())
        if len(self.names) > _MOST_NAMES:
            raise PickleError("size", f"it has more than {_MOST_NAMES} kinds of Python objects")
        return _Global(full)

    def _fill(self, target: Any, items: Sequence[Any], *, pairs: bool) -> None:
        if type(target) is _Made:  # the loader refuses all else
            target.size += sum(map(_weight, items))
            self.filled[target.by] = "dict" if pairs else "list"
        if pairs:
            self._add(sum(map(_weight, items[::2])))
        elif type(target) is _Made:
            target.filled += filter(_is_tensor, items)

    def _call(self, function: Any, arguments: Any) -> Any:
        given: list[Any] = arguments.items
        self._add(arguments.size + self._search())
        if function == _FROM_TYPE and len(given) == 4:  # it calls its first with its third
            if given[1] not in _PLAIN_TENSORS:
                raise PickleError("code", f"holds a tensor of the class {str(given[1])!r}")
            return self._call(given[0], given[2])
        elements = arguments.elements
        if function in _ITERATES:
            if any(map(_has_tensors if function == _ORDERED else _is_tensor, given)):
                raise PickleError("size", f"it would make a {function} of a tensor")
            if function == "torch.Size":
                return given[0]
            if function in _OF_BYTES and not _are_latin(given):
                raise PickleError("size", f"it calls {function} otherwise than pickles of bytes do")
            return _Made(function, size=arguments.size)
        if type(function) is _Global and _ALLOCATES.fullmatch(function) and given:
            raise PickleError("size", f"it would make a {function} of a size that it only names")
        if type(function) is _Global and _COMPUTES.fullmatch(function):
            parts = [p for g in given for p in (g.items if type(g) is _Tuple else [g])]
            if not all(map(_is_part, parts)) or (
                function == _SPARSE and type(given[1]) is not _Tuple
            ):
                raise PickleError("size", "it would make a tensor of what is none")
            self._add(_WIDEST * elements)
        if function in _SHAPE_AT:
            elements = _count(given[_SHAPE_AT[function]])
        return _Made(str(function), elements=elements)

    def _build(self, target: Any, state: Any) -> None:
        by = target.by if type(target) is _Made else ""
        self._add((state.size if type(state) in (_Tuple, _Made) else _WORD) + self._search())
        if by in _ITERATES and by != _ORDERED:
            raise PickleError("damage", f"it has a state of a {by}, which has none")
        if by.startswith("torch."):
            if _is_tensor(state):
                raise PickleError("size", "it would go through a tensor as a tensor's state")
            if type(state) is _Tuple and len(state.items) == 4:  # of torch before 0.4
                target.elements = _count(state.items[2])
        elif _has_tensors(state):
            self.spread.add(by)

    def _storage(self, identifier: Any) -> _Made:
        word, kind = identifier.items[:2]
        if word == "module":  # of torch < 1.6, with the source of its class
            raise PickleError("code", f"holds an object of the class {str(kind)!r}")
        key, _, count = identifier.items[2:5]
        if word != "storage" or type(key) is not str or type(count) is not int or count < 0:
            raise PickleError("damage", "it has a storage without a name, a type or a size")
        name = str(kind).rpartition(".")[2].removesuffix("Storage")
        nbytes = count * _ITEM_SIZES.get(name, 1)
        self.storages[key] = max(nbytes, self.storages.get(key, 0))
        return _Made("storage")


def _popped(stack: list[Any], count: int) -> list[Any]:
    """The last items, taken off."""
    if count > len(stack):
        raise IndexError
    items = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return items


def _line(file: BinaryIO) -> str:
    line = file.readline(_LONGEST_NAME)
    if not line.endswith(b"\n") or b"\0" in line:
        raise PickleError("damage", "it has a name without an end")
    return str(line[:-1], "utf-8")
