"""Plans with something wrong in them: one sentence for each fault or a plan, never a traceback.

What is drawn is seeded, so that a failure comes back; `pytest -m slow` draws 120,000.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from safetensors.numpy import save_file
from trainers import network

from modelsoup import SoupError, check, parse_tree
from modelsoup.terminal.picture import dot, mermaid, svg

WHOLE = [
    """soup: 1
seed: 3
models:
  a: a.safetensors
  b: {path: b.safetensors, xxh3_128: '00000000000000000000000000000000'}
  t: {train: {trainer: "trainers:Add", add: 2e-1, resources: {gpus: 1}}, start: b.safetensors}
  sub: {of: [a, t], merge: {weights: [0.2, 0.8], layers: {low-level: merge, rest: drop}}}
groups: {low: ["D.*", group:high], high: ["*.high.*"]}
defaults:
  merge: {beta: 0.3, layers: [low-level, "G.*=0.3;freeze"]}
  finetune: {trainer: "trainers:Add", add: 5, steps: 2, seed: 4}
tree:
  of:
    - sub
    - {pair: [a, b, sub], shuffle: 7, odd: last, finetune: false, name: stage}
""",
    """soup: 1
models: {a: a.safetensors, b: b.safetensors}
defaults: {train: {command: [python, train.py, "{output}"]}}
tree:
  of: [{of: [a, b], merge: {method: ties, base: a.safetensors, density: 0.5, weight: 1}}, b]
  merge: {method: slerp, t: 0.4, dtype: bf16, on_integer: max, seed: 5, low_level: 0.5}
  finetune: {command: [x, --in, "{start}", "{output}"], env: {A: 1}, timeout: 5, folder: .}
""",
    """soup: 1
models: {a: &a a.safetensors, b: *a, c: {of: [a, b], merge: &m {layers: {"G.*": second}}}}
groups: {low: [D.*]}
tree: {of: [c, {of: [a, c], merge: *m}, {of: [b], merge: {dtype: f16, parameters: {a: no}}}]}
""",
]  # fmt: skip
STRANGE = [
    "!!int x", "!!bool abc", "!!float", "!!binary AA==", "! x", "9" * 5000, "0x" + "f" * 5000,
    "18446744073709551615", "-1", "0", "1e999", "-.inf", ".nan", "1e-400", "2.5", "010", "~", "",
    "true", "no", "yes", '"\\U00110000"', '"\\ud800"', '"\\x9b2J"', "\x9b", "\u202e", "\ufffe",
    "'\n'", "a\x00b", "/", "/dev/zero", "/proc/self/mem", "..", ".", "x" * 300, "y/" * 3000,
    "a.safetensors/x", "\U0001f600", "[]", "{}", "[[[[]]]]", "{{}: {}}", "[a]", "{a: b}", "*a",
    "*zz", "&z [*z]", "&a x", "<<: *a", "? x", "- x", "|", ">-\n  x", "# x", "---", "...", "%X",
    "\t", "'", '"', "{", "}", "[", "]", ":", ",", "group:low", "group:none", "re:(", "re:[", "**x",
    "[!", "=", ";", "G_*=first;frezee", "first", "second", "drop", "base", "model 3", "low-level",
    "subnetwork", "freeze", "slerp", "ties", "dare_linear", "no_such", "trainers:Add",
    "trainers:Nobody", "trainers:BadTensors", "no_such:X", "json:loads", ":", "os:", "command",
    "{output}", "{nothing}", "soup", "models", "tree", "of", "pair", "merge", "rest", "layers",
    "f16", "f8_e4m3", "i4", "random", "sub", "stage", "a#2", "root", "t", "9" * 30, "1_000",
]  # fmt: skip

WORD = re.compile(r"[\w.-]+")


def drawn(rng: random.Random) -> str:
    """A plan, changed in a few places."""
    text = rng.choice(WHOLE)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        begin = rng.randrange(len(text))
        match rng.choice("wwwwwwicdlpg"):
            case "w":  # a word is another
                (begin, end) = rng.choice([word.span() for word in WORD.finditer(text)] or [(0, 1)])
                text = text[:begin] + rng.choice(STRANGE) + text[end:]
            case "i":  # something comes in
                text = text[:begin] + rng.choice(STRANGE) + text[begin:]
            case "c":
                text = text[:begin] + chr(rng.randrange(rng.choice((128, 0xD800)))) + text[begin:]
            case "d":  # something is gone
                text = text[:begin] + text[begin + rng.randint(1, 12) :]
            case "l":  # a line is elsewhere
                lines = text.split("\n")
                lines.insert(rng.randrange(len(lines)), rng.choice(lines))
                lines.pop(rng.randrange(len(lines)))
                text = "\n".join(lines)
            case "p":  # a part of it is elsewhere
                part = text[begin : begin + rng.randint(1, 40)]
                place = rng.randrange(len(text))
                text = text[:place] + part + text[place:]
            case "g":  # a word is a list
                (begin, end) = rng.choice([word.span() for word in WORD.finditer(text)] or [(0, 1)])
                text = f"{text[:begin]}[{text[begin:end]}]{text[end:]}"
        text = text or "x"
    return text


def outcome(text: str, folder: Path) -> str:
    """What becomes of a plan; a failed assertion or another error shows the text."""
    start = time.process_time()
    try:
        tree, warnings = parse_tree(text, folder=folder, name="plan")
    except SoupError as error:
        assert error.args, text
        assert all(line.isprintable() and line.startswith("plan") for line in error.args), text
        return "refused"
    except BaseException as error:
        error.add_note(text)
        raise
    try:
        plan = check(tree, warnings=warnings)
        json.dumps(plan.as_json(), indent=2)
        ElementTree.fromstring(svg(plan))
        drawings = dot(plan) + mermaid(plan)
    except BaseException as error:
        error.add_note(text)
        raise
    assert all(line.isprintable() for line in drawings.split("\n")), text
    assert all(line.startswith("plan:") for line in plan.problems), plan.problems
    assert time.process_time() - start < 2, text
    return "has problems" if plan.problems else "sound"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate("ab"):
        save_file(network(number), tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "count",
    [2000, pytest.param(120_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])],
)
def test_no_plan_ends_in_a_traceback(count: int, folder: Path) -> None:
    assert {outcome(text, folder) for text in WHOLE} == {"sound", "has problems"}
    seen = Counter(outcome(drawn(random.Random(seed)), folder) for seed in range(count))
    assert min(seen[kind] for kind in ("refused", "has problems", "sound")) > count / 100
