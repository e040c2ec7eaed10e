"""What was imported by a path before the core had rooms is imported by it still, and said."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import import_module

import pytest

from modelsoup.moved import MOVED


@pytest.mark.parametrize("old", [old for old in MOVED if old != "torch_bridge"])
def test_a_module_is_found_by_its_old_name(old: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"modelsoup.{old} is modelsoup.{MOVED[old]} now"):
        sys.modules.pop(f"modelsoup.{old}", None)
        found = import_module(f"modelsoup.{old}")
    assert found is import_module(f"modelsoup.{MOVED[old]}")


def test_an_old_name_is_put_in_no_modules_place() -> None:
    for old, new in MOVED.items():
        if old == "torch_bridge":  # which needs torch
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            import_module(f"modelsoup.{old}")
        import_module(f"modelsoup.{new}")
    own = [name for name in sys.modules if name.startswith("modelsoup.") and name.count(".") > 1]
    for name in own:
        room, _, leaf = name.rpartition(".")
        if name.removeprefix("modelsoup.") not in MOVED:
            assert getattr(sys.modules[room], leaf) is sys.modules[name], name


def test_names_are_imported_from_an_old_name() -> None:
    code = "from modelsoup.rules import parse_rule; import modelsoup.methods.averages as a; "
    code += "from modelsoup.methods.registry import method, parameter; "
    code += "from modelsoup.merge_plan import MergePlan, plan_merge; "
    code += "from modelsoup.merging import rules; print(parse_rule is rules.parse_rule, a.__name__)"
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True modelsoup.merging.methods.averages\n"
    assert "DeprecationWarning: modelsoup.rules is modelsoup.merging.rules now" in done.stderr
