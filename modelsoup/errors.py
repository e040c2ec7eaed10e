"""The errors a user can cause, each one sentence that says what, where and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

LISTED = 5
"""How many names an error lists before it only counts the rest."""


class SoupError(Exception):
    """Something the user can put right; the message is one sentence, the commands exit with 1."""


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
    close = difflib.get_close_matches(name, list(known), n=limit, cutoff=0.5)
    if not close:
        return ""
    return f"; did you mean {' or '.join(repr(found) for found in close)}?"


def printable(text: str) -> str:
    """A text whose control characters are spelt out: a name must not drive the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def listed(names: Sequence[str], limit: int = LISTED) -> str:
    """The first names and how many more there are: `a, b, c and 4 more`."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
