"""What a plan shows of itself, in words and pictures, and where a picture may be put."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file
from trainers import network

from modelsoup import FineTune, Merge, Recipe, Store, Training, binary_tree, check, parse_tree
from modelsoup.terminal.cli import main
from modelsoup.terminal.picture import dot, mermaid, svg, what
from modelsoup.trees.operations import INNER, Builder, Load

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("abcd"):
        save_file(network(number), f"{name}.safetensors")
    Path("tree.yaml").write_text(TREE)
    return tmp_path


def soup(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# The steps are the same for all; what is told apart is the note, which is long.
TREE = """soup: 1
models:
  a: a.safetensors
  b: b.safetensors
  c: {train: {trainer: "trainers:Add", steps: 3, add: 0.5}}
  d: {train: {trainer: "trainers:Add", steps: 3, add: 0.25}}
defaults:
  merge: {beta: 0.5, dtype: f32}
  finetune: {trainer: "trainers:Add", steps: 2, add: 1, note: "shared"}
tree:
  of:
    - {of: [a, b], name: left, finetune: {note: "a learning rate that is warmed up slowly"}}
    - of: [c, d]
      name: right
      finetune: {note: "another schedule altogether"}
      merge: {layers: {"D.*": 0.3, "G.*": second}}
"""


def texts(picture: str) -> dict[str, str]:
    """The words of every box, by its node's name; each line must fit into its box."""
    found = {}
    for box in ElementTree.fromstring(picture).findall(f"{SVG}g"):
        title, rectangle = box.find(f"{SVG}title"), box.find(f"{SVG}rect")
        assert title is not None and title.text is not None and rectangle is not None
        top, height = (float(rectangle.attrib[name]) for name in ("y", "height"))
        lines = box.findall(f"{SVG}text")
        middles = [float(line.attrib["y"]) - 4 for line in lines]
        assert sum(middles) / len(middles) == pytest.approx(top + height / 2)
        for line in lines:
            assert top + 10 < float(line.attrib["y"]) < top + height - 3
            limit = {"name": 22, "what": 30, "note": 26}[line.attrib["class"]]
            assert line.text is not None and len(line.text) <= limit
        found[title.text.partition(":")[0]] = " ".join(str(line.text) for line in lines)
    return found


def test_what_sets_nodes_apart_is_shown_whole_and_what_they_share_is_not() -> None:
    plan = check(parse_tree(TREE)[0])
    assert what(plan, "left") == (
        "tune: trainers:Add, note a learning rate that is warmed up slowly"
    )
    assert what(plan, "right") == "tune: trainers:Add, note another schedule altogether"
    assert what(plan, "root") == "tune: trainers:Add, note shared"
    assert what(plan, "c") == "train: trainers:Add, add 0.5"
    assert what(plan, "right.merge") == ("linear layers D.* → merge; beta:0.3 | G.* → second")
    boxes = texts(svg(plan))
    assert boxes["left"].endswith(what(plan, "left"))
    assert what(plan, "right.merge") in boxes["right"]
    for words in (dot(plan), soup("plan", "tree.yaml").stdout):
        assert "note a learning rate that is warmed up slowly" in words
        assert "steps 2" not in words


CLOSE = """soup: 1
models:
  x: {train: {trainer: "trainers:Add", add: 0.12345671}}
  y: {train: {trainer: "trainers:Add", add: 0.12345672}}
  z: {train: {trainer: "trainers:Add", add: 0.12345672, seed: 5, resources: {gpus: 1}}}
tree: {of: [x, y, z], merge: {weights: [1, 2, 0.12345671]}}
"""


def test_numbers_that_differ_late_and_seeds_are_told() -> None:
    plan = check(parse_tree(CLOSE)[0])
    assert [what(plan, leaf) for leaf in "xyz"] == [
        "train: trainers:Add, add 0.12345671",
        "train: trainers:Add, add 0.12345672",
        'train: trainers:Add, add 0.12345672, seed 5, resources {"gpus": 1}',
    ]
    assert what(plan, "root") == "linear weights 1 2 0.12345671"
    assert texts(svg(plan))["z"] == f"z {what(plan, 'z')}"
    nodes = {node["node"]: node for node in plan.as_json()["nodes"]}
    assert (nodes["z"]["seed"], nodes["z"]["resources"]) == (5, {"gpus": 1})


def on_a_terminal(*arguments: str) -> str:
    """What a command prints on a terminal of 80 columns."""
    child, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-m", "modelsoup", *arguments], stdin=terminal, stdout=terminal,
        stderr=subprocess.PIPE,
    ):  # fmt: skip
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while chunk := os.read(child, 1 << 16):
                shown += chunk
    os.close(child)
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())


def test_a_list_of_results_and_the_steps_of_a_plan_are_whole_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    name = "a_leaf_with_a_name_of_fifty_characters_and_no_blank"
    Path("close.yaml").write_text(re.sub(r"\by\b", name, CLOSE))
    steps = on_a_terminal("plan", "close.yaml").split(" step ")[1]
    assert name in steps
    assert 'add 0.12345672, seed 5, resources {"gpus": 1}' in steps
    assert soup("run", "close.yaml", "-q", "--store", "store").exit_code == 0
    listed = on_a_terminal("store", "list", "--store", "store")
    assert all(entry.key[:12] in listed for entry in Store("store", create=False).entries())
    assert re.search(r"train trainers:Add add=0\.12345671 ", listed)
    assert re.search(r"train trainers:Add add=0\.12345672 seed=5 ", listed)
    assert listed.count("seed=") == 1


def test_where_nothing_differs_the_first_number_is_told() -> None:
    tree = binary_tree(
        {n: f"{n}.safetensors" for n in "abcd"}, merge=Merge(Recipe(beta=0.25)),
        finetune=FineTune(Training("trainers:Add", {"note": "x", "add": 2.0, "steps": 3})),
    )  # fmt: skip
    plan = check(tree)
    assert {what(plan, node) for node, o in tree.operations() if isinstance(o, FineTune)} == {
        "tune: trainers:Add, add 2"
    }
    assert what(plan, "root.merge") == "linear β 0.25"
    assert what(check(binary_tree(["a.safetensors", "b.safetensors"])), "root") == "linear"


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ({"weights": [0.2, 0.8]}, {"beta": 0.5}, "linear weights 0.2 0.8"),
        ({"dtype": "bf16"}, {}, "linear dtype BF16"),
        ({"rest": "drop", "layers": ["D.*"]}, {"layers": ["D.*"], "rest": "first"},
         "linear rest drop"),
        ({"on_integer": "max"}, {}, "linear on_integer max"),
        ({"parameters": {"normalize": False}}, {}, "linear normalize false"),
        ({"seed": 7}, {}, "linear seed 7"),
    ],
)  # fmt: skip
def test_whatever_differs_between_merges_is_told(one, other, words) -> None:
    builder = Builder()
    leaves = [builder.add(n, Load(Path(f"{n}.safetensors"))) for n in "abcd"]
    pairs = [
        builder.add(f"pair-{n}", Merge(Recipe(**recipe)), leaves[2 * n : 2 * n + 2])
        for n, recipe in enumerate((one, other))
    ]
    builder.add("root", Merge(Recipe(**other)), pairs)
    assert what(check(builder.tree("root")), "pair-0") == words


def test_bases_and_starts_that_differ_are_told() -> None:
    text = """soup: 1
models:
  a: {train: {trainer: "trainers:Add"}, start: c.safetensors}
  b: {train: {trainer: "trainers:Add"}, start: d.safetensors}
defaults: {merge: {method: task_arithmetic, weight: 1}}
tree: {of: [{of: [a, b], merge: {base: c.safetensors}}, a], merge: {base: d.safetensors}}
"""
    plan = check(parse_tree(text)[0])
    assert what(plan, "a") == "train: trainers:Add, start c.safetensors"
    assert what(plan, "root.1") == "task_arithmetic base c.safetensors"
    assert 'n3["root.1<br/>task_arithmetic base c.safetensors"]' in mermaid(plan)


def test_after_a_run_the_picture_has_the_metrics() -> None:
    assert soup("plan", "tree.yaml", "--svg", "before.svg").exit_code == 0
    assert soup("run", "tree.yaml", "-q").exit_code == 0
    assert soup("plan", "tree.yaml", "--svg", "after.svg").exit_code == 0
    before, after = (texts(Path(f"{n}.svg").read_text()) for n in ("before", "after"))
    assert {n: words for n, words in after.items() if words != before[n]} == {
        n: f"{before[n]} step {2 if n in ('left', 'right', 'root') else 3}"
        for n in ("c", "d", "left", "right", "root")
    }
    assert Path("before.svg").read_text().count("stroke-dasharray") == 5
    assert "stroke-dasharray" not in Path("after.svg").read_text()


def test_every_level_lies_above_the_one_below_it() -> None:
    plan = check(binary_tree([f"{n}.safetensors" for n in "abcdabcd"]))
    picture = ElementTree.fromstring(svg(plan))
    boxes = picture.findall(f"{SVG}g/{SVG}rect")
    x, y, width, height = (
        [float(box.attrib[n]) for box in boxes] for n in ("x", "y", "width", "height")
    )
    rows = sorted(set(y))
    assert [y.count(row) for row in rows] == [1, 2, 4, 8]
    assert all(low + height[0] < high for low, high in pairwise(rows))
    for row in rows:
        places = sorted(x[n] for n in range(15) if y[n] == row)
        assert all(b - a > width[0] for a, b in pairwise(places))
    assert max(a + b for a, b in zip(x, width, strict=True)) + 28 == float(picture.attrib["width"])
    assert max(a + b for a, b in zip(y, height, strict=True)) + 28 == float(
        picture.attrib["height"]
    )
    assert picture.attrib["viewBox"] == f"0 0 {picture.attrib['width']} {picture.attrib['height']}"
    ends = [re.findall(r"-?[\d.]+", path.attrib["d"]) for path in picture.findall(f"{SVG}path")]
    places = set(zip(x, y, strict=True))
    assert len(ends) == 14
    for x1, y1, cx1, cy1, cx2, cy2, x2, y2 in (map(float, end) for end in ends):
        assert (x1 - width[0] / 2, y1) in places  # from the top of a box
        assert (x2 - width[0] / 2, y2 - height[0]) in places  # to the bottom of one above
        assert (cx1, cx2, cy1, cy2) == (x1, x2, (y1 + y2) / 2, (y1 + y2) / 2)


def test_a_box_says_what_becomes_of_it_to_who_points_at_it() -> None:
    plan = check(parse_tree(TREE.replace("trainers:Add", "trainers:Plain"))[0])
    titles = [
        title.text for title in ElementTree.fromstring(svg(plan)).findall(f"{SVG}g/{SVG}title")
    ]
    assert titles == [
        "a: load, there, 4 tensors", "b: load, there, 4 tensors",
        "left: finetune, to do, 4 tensors", "c: train, to do", "d: train, to do",
        "right: finetune, to do", "root: finetune, to do",
    ]  # fmt: skip


def test_names_from_files_break_no_picture() -> None:
    strange = 'x"]\n  n9["<img onerror=1> & \\ *b* #35; \x9b\u202e'
    builder = Builder()
    leaves = [builder.add(n, Load(Path("a.safetensors"))) for n in (strange, "b")]
    builder.add("root", Merge(), leaves)
    plan = check(builder.tree("root"))
    drawings = dot(plan), mermaid(plan), svg(plan)
    assert all(line.isprintable() for drawing in drawings for line in drawing.split("\n"))
    assert drawings[0].count("\n") == 3 + 3 + 2 + 1
    assert drawings[1].count("\n") == 1 + 3 + 2
    (line,) = re.findall(r'  n0\["(.*)"\]', drawings[1])
    assert not set(re.sub("#[0-9]+;", "", line).replace("<br/>", "")) & set('"<>&`#\\')
    assert f"x&quot;]{INNER}" not in drawings[2]
    assert "<img" not in drawings[2]


def test_a_picture_replaces_nothing_unasked(here: Path) -> None:
    Path("picture.svg").write_text("mine")
    result = soup("plan", "tree.yaml", "--svg", "picture.svg")
    assert (result.exit_code, Path("picture.svg").read_text()) == (1, "mine")
    assert result.stderr == "Error: picture.svg exists (--force replaces it)\n"
    assert soup("plan", "tree.yaml", "--svg", "picture.svg", "--force").exit_code == 0
    assert ElementTree.parse("picture.svg").getroot().tag == f"{SVG}svg"
    assert sorted(p.name for p in here.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("picture.png", "the picture picture.png is SVG, so its name must end in .svg"),
        ("a.safetensors", "its name must end in .svg"),
        ("tree.yaml", "its name must end in .svg"),
        ("plan.svg", "the picture plan.svg would replace plan.svg, which is read"),
        ("link.svg", "the picture link.svg would replace .*data.svg, which is read"),
        ("folder/x.svg", "the picture folder/x.svg would lie in .*folder, which is read"),
        ("folder/in/x.svg", "would lie in .*folder, which is read"),
        ("nowhere/x.svg", "the folder nowhere of x.svg does not exist"),
        ("folder.svg", "folder.svg is a folder"),
        ("x" * 300 + ".svg", "x+.svg: File name too long"),
    ],
)
def test_a_picture_never_takes_the_place_of_what_a_plan_reads(output: str, said: str) -> None:
    Path("folder/in").mkdir(parents=True)
    Path("folder.svg").mkdir()
    save_file(network(1), "folder/model.safetensors")
    Path("data.svg").write_text("data")
    os.link("data.svg", "link.svg")
    Path("plan.svg").write_text(
        "soup: 1\nmodels: {a: folder, b: folder}\n"
        'tree: {of: [a, b], finetune: {command: [x, "{output}"], files: [data.svg]}}\n'
    )
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    result = soup("plan", "plan.svg", "--svg", output, "--force")
    assert result.exit_code == 1
    assert re.search(said, result.stderr)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_a_checkpoint_in_a_plans_place_is_told_and_the_hint_prints_its_plan() -> None:
    assert soup("merge", "a.safetensors", "b.safetensors", "-o", "a b.safetensors").exit_code == 0
    for command in ("plan", "run"):
        result = soup(command, "a b.safetensors")
        assert result.exit_code == 1
        hint = re.search(r"\(soup (plan --from) '(.*)' prints the plan", result.stderr)
        assert hint is not None
    assert "of: [a, b]" in soup(*hint[1].split(), hint[2]).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--schema", "tree.yaml"), "--schema goes with no TREE.yaml"),
        (("--from", "a.safetensors", "tree.yaml"), "--from goes with no TREE.yaml"),
        (("--from", "a.safetensors", "--svg", "x.svg"), "--from goes with no --svg"),
        (("tree.yaml", "--force"), "--force is for --svg"),
    ],
)
def test_options_that_do_not_belong_together_are_told(arguments, said) -> None:
    result = soup("plan", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not Path("x.svg").exists()


def test_a_plan_is_printed_whole_as_json() -> None:
    content = json.loads(soup("plan", "tree.yaml", "--json").stdout)
    assert [node["node"] for node in content["nodes"]][-1] == content["root"] == "root"
    assert content["models"] == 7


def test_what_json_has_no_number_for_is_a_text() -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    numbers = ("inf", "-inf", "nan", 0.5)
    given = {"w": ".inf", "x": "-.inf", "y": ".nan", "z": "0.5"}
    train = "  {}: {{train: {{trainer: 'trainers:Add', add: {}}}}}\n"
    text = "".join(train.format(*leaf) for leaf in given.items())
    Path("inf.yaml").write_text(f"soup: 1\nmodels:\n{text}tree: {{of: [w, x, y, z]}}\n")
    printed = soup("plan", "inf.yaml", "--json").stdout
    nodes = json.loads(printed, parse_constant=refuse)["nodes"]
    assert tuple(node["options"]["add"] for node in nodes[:4]) == numbers
