"""What users build on, held as it is: commands, the public face, options of trainers.

    python tests/test_surface.py > tests/data/surface.json

writes anew what a change of them is compared with: whoever changes one sees in the diff what else
that means. Below it, what holds for all modules at once.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import modelsoup
from modelsoup.merging.methods.registry import registered_methods
from modelsoup.terminal.cli import main
from modelsoup.trees.trainer import get_trainer, trainer_names

ROOT = Path(__file__).parent.parent
STORED = Path(__file__).parent / "data" / "surface.json"
SOURCES = [
    path.relative_to(ROOT)
    for folder in ("modelsoup", "adapters/modelsoup_i2i", "adapters/modelsoup_openvino")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
MUTABLE = {"Job", "_Checker", "_Value", "_Open", "_Model", "Survey", "Look", "Subject", "_Call"}
"""What is filled in while it is worked on."""


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """A command and all below it, by what a person types."""
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=name)
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            yield from commands(found, f"{name} {below}")


def told(command: click.Command) -> dict[str, Any]:
    """What a person may type, and what happens if they do not."""
    return {
        "says": inspect.cleandoc(command.help or ""),
        "takes": [parameter(each) for each in command.params],
    }


def parameter(each: click.Parameter) -> dict[str, Any]:
    own = {
        "names": [*each.opts, *each.secondary_opts], "required": each.required,
        "default": plain(each.default), "values": each.nargs, "repeated": each.multiple,
        "kind": kind(each.type), "called": each.metavar,
    }  # fmt: skip
    if isinstance(each, click.Option):
        own |= {"flag": each.is_flag, "says": each.help, "shown": bool(each.show_default)}
    return own


def kind(of: click.ParamType) -> str:
    if isinstance(of, click.Choice):
        return f"one of {', '.join(map(str, of.choices))}"
    if isinstance(of, click.IntRange | click.FloatRange):
        return f"{of.name} from {of.min} to {of.max}"
    return of.name


def plain(value: Any) -> Any:
    """A default as JSON; None for what click has for none."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool) else None


def faces() -> dict[str, str]:
    """How each public name is called."""
    found = {}
    for name in sorted(modelsoup.__all__):
        value = getattr(modelsoup, name)
        if isinstance(value, type) and issubclass(value, BaseException):
            found[name] = f"error: {', '.join(base.__name__ for base in value.__mro__[1:-2])}"
        elif isinstance(value, type) and not dataclasses.is_dataclass(value):
            found[name] = "class"
        elif callable(value) and not typing.get_origin(value):
            # A default that is an object has an address in its text.
            found[name] = re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(value)))
        else:
            found[name] = repr(value)
    return found


def options() -> dict[str, dict[str, str]]:
    """What the trainers of this distribution may be told, and what they take where it is not."""
    return {
        name: {
            field.name: default(field) for field in dataclasses.fields(get_trainer(name).options)
        }
        for name in trainer_names()
    }


def default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else repr(field.default)


def methods() -> dict[str, dict[str, Any]]:
    """What merges, how many models, and by which parameters."""
    return {
        found.name: {
            "models": list(found.models), "base": found.base,
            "parameters": {
                name: "required" if own.is_required else repr(own.default)
                for name, own in found.parameters.items()
            },
        }
        for found in registered_methods() if found.function.__module__.startswith("modelsoup.")
    }  # fmt: skip


def surface() -> dict[str, Any]:
    return {
        "commands": {name: told(command) for name, command in commands(main, "soup")},
        "python": faces(),
        "methods": methods(),
        "trainers": options(),
    }


def flat(value: Any, place: str = "") -> dict[str, Any]:
    """With a name for each part, so that a difference in one is told alone."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list) and value:
        parts = enumerate(value)
    else:
        return {place: value}
    return {
        key: leaf for name, part in parts for key, leaf in flat(part, f"{place}/{name}").items()
    }


def test_what_users_build_on_is_as_it_was():
    """A change that is meant is written anew: see the top of this file."""
    now, stored = flat(surface()), flat(json.loads(STORED.read_text("utf-8")))
    changed = {
        name: (stored.get(name, "absent"), now.get(name, "absent"))
        for name in {*now, *stored} if now.get(name, "absent") != stored.get(name, "absent")
    }  # fmt: skip
    assert not changed


GIVEN = {
    name: command for name, command in commands(main, "soup")
    if isinstance(command, click.Group) or any(each.required for each in command.params)
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_a_command_without_all_that_it_needs_prints_its_help(name: str):
    made = CliRunner().invoke(main, name.split()[1:], prog_name="soup")
    assert made.output.startswith(f"Usage: {name} ") and "Options:" in made.output
    assert made.exit_code in (0, 2)


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_dataclasses_are_frozen(source: Path):
    """What is described does not change under whoever holds it; exceptions have their reasons."""
    for node in ast.walk(ast.parse((ROOT / source).read_text("utf-8"))):
        if not isinstance(node, ast.ClassDef) or node.name in MUTABLE:
            continue
        for decorator in node.decorator_list:
            called = decorator.func if isinstance(decorator, ast.Call) else decorator
            if getattr(called, "id", None) == "dataclass":
                given = {
                    k.arg: ast.literal_eval(k.value) for k in getattr(decorator, "keywords", [])
                }
                assert given.get("frozen") is True, f"{source}: {node.name}"


def _for_types_only(source: Path) -> set[str]:
    """The names that a module imports for annotations."""
    found: set[str] = set()
    for node in ast.parse((ROOT / source).read_text("utf-8")).body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.body:
                if isinstance(statement, ast.Import | ast.ImportFrom):
                    found |= {a.asname or a.name.partition(".")[0] for a in statement.names}
    return found


HEAVY = ("adapters/", "modelsoup/torch_", "modelsoup/executors", "modelsoup/fused")
TYPED = [
    pytest.param(
        source, id=str(source),
        marks=[pytest.mark.needs("i2i"), pytest.mark.needs("openvino")]
        if str(source).startswith(HEAVY) else [],
    )
    # A package has its modules' names as soon as they are imported, which others may do first.
    for source in SOURCES if _for_types_only(source) and source.name != "__init__.py"
]  # fmt: skip


@pytest.mark.parametrize("source", TYPED)
def test_what_is_imported_for_types_alone_is_not_imported(source: Path):
    """Commands start at once, and no circle is closed."""
    module = ".".join(source.with_suffix("").parts).removeprefix("adapters.")
    there = vars(importlib.import_module(module.removesuffix(".__init__")))
    assert not _for_types_only(source) & there.keys()


if __name__ == "__main__":
    print(json.dumps(surface(), indent=1, ensure_ascii=False))
