"""The errors a user can cause, each one sentence that says what, where and what was expected."""

from __future__ import annotations

import difflib
import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Literal

LISTED = 5
"""How many names an error lists before it only counts the rest."""
_LONG, _MANY = 200, 5000  # characters of a name, and names, that are compared: difflib is slow


class SoupError(Exception):
    """Something the user can put right; the message is one sentence, the commands exit with 1.

    Args:
        *lines: one sentence each. They hold names from files, so that whatever could drive the
            terminal or begin another line is spelt out.
    """

    def __init__(self, *lines: object) -> None:
        super().__init__(*(printable(str(line)) for line in lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


class CheckpointError(SoupError):
    """An input is missing, damaged, or not a safetensors checkpoint."""


class RuleError(SoupError):
    """A layer rule is malformed or matches nothing."""


class ParameterError(SoupError):
    """An unknown method, parameter or option, or a value out of its range."""


class MismatchError(SoupError):
    """The models do not fit together under the rules: names, shapes or dtypes differ."""


class OutputError(SoupError):
    """The output cannot be written: it exists, its folder is missing, the disk is full."""


class NonfiniteError(SoupError):
    """NaN or infinity in an input or in the result."""


class PlanError(SoupError):
    """A plan of a tree is malformed, or cannot be carried out."""


class TrainerError(SoupError):
    """A trainer is not installed, was given wrong options, or did not do what it must."""


class StoreError(SoupError):
    """A store cannot be read or written, or holds no such result."""


class RunError(SoupError):
    """A run could not finish; what was finished is kept."""


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """`"; did you mean 'a' or 'b'?"` for the names most like `name`, or an empty string."""
    if len(name) > _LONG:
        return ""
    close = difflib.get_close_matches(name, list(islice(known, _MANY)), n=limit, cutoff=0.5)
    if not close:
        return ""
    return f"; did you mean {' or '.join(repr(found) for found in close)}?"


def printable(text: str) -> str:
    """A text from a file, fit to be shown: what is no printable character is spelt out.

    Control characters, line breaks, marks that turn the direction of writing, and the surrogates
    that stand for bytes that are no UTF-8: a name must neither drive the terminal nor forge a line.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def listed(names: Sequence[str], limit: int = LISTED) -> str:
    """The first names and how many more there are: `a, b, c and 4 more`."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 70


def said(value: object) -> str:
    """A value from a file, as an error shows it: however large, some words of it."""
    return _SHORT.repr(value)


def must_be_several(name: str, paths: object) -> None:
    """Refuse one path where a list of them is meant; its letters would be taken for paths.

    Raises:
        ParameterError: it is one.
    """
    if isinstance(paths, str | bytes | os.PathLike):
        raise ParameterError(
            f"{name} is {os.fspath(paths)!r}, one path, but must be a list of paths"
        )
    if not isinstance(paths, Iterable):
        raise ParameterError(f"{name} is {said(paths)}, but must be a list of paths")


def how_to_install(extra: str) -> str:
    """How an extra is installed, as the pages of the docs have it: no index offers modelsoup."""
    return f"pip install -e '.[{extra}]' in a clone of modelsoup"


def counted(number: int, noun: str) -> str:
    """`1 tensor`, `2,000 tensors`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def are_counted(number: int, noun: str) -> str:
    """`1 tensor is`, `2,000 tensors are`."""
    return f"{counted(number, noun)} {'is' if number == 1 else 'are'}"


def sized(nbytes: float) -> str:
    """`1.23 GB`: bytes in powers of 1000, as Hugging Face counts."""
    return _scaled(nbytes, ("B", "kB", "MB", "GB", "TB"))


def count(number: float) -> str:
    """`1.23 G`: a count in powers of 1000."""
    return _scaled(number, ("", "k", "M", "G", "T")).strip()


def exact(number: float) -> str:
    """`5`, `0.1`, `1e-05`: a number of a recipe or a training, no two of which look alike."""
    short = f"{number:g}"
    return short if float(short) == number else float.__repr__(number)


def worded(value: object) -> str:
    """A value as `--set` and a plan have it."""
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return exact(value)
    if isinstance(value, list):
        return f"[{', '.join(map(worded, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {worded(one)}' for name, one in value.items())}}}"
    return str(value)


def _scaled(number: float, units: tuple[str, ...]) -> str:
    power = min(len(units) - 1, int(math.log10(number) // 3)) if number >= 1 else 0
    digits = f"{number / 1000**power:.3g}" if power else f"{number:.0f}"
    return f"{digits} {units[power]}"


Dialect = Literal["command", "python", "plan"]

_dialect: ContextVar[Dialect] = ContextVar("dialect", default="python")


@contextmanager
def speaking(dialect: Dialect) -> Iterator[None]:
    """Have hints speak as the command line, Python or a plan's file does, within a `with` block."""
    token = _dialect.set(dialect)
    try:
        yield
    finally:
        _dialect.reset(token)


def option(name: str, value: str | None = None) -> str:
    """An option as whoever reads the hint would write it: `--base BASE`, `base=…`, `base: BASE`.

    Args:
        name: as in Python: `on_integer`.
        value: a placeholder or a word; None for a switch.
    """
    dialect = _dialect.get()
    if dialect == "command":
        flag = f"--{name.replace('_', '-')}"
        return flag if value is None else f"{flag} {value}"
    if dialect == "plan":
        return f"{name}: {'true' if value is None else value}"
    if value is None:
        return f"{name}=True"
    is_word = value.isascii() and value.islower()
    return f"{name}={value!r}" if is_word else f"{name}=…"


def parameter_option(name: str, value: str) -> str:
    """A merge method's parameter, as `option` has it: `--set t=0.4`, `parameters={'t': 0.4}`."""
    dialect = _dialect.get()
    if dialect == "command":
        return f"--set {name}={value}"
    if dialect == "plan":
        return f"{name}: {value}"
    word = value.capitalize() if value in ("true", "false") else value
    return f"parameters={{{name!r}: {word}}}"


def auxiliary_option(name: str) -> str:
    """An auxiliary input of two models, as `option` has it."""
    dialect = _dialect.get()
    if dialect == "command":
        return f"--aux {name}=A,B"
    return f"aux: {{{name}: [A, B]}}" if dialect == "plan" else f"aux={{{name!r}: […]}}"


def layer_option(rules: Sequence[tuple[str, str]], rest: str | None = None) -> str:
    """Layer rules, as `option` has them, quoted so that they can be pasted.

    Args:
        rules: pattern and what is done, its words separated by `;`.
        rest: what is done with all others, if that is to be said.
    """
    dialect = _dialect.get()
    if dialect == "command":
        said = [f"--layers {_for_the_shell(f'{p}={what}')}" for p, what in rules]
        return " ".join([*said, *([] if rest is None else [option("rest", rest)])])
    if dialect == "plan":
        said = [f"{_for_yaml(p)}: {_words_for_yaml(what)}" for p, what in rules]
        return f"layers: {{{', '.join([*said, *([] if rest is None else [f'rest: {rest}'])])}}}"
    last = "" if rest is None else f", {option('rest', rest)}"
    return f"layers=[{', '.join(repr(f'{p}={what}') for p, what in rules)}]{last}"


def renaming_option(renames: Sequence[tuple[str, str, str]]) -> str:
    """Renames, as `option` has them: each as one text, and as its pattern and its new name."""
    dialect = _dialect.get()
    if dialect == "command":
        return " ".join(f"--rename {_for_the_shell(text)}" for text, _, _ in renames)
    if dialect == "plan":
        said = [f"{_for_yaml(pattern)}: {_for_yaml(new)}" for _, pattern, new in renames]
        return f"renames: {{{', '.join(said)}}}"
    return f"renames={[text for text, _, _ in renames]!r}"


def patterns_option(name: str, patterns: Sequence[str]) -> str:
    """An option that takes patterns, as `option` has it."""
    dialect = _dialect.get()
    if dialect == "command":
        flag = f"--{name.replace('_', '-')}"
        return " ".join(f"{flag} {_for_the_shell(pattern)}" for pattern in patterns)
    if dialect == "plan":
        return f"{name}: [{', '.join(map(_for_yaml, patterns))}]"
    return f"{name}={list(patterns)!r}"


def _for_the_shell(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"


def _for_yaml(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _words_for_yaml(what: str) -> str:
    return what if what.isidentifier() else f"[{', '.join(map(_for_yaml, what.split(';')))}]"
